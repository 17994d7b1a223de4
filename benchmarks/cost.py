"""What a call, its proof and a trace cost, beside Torch-Pruning in the same run.

    OMP_NUM_THREADS=1 python benchmarks/cost.py                     # all parts, some minutes
    OMP_NUM_THREADS=1 python benchmarks/cost.py --parts prune --rounds 5

- prune: processor seconds of a whole `prune` of half of every group, proof included, against Torch-Pruning's whole call
  (magnitude pruner, which proves nothing), each on a copy of one model, in turn.
- trace: of a trace against Torch-Pruning's graph and groups, over convolutional networks at the list's small pictures;
  and of a trace that computes everything, as within `prune` (`values=True`).
- memory: what the proof holds at its peak beside the model, in models, counted in living tensors.

Every round runs both; medians of the rounds, the first of which warms up and doesn't count.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import architectures
import timm
import torch
import torch_pruning as tp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import secateur
from secateur.surgery import prove

MODELS = (("resnet50", 224), ("resnet50", 64), ("vit_base_patch16_224", 224))
CNNS = [
    "convnext_atto",
    "cspdarknet53",
    "cspresnet50",
    "darknet53",
    "densenet121",
    "dla34",
    "efficientnet_b0",
    "ese_vovnet19b_dw",
    "ghostnet_100",
    "hardcorenas_a",
    "hgnetv2_b0",
    "inception_v3",
    "lcnet_050",
    "mnasnet_050",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "regnetx_002",
    "regnety_002",
    "repvgg_a0",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "vgg11",
]


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def pruner(model: Any, x: torch.Tensor) -> Any:
    """Torch-Pruning's magnitude pruner; whole heads where there are some."""
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    more: dict[str, Any] = {"num_heads": heads, "prune_num_heads": True} if heads else {}
    return tp.pruner.MagnitudePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()],
        **more,
    )


def groups(model: Any, x: torch.Tensor) -> None:
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    list(graph.get_all_groups(ignored_layers=[model.get_classifier()]))


def medians(rounds: int, *calls: Callable[[], float]) -> list[float]:
    """Of each call over the rounds, in which all of them run in turn; the last one is that of the ratio of the first two."""
    rows = [[call() for call in calls] for _ in range(rounds + 1)][1:]
    return [
        *(statistics.median(row) for row in zip(*rows)),
        statistics.median(row[0] / row[1] for row in rows),
    ]


def ours(model: Any, x: torch.Tensor, proof: bool) -> float:
    own = copy.deepcopy(model)
    options: dict[str, Any] = {"method": "group-magnitude", "target": "50%", "prove": proof}
    return seconds(lambda: secateur.prune(own, x, inplace=True, **options))


def theirs(model: Any, x: torch.Tensor) -> float:
    own = copy.deepcopy(model)
    return seconds(lambda: pruner(own, x).step())


def by_call(rounds: int) -> None:
    for name, size in MODELS:
        model = timm.create_model(name).eval()
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        calls = (partial(ours, model, x, True), partial(theirs, model, x), partial(ours, model, x, False))
        whole, other, plain, ratio = medians(rounds, *calls)
        print(
            f"prune {name} {size}: {whole:.2f} s, Torch-Pruning {other:.2f} s, ratio {ratio:.2f}; "
            f"without the proof {plain:.2f} s, ratio {plain / other:.2f}",
            flush=True,
        )


def by_trace(rounds: int) -> None:
    ratios, whole = [], []
    for name in CNNS:
        model, x = architectures.build(f"timm:{name}")
        try:
            groups(copy.deepcopy(model), x)
        except Exception as error:  # noqa: BLE001  what it can't list
            print(f"trace {name}: Torch-Pruning fails ({type(error).__name__})")
            continue
        ours, theirs, computed, ratio = medians(
            rounds,
            lambda m=model, x=x: seconds(lambda: secateur.trace(m, x)),  # type: ignore[misc]
            lambda m=model, x=x: seconds(lambda: groups(m, x)),  # type: ignore[misc]
            lambda m=model, x=x: seconds(lambda: secateur.trace(m, x, values=True)),  # type: ignore[misc]
        )
        ratios.append(ratio)
        whole.append(computed / theirs)
        print(
            f"trace {name}: {ours:.3f} s, Torch-Pruning {theirs:.3f} s, ratio {ratio:.2f}; "
            f"with all values {computed:.3f} s, ratio {whole[-1]:.2f}",
            flush=True,
        )
    for text, found in (("", ratios), (" with all values", whole)):
        print(
            f"trace{text}: median ratio {statistics.median(found):.2f} of {len(found)}, "
            f"from {min(found):.2f} to {max(found):.2f}"
        )


class Alive(TorchDispatchMode):
    """The most bytes alive at once of what operations made within, memory that is there already not counted."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.own = [t.untyped_storage() for t in model.state_dict().values()]
        self.sizes, self.now, self.most = {s._cdata: 0 for s in self.own}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def by_memory() -> None:
    for name, size in MODELS:
        model = timm.create_model(name).eval()
        x = torch.randn(1, 3, size, size)
        graph = secateur.trace(model, x)
        keep = {g.name: torch.arange(0, g.size, 2) for g in graph.prunable() if g.kind != "layers"}
        one = sum(t.nbytes for t in model.state_dict().values())
        with Alive(model) as alive:
            assert prove(model, graph, keep, x) == {}
        print(
            f"memory {name} {size}: {1 + alive.most / one:.2f} models at the peak of the proof, its own included"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("prune", "trace", "memory"), default=["prune", "trace", "memory"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "prune" in args.parts:
        by_call(args.rounds)
    if "trace" in args.parts:
        by_trace(args.rounds)
    if "memory" in args.parts:
        by_memory()


if __name__ == "__main__":
    main()

"""One training loop: AdamW, cosine with warm-up, clipping, bf16 where the device has it, resumable to the bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.files import atomic_write_bytes
from secateur.inputs import call, map_tensors
from secateur.method import Objective
from secateur.progress import bar


@dataclass
class State:
    """What a hook sees, and may change. `losses` holds one number a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    batch: Any = None
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)


Hook = Callable[[State], None]


def fit(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    lr: float = 1e-4,
    batch: int = 8,
    loss: Objective | None = None,
    loss_terms: Sequence[Objective] = (),
    after_backward: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
    parameters: Iterable[Any] | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = 1.0,
    seed: int = 0,
    precision: str = "auto",
    checkpoint: str | Path | None = None,
    every: int = 100,
    description: str = "training",
) -> list[float]:
    """Train `model` in place for `steps` steps; gives the loss of each.

    >>> losses = fit(model, token_ids, steps=100, lr=1e-4)  # doctest: +SKIP
    >>> losses = fit(net, (images, labels), steps=100, checkpoint="run.safetensors", every=20)  # doctest: +SKIP

    data: token ids [samples, length], a tuple or dict of tensors whose first axis is the samples, or a list of ready
    batches (then `batch` is not used). Samples are drawn in a seeded order, each once an epoch.
    loss: `(model, batch) -> scalar`; None: next-token loss for ids, cross-entropy of `model(x)` for a pair (x, labels),
    the model's own loss for a dict. loss_terms: more of the same, added to it.
    after_backward: hooks that run on the gradients, before clipping. after_step: hooks that run on the new weights.
    parameters: tensors or AdamW parameter groups; None: all of the model's that require a gradient.
    warmup: share of the steps in which the rate rises from 0 to `lr`; it then falls to 0 on a cosine.
    clip: largest norm of the gradient; 0 turns it off. weight_decay applies to tensors of two or more axes.
    precision: "auto" (bf16 autocast on accelerators that have it), "bfloat16", "float32" (no autocast).
    checkpoint: a file, written every `every` steps and at the end. A run that finds it goes on from there, and ends
    with the same bits as one that was never stopped (same machine, same settings; hooks keep no state of their own).

    Raises `SecateurError`: a loss or gradient that isn't finite (naming the step; the weights are those of the step
    before), nothing to train, no data, a checkpoint of other settings.
    """
    _check(steps, lr, batch, warmup, every)
    draw = Draw(data, batch, seed)
    objective = loss or default_loss
    groups = _groups(model, parameters, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device = trained[0].device
    state = State(model, optimizer, steps)
    file = Path(checkpoint) if checkpoint else None
    settings = {
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "betas": list(betas),
        "clip": clip,
        "seed": seed,
        "precision": precision,
        "data": draw.fingerprint,
        "shapes": _digest([list(p.shape) for p in trained]),
    }
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), bar(description, steps) as advance:
        torch.manual_seed(seed)
        model.train()
        try:
            if file and file.exists():
                read_checkpoint(file, state, trained, settings)
                advance(state.step)
            while state.step < steps:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * schedule(state.step, steps, warmup)
                state.batch = map_tensors(draw(state.step), lambda t: t.to(device))
                with autocast(device, precision):
                    total = objective(model, state.batch)
                    for term in loss_terms:
                        total = total + term(model, state.batch)
                state.loss = total.item()
                _finite(state.loss, "loss", state.step)
                optimizer.zero_grad()
                total.backward()
                for hook in after_backward:
                    hook(state)
                norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
                _finite(norm.item(), "gradient's norm", state.step)
                optimizer.step()
                for hook in after_step:
                    hook(state)
                state.losses.append(state.loss)
                state.step += 1
                if file and (state.step % every == 0 or state.step == steps):
                    write_checkpoint(file, state, trained, settings)
                advance(1)
        finally:
            optimizer.zero_grad()
            for module, mode in modes.items():
                module.training = mode
    return state.losses


def schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    """The share of the learning rate at a step: linear up over `warmup * steps` steps, then half a cosine to 0.

    >>> [round(schedule(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """bf16 autocast where it is asked for, or where the device is an accelerator that computes in it."""
    if precision not in ("auto", "bfloat16", "float32"):
        raise SecateurError(
            f"there is no precision {precision!r}", where="precision", fix="auto, bfloat16 or float32"
        )
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" or (precision == "auto" and capable):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token loss for token ids, cross-entropy for (x, labels), the model's own loss for a dict."""
    if isinstance(batch, Tensor):
        return next_token_loss(logits_of(model(batch)), batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return F.cross_entropy(logits_of(model(batch[0])).float(), batch[1])
    output = call(model, batch)
    own = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if own is not None:
        return own
    if hasattr(batch, "keys") and "input_ids" in batch:
        return next_token_loss(logits_of(output), batch["input_ids"], batch.get("attention_mask"))
    raise SecateurError(
        f"{type(model).__name__} gives no loss for such a batch",
        where="loss",
        fix="pass loss=(model, batch) -> scalar",
    )


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [b, t, vocabulary] at t for ids [b, t] at t + 1; 0 in mask [b, t]: padding."""
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def logits_of(output: Any) -> Tensor:
    """The logits of what a model gave: a tensor, something with `.logits`, or a tuple that begins with them."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output[0]


class Draw:
    """Batches in a seeded order: `draw(step)` depends on the seed and the step alone, so a resumed run needs no more.

    An epoch takes each sample once; a batch may reach over the end of an epoch.
    """

    def __init__(self, data: Any, batch: int, seed: int):
        self.ready = isinstance(data, list)
        self.data, self.seed = data, seed
        self.batch = 1 if self.ready else batch
        self.count = _length(data)
        self.fingerprint = _digest([self.count, self.batch, _describe(data)])
        self.order: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Any:
        index = [self._at(i) for i in range(step * self.batch, (step + 1) * self.batch)]
        if self.ready:
            return self.data[index[0]]
        return map_tensors(self.data, lambda tensor: tensor[torch.tensor(index, device=tensor.device)])

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self.order:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = {k: v for k, v in self.order.items() if k == epoch - 1}
            self.order[epoch] = torch.randperm(self.count, generator=generator)
        return int(self.order[epoch][place])


def write_checkpoint(file: Path, state: State, trained: Sequence[Tensor], settings: dict[str, Any]) -> None:
    """Weights that train, buffers, moments, random state and position: one safetensors file, whole or not at all."""
    tensors = {f"parameter/{i}": p.detach() for i, p in enumerate(trained)}
    tensors |= {f"buffer/{name}": b for name, b in state.model.named_buffers()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if trained[0].device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(trained[0].device)
    about = {"step": state.step, "losses": state.losses, "settings": settings}
    tensors = {key: t.cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    atomic_write_bytes(file, save(tensors, metadata={"secateur": json.dumps(about)}))


@torch.no_grad()
def read_checkpoint(file: Path, state: State, trained: Sequence[Tensor], settings: dict[str, Any]) -> None:
    """Puts a run back where `write_checkpoint` left it.

    Raises `SecateurError` when the file is damaged, or was written with other settings.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            about = json.loads((opened.metadata() or {})["secateur"])
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise SecateurError(
            f"it isn't a checkpoint ({error})", where=str(file), fix="remove it to start anew"
        ) from error
    if changed := [key for key, value in settings.items() if about["settings"].get(key) != value]:
        raise SecateurError(
            f"it was written with another {', '.join(changed)}",
            where=str(file),
            fix="use the same settings, or remove it to start anew",
        )
    for i, parameter in enumerate(trained):
        parameter.copy_(tensors[f"parameter/{i}"])
    for name, buffer in state.model.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and trained[0].device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], trained[0].device)
    state.step, state.losses = about["step"], about["losses"]


def _groups(model: nn.Module, parameters: Iterable[Any] | None, decay: float) -> list[dict[str, Any]]:
    given = list(model.parameters() if parameters is None else parameters)
    if given and isinstance(given[0], dict):
        return [{"weight_decay": decay, **group} for group in given]
    trained = [p for p in given if p.requires_grad]
    if not trained:
        raise SecateurError(
            "no parameter requires a gradient", where=type(model).__name__, fix="call model.requires_grad_()"
        )
    split = ([p for p in trained if p.ndim >= 2], decay), ([p for p in trained if p.ndim < 2], 0.0)
    return [{"params": params, "weight_decay": value} for params, value in split if params]


def _check(steps: int, lr: float, batch: int, warmup: float, every: int) -> None:
    for name, value in (("steps", steps), ("batch", batch), ("every", every)):
        if value < 1:
            raise SecateurError(f"{value} is less than 1", where=name, fix="give a whole number from 1")
    if not (lr > 0 and math.isfinite(lr)):
        raise SecateurError(f"{lr} isn't a learning rate", where="lr", fix="such as 1e-4")
    if not 0 <= warmup <= 1:
        raise SecateurError(
            f"{warmup} is outside 0..1", where="warmup", fix="the share of the steps, such as 0.1"
        )


def _finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise SecateurError(
            f"the {what} is {value} at step {step}",
            where="training",
            fix="lower lr or raise warmup, and check the data and the weights for NaN",
        )


def _length(data: Any) -> int:
    lengths: set[int] = {len(data)} if isinstance(data, list) else set()
    if not lengths:
        map_tensors(data, lambda tensor: lengths.add(tensor.shape[0] if tensor.ndim else 0))
    if len(lengths) != 1 or 0 in lengths:
        raise SecateurError(
            "there are no samples" if lengths <= {0} else f"its tensors hold {sorted(lengths)} samples",
            where="data",
            fix="token ids [samples, length], a tuple or dict of tensors of equal length, or a list of batches",
        )
    return lengths.pop()


def _describe(data: Any) -> Any:
    return map_tensors(data, lambda t: [list(t.shape), str(t.dtype), t.double().sum().item()])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

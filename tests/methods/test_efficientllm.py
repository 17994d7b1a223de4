"""The worked examples and invariants of the sheet."""

import copy

import pytest
import torch
import transformers
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.methods.efficientllm import SALIENCY, EfficientLLM
from secateur.solvers.least_squares import least_squares
from secateur.stats.hessians import every_matrix
from secateur.surgery import Shrinking, cut_units
from secateur.training import fit
from secateur.training.fit import State

IDS = torch.randint(64, (64, 12), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=4),
    "tied": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True),
    "grouped": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "biases": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_inner=24, n_positions=16, bos_token_id=0, eos_token_id=0
    ),
}  # fmt: skip


def build(name="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]())


def run(model, target, **settings):
    settings = {"data": IDS, "steps": 20, "batch": 8, "optimizer": "adamw", "lr": 3e-3, **settings}
    return secateur.train_prune(model, IDS[:1], method="efficientllm", target=target, **settings)


def removals(pruned):
    return pruned.report["phases"][-1]["removals"]


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_saliencies_of_the_sheet():
    w, g = torch.tensor([[1, -0.5], [2, 0.1]]), torch.tensor([[0.1, -0.2], [0.05, 0.3]])
    expected = {"second": [0.0100, 0.00545], "first": [0.20, 0.13], "mixed": [0.19, 0.12455]}
    for kind, values in expected.items():
        found = SALIENCY[kind](w * g).sum(1)
        assert found.tolist() == pytest.approx(values, abs=1e-6) and found.argmin() == 1


class Repaired(nn.Module):
    """One layer behind two that make its inputs; what it multiplies isn't what the model is given."""

    def __init__(self, inputs, weight):
        super().__init__()
        self.make, self.read = nn.Linear(len(inputs), len(inputs), bias=False), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.make.weight.copy_(torch.eye(3))
            self.read.weight.copy_(weight)

    def forward(self, x):
        return self.read(self.make(x))


def test_the_local_update_of_the_sheet():
    X = torch.tensor([[1, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1.0]])
    W = torch.tensor([[1, 2, -1], [0.5, -1, 3]])
    model = Repaired(X, W)
    graph = trace(model, X.T)
    keep = {"make:neurons": torch.tensor([1, 2])}
    state = State(model, torch.optim.SGD(model.parameters()), 1, batch=(X.T, torch.zeros(4)))
    EfficientLLM(damping=0.0).repair(state, Shrinking(model, graph), keep)
    assert torch.allclose(model.read.weight, torch.tensor([[0, 2, 0], [0, -1, 3.5]]), atol=1e-6)
    error = lambda weight: float((W @ X - weight @ X).square().sum())
    deleted = W.clone()
    deleted[:, 0] = 0
    assert error(model.read.weight.detach()) == pytest.approx(3.75, abs=1e-5)
    assert error(deleted) == pytest.approx(7.5)
    best = torch.linalg.lstsq(X[1:].T, (W @ X).T).solution.T
    assert torch.allclose(model.read.weight[:, 1:], best, atol=1e-5)
    # the sheet's formula, by the inverse, with damping
    H = X @ X.T
    H += 0.01 * H.diagonal().mean() * torch.eye(3)
    inverse = H.inverse()
    formula = W - W[:, :1] / inverse[0, 0] * inverse[:1]
    assert torch.allclose(least_squares(W, X @ X.T, torch.tensor([1, 2])), formula, atol=1e-5)


def test_parameters_of_the_sheet():
    """24 layers are counted from one; 49,152 words from 64."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=64, hidden_size=2048, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32,
                intermediate_size=8192, tie_word_embeddings=True,
            )
        )  # fmt: skip
    model = model.to_empty(device="cpu")
    model.tie_weights()
    graph = trace(model, IDS[:1, :4])
    size = {"heads": 19, "neurons": 3031, "hidden": 1188}
    keep = {g.name: torch.arange(size[g.kind]) for g in graph.prunable(EfficientLLM.kinds)}
    whole = lambda layer, h: 24 * (layer - 64 * h - h) + 49152 * h + h
    assert whole(graph.params(), 2048) / 1e6 == pytest.approx(1711.4, abs=0.05)
    assert whole(graph.params(keep), 1188) / 1e6 == pytest.approx(456, abs=0.5)


@pytest.mark.parametrize("name", ["llama", "tied", "grouped"])
def test_a_removal_takes_the_parameters_of_the_sheet(name):
    """4 h d L (heads), 2 h d (r + 1) L (a key and its r queries), 3 h L (neurons), V + L (4 H d + 3 f + 2) + 1 (the stem)."""
    model = build(name)
    L, h, d, H, f, V = 3, 16, 4, 4, 24, 64
    kinds = {"heads": 4 * h * d * L, "kv_groups": 2 * h * d * (2 + 1) * L, "neurons": 3 * h * L}
    kinds["hidden"] = (1 if name == "tied" else 2) * V + L * (4 * H * d + 3 * f + 2) + 1
    if name == "grouped":
        kinds["hidden"] -= L * 2 * 2 * d  # two keys and two values fewer
    graph, seen = trace(model, IDS[:1]), set()
    for kind, gone in kinds.items():
        groups = graph.prunable(kind)
        if not groups:
            continue
        seen.add(kind)
        small = copy.deepcopy(model)
        cut_units(small, graph, {g.name: torch.arange(g.size)[1:] for g in groups})
        assert count(model) - count(small) == gone
        assert sum(graph.unit_params(g) for g in groups) == gone
    assert seen == {"hidden", "neurons", "kv_groups" if name == "grouped" else "heads"}


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "macs<=60%") for name in MODELS), ("tied", "60%"), ("biases", "params<=55%")],
)
def test_any_decoder_meets_any_target_with_equal_layers(name, target):
    model = build(name)
    pruned = run(model, target, across="sum" if target == "60%" else "mean")
    graph = trace(model, IDS[:1])
    assert pruned.report["met"] and removals(pruned)
    sizes = {}
    for group in graph.prunable(EfficientLLM.kinds):
        sizes.setdefault(group.kind, set()).add(len(pruned.plan.keep.get(group.name, range(group.size))))
    assert all(len(found) == 1 for found in sizes.values())
    cost = {"6": None, "p": graph.params, "m": graph.macs}[target[0]]
    if cost is None:
        names = [n for n in every_matrix(model) if "layers" in n or ".h." in n]
        cost = lambda keep=None: graph.params(keep, names=names)
    share = float(target.rpartition("=")[2].rstrip("%")) / 100
    assert cost(pruned.plan.keep) <= share * cost() + 1e-6
    one = min(cost() - cost({g.name: torch.arange(1, g.size) for g in graph.prunable(k)}) for k in sizes)
    assert cost(pruned.plan.keep) > share * cost() - one
    fresh = build(name)
    secateur.apply_plan(fresh, pruned.plan)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), pruned.model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.isfinite(pruned.model(IDS[:2]).logits).all()


def test_what_was_saved_is_loaded_with_heads_that_no_config_divides(tmp_path):
    model = build("llama")
    pruned = run(model, "params<=95%", kinds=("heads",))
    assert pruned.plan.keep and len(next(iter(pruned.plan.keep.values()))) == 3
    pruned.save(tmp_path / "out")
    loaded, _ = secateur.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS[:2]).logits, pruned.model.eval()(IDS[:2]).logits)


def test_no_removals_are_plain_training():
    model = build()
    pruned = run(model, "100%")
    plain = build()
    losses = fit(plain, IDS, steps=20, batch=8, optimizer="adamw", lr=3e-3, clip=0.0, seed=0)
    assert removals(pruned) == [] and pruned.report["phases"][-1]["loss"] == losses[-1]
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), pruned.model.parameters(), strict=True))


def test_one_removal_a_time_and_what_leaves_is_the_least_salient():
    """The first removal, worked out from gradients by hand; others follow one by one where there is time."""
    pruned = run(build(), "params<=97%", interval=3, begin=0.1, end=0.5, saliency="first", update=False)
    found = removals(pruned)
    steps = [step for step, _, _ in found]
    assert steps == sorted(set(steps)) and steps[0] == 5 and all((s - 2) % 3 == 0 for s in steps)
    model, sums = build(), {}

    def add(state):
        if state.step in (2, 3, 4):
            for layer in range(3):
                mlp = model.model.layers[layer].mlp
                for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
                    weight = getattr(mlp, name).weight
                    own = (weight.detach() * weight.grad).abs().sum(axis)
                    sums[layer] = sums.get(layer, 0) + own

    fit(model, IDS, steps=20, until=5, batch=8, optimizer="adamw", lr=3e-3, clip=0.0, seed=0, after_backward=[add])  # fmt: skip
    least = sum(float(values.min()) for values in sums.values()) / (3 * 3 * 16)
    assert found[0][2]["neurons"] == pytest.approx(least, rel=1e-4)
    if found[0][1] == "neurons":
        for layer, values in sums.items():
            assert int(values.argmin()) not in pruned.plan.keep[f"model.layers.{layer}.mlp:neurons"].tolist()
    assert found[0][1] == min(found[0][2], key=found[0][2].get)


def test_a_target_that_is_met_exactly_takes_no_unit_more():
    """A neuron of each of three layers is 3 x 3 x 16 parameters."""
    model = build()
    limit = count(model) - 5 * 144
    pruned = run(model, f"params<={limit}", kinds=("neurons",))
    assert count(pruned.model) == limit and len(removals(pruned)) == 5


def test_a_short_training_takes_several_at_once_and_ends_in_time():
    found = removals(run(build(), "params<=50%", steps=10, interval=2, begin=0.2, end=0.8))
    assert {step for step, _, _ in found} == {4, 6, 8}
    assert EfficientLLM(interval=50, end=0.5).times(10) == [5] and EfficientLLM(begin=0.99, end=1.0).times(
        3
    ) == [3]


def test_the_update_lowers_the_jump_of_the_loss():
    """On the batch of the cut, of a model that was trained a little; the sum over all cuts."""
    jumps = {"with": 0.0, "without": 0.0}

    class Watched(EfficientLLM):
        name = "watched"

        def repair(self, state, now, keep):
            twins = {how: copy.deepcopy(now.model) for how in jumps}
            for how, twin in twins.items():
                shrinking = Shrinking(twin, now.graph)
                if how == "with":
                    super().repair(state, shrinking, now.relative(keep))
                shrinking.to(now.relative(keep))
                with torch.no_grad():
                    batch = state.batch
                    jumps[how] += float(twin(batch, labels=batch).loss - now.model(batch, labels=batch).loss)
            super().repair(state, now, keep)

    model = build()
    words = (IDS[:, :1] + torch.arange(12)) % 64
    fit(model, words, steps=80, batch=16, optimizer="adamw", lr=1e-2)
    secateur.train_prune(
        model, words[:1], method=Watched(), target="macs<=60%", data=words, steps=30, batch=16, lr=1e-3,
        optimizer="adamw",
    )  # fmt: skip
    assert 0 < jumps["with"] < 0.8 * jumps["without"]


def test_what_it_does_not_do_is_refused():
    model = build()
    with pytest.raises(SecateurError, match="seconds aren't measured between two steps"):
        run(model, "latency<=80%")
    with pytest.raises(SecateurError, match="one unit of every layer"):
        run(model, "60%", allocation="global")
    with pytest.raises(SecateurError, match="all would have left"):
        run(model, "60%", begin=0.5, end=0.4)
    with pytest.raises(SecateurError, match="can't be met"):
        run(model, "params<=1%")
    mixture = transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    )
    with pytest.raises(SecateurError, match="an expert no token"):
        run(mixture, "60%")


def test_a_run_that_was_stopped_between_two_cuts_ends_with_the_same_bits(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return model(batch, labels=batch).loss

    settings = {"loss": loss, "interval": 2, "end": 0.8, "across": "sum"}
    stops = set()
    whole = run(build("tied"), "params<=60%", **settings)
    calls.clear()
    stops = {5, 9, 14}
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run(build("tied"), "params<=60%", resume=tmp_path / "run", every=3, **settings)
    again = run(build("tied"), "params<=60%", resume=tmp_path / "run", every=3, **settings)
    assert again.plan == whole.plan and removals(again) == removals(whole)
    assert all(
        torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True)
    )
    assert again.model.config.to_dict() == whole.model.config.to_dict()

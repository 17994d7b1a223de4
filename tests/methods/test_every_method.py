"""The common checks: what every registered method owes its user, unasked."""

import copy
import subprocess
import sys

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.method import method_class
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.target import parse_target

EVERY = [m for m in secateur.list_methods() if issubclass(method_class(m), WeightMethod | UnitMethod)]
METHODS = [m for m in EVERY if getattr(method_class(m), "kinds", None) not in (("experts",), ("novices",))]
"""Those that cut nothing but experts have tests of their own, and those of `secateur.testing` on a mixture."""
WEIGHTS = [m for m in METHODS if issubclass(method_class(m), WeightMethod)]
UNITS = [m for m in METHODS if issubclass(method_class(m), UnitMethod)]
DEPTH = [m for m in UNITS if method_class(m).kinds == ("layers",)]
QUICK = {"tyr": {"generations": 2, "offspring": 4}}
"""Search sizes that keep a check short; the defaults are for real runs."""


def ids(model, rows=6, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def run(model, method, target="50%", **settings):
    settings = {"data": ids(model), "seqlen": 24, **QUICK.get(method, {}), **settings}
    return secateur.prune(model, method=method, target=target, **settings)


@pytest.fixture
def model(tiny_llama):
    """Four blocks of 4 KV groups and 48 neurons."""
    return tiny_llama(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=32
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def block_weights(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)


@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_changes_nothing_bit_for_bit(model, method):
    before = state(model)
    pruned = run(model, method, "100%")
    assert equal(state(pruned.model), before)
    assert equal(state(model), before)


@pytest.mark.parametrize("share", [0.75, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_exactly_and_never_exceeded(model, method, share):
    dense = block_weights(model)
    pruned = run(model, method, f"{share:.0%}")
    assert pruned.report["met"] is True
    if method in WEIGHTS:
        kept = sum(
            int((p != 0).sum())
            for n, p in pruned.model.named_parameters()
            if ".layers." in n and p.dim() == 2
        )
        assert kept == int(share * dense)
    elif method_class(method).share_of == "weights":
        kept = block_weights(pruned.model)
        one = {"layers": dense // 4}.get(
            method_class(method).kinds[0], 4 * 3 * 32
        )  # a neuron in each of four blocks
        assert share * dense - one < kept <= share * dense
    elif method_class(method).allocation in ("global", "per-kind"):
        whole = "kept whole by the budget"
        groups = [g for g in pruned.report["groups"] if g["reason"] in (None, whole)]
        assert sum(g["kept"] for g in groups) == int(share * sum(g["size"] for g in groups))
    else:
        for group in pruned.report["groups"]:
            if group["reason"] is None:
                assert share * group["size"] - 1 < group["kept"] <= max(1, share * group["size"])


@pytest.mark.parametrize("method", METHODS)
def test_the_input_model_is_untouched_and_the_seed_decides(model, method):
    before = state(model)
    first, second = run(model, method, seed=3), run(model, method, seed=3)
    assert equal(state(model), before)
    assert first.plan == second.plan
    assert equal(state(first.model), state(second.model))
    assert not equal(state(first.model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_saved_loaded_and_applied_to_a_fresh_model_gives_equal_tensors(model, method, tmp_path):
    pruned = run(model, method)
    pruned.plan.save(tmp_path)
    plan = secateur.Plan.load(tmp_path)
    assert plan == pruned.plan
    fresh = copy.deepcopy(model)
    secateur.apply_plan(fresh, plan)
    assert equal(state(fresh), state(pruned.model))


def exact_kinds(method):
    """For methods that cut the hidden width too: the kinds whose units no norm mixes."""
    kinds = method_class(method).kinds
    if kinds == ("hidden",):
        return {}
    return {"kinds": ("kv_groups", "neurons")} if kinds is None or "hidden" in kinds else {}


@pytest.mark.parametrize("method", [m for m in UNITS if method_class(m).kinds != ("hidden",)])
def test_slicing_equals_masking(model, method):
    """Every cut of whole heads, neurons and layers gives what zeroing them gives."""
    from secateur.surgery import mask_units
    from secateur.surgery.changes import set_values

    pruned = run(model, method, **exact_kinds(method))
    masked = copy.deepcopy(model)
    set_values(masked, pruned.plan.values)
    mask_units(masked, pruned.graph, pruned.plan.keep)
    tokens = ids(model, rows=2)
    with torch.no_grad():
        expected, found = masked(tokens).logits, pruned.model(tokens).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("method", UNITS)
def test_heads_stay_whole_and_the_cache_works(model, method):
    pruned = run(model, method, **exact_kinds(method))
    for name, parameter in pruned.model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            assert parameter.shape[0] % 8 == 0
        if name.endswith("q_proj.weight"):
            keys = pruned.model.get_parameter(name.replace("q_proj", "k_proj"))
            assert parameter.shape[0] == 2 * keys.shape[0]
    tokens = ids(model, rows=2, length=8)
    with torch.no_grad():
        full = pruned.model(tokens).logits[:, -1].argmax(-1)
        written = pruned.model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 8 and torch.equal(written[:, 8], full)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_training_mode_are_kept(model, method):
    model = model.to(torch.bfloat16).train()
    pruned = run(model, method)
    assert {p.dtype for p in pruned.model.parameters()} == {torch.bfloat16}
    assert pruned.model.training and model.training
    with torch.no_grad():
        assert torch.isfinite(pruned.model(ids(model, rows=1)).logits).all()


@pytest.mark.parametrize("method", [m for m in WEIGHTS])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_n_of_m_holds_in_every_group_of_every_row(model, method, pattern):
    n, m = parse_target(pattern).n_m
    pruned = run(model, method, pattern)
    for name, mask in pruned.plan.masks.items():
        assert (mask.reshape(-1, m).sum(1) == n).all()
        assert not pruned.model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "slicegpt"])  # which turns a stream once
@pytest.mark.parametrize("schedule", ["iterative:2"])
def test_an_iterative_schedule_ends_at_the_same_budget(model, method, schedule):
    pruned, once = run(model, method, schedule=schedule), run(model, method)
    if method in WEIGHTS:
        assert pruned.report["after"]["params_nonzero"] == once.report["after"]["params_nonzero"]
    else:
        assert pruned.report["met"]
        assert pruned.report["after"]["params"] <= pruned.report["before"]["params"]


@pytest.mark.parametrize("method", [m for m in UNITS if m not in DEPTH])
def test_params_and_macs_targets_count_the_whole_model(model, method):
    for target, key in (("params<=70%", "params"), ("macs<=70%", "macs")):
        report = run(model, method, target).report
        assert report["met"]
        limit = 0.7 * report["before"][key]
        one = limit * 0.05
        assert limit - one < report["after"][key] <= limit


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_loads_where_secateur_cannot_be_imported(model, method, tmp_path):
    pruned = run(model, method)
    pruned.save(tmp_path / "out")
    tokens = ids(model, rows=1)
    with torch.no_grad():
        expected = pruned.model(tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    script = (
        "import sys, torch; sys.modules['secateur'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        f"tokens = torch.load({str(tmp_path / 'tokens.pt')!r}, weights_only=True)\n"
        f"torch.save(model(tokens).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_nonsense_raises_one_named_error_and_leaves_the_model_alone(model, method):
    def refuse(match, candidate=model, **settings):
        with pytest.raises(SecateurError, match=match):
            secateur.prune(candidate, **{"method": method, "target": "50%", "data": ids(model), **settings})

    before = state(model)
    refuse("outside 0..1", target=1.5)
    refuse("can't be read", target="half")
    refuse("no hyperparameter", shrubbery=3)
    refuse("isn't a schedule", schedule="sometimes")
    refuse("outside 0..1", floor=2.0)
    if method_class(method).needs:
        refuse("empty", data=torch.empty(0, 8, dtype=torch.int64))
        refuse("vocabulary", data=ids(model) + 1000)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    refuse("NaN", candidate=broken, inplace=True)
    assert equal(state(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_midway_leaves_the_model_alone_in_place_too(model, method, monkeypatch):
    """The measurement of the finished model fails: what was done is undone or was never done to the model."""
    engine = sys.modules["secateur.pruning.prune"]

    before, calls, real = state(model), [], engine.measure

    def broken(*args, **kwargs):
        calls.append(1)
        if method in WEIGHTS and len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    if method in UNITS:
        monkeypatch.setattr(engine, "apply_plan", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    monkeypatch.setattr(engine, "measure", broken)
    with pytest.raises(KeyboardInterrupt):
        run(model, method, inplace=True)
    assert equal(state(model), before)


@pytest.fixture(scope="module")
def trained():
    """A trained language model (231 k parameters) and texts that it wrote: to calibrate on, and to be judged by."""
    from secateur.data.text import sample_from
    from secateur.tasks.llama2c import load_aidreams
    from secateur.utils.files import data_dir

    if data_dir() is None:
        pytest.skip("needs real data: set SECATEUR_DATA to its folder")
    model, _ = load_aidreams()
    return model, sample_from(model, 24, 64, seed=1), sample_from(model, 24, 64, seed=2)


def loss_after(trained, method, **settings):
    model, calibration, held_out = trained
    settings = {"data": calibration, "seqlen": 64, **QUICK.get(method, {}), **settings}
    pruned = secateur.prune(model, method=method, **settings).model
    with torch.no_grad():
        return pruned(held_out, labels=held_out).loss.item()


@pytest.fixture(scope="module")
def by_chance(trained):
    """Mean loss of three random choices, by target and kinds; made once."""
    found = {}

    def mean(control, target, kinds):
        if (control, target, kinds) not in found:
            settings = {"target": target, **({"kinds": kinds} if kinds else {})}
            found[control, target, kinds] = (
                sum(loss_after(trained, control, seed=i, **settings) for i in range(3)) / 3
            )
        return found[control, target, kinds]

    return mean


OWN_KINDS = {"2ssp", "slicegpt"}
"""They cut no single heads."""
WORSE_THAN_RANDOM = {"group-magnitude", "nirvana"}
"""On this 4-layer model; docs/results.md says so, and how they do on SmolLM2."""


@pytest.mark.needs_data
@pytest.mark.parametrize(
    "method", [m for m in METHODS if not m.startswith("random") and m not in WORSE_THAN_RANDOM]
)
def test_better_than_random_at_equal_budget_on_a_trained_model(trained, by_chance, method):
    if method in WEIGHTS:
        control, target, kinds = "random", "50%", None
    else:
        control, target = "random-structured", "75%"
        kinds = ("layers",) if method in DEPTH else ("heads", "neurons")
    settings = {"kinds": kinds} if kinds and method not in OWN_KINDS else {}
    assert loss_after(trained, method, target=target, **settings) < by_chance(control, target, kinds)


@pytest.mark.parametrize("method", EVERY)
def test_the_record_and_the_docstring_name_their_source(method):
    cls = method_class(method)
    assert cls.info.name == method and cls.info.title and cls.info.spec
    doc = (sys.modules[cls.__module__].__doc__ or "") + (cls.__doc__ or "")
    assert "arXiv" in doc or "arxiv" in doc or cls.info.arxiv is None
    assert "Spec:" in doc


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(SecateurError, match="wanda"):
        method_class("wandaa")

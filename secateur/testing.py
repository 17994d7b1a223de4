"""Checks that a method of anyone can be held to; this library's own tests run them over every method it has.

>>> from secateur.testing import check_method
>>> check_method(ScaledMagnitude)  # doctest: +SKIP

With pytest, a test each:

>>> @pytest.mark.parametrize("check", checks_for(ScaledMagnitude))  # doctest: +SKIP
... def test_scaled_magnitude(check):
...     run_check(ScaledMagnitude, check)

They run on tiny random models, on a CPU, in seconds. What a method can't do it says by its `tags`, and with what settings a
check is quick by `quick` (`secateur.method.Method`). `token_sets` makes what a token method sees of plain tensors, for worked examples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attention.layout import LEVELS, Layout
from secateur.attention.method import AttentionMethod
from secateur.errors import SecateurError
from secateur.families.vlm import facts_of, family_of
from secateur.method import Method, make_method
from secateur.prompts.method import Patches as PromptPatches
from secateur.prompts.method import PromptMethod, Seen
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.prune import Pruned, apply_plan, prune_with
from secateur.saliency import saliency
from secateur.saliency.method import SaliencyMethod
from secateur.saliency.objects.method import ObjectMethod
from secateur.tasks.sod import learn, lessons, read
from secateur.tasks.tiny import inputs_for, tiny_cnn, tiny_llama, tiny_llava, tiny_mixtral
from secateur.tokens.attach import Attached, attach
from secateur.tokens.counts import amount_of
from secateur.tokens.heads import head_ratios
from secateur.tokens.method import TokenMethod, WorkMethod
from secateur.tokens.modules import Trained
from secateur.tokens.state import Missing, TokenSets
from secateur.training.method import TrainMethod
from secateur.training.sampling import Sampler
from secateur.training.skip import SkipMethod
from secateur.training.task import Task
from secateur.training.train_prune import train_prune

Check = Callable[[type[Method]], None]


def check_method(cls: type[Method]) -> None:
    """Run every check that suits the kind of method.

    >>> from secateur.method import method_class
    >>> check_method(method_class("magnitude"))

    Args:
        cls: the class of a method, registered or not.

    Raises:
        AssertionError: a check failed; its name and what was found are in the text.
    """
    for name in checks_for(cls):
        run_check(cls, name)


def checks_for(cls: type[Method]) -> list[str]:
    """The names of the checks that suit the kind of method.

    >>> from secateur.method import method_class
    >>> "the budget is met" in checks_for(method_class("wanda"))
    True
    """
    for kind, checks in CHECKS.items():
        if issubclass(cls, kind):
            return list(checks)
    raise SecateurError(
        f"{cls.__name__} is of no kind that can be checked",
        where="testing",
        fix="derive it from WeightMethod, UnitMethod, TrainMethod, SkipMethod, TokenMethod, WorkMethod, AttentionMethod, PromptMethod, SaliencyMethod or ObjectMethod",
    )


def run_check(cls: type[Method], name: str) -> None:
    """Run one check of `checks_for`."""
    kind = next(kind for kind in CHECKS if issubclass(cls, kind))
    try:
        CHECKS[kind][name](cls)
    except (AssertionError, SecateurError) as error:
        raise AssertionError(f"{cls.__name__}: {name}: {error}") from error


# ---------------------------------------------------------------- what the checks share


def _make(cls: type[Method], **more: Any) -> Method:
    return make_method(cls, **{**cls.quick, **more})


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _require(holds: object, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _refuses(match: str, call: Callable[[], Any]) -> None:
    """`call` raises one SecateurError that says `match`."""
    try:
        call()
    except SecateurError as error:
        _require(match in str(error), f"refused with {str(error)!r}, which doesn't say {match!r}")
    else:
        raise AssertionError(f"nothing was refused where {match!r} should be")


def names_its_source(cls: type[Method]) -> None:
    """The record has a title, and the docstrings name the paper where the record has one."""
    import sys

    info = cls.info
    text = (sys.modules[cls.__module__].__doc__ or "") + (cls.__doc__ or "")
    _require(info.title, "its record has no title")
    _require(
        info.arxiv is None or info.arxiv in text, f"arXiv {info.arxiv} of the record isn't in a docstring"
    )


# ---------------------------------------------------------------- weights and units


def _ids(model: nn.Module, rows: int = 6, length: int = 24) -> Tensor:
    """Token ids [rows, length]."""
    size = model.config.vocab_size  # type: ignore[union-attr]
    return torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]


def _llama(cls: type[Method] | None = None) -> nn.Module:
    """A small language model; a mixture for methods that cut nothing but experts."""
    return (
        tiny_mixtral() if getattr(cls, "kinds", None) in (("experts",), ("novices",)) else tiny_llama()
    ).float()


def _pruned(cls: type[Method], model: nn.Module, target: str = "50%", **settings: Any) -> Pruned:
    settings = {"data": _ids(model), "seqlen": 24, **settings}
    return prune_with(model, method=_make(cls), target=target, **settings)


def keeps_everything(cls: type[Method]) -> None:
    """100 % changes nothing, bit for bit."""
    model = _llama(cls)
    _require(_same(_state(_pruned(cls, model, "100%").model), _state(model)), "100% changed a tensor")


def meets_the_budget(cls: type[Method]) -> None:
    """The target is met and said to be met; the parameters that are left agree."""
    for target, share in (("params<=80%", 0.8), ("params<=60%", 0.6)):
        model = _llama(cls)
        if cls.info.members("objects") <= {"L"} and target == "params<=60%":
            continue  # whole layers come in large steps
        report = _pruned(cls, model, target).report
        key = "params_nonzero" if issubclass(cls, WeightMethod) else "params"
        left = report["after"][key] / report["before"]["params"]
        _require(report["met"], f"{target} was not met")
        _require(left <= share + 1e-9, f"{left:.4f} of the parameters are left where {target} was asked")


def same_seed_same_plan(cls: type[Method]) -> None:
    """The seed decides, the input model is untouched, and something changed."""
    model = _llama(cls)
    before = _state(model)
    first, second = (_pruned(cls, model, seed=3) for _ in range(2))
    _require(_same(_state(model), before), "the model that was given changed")
    _require(first.plan == second.plan, "two runs with one seed give two plans")
    _require(not _same(_state(first.model), before), "50% changed nothing")


def plan_applies(cls: type[Method]) -> None:
    """The plan, applied to a fresh model, gives equal tensors."""
    model = _llama(cls)
    pruned = _pruned(cls, model)
    fresh = copy.deepcopy(model)
    apply_plan(fresh, pruned.plan)
    _require(_same(_state(fresh), _state(pruned.model)), "the plan gives other tensors than the run")


def keeps_dtype_and_mode(cls: type[Method]) -> None:
    """bfloat16 and training mode are kept, and the outputs are finite."""
    model = _llama(cls).to(torch.bfloat16).train()
    pruned = _pruned(cls, model)
    _require({p.dtype for p in pruned.model.parameters()} == {torch.bfloat16}, "the dtype changed")
    _require(pruned.model.training and model.training, "the mode changed")
    with torch.no_grad():
        _require(torch.isfinite(pruned.model(_ids(model, 1)).logits).all(), "an output isn't finite")


def refuses_nonsense(cls: type[Method]) -> None:
    """One named error for each mistake, and the model is left alone."""
    model = _llama(cls)
    before = _state(model)
    _refuses("outside 0..1", lambda: _pruned(cls, model, "150%"))
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=3))
    with torch.no_grad():
        broken = copy.deepcopy(model)
        next(p for n, p in broken.named_parameters() if "layers.1." in n and "up_proj" in n).view(-1)[0] = (
            torch.nan
        )
    _refuses("NaN", lambda: _pruned(cls, broken))
    _require(_same(_state(model), before), "a refused call changed the model")


def cut_equals_masked(cls: type[Method]) -> None:
    """Cutting whole heads and neurons gives what zeroing them gives."""
    from secateur.surgery import mask_units
    from secateur.surgery.changes import set_values

    model = _llama(cls)
    kinds = getattr(cls, "kinds", None)
    if kinds == ("hidden",):
        return  # a norm over fewer channels is another norm
    settings: dict[str, Any] = {}
    if kinds is None or "hidden" in kinds:
        settings["kinds"] = ("kv_groups", "neurons")
    pruned = _pruned(cls, model, **settings)
    masked = copy.deepcopy(model)
    set_values(masked, pruned.plan.values)
    mask_units(masked, pruned.graph, pruned.plan.keep)
    with torch.no_grad():
        expected, cut = masked(_ids(model, 2)).logits, pruned.model(_ids(model, 2)).logits
    _require(torch.allclose(cut, expected, rtol=1e-4, atol=1e-4), "the cut model isn't the masked one")


def n_of_m_holds(cls: type[Method]) -> None:
    """2:4 keeps two of every four inputs of every row."""
    pruned = _pruned(cls, _llama(cls), "2:4")
    for name, mask in pruned.plan.masks.items():
        _require((mask.reshape(-1, 4).sum(1) == 2).all(), f"{name} keeps other than 2 of 4")
        _require(not pruned.model.get_parameter(name)[~mask].any(), f"{name} isn't zero where it left")


# ---------------------------------------------------------------- training


def _classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_cnn().float()


def _trained(cls: type[Method], target: str = "50%", **settings: Any) -> Pruned:
    labels = torch.arange(32) % 4
    noise = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures = noise + labels[:, None, None, None].float()
    settings = {"data": (pictures, labels), "steps": 6, "batch": 8, **settings}
    if getattr(cls, "draws", False):
        del settings["data"], settings["batch"]
        return train_prune(_drawing(), method=_make(cls), target=target, **settings)
    return train_prune(_classifier(), inputs=pictures[:1], method=_make(cls), target=target, **settings)


def _drawing() -> Task:
    """A network that draws eight numbers from noise in three steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def start(count: int, seed: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(count)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) ** 2).mean()

    return Task(
        "drawing",
        build=lambda: copy.deepcopy(network),
        pretrained=lambda: copy.deepcopy(network),
        train=(torch.ones(8, 8), torch.zeros(8)),
        inputs=torch.ones(2, 8),
        loss=loss,
        sampler=Sampler(3, start, lambda model, x, number, asked: x + (model(x) - x) / (3 - number)),
    )


def training_meets_the_budget(cls: type[Method]) -> None:
    """The target is met, counted on the tensors that are left."""
    pruned = _trained(cls)
    _require(pruned.report["met"], "50% was not met")
    if pruned.plan.masks:
        kept = sum(int(mask.sum()) for mask in pruned.plan.masks.values())
        size = sum(mask.numel() for mask in pruned.plan.masks.values())
        _require(kept <= 0.5 * size + 1e-6, f"{kept} of {size} weights are left at 50%")
        for name, mask in pruned.plan.masks.items():
            _require(not pruned.model.get_parameter(name)[~mask].any(), f"{name} isn't zero where it left")
    else:
        _require(pruned.report["after"]["params"] < pruned.report["before"]["params"], "no unit left")


def training_repeats(cls: type[Method]) -> None:
    """The same seed gives the same bits; another one doesn't."""
    first, second, other = _trained(cls, seed=3), _trained(cls, seed=3), _trained(cls, seed=4)
    _require(_same(_state(first.model), _state(second.model)), "two runs with one seed differ")
    told = [
        run.report["phases"] for run in (first, other)
    ]  # where units are only chosen, two seeds may choose alike
    _require(
        not _same(_state(first.model), _state(other.model)) or told[0] != told[1], "the seed changes nothing"
    )


def training_refuses_nonsense(cls: type[Method]) -> None:
    """One named error for each mistake."""
    _refuses("outside 0..1", lambda: _trained(cls, "150%"))
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=3))


# ---------------------------------------------------------------- networks that skip


def _skipping(cls: type[Method], **more: Any) -> tuple[nn.Module, Tensor, SkipMethod]:
    """A network of the method's example, pictures for it, and the method."""
    method = _make(cls, **more)
    assert isinstance(method, SkipMethod)
    task = method.example()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return task.build().eval(), task.train[0][:4], method


@torch.no_grad()
def _ran(model: nn.Module, x: Tensor, method: SkipMethod, masked: bool = False) -> tuple[Tensor, Tensor]:
    """What it gives, and [B] the share of the work that it took."""
    with method.attach(model, masked) as attached:
        return model(x), attached.work.share.clone()


def skips_nothing(cls: type[Method]) -> None:
    """With the settings that skip nothing the network gives what it gives without the method, bit for bit; detached too."""
    model, x, method = _skipping(cls, **getattr(cls, "everything", {}))
    with torch.no_grad():
        plain = model(x)
    made, share = _ran(model, x, method)
    _require(
        torch.equal(made, plain) and bool((share == 1).all()), "something changed though nothing is skipped"
    )
    _ran(*_skipping(cls))
    with torch.no_grad():
        _require(torch.equal(model(x), plain), "the detached network isn't as it was")


def skips_as_masked(cls: type[Method]) -> None:
    """The masked pass, which trains, and the gathered one, which runs, give the same to 1e-5; something is skipped."""
    model, x, method = _skipping(cls)
    (made, share), (masked, _) = _ran(model, x, method), _ran(model, x, method, masked=True)
    _require(bool((share < 1).any()), "nothing is skipped")
    _require(
        torch.allclose(made, masked, rtol=1e-5, atol=1e-5),
        f"they differ by {(made - masked).abs().max():.2g}",
    )


def skips_by_picture(cls: type[Method]) -> None:
    """A batch gives what its pictures give one by one, and costs what they cost."""
    model, x, method = _skipping(cls)
    made, share = _ran(model, x, method)
    for number in range(len(x)):
        alone, cost = _ran(model, x[number : number + 1], method)
        _require(
            torch.allclose(made[number], alone[0], rtol=1e-5, atol=1e-5), f"picture {number} differs alone"
        )
        _require(torch.equal(share[number], cost[0]), f"picture {number} costs other work alone")


def skips_repeat(cls: type[Method]) -> None:
    """Training with the same seed gives the same bits, another one other bits; no weight leaves."""

    def trained(seed: int) -> Pruned:
        method = _make(cls)
        assert isinstance(method, SkipMethod)
        return train_prune(method.example(), method=method, steps=3, seed=seed)

    first, second, other = trained(3), trained(3), trained(4)
    _require(_same(_state(first.model), _state(second.model)), "two runs with one seed differ")
    _require(not _same(_state(first.model), _state(other.model)), "the seed changes nothing")
    counts = [first.report[when]["params"] for when in ("before", "after")]
    _require(counts[0] == counts[1], f"{counts[0]} parameters became {counts[1]}")


def skips_refuse_nonsense(cls: type[Method]) -> None:
    """One named error for each mistake, and the network is left alone."""
    model, _, method = _skipping(cls)
    _refuses(
        "removes no weights", lambda: train_prune(method.example(), method=method, target="50%", steps=1)
    )
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=3))
    _refuses("attach", lambda: method.attach(nn.Linear(3, 3)))
    with method.attach(model):
        _refuses("attached to this model already", lambda: method.attach(model))


# ---------------------------------------------------------------- visual tokens


def untrained(model: nn.Module, method: Method | str, target: Any = "50%", seed: int = 0) -> Trained | None:
    """Random weights for the modules of a token method, for tests; None where it has none.

    >>> attach(model, "covipal", target="50%", weights=untrained(model, "covipal"))  # doctest: +SKIP
    """
    made = make_method(method)
    facts = facts_of(model, family_of(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = made.modules(facts) if isinstance(made, TokenMethod) else None
    if modules is None:
        return None
    return Trained(
        made.name,
        made.hyperparameters,
        amount_of(target),
        type(model).__name__,
        facts.layers,
        facts.hidden,
        facts.heads,
        modules.state_dict(),
    )


def _seen(cls: type[Method], model: nn.Module, target: str, seed: int = 0) -> tuple[Attached, Tensor]:
    method = _make(cls)
    weights = untrained(model, method, target)
    given = dict(method.asks) if isinstance(method, TokenMethod) else None
    with (
        torch.no_grad(),
        attach(model, method, target=target, seed=seed, weights=weights, given=given) as attached,
    ):
        for _ in range(attached.setup.warm_up + 1):  # a method that remembers runs first keeps everything
            logits = model(**inputs_for(model)).logits
    return attached, logits


def _plain(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs_for(model)).logits


def tokens_all_kept(cls: type[Method]) -> None:
    """100 % changes nothing, bit for bit, and a detached model is as it was."""
    model = tiny_llava().float()
    before = _plain(model)
    _require(torch.equal(_seen(cls, model, "100%")[1], before), "100% changed the output")
    _seen(cls, model, "50%")
    _require(torch.equal(_plain(model), before), "the detached model isn't as it was")


def tokens_fewer(cls: type[Method]) -> None:
    """Fewer tokens stay, each stage keeps a part of what the one before it kept (but where parked ones return), and the output is finite."""
    attached, logits = _seen(cls, tiny_llava().float(), "50%")
    counts = [[len(row) for row in rows] for rows in attached.kept.values()]
    back = {placed.label for placed in attached.setup.stages if placed.stage.returns}
    before, after = attached.report["before"], attached.report["after"]
    _require(torch.isfinite(logits).all(), "an output isn't finite")
    stayed = after["tokens_x_layers"] - after.get("glimpse_tokens_x_layers", 0)
    _require(stayed < before["tokens_x_layers"], "no token left the model")
    for one, two, stage in zip(counts, counts[1:], list(attached.kept)[1:]):
        fewer = all(a >= b for a, b in zip(one, two))
        _require(fewer or stage in back, f"a later stage keeps more: {counts}")


def tokens_repeat(cls: type[Method]) -> None:
    """The same seed keeps the same tokens."""
    model = tiny_llava().float()
    (one, first), (two, second) = (_seen(cls, model, "50%", seed=3) for _ in range(2))
    lists = [{stage: [row.tolist() for row in rows] for stage, rows in a.kept.items()} for a in (one, two)]
    _require(lists[0] == lists[1] and torch.equal(first, second), "two runs with one seed differ")


def tokens_refuse_nonsense(cls: type[Method]) -> None:
    """One named error for each mistake, and the model is left alone."""
    model = tiny_llava().float()
    before = _plain(model)
    for match, target in (("0%", "0%"), ("outside", "150%"), ("tokens", "tokens=0")):
        _refuses(match, lambda target=target: attach(model, _make(cls), target=target))  # type: ignore[misc]
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=1))
    _require(torch.equal(_plain(model), before), "a refused call changed the model")


# ---------------------------------------------------------------- attention


def _levels(cls: type[Method], causal: bool) -> tuple[Tensor, Tensor]:
    method = _make(cls)
    assert isinstance(method, AttentionMethod)
    q, k = torch.randn(2, 2, 4, 70, 8, generator=torch.Generator().manual_seed(3)).unbind(0)
    layout = Layout(70, 70, method.block_q, method.block_k, causal)
    return method.levels(q, k[:, :2], layout, torch.Generator().manual_seed(0)), layout.visible()


def levels_are_levels(cls: type[Method]) -> None:
    """A level for each pair of blocks of each head; no row of blocks reads nothing; the same seed gives the same."""
    for causal in (False, True):
        levels, visible = _levels(cls, causal)
        _require(levels.shape == (2, 4, *visible.shape), f"levels {tuple(levels.shape)}")
        _require(set(levels.unique().tolist()) <= {0, *LEVELS}, "a level that there is not")
        _require(((levels > 0) & visible).any(-1).all(), "a block of queries reads nothing")
        _require(torch.equal(levels, _levels(cls, causal)[0]), "the same seed gives other levels")


def attention_comes_off(cls: type[Method]) -> None:
    """On the outputs differ, off they are those of before bit for bit; a method is attached once."""
    model = _llama().eval()
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    ids = _ids(model, 2, 70)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with attach(model, _make(cls)) as attached:
            read = model(ids, use_cache=False).logits
            _refuses("attached already", lambda: attach(model, _make(cls)))
        _require(attached.report["density"] < 1 and not torch.equal(read, before), "nothing was read less")
        _require(torch.equal(model(ids, use_cache=False).logits, before), "taken off, the outputs differ")
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=1))


# ---------------------------------------------------------------- visual work


def _worked(cls: type[Method], model: nn.Module, target: str) -> tuple[Attached, Tensor]:
    ratios = head_ratios(model, [inputs_for(model)])
    with torch.no_grad(), attach(model, _make(cls), target=target, given={"ratios": ratios}) as attached:
        return attached, model(**inputs_for(model)).logits


def all_work_changes_nothing(cls: type[Method]) -> None:
    """100 % changes nothing, bit for bit, and a detached model is as it was."""
    model = tiny_llava().float()
    before = _plain(model)
    _require(torch.equal(_worked(cls, model, "100%")[1], before), "100% changed the output")
    after = _worked(cls, model, "25%")[1]
    _require(after.isfinite().all() and not torch.equal(after[:, -1], before[:, -1]), "25% changed nothing")
    _require(torch.equal(_plain(model), before), "the detached model isn't as it was")


def work_meets_its_target(cls: type[Method]) -> None:
    """Visual tokens are left with about the share of the multiply-adds that was asked for; the same prompts give the same plan."""
    model = tiny_llava().float()
    for share in (0.5, 0.25):
        attached, _ = _worked(cls, model, f"{share:.0%}")
        parts = attached.report["visual_flops"]
        left = parts["left"] / parts["dense"]
        _require(left <= share * 1.1, f"{left:.3f} of the work is left, and {share} was asked for")
        again, _ = _worked(cls, model, f"{share:.0%}")
        _require(again.setup.work == attached.setup.work, "two plans differ")


def work_refuses_nonsense(cls: type[Method]) -> None:
    """Another target than a share, and a hyperparameter that there is not."""
    model = tiny_llava().float()
    _refuses("a share", lambda: attach(model, _make(cls), target="tokens=3"))
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=1))


# ---------------------------------------------------------------- maps


def _map(cls: type[Method], model: nn.Module, pictures: Tensor) -> Tensor:
    return saliency(model, pictures, _make(cls), [1] * len(pictures)).values  # type: ignore[arg-type]


def _seen_by(cls: type[Method]) -> nn.Module:
    assert issubclass(cls, SaliencyMethod)
    return cls.example() or _classifier()


def _pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def map_fits_the_picture(cls: type[Method]) -> None:
    """A finite map of the picture's size, the same each time."""
    model, pictures = _seen_by(cls), _pictures()
    values = _map(cls, model, pictures)
    _require(values.shape == (2, 16, 16), f"the maps are {tuple(values.shape)}, the pictures (2, 16, 16)")
    _require(torch.isfinite(values).all(), "a map isn't finite")
    _require(torch.equal(values, _map(cls, model, pictures)), "two runs differ")


def map_leaves_the_model(cls: type[Method]) -> None:
    """Weights, modes, hooks and gradients are as they were, also after an error."""
    model = _seen_by(cls).train()
    before, hooks = _state(model), [len(m._forward_hooks) for m in model.modules()]
    _map(cls, model, _pictures(1))
    _require(_same(_state(model), before) and model.training, "the model changed")
    _require([len(m._forward_hooks) for m in model.modules()] == hooks, "a hook is left")
    _require(all(p.requires_grad and p.grad is None for p in model.parameters()), "a gradient is left")
    _refuses("no class", lambda: saliency(model, _pictures(1), _make(cls), 10**6))  # type: ignore[arg-type]
    _require([len(m._forward_hooks) for m in model.modules()] == hooks, "a hook is left after an error")


# ---------------------------------------------------------------- prompts


def prompts_choose_patches(cls: type[Method]) -> None:
    """What the masked pass sees is some patches of each picture, in ascending order, each once."""
    method = _make(cls)
    assert isinstance(method, PromptMethod)
    draw = torch.Generator().manual_seed(0)
    features, text = torch.randn(3, 12, 5, generator=draw), torch.randn(3, 5, generator=draw)
    if method.masks:
        kept = method.keep(PromptPatches(features, text, torch.rand(3, 12, generator=draw)), draw)
        _require(
            kept.dtype == torch.int64 and len(kept) == 3, f"{kept.dtype} {tuple(kept.shape)} names no patches"
        )
        _require(
            (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 12, "not ascending patches"
        )


def prompts_have_a_loss(cls: type[Method]) -> None:
    """A finite scalar with a gradient to what the prompts made, and none through the frozen towers."""
    method = _make(cls)
    assert isinstance(method, PromptMethod)
    draw = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, 6, generator=draw), dim=1).requires_grad_(True)

    image, masked, frozen, text, frozen_text = unit(4), unit(4), unit(4), unit(3), unit(3)
    labels = torch.tensor([0, 1, 2, 0])
    made = method.loss(Seen(image, masked, frozen, text, frozen_text, labels, unit(3).detach(), 10.0))
    _require(made.dim() == 0 and torch.isfinite(made), "the loss is no finite scalar")
    made.backward()
    _require(image.grad is not None and text.grad is not None, "no gradient reaches the prompts")


# ---------------------------------------------------------------- objects


def _objects(cls: type[Method], seed: int = 0) -> tuple[Any, nn.Module, list[Tensor]]:
    """A method, a head of it that learned for two steps from drawn squares, and maps of two pictures."""
    method, generator = _make(cls), torch.Generator().manual_seed(3)
    assert isinstance(method, ObjectMethod)
    maps = [torch.randn(4, 3, side, side, generator=generator) for side in (8, 4)]
    masks = torch.zeros(4, 2, 16, 16, dtype=torch.bool)
    masks[:, 0, 2:9, 3:9] = masks[:2, 1, 10:15, 9:15] = True
    head = learn(method, lessons(maps, masks), steps=2, seed=seed, batch=2)
    return method, head, [m[:2] for m in maps]


def objects_fit_the_picture(cls: type[Method]) -> None:
    """Saliency and scores in 0..1, masks of one size with it, the same each time."""
    method, head, maps = _objects(cls)
    found = read(method, head, maps)
    size, opinions = found.saliency.shape[1:], found.masks.shape[1]
    _require(found.saliency.shape == (2, *size), f"saliency is {tuple(found.saliency.shape)}")
    _require(found.masks.shape == (2, opinions, *size), f"masks are {tuple(found.masks.shape)}")
    _require(found.masks.dtype == torch.bool, f"masks are {found.masks.dtype}")
    _require(found.scores.shape == (2, opinions), f"scores are {tuple(found.scores.shape)}")
    for name, values in (("saliency", found.saliency), ("scores", found.scores)):
        _require(((values >= 0) & (values <= 1)).all(), f"{name} leave 0..1")
    if found.instances is not None:
        _require(torch.equal(found.instances > 0, found.masks[:, 0]), "instances aren't parts of the mask")
    again = read(method, head, maps)
    _require(torch.equal(again.saliency, found.saliency), "two runs differ")


def objects_learn(cls: type[Method]) -> None:
    """The same seed learns the same weights, another one others."""
    first, second, other = (_state(_objects(cls, seed)[1]) for seed in (0, 0, 1))
    _require(_same(first, second), "two runs with one seed differ")
    _require(not _same(first, other), "the seed changes nothing")
    _require(all(torch.isfinite(t).all() for t in first.values()), "a weight isn't finite")
    _refuses("no hyperparameter", lambda: make_method(cls, shrubbery=1))


SOURCE: dict[str, Check] = {"the docstring names its source": names_its_source}
BOTH: dict[str, Check] = {
    "100 % changes nothing": keeps_everything,
    "the budget is met": meets_the_budget,
    "the same seed gives the same plan": same_seed_same_plan,
    "the plan applies to a fresh model": plan_applies,
    "dtype and mode are kept": keeps_dtype_and_mode,
    "nonsense is refused": refuses_nonsense,
    **SOURCE,
}
CHECKS: dict[type[Method], dict[str, Check]] = {
    WeightMethod: {**BOTH, "N:M holds in every row": n_of_m_holds},
    UnitMethod: {**BOTH, "the cut model is the masked one": cut_equals_masked},
    SkipMethod: {
        "nothing skipped changes nothing": skips_nothing,
        "the masked pass is the gathered one": skips_as_masked,
        "a batch is its pictures": skips_by_picture,
        "the same seed gives the same bits": skips_repeat,
        "nonsense is refused": skips_refuse_nonsense,
        **SOURCE,
    },
    TrainMethod: {
        "the budget is met": training_meets_the_budget,
        "the same seed gives the same bits": training_repeats,
        "nonsense is refused": training_refuses_nonsense,
        **SOURCE,
    },
    TokenMethod: {
        "100 % changes nothing": tokens_all_kept,
        "fewer tokens stay": tokens_fewer,
        "the same seed keeps the same tokens": tokens_repeat,
        "nonsense is refused": tokens_refuse_nonsense,
        **SOURCE,
    },
    WorkMethod: {
        "100 % changes nothing": all_work_changes_nothing,
        "the target is met": work_meets_its_target,
        "nonsense is refused": work_refuses_nonsense,
        **SOURCE,
    },
    AttentionMethod: {
        "levels are levels": levels_are_levels,
        "taken off, nothing is left": attention_comes_off,
        **SOURCE,
    },
    PromptMethod: {
        "the masked pass sees some patches": prompts_choose_patches,
        "the loss trains prompts": prompts_have_a_loss,
        **SOURCE,
    },
    ObjectMethod: {
        "what is found fits the picture": objects_fit_the_picture,
        "the same seed learns the same": objects_learn,
        **SOURCE,
    },
    SaliencyMethod: {
        "the map fits the picture": map_fits_the_picture,
        "the model is left alone": map_leaves_the_model,
        **SOURCE,
    },
}
"""Checks by kind of method, by name."""


# -- what tests of token methods are made of --


def token_sets(
    features: Tensor,
    keep: int | Tensor,
    *,
    valid: Tensor | None = None,
    grid: tuple[int, int] | Tensor | None = None,
    attention: Mapping[Any, Tensor] | None = None,
    logits: Mapping[Any, Tensor] | None = None,
    queries: Mapping[Any, Tensor] | None = None,
    keys: Mapping[Any, Tensor] | None = None,
    values: Mapping[Any, Tensor] | None = None,
    hidden: Mapping[Any, Tensor] | None = None,
    transition: Mapping[Any, Any] | None = None,
    text: Mapping[Any, Any] | None = None,
    pixels: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    **fields: Any,
) -> TokenSets:
    """Sets of tensors, for worked examples: features [S, n, D] and whatever the method reads.

    >>> sets = token_sets(torch.randn(1, 4, 8), keep=2, attention={("encoder:-2", "cls"): torch.rand(1, 4)})
    >>> sets.attention("encoder:-2", rows="cls").shape
    torch.Size([1, 4])

    Keys: `logits` (site, "keys" or "queries"); `attention` (site, rows), or (site, rows, over), (site, rows, over, "heads"); `queries`, `keys`, `values`,
    `hidden` site, (site, "cls"), (site, "raw"); `transition` (site, module) or (site, module, "whole"); `text` kind,
    or (kind, of), (kind, of, "visual"); `attention` (site, "each column"), [S, L, n], for rows that are columns.
    `grid`: height and width; a square where there is none. `fields`: any others of `TokenSets`, in place of one image of
    one crop a row, numbered in raster order, nothing carried, no target.
    """
    sets, n = features.shape[:2]
    valid = torch.ones(sets, n, dtype=torch.bool, device=features.device) if valid is None else valid
    every = _one_crop(valid, grid) | {name: value for name, value in fields.items() if value is not None}
    for name in ("index", "grid_row", "grid_col", "image_of", "crop_of", "frame_of", "newline"):
        every[name] = every[name].expand(sets, n)
    asked = torch.as_tensor(keep, device=features.device).expand(sets)
    vectors = {"q": queries or {}, "k": keys or {}, "v": values or {}}
    return TokenSets(
        features=features,
        valid=valid,
        keep=torch.minimum(asked, valid.sum(1)),
        asked=asked,
        generator=torch.Generator().manual_seed(seed),
        source=_Statistics(
            attention or {},
            logits or {},
            vectors,
            hidden or {},
            transition or {},
            text or {},
            pixels,
            project,
        ),
        **every,
    )


def _one_crop(valid: Tensor, grid: tuple[int, int] | Tensor | None) -> dict[str, Any]:
    """Where the tokens of one crop a row lie, in raster order."""
    (sets, n), device = valid.shape, valid.device
    if grid is None:
        side = int(n**0.5)
        grid = (side, side) if side * side == n else (1, n)
    size = torch.as_tensor(grid, device=device).expand(sets, 2)
    width = size[:, 1:].clamp(min=1)
    place = torch.arange(n, device=device).expand(sets, n)
    return {
        "total": valid.sum(1),
        "index": place.masked_fill(~valid, -1),
        "row": torch.arange(sets, device=device),
        **{name: torch.zeros_like(valid[:, 0], dtype=torch.int64) for name in ("image", "crop", "frame")},
        "grid_row": place // width,
        "grid_col": place % width,
        **{name: torch.zeros_like(place) for name in ("image_of", "crop_of", "frame_of")},
        "newline": torch.zeros_like(valid),
        "level": torch.zeros_like(place).masked_fill(~valid, -1),
        "grid": size,
    }


@dataclass
class _Statistics:
    """A `Source` of statistics that are there as tensors."""

    maps: Mapping[Any, Tensor]
    products: Mapping[Any, Tensor]
    qkv: Mapping[str, Mapping[Any, Tensor]]
    states: Mapping[Any, Tensor]
    changes: Mapping[Any, Any]
    texts: Mapping[Any, Any]
    image: Tensor | None
    projector: Any

    def _take(self, table: Mapping[Any, Any], what: str, *keys: Any) -> Any:
        for key in keys:
            if key in table:
                return table[key]
        raise Missing(f"{what} {keys[0]!r}", where="tokens", fix=f"given were {list(table)}")

    def attention(self, sets: TokenSets, site: str, rows: str | Tensor, over: str, heads: bool) -> Tensor:
        each = self.maps.get((site, "each column"))
        if each is not None and isinstance(rows, Tensor) and rows.dtype == torch.int64:
            picked = each.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, each.shape[2]))
            return (picked * (rows >= 0)[..., None]).sum(1) / (rows >= 0).sum(1, keepdim=True)
        name = rows if isinstance(rows, str) else "weights"
        full = (site, name, over, "heads")
        if heads:
            return self._take(self.maps, "attention", full)
        keys: list[Any] = [(site, name, over)] + ([(site, name)] if over == "all" else [])
        if full in self.maps and not any(key in self.maps for key in keys):
            return self.maps[full].mean(1)
        if name == "cls" and not any(key in self.maps for key in keys):
            raise Missing("CLS token", where="tokens")
        return self._take(self.maps, "attention", *keys)

    def logits(self, sets: TokenSets, site: str, over: str, among: Tensor | None) -> Tensor:
        return self._take(self.products, "logits", (site, over))

    def vectors(self, sets: TokenSets, which: str, site: str, rope: bool, cls: bool) -> Tensor:
        name = {"q": "queries", "k": "keys", "v": "values"}[which]
        if cls:
            if (site, "cls") not in self.qkv[which]:
                raise Missing("CLS token", where="tokens")
            return self.qkv[which][site, "cls"]
        return self._take(self.qkv[which], name, *([site] if rope else [(site, "raw"), site]))

    def hidden(self, sets: TokenSets, site: str, cls: bool) -> Tensor:
        if cls and (site, "cls") not in self.states:
            raise Missing("CLS token", where="tokens")
        return self._take(self.states, "hidden", (site, "cls") if cls else site)

    def transition(self, sets: TokenSets, site: str, module: str, whole: bool) -> tuple[Tensor, ...]:
        return self._take(self.changes, "transition", (site, module, "whole") if whole else (site, module))

    def text(self, sets: TokenSets, kind: str, of: str | int, visual: bool) -> tuple[Tensor, Tensor]:
        key = (kind, of, "visual") if visual else (kind, of)
        text = self._take(self.texts, "text", key, *([kind] if of == "question" and not visual else []))
        if isinstance(text, Tensor):
            text = (text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
        return text

    def pixels(self, sets: TokenSets) -> Tensor:
        if self.image is None:
            raise Missing("pixels", where="tokens")
        return self.image

    def project(self, hidden: Tensor) -> Tensor:
        if self.projector is None:
            raise Missing("projector that works token by token", where="tokens")
        return self.projector(hidden)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return hidden

"""The checks: each gives the largest error it found, or raises; independent code or the untouched model says what is right."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.doctor import reference
from secateur.errors import SecateurError

STEPS = 3
EXACT = 0.0


@dataclass
class Subject:
    """A tiny model to check on."""

    name: str
    model: Any
    inputs: Any
    own: bool = False
    """The user's: what is refused of it isn't a failure."""
    without_tokens: str | None = None
    """Why no visual tokens can be dropped; empty where it has none."""

    @property
    def tolerance(self) -> float:
        """Norms compute in single precision even where the weights are double."""
        double = next(self.model.parameters()).dtype == torch.float64
        return 1e-5 if double else 5e-4

    @property
    def special(self) -> list[int]:
        names = ("image_token_id", "video_token_id")
        return [i for i in (getattr(self.model.config, name, None) for name in names) if i is not None]


@dataclass(frozen=True)
class Check:
    """`run(subject)` gives (largest error, what it may be); `means`: what a failure means; `packages`: who may have changed."""

    name: str
    run: Callable[[Subject], tuple[float, float]]
    means: str
    packages: tuple[str, ...] = ("transformers", "torch")


# -- visual tokens --


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where shapes differ or numbers aren't finite."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    gap = float((found.double() - expected.double()).abs().max())
    return float("inf") if math.isnan(gap) else gap


def written(s: Subject) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, steps] and logits [steps, B, V] of the model's own generate, with its cache."""
    out = s.model.generate(
        **s.inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=s.special,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, s.inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def layer_of(s: Subject) -> int:
    """A layer in the middle before which tokens may leave."""
    from secateur.families.vlm import facts_of, family_of

    facts = facts_of(s.model, family_of(s.model))
    return min(max(2, facts.first_layer), facts.layers - 1)


def chance(s: Subject, inputs: Mapping[str, Tensor], seed: int) -> Tensor:
    """bool [B, L]: about half of the visual columns, a different number in each row."""
    ids = inputs["input_ids"]
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return drawn & (ids == s.model.config.image_token_id)


def dropping(s: Subject, inputs: Mapping[str, Tensor], at: str, gone: Tensor, peek: str | None = None) -> Any:
    """The model attached so that exactly the columns `gone` leave; `peek`: a layer's attention is read on the way."""
    from secateur.tokens.attach import attach

    ids = inputs["input_ids"]
    stays = [~gone[row, ids[row] == s.model.config.image_token_id] for row in range(len(ids))]

    def select(sets: Any) -> Tensor:
        if peek:
            sets.attention(peek, rows="last")
        keep = torch.zeros_like(sets.valid)
        for i, there in enumerate(sets.valid):
            keep[i, there] = stays[int(sets.row[i])][sets.index[i, there]]
        return keep

    records = (peek,) if peek else ()
    attached = attach(
        s.model, select, target="50%", at=at, records=records, scope="row", positions="original"
    )
    attached.method.newlines = "compete"  # type: ignore[misc]
    return attached


def against_forward(
    s: Subject, inputs: Mapping[str, Tensor], attached: Any, gone_at: Callable[[Any], dict[int, Tensor]]
) -> float:
    """The largest difference between the logits of an attached model and the reference, at every token that stays."""
    with torch.no_grad(), attached as running:
        found = s.model(**inputs).logits
        gone = gone_at(running)
    expected = reference.forward(s.model, inputs, gone)
    there = inputs["attention_mask"].bool() & ~gone[max(gone)]
    left = bool(inputs["attention_mask"][:, -1].all())
    worst = 0.0
    for row, mine in enumerate(there):
        count = int(mine.sum())
        if count > found.shape[1]:
            return float("inf")
        own = found[row, -count:] if left else found[row, :count]
        worst = max(worst, apart(own, expected[row, mine]))
    return worst


def against_generate(s: Subject, attached: Any, gone_at: Callable[[Any], dict[int, Tensor]]) -> float:
    with attached as running:
        tokens, logits = written(s)
        gone = gone_at(running)
    expected, wanted = reference.generate(s.model, s.inputs, gone, STEPS, s.special)
    return (
        apart(logits, wanted)
        if torch.equal(tokens, expected)
        else max(apart(logits, wanted), s.tolerance * 10)
    )


def keep_all(s: Subject) -> tuple[float, float]:
    from secateur.tokens.attach import attach

    layer = layer_of(s)
    with torch.no_grad():
        logits, (tokens, steps) = s.model(**s.inputs).logits, written(s)
        nothing = torch.zeros_like(s.inputs["input_ids"], dtype=torch.bool)
        every: list[Callable[[], Any]] = [
            lambda: attach(s.model, "random-tokens", target="100%"),
            lambda: attach(s.model, "fastv", target="100%"),
            lambda: dropping(s, s.inputs, f"layer:{layer}", nothing, f"layer:{layer}:peek"),
        ]
        worst = 0.0
        for made in every:
            with made():
                worst = max(worst, apart(s.model(**s.inputs).logits, logits))
                again, more = written(s)
            worst = max(worst, apart(more, steps), apart(again, tokens))
        worst = max(worst, apart(s.model(**s.inputs).logits, logits))  # detached
    return worst, EXACT


def drop_at_input(s: Subject) -> tuple[float, float]:
    gone = chance(s, s.inputs, 3)
    found = against_forward(s, s.inputs, dropping(s, s.inputs, "input", gone), lambda _: {0: gone})
    return max(
        found, against_generate(s, dropping(s, s.inputs, "input", gone), lambda _: {0: gone})
    ), s.tolerance


def drop_left(s: Subject) -> tuple[float, float]:
    layer, gone = layer_of(s), chance(s, s.inputs, 4)
    attached = dropping(s, s.inputs, f"layer:{layer}", gone)
    return against_forward(s, s.inputs, attached, lambda _: {layer: gone}), s.tolerance


def drop_right(s: Subject) -> tuple[float, float]:
    """The same rows, padded on the right."""
    layer, inputs = layer_of(s), dict(s.inputs)
    mask = inputs["attention_mask"]
    order = (1 - mask).argsort(dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name].gather(1, order)
    gone = chance(s, inputs, 5)
    attached = dropping(s, inputs, f"layer:{layer}", gone)
    return against_forward(s, inputs, attached, lambda _: {layer: gone}), s.tolerance


def drop_and_write(s: Subject) -> tuple[float, float]:
    layer, gone = layer_of(s), chance(s, s.inputs, 6)
    attached = dropping(s, s.inputs, f"layer:{layer}", gone)
    return against_generate(s, attached, lambda _: {layer: gone}), s.tolerance


def by_method(method: str, target: str) -> Callable[[Subject], tuple[float, float]]:
    """A published method chooses; dropping what it chose must equal the reference."""

    def run(s: Subject) -> tuple[float, float]:
        from secateur.tokens.attach import attach

        ids = s.inputs["input_ids"]
        image = ids == s.model.config.image_token_id

        def gone_at(attached: Any) -> dict[int, Tensor]:
            found = {}
            for stage, kept in attached.kept.items():
                gone = image.clone()
                for row, numbers in enumerate(kept):
                    gone[row, image[row].nonzero()[:, 0][numbers]] = False
                found[int(stage.partition(":")[2] or 0)] = gone
            if not any(bool((gone & image).any()) for gone in found.values()):
                raise SecateurError(f"{method} dropped nothing", where=s.name)
            return found

        def chosen() -> Any:
            return attach(s.model, method, target=target, positions="original")

        found = against_forward(s, s.inputs, chosen(), gone_at)
        return max(found, against_generate(s, chosen(), gone_at)), s.tolerance

    return run


def attention(s: Subject) -> tuple[float, float]:
    """What a method is told of a layer's attention, recorded and peeked at, is what the layer computes."""
    from secateur.tokens.attach import attach

    layer = layer_of(s)
    expected = reference.last_row(s.model, s.inputs, layer)
    before = reference.last_row(s.model, s.inputs, layer - 1)
    worst = 0.0
    places = (s.inputs["input_ids"] == s.model.config.image_token_id).nonzero()

    def select(sets: Any) -> Tensor:
        nonlocal worst
        for site, wanted in ((f"layer:{layer}:peek", expected), (f"layer:{layer - 1}", before)):
            found = sets.attention(site, rows="last")
            for i, there in enumerate(sets.valid):
                columns = places[places[:, 0] == int(sets.row[i]), 1]
                own = wanted[int(sets.row[i]), columns[sets.index[i, there]]]
                worst = max(worst, apart(found[i, there], own))
        return sets.valid

    records = (f"layer:{layer}:peek", f"layer:{layer - 1}")
    attached = attach(s.model, select, target="50%", at=f"layer:{layer}", records=records, scope="row")
    with torch.no_grad(), attached:
        s.model(**s.inputs)
    return worst, 1e-4


# -- surgery and artefacts --


def outputs(model: Any, inputs: Any) -> list[Tensor]:
    from secateur.utils.running import call, flat_tensors

    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    with torch.no_grad():
        return [t for t in flat_tensors(call(model, inputs)) if t.is_floating_point()]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in terms of the largest output."""
    if len(found) != len(expected):
        return float("inf")
    size = max((float(t.abs().max()) for t in expected if t.numel()), default=1.0)
    return max(map(apart, found, expected), default=0.0) / max(size, 1e-30)


def cut_is_masked(s: Subject) -> tuple[float, float]:
    """Half of every group leaves; where no norm or softmax mixes the units, zeros give the same outputs as absence."""
    from secateur.graph import trace
    from secateur.surgery import mask_units, prove
    from secateur.surgery.cut import cut_modules

    graph = trace(s.model, s.inputs)
    keep = {
        g.name: torch.arange(g.size)[:: max(1, g.size // max(1, g.size // 2))][: max(1, g.size // 2)]
        for g in graph.prunable()
        if g.kind != "layers" and g.size > 1
    }
    unsound = prove(s.model, graph, keep, s.inputs, backward=False)
    if unsound and not s.own:
        raise AssertionError(f"{next(iter(unsound))}: {next(iter(unsound.values()))}")
    exact = {name: kept for name, kept in keep.items() if graph[name].exact and name not in unsound}
    if not exact:
        why = next(iter(unsound.values()), "no group of it can be cut")
        raise SecateurError(f"nothing can be cut and proved ({why})", where=s.name)
    masked, cut = copy.deepcopy(s.model), copy.deepcopy(s.model)
    mask_units(masked, graph, exact)
    cut_modules(cut, graph, exact)  # without looking for a config of the new sizes, which saving does
    if sum(p.numel() for p in cut.parameters()) >= sum(p.numel() for p in s.model.parameters()):
        raise AssertionError("the cut model is no smaller")
    return gap(outputs(cut, s.inputs), outputs(masked, s.inputs)), s.tolerance


def saved_is_loaded(s: Subject) -> tuple[float, float]:
    """Pruned alike in every layer, written, read by secateur and, where the form is plain, by transformers alone.

    Every tensor is the same to the bit; outputs may differ by the order of sums, since a cut tensor may lie otherwise in memory.
    """
    from secateur.io.artefact import load
    from secateur.pruning.prune import prune_with
    from secateur.utils.inputs import map_tensors

    model, ours = s.model.float(), hasattr(s.model, "save_pretrained")
    inputs = map_tensors(s.inputs, lambda t: t.float() if t.is_floating_point() else t)
    text = model.config.get_text_config() if ours else None
    kinds = ("neurons",) if getattr(text, "vocab_size", None) else None
    pruned = prune_with(model, inputs, method="group-magnitude", target="50%", kinds=kinds)
    expected, tensors = outputs(pruned.model, inputs), pruned.model.state_dict()
    worst = 0.0

    def compare(loaded: Any, reader: str) -> None:
        nonlocal worst
        found = loaded.state_dict()
        differ = [n for n in tensors if n not in found or not torch.equal(found[n], tensors[n])]
        if differ or len(found) != len(tensors):
            raise AssertionError(
                f"{len(differ)} tensors that {reader} reads differ ({next(iter(differ), 'more of them')})"
            )
        worst = max(worst, gap(outputs(loaded, inputs), expected))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pruned"
        pruned.save(folder)
        loaded, _ = load(folder, model=None if ours else copy.deepcopy(model))
        compare(loaded, "secateur")
        if (folder / "config.json").is_file() and not (folder / "modeling_pruned.py").is_file():
            plain: Any = type(model)
            compare(plain.from_pretrained(folder, dtype="auto").eval(), "transformers")
        elif not s.own and ours:
            raise AssertionError("a model cut alike in every layer isn't a plain folder")
    return worst, 1e-5


TOKENS = (
    Check(
        "keep all: bit-identical", keep_all, "an attached model isn't the model, even where every token stays"
    ),
    Check("drop at the input", drop_at_input, "answers after dropping visual tokens at the input are wrong"),
    Check("drop between layers, left padding", drop_left, "answers after dropping between layers are wrong"),
    Check(
        "drop between layers, right padding",
        drop_right,
        "batches padded on the right are wrong after dropping between layers",
    ),
    Check(
        "drop between layers, generate",
        drop_and_write,
        "text generated after dropping between layers is wrong from its second token on",
    ),
    Check(
        "attention read at a layer",
        attention,
        "methods that rank tokens by attention rank them by something else",
    ),
    Check(
        "feather (reads raw attention)",
        by_method("feather", "40%"),
        "answers with feather and its like are wrong",
    ),
    Check(
        "transprune (peeks at layers)",
        by_method("transprune", "25%"),
        "answers with transprune, visiondrop and their like are wrong",
    ),
)
CUT = Check(
    "cut equals masked",
    cut_is_masked,
    "units that are cut out and units that are zero give different outputs: don't trust a cut model",
)
SAVED = Check(
    "saved and loaded",
    saved_is_loaded,
    "a pruned model that is saved isn't the model that is loaded: keep the dense one",
    ("transformers", "safetensors", "torch"),
)

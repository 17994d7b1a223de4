"""CoViPAL: a small trained module scores visual tokens at shallow layers as the attention of deeper ones would.

Tang et al. 2025, "CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models",
https://arxiv.org/abs/2508.17243. Spec: covipal.

Reconstructed (the authors' code isn't at hand; each is a setting): the module's layout, both losses, the rows of the labels, the layer
that guides, and where tokens leave. By the paper are the scores from visual and text tokens, the top r n of them, the labels
summed over heads from a deeper layer, and the two stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import check_order
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Lesson, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets

LEAST = 1e-6
"""The smallest gate."""


class Scorer(nn.Module):
    """One pre-norm transformer block over the visual and text tokens together, and a number for each visual one.

    >>> Scorer(128, 64, 8)(torch.randn(2, 16, 128), None, torch.randn(2, 5, 128), None).shape
    torch.Size([2, 16])

    No position is told: what the words say counts, not their order.
    """

    def __init__(self, hidden: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, width, bias=False)
        self.before, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, visual: Tensor, seen: Tensor | None, words: Tensor, there: Tensor | None) -> Tensor:
        """visual [S, n, D] and words [S, m, D], with bool [S, n] and [S, m] (False: padding; None: all are there) -> [S, n]."""
        real = [
            x.new_ones(x.shape[:2], dtype=torch.bool) if r is None else r
            for x, r in ((visual, seen), (words, there))
        ]
        u = self.down(self.norm(torch.cat([visual, words], 1).to(self.down.weight)))
        q, k, v = self.qkv(self.before(u)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat(real, 1)[:, None, None])
        u = u + self.out(mixed.transpose(1, 2).flatten(2))
        u = u + self.mlp(self.between(u))
        return self.head(u[:, : visual.shape[1]])[..., 0]


def imitation(scores: Tensor, labels: Tensor, valid: Tensor, loss: str = "kl") -> Tensor:
    """How far scores [S, n] are from the attention `labels` [S, n] >= 0, a mean over the sets.

    >>> s, y = torch.tensor([[0.0, 2.0, -1.0, 0.5]]), torch.tensor([[0.45, 1.20, 0.40, 0.35]])
    >>> round(imitation(s, y, torch.ones(1, 4, dtype=torch.bool)).item(), 4)
    0.1963

    loss: "kl", of softmax(scores) to the labels' shares; "bce", of sigmoid(scores) to labels in those of the largest.
    """
    labels = labels.masked_fill(~valid, 0).to(scores)
    if loss == "kl":
        wanted = labels / labels.sum(1, keepdim=True).clamp(min=1e-12)
        said = scores.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
        return (torch.special.xlogy(wanted, wanted) - wanted * said).sum(1).mean()
    wanted = labels / labels.amax(1, keepdim=True).clamp(min=1e-12)
    each = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * valid
    return (each.sum(1) / valid.sum(1)).mean()


@register
@dataclass
class CoViPAL(TokenMethod):
    """A scorer reads the visual tokens with the question, and the best stay: before the first layer, or at several.

    >>> trained = secateur.train_tokens(vlm, "covipal", data=batches, target="25%")  # doctest: +SKIP
    >>> trained.save("scorer")  # doctest: +SKIP
    >>> with secateur.attach(vlm, "covipal", weights="scorer", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    `secateur train tokens MODEL --method covipal --target 25% --out scorer` trains it too; the model stays as it is. First the
    scorer imitates what the words of deeper layers attend to, then it is trained on the answers: no token leaves, and the log of
    its gate is added to its logits as a key in all layers that come. Any target can be attached. The target is the share left behind the last of
    the layers; with m of them each keeps the same part, the m-th root.
    The scorer knows no order of words, so it tells two questions of the same words apart only by their embeddings' numbers.
    """

    layers: tuple[int, ...] = field(
        default=(0,), metadata={"help": "where tokens leave, of 32, scaled; 0 is before the first layer"}
    )
    width: int = field(
        default=0, metadata={"help": "of the scorer; 0: an eighth of the model's, 64 at least", "min": 0}
    )
    heads: int = field(default=8, metadata={"help": "of the scorer", "min": 1})
    guides: tuple[int, ...] = field(
        default=(0,),
        metadata={
            "help": "layers of this model whose attention is imitated, summed; 0: the one at 0.55 of the depth"
        },
    )
    rows: str = field(default="text", metadata={"help": "whose attention", "choices": ("text", "last")})
    loss: str = field(default="kl", metadata={"help": "of the imitation", "choices": ("kl", "bce")})
    lesson: str = field(
        default="both", metadata={"help": "which of its two parts", "choices": ("both", "imitation", "gates")}
    )
    hold: str = field(
        default="penalty",
        metadata={
            "help": "penalty: the gates' mean is drawn to the target; softmax: they are scaled to it",
            "choices": ("penalty", "softmax"),
        },
    )
    beta: float = field(default=1.0, metadata={"help": "weight of that penalty", "min": 0})
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"

    info = record("covipal")
    quick: ClassVar[Mapping[str, Any]] = {"width": 16, "heads": 2}

    def places(self, facts: Facts) -> list[str]:
        """Stages of this model, shallow ones first."""
        check_order(self.layers)
        deep = [layer for layer in self.layers if layer]
        return ["input"] * (0 in self.layers) + [
            f"layer:{n}" for n in (facts.spread(deep, of=32) if deep else [])
        ]

    def modules(self, facts: Facts) -> nn.Module:
        width = self.width or max(64, facts.hidden // 8)
        if width % self.heads:
            raise SecateurError(
                f"a width of {width} isn't divided by {self.heads} heads",
                where="covipal",
                fix="another width",
            )
        return nn.ModuleList(Scorer(facts.hidden, width, self.heads) for _ in self.places(facts))

    def at(self, facts: Facts, select: Any, bias: str | None = None) -> list[Stage]:
        """A stage at every place, where `select(number, record, sets)` answers."""
        found = []
        for number, place in enumerate(self.places(facts)):
            words = "embeddings" if place == "input" else f"layer:{int(place[6:]) - 1}"
            records = () if place == "input" else (words,)
            found.append(Stage(place, partial(select, number, words), records, bias=bias))
        return found

    def stages(self, facts: Facts) -> list[Stage]:
        return self.at(facts, self.choose)

    def score(self, number: int, words: str, sets: TokenSets) -> Tensor:
        """[S, n] of the scorer of a place."""
        assert isinstance(sets.modules, nn.ModuleList)
        text, there = sets.text(words)
        return sets.modules[number](sets.features, sets.valid, text, there)

    def share(self, number: int, sets: TokenSets) -> Tensor:
        """[S] what is left behind a place, of all the set's tokens."""
        return sets.asked_share ** ((number + 1) / len(self.layers))

    def choose(self, number: int, words: str, sets: TokenSets) -> Tensor:
        keep = (self.share(number, sets) * sets.total + 0.5 + 1e-9).long().clamp(min=1)
        return top_per_row(self.score(number, words, sets), keep, sets.valid)

    # -- training --

    def lessons(self, facts: Facts) -> list[Lesson]:
        guides = tuple(layer or facts.layer(0.55) for layer in self.guides)
        last = max(guides)
        shallow = max((int(place[6:]) if place != "input" else 0) for place in self.places(facts))
        if min(guides) <= shallow or last >= facts.layers:
            raise SecateurError(
                f"layers {guides} can't guide a scorer at layer {shallow} of {facts.layers}",
                where="covipal",
                fix="guides that are deeper than the last layer where tokens leave",
            )
        sites = tuple(f"layer:{n}:peek" if n == last else f"layer:{n}" for n in guides)
        compare = Stage(f"layer:{last}", partial(self.compare, sites), sites)
        lessons = {
            "imitation": Lesson("imitation", [*self.at(facts, self.watch), compare], _sum_of("imitation")),
            "gates": Lesson("gates", self.at(facts, self.weigh, bias="gate"), self.answers),
        }
        return list(lessons.values()) if self.lesson == "both" else [lessons[self.lesson]]

    def watch(self, number: int, words: str, sets: TokenSets) -> Tensor:
        """Everything stays; the score is carried to where the guide is read."""
        sets.carried[f"score {number}"] = self.score(number, words, sets)
        return sets.valid

    def compare(self, sites: tuple[str, ...], sets: TokenSets) -> Tensor:
        labels = torch.stack([sets.attention(site, rows=self.rows) for site in sites]).sum(0)
        for number in range(len(self.layers)):
            scores = sets.carried[f"score {number}"]
            sets.noted[f"imitation {number}"] = imitation(scores, labels, sets.valid, self.loss)
        return sets.valid

    def weigh(self, number: int, words: str, sets: TokenSets) -> Tensor:
        """Everything stays, and weighs as much as its gate in the layers that come."""
        scores, share = self.score(number, words, sets), self.share(number, sets)[:, None].to(torch.float32)
        gate = scores.sigmoid()
        if self.hold == "softmax":
            gate = scores.masked_fill(~sets.valid, -torch.inf).softmax(1) * share * sets.total[:, None]
        least = LEAST if self.hold == "penalty" else 1e-4
        gate = gate.clamp(least, 1) * sets.carried.get("gate", 1.0)
        sets.carried["gate"] = gate.clamp(min=LEAST)
        mean = (gate * sets.valid).sum(1, keepdim=True) / sets.total[:, None]
        sets.noted[f"budget {number}"] = (mean - share).square().mean()
        return sets.valid

    def answers(self, noted: Mapping[str, Tensor], own: Tensor) -> Tensor:
        return own + (self.beta * _sum_of("budget")(noted, own) if self.hold == "penalty" else 0)


def _sum_of(name: str) -> Any:
    """The loss that stages noted under this name."""
    return lambda noted, own: torch.stack([v for key, v in noted.items() if key.startswith(name)]).sum()

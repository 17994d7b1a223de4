"""Whether a map of what stands out is a good budget of visual tokens: accuracy on synthetic scenes, by where the map comes from.

    python benchmarks/salient_tokens.py --maps drawn,colour,connnet --objects out/connnet --out salient.json
    python benchmarks/salient_tokens.py --maps drawn,colour --surround 0,0.125,0.25,0.5 --first 256 --limit 128   # the default

drawn: which of the 8 x 8 patches an object was drawn on, an upper bound that no picture tells. colour: how far a pixel's colours are
apart; the objects are coloured and the background is grey. connnet: the map of a finder that `secateur train sod --method connnet`
trained on photographs (`--objects FOLDER`), the scenes enlarged to what it takes. Beside them random tokens, an even grid, divprune, all tokens.
± is one standard error over the models of the seeds; `--out FILE` keeps every score, and a run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.draw import KINDS
from secateur.tasks.scenes.evaluate import Score, above, table
from secateur.tasks.scenes.models import DEPTH, TOKENS, inputs, load_scenes
from secateur.tasks.scenes.questions import PART, TEST_SEED, Group, test_set
from secateur.tasks.scenes.train import draw
from secateur.tokens.attach import attach
from secateur.utils.files import atomic_write_json

OTHERS = ("random-tokens", "uniform-grid", "divprune")
OURS = "salient-tokens"


def drawn(parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Test pictures uint8 [n, 3, 64, 64], and bool [n, 8, 8]: whether an object is on a patch."""
    batches = [draw(PART, KINDS, torch.Generator().manual_seed(TEST_SEED + part)) for part in parts]
    owner = torch.cat([batch.owner for batch in batches])
    side = math.isqrt(TOKENS)
    return torch.cat([batch.pictures for batch in batches]), (owner >= 0).view(-1, side, side)


def map_of(kind: str, pictures: Tensor, patches: Tensor, folder: str) -> Tensor:
    """[n, H, W] in 0..1."""
    if kind == "drawn":
        return patches
    if kind == "colour":
        return (pictures.amax(1) - pictures.amin(1)).float() / 255
    from secateur.tasks.sod import load_objects

    finder = load_objects(folder)
    large = torch.nn.functional.interpolate(pictures.float(), (finder.spec.size,) * 2, mode="bilinear")
    return torch.cat([f.saliency for part in large.round().byte().split(64) for f in finder.find(list(part))])


@torch.no_grad()
def answered(
    model: Any, groups: Sequence[Group], method: str | None, target: str | None, seed: int, **more: Any
) -> tuple[dict[str, float], float]:
    """Percent of right answers by kind, and tokens x layers a picture. `maps` of `more`: by number of the picture."""
    maps, first = more.pop("maps", None), more.pop("first", 0)
    right, asked, work = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), 0.0
    for group in groups:
        for start in range(0, len(group.questions), 64):
            rows = slice(start, start + 64)
            given = inputs(model, group.pictures[rows], group.questions[rows])
            run = {"logits_to_keep": 1, "use_cache": False}
            if method is None:
                logits = model(**given, **run).logits
            else:
                own = {} if maps is None else {"map": [maps[n - first] for n in group.images[rows]]}
                with attach(model, method, target=target, seed=seed, given=own, **more) as attached:
                    logits = model(**given, **run).logits
                work += attached.report["after"]["tokens_x_layers"]
            right[group.kind] += int((logits[:, -1].argmax(-1) == group.answers[rows]).sum())
            asked[group.kind] += len(group.answers[rows])
    found = {kind: 100 * right[kind] / asked[kind] for kind in KINDS}
    return found, work / sum(asked.values()) if method else float(TOKENS * DEPTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", default="drawn,colour")
    parser.add_argument("--targets", default="25%,10%,none", help="none: the map's own count")
    parser.add_argument("--surround", default="", help="shares of the budget; default: the method's")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--first", type=int, default=0, help="the first test picture, a multiple of 64")
    parser.add_argument("--limit", type=int, default=256, help="test pictures, up to five questions each")
    parser.add_argument("--objects", default="", help="a folder of `secateur train sod`, for connnet")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    last = args.first + args.limit
    groups = [_between(group, args.first, last) for group in test_set(last)]
    pictures, patches = drawn(range(args.first // PART, -(-last // PART)))
    maps = {kind: map_of(kind, pictures, patches, args.objects) for kind in args.maps.split(",")}
    around = [{"surround": float(s)} for s in args.surround.split(",") if s] or [{}]
    jobs: list[tuple[str, str | None, str | None, dict[str, Any]]] = [("all tokens", None, "100%", {})]
    for target in args.targets.split(","):
        if target != "none" and not args.surround:
            jobs += [(name, name, target, {}) for name in OTHERS]
        for more in around:
            own = {"target": None if target == "none" else target} | more
            jobs += [
                (f"{OURS}, {kind}{more.get('surround', '')}", OURS, own["target"], {"maps": kind, **more})
                for kind in maps
            ]
    kept = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    scores = []
    for name, method, target, more in jobs:
        score = Score(name, target or "its own", "llava")
        for seed in seeds:
            key = f"{name} {target} {seed} {args.first} {args.limit}"
            if key not in kept:
                own = {**more, "first": args.first}
                if "maps" in own:
                    own["maps"] = maps[own["maps"]]
                kept[key] = answered(load_scenes("llava", seed), groups, method, target, seed, **own)
                print("#", key, kept[key], flush=True)
                if args.out:
                    atomic_write_json(args.out, kept)
            found, work = kept[key]
            for kind, share in found.items():
                score.accuracy.setdefault(kind, []).append(share)
            score.tokens_layers += work / len(seeds)
        scores.append(score)
    print(f"\n{table(scores)}\n")
    for other in OTHERS[1:]:
        for base in (score for score in scores if score.method == other):
            for score in scores:
                if score.target == base.target and score.method.startswith(OURS):
                    gap, errors = above(score, base)
                    print(
                        f"  {score.target} {score.method}: {gap:+.1f} above {other}, {errors:+.1f} standard errors"
                    )


def _between(group: Group, first: int, last: int) -> Group:
    rows = [row for row, number in enumerate(group.images) if first <= number < last]
    return Group(
        group.kind,
        group.pictures[rows],
        [group.questions[row] for row in rows],
        group.answers[rows],
        [group.images[row] for row in rows],
    )


if __name__ == "__main__":
    main()

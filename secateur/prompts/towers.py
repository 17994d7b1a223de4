"""The two towers of a CLIP or SigLIP, with prompts and without, by hooks: the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import require

FIX = "give a CLIP or SigLIP of transformers whose image tower is a vision transformer"


class Towers:
    """The towers of a model, run on class names and pictures.

    >>> towers = Towers(clip)  # doctest: +SKIP
    >>> towers.image(pixels), towers.text(ids)  # doctest: +SKIP

    Raises `SecateurError` where the model has no two towers of blocks, or its image tower has no patch tokens.
    """

    def __init__(self, model: Any):
        where = type(model).__name__
        both = all(
            hasattr(model, name) for name in ("get_text_features", "get_image_features", "logit_scale")
        )
        require(both, "it has no towers of pictures and words", where=where, fix=FIX)
        self.model = model
        self.text_tower = model.text_model
        self.image_tower = model.vision_model
        self.text_blocks = self._blocks(self.text_tower, "text", where)
        self.image_blocks = self._blocks(self.image_tower, "image", where)
        embeddings = getattr(self.image_tower, "embeddings", None)
        require(
            hasattr(embeddings, "patch_embedding"),
            "its image tower has no patch tokens",
            where=where,
            fix=FIX,
        )
        self.prefix = int(hasattr(embeddings, "class_embedding"))
        """Tokens before the patches: CLS, or none."""
        self.pads = hasattr(self.text_tower, "head")
        """Whether texts are padded to the full length, as the last token is read."""
        self.longest: int = self.text_tower.config.max_position_embeddings

    @staticmethod
    def _blocks(tower: nn.Module, name: str, where: str) -> list[Any]:
        blocks = getattr(getattr(tower, "encoder", None), "layers", None)
        what = f"its {name} tower has no blocks" + (", so no patch tokens" if name == "image" else "")
        require(isinstance(blocks, nn.ModuleList), what, where=where, fix=FIX)
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of a token in the text and in the image tower."""
        return self.text_tower.config.hidden_size, self.image_tower.config.hidden_size

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    def text(self, ids: Tensor, prompts: Tensor | None = None, place: int = 1) -> Tensor:
        """[C, D], of length 1. prompts: [depth, tokens, width], in place of the tokens behind `place` in the first blocks."""

        def put(hidden: Tensor, own: Tensor) -> Tensor:
            before, after = hidden[:, :place], hidden[:, place + own.shape[0] :]
            return torch.cat([before, own.to(hidden).expand(len(hidden), -1, -1), after], 1)

        with ExitStack() as stack:
            if prompts is not None:
                first = prompts[0]
                embedding = self.text_tower.embeddings.token_embedding
                hook = embedding.register_forward_hook(lambda _, __, out: put(out, first))
                stack.callback(hook.remove)
                for block, own in zip(self.text_blocks[1:], prompts[1:], strict=False):
                    stack.enter_context(before(block, partial(put, own=own)))
            return _unit(self.model.get_text_features(input_ids=ids))

    def image(
        self, pixels: Tensor, prompts: Tensor | None = None, keep: Tensor | None = None, drop: bool = True
    ) -> Tensor:
        """[B, D], of length 1. prompts: [depth, tokens, width], behind the patches. keep: int64 [B, k], the patches that are seen.

        drop: the others leave before the first block; else they are zeros there.
        """

        def see(hidden: Tensor) -> Tensor:
            if keep is not None:
                at = torch.cat([keep.new_tensor([[i] for i in range(self.prefix)]).reshape(1, -1).expand(len(keep), -1), keep + self.prefix], 1)  # fmt: skip
                if drop:
                    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
                else:
                    hidden = hidden * torch.zeros_like(hidden[..., :1]).scatter(1, at[..., None], 1.0)
            return hidden if prompts is None else torch.cat([hidden, spread(prompts[0], hidden)], 1)

        def spread(own: Tensor, hidden: Tensor) -> Tensor:
            return own.to(hidden).expand(len(hidden), -1, -1)

        def renew(hidden: Tensor, own: Tensor) -> Tensor:
            return torch.cat([hidden[:, : hidden.shape[1] - own.shape[0]], spread(own, hidden)], 1)

        with ExitStack() as stack:
            stack.enter_context(before(self.image_blocks[0], see))
            for block, own in zip(
                self.image_blocks[1:], prompts[1:] if prompts is not None else (), strict=False
            ):
                stack.enter_context(before(block, partial(renew, own=own)))
            return _unit(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(features [B, D], features of the patches [B, N, D], attention of CLS to the patches [B, N] or None), without prompts.

        A patch is put into the common space as the whole picture is: by the norm and projection, or by the pooling head with it alone.
        """
        found: dict[str, Tensor] = {}
        last = self.image_blocks[-1]
        projections: Any = last.self_attn
        with ExitStack() as stack:
            for name, module in (("q", projections.q_proj), ("k", projections.k_proj), ("out", last)):
                hook = module.register_forward_hook(_keeper(found, name))
                stack.callback(hook.remove)
            whole = _unit(self.model.get_image_features(pixel_values=pixels))
        patches = self.image_tower.post_layernorm(found["out"][:, self.prefix :])
        if hasattr(self.model, "visual_projection"):
            patches = self.model.visual_projection(patches)
        elif hasattr(self.image_tower, "head"):
            patches = self.image_tower.head(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])
        attention = None
        if self.prefix:
            heads = projections.num_heads
            q, k = (found[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qk")
            weights = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1)
            attention = weights[:, :, 0, self.prefix :].mean(1)
        return whole, F.normalize(patches.float(), dim=-1), attention


def _keeper(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        found[name] = out[0] if isinstance(out, tuple) else out

    return keep


def _unit(found: Any) -> Tensor:
    features = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(features.float(), dim=-1)


@contextmanager
def before(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What a block reads first is changed."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def class_ids(
    tokenizer: Any, names: Sequence[str], tokens: int, longest: int, fill: bool, words: str = ""
) -> tuple[Tensor, int]:
    """(ids [C, length], how many tokens stand before the prompts): start, `tokens` places for prompts, the name, end.

    The places hold `words` where these are as many tokens, else the first token of each name. fill: padded to `longest`.
    Raises `SecateurError` for no names, an empty one, two alike, and one that is too long.
    """
    require(names, "there are none", where="classes", fix="name the classes")
    require(len(set(names)) == len(names), "two are alike", where="classes", fix="a name each")
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("a")["input_ids"])
    place = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == list(inner))
    start, end = whole[:place], whole[place + len(inner) :]
    first = list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []
    rows = []
    for name in names:
        own = list(tokenizer(f"{name}.", add_special_tokens=False)["input_ids"]) if name.strip() else []
        require(own, f"{name!r} is no name", where="classes", fix="name the classes")
        row = [*start, *(first if len(first) == tokens else own[:1] * tokens), *own, *end]
        require(
            len(row) <= longest,
            f"{name!r} is {len(row)} tokens with {tokens} prompts, the text tower reads {longest}",
            where="classes",
            fix="shorten the name, or take fewer prompts (text_tokens)",
        )
        rows.append(row)
    length = longest if fill else max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = (end[-1] if end else 0) if pad is None else pad
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows]), place

"""Places of a model whose notes a token method may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import SecateurError


@dataclass
class Site:
    """A parsed place: "encoder:-2", "layer:7", "layer:7:raw", "layer:7:modules", "layer:7:peek", "layer:0:entry"; for stages "encoder:3:mlp"."""

    tower: bool
    number: int
    form: str = ""

    @classmethod
    def parse(cls, text: str, layers: int, blocks: int) -> Site:
        """Raises `SecateurError` for what isn't a site of this model."""
        parts = text.split(":")
        if parts[0] == "encoder" and not blocks:
            raise SecateurError(
                "the blocks of this model's vision tower aren't known, so nothing can be read or dropped there",
                where="tokens",
                fix="use a method that works at the input or between layers",
            )
        depth = {"encoder": blocks, "layer": layers}.get(parts[0], 0)
        forms = {"", "raw", "modules", "peek", "entry", "mlp"}
        try:
            number = float(parts[1]) if "." in parts[1] else int(parts[1])
            form = parts[2] if len(parts) > 2 else ""
            if not depth or form not in forms or len(parts) > 3:
                raise ValueError
        except (ValueError, IndexError):
            raise SecateurError(
                f"{text!r} isn't a place of this model",
                where="tokens",
                fix="write encoder:K or layer:K, with :raw, :modules, :peek or :entry where needed",
            ) from None
        index = min(round(number * depth), depth - 1) if isinstance(number, float) else number
        index = index + depth if index < 0 else index
        if not 0 <= index < depth:
            raise SecateurError(f"{text!r} is outside the {depth} layers", where="tokens")
        return cls(parts[0] == "encoder", int(index), form)

    @property
    def key(self) -> tuple[str, int]:
        return ("encoder" if self.tower else "layer", self.number)

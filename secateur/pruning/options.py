"""What every method understands, as one dataclass: the keywords of `prune` and the flags of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.errors import SecateurError, choose
from secateur.pruning.allocate import ALLOCATIONS
from secateur.pruning.target import parse_schedule


@dataclass(frozen=True)
class Options:
    """What every method understands. The command line's flags and their help are these fields."""

    samples: int = field(default=32, metadata={"help": "calibration sequences"})
    seqlen: int = field(default=512, metadata={"help": "tokens per calibration and evaluation window"})
    schedule: str = field(
        default="once",
        metadata={"help": "once, or iterative:K to reach the target in K rounds, scoring anew in each"},
    )
    allocation: str | None = field(
        default=None,
        metadata={"help": f"how the budget is divided: {', '.join(ALLOCATIONS)}; default: the method's"},
    )
    floor: float = field(default=0.0, metadata={"help": "least share kept of any layer or group, 0..1"})
    round_to: int = field(default=1, metadata={"help": "keep multiples of this many channels or neurons"})
    kinds: tuple[str, ...] | None = field(
        default=None, metadata={"help": "kinds of unit to cut, e.g. neurons,kv_groups; default: the method's"}
    )
    uniform: bool = field(
        default=False,
        metadata={"help": "cut every layer alike, so that plain from_pretrained loads the result"},
    )
    prove: bool = field(
        default=True,
        metadata={"help": "check that the sliced model equals the masked one; failing groups are frozen"},
    )
    prove_export: bool = field(
        default=False,
        metadata={
            "help": "also check that torch.export takes the cut model if it took the whole one (seconds)"
        },
    )

    def check(self) -> None:
        if self.samples < 1 or self.seqlen < 2:
            raise SecateurError(
                f"{self.samples} samples of {self.seqlen} tokens is no calibration data",
                where="samples, seqlen",
                fix="at least 1 sample of 2 tokens",
            )
        if not 0 <= self.floor <= 1:
            raise SecateurError(
                f"{self.floor} is outside 0..1", where="floor", fix="give a share such as 0.1"
            )
        if self.round_to < 1:
            raise SecateurError(
                f"{self.round_to} isn't a multiple", where="round_to", fix="give 1, 8, 16, 64, ..."
            )
        if self.allocation is not None:
            choose(self.allocation, ALLOCATIONS, what="allocation", where="allocation")
        parse_schedule(self.schedule)

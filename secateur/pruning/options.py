"""What every method understands, as one dataclass: the keywords of `prune` and the flags of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.errors import SecateurError, choose
from secateur.pruning.share import read_shares, written
from secateur.pruning.target import parse_schedule
from secateur.repair.blocks import REPAIRS
from secateur.utils.ranges import check_fields


@dataclass(frozen=True)
class Options:
    """What every method understands. The command line's flags and their help are these fields; those of `several` may be repeated."""

    samples: int = field(default=32, metadata={"help": "calibration sequences", "min": 1})
    seqlen: int = field(
        default=512, metadata={"help": "tokens per calibration and evaluation window", "min": 2}
    )
    schedule: str = field(
        default="once",
        metadata={"help": "once, or iterative:K to reach the target in K rounds, scored again in each"},
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "how the budget is divided: uniform, global, per-kind, for units also measured (by what predictions lose without each layer's); for single weights owl, coarse-to-fine, arithmetic[:STEP]; default: the method's"
        },
    )
    floor: float = field(
        default=0.0, metadata={"help": "least share kept of any layer or group, 0..1", "min": 0, "max": 1}
    )
    round_to: int = field(
        default=1, metadata={"help": "keep multiples of this many channels or neurons", "min": 1}
    )
    kinds: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "several": True,
            "help": "kinds of unit to cut, e.g. neurons,kv_groups; default: the method's",
        },
    )
    keep: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "several": True,
            "help": "leave these alone: names or patterns of parameters or modules, e.g. 'lm_head,*.layers.0.*'",
        },
    )
    only: tuple[str, ...] | None = field(
        default=None,
        metadata={"several": True, "help": "leave everything else alone; names or patterns as for keep"},
    )
    share: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "several": True,
            "help": "the share kept of these: names or patterns as for keep, e.g. '*.mlp=50%'; of two that fit the later wins",
        },
    )
    everywhere: bool = field(
        default=False,
        metadata={"help": "single weights: also linear and convolution layers outside the repeated blocks"},
    )
    uniform: bool = field(
        default=False,
        metadata={"help": "cut every layer alike, so that plain from_pretrained loads the result"},
    )
    repair: str | None = field(
        default=None,
        metadata={
            "help": "what makes up for what left: reconstruct (each block fitted to the dense model's), obs, bias, none; default: what the method does"
        },
    )
    repair_passes: int = field(
        default=2,
        metadata={
            "help": "passes over the calibration data that reconstruct makes in each block; 0: closed form alone",
            "min": 0,
        },
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", written(self.share))

    def check(self) -> None:
        """Raises `SecateurError` for a value outside its range; which allocations there are, the method's kind says."""
        check_fields(self)
        parse_schedule(self.schedule)
        if self.repair is not None:
            choose(self.repair, REPAIRS, what="repair", where="repair")
        for pattern, share in read_shares(self.share).items():
            if share < self.floor:
                raise SecateurError(
                    f"{share:.4g} of {pattern!r} is under the floor {self.floor:g}",
                    where="share",
                    fix="lower the floor",
                )

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the default, as a plan keeps them."""
        default = Options()
        return {name: value for name, value in asdict(self).items() if value != getattr(default, name)}

    @property
    def fits(self) -> bool:
        """Whether a repair reads the calibration data."""
        return self.repair not in (None, "none")

    @property
    def divides(self) -> str | None:
        """The allocation that was asked for, if any; `uniform` asks for one."""
        return "uniform" if self.uniform else self.allocation

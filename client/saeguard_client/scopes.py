"""The tokens something applies to, and what values are measured in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from saeguard_client import _checks

Unit: TypeAlias = Literal["raw", "max", "unit_decoder"]
Phase: TypeAlias = Literal["all", "prompt", "generated"]
UNITS: Final[tuple[Unit, ...]] = get_args(Unit)
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The tokens an edit applies to; by default every token but special ones.

    Attributes:
        phase: "all", "prompt" or "generated" tokens.
        start: first position, inclusive; positions count from 0 over prompt and generated tokens together.
        end: last position, exclusive; None is no end.
        include_special_tokens: also edit BOS and the tokenizer's other special tokens.
    """

    phase: Phase = "all"
    start: int | None = None
    end: int | None = None
    include_special_tokens: bool = False

    def __post_init__(self) -> None:
        _checks.choice("phase", self.phase, PHASES)
        for name in ("start", "end"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checks.whole(name, getattr(self, name)))
        _checks.flag("include_special_tokens", self.include_special_tokens)

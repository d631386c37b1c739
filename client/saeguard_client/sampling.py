"""How the next token is chosen; None leaves a choice to the server. Fields are the wire's, which a test compares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from saeguard_client import _checks

_WHOLE = {
    "max_new_tokens": _checks.MAX_UINT32,
    "top_k": _checks.MAX_UINT32,
    "logprobs": _checks.MAX_UINT32,
    "seed": _checks.MAX_UINT64,
}
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling arguments of ``generate``, checked; see there for what each means."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Iterable[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, most in _WHOLE.items():
            self._keep(name, lambda name, value, most=most: _checks.whole(name, value, most))
        for name in _REAL:
            self._keep(name, _checks.number)
        _checks.flag("ignore_eos", self.ignore_eos)
        _checks.flag("prompt_logprobs", self.prompt_logprobs)
        # A lone string is one stop string: taken as a sequence it would be one per character.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", tuple(_checks.text(f"stop[{i}]", one) for i, one in enumerate(stop)))

    def _keep(self, name: str, check: Any) -> None:
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, check(name, value))

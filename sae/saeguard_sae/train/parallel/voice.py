"""So that several processes that fail together say it once."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_ANYONE = "saeguard/said"


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


class Voice:
    """Of one process; what was said is known to torchrun, which outlives every process that it started."""

    def __init__(self) -> None:
        self._store = next(iter(rendezvous("env://")))[0] if is_launched() else None

    def may_say(self, text: str) -> bool:
        """Whether nobody has said the same."""
        key = f"{_ANYONE}/{hashlib.sha256(text.encode()).hexdigest()}"
        return self._count(key) == 1 and self._count(_ANYONE) >= 1

    def may_break_the_silence(self) -> bool:
        """Whether nobody has said anything, and so why the run ends."""
        return self._count(_ANYONE) == 1

    def _count(self, key: str) -> int:
        # A store that is lost with its machine keeps nobody from speaking.
        with suppress(RuntimeError):
            return 1 if self._store is None else self._store.add(key, 1)
        return 1

"""How far one steering takes the model from another on the same tokens, measured from the logits as they are made.

Two tasks read the same tokens, each under its own steering, and hand their logits here. What waits for the other side
stays on the device; it is two rows of the vocabulary for every token at most.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from saeguard_server.errors import NonFiniteOutput

Side: TypeAlias = Literal["steered", "unsteered"]


class Divergence:
    """KL(steered || unsteered) of the next-token distributions in nats, at positions ``[first, first + count)``.

    Position p's logits predict the token at p + 1. A task is read again from its first token when it gave its memory
    up; what comes twice is the same and counts once.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._waiting: dict[Side, dict[int, Tensor]] = {"steered": {}, "unsteered": {}}
        self._found: dict[int, Tensor] = {}

    def offer(self, side: Side, start: int, logits: Tensor) -> None:
        """logits [T, vocabulary] of one side at positions ``[start, start + T)``."""
        other: Side = "unsteered" if side == "steered" else "steered"
        first, last = max(start, self._first), min(start + len(logits), self._first + self._count)
        wanted = [position for position in range(first, last) if position not in self._found]
        for position in wanted:
            row = logits[position - start].log_softmax(dim=-1)
            match = self._waiting[other].pop(position, None)
            if match is None:
                self._waiting[side][position] = row
            else:
                pair = (row, match) if side == "steered" else (match, row)
                self._found[position] = _kl(*pair)

    def result(self) -> tuple[float, ...]:
        """The divergence at each position, in order.

        Raises:
            NonFiniteOutput: a side's logits were not finite.
        """
        assert len(self._found) == self._count, "both sides were read to the end"
        if not self._count:
            return ()
        values = torch.stack([self._found[self._first + index] for index in range(self._count)])
        if not values.isfinite().all():
            raise NonFiniteOutput("the model's output is not finite for this request; an edit may be too large")
        return tuple(values.clamp_min(0.0).tolist())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Log-probabilities [vocabulary] of two distributions -> their divergence, a scalar."""
    return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)

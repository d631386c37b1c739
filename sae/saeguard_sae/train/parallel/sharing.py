"""A model's activations, its forward passes dealt out to several processes: each gets all, as if it had made them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.activation_source import ActivationSource, ModelActivations
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.parallel.mesh import Mesh


class SharedActivations:
    """An ``ActivationSource``: of as many chunks as there are processes each makes the one of its number.

    The chunks, their order and the state are those of one process.
    """

    def __init__(self, own: ModelActivations, mesh: Mesh) -> None:
        self._own, self._mesh = own, mesh
        self.widths, self.dtype, self.device = own.widths, own.dtype, own.device
        self.model_name, self.chunk = own.model_name, own.chunk
        self._ahead: deque[tuple[dict[Site, Tensor], int, Callable[[], dict[str, Any]]]] = deque()
        self._epoch, self._state = own.epoch, own.mark()

    @property
    def epoch(self) -> int:
        """See ``ActivationSource``."""
        return self._epoch

    def read(self) -> dict[Site, Tensor]:
        """See ``ActivationSource``.

        Raises:
            TrainError: as one process, in all of them.
        """
        if not self._ahead:
            self._read_on()
        chunk, self._epoch, self._state = self._ahead.popleft()
        return chunk

    def again(self) -> ActivationSource:
        """See ``ActivationSource``."""
        return SharedActivations(self._own.again(), self._mesh)

    def state(self) -> dict[str, Any]:
        """See ``ActivationSource``."""
        return self._state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``ActivationSource``."""
        self._own.resume(state)
        self._ahead.clear()
        self._epoch, self._state = self._own.epoch, self._own.mark()

    def _read_on(self) -> None:
        marks, mine, problem = [], {}, ""
        for turn in range(self._mesh.size):
            if turn == self._mesh.rank:
                try:
                    mine = self._own.read()
                except TrainError as err:
                    problem = str(err)
            else:
                self._own.pass_over()
            marks.append((self._own.epoch, self._own.mark()))
        told = self._mesh.told(([(x.shape, x.dtype) for x in mine.values()], problem))
        if problem := next((one for _, one in told if one), ""):
            raise TrainError(problem)
        for turn, ((kinds, _), (epoch, mark)) in enumerate(zip(told, marks, strict=True)):
            self._ahead.append((self._of(turn, kinds, mine), epoch, mark))

    def _of(
        self, turn: int, kinds: Sequence[tuple[torch.Size, torch.dtype]], mine: Mapping[Site, Tensor]
    ) -> dict[Site, Tensor]:
        """The chunk that process ``turn`` made."""
        if turn == self._mesh.rank:
            return {site: self._mesh.from_one(x.contiguous(), turn) for site, x in mine.items()}
        rooms = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in kinds]
        return {site: self._mesh.from_one(room, turn) for site, room in zip(self.widths, rooms, strict=True)}

"""Everything that a run writes while it goes: lines, figures, checkpoints. One process of a run writes."""

from __future__ import annotations

from typing import Protocol

from saeguard_sae.train.run.checkpoints import Checkpoint, Checkpoints
from saeguard_sae.train.run.console import Console
from saeguard_sae.train.run.folder import RunFolder
from saeguard_sae.train.run.metrics import MetricsFile, Moment, TensorBoard


class Recorder(Protocol):
    """Where a run's figures and states go."""

    def note(self, text: str) -> None:
        """Something to be told."""
        ...

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """A step was done."""
        ...

    def report(self, moment: Moment) -> None:
        """Figures are there."""
        ...

    def metrics_size(self) -> int:
        """Bytes of figures that are safely on disk."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """A state to go on from."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Written:
    """To the folder and the console."""

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, console: Console, begun: Checkpoint | None) -> None:
        """``begun``: what the run goes on from."""
        step, size = (begun.step, begun.metrics) if begun is not None else (0, 0)
        self._checkpoints, self._console = checkpoints, console
        self._metrics = MetricsFile(folder.metrics, size)
        self._board = TensorBoard(folder.tensorboard, step)

    def note(self, text: str) -> None:
        """See ``Recorder``."""
        self._console.note(text)

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """See ``Recorder``."""
        self._console.live(step, steps, tokens_per_s, left_s)

    def report(self, moment: Moment) -> None:
        """See ``Recorder``."""
        self._metrics.add(moment)
        self._board.add(moment)
        self._console.report(moment)

    def metrics_size(self) -> int:
        """See ``Recorder``."""
        return self._metrics.size()

    def save(self, checkpoint: Checkpoint) -> None:
        """See ``Recorder``."""
        self._checkpoints.save(checkpoint)

    def close(self) -> None:
        """See ``Recorder``."""
        self._console.clear()
        self._metrics.close()
        self._board.close()


class Silent:
    """Of a process that does not write."""

    def note(self, text: str) -> None:
        """See ``Recorder``."""

    def live(self, step: int, steps: int, tokens_per_s: float, left_s: float) -> None:
        """See ``Recorder``."""

    def report(self, moment: Moment) -> None:
        """See ``Recorder``."""

    def metrics_size(self) -> int:
        """See ``Recorder``."""
        return 0

    def save(self, checkpoint: Checkpoint) -> None:
        """See ``Recorder``."""

    def close(self) -> None:
        """See ``Recorder``."""

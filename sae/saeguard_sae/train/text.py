"""Text to read: documents of a data set, one after another and over again, from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.sources import open_source
from saeguard_sae.train.stream_settings import DataSettings

__all__ = ["DataSettings", "Documents", "documents"]


class Documents:
    """The documents of a data set, in its order, started again when it ends. Those without text are left out.

    Raises:
        TrainError: nothing there, no such column, no text in it; the message names the file and the place.
    """

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._source = open_source(settings)
        self.epoch = 0
        """How often the data set was started again."""
        self.number = 0
        """Of the document that was given last, counted from 1 and through all epochs."""
        self._seen = self._taken = 0
        self._texts = self._source.begin(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            text = None if self._is_at_limit() else next(self._texts, None)
            if text is None:
                self._start_again()
                continue
            if not text.strip():
                continue
            self._seen += 1
            if self._seen > self._settings.skip:
                self._taken += 1
                self.number += 1
                return text

    def state(self) -> dict[str, Any]:
        """Where it is, as plain values."""
        return {
            "epoch": self.epoch,
            "number": self.number,
            "seen": self._seen,
            "taken": self._taken,
            "source": self._source.state(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the document after which ``state`` was taken.

        Raises:
            TrainError: the data set has changed since.
        """
        self.epoch, self.number = state["epoch"], state["number"]
        self._seen, self._taken = state["seen"], state["taken"]
        self._texts = self._source.begin(state["source"])

    def _is_at_limit(self) -> bool:
        return 0 < self._settings.limit <= self._taken

    def _start_again(self) -> None:
        if not self._taken:
            behind = f" behind its first {self._settings.skip} documents (data.skip)" if self._settings.skip else ""
            raise TrainError(f"data.path: {self._settings.path!r} holds no text{behind}")
        self.epoch += 1
        self._seen = self._taken = 0
        self._texts = self._source.begin(None)


def documents(settings: DataSettings) -> Documents:
    """The documents that the settings name; the first one is looked at now, so that mistakes show before work is done.

    Raises:
        TrainError: see ``Documents``.
    """
    read = Documents(settings)
    start = read.state()
    next(read)
    read.resume(start)
    return read

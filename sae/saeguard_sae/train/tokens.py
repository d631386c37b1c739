"""Documents as rows of tokens of one length, and which of their tokens SAEs learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings
from saeguard_sae.train.text import documents

_LONGEST = 1024
"""Tokens of a row, where the settings leave it to the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What the model reads at once."""

    ids: Tensor
    """int64 [context]"""
    kept: Tensor
    """bool [context], which tokens SAEs learn from; the masks of BOS, padding and special tokens are in it."""
    document: int
    """Number of the document that the row begins in, counted from 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of one forward pass."""

    ids: Tensor
    """int64 [rows, context]"""
    kept: Tensor
    """bool [rows, context]"""
    documents: tuple[int, ...]
    """Number of the document that each row begins in."""
    first: int = 1
    """Number of the first row, counted from 1."""


class Contexts:
    """Rows of tokens without end, from a data set that starts again when it ends.

    Raises:
        TrainError: a context that the model cannot read, a tokenizer that is not the model's, wrong data.
    """

    def __init__(self, model: LanguageModel, data: DataSettings, settings: StreamSettings) -> None:
        self.context = context_length(model, settings)
        self._documents = documents(data)
        self._settings = settings
        self._vocab_size = int(model.config.vocab_size)
        self._backend = model.tokenizer.backend_tokenizer
        bos, eos, pad = (_id(getattr(model.tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "pad"))
        self._start = bos
        self._end = (eos or bos) if settings.packing == "packed" else []
        self._pad = (pad or eos or bos or [0])[0]
        self._special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)
        self._pending: list[int] = []
        self._at = 0
        self._document = self._first_document = self._row = 0

    @property
    def epoch(self) -> int:
        """How often the data set was started again."""
        return self._documents.epoch

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        ids, length = self._next_ids()
        kept = torch.arange(self.context) < length
        if self._settings.mask_first:
            kept[0] = False
        if self._settings.mask_special:
            kept &= ~torch.isin(ids, self._special)
        self._row += 1
        return Row(ids, kept, self._first_document)

    def rows(self, count: int) -> Rows:
        """The next rows, together."""
        first = self._row + 1
        taken = [next(self) for _ in range(count)]
        return Rows(
            torch.stack([row.ids for row in taken]),
            torch.stack([row.kept for row in taken]),
            tuple(row.document for row in taken),
            first,
        )

    def state(self) -> dict[str, Any]:
        """Where it is: plain values and a tensor."""
        return self.mark()()

    def mark(self) -> Callable[[], dict[str, Any]]:
        """What gives the state of now, also later; a long document is copied then only."""
        documents, pending, at = self._documents.state(), self._pending, self._at
        document, row = self._document, self._row
        return lambda: {
            "documents": documents,
            "pending": torch.tensor(pending[at:], dtype=torch.int64),
            "document": document,
            "row": row,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the row after which ``state`` was taken.

        Raises:
            TrainError: the data set has changed since.
        """
        self._documents.resume(state["documents"])
        self._pending, self._at = state["pending"].tolist(), 0
        self._document, self._row = state["document"], state["row"]

    def _next_ids(self) -> tuple[Tensor, int]:
        """The ids of a row, and how many of them are not padding."""
        wanted = self.context - len(self._start)
        if self._at == len(self._pending):
            self._read()
        self._first_document = self._document
        while self._settings.packing == "packed" and len(self._pending) - self._at < wanted:
            self._read()
        ids = self._start + self._pending[self._at : self._at + wanted]
        self._at = min(self._at + wanted, len(self._pending))
        length = len(ids)
        return torch.tensor(ids + [self._pad] * (self.context - length), dtype=torch.int64), length

    def _read(self) -> None:
        """Appends the next document that has tokens."""
        epoch = self._documents.epoch
        while self._documents.epoch < epoch + 2:
            ids = self._backend.encode(next(self._documents), add_special_tokens=False).ids
            self._document = self._documents.number
            if not ids:
                continue
            if max(ids) >= self._vocab_size:
                raise TrainError(
                    f"model.path: its tokenizer gives token {max(ids)}, and the model has {self._vocab_size}: "
                    "they do not belong together"
                )
            # What was read is let go here, not row by row: a document may have millions of tokens.
            self._pending, self._at = self._pending[self._at :] + ids + self._end, 0
            return
        raise TrainError("data.path: its documents have no tokens")


def context_length(model: LanguageModel, settings: StreamSettings) -> int:
    """Tokens of a row.

    Raises:
        TrainError: more than the model can read.
    """
    if settings.context > model.max_context:
        raise TrainError(
            f"stream.context: {model.name} can read {model.max_context} tokens at once, got {settings.context}"
        )
    return settings.context or min(model.max_context, _LONGEST)


def contexts(model: LanguageModel, data: DataSettings, settings: StreamSettings) -> Contexts:
    """The rows of tokens that a stream with these settings reads.

    Raises:
        TrainError: see ``Contexts``.
    """
    return Contexts(model, data, settings)


def _id(found: Any) -> list[int]:
    return [] if found is None else [int(found)]

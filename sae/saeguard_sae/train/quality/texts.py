"""From a data set to rows that are measured on: each document once, none again when the data set ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.quality.batch import Row
from saeguard_sae.train.quality.probes import Labelled
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings
from saeguard_sae.train.tokens import contexts


def text_rows(model: LanguageModel, data: DataSettings, stream: StreamSettings) -> Iterator[Row]:
    """The rows that training with these settings would read, up to the end of the data set.

    A packed row that would go on with the data set's start is left out.

    Raises:
        TrainError: see ``contexts``; text that is too short for a row.
    """
    source = contexts(model, data, stream)
    found = 0
    for row in source:
        if source.epoch > 0:
            break
        length = len(row.ids)
        if stream.packing == "documents":  # the rest is padding, which the loss must not count
            length = int(row.kept.nonzero().max()) + 1 if row.kept.any() else 1
        found += 1
        yield Row(row.ids[:length], row.kept[:length])
    if not found:
        raise TrainError(
            f"data.path: {data.path!r} is shorter than a row of {source.context} tokens; give more text, or a smaller "
            "context"
        )


def labelled_rows(model: LanguageModel, labelled: Sequence[Labelled], context: int) -> list[tuple[Row, str]]:
    """Each text as a row of its own, cut at ``context`` tokens; its first token is never ordinary.

    Raises:
        TrainError: a text without two tokens.
    """
    backend = model.tokenizer.backend_tokenizer
    bos = model.tokenizer.bos_token_id
    special = torch.tensor(sorted(model.special_ids), dtype=torch.long)
    found = []
    for number, one in enumerate(labelled, start=1):
        own = backend.encode(one.text, add_special_tokens=False).ids
        ids = torch.tensor(([] if bos is None else [int(bos)]) + own, dtype=torch.long)[:context]
        ordinary = ~torch.isin(ids, special) & (torch.arange(len(ids)) > 0)
        if not ordinary.any():
            raise TrainError(f"probe: text {number} has no token to read: {one.text[:40]!r}")
        found.append((Row(ids, ordinary), str(one.label)))
    return found

"""What is read, and how it becomes a mixed stream of activations."""

from __future__ import annotations

from math import inf
from typing import Literal, TypeAlias, get_args

import msgspec
import torch

from saeguard_sae.train.errors import TrainError, check_at_least, check_choice

Kind: TypeAlias = Literal["auto", "text", "jsonl", "parquet", "hub", "activations"]
Packing: TypeAlias = Literal["packed", "documents"]
Store: TypeAlias = Literal["model", "float32", "bfloat16"]


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read.

    Raises:
        TrainError: names the field and what is allowed.
    """

    path: str
    """A file, a folder (all files in it, by name), or a data set of the Hugging Face hub."""
    kind: Kind = "auto"
    """``text``: plain files (.txt); ``jsonl``; ``parquet``; ``hub``: a Hugging Face data set, read as it arrives;
    ``activations``: a folder that ``cache`` wrote; ``auto``: what the name and the files say. Text and JSONL may be
    compressed (.gz)."""
    column: str = "text"
    """Of all but plain files: where the text is."""
    separator: str = ""
    """Of plain files: what parts documents, such as a blank line ("\\n\\n"); empty: a file is a document."""
    split: str = "train"
    """Of ``hub``."""
    name: str = ""
    """Of ``hub``: which configuration of the data set, where it has several."""
    revision: str = ""
    """Of ``hub``: commit or tag."""
    skip: int = 0
    """Documents with text to leave out at the start of the data set, so that something is left to measure on."""
    limit: int = 0
    """Documents with text to read before starting again; 0: all."""

    def __post_init__(self) -> None:
        for name in ("path", "column", "split"):
            if not getattr(self, name):
                raise TrainError(f"data.{name}: must not be empty")
        check_choice("data.kind", self.kind, get_args(Kind))
        check_at_least("data.skip", self.skip, 0)
        check_at_least("data.limit", self.limit, 0)


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stream of activations that SAEs are trained on.

    Raises:
        TrainError: names the field and what is allowed.
    """

    batch: int = 4096
    """Tokens of a batch; several processes deal it out."""
    buffer: int = 262_144
    """Tokens that are mixed: each batch is drawn from at least half as many."""
    store: Store = "model"
    """How the buffer keeps activations: ``model`` is as the model makes them, ``bfloat16`` halves a float32 model's."""
    context: int = 0
    """Tokens of a row; 0: what the model can read, at most 1,024."""
    rows: int = 0
    """Rows of one forward pass; 0: as many as make 4,096 tokens, 16,384 on a GPU."""
    packing: Packing = "packed"
    """``packed``: documents one after another, EOS behind each (BOS where the tokenizer has no EOS), so that a row may
    hold parts of several; ``documents``: each starts a row of its own, padded, and a long one goes on in the next.
    Either way BOS, where the tokenizer has one, starts each row."""
    mask_first: bool = True
    """Leave out each row's first token. It is BOS where the tokenizer has one, and an attention sink unlike all others
    where it has none."""
    mask_special: bool = True
    """Leave out the tokenizer's special tokens: EOS behind documents, chat marks. Padding is always left out."""
    outlier_norm: float = 10.0
    """Leave out tokens whose norm at any site is above this many times the median there; 0 keeps them."""
    seed: int = 0
    """Of the mixing."""

    def __post_init__(self) -> None:
        check_choice("stream.packing", self.packing, get_args(Packing))
        check_choice("stream.store", self.store, get_args(Store))
        check_at_least("stream.batch", self.batch, 1)
        check_at_least("stream.rows", self.rows, 0)
        check_at_least("stream.seed", self.seed, 0)
        if self.context < 0 or self.context == 1:
            raise TrainError(f"stream.context: must be at least 2 tokens, or 0 for the model's own, got {self.context}")
        if self.buffer < 2 * self.batch:
            raise TrainError(f"stream.buffer: must hold two batches ({2 * self.batch} tokens), got {self.buffer}")
        if self.outlier_norm != 0 and not 1 < self.outlier_norm < inf:
            raise TrainError(f"stream.outlier_norm: must be above 1, or 0 to keep all, got {self.outlier_norm:g}")

    def store_dtype(self, model: torch.dtype) -> torch.dtype:
        """How the buffer keeps the activations of a model that computes in this dtype."""
        return {"model": model, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.store]

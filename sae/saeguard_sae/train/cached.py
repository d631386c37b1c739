"""Activations on disk: written once from a stream, read as often as wanted without the model.

A folder of safetensors files with a tensor [tokens, width] for each site, and ``activations.json``, which lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError, one_line
from saeguard_sae.train.sources import INDEX
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings

_CHUNK = 4096
"""Tokens read at once."""


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file."""

    file: str
    tokens: int


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder of activations holds."""

    version: Literal[1] = 1
    model: str
    dtype: Literal["float32", "bfloat16"]
    tokens: int
    sites: dict[str, int]
    """Width at each site."""
    shards: tuple[Shard, ...]


class CachedActivations:
    """Reads a folder of activations; an ``ActivationSource``. Files are mapped into memory, not read whole.

    Raises:
        TrainError: not such a folder, a site that it lacks, files that are missing or are not what the index says.
    """

    def __init__(self, data: DataSettings, wanted: Sequence[Site], settings: StreamSettings) -> None:
        self._given = data, wanted, settings
        self._folder = Path(data.path).expanduser()
        self._index = _read_index(self._folder)
        self.widths: Mapping[Site, int] = {site: self._width(site) for site in dict.fromkeys(wanted)}
        self.dtype: torch.dtype = getattr(torch, self._index.dtype)
        self.device = torch.device("cpu")
        self.model_name = self._index.model
        self.chunk = max(1, min(_CHUNK, settings.buffer // 2))
        self._epoch = self._shard = self._row = 0
        self._opened: tuple[int, Any] | None = None
        for shard in range(len(self._index.shards)):
            self._open(shard)

    @property
    def epoch(self) -> int:
        """See ``ActivationSource``."""
        return self._epoch

    def read(self) -> dict[Site, Tensor]:
        """See ``ActivationSource``.

        Raises:
            TrainError: activations that are not finite.
        """
        shard, start, stop = self._next()
        file = self._open(shard)
        tokens: dict[Site, Tensor] = {site: file.get_slice(str(site))[start:stop] for site in self.widths}
        for site, x in tokens.items():
            if not bool(torch.isfinite(x).all()):
                row = start + int((~torch.isfinite(x).all(dim=1)).int().argmax())
                name = self._index.shards[shard].file
                raise TrainError(f"activations at {site} are not finite (NaN or infinite) in row {row} of {name}")
        return tokens

    def again(self) -> CachedActivations:
        """See ``ActivationSource``."""
        return CachedActivations(*self._given)

    def state(self) -> dict[str, Any]:
        """See ``ActivationSource``."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,
            "row": self._row,
            "shards": [shard.tokens for shard in self._index.shards],
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``ActivationSource``.

        Raises:
            TrainError: the folder holds something else now.
        """
        if state["shards"] != [shard.tokens for shard in self._index.shards]:
            raise TrainError("data.path: its files have other sizes than when the checkpoint was written")
        self._epoch, self._shard, self._row = state["epoch"], state["shard"], state["row"]

    def _next(self) -> tuple[int, int, int]:
        """Shard, first row and row past the last of the next chunk; moves on."""
        shards = self._index.shards
        while self._row >= shards[self._shard].tokens:
            self._row = 0
            self._shard += 1
            if self._shard == len(shards):
                self._shard, self._epoch = 0, self._epoch + 1
        start = self._row
        self._row = min(start + self.chunk, shards[self._shard].tokens)
        return self._shard, start, self._row

    def _width(self, site: Site) -> int:
        if str(site) not in self._index.sites:
            there = ", ".join(self._index.sites)
            raise TrainError(f"sites: {site} is not in the activations at {str(self._folder)!r}, which have {there}")
        return self._index.sites[str(site)]

    def _open(self, shard: int) -> Any:
        if self._opened is not None and self._opened[0] == shard:
            return self._opened[1]
        said = self._index.shards[shard]
        path = self._folder / said.file
        try:
            file: Any = safe_open(path, framework="pt")
            for site, width in self.widths.items():
                found = file.get_slice(str(site)).get_shape()
                if found != [said.tokens, width]:
                    raise ValueError(f"{site} has the shape {found}, {INDEX} says {[said.tokens, width]}")
        except (OSError, ValueError, SafetensorError) as err:
            raise TrainError(f"data.path: {path} cannot be used: {one_line(err)}") from err
        self._opened = shard, file
        return file


def _read_index(folder: Path) -> Index:
    path = folder / INDEX
    try:
        index = msgspec.convert(json.loads(path.read_text(encoding="utf-8")), Index)
    except (OSError, ValueError, msgspec.ValidationError) as err:
        raise TrainError(f"data.path: {path} cannot be used: {one_line(err)}") from err
    if not index.shards or not all(shard.tokens > 0 for shard in index.shards):
        raise TrainError(f"data.path: {path} lists no activations, or a file without any")
    return index

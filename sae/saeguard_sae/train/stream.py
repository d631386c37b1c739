"""A mixed stream of activations at several sites, and the same written to a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.activation_source import ActivationSource, ModelActivations
from saeguard_sae.train.buffer import Buffer, buffer_bytes
from saeguard_sae.train.cached import CachedActivations
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.harvest import Harvester
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.parallel.mesh import ALONE, Mesh
from saeguard_sae.train.parallel.sharing import SharedActivations
from saeguard_sae.train.sources import kind
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings

_MEASURED = 4096
"""Tokens whose norms tell what is an outlier."""
_PATIENCE = 1000
"""Chunks in a row of which nothing may be left before the masks are called wrong."""


class ActivationStream:
    """Batches of activations, mixed: rows of a batch are the same tokens at every site.

    A transcoder's site to read and site to write are two of its sites.

    Several processes each have the stream that one would have, and its state; the model's forward passes, one for each
    chunk, are dealt out to them.

    Args:
        model: None where ``data`` is cached activations.
        mesh: of the processes that all call the same methods.

    Raises:
        TrainError: names the field, and what is allowed.
    """

    def __init__(
        self,
        model: LanguageModel | None,
        sites: Sequence[Site],
        data: DataSettings,
        settings: StreamSettings,
        mesh: Mesh = ALONE,
    ) -> None:
        self.settings = settings
        self._source = _opened(model, sites, data, settings, mesh)
        self._limits: dict[Site, float] | None = None
        self._buffer: Buffer | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it reads."""
        return tuple(self._source.widths)

    @property
    def widths(self) -> dict[Site, int]:
        """Of the activations at each site."""
        return dict(self._source.widths)

    @property
    def dtype(self) -> torch.dtype:
        """In which activations are kept; batches are float32."""
        return self.settings.store_dtype(self._source.dtype)

    @property
    def model_name(self) -> str:
        """Whose activations they are."""
        return self._source.model_name

    @property
    def buffer_bytes(self) -> int:
        """Memory that the buffer takes from the first batch on; a checkpoint takes as much."""
        return buffer_bytes(self._source.widths, self.settings.buffer, self.dtype)

    @property
    def epoch(self) -> int:
        """How often the data was started again; above 0, tokens are seen more than once."""
        return self._source.epoch

    def sample(self, tokens: int) -> dict[Site, Tensor]:
        """The first tokens of the data, in their order, float32 [tokens, width]; the stream stays where it is.

        Raises:
            TrainError: wrong data, activations that are not finite.
        """
        parts: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        source, found = self._source.again(), 0
        while found < tokens:
            chunk = self._chunk(source)
            found += _count(chunk)
            for site, x in chunk.items():
                parts[site].append(x.to(self.dtype).float())
        return {site: torch.cat(some)[:tokens] for site, some in parts.items()}

    def batch(self) -> dict[Site, Tensor]:
        """The next batch, float32 [batch, width] at each site, on the model's device.

        Raises:
            TrainError: wrong data, activations that are not finite.
        """
        buffer = self._filled()
        return buffer.draw(self.settings.batch)

    def state(self) -> dict[str, Any]:
        """All that decides the batches to come, the buffer included: tensors and plain values."""
        return {
            "source": self._source.state(),
            "limits": {str(site): limit for site, limit in self._found_limits().items()},
            "buffer": None if self._buffer is None else self._buffer.state(),
            "capacity": self.settings.buffer,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Gives the batches that would have followed ``state``; on a CPU, bit for bit.

        Raises:
            TrainError: the data has changed, or it is the state of other sites.
        """
        if set(state["limits"]) != {str(site) for site in self.sites}:
            there = ", ".join(state["limits"])
            raise TrainError(f"sites: the checkpoint has {there}, the settings {', '.join(map(str, self.sites))}")
        if state["capacity"] != self.settings.buffer:
            wrong = f"the checkpoint has {state['capacity']}, the settings {self.settings.buffer}"
            raise TrainError(f"stream.buffer: {wrong}")
        self._source.resume(state["source"])
        self._limits = {site: state["limits"][str(site)] for site in self.sites}
        self._buffer = None
        if state["buffer"] is not None:
            self._buffer = self._new_buffer()
            self._buffer.resume(state["buffer"])

    def _filled(self) -> Buffer:
        if self._buffer is None:
            self._buffer = self._new_buffer()
        while self._buffer.free >= self._source.chunk:
            self._buffer.add(self._chunk(self._source))
        return self._buffer

    def _new_buffer(self) -> Buffer:
        source, settings = self._source, self.settings
        return Buffer(source.widths, settings.buffer, self.dtype, source.device, settings.seed * 1_000_003)

    def _chunk(self, source: ActivationSource) -> dict[Site, Tensor]:
        """The next chunk that has tokens, without outliers."""
        limits = self._found_limits()
        for _ in range(_PATIENCE):
            tokens = source.read()
            if all(limit == inf for limit in limits.values()):
                kept = tokens
            else:
                norms = [x.float().norm(dim=1) <= limits[site] for site, x in tokens.items()]
                is_kept = torch.stack(norms).all(dim=0)
                kept = {site: x[is_kept] for site, x in tokens.items()}
            if _count(kept):
                return kept
        raise TrainError(f"data.path: {_PATIENCE} forward passes left no token to learn from (see the masks of stream)")

    def _found_limits(self) -> dict[Site, float]:
        """The norm above which a token is left out, by site."""
        if self._limits is None:
            self._limits = dict.fromkeys(self.sites, inf)
            if self.settings.outlier_norm:
                self._limits = self._measured(self._limits)
        return self._limits

    def _measured(self, none: dict[Site, float]) -> dict[Site, float]:
        source, found = self._source.again(), 0
        norms: dict[Site, list[Tensor]] = {site: [] for site in none}
        while found < _MEASURED:
            chunk = self._chunk(source)
            found += _count(chunk)
            for site, x in chunk.items():
                norms[site].append(x.float().norm(dim=1))
        medians = {site: float(torch.cat(some).median()) for site, some in norms.items()}
        # A median of 0 says that most tokens have nothing here, not that the others are outliers.
        return {site: self.settings.outlier_norm * median or inf for site, median in medians.items()}


def estimate(model: LanguageModel, sites: Sequence[Site], settings: StreamSettings) -> int:
    """Bytes that a stream's buffer will take; a checkpoint takes as many.

    Raises:
        TrainError: a site that the model lacks.
    """
    return buffer_bytes(Harvester(model, sites).widths(), settings.buffer, settings.store_dtype(model.dtype))


def _opened(
    model: LanguageModel | None, wanted: Sequence[Site], data: DataSettings, settings: StreamSettings, mesh: Mesh
) -> ActivationSource:
    """The source that the settings name.

    Raises:
        TrainError: no model where text is to be read; see the sources.
    """
    if kind(data) == "activations":
        return CachedActivations(data, wanted, settings)
    if model is None:
        raise TrainError("model: none is given, and the data is text; only cached activations need no model")
    made = ModelActivations(model, wanted, data, settings)
    return made if mesh.size == 1 else SharedActivations(made, mesh)


def _count(tokens: Mapping[Site, Tensor]) -> int:
    return len(next(iter(tokens.values())))

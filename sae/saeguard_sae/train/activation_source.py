"""Where a stream's activations come from: a model that reads text, or a folder of activations made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.harvest import Harvester
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.stream_settings import DataSettings, StreamSettings
from saeguard_sae.train.tokens import Contexts, context_length

_TOKENS, _TOKENS_GPU = 4096, 16_384
"""Of one forward pass."""


class ActivationSource(Protocol):
    """Activations without end, chunk after chunk, in the order of the data."""

    widths: Mapping[Site, int]
    dtype: torch.dtype
    device: torch.device
    model_name: str
    chunk: int
    """Tokens of a chunk, at most."""

    @property
    def epoch(self) -> int:
        """How often the data set was started again."""
        ...

    def read(self) -> dict[Site, Tensor]:
        """The next chunk: at each site [n, width], rows are the same tokens everywhere."""
        ...

    def again(self) -> ActivationSource:
        """Another one, at the start of the data."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it is: tensors and plain values."""
        ...

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        ...


class ModelActivations:
    """What a model makes of text.

    Raises:
        TrainError: a site that the model lacks, wrong data, a buffer too small for one forward pass.
    """

    def __init__(
        self, model: LanguageModel, wanted: Sequence[Site], data: DataSettings, settings: StreamSettings
    ) -> None:
        self._given = model, wanted, data, settings
        self._harvester = Harvester(model, wanted)
        self._contexts = Contexts(model, data, settings)
        self._rows = rows_per_pass(model, settings)
        self.chunk = self._rows * self._contexts.context
        self.widths: Mapping[Site, int] = self._harvester.widths()
        self.dtype, self.device, self.model_name = model.dtype, model.device, model.name

    @property
    def epoch(self) -> int:
        """See ``ActivationSource``."""
        return self._contexts.epoch

    def read(self) -> dict[Site, Tensor]:
        """See ``ActivationSource``.

        Raises:
            TrainError: activations that are not finite, wrong data.
        """
        return self._harvester.read(self._contexts.rows(self._rows))

    def pass_over(self) -> None:
        """Leaves the next chunk to another process."""
        self._contexts.rows(self._rows)

    def mark(self) -> Callable[[], dict[str, Any]]:
        """See ``Contexts.mark``."""
        return self._contexts.mark()

    def again(self) -> ModelActivations:
        """See ``ActivationSource``."""
        return ModelActivations(*self._given)

    def state(self) -> dict[str, Any]:
        """See ``ActivationSource``."""
        return self._contexts.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``ActivationSource``."""
        self._contexts.resume(state)


def rows_per_pass(model: LanguageModel, settings: StreamSettings) -> int:
    """Rows of one forward pass, which fit into half of the buffer.

    Raises:
        TrainError: they do not.
    """
    context = context_length(model, settings)
    most = settings.buffer // 2 // context
    if settings.rows > most or not most:
        raise TrainError(
            f"stream.buffer: must hold twice the tokens of one forward pass, {max(1, settings.rows)} rows of {context} "
            f"tokens, got {settings.buffer}"
        )
    tokens = _TOKENS if model.device.type == "cpu" else _TOKENS_GPU
    return settings.rows or max(1, min(most, tokens // context))

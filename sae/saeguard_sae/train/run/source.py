"""The stream of a run, its batches where the SAEs learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saeguard_sae.site import Site
from saeguard_sae.train.buffer import buffer_bytes
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.parallel.mesh import ALONE, Mesh
from saeguard_sae.train.run.config import RunConfig
from saeguard_sae.train.stream import ActivationStream
from saeguard_sae.train.tokens import context_length


class Source:
    """Cached activations lie in the machine's memory, whatever the device; what a model makes is where the model is.

    Raises:
        TrainError: a site that the model or the cache lacks, wrong data.
    """

    def __init__(self, config: RunConfig, model: LanguageModel | None, mesh: Mesh = ALONE) -> None:
        sites = [site for one in config.saes for site in one.sites]
        self._stream = ActivationStream(model, list(dict.fromkeys(sites)), config.training_data, config.stream, mesh)
        self.device = torch.device("cpu") if model is None else model.device
        self.model_name = self._stream.model_name
        self.widths = self._stream.widths
        self.context = None if model is None else context_length(model, config.stream)
        """Tokens that the model reads at once; None where activations are cached."""
        self.has_bos = model is not None and model.tokenizer.bos_token_id is not None
        self.buffer_bytes = buffer_bytes(self.widths, config.stream.buffer, self._stream.dtype)

    @property
    def epoch(self) -> int:
        """How often the data was started again."""
        return self._stream.epoch

    def sample(self, tokens: int) -> dict[Site, Tensor]:
        """The first tokens, without taking them: at each site float32 [tokens, width]."""
        return self._here(self._stream.sample(tokens))

    def batch(self) -> dict[Site, Tensor]:
        """The next batch: at each site float32 [batch, width]."""
        return self._here(self._stream.batch())

    def state(self) -> dict[str, Any]:
        """All that decides the batches to come."""
        return self._stream.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        self._stream.resume(state)

    def _here(self, tokens: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        return {site: x.to(self.device) for site, x in tokens.items()}

"""The model at the place of an SAE: what is there, and what the model says when something else is put there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig, depth
from saeguard_sae.check.hooks import visiting
from saeguard_sae.check.measure import target
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.loading import LoadedSae
from saeguard_sae.pursuit import MatchingPursuit
from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.quality.batch import Batch


@dataclass(frozen=True, slots=True)
class Captured:
    """What is at the sites for the ordinary tokens of a batch, in their order."""

    read: Tensor
    """[n, d_in] what the SAE reads, float32."""
    wanted: Tensor
    """[n, d_out] what it must reproduce, float32."""
    logits: Tensor | None
    """[rows, T, vocabulary]; None where the pass ended at the sites."""


class _Reached(Exception):
    """Ends a forward pass behind the last site."""


class Subject:
    """A model with the place where one SAE reads, what it must reproduce, and where that is written."""

    def __init__(self, model: nn.Module, config: ModelConfig, sae: LoadedSae) -> None:
        """
        Raises:
            TrainError: an SAE that is no function of one token, or writes its part at several sites.
        """
        wanted = target(sae)
        if wanted is None:
            raise TrainError(
                f"SAE {sae.name!r} writes at {len(sae.write_sites)} sites; one that writes at one is needed"
            )
        if not isinstance(sae.dictionary, Dictionary | MatchingPursuit):
            kind = sae.dictionary.architecture
            raise TrainError(f"SAE {sae.name!r} is {kind}, which reads whole texts; `saeguard sae check` measures it")
        self.model, self.config = model, config
        self.reads, self.target, self.writes = sae.site, wanted, sae.write_sites[0]
        self._gain = sae.write_gain
        self._name, self._widths = sae.name, (sae.dictionary.d_in, sae.dictionary.d_out)
        self.device = next(model.parameters()).device

    def capture(self, batch: Batch, *, logits: bool = True) -> Captured:
        """Reads a batch as the model is.

        Args:
            logits: False ends the pass at the sites.

        Raises:
            TrainError: activations that are not finite, or not of the SAE's width.
        """
        seen: dict[Site, Tensor] = {}
        last = max((self.reads, self.target), key=depth)

        def visit(site: Site, x: Tensor, see: Tensor) -> None:
            seen[site] = see[batch.ordinary].float()
            if site == last and not logits:
                raise _Reached

        found: Tensor | None = None
        with visiting(self.model, self.config, (self.reads, self.target), visit), suppress(_Reached):
            found = self._forward(batch)
        self._check(seen)
        return Captured(seen[self.reads], seen[self.target], found)

    def spliced(self, batch: Batch, captured: Captured, new: Tensor) -> Tensor:
        """The logits [rows, T, vocabulary] with ``new`` [n, d_out] in place of what ``captured.wanted`` was."""

        def visit(site: Site, x: Tensor, see: Tensor) -> Tensor:
            if self.writes == self.target:
                rows = new
            else:
                error = (new - captured.wanted) if self._gain is None else (new - captured.wanted) * self._gain.to(new)
                rows = x[batch.ordinary].float() + error
            out = x.clone()
            out[batch.ordinary] = rows.to(x.dtype)
            return out

        with visiting(self.model, self.config, (self.writes,), visit):
            return self._forward(batch)

    def _check(self, seen: dict[Site, Tensor]) -> None:
        for site, width, does in ((self.reads, self._widths[0], "reads"), (self.target, self._widths[1], "writes")):
            if seen[site].shape[1] != width:
                raise TrainError(f"SAE {self._name!r} {does} {width} wide, and {site} is {seen[site].shape[1]} wide")
            if not torch.isfinite(seen[site]).all():
                raise TrainError(f"the model's activations at {site} are not finite")

    def _forward(self, batch: Batch) -> Tensor:
        output: Any = self.model(input_ids=batch.ids, use_cache=False)
        logits: Tensor = output.logits
        return logits

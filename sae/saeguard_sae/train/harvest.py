"""Activations at sites from a forward pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from saeguard_sae.architectures import Located, depth, locate, sites
from saeguard_sae.site import Site
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.tokens import Rows


class Harvester:
    """Reads a model's activations at some sites.

    Raises:
        TrainError: no sites, or one that the model lacks.
    """

    def __init__(self, model: LanguageModel, wanted: Sequence[Site]) -> None:
        if not wanted:
            raise TrainError("sites: at least one is needed")
        self.sites = tuple(sorted(set(wanted), key=depth))
        self._model = model
        self._places: dict[Site, Located] = {}
        there = sites(model.config)
        for site in self.sites:
            if site not in there:
                points = ", ".join(sorted({one.point for one in there}))
                raise TrainError(
                    f"sites: {model.name} has no {site}; its layers are 0 to {model.config.num_hidden_layers - 1}, "
                    f"its points {points}"
                )
            self._places[site] = locate(model.network, model.config, site)

    def widths(self) -> dict[Site, int]:
        """Of the activations at each site."""
        rows = Rows(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), (1,))
        return {site: x.shape[-1] for site, x in self._read(rows).items()}

    def read(self, rows: Rows) -> dict[Site, Tensor]:
        """What is at each site on the tokens that are kept, [tokens, width], row after row, in the model's dtype.

        Raises:
            TrainError: activations that are not finite; names site, row and document.
        """
        found = self._read(rows)
        # One wait for the device, not one per site.
        is_fine = torch.stack([torch.isfinite(x).all() for x in found.values()])
        if not bool(is_fine.all()):
            site = tuple(found)[int(is_fine.int().argmin())]
            raise TrainError(_not_finite(site, found[site], rows))
        return found

    @torch.inference_mode()
    def _read(self, rows: Rows) -> dict[Site, Tensor]:
        device = self._model.device
        kept = rows.kept.flatten().nonzero().squeeze(1).to(device)
        found: dict[Site, Tensor] = {}
        with self._keeping(found, kept), suppress(_Complete):
            self._model.network(input_ids=rows.ids.to(device), use_cache=False)
        return {site: found[site] for site in self.sites}

    @contextmanager
    def _keeping(self, found: dict[Site, Tensor], kept: Tensor) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for site in self.sites:
                handles.append(self._attach(site, found, kept))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, site: Site, found: dict[Site, Tensor], kept: Tensor) -> RemovableHandle:
        place = self._places[site]

        def keep(value: Any) -> None:
            x = value if isinstance(value, Tensor) else value[0]
            # A copy of the rows, now: a later module may change the tensor itself.
            picked = x.flatten(0, 1)[kept]
            found[site] = picked if place.see is None else place.see(picked)
            if len(found) == len(self.sites):
                raise _Complete

        if place.side == "in":
            return place.module.register_forward_pre_hook(lambda _, args: keep(args))
        return place.module.register_forward_hook(lambda _, __, out: keep(out))


class _Complete(Exception):
    """Every site was seen: the rest of the forward pass would be for nothing."""


def _not_finite(site: Site, x: Tensor, rows: Rows) -> str:
    """Of the first token that is not finite."""
    index = int((~torch.isfinite(x).all(dim=1)).int().argmax())
    row, position = rows.kept.nonzero()[index].tolist()
    return (
        f"activations at {site} are not finite (NaN or infinite) on token {position} of row {rows.first + row}, which "
        f"begins in document {rows.documents[row]}; try model.dtype = 'float32', or leave the document out"
    )

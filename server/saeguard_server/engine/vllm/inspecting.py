"""What inspections see of a pass: features picked where the activations are, packed for their way to the server."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saeguard_sae.coders import Temporal, is_signed
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.picking import of_activations, of_features
from saeguard_server.engine.vllm.orders import Activations, OrderedPick


@dataclass(slots=True)
class Inspection:
    """One request's picks, and what they found so far."""

    picks: tuple[OrderedPick, ...]
    found: list[Activations] = field(default_factory=list)
    prefix: dict[int, Tensor] = field(default_factory=dict)
    """By SAE, all activations so far, where its features need them."""


class Pickers:
    """Picks features with the SAEs of a process, by their number."""

    def __init__(self, saes: Mapping[int, LoadedSae]) -> None:
        self._saes = saes
        self._pickers: dict[int, FeatureSelector] = {}

    def see(self, inspection: Inspection, pick: OrderedPick, start: int, x: Tensor) -> None:
        """x [T, width] at the pick's site, of the tokens from position ``start`` on."""
        coder = self._saes[pick.sae].dictionary
        if isinstance(coder, Temporal):
            # It reads a token together with everything before it, whatever part that came in.
            whole = torch.cat([inspection.prefix[pick.sae], x]) if pick.sae in inspection.prefix else x.clone()
            inspection.prefix[pick.sae] = whole
            picked = of_features(coder.encode(whole)[-len(x) :].float(), pick, signed=is_signed(coder))
        else:
            picked = of_activations(self._picker(pick.sae), x, pick)
        inspection.found.append(_pack(picked, pick.sae, start))

    def _picker(self, sae: int) -> FeatureSelector:
        if sae not in self._pickers:
            self._pickers[sae] = FeatureSelector(self._saes[sae].dictionary)
        return self._pickers[sae]


def _pack(picked: SelectedFeatures, sae: int, start: int) -> Activations:
    ends = picked.keep.sum(dim=-1).cumsum(dim=0).tolist()
    return Activations(
        sae,
        start,
        array("I", [0, *ends]).tobytes(),
        array("I", picked.features[picked.keep].tolist()).tobytes(),
        array("f", picked.values[picked.keep].tolist()).tobytes(),
    )

"""Which features fire on the tokens of one forward pass: encoded whole, picked on the device, sparse on the host."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard_sae.coder import is_signed
from saeguard_sae.loading import LoadedSae
from saeguard_sae.site import Site
from saeguard_sae.temporal import Temporal
from saeguard_server.engine.protocol import Pick


@dataclass(frozen=True, slots=True)
class Sparse:
    """Rows of a sparse matrix: row i holds ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: array[int]
    indices: array[int]
    values: array[float]


class Capture:
    """Collects what forward passes show of the picked SAEs, part after part of one input; called with each site's
    activations."""

    def __init__(self, picks: tuple[Pick, ...], saes: dict[str, LoadedSae]) -> None:
        self._picks, self._saes = picks, saes
        self._prefix: dict[str, Tensor] = {}
        self.found: dict[str, Sparse] = {}
        """By SAE, of the last part."""

    def __call__(self, site: Site, x: Tensor) -> None:
        """x [1, T, width] at ``site``, before its edits."""
        for pick in self._picks:
            sae = self._saes[pick.sae]
            if sae.site == site:
                self.found[pick.sae] = choose(self._encode(sae, x[0]).float(), pick, signed=is_signed(sae.dictionary))

    def _encode(self, sae: LoadedSae, x: Tensor) -> Tensor:
        if not isinstance(sae.dictionary, Temporal):
            return sae.dictionary.encode(x)
        # A temporal SAE reads a token together with everything before it, whatever part that came in.
        whole = torch.cat([self._prefix[sae.name], x]) if sae.name in self._prefix else x
        self._prefix[sae.name] = whole
        return sae.dictionary.encode(whole)[-len(x) :]


def choose(features: Tensor, pick: Pick, *, signed: bool = False) -> Sparse:
    """features [T, d_sae] -> the picked ones, largest first; in the order asked for when they were named.

    Features that can be negative (``signed``) are picked by magnitude.
    """
    if pick.features is not None:
        index = torch.tensor(pick.features, device=features.device).expand(features.shape[0], -1)
        return _pack(features.gather(1, index), index, torch.ones_like(index, dtype=torch.bool))
    size = features.abs() if signed else features
    if pick.top_k is not None:
        index = size.topk(min(pick.top_k, features.shape[1]), dim=-1).indices
        values = features.gather(1, index)
        return _pack(values, index, values != 0)
    assert pick.threshold is not None, "a pick names features, a number or a threshold"
    most = int((size > pick.threshold).sum(dim=-1).max())
    sizes, index = size.topk(most, dim=-1)
    return _pack(features.gather(1, index), index, sizes > pick.threshold)


def _pack(values: Tensor, index: Tensor, keep: Tensor) -> Sparse:
    """[T, n] candidates and which to keep -> rows of a sparse matrix."""
    ends = keep.sum(dim=-1).cumsum(dim=0).tolist()
    return Sparse(
        array("I", [0, *ends]),
        array("I", index[keep].tolist()),
        array("f", values[keep].tolist()),
    )

"""The units of an SAE's inputs and features, each got wrong: decoder norms and the scale of activations."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch
from torch import Tensor

from saeguard_sae.activations import JumpReLU
from saeguard_sae.check import stated
from saeguard_sae.check.changes import Change, of_variant
from saeguard_sae.check.measure import is_transcoder
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.loading import LoadedSae
from saeguard_sae.selections import is_selection

_ALIKE = 0.01
"""Factors all this near to 1 make no difference that could be seen."""


def decoder_norms(sae: LoadedSae, dictionary: Dictionary) -> Iterator[Change]:
    """Rows as the files have them: a scale that was folded into them is taken out again."""
    rows = torch.linalg.vector_norm(dictionary.W_dec, dim=1, dtype=torch.float32)
    rows = rows * stated.scale(sae)
    if bool(((rows - 1).abs() < _ALIKE).all()):
        return
    dtype = dictionary.W_dec.dtype
    norms = rows.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    competes = is_selection(dictionary.activation)
    # Features that do not compete only change by the factor, whether it comes before or after.
    side = "before" if competes else "after"
    yield Change("decoder norms", "its features are of unit decoder rows", None, of_variant(**{side: 1 / norms}))
    yield Change("decoder norms", "its features are to be multiplied by the norms of their decoder rows", None,
                 of_variant(**{side: norms}))  # fmt: skip
    if competes or isinstance(dictionary.activation, JumpReLU):
        compared = "ranked by" if competes else "compared with their thresholds as"
        yield Change("decoder norms", f"its features are {compared} value x norm of the decoder row",
                     _gating(sae, "saelens", "openmoss"), of_variant(before=norms, after=1 / norms))  # fmt: skip
        yield Change("decoder norms", f"its features are {compared} value / norm of the decoder row",
                     _gating(sae, "openmoss", "saelens"), of_variant(before=1 / norms, after=norms))  # fmt: skip


def _gating(sae: LoadedSae, own: str, other: str) -> str | None:
    return f'gating = "{other}"' if stated.gating(sae) == own else None


def scales(sae: LoadedSae, x: Tensor, target: Tensor | None) -> Iterator[Change]:
    """The mean norm that the SAE was trained on is sqrt(width) in most libraries; files often leave the factor out."""
    total, known = _factor(x), stated.scale(sae)
    ahead = total / known
    if not isfinite(ahead) or ahead <= 0 or abs(ahead - 1) < _ALIKE:
        return
    what = f"its activations are scaled by {total:.4g} (sqrt(d_in) / their mean norm here), not by {known:.4g}"
    setting = f"scale = {total:.4g}" if stated.asks_for_scale(sae) else None
    yield Change("scale", what, setting, of_variant(scale_in=ahead, scale_out=ahead))
    if target is not None and is_transcoder(sae):
        out = _factor(target)
        what = f"what it reads is scaled by {total:.4g}, what it writes by {out:.4g} (from their mean norms here)"
        yield Change("scale", what, None, of_variant(scale_in=ahead, scale_out=out / known))


def _factor(x: Tensor) -> float:
    return float(x.shape[-1] ** 0.5 / x.float().norm(dim=-1).mean())

"""How alike the directions of decoders are: within one (duplicates), and between two (agreement)."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

_ROWS = 2048
"""Of either side whose cosines are held at once."""
MATCHED = 8192
"""Features up to which the matching of two SAEs is exact: it needs all cosines at once, 512 MiB for so many."""
_CANDIDATES = 4
"""Nearest features that each feature of a sample brings into the matching."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far two dictionaries hold the same directions."""

    mcc: float
    """Mean cosine of features matched one to one so that it is largest (Hungarian method); the smaller SAE's all are
    matched, or a sample of them."""
    mean_max_cosine: float
    """Mean over the features of the first, or the sample, of the largest cosine in the second."""
    share_above_09: float
    """Share of the matched pairs with a cosine above 0.9."""
    matched: int
    """Pairs."""
    is_sample: bool
    """Whether only a random sample of the features was matched, among its nearest."""


@torch.no_grad()
def max_cosines(W_dec: Tensor, rows: Tensor | None = None) -> Tensor:
    """W_dec [d_sae, d_out] -> [n] each feature's largest cosine with another feature.

    Args:
        rows: [n] the features that are asked for; all where left out.
    """
    unit = _unit(W_dec)
    asked = torch.arange(len(unit), device=unit.device) if rows is None else rows.to(unit.device)
    return torch.cat([_best_other(unit, part) for part in torch.split(asked, _ROWS)])


@torch.no_grad()
def agreement(first: Tensor, second: Tensor, seed: int) -> Agreement:
    """Two decoders [d_sae, d_out] and [other d_sae, d_out] -> how far they hold the same directions."""
    assert first.shape[1] == second.shape[1], "checked by the caller"
    one, two = _unit(first), _unit(second)
    nearest = torch.cat([(part @ two.T).max(1).values for part in torch.split(one, _ROWS // 8)])
    if max(len(one), len(two)) <= MATCHED:
        pairs, is_sample = _matched(one, two), False
    else:
        small, large = (one, two) if len(one) <= len(two) else (two, one)
        pick = torch.randperm(len(small), generator=torch.Generator().manual_seed(seed))[: MATCHED // _CANDIDATES]
        pairs, is_sample = _matched_among_nearest(small[pick.to(small.device)], large), True
    return Agreement(
        mcc=float(pairs.mean()),
        mean_max_cosine=float(nearest.mean()),
        share_above_09=float((pairs > 0.9).double().mean()),
        matched=len(pairs),
        is_sample=is_sample,
    )


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().float()
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=1e-12)


def _best_other(unit: Tensor, rows: Tensor) -> Tensor:
    best = torch.full((len(rows),), -1.0, device=unit.device)
    for start in range(0, len(unit), _ROWS):
        cosines = unit[rows] @ unit[start : start + _ROWS].T
        own = rows - start
        is_here = (own >= 0) & (own < cosines.shape[1])
        cosines[is_here.nonzero().flatten(), own[is_here]] = -1.0
        best = torch.maximum(best, cosines.max(1).values)
    return best


def _matched(one: Tensor, two: Tensor) -> Tensor:
    """Cosines [min(n, m)] of the pairs of the best matching, float64."""
    # Here, as everything heavy: the command line asks every command to register before it knows which one runs.
    from scipy.optimize import linear_sum_assignment

    cosines = (one @ two.T).double().cpu()
    row, column = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[torch.from_numpy(row), torch.from_numpy(column)]


def _matched_among_nearest(sample: Tensor, large: Tensor) -> Tensor:
    """The same for a sample of the one, with only those of the other that are among some feature's nearest."""
    near = [(part @ large.T).topk(_CANDIDATES, dim=1).indices for part in torch.split(sample, _ROWS // 8)]
    is_near = torch.zeros(len(large), dtype=torch.bool, device=large.device)
    is_near[torch.cat(near).flatten()] = True
    return _matched(sample, large[is_near])

"""From sums to the figures of one dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from saeguard_sae.coder import SparseCoder
from saeguard_sae.loading import LoadedSae
from saeguard_sae.train.errors import TrainError
from saeguard_sae.train.quality.decoder import Agreement, agreement, max_cosines
from saeguard_sae.train.quality.evaluation import Figures, Losses
from saeguard_sae.train.quality.histogram import of_values, of_whole_numbers
from saeguard_sae.train.quality.loss import Loss
from saeguard_sae.train.quality.tally import Tally

DENSE = 0.1
"""A feature that fires on a larger share of the tokens is dense."""
DUPLICATE = 0.9
"""Features with a larger cosine are near to the same."""
_COSINE_FEATURES = 16_384
"""Features whose largest cosine is looked for; of wider dictionaries a random sample."""
_DENSITIES = torch.linspace(-7, 0, 29, dtype=torch.float64)
_COSINES = torch.linspace(-0.2, 1, 49, dtype=torch.float64)
_NOTHING = 1e-9
"""Nats: an ablation that costs less says nothing about what is recovered of it."""


def figures(coder: SparseCoder, tally: Tally, loss: Loss, losses: Losses, seed: int) -> Figures:
    """Everything about one dictionary."""
    density = tally.density
    cosines = max_cosines(coder.W_dec, _sample(coder.d_sae, seed)).double().cpu()
    spliced, kl = loss.cross_entropy, loss.divergence
    return Figures(
        l0=tally.l0,
        fvu=tally.fvu,
        cosine=tally.cosine,
        norm_ratio=tally.norm_ratio,
        ce_spliced=spliced,
        ce_increase=spliced - losses.ce_base,
        kl=kl,
        ce_recovered_mean=_recovered(spliced, losses.ce_base, losses.ce_mean_ablated),
        ce_recovered_zero=_recovered(spliced, losses.ce_base, losses.ce_zero_ablated),
        kl_recovered_mean=_recovered(kl, 0.0, losses.kl_mean_ablated),
        kl_recovered_zero=_recovered(kl, 0.0, losses.kl_zero_ablated),
        dead_share=tally.dead_share,
        dense_share=float((density > DENSE).double().mean()),
        max_cosine=float(cosines.mean()),
        duplicate_share=float((cosines > DUPLICATE).double().mean()),
        cosine_features=len(cosines),
        l0_histogram=of_whole_numbers(tally.by_l0.cpu()),
        density_histogram=of_values(density[density > 0].log10(), _DENSITIES),
        cosine_histogram=of_values(cosines, _COSINES),
    )


def check_width(sae: LoadedSae, other: LoadedSae) -> None:
    """Refuses an SAE whose directions lie in another space.

    Raises:
        TrainError: names both widths.
    """
    if other.dictionary.d_out != sae.dictionary.d_out:
        raise TrainError(
            f"other: SAE {other.name!r} writes {other.dictionary.d_out} wide, the first one {sae.dictionary.d_out}"
        )


def by_chance(width: int, first: int, second: int, seed: int) -> Agreement:
    """Of two dictionaries of random directions, with so many features of this width: what agreement starts from."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(n, width, generator=generator) for n in (first, second))
    return agreement(one, two, seed)


def _recovered(changed: float, base: float, ablated: float) -> float | None:
    """The share of what ablation costs that does not come back as the cost of the change."""
    return None if ablated - base < _NOTHING else (ablated - changed) / (ablated - base)


def _sample(d_sae: int, seed: int) -> Tensor | None:
    if d_sae <= _COSINE_FEATURES:
        return None
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:_COSINE_FEATURES]

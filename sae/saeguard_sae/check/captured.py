"""Activations of a sample of the text at every site that an SAE may belong to, from one pass over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check.hooks import ordinary, run, visiting
from saeguard_sae.site import Site

SAMPLE = 256
"""Ordinary tokens on which alternatives are tried: enough to tell factors apart, few enough to hold at many sites."""


class Captured:
    """Activations of a few texts at many sites: those of these widths."""

    def __init__(self, widths: set[int]) -> None:
        self._widths = widths
        self.ordinary: list[Tensor] = []
        self.at: dict[Site, list[Tensor]] = {}

    def visit(self, site: Site, x: Tensor, seen: Tensor) -> None:
        """Keeps what an SAE reads at the site."""
        if seen.shape[-1] in self._widths:
            self.at.setdefault(site, []).append(seen[0].clone())

    def width(self, site: Site) -> int | None:
        """Of the activations there; None where they were not kept."""
        return self.at[site][0].shape[-1] if site in self.at else None

    def rows(self, site: Site) -> Tensor:
        """[n, width] of the ordinary tokens."""
        return torch.cat([x[rows.to(x.device)] for x, rows in zip(self.at[site], self.ordinary, strict=True)])


def capture(
    model: nn.Module,
    config: ModelConfig,
    sites: set[Site],
    widths: set[int],
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
) -> Captured:
    """What is at these sites, where it has one of these widths."""
    captured = Captured(widths)
    with visiting(model, config, sites, captured.visit):
        for ids in _sample(tokens, special_ids):
            captured.ordinary.append(ordinary(ids, special_ids))
            run(model, ids)
    return captured


def _sample(tokens: Iterable[Tensor], special_ids: frozenset[int]) -> Iterator[Tensor]:
    """The first texts, the last one cut, with SAMPLE ordinary tokens in all."""
    left = SAMPLE
    for ids in tokens:
        reached = ordinary(ids, special_ids).cumsum(0)
        part = ids[: int((reached <= left).sum())]
        left -= int(ordinary(part, special_ids).sum())
        if len(part):
            yield part
        if left <= 0:
            return

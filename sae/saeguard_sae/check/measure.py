"""How an SAE does on the model that it is served with: what fires, what it leaves unexplained, what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check.hooks import ordinary, run, visiting
from saeguard_sae.check.tally import Reader, Tally, read
from saeguard_sae.check.variant import Variant
from saeguard_sae.coder import SparseCoder
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.loading import LoadedSae
from saeguard_sae.site import Site

_POSITIONS = 128
"""Whose log-probabilities are held at once: vocabularies go up to hundreds of thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Sums over ordinary tokens, which a text's first one is not.

    None stands for what an SAE that writes at several sites has no part in alone.
    """

    tokens: int
    l0: float
    """Features that are not 0 on a token, mean."""
    fvu: float | None
    """Share of the variance of what it must reproduce that it leaves unexplained."""
    ce_base: float | None
    """The model's cross-entropy, in nats per token."""
    ce_spliced: float | None
    """The same with reconstructions in place of the activations of ordinary tokens."""
    dead_share: float
    """Share of features that were 0 on every token."""

    @property
    def ce_increase(self) -> float | None:
        """By how much the model gets worse."""
        return None if self.ce_base is None or self.ce_spliced is None else self.ce_spliced - self.ce_base


def reader(coder: SparseCoder) -> Reader:
    """What is served, as it is measured."""
    return Variant(coder) if isinstance(coder, Dictionary) else coder


def is_transcoder(sae: LoadedSae) -> bool:
    """Whether it reproduces something else than what it reads."""
    return isinstance(sae.dictionary, Dictionary) and sae.dictionary.is_transcoder


def target(sae: LoadedSae) -> Site | None:
    """Whose activations it must reproduce; None for one that writes its part at several sites."""
    if len(sae.write_sites) > 1:
        return None
    if not is_transcoder(sae):
        return sae.site
    written = sae.write_sites[0]
    return written if sae.write_gain is None else Site(written.layer, "mlp_normalized")


@torch.inference_mode()
def measure(
    model: nn.Module, config: ModelConfig, sae: LoadedSae, tokens: Sequence[Tensor], special_ids: frozenset[int]
) -> Measured:
    """What the SAE does on these texts, each read on its own.

    Args:
        tokens: int64 ids [T] of each text.
        special_ids: tokens that SAEs do not read; they keep their activations and are not counted.

    Raises:
        ValueError: fewer than two ordinary tokens.
    """
    splice = _Splice(sae)
    base, spliced = _Loss(), _Loss()
    for ids in tokens if splice.target is not None else ():
        base.add(run(model, ids), ids)
    with visiting(model, config, splice.sites, splice.visit):
        for ids in tokens:
            splice.begin(ordinary(ids, special_ids))
            spliced.add(run(model, ids), ids)
    return splice.measured(base, spliced)


class _Splice:
    """Puts reconstructions in the place of activations, and measures both on the way."""

    def __init__(self, sae: LoadedSae) -> None:
        self.tally = Tally()
        self.target = target(sae)
        self._sae = sae
        self._reader = reader(sae.dictionary)
        self._writes = sae.write_sites[0] if self.target is not None else None
        self.sites = {site for site in (sae.site, self.target, self._writes) if site is not None}
        self._ordinary: Tensor | None = None
        self._reconstruction: Tensor | None = None
        self._wanted: Tensor | None = None

    def begin(self, ordinary: Tensor) -> None:
        """Before a text is read: which of its tokens are ordinary."""
        self._ordinary = ordinary
        self._reconstruction = self._wanted = None

    def measured(self, base: _Loss, spliced: _Loss) -> Measured:
        """Of all the texts that were read."""
        tally, alone = self.tally, self.target is not None
        if tally.tokens < 2:
            raise ValueError(
                f"the text has {tally.tokens} tokens to measure on, the first and special ones aside; give more"
            )
        return Measured(
            tokens=tally.tokens,
            l0=tally.l0,
            fvu=tally.fvu if alone else None,
            ce_base=base.mean if alone else None,
            ce_spliced=spliced.mean if alone else None,
            dead_share=tally.dead_share,
        )

    def visit(self, site: Site, x: Tensor, seen: Tensor) -> Tensor | None:
        """Reads where the SAE reads, compares with what it must reproduce, writes where it writes."""
        assert self._ordinary is not None, "begun"
        rows = self._ordinary.to(x.device)
        if site == self._sae.site:
            decodes = self.target is not None
            self._reconstruction = read(self._reader, seen[0], rows, self.tally, decodes=decodes)
        if site == self.target:
            self._wanted = seen[0, rows].float()
        return self._written(x, rows) if site == self._writes else None

    def _written(self, x: Tensor, rows: Tensor) -> Tensor:
        assert self._reconstruction is not None, "what is written was read before"
        assert self._wanted is not None, "and what it must reproduce is at the same place or before"
        self.tally.compare(self._reconstruction, self._wanted)
        new = self._reconstruction
        if self._writes != self.target:
            error = new - self._wanted
            gain = self._sae.write_gain
            new = x[0, rows].float() + (error if gain is None else error * gain.to(error))
        out = x.clone()
        out[0, rows] = new.to(x.dtype)
        return out


class _Loss:
    """The mean cross-entropy of next tokens."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._predicted = 0

    @property
    def mean(self) -> float:
        return self._nats / self._predicted

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """logits [T, vocabulary] and the ids [T] they were computed from."""
        following = ids[1:].to(logits.device)
        self._predicted += len(following)
        for part, wanted in zip(torch.split(logits[:-1], _POSITIONS), torch.split(following, _POSITIONS), strict=True):
            self._nats += float(functional.cross_entropy(part.float(), wanted, reduction="sum"))

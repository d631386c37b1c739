"""Which convention an SAE was most likely given wrongly: the others are tried on activations captured once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig
from saeguard_sae.check.bounds import Bounds
from saeguard_sae.check.captured import Captured, capture
from saeguard_sae.check.changes import Change, Setup
from saeguard_sae.check.conventions import conventions
from saeguard_sae.check.measure import reader, target
from saeguard_sae.check.relocations import relocations
from saeguard_sae.check.tally import Tally, read
from saeguard_sae.loading import LoadedSae

SHOWN = 5
"""Suspects that are named at most."""

# The settings refuse a moved value bias under a normalisation.
_EXCLUSIVE = ({"bias"}, {"normalisation"}, {"decoder norms"}, {"scale"}, {"normalisation", "processing"})
_BETTER = 2.0
"""An alternative outside the bounds counts if it leaves this many times less unexplained,"""
_USABLE = 0.9
"""and less than this: just below what the mean leaves."""
_CLEARLY = 1.2
"""Within the bounds, an alternative is a doubt if it leaves this many times less unexplained."""
NEIGHBOURS = 2
"""Sites that are tried of an SAE within its bounds: the layers before and after."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """An alternative that fits better than what the SAE was given."""

    what: str
    """In words: "it reads resid_post.3, not resid_post.4"."""
    setting: str | None
    """What to write into the SAE's settings, a line each; None where there is no setting for it."""
    l0: float
    fvu: float | None


@dataclass(frozen=True, slots=True)
class _Tried:
    change: Change
    l0: float
    fvu: float | None


@torch.inference_mode()
def suspects(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: Bounds,
) -> list[Suspect]:
    """Alternatives inside the bounds, then those that clearly leave less unexplained; best first.

    One change at a time, and pairs of two where no single one lies inside the bounds. The model runs once.
    """
    moves = relocations(sae, config)
    search, rest = _prepared(model, config, sae, tokens, special_ids, bounds, moves)
    return _named(search.through(moves, rest), bounds)


@torch.inference_mode()
def doubts(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: Bounds,
) -> list[Suspect]:
    """What bounds alone let pass: near alternatives that leave clearly less unexplained; best first.

    The neighbouring layers, the bias convention and the normalisation: few, since every SAE that is served is tried.
    """
    moves = relocations(sae, config)[:NEIGHBOURS]
    search, rest = _prepared(model, config, sae, tokens, special_ids, bounds, moves)
    near = [one for one in rest if one.kind in ("bias", "normalisation")]
    return _named(search.clearly_better([*moves, *near]), bounds)


def _prepared(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: Bounds,
    moves: list[Change],
) -> tuple[_Search, list[Change]]:
    """The search over activations at the sites of these moves, and every other change."""
    own = Setup(sae.site, target(sae), reader(sae.dictionary))
    wanted = {site for one in (own, *(move.apply(own) for move in moves)) for site in one[:2] if site is not None}
    captured = capture(model, config, wanted, {sae.dictionary.d_in, sae.write_width}, tokens, special_ids)
    target_rows = None if own.target is None else captured.rows(own.target)
    rest = conventions(sae, model, config, captured.rows(own.reads), target_rows)
    return _Search(own, captured, bounds), rest


def _named(found: list[_Tried], bounds: Bounds) -> list[Suspect]:
    found.sort(key=lambda one: (not bounds.admits(one.l0, one.fvu), merit(one.l0, one.fvu, bounds)))
    return [Suspect(one.change.what, one.change.setting, one.l0, one.fvu) for one in found[:SHOWN]]


def merit(l0: float, fvu: float | None, bounds: Bounds) -> float:
    """Less is better: the FVU, times how many times L0 is off where it is known what to expect.

    FVU alone would favour whatever makes more features fire.
    """
    left, expected = 1.0 if fvu is None else fvu, bounds.middle_l0
    if expected is None:
        return left
    return left * max(l0 / expected, expected / l0) if l0 else inf


def _pairs(moves: list[Change], rest: list[Change]) -> Iterator[Change]:
    """Two conventions of different kinds, or another site with the other bias convention."""
    for at, one in enumerate(rest):
        yield from (one.then(other) for other in rest[at + 1 :] if {one.kind, other.kind} not in _EXCLUSIVE)
    for bias in rest:
        if bias.kind == "bias":
            yield from (move.then(bias) for move in moves)


class _Search:
    """Tries changes of one SAE and keeps those that count."""

    def __init__(self, own: Setup, captured: Captured, bounds: Bounds) -> None:
        self._own = own
        self._captured = captured
        self._bounds = bounds
        l0, self._best = self._measure(own)
        self._fails = not bounds.admits(l0, self._best)

    def through(self, moves: list[Change], rest: list[Change]) -> list[_Tried]:
        """The changes that count; of pairs too where no single one lies inside the bounds."""
        found = self._among([*moves, *rest])
        if any(self._bounds.admits(one.l0, one.fvu) for one in found):
            return found
        # A second change must be worth it beside the best of the first.
        self._best = min((one.fvu for one in found if one.fvu is not None), default=self._best)
        return found + self._among(_pairs(moves, rest))

    def clearly_better(self, changes: list[Change]) -> list[_Tried]:
        """Those that leave less unexplained by more than the text's chance."""
        now = self._best
        if now is None or not isfinite(now):
            return []
        return [one for one in self._tried(changes) if one.fvu is not None and one.fvu * _CLEARLY <= min(now, _USABLE)]

    def _among(self, changes: Iterable[Change]) -> list[_Tried]:
        """Those of the changes that count."""
        return [one for one in self._tried(changes) if self._counts(one)]

    def _tried(self, changes: Iterable[Change]) -> list[_Tried]:
        tried = []
        for change in changes:
            setup = change.apply(self._own)
            if self._is_as_wide(setup):
                tried.append(_Tried(change, *self._measure(setup)))
        return tried

    def _is_as_wide(self, setup: Setup) -> bool:
        """As where it is now: that the SAE fits there was seen before."""
        same = self._captured.width(setup.reads) == self._captured.width(self._own.reads)
        if setup.target is None or self._own.target is None:
            return same
        return same and self._captured.width(setup.target) == self._captured.width(self._own.target)

    def _measure(self, setup: Setup) -> tuple[float, float | None]:
        tally, at = Tally(), self._captured.at
        targets = at[setup.target] if setup.target is not None else [None] * len(self._captured.ordinary)
        for x, wanted, rows in zip(at[setup.reads], targets, self._captured.ordinary, strict=True):
            rows = rows.to(x.device)
            made = read(setup.reader, x, rows, tally, decodes=wanted is not None)
            if made is not None and wanted is not None:
                tally.compare(made, wanted[rows].float())
        return tally.l0, None if setup.target is None else tally.fvu

    def _counts(self, one: _Tried) -> bool:
        if self._fails and self._bounds.admits(one.l0, one.fvu) and self._is_usable(one):
            return True
        if one.fvu is None or self._best is None or not one.fvu < _USABLE:
            return False
        return not isfinite(self._best) or one.fvu * _BETTER <= self._best

    def _is_usable(self, one: _Tried) -> bool:
        return one.fvu is None or self._bounds.max_fvu is not None or one.fvu < _USABLE

"""The edit tables of an engine: one per site that an SAE writes, whatever runs the model.

An engine tells it whose tokens a forward pass reads (``begin``), hands it the activations of every site in the order
of the pass (``edit``), and asks afterwards whether every site was reached (``check``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saeguard.results import InterventionReceipt, Receipt, StoppedBy, TriggerReceipt
from saeguard_sae.conditions import CompiledCondition, ConditionCounts, ConditionMemory, ConditionTable
from saeguard_sae.edit_table import EditColumn, EditCounts, EditTable, Tally
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures, above_of, named_of, top_of
from saeguard_sae.feature_sums import WeightedFeature
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site, depth
from saeguard_sae.rows import Rows
from saeguard_server.engine.protocol import ResolvedEdit, ResolvedGuard, Steering
from saeguard_server.errors import InternalFailure

_REMEMBERED = 2048
"""Guards that are kept as the table takes them."""


@dataclass(frozen=True, slots=True, eq=False)
class Tallies:
    """What a request's edits and guards counted and remember so far, on the device."""

    edits: dict[Site, dict[Hashable, Tally]] = field(default_factory=dict)
    guards: ConditionMemory = field(default_factory=dict)


class SteeringTables:
    """Edits and readings of up to ``slots`` requests at the sites of ``saes``.

    A site is read before its own edits, and by those who write elsewhere (transcoders) after them: what the model
    itself goes on with.
    """

    def __init__(self, saes: Mapping[str, LoadedSae], slots: int, device: torch.device) -> None:
        self.rows = Rows()
        self.watch: Callable[[Site, Tensor], None] | None = None
        """Called as ``watch(site, x)`` with the activations [N, width] before the edits, while it is set."""
        self._saes = saes
        widths = {site: sae.write_width for sae in saes.values() for site in sae.write_sites}
        self._tables = {site: EditTable(slots, width, device) for site, width in widths.items()}
        self._guards = ConditionTable(slots, device)
        self._made: dict[int, tuple[ResolvedGuard, CompiledCondition]] = {}
        self._read_by = _readers(saes)
        self._sources: dict[Site, Tensor] = {}
        self.sites = frozenset({sae.site for sae in saes.values()} | self._tables.keys())
        """Where an engine must call ``edit``."""
        self._passes: dict[Site, int] = dict.fromkeys(self.sites, 0)

    def write(self, slot: int, steering: Steering, watch: Iterable[tuple[str, int]] = ()) -> None:
        """Gives a free slot its request's guards, edits and watched features."""
        guards = self._guards.write(slot, [self._guard(one) for one in steering.guards])
        columns: dict[Site, list[EditColumn]] = defaultdict(list)
        for one in steering.edits:
            sae = self._saes[one.sae]
            for block, site in enumerate(sae.write_sites):
                columns[site].append(
                    EditColumn(
                        sae.dictionary, one.feature, one.affine, one.first, one.last, one.special,
                        source=_source(sae, site), block=block, write_gain=sae.write_gain,
                        condition=None if one.gate is None else guards[one.gate],
                        is_shadow=one.is_shadow, is_limited=one.is_limited,
                    )
                )  # fmt: skip
        for name, feature in watch:
            sae, site = self._saes[name], self._saes[name].write_sites[0]
            columns[site].append(EditColumn(sae.dictionary, feature, source=_source(sae, site)))
        for site, found in columns.items():
            self._tables[site].write(slot, found, steering.max_relative_edit)

    def clear(self, slot: int) -> None:
        """Frees a slot."""
        self._guards.clear(slot)
        for table in self._tables.values():
            table.clear(slot)

    def begin(self, rows: Rows) -> None:
        """Before a forward pass: whose tokens it will read."""
        self.rows = rows
        self._passes = dict.fromkeys(self._passes, 0)
        self._sources.clear()
        self._guards.begin(rows)

    def edit(self, site: Site, x: Tensor, see: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x [N, width] as the model made it -> as it goes on with it; x itself where nobody edits.

        Args:
            see: what SAEs at the site read of x, where that is not x itself.
        """
        self._passes[site] += 1
        if self.watch is not None:
            self.watch(site, x if see is None else see(x))
        table, edited = self._tables.get(site), x
        if table is not None:
            self._guards.decide(site, x, self.rows, self._sources)
            edited = table.apply(x, self.rows, self._sources, self._guards.on)
        if any(self._is_read(site, target) for target in self._read_by.get(site, ())):
            self._sources[site] = edited if see is None else see(edited)
        return edited

    def missed(self) -> tuple[Site, ...]:
        """After a forward pass: the sites that it did not reach exactly once."""
        return tuple(site for site in self._tables if self._passes[site] != 1)

    def check(self, slot: int) -> None:
        """After a forward pass: whether every site with edits of this slot was reached exactly once.

        Raises:
            InternalFailure: its answer would have been unsteered.
        """
        for site in self.missed():
            if self._tables[site].holds(slot) or self._guards.reads_at(site, slot):
                raise InternalFailure(f"the model passed {site} {self._passes[site]} times in one step, not once")

    def counts(self, slot: int, steering: Steering) -> list[EditCounts]:
        """What each edit did so far, in the order of the request; at its first site where it writes at several."""
        found = {site: iter(table.counts(slot)) for site, table in self._tables.items()}
        every = [[next(found[site]) for site in self._saes[one.sae].write_sites] for one in steering.edits]
        return [first for first, *_ in every]

    def seen(self, slot: int) -> list[ConditionCounts]:
        """What each guard saw so far, in the order of the request."""
        return self._guards.counts(slot)

    def stopped(self, slots: tuple[int, ...]) -> Tensor | None:
        """bool [B], for which of these slots a guard has come on that stops; None where none of them has one."""
        return self._guards.stopped(slots) if self._guards.can_stop(slots) else None

    def tally(self, slot: int) -> Tallies:
        """What the slot's edits counted and its guards remember, to ``resume`` from in a slot with the same ones."""
        return Tallies({site: table.tally(slot) for site, table in self._tables.items()}, self._guards.tally(slot))

    def resume(self, slot: int, tallies: Tallies) -> None:
        """Goes on from there."""
        self._guards.resume(slot, tallies.guards)
        for site, tally in tallies.edits.items():
            self._tables[site].resume(slot, tally)

    def readings(self, steering: Steering, watch: tuple[tuple[str, int], ...], slot: int) -> Tensor:
        """[T, len(watch)] the watched features of a request on its T tokens of the last forward pass."""
        at = dict.fromkeys(self._tables, 0)
        for one in steering.edits:
            for site in self._saes[one.sae].write_sites:
                at[site] += 1
        columns = []
        for name, _ in watch:
            site = self._saes[name].write_sites[0]
            columns.append(self._tables[site].values(slot, at[site]))
            at[site] += 1
        return torch.stack(columns, dim=-1)

    def _is_read(self, site: Site, target: Site) -> bool:
        """Whether what the model goes on with after a site is read at a later one."""
        return self._tables[target].reads(site, self.rows) or self._guards.reads(target, site, self.rows)

    def _guard(self, one: ResolvedGuard) -> CompiledCondition:
        """A guard as the table takes it; a policy's come with every request."""
        if id(one) not in self._made or self._made[id(one)][0] is not one:
            if len(self._made) >= _REMEMBERED:
                self._made.clear()
            self._made[id(one)] = one, self._make(one)
        return self._made[id(one)][1]

    def _make(self, one: ResolvedGuard) -> CompiledCondition:
        terms: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for name, feature, weight in one.probe.terms:
            terms[name].append((feature, weight))
        saes = sorted((self._saes[name] for name in terms), key=lambda sae: depth(sae.write_sites[0]))
        return CompiledCondition(
            summands=tuple(_summand(sae, terms[sae.name]) for sae in saes),
            bias=one.probe.bias,
            comparison=one.comparison,
            threshold=one.threshold,
            release=one.release,
            window=one.window.kind,
            tokens=one.window.tokens,
            k=one.window.k,
            first=one.first,
            last=one.last,
            special=one.special,
            latches=one.latches,
            stops=one.stops,
        )


def _summand(sae: LoadedSae, terms: list[tuple[int, float]]) -> WeightedFeature:
    """A probe's part in one SAE, read where its first write is."""
    site = sae.write_sites[0]
    features, weights = zip(*terms, strict=True)
    return WeightedFeature(site, _source(sae, site), sae.dictionary, features, weights)


def _source(sae: LoadedSae, site: Site) -> Site | None:
    """What an SAE's columns at a site read: that site itself, or another."""
    return None if sae.site == site else sae.site


def _readers(saes: Mapping[str, LoadedSae]) -> dict[Site, set[Site]]:
    """By site that is read, the other sites at which that has an effect."""
    found: dict[Site, set[Site]] = defaultdict(set)
    for sae in saes.values():
        found[sae.site].update(site for site in sae.write_sites if site != sae.site)
    return found


# The receipt of a steered reply, checked against what the request asked for before anybody sees it.


def build_receipt(
    steering: Steering,
    counts: Sequence[EditCounts],
    *,
    read: Sequence[int],
    forward_passes: int,
    saes: Mapping[str, LoadedSae],
    special_ids: frozenset[int],
    model_digest: str,
    seen: Sequence[ConditionCounts] = (),
) -> Receipt | None:
    """The receipt of a request that had edits or triggers; None for others.

    Args:
        counts: what each edit did, in the order of the steering.
        read: the tokens that the model read for this request, prompt first.
        seen: what each guard saw, in the order of the steering.

    Raises:
        InternalFailure: an edit or guard was not offered every token in its scope exactly once.
    """
    if not steering.edits and not steering.guards:
        return None
    _check(steering, counts, seen, read, special_ids)
    triggers = tuple(_trigger(*pair) for pair in zip(steering.guards, seen, strict=True) if pair[0].is_trigger)
    if not steering.edits and not triggers:
        return None
    pairs = zip(steering.edits, counts, strict=True)
    return Receipt(
        model_digest=model_digest,
        steering_digest=steering.digest,
        interventions=tuple(_one(edit, count, saes[edit.sae]) for edit, count in pairs),
        forward_passes=forward_passes,
        triggers=triggers,
    )


def stopped_by(steering: Steering, seen: Sequence[ConditionCounts]) -> StoppedBy:
    """The trigger that ended a generation: the first to be on, and of those the first of the request."""
    fired = [
        (one.first, guard.origin)
        for guard, one in zip(steering.guards, seen, strict=True)
        if guard.stops and one.first is not None
    ]
    _, origin = min(fired, key=lambda pair: pair[0])
    return StoppedBy(origin.policy, origin.rule)


def _check(
    steering: Steering,
    counts: Sequence[EditCounts],
    seen: Sequence[ConditionCounts],
    read: Sequence[int],
    special_ids: frozenset[int],
) -> None:
    special_at = [position for position, token in enumerate(read) if token in special_ids]
    for edit, count in zip(steering.edits, counts, strict=True):
        wanted = _in_scope(edit, len(read), special_at)
        if count.eligible != wanted:
            raise InternalFailure(
                f"{edit.kind} of feature {edit.feature} of {edit.sae!r} was applied to {count.eligible} tokens "
                f"instead of {wanted}"
            )
    for guard, one in zip(steering.guards, seen, strict=True):
        wanted = _in_scope(guard, len(read), special_at)
        if one.evaluated != wanted:
            name = f"trigger {guard.origin.rule!r}" if guard.is_trigger else "a condition"
            raise InternalFailure(f"{name} was decided on {one.evaluated} tokens instead of {wanted}")


def _in_scope(one: ResolvedEdit | ResolvedGuard, length: int, special_at: list[int]) -> int:
    first, last = min(one.first, length), min(one.last, length)
    skipped = 0 if one.special else bisect_left(special_at, last) - bisect_left(special_at, first)
    return last - first - skipped


def _trigger(guard: ResolvedGuard, seen: ConditionCounts) -> TriggerReceipt:
    return TriggerReceipt(
        policy=guard.origin.policy,
        name=guard.origin.rule,
        is_shadow=guard.is_shadow,
        tokens_evaluated=seen.evaluated,
        tokens_on=seen.on,
        first_position=seen.first,
        maximum=seen.maximum,
    )


def _one(edit: ResolvedEdit, count: EditCounts, sae: LoadedSae) -> InterventionReceipt:
    return InterventionReceipt(
        sae=edit.sae,
        feature=edit.feature,
        kind=edit.kind,
        sae_digest=sae.digest,
        site=str(sae.write_sites[0]),
        tokens_eligible=count.eligible,
        tokens_edited=count.edited,
        mean_activation=count.mean_activation,
        max_activation=count.max_activation,
        mean_relative_edit=count.mean_relative_edit,
        tokens_capped=count.capped,
        policy=edit.origin.policy,
        rule=edit.origin.rule,
        is_shadow=edit.is_shadow,
    )


# What an inspection keeps of activations: the largest, those above a threshold, or named ones; for every engine.


class SelectionSpec(Protocol):
    """Exactly one of the three is set, as in ``protocol.Pick``."""

    @property
    def top_k(self) -> int | None: ...

    @property
    def threshold(self) -> float | None: ...

    @property
    def features(self) -> tuple[int, ...] | None: ...


def select_activations(picker: FeatureSelector, x: Tensor, wanted: SelectionSpec) -> SelectedFeatures:
    """x [N, d_in] -> what is wanted of its features."""
    if wanted.features is not None:
        return picker.named(x, wanted.features)
    if wanted.top_k is not None:
        return picker.top(x, wanted.top_k)
    assert wanted.threshold is not None, "a pick names features, a number or a threshold"
    return picker.above(x, wanted.threshold)


def select_features(features: Tensor, wanted: SelectionSpec, *, signed: bool) -> SelectedFeatures:
    """features [N, d_sae] -> what is wanted of them; by magnitude where they can be negative (``signed``)."""
    if wanted.features is not None:
        return named_of(features, wanted.features)
    if wanted.top_k is not None:
        return top_of(features, wanted.top_k, signed=signed)
    assert wanted.threshold is not None, "a pick names features, a number or a threshold"
    return above_of(features, wanted.threshold, signed=signed)

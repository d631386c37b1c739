"""The edit tables in the model: one per site that an SAE reads, applied by a hook on the site's module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saeguard_sae.architectures import Located, ModelConfig, depth, locate
from saeguard_sae.loading import LoadedSae
from saeguard_sae.site import Site
from saeguard_sae.table import Column, Counts, EditTable
from saeguard_server.engine.protocol import Steering
from saeguard_server.errors import InternalFailure


@dataclass(slots=True)
class Rows:
    """Whose tokens the forward pass reads: B consecutive slots, with positions and special flags [B, T]."""

    slots: slice = field(default_factory=lambda: slice(0, 0))
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    special: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))


class SteeringHooks:
    """Edits and reads the model's activations at the sites of ``saes`` while it runs.

    A site is read before its own edits, and by those who write elsewhere (transcoders) after them: what the model
    itself goes on with.
    """

    def __init__(
        self, model: nn.Module, config: ModelConfig, saes: Mapping[str, LoadedSae], slots: int, device: torch.device
    ) -> None:
        self.rows = Rows()
        self.watch: Callable[[Site, Tensor], None] | None = None
        """Called as ``watch(site, x)`` with the activations [B, T, width] before the edits, while it is set."""
        self._saes = saes
        widths = {site: sae.write_width for sae in saes.values() for site in sae.write_sites}
        self._tables = {site: EditTable(slots, width, device) for site, width in widths.items()}
        self._read_by = _readers(saes)
        self._sources: dict[Site, Tensor] = {}
        sites = {sae.site for sae in saes.values()} | self._tables.keys()
        self._passes: dict[Site, int] = dict.fromkeys(sites, 0)
        # Sites may share a module: those that change what later ones see come first.
        self._handles = [self._attach(model, config, site) for site in sorted(sites, key=depth)]

    def close(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def write(self, slot: int, steering: Steering, watch: Iterable[tuple[str, int]] = ()) -> None:
        """Gives a free slot its request's edits and watched features."""
        columns: dict[Site, list[Column]] = defaultdict(list)
        for one in steering.edits:
            sae = self._saes[one.sae]
            for block, site in enumerate(sae.write_sites):
                columns[site].append(
                    Column(
                        sae.dictionary, one.feature, one.affine, one.first, one.last, one.special,
                        source=_source(sae, site), block=block, write_gain=sae.write_gain,
                    )
                )  # fmt: skip
        for name, feature in watch:
            sae, site = self._saes[name], self._saes[name].write_sites[0]
            columns[site].append(Column(sae.dictionary, feature, source=_source(sae, site)))
        for site, found in columns.items():
            self._tables[site].write(slot, found, steering.max_relative_edit)

    def clear(self, slot: int) -> None:
        """Frees a slot."""
        for table in self._tables.values():
            table.clear(slot)

    def move(self, source: int, target: int) -> None:
        """Moves a request's edits to a free slot."""
        for table in self._tables.values():
            table.move(source, target)

    def begin(self, rows: Rows) -> None:
        """Before a forward pass: whose tokens it will read."""
        self.rows = rows
        self._passes = dict.fromkeys(self._passes, 0)
        self._sources.clear()

    def check(self) -> None:
        """After a forward pass: every site with live columns was reached exactly once.

        Raises:
            InternalFailure: an answer would have been unsteered.
        """
        for site, table in self._tables.items():
            if table.is_live(self.rows.slots) and self._passes[site] != 1:
                raise InternalFailure(f"the model passed {site} {self._passes[site]} times in one step, not once")

    def counts(self, slot: int, steering: Steering) -> list[Counts]:
        """What each edit did so far, in the order of the request; at its first site where it writes at several."""
        found = {site: iter(table.counts(slot)) for site, table in self._tables.items()}
        every = [[next(found[site]) for site in self._saes[one.sae].write_sites] for one in steering.edits]
        return [first for first, *_ in every]

    def readings(self, steering: Steering, watch: tuple[tuple[str, int], ...], slot: int, row: int) -> Tensor:
        """[T, len(watch)] the watched features of a request on the tokens of its row of the last forward pass."""
        at = dict.fromkeys(self._tables, 0)
        for one in steering.edits:
            for site in self._saes[one.sae].write_sites:
                at[site] += 1
        columns = []
        for name, _ in watch:
            site = self._saes[name].write_sites[0]
            columns.append(self._tables[site].values(slot, row, at[site]))
            at[site] += 1
        return torch.stack(columns, dim=-1)

    def _attach(self, model: nn.Module, config: ModelConfig, site: Site) -> RemovableHandle:
        found = locate(model, config, site)
        if found.side == "in":
            return found.module.register_forward_pre_hook(lambda _, args: self._replace(site, found, args))
        return found.module.register_forward_hook(lambda _, __, out: self._replace(site, found, out))

    def _replace(self, site: Site, where: Located, value: Any) -> Any:
        """The first tensor of a module's arguments or output, edited; the rest as it was."""
        is_alone = isinstance(value, Tensor)
        x = value if is_alone else value[0]
        self._passes[site] += 1
        if self.watch is not None:
            self.watch(site, x if where.see is None else where.see(x))
        edited = self._edit(site, x)
        if any(self._tables[target].reads(site, self.rows.slots) for target in self._read_by.get(site, ())):
            self._sources[site] = edited if where.see is None else where.see(edited)
        if where.shared and edited is not x:
            # The block adds this very tensor to the MLP's output: a new one would steer the MLP alone.
            x.copy_(edited)
            return value
        return edited if is_alone else (edited, *value[1:])

    def _edit(self, site: Site, x: Tensor) -> Tensor:
        if site not in self._tables:
            return x
        rows = self.rows
        return self._tables[site].apply(x, rows.slots, rows.positions, rows.special, self._sources)


def _source(sae: LoadedSae, site: Site) -> Site | None:
    """What an SAE's columns at a site read: that site itself, or another."""
    return None if sae.site == site else sae.site


def _readers(saes: Mapping[str, LoadedSae]) -> dict[Site, set[Site]]:
    """By site that is read, the other sites at which that has an effect."""
    found: dict[Site, set[Site]] = defaultdict(set)
    for sae in saes.values():
        found[sae.site].update(site for site in sae.write_sites if site != sae.site)
    return found


def measure_widths(
    model: nn.Module, config: ModelConfig, sites: Iterable[Site], device: torch.device
) -> dict[Site, int]:
    """How wide the activations at these sites are, found by reading one token."""
    found: dict[Site, int] = {}
    handles = []
    for site in sites:

        def see(_: nn.Module, args: Any, out: Any = None, site: Site = site) -> None:
            value = args if out is None else out
            found[site] = (value if isinstance(value, Tensor) else value[0]).shape[-1]

        where = locate(model, config, site)
        register = where.module.register_forward_pre_hook if where.side == "in" else where.module.register_forward_hook
        handles.append(register(see))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found

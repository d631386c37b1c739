"""The model as the engine runs it: attention over blocks, packed weights, edits at its sites, compiled where asked.

Made once; when the engine starts again it is given new memory and tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from saeguard_sae.models import Located, Site, depth, locate
from saeguard_server.engine.stock.model import LoadedModel
from saeguard_server.engine.tables import SteeringTables
from saeguard_server.engine.transformers import ops, packing
from saeguard_server.engine.transformers.attention import Kernel, PagedAttention, attend_fused, attend_one
from saeguard_server.engine.transformers.batch import Pass

Compile: TypeAlias = Literal["none", "attention", "all"]
_LEAST = 2
"""Rows that a compiled pass keeps at least: one row would be a graph of its own."""


class Network:
    """A loaded model with hooks at ``sites``.

    Args:
        compiled: "attention" compiles what generating requests attend with, "all" the whole model too.
        packed: whether linear layers are packed, where that is possible.
    """

    def __init__(
        self, model: LoadedModel, sites: frozenset[Site], *, compiled: Compile = "none", packed: bool = True
    ) -> None:
        self.attention: PagedAttention
        self.tables: SteeringTables
        self._network, self.device = model.network, model.device
        self._handle = ops.register(self)
        self._compiled = compiled
        self.kernel: Kernel = attend_one
        if compiled != "none":
            self.kernel = torch.compile(attend_fused, dynamic=True, fullgraph=True)
        if packed and can_pack(model):
            packing.pack(model.network)
        self._take_over_attention()
        # Sites may share a module: those that change what later ones see come first.
        self._places: list[tuple[Site, Located]] = []
        self._handles = [self._attach(site) for site in sorted(sites, key=depth)]
        self._run: Callable[[Tensor, Tensor, Tensor], Tensor] = self._plain
        if compiled == "all":
            self._run = torch.compile(self._plain, dynamic=True, fullgraph=True)

    def attach(self, attention: PagedAttention, tables: SteeringTables) -> None:
        """The memory and tables of the passes to come."""
        self.attention, self.tables = attention, tables

    def detach(self) -> None:
        """Lets go of them."""
        del self.attention, self.tables

    def close(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def forward(self, one: Pass) -> Tensor:
        """The logits [M, vocabulary] that the pass keeps, in float32."""
        self.tables.begin(one.rows)
        self.attention.begin(one.write, one.readings)
        keep = one.keep
        if self._compiled == "all" and len(keep) < _LEAST:
            keep = torch.cat([keep, keep.new_zeros(_LEAST - len(keep))])
        return self._run(one.ids, one.positions, keep)[: len(one.keep)]

    def edit(self, x: Tensor, place: int) -> Tensor:
        """x [1, N, width] at a hooked place, edited; x itself where nobody edits."""
        site, found = self._places[place]
        flat = x[0]
        edited = self.tables.edit(site, flat, found.see)
        return x if edited is flat else edited[None]

    def _plain(self, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        found = self._network(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: Tensor = found.logits[0].float()
        return logits

    def _take_over_attention(self) -> None:
        name = f"saeguard_{self._handle}"
        AttentionInterface.register(name, self._attend)
        self._network.set_attn_implementation(name)

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """In the form that Hugging Face calls; see ``PagedAttention.attend``."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window, cap = sliding_window or 0, softcap or 0.0
        if torch.compiler.is_compiling():
            return ops.attend(query, key, value, self._handle, layer, scale, window, cap), None
        return self.attention.attend(query, key, value, layer, scale, window, cap), None

    def _attach(self, site: Site) -> RemovableHandle:
        found = locate(self._network, self._network.config, site)
        place = len(self._places)
        self._places.append((site, found))
        if found.side == "in":
            return found.module.register_forward_pre_hook(lambda _, args: self._replace(place, found.shared, args))
        return found.module.register_forward_hook(lambda _, __, out: self._replace(place, found.shared, out))

    def _replace(self, place: int, shared: bool, value: Any) -> Any:
        """The first tensor of a module's arguments or output, edited; the rest as it was."""
        is_alone = isinstance(value, Tensor)
        x = value if is_alone else value[0]
        edited = ops.edit(x, self._handle, place) if torch.compiler.is_compiling() else self.edit(x, place)
        if shared and edited is not x:
            # The block adds this very tensor to the MLP's output: a new one would steer the MLP alone.
            x.copy_(edited)
            return value
        return edited if is_alone else (edited, *value[1:])


def can_pack(model: LoadedModel) -> bool:
    """Whether this model's linear layers can be packed."""
    return packing.can_pack(model.device, model.network.dtype)

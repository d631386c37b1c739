"""Runs the model: one forward pass of whatever the batch is. Holds no queues.

Everything here runs in inference mode, which the engine's thread enters once.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from saeguard_sae.coders import Temporal, is_signed
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Located, ModelLoadError, Site, depth, free_bytes, hook, locate
from saeguard_sae.rows import Group, Rows, RowSpan
from saeguard_server.engine.load import LoadedModel
from saeguard_server.engine.protocol import InspectTask, Pick
from saeguard_server.engine.tables import SteeringTables, Tallies, select_activations, select_features
from saeguard_server.engine.transformers import attention as ops
from saeguard_server.engine.transformers.attention import (
    Kernel,
    KvShape,
    PagedAttention,
    Reading,
    attend_fused,
    attend_one,
)
from saeguard_server.engine.transformers.sampler import SampledTokens, Sampler
from saeguard_server.engine.transformers.scheduler import PromptPart
from saeguard_server.engine.transformers.sequence import BLOCK, Sequence, blocks_for

# One forward pass on the device: which tokens it reads, where their KV goes, what each request sees.


Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """N tokens of a forward pass: first one of each generating request, then parts of prompts."""

    ids: Tensor
    """int64 [1, N]"""
    positions: Tensor
    """int64 [1, N], each in its request."""
    write: Tensor
    """int64 [N], the place in KV memory that keeps each."""
    spans: tuple[RowSpan, ...]
    """Of the parts, in their order."""
    rows: Rows
    readings: tuple[Reading, ...]
    keep: Tensor
    """int64 [M], the tokens whose logits are wanted: one of each request that chooses its next token, then those whose
    prompt is scored."""


class SlotState:
    """Per slot, on the host: the last token, how far the model has read, and the blocks that hold its KV.

    Args:
        is_special: bool [vocabulary] on the device.
    """

    def __init__(self, slots: int, context: int, is_special: Tensor) -> None:
        self._last = np.zeros(slots, np.int64)
        self._computed = np.zeros(slots, np.int64)
        self._blocks = np.zeros((slots, blocks_for(context) + 1), np.int64)
        self._is_special, self._device = is_special, is_special.device
        self._inside = np.arange(BLOCK, dtype=np.int64)

    def take(self, slot: int, computed: int, blocks: Many[int]) -> None:
        """A request sits down of which ``computed`` tokens are read."""
        self._computed[slot], self._blocks[slot] = computed, 0
        self.place(slot, blocks)

    def place(self, slot: int, blocks: Many[int]) -> None:
        """Its blocks."""
        self._blocks[slot, : len(blocks)] = blocks

    def choose(self, slots: Many[int], tokens: Many[int]) -> None:
        """What the generating requests read next."""
        self._last[list(slots)] = tokens

    def build(
        self,
        running: tuple[int, ...],
        parts: Many[PromptPart],
        ending: Many[PromptPart],
        scored: Many[PromptPart],
    ) -> ForwardPass:
        """The pass that reads the last token of the running slots and these parts.

        Args:
            ending: those of the parts after which a request chooses its first token.
            scored: those of which every logit is wanted.
        """
        order = np.array(running, np.int64)
        spans, start = [], len(running)
        for part in parts:
            spans.append(RowSpan(part.sequence.slot, start, part.end - part.start))
            start += part.end - part.start
        owner = np.concatenate([order, *(np.full(one.length, one.slot) for one in spans)])
        ids = np.concatenate([self._last[order], *(one.sequence.tokens[one.start : one.end] for one in parts)])
        at = np.concatenate([self._computed[order], *(np.arange(one.start, one.end) for one in parts)])
        write = self._blocks[owner, at // BLOCK] * BLOCK + at % BLOCK
        keep = _kept(len(running), list(zip(parts, spans, strict=True)), ending, scored)
        self._computed[order] += 1
        for part in parts:
            self._computed[part.sequence.slot] = part.end
        return self._on_device(running, spans, (ids, at, write, keep))

    def _on_device(self, running: tuple[int, ...], spans: list[RowSpan], host: tuple[Numbers, ...]) -> ForwardPass:
        ids, at, write, keep = (torch.from_numpy(one.astype(np.int64)).to(self._device) for one in host)
        special = self._is_special[ids]
        groups = Rows.of(spans, at, special).groups
        if running:
            groups = (Group.singles(running, at, special), *groups)
        readings = tuple(Reading(group, self._where(group)) for group in groups)
        return ForwardPass(ids[None], at[None], write, tuple(spans), Rows(groups), readings, keep)

    def _where(self, group: Group) -> Tensor:
        """Places [B, L] of all that the group's requests have read after this pass."""
        slots = np.array(group.slots, np.int64)
        longest = blocks_for(int(self._computed[slots].max()))
        blocks = self._blocks[slots, :longest]
        return torch.from_numpy((blocks[..., None] * BLOCK + self._inside).reshape(len(slots), -1)).to(self._device)


def _kept(
    running: int, pairs: list[tuple[PromptPart, RowSpan]], ending: Many[PromptPart], scored: Many[PromptPart]
) -> Numbers:
    ends = [span.start + span.length - 1 for part, span in pairs if part in ending]
    every = [np.arange(span.start, span.start + span.length) for part, span in pairs if part in scored]
    return np.concatenate([np.arange(running), np.array(ends, np.int64), *every])


# Linear layers on the CPU in oneDNN's own weight layout, which a product over few rows reads at full bandwidth.
#
# The plain layout is turned on every call: measured at 125M parameters in bfloat16 with one row, 18 ms against 12.
#
# oneDNN makes a kernel of about half a MiB for every number of rows that a layer ever sees, and torch keeps a
# thousand of them: rows are padded to a few sizes, so that the memory of a server that reads prompts of all lengths
# stays flat.


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with packed weights; takes the place of ``nn.Linear`` and of GPT-2's ``Conv1D``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias
        self._handle = ops.register(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            found: Tensor = ops.linear(x, self._handle, self.out_features)
            return found
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], outside of any graph."""
        rows = x.flatten(0, -2)
        count = len(rows)
        padded = nn.functional.pad(rows, (0, 0, 0, padded_rows(count) - count))
        found: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self.packed, self.bias, "none", [], "")
        return found[:count].view(*x.shape[:-1], self.out_features)


def padded_rows(count: int) -> int:
    """As how many rows ``count`` of them are multiplied: at most an eighth more, eight sizes for every doubling."""
    step = 1 << max((count - 1).bit_length() - 4, 0)
    return -(-count // step) * step


def can_pack_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of that type there."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_library and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack(model: nn.Module) -> None:
    """Packs every linear layer of a model that will not be trained; an embedding that shares its weight keeps it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            found = _weights(child)
            if found is not None:
                setattr(parent, name, _like(child, PackedLinear(*found)))


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module) is Conv1D:
        return module.weight.T, module.bias
    return None


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hooks are of the layer, not of its layout."""
    kept: Any = (old._forward_hooks, old._forward_pre_hooks)
    assert not any(kept), "layers are packed before anything is hooked"
    return new


# The model as the engine runs it: attention over blocks, packed weights, edits at its sites, compiled where asked.
#
# Made once; when the engine starts again it is given new memory and tables.


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
            pack(model.network)
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

    def forward(self, one: ForwardPass) -> Tensor:
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
        located = locate(self._network, self._network.config, site)
        place = len(self._places)
        self._places.append((site, located))
        return hook(
            located,
            lambda x: ops.edit(x, self._handle, place) if torch.compiler.is_compiling() else self.edit(x, place),
        )


def can_pack(model: LoadedModel) -> bool:
    """Whether this model's linear layers can be packed."""
    return can_pack_weights(model.device, model.network.dtype)


# Which features fire on the tokens of one forward pass: encoded whole, picked on the device, sparse on the host.


@dataclass(frozen=True, slots=True)
class SparseValues:
    """Rows of a sparse matrix: row i holds ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: array[int]
    indices: array[int]
    values: array[float]


Found: TypeAlias = dict[tuple[int, str], SparseValues | Exception]
"""By request and SAE, what was picked on the last pass' part of it, or what went wrong."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One pick of one part: rows ``[start, end)`` of what is kept at its SAE's site."""

    part: PromptPart
    pick: Pick
    start: int
    end: int


class Capture:
    """What the forward passes show of the SAEs that somebody inspects.

    Whoever asks the same of an SAE in one pass shares one product with its encoder, and one transfer to the host.
    """

    def __init__(self, saes: Mapping[str, LoadedSae]) -> None:
        self._saes = saes
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._asked: list[_Asked] = []
        self._seen: dict[Site, Tensor] = {}
        self._pickers: dict[str, FeatureSelector] = {}
        self._sites: set[Site] = set()

    def begin(self, parts: Many[PromptPart], spans: Many[RowSpan]) -> Callable[[Site, Tensor], None] | None:
        """Before a pass that reads these parts: what to call with each site's activations; None where none asks."""
        self._asked, self._seen = [], {}
        kept: list[Tensor] = []
        row = 0
        for part, span in zip(parts, spans, strict=True):
            if isinstance(part.sequence.task, InspectTask):
                kept.append(torch.arange(span.start, span.start + span.length))
                end = row + span.length
                self._asked += [_Asked(part, pick, row, end) for pick in part.sequence.task.picks]
                row = end
        if not kept:
            return None
        self._tokens = torch.cat(kept)
        self._sites = {self._saes[one.pick.sae].site for one in self._asked}
        return self._see

    def results(self) -> Found:
        """What the last pass showed; once."""
        groups: dict[Pick, list[_Asked]] = defaultdict(list)
        for one in self._asked:
            groups[one.pick].append(one)
        found: Found = {}
        for pick, asked in groups.items():
            try:
                parts: Many[SparseValues | Exception] = self._choose(pick, asked)
            except Exception as err:  # one request's activations must not end another's
                parts = [err] * len(asked)
            found.update({(one.part.sequence.uid, pick.sae): part for one, part in zip(asked, parts, strict=True)})
        self._asked, self._seen = [], {}
        return found

    def _see(self, site: Site, x: Tensor) -> None:
        """x [N, width] at ``site``, before its edits. Copied: the model goes on to use its memory for other things."""
        if site in self._sites:
            self._seen[site] = x[self._tokens.to(x.device)]

    def _choose(self, pick: Pick, asked: list[_Asked]) -> list[SparseValues]:
        sae = self._saes[pick.sae]
        parts = [self._seen[sae.site][one.start : one.end] for one in asked]
        if isinstance(sae.dictionary, Temporal):
            encoded = [_with_prefix(sae.dictionary, one, x) for one, x in zip(asked, parts, strict=True)]
            found = select_features(torch.cat(encoded), pick, signed=is_signed(sae.dictionary))
        else:
            found = select_activations(self._picker(sae), torch.cat(parts), pick)
        return _split(_pack(found), [len(x) for x in parts])

    def _picker(self, sae: LoadedSae) -> FeatureSelector:
        if sae.name not in self._pickers:
            self._pickers[sae.name] = FeatureSelector(sae.dictionary)
        return self._pickers[sae.name]


def _with_prefix(temporal: Temporal, asked: _Asked, x: Tensor) -> Tensor:
    """A temporal SAE reads a token together with everything before it, whatever part that came in."""
    before = asked.part.sequence.prefix
    whole = torch.cat([before[asked.pick.sae], x]) if asked.pick.sae in before else x
    before[asked.pick.sae] = whole
    return temporal.encode(whole)[-len(x) :]


def _split(whole: SparseValues, lengths: list[int]) -> list[SparseValues]:
    """Rows one after the other -> so many for each."""
    found, row = [], 0
    for length in lengths:
        first, last = whole.indptr[row], whole.indptr[row + length]
        indptr = array("I", (one - first for one in whole.indptr[row : row + length + 1]))
        found.append(SparseValues(indptr, whole.indices[first:last], whole.values[first:last]))
        row += length
    return found


def _pack(picked: SelectedFeatures) -> SparseValues:
    """Candidates and which to keep -> rows of a sparse matrix."""
    ends = picked.keep.sum(dim=-1).cumsum(dim=0).tolist()
    return SparseValues(
        array("I", [0, *ends]),
        array("I", picked.features[picked.keep].tolist()),
        array("f", picked.values[picked.keep].tolist()),
    )


class Runner:
    """The model with KV memory of ``blocks`` blocks, edit tables and sampler; one row of each table per slot."""

    def __init__(
        self, model: LoadedModel, network: Network, saes: Mapping[str, LoadedSae], slots: int, blocks: int
    ) -> None:
        config, self.device = model.network.config, model.device
        self.network = network
        self.tables = SteeringTables(saes, slots, self.device)
        shape, places = KvShape.of(config), (blocks + 1) * BLOCK
        attention = PagedAttention(shape, places, model.network.dtype, self.device, network.kernel)
        network.attach(attention, self.tables)
        self.sampler = Sampler(slots, model.info.max_context, config.vocab_size, self.device)
        is_special = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        special = [one for one in model.tokenizer.special_ids if one < config.vocab_size]
        is_special[torch.tensor(special, dtype=torch.int64, device=self.device)] = True
        self.seats = SlotState(slots, model.info.max_context, is_special)

    def join(self, sequence: Sequence, tallies: Tallies | None) -> None:
        """Prepares a request's slot; ``tallies``: what its edits counted on tokens that are not read again."""
        slot, task = sequence.slot, sequence.task
        self.seats.take(slot, sequence.computed, sequence.blocks)
        if isinstance(task, InspectTask):
            self.tables.write(slot, task.steering)
            return
        self.tables.write(slot, task.steering, task.watch)
        if tallies is not None:
            self.tables.resume(slot, tallies)
        self.sampler.write(
            slot, task.sampling, task.seed, task.max_new_tokens, sequence.tokens, sequence.generated_tokens
        )

    def leave(self, slot: int) -> None:
        """Frees a slot; nothing of its request stays."""
        self.tables.clear(slot)
        self.sampler.clear(slot)

    def forward(
        self,
        running: tuple[int, ...],
        parts: Many[PromptPart],
        ending: Many[PromptPart],
        scored: Many[PromptPart],
        capture: Capture,
    ) -> Tensor:
        """One pass; see ``Seats.build`` -> logits [M, vocabulary], float32; ``capture`` sees what it was asked for."""
        one = self.seats.build(running, parts, ending, scored)
        self.tables.watch = capture.begin(parts, one.spans)
        return self.network.forward(one)

    def pick(self, logits: Tensor, slots: tuple[int, ...]) -> SampledTokens:
        """logits [B, vocabulary] of B slots -> their next tokens."""
        return self.sampler.pick(logits, slots)


# How much memory KV may take, and what running out of memory looks like.


SHARE = 0.5
"""Of the memory that is free at start, what KV takes at most where the settings do not say."""
_MIB = 2**20


def kv_blocks(model: LoadedModel, slots: int, limit_mb: int | None) -> int:
    """Blocks of KV memory: enough for every slot's longest request, unless memory or the settings allow less.

    Args:
        limit_mb: what the settings allow, in MiB.

    Raises:
        ModelLoadError: that would not hold one short request.
    """
    block_bytes = KvShape.of(model.network.config).token_bytes(model.network.dtype) * BLOCK
    allowed = limit_mb * _MIB if limit_mb is not None else int(free_bytes(model.device) * SHARE)
    count = min(slots * blocks_for(model.info.max_context), allowed // block_bytes)
    if count < 2:
        raise ModelLoadError(
            f"KV memory for {BLOCK} tokens is {block_bytes / _MIB:.1f} MiB, and {allowed / _MIB:.0f} MiB are allowed; "
            "give engine.kv_cache_mb or free memory"
        )
    return count


def is_out_of_memory(err: Exception) -> bool:
    """Whether a step failed for want of memory alone, so that less work would have gone through."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator has no exception of its own.
    return isinstance(err, RuntimeError) and "can't allocate memory" in str(err)

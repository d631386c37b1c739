"""The requests that vLLM's worker steers or reads: their edits in the tables, what was counted, and their reports.

vLLM tells its workers neither when a request is preempted nor when it ends: a request that goes back was preempted, and
its counts go back with it; one that the runner no longer knows has ended, and is kept until it is asked for.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from saeguard_sae.coders import Temporal, is_signed
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import ModelConfig, Point, Site, depth, layout, locate, sites
from saeguard_sae.rows import Rows, RowSpan
from saeguard_server.engine.protocol import Steering
from saeguard_server.engine.tables import SteeringTables, Tallies, select_activations, select_features
from saeguard_server.engine.vllm.orders import (
    Activations,
    EditCounts,
    Readings,
    WorkerOutput,
    WorkerRequest,
    WorkerSelection,
    read_worker_request,
    steering_of_request,
)
from saeguard_server.errors import InternalFailure

# Whose tokens a forward pass of vLLM's model runner reads.


@dataclass(frozen=True, slots=True)
class BatchPart:
    """A request's tokens in a pass: rows ``[first, first + length)``, at positions from ``start`` on."""

    request: str
    start: int
    first: int
    length: int


class UnknownRunner(RuntimeError):
    """A model runner whose batch cannot be read."""


def check_runner(runner: Any) -> None:
    """Refuses what ``parts`` does not know.

    Raises:
        UnknownRunner: says what to set.
    """
    if not (hasattr(runner, "input_batch") and hasattr(runner, "requests")):
        raise UnknownRunner(
            f"vLLM's {type(runner).__module__} is not supported; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )


def batch_parts(runner: Any) -> list[BatchPart]:
    """The parts of the pass that the runner is about to make; none where it only measures or compiles."""
    batch = runner.input_batch
    count = batch.num_reqs
    if not count or not _is_real():
        return []
    bounds = pairwise(runner.query_start_loc.np[: count + 1].tolist())
    starts = batch.num_computed_tokens_cpu[:count].tolist()
    return [
        BatchPart(request, start, first, last - first)
        for request, start, (first, last) in zip(batch.req_ids[:count], starts, bounds, strict=True)
    ]


def order_of(runner: Any, request: str, key: str) -> bytes | None:
    """What a request says under ``key`` of its extra arguments."""
    params = runner.requests[request].sampling_params
    given = params.extra_args if params is not None else None
    return given.get(key) if given else None


def keep_generators(runner: Any) -> None:
    """Hides the random generators of requests whose prompt does not end in this pass, and shows the others'.

    vLLM samples for everyone and then takes back what it drew too early, in a way that a CPU's generators do not have:
    a seeded request with a prompt in two parts would end the engine. What is hidden draws nothing.
    """
    batch = runner.input_batch
    draws = ~runner.discard_request_mask.np[: batch.num_reqs]
    # The sampler holds this very dictionary.
    batch.generators.clear()
    for row, request in enumerate(batch.req_ids[: batch.num_reqs]):
        generator = runner.requests[request].generator
        if draws[row] and generator is not None:
            batch.generators[row] = generator


def state_of(runner: Any, request: str) -> Any:
    """What the runner knows of a request: an object that stays the same while the request lives."""
    return runner.requests[request]


def clear_request(runner: Any, state: Any) -> None:
    """Writes zeros over those of a request's keys and values that are not finite, wherever they are now.

    The others stay as they are: a request with the same prompt may find them. Whoever gets a block after it reads the
    block's unused places too, at weight 0: what is not finite there would make his own values not finite. Only vLLM's
    attention on a CPU does that.
    """
    layers = runner.compilation_config.static_forward_context
    for group, blocks in zip(runner.kv_cache_config.kv_cache_groups, state.block_ids, strict=True):
        for name in group.layer_names:
            cache, held = layers[name].kv_cache, list(blocks)
            cache[held] = cache[held].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _is_real() -> bool:
    """Passes that measure memory or compile have no attention metadata."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata is not None


# What inspections see of a pass: features picked where the activations are, packed for their way to the server.


@dataclass(slots=True)
class Inspection:
    """One request's picks, and what they found so far."""

    picks: tuple[WorkerSelection, ...]
    found: list[Activations] = field(default_factory=list)
    prefix: dict[int, Tensor] = field(default_factory=dict)
    """By SAE, all activations so far, where its features need them."""


class Selectors:
    """Picks features with the SAEs of a process, by their number."""

    def __init__(self, saes: Mapping[int, LoadedSae]) -> None:
        self._saes = saes
        self._pickers: dict[int, FeatureSelector] = {}

    def see(self, inspection: Inspection, pick: WorkerSelection, start: int, x: Tensor) -> None:
        """x [T, width] at the pick's site, of the tokens from position ``start`` on."""
        coder = self._saes[pick.sae].dictionary
        if isinstance(coder, Temporal):
            # It reads a token together with everything before it, whatever part that came in.
            whole = torch.cat([inspection.prefix[pick.sae], x]) if pick.sae in inspection.prefix else x.clone()
            inspection.prefix[pick.sae] = whole
            picked = select_features(coder.encode(whole)[-len(x) :].float(), pick, signed=is_signed(coder))
        else:
            picked = select_activations(self._picker(pick.sae), x, pick)
        inspection.found.append(_pack(picked, pick.sae, start))

    def _picker(self, sae: int) -> FeatureSelector:
        if sae not in self._pickers:
            self._pickers[sae] = FeatureSelector(self._saes[sae].dictionary)
        return self._pickers[sae]


def _pack(picked: SelectedFeatures, sae: int, start: int) -> Activations:
    ends = picked.keep.sum(dim=-1).cumsum(dim=0).tolist()
    return Activations(
        sae,
        start,
        array("I", [0, *ends]).tobytes(),
        array("I", picked.features[picked.keep].tolist()).tobytes(),
        array("f", picked.values[picked.keep].tolist()).tobytes(),
    )


_log = logging.getLogger(__name__)

MAX_ENDED = 4096
"""Reports of ended requests that nobody asked for yet; the oldest go first."""
MAX_PAST = 512
"""Passes whose counts are kept of a request that may overrun its end."""
BLOCK = 16
"""Tokens that vLLM reuses at once, or a multiple of them."""


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request with edits, watched features or picks, as far as the tables of this process have them."""

    order: WorkerRequest
    steering: Steering
    edits: tuple[int, ...]
    """Of the order's edits those here, in the order of ``steering``."""
    watch: tuple[int, ...]
    """Of the watched features those here."""
    inspection: Inspection
    slot: int = -1
    read: int = 0
    """Tokens that the model read for it, from the first one on."""
    passes: int = 0
    problem: str = ""
    state: Any = None
    """Of the request in vLLM's runner, by which its memory is found."""
    blew_up: Tensor | None = None
    """bool [], whether the model made something of it that is not finite; on the device."""
    tallies: Tallies = field(default_factory=Tallies)
    """What was counted, while it has no slot."""
    past: dict[int, Tallies] = field(default_factory=dict)
    """What was counted when it had read that many tokens."""
    kept: dict[int, Tallies] = field(default_factory=dict)
    """What was counted at the ends of blocks, of a request that vLLM may take up again there."""
    readings: list[Readings] = field(default_factory=list)

    def take_up(self, start: int) -> None:
        """It is read on from there: what comes before was found in memory, or it was preempted.

        The passes so far were made all the same.
        """
        if start > self.order.untouched and start not in self.kept:
            self.problem = f"vLLM read on at position {start} after {self.read} tokens"
        self.read, self.tallies, self.readings = start, self.kept.get(start, Tallies()), []
        self.past = {read: tallies for read, tallies in self.past.items() if read <= start}
        self.inspection = Inspection(self.inspection.picks)


class SteeredModel:
    """What one worker process does for steered requests.

    Args:
        names: of all SAEs, in the order that orders number them.
        saes: those whose sites are in this process.
        slots: requests in one pass at most.
        wipe: called with the state of a request with edits that left the pass, if what it left in memory would do harm.
    """

    def __init__(
        self,
        names: Sequence[str],
        saes: Mapping[str, LoadedSae],
        slots: int,
        special: Tensor,
        device: torch.device,
        wipe: Callable[[Any], None],
    ) -> None:
        self.saes = saes
        # One more, to turn kept tallies into counts when every slot is taken.
        self.tables = SteeringTables(saes, slots + 1, device)
        self._names, self._special, self._wipe = tuple(names), special, wipe
        self._pickers = Selectors({at: saes[name] for at, name in enumerate(names) if name in saes})
        self._free, self._spare = list(range(slots)), slots
        self._live: dict[str, LiveRequest | None] = {}
        """By vLLM's name of the request; None for those that ask for nothing here."""
        self._ended: dict[int, LiveRequest] = {}
        self._now: list[tuple[BatchPart, LiveRequest]] = []

    def begin(
        self, parts: list[BatchPart], meet: Callable[[str], tuple[bytes | None, Any]], ids: Tensor, positions: Tensor
    ) -> None:
        """Before a pass over these parts, of which ids and positions [N] are the tokens.

        Args:
            meet: the order and the state in vLLM's runner of a request seen for the first time.
        """
        for part in parts:
            if part.request not in self._live:
                self._live[part.request] = self._meet(*meet(part.request))
        self._clean({part.request for part in parts})
        self._now = [(part, live) for part in parts if (live := self._live[part.request]) is not None]
        for part, live in self._now:
            self._resume(live, part)
        spans = [RowSpan(live.slot, part.first, part.length) for part, live in self._now]
        special = torch.isin(ids, self._special) if spans else torch.zeros(0, dtype=torch.bool)
        self.tables.begin(Rows.of(spans, positions, special))
        self.tables.watch = self._see if any(live.inspection.picks for _, live in self._now) else None

    def end(self, made: Iterable[Tensor]) -> None:
        """After it; ``made`` [N, width] each is what the model made of the tokens last."""
        bad = self._bad_tokens(made) if self._now else None
        for part, live in self._now:
            self._check(live)
            if bad is not None and live.edits:
                mine = bad[part.first : part.first + part.length].any()
                live.blew_up = mine if live.blew_up is None else live.blew_up | mine
            live.read, live.passes = part.start + part.length, live.passes + 1
            if live.order.may_overrun:
                live.past[live.read] = self.tables.tally(live.slot)
                if len(live.past) > MAX_PAST:
                    del live.past[next(iter(live.past))]
            if 0 < live.order.untouched < live.read and live.read % BLOCK == 0:
                live.kept[live.read] = self.tables.tally(live.slot)
            if live.watch and not live.problem:
                live.readings.append(self._readings(live, part.start))
        self._now = []

    def forget(self, known: Callable[[str], bool]) -> None:
        """Lets go of the requests that vLLM no longer knows; their reports are kept."""
        for request in [one for one in self._live if not known(one)]:
            live = self._live.pop(request)
            if live is not None:
                self._clean_one(live)
                self._give_up_slot(live)
                self._ended[live.order.uid] = live
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def report(self, uid: int, tokens: int) -> WorkerOutput:
        """What was done for a request while it read its first ``tokens`` tokens; asked for once."""
        live = self._ended.pop(uid, None) or self._find(uid)
        if live is None:
            return WorkerOutput(problem="vLLM's worker knows nothing of this request")
        counted = live.past.get(tokens) if live.read != tokens else self._tallies(live)
        if counted is None:
            return WorkerOutput(problem=f"vLLM's worker read {live.read} tokens of this request, not {tokens}")
        return WorkerOutput(
            self._counts(live, counted),
            tuple(live.readings),
            tuple(live.inspection.found),
            live.passes if live.read == tokens else list(live.past).index(tokens) + 1 + live.passes - len(live.past),
            live.problem,
        )

    def _meet(self, given: bytes | None, state: Any) -> LiveRequest | None:
        if given is None:
            return None
        order = read_worker_request(given)
        whole = steering_of_request(order, self._names)
        edits = tuple(at for at, one in enumerate(whole.edits) if one.sae in self.saes)
        here = Steering(tuple(whole.edits[at] for at in edits), whole.max_relative_edit)
        watch = tuple(at for at, (sae, _) in enumerate(order.watch) if self._names[sae] in self.saes)
        picks = tuple(one for one in order.picks if self._names[one.sae] in self.saes)
        return LiveRequest(order, here, edits, watch, Inspection(picks), state=state)

    def _resume(self, live: LiveRequest, part: BatchPart) -> None:
        if part.start != live.read:
            self._give_up_slot(live)
            live.take_up(part.start)
        if live.slot < 0:
            live.slot = self._seat()
            self.tables.write(live.slot, live.steering, self._watched(live))
            self.tables.resume(live.slot, live.tallies)

    def _clean(self, present: set[str]) -> None:
        """Those who are not in the pass may have lost their memory to one who is."""
        for request, live in self._live.items():
            if live is not None and request not in present:
                self._clean_one(live)

    def _clean_one(self, live: LiveRequest) -> None:
        blew_up, live.blew_up = live.blew_up, None
        if blew_up is not None and bool(blew_up):
            self._wipe(live.state)

    @staticmethod
    def _bad_tokens(made: Iterable[Tensor]) -> Tensor:
        """bool [N], True for tokens of which something is not finite."""
        return torch.stack([~one.isfinite().all(dim=-1) for one in made]).any(dim=0)

    def _check(self, live: LiveRequest) -> None:
        try:
            self.tables.check(live.slot)
        except InternalFailure as err:
            live.problem = live.problem or err.message

    def _seat(self) -> int:
        """A free slot; of those who pause if need be."""
        if not self._free:
            busy = {id(live) for _, live in self._now}
            pausing = (one for one in self._live.values() if one is not None and one.slot >= 0 and id(one) not in busy)
            self._give_up_slot(next(pausing))
        return self._free.pop()

    def _give_up_slot(self, live: LiveRequest) -> None:
        if live.slot >= 0:
            live.tallies = self.tables.tally(live.slot)
            self.tables.clear(live.slot)
            self._free.append(live.slot)
            live.slot = -1

    def _find(self, uid: int) -> LiveRequest | None:
        return next((one for one in self._live.values() if one is not None and one.order.uid == uid), None)

    def _watched(self, live: LiveRequest) -> tuple[tuple[str, int], ...]:
        return tuple((self._names[live.order.watch[at][0]], live.order.watch[at][1]) for at in live.watch)

    def _tallies(self, live: LiveRequest) -> Tallies:
        return self.tables.tally(live.slot) if live.slot >= 0 else live.tallies

    def _counts(self, live: LiveRequest, counted: Tallies) -> tuple[EditCounts, ...]:
        self.tables.write(self._spare, live.steering, self._watched(live))
        try:
            self.tables.resume(self._spare, counted)
            found = self.tables.counts(self._spare, live.steering)
        finally:
            self.tables.clear(self._spare)
        return tuple(
            EditCounts(at, *(getattr(one, name) for name in EditCounts.__struct_fields__[1:]))
            for at, one in zip(live.edits, found, strict=True)
        )

    def _readings(self, live: LiveRequest, start: int) -> Readings:
        values = self.tables.readings(live.steering, self._watched(live), live.slot)
        return Readings(start, live.watch, values.float().cpu().numpy().tobytes())

    def _see(self, site: Site, x: Tensor) -> None:
        for part, live in self._now:
            for pick in live.inspection.picks:
                if self.saes[self._names[pick.sae]].site == site:
                    self._pick(live, pick, part.start, x[part.first : part.first + part.length])

    def _pick(self, live: LiveRequest, pick: WorkerSelection, start: int, x: Tensor) -> None:
        try:
            self._pickers.see(live.inspection, pick, start, x)
        except Exception:  # one request's activations must not end another's
            _log.exception("activations could not be read")
            live.problem = live.problem or "the activations could not be read"


# The ops that vLLM's compiled graphs call at every site: a graph holds numbers and tensors, the tables are found
# here.
#
# They change their tensors in place, so that an idle site costs no copy, and where nobody edits nothing is written.


Edit: TypeAlias = Callable[[Tensor], Tensor]
"""x [N, width] as the model made it -> as it goes on with it; x itself where nobody edits."""

_PLACES: list[Edit] = []
"""Of the one model that a worker process runs, by the number that its graph holds."""

_LIBRARY: Any = torch.library.Library("saeguard_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("edit(Tensor(a!) x, int place) -> ()")
_LIBRARY.define("edit_sum(Tensor(a!) hidden, Tensor(b!) residual, int place) -> ()")


def install_edits(places: list[Edit]) -> None:
    """Makes these the process' places, numbered from 0; those before them are gone."""
    _PLACES[:] = places


def _edit(x: Tensor, place: int) -> None:
    edited = _PLACES[place](x)
    if edited is not x:
        x.copy_(edited)


def _edit_sum(hidden: Tensor, residual: Tensor, place: int) -> None:
    """The stream in two tensors, of which the model goes on with the sum."""
    x = hidden + residual
    edited = _PLACES[place](x)
    if edited is x:
        return
    # Only tokens that changed are written, whole into one of the two: the others' sums stay what they were, to the bit.
    changed = (edited != x).any(dim=-1, keepdim=True)
    hidden.copy_(torch.where(changed, edited, hidden))
    residual.masked_fill_(changed, 0.0)


_LIBRARY.impl("edit", _edit, "CompositeExplicitAutograd")
_LIBRARY.impl("edit_sum", _edit_sum, "CompositeExplicitAutograd")


# A graph is traced without data: they change nothing that it needs to know.
torch.library.register_fake("saeguard_vllm::edit", lambda x, place: None)
torch.library.register_fake("saeguard_vllm::edit_sum", lambda hidden, residual, place: None)


# Where our ops go in vLLM's models, whose modules have the names that Hugging Face gives them.
#
# Llama's and Gemma's blocks pass the residual stream on in two tensors, and the norm that follows adds them. What is
# sharded under tensor parallelism cannot be edited: an SAE reads and writes whole vectors.


MODELS: Mapping[str, str] = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""vLLM's class by ``model_type``: those whose forward pass the places below were verified against."""

_SHARDED: frozenset[Point] = frozenset({"attn_z", "mlp_act"})
# The norm's own view of the stream is a tensor of its own nowhere in vLLM: it adds and normalises in one step.
_NOWHERE: frozenset[Point] = frozenset({"mlp_read"})
# vLLM scales Gemma's embeddings outside the module that looks them up.
_SCALED_EMBEDDINGS = ("gemma2", "gemma3_text")


def check_class(model: nn.Module, config: ModelConfig) -> None:
    """Refuses an implementation of the model that is not the one whose places are known.

    Raises:
        ValueError: names both.
    """
    wanted, found = MODELS[config.model_type], type(model).__name__
    if found != wanted:
        raise ValueError(f"vLLM runs this {config.model_type} model as {found}; its sites are known in {wanted}")


def offered_sites(config: ModelConfig, tensor_parallel: int) -> frozenset[Site]:
    """The sites of a model that can be read and edited in vLLM."""
    missing = _NOWHERE | (_SHARDED if tensor_parallel > 1 else frozenset())
    if config.model_type in _SCALED_EMBEDDINGS:
        missing |= {"embed"}
    return frozenset(site for site in sites(config) if site.point not in missing)


def attach_edits(model: nn.Module, config: ModelConfig, tables: SteeringTables) -> None:
    """Puts an op into the model at every site of the tables, which this process must hold; before it is compiled."""
    # Sites may share a module: those that change what later ones see come first.
    placed = sorted(tables.sites, key=depth)
    install_edits([_edit_op(model, config, tables, site) for site in placed])
    for number, site in enumerate(placed):
        _hook(model, config, site, number)


def hooked_sites(model: nn.Module, config: ModelConfig, wanted: Iterable[Site]) -> frozenset[Site]:
    """Those of the sites whose module is in this process: pipeline stages hold a part of the layers each."""
    return frozenset(site for site in wanted if _is_here(model, config, site))


def _is_here(model: nn.Module, config: ModelConfig, site: Site) -> bool:
    where = layout(config.model_type)
    path = where.embed if site.point == "embed" else f"{where.blocks}.{site.layer}"
    return type(model.get_submodule(path)).__name__ != "PPMissingLayer"


def _edit_op(model: nn.Module, config: ModelConfig, tables: SteeringTables, site: Site) -> Edit:
    see = locate(model, config, site).see
    return lambda x: tables.edit(site, x, see)


def _hook(model: nn.Module, config: ModelConfig, site: Site, number: int) -> None:
    place = locate(model, config, site)
    # A norm that adds first puts out what it normalised and the sum: an SAE behind the norm reads the former alone.
    is_whole = place.side == "in" or site.point == "resid_post"
    place.attach(lambda value: _apply(value if is_whole or isinstance(value, Tensor) else value[:1], number))


def _apply(value: Any, number: int) -> None:
    """Edits the activations among a module's arguments or output in place: one tensor, or two that are summed."""
    given = (value,) if isinstance(value, Tensor) else value
    # Blocks get positions first, in integers.
    x, *more = [one for one in given if isinstance(one, Tensor) and one.is_floating_point()]
    if more:
        torch.ops.saeguard_vllm.edit_sum(x, more[0], number)
    else:
        torch.ops.saeguard_vllm.edit(x, number)

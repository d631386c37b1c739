"""What a request tells vLLM's workers, and what they tell of it afterwards; compact, and refused in another version."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from saeguard_sae.edits import Affine
from saeguard_server.engine.protocol import CompiledCondition, CompiledEdit, GenerateTask, InspectTask, Pick, Steering
from saeguard_server.errors import InternalFailure
from saeguard_server.settings import ServedSaeSettings

KEY = "saeguard"
"""Of our entry in ``SamplingParams.extra_args`` and in vLLM's ``additional_config``."""
VERSION = 2


class WorkerEdit(msgspec.Struct, frozen=True, array_like=True):
    """One edit; ``sae`` is its number in the order of the settings."""

    sae: int
    feature: int
    kind: str
    affine: Affine
    first: int
    last: int
    special: bool
    is_shadow: bool
    is_limited: bool


class WorkerSelection(msgspec.Struct, frozen=True, array_like=True):
    """What to keep of one SAE's activations, as ``protocol.Pick``."""

    sae: int
    top_k: int | None
    threshold: float | None
    features: tuple[int, ...] | None


class WorkerRequest(msgspec.Struct, frozen=True, array_like=True):
    """What the workers must do for one request, by the number ``uid`` under which they are asked for its report."""

    version: int
    uid: int
    edits: tuple[WorkerEdit, ...] = ()
    max_relative_edit: float = float("inf")
    watch: tuple[tuple[int, int], ...] = ()
    picks: tuple[WorkerSelection, ...] = ()
    may_overrun: bool = False
    """Whether it may end before vLLM knows, at a stop string: then its counts are kept as of every pass."""
    untouched: int = 0
    """Tokens from the first one on of which nobody need know whether they were read, or found in memory."""


class EditCounts(msgspec.Struct, frozen=True, array_like=True):
    """``table.Counts`` of the edit with that place in the order."""

    edit: int
    eligible: int
    edited: int
    capped: int
    mean_activation: float
    max_activation: float
    mean_relative_edit: float


class Readings(msgspec.Struct, frozen=True, array_like=True):
    """Watched features ``columns`` of tokens from ``start`` on: float32 [tokens, columns]."""

    start: int
    columns: tuple[int, ...]
    values: bytes


class Activations(msgspec.Struct, frozen=True, array_like=True):
    """What a pick kept of tokens from ``start`` on, as a sparse matrix; ``array("I")`` twice and ``array("f")``."""

    sae: int
    start: int
    indptr: bytes
    indices: bytes
    values: bytes


class WorkerOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one worker did for a request; ``problem`` says what went wrong, if anything did."""

    counts: tuple[EditCounts, ...] = ()
    readings: tuple[Readings, ...] = ()
    activations: tuple[Activations, ...] = ()
    forward_passes: int = 0
    problem: str = ""


def worker_request(uid: int, task: GenerateTask | InspectTask, saes: Sequence[str]) -> bytes | None:
    """The order of a task, as it travels; None where the workers have nothing to do for it.

    Args:
        saes: their names in the order of the settings.
    """
    number = {name: at for at, name in enumerate(saes)}
    watch: tuple[tuple[str, int], ...] = ()
    picks: tuple[Pick, ...] = ()
    if isinstance(task, GenerateTask):
        watch = task.watch
    else:
        picks = task.picks
    made = WorkerRequest(
        VERSION,
        uid,
        tuple(_edit(one, number[one.sae]) for one in task.steering.edits),
        task.steering.max_relative_edit,
        tuple((number[name], feature) for name, feature in watch),
        tuple(_pick(one, number[one.sae]) for one in picks),
        isinstance(task, GenerateTask) and bool(task.sampling.stop),
        min((one.first for one in steering_scopes(task.steering)), default=0) if may_reuse(task) else 0,
    )
    if not (made.edits or made.watch or made.picks):
        return None
    return msgspec.msgpack.encode(made)


def may_reuse(task: GenerateTask | InspectTask) -> bool:
    """Whether a request wants nothing of its prompt's tokens but their KV.

    vLLM leaves out whole blocks of the prompt, and its scheduler says how many; what edits counted on them is known
    only for where a pass ended. So an edit, too, must begin after all that can be left out: the last token is read.
    """
    if not isinstance(task, GenerateTask) or task.watch or task.sampling.prompt_logprobs:
        return False
    return all(one.first >= len(task.tokens) - 1 for one in steering_scopes(task.steering))


def steering_scopes(steering: Steering) -> tuple[CompiledEdit | CompiledCondition, ...]:
    """All that holds some positions and not others."""
    return *steering.edits, *steering.guards


def read_worker_request(order: bytes) -> WorkerRequest:
    """The order that a worker got.

    Raises:
        InternalFailure: it was written by another version of the server.
    """
    version = msgspec.msgpack.decode(order)[0]
    if version != VERSION:
        raise InternalFailure(f"a request's order has version {version}, the workers know {VERSION}")
    return msgspec.msgpack.decode(order, type=WorkerRequest)


def steering_of_request(order: WorkerRequest, saes: Sequence[str]) -> Steering:
    """An order's edits as edit tables take them."""
    return Steering(tuple(_edit_of(one, saes) for one in order.edits), order.max_relative_edit)


def _edit_of(one: WorkerEdit, saes: Sequence[str]) -> CompiledEdit:
    return CompiledEdit(
        saes[one.sae], one.feature, one.kind, one.affine, one.first, one.last, one.special,
        is_shadow=one.is_shadow, is_limited=one.is_limited,
    )  # fmt: skip


def _edit(one: CompiledEdit, sae: int) -> WorkerEdit:
    assert one.gate is None, "a condition is refused at admission"
    return WorkerEdit(
        sae, one.feature, one.kind, one.affine, one.first, one.last, one.special, one.is_shadow, one.is_limited
    )


def _pick(one: Pick, sae: int) -> WorkerSelection:
    return WorkerSelection(sae, one.top_k, one.threshold, one.features)


# What vLLM's workers serve; in its ``additional_config``, which is a part of its compiled graphs' key.


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The SAEs in the order in which orders number them."""

    saes: tuple[ServedSaeSettings, ...]
    digests: dict[str, str]
    """Of the SAEs by name, as the server has them; workers refuse others."""
    slots: int
    """Requests in one pass at most."""
    special_ids: tuple[int, ...]
    """Tokens that are edited only when asked."""

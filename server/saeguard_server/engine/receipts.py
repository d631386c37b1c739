"""The receipt of a steered reply, checked against what the request asked for before anybody sees it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from saeguard_sae.conditions import ConditionCounts
from saeguard_sae.edit_table import EditCounts
from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.protocol import ResolvedEdit, ResolvedGuard, Steering
from saeguard_server.errors import InternalFailure
from saeguard_server.reply import InterventionReceipt, Receipt, StoppedBy, TriggerReceipt


def receipt(
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

"""The receipt of a steered reply, checked against what the request asked for before anybody sees it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from saeguard_sae.loading import LoadedSae
from saeguard_sae.table import Counts
from saeguard_server.engine.protocol import ResolvedEdit, Steering
from saeguard_server.errors import InternalFailure
from saeguard_server.reply import InterventionReceipt, Receipt


def receipt(
    steering: Steering,
    counts: Sequence[Counts],
    *,
    read: Sequence[int],
    forward_passes: int,
    saes: Mapping[str, LoadedSae],
    special_ids: frozenset[int],
    model_digest: str,
) -> Receipt | None:
    """The receipt of a request that had edits; None for others.

    Args:
        counts: what each edit did, in the order of the steering.
        read: the tokens that the model read for this request, prompt first.

    Raises:
        InternalFailure: an edit was not offered every token in its scope exactly once.
    """
    if not steering.edits:
        return None
    _check(steering, counts, read, special_ids)
    pairs = zip(steering.edits, counts, strict=True)
    return Receipt(
        model_digest=model_digest,
        steering_digest=steering.digest,
        interventions=tuple(_one(edit, count, saes[edit.sae]) for edit, count in pairs),
        forward_passes=forward_passes,
    )


def _check(steering: Steering, counts: Sequence[Counts], read: Sequence[int], special_ids: frozenset[int]) -> None:
    special_at = [position for position, token in enumerate(read) if token in special_ids]
    for edit, count in zip(steering.edits, counts, strict=True):
        wanted = _in_scope(edit, len(read), special_at)
        if count.eligible != wanted:
            raise InternalFailure(
                f"{edit.kind} of feature {edit.feature} of {edit.sae!r} was applied to {count.eligible} tokens "
                f"instead of {wanted}"
            )


def _in_scope(edit: ResolvedEdit, length: int, special_at: list[int]) -> int:
    first, last = min(edit.first, length), min(edit.last, length)
    skipped = 0 if edit.special else bisect_left(special_at, last) - bisect_left(special_at, first)
    return last - first - skipped


def _one(edit: ResolvedEdit, count: Counts, sae: LoadedSae) -> InterventionReceipt:
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
    )

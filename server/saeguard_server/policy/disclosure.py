"""What a caller is told of features and policies: which features are withheld, and of a receipt what its roles open."""

from __future__ import annotations

import hmac
import secrets
from array import array
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import numpy as np

from saeguard.requests import ActivationRequest, GenerateRequest, Selection, TopKSelection
from saeguard.results import ActivationPart, Completion, InterventionReceipt, Receipt, TriggerReceipt
from saeguard.types import FeatureRef
from saeguard_server.admission import named_features
from saeguard_server.caller import Caller, Role
from saeguard_server.engine.protocol import CompiledCondition, CompiledEdit, Steering
from saeguard_server.errors import PolicyRefusal
from saeguard_server.policy.resolve import acts_on
from saeguard_server.policy.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Withheld:
    """Features of whose values a caller is told nothing, by the policy that withholds them."""

    by_policy: tuple[tuple[str, frozenset[FeatureRef]], ...] = ()

    def policy(self, ref: FeatureRef) -> str | None:
        return next((name for name, refs in self.by_policy if ref in refs), None)

    def of_sae(self, sae: str) -> tuple[int, ...]:
        return tuple(sorted({ref.feature for _, refs in self.by_policy for ref in refs if ref.sae == sae}))


NOTHING_WITHHELD: Final = Withheld()


def withheld_from(caller: Caller, snapshot: Snapshot, now: datetime) -> Withheld:
    """What enforced policies aimed at the caller withhold, whatever the share of their rollout.

    Nothing is withheld from those with the role policy-read.
    """
    if caller.may(Role.POLICY_READ):
        return NOTHING_WITHHELD
    model = snapshot.engine.model.name
    withheld = snapshot.withheld.items()
    return Withheld(tuple(item for item in withheld if acts_on(snapshot.policies[item[0]], caller, model, now)))


def check_withheld(request: GenerateRequest | ActivationRequest, withheld: Withheld) -> None:
    """Raises PolicyRefusal: a feature that is withheld is edited, watched, read by name or in a condition."""
    for field, ref in named_features(request) if withheld.by_policy else ():
        if (policy := withheld.policy(ref)) is not None:
            raise PolicyRefusal(field, f"feature {ref.feature} of {ref.sae!r} is withheld", policy=policy)


# --- activations


def widened(selection: Selection, hidden: int) -> Selection:
    """The selection with room for so many features that will be left out of it."""
    return TopKSelection(selection.k + hidden) if isinstance(selection, TopKSelection) else selection


def without_withheld(part: ActivationPart, hidden: tuple[int, ...], selection: Selection) -> ActivationPart:
    """What was selected, ``widened``, without the features ``hidden`` of its SAE; the part says which those are."""
    if not hidden:
        return part
    indptr, indices, values = (np.asarray(column) for column in (part.indptr, part.indices, part.values))
    keep = ~np.isin(indices, np.array(hidden))
    if isinstance(selection, TopKSelection):
        rank = np.cumsum(keep)
        before = np.concatenate(([0], rank))[indptr[:-1]]
        keep &= rank - np.repeat(before, np.diff(indptr)) <= selection.k
    ends = np.concatenate(([0], np.cumsum(keep)))[indptr]
    return replace(
        part,
        indptr=array("q", ends.astype(np.int64).tobytes()),
        indices=array("I", indices[keep].tobytes()),
        values=array("f", values[keep].tobytes()),
        withheld=hidden,
    )


# --- receipts


class Disclosure:
    """Completions as their callers may see them. What was measured of features is for those with the role observe."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, completion: Completion, caller: Caller, steering: Steering, withheld: Withheld) -> Completion:
        """The completion without what the caller may not know; ``steering`` is what was applied to it."""
        if caller.may(Role.OBSERVE) and caller.may(Role.POLICY_READ):
            return completion
        receipt, policy = completion.receipt, completion.policy
        if policy is not None and not caller.may(Role.POLICY_READ):
            policy = replace(policy, shadowed=())
        if receipt is not None:
            hidden = _Hidden(caller, steering, withheld)
            receipt = self._receipt(receipt, caller, steering, hidden)
        return replace(completion, receipt=receipt, policy=policy)

    def _receipt(self, receipt: Receipt, caller: Caller, steering: Steering, hidden: _Hidden) -> Receipt | None:
        reads_policies = caller.may(Role.POLICY_READ)
        triggers = [condition for condition in steering.conditions if condition.is_trigger]
        interventions = tuple(
            _unmeasured(entry) if hidden.holds_edit(edit) else entry
            for entry, edit in zip(receipt.interventions, steering.edits, strict=True)
            if reads_policies or not entry.is_shadow
        )
        conditions = tuple(
            _undecided(entry) if hidden.holds(condition) else entry
            for entry, condition in zip(receipt.triggers, triggers, strict=True)
            if reads_policies or not entry.is_shadow
        )
        if not interventions and not conditions:
            return None
        digest = receipt.steering_digest if reads_policies else steering.open_digest
        parts: list[CompiledEdit | CompiledCondition] = [*steering.edits, *steering.conditions]
        if not reads_policies and any(part.origin.policy and not part.is_shadow for part in parts):
            # Of a rule all but its value is known: whoever had its digest could try values until they fit.
            digest = hmac.new(self._key, digest.encode(), "sha256").hexdigest()
        return replace(receipt, steering_digest=digest, interventions=interventions, triggers=conditions)


class _Hidden:
    """Whether an edit or condition tells of values that the caller may not know."""

    def __init__(self, caller: Caller, steering: Steering, withheld: Withheld) -> None:
        self._is_all, self._steering, self._withheld = not caller.may(Role.OBSERVE), steering, withheld

    def holds(self, condition: CompiledCondition) -> bool:
        return self._is_all or any(map(self._withheld.policy, (FeatureRef(*term[:2]) for term in condition.terms)))

    def holds_edit(self, edit: CompiledEdit) -> bool:
        number = edit.condition_number
        depends = number is not None and self.holds(self._steering.conditions[number])
        return self._is_all or depends or self._withheld.policy(edit.ref) is not None


def _unmeasured(entry: InterventionReceipt) -> InterventionReceipt:
    return replace(
        entry, tokens_edited=None, mean_activation=None, max_activation=None, mean_relative_edit=None,
        tokens_capped=None,
    )  # fmt: skip


def _undecided(entry: TriggerReceipt) -> TriggerReceipt:
    return replace(entry, tokens_on=None, first_position=None)

"""Whether a reply's receipt tells of all that was asked for: nobody should find out later that a text was unsteered."""

from __future__ import annotations

from collections.abc import Iterable

from saeguard_client._errors import receipt_mismatch
from saeguard_client.interventions import Intervention
from saeguard_client.results import Completion, Receipt
from saeguard_client.triggers import Apply, Trigger


def check(
    done: Completion, steer: Iterable[Intervention], triggers: Iterable[Trigger], policies: Iterable[str]
) -> None:
    """Whether ``done`` accounts for the edits, triggers and policies that were asked for.

    Raises:
        ReceiptMismatch: something is missing, or the receipt contradicts the rest of the reply.
    """
    edits, rules = tuple(steer), tuple(triggers)
    facts = done.policy
    for name in policies:
        if facts is None or name not in (*facts.enforced, *facts.shadowed):
            raise receipt_mismatch(f"the policy {name!r} was asked for and not applied")
    if done.receipt is None:
        if edits or rules:
            raise receipt_mismatch("it has no receipt")
        if facts is not None and done.stopped_by is not None:
            raise receipt_mismatch("a trigger ended it and it has no receipt")
        return
    _check_edits(done.receipt, [*edits, *_applied(rules)])
    _check_triggers(done, done.receipt, rules)
    told = [one.policy for one in done.receipt.interventions] + [one.policy for one in done.receipt.triggers]
    for name in filter(None, told):
        if facts is None or name not in (*facts.enforced, *facts.shadowed):
            raise receipt_mismatch(f"the receipt tells of a policy {name!r} that was not in force")


def _applied(triggers: Iterable[Trigger]) -> list[Intervention]:
    return [edit for one in triggers if isinstance(one.action, Apply) for edit in one.action.interventions]


def _check_edits(receipt: Receipt, wanted: Iterable[Intervention]) -> None:
    """An edit of a feature that a policy edits too is told of by the policy's rule."""
    made = [one for one in receipt.interventions if not one.is_shadow]
    own = {(one.sae, one.feature, one.kind) for one in made if not one.policy}
    by_policy = {(one.sae, one.feature) for one in made if one.policy}
    for edit in wanted:
        if (edit.sae, edit.feature, edit.kind) not in own and (edit.sae, edit.feature) not in by_policy:
            raise receipt_mismatch(f"the receipt does not tell of {edit.kind} of {edit.sae}:{edit.feature}")


def _check_triggers(done: Completion, receipt: Receipt, wanted: Iterable[Trigger]) -> None:
    told = {(one.policy, one.name): one for one in receipt.triggers}
    for trigger in wanted:
        if ("", trigger.name) not in told:
            raise receipt_mismatch(f"the receipt does not tell of the trigger {trigger.name!r}")
    if (done.finish_reason == "feature") != (done.stopped_by is not None):
        raise receipt_mismatch(f"its finish reason is {done.finish_reason!r}, and stopped_by {done.stopped_by}")
    if done.stopped_by is not None:
        one = told.get((done.stopped_by.policy, done.stopped_by.name))
        if one is None or one.is_shadow or one.first_position is None:
            raise receipt_mismatch(f"the receipt does not tell that {done.stopped_by.name!r} fired")

"""A policy's rules and triggers ready to be made, so that no request pays for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from saeguard_server.guard.policy.model import Policy
from saeguard_server.guard.policy.served import EditPart, Served, TriggerPart
from saeguard_server.guard.policy.weakening import Effect, Where
from saeguard_server.interventions import Apply, FeatureRef, Flag, Intervention, Origin, Trigger, Wanted, WantedTrigger


@dataclass(frozen=True, slots=True, eq=False)
class ReadyEdit:
    """One edit, what it does in raw units, and where."""

    wanted: Wanted
    part: EditPart
    effect: Effect
    where: Where
    members: tuple[ReadyEdit, ...] = ()
    """The rules that it was combined from, where it was."""

    @classmethod
    def of(cls, wanted: Wanted, part: EditPart, *, is_triggered: bool = False) -> ReadyEdit:
        """What somebody wants, as it was prepared."""
        one = wanted.intervention
        effect = Effect.of(one.edit.kind, part.affine)
        return cls(wanted, part, effect, Where(one.scope, one.when, is_triggered))

    @property
    def target(self) -> FeatureRef:
        """What is edited."""
        return self.wanted.intervention.target

    @property
    def origin(self) -> Origin:
        """Who wants it."""
        return self.wanted.origin

    @property
    def rules(self) -> tuple[ReadyEdit, ...]:
        """The rules that it stands for."""
        return self.members or (self,)


@dataclass(frozen=True, slots=True, eq=False)
class ReadyTrigger:
    """One trigger with its edits."""

    wanted: WantedTrigger
    part: TriggerPart
    edits: tuple[ReadyEdit, ...]

    @classmethod
    def of(cls, wanted: WantedTrigger, part: TriggerPart) -> ReadyTrigger:
        """What somebody wants, as it was prepared."""
        made = zip(applied(wanted.trigger), part.edits, strict=True)
        edits = (
            ReadyEdit.of(
                Wanted(
                    intervention=one,
                    field=f"{wanted.field}.apply.interventions[{index}]",
                    origin=wanted.origin,
                    is_shadow=wanted.is_shadow,
                    is_limited=wanted.is_limited,
                ),
                edit,
                is_triggered=True,
            )
            for index, (one, edit) in enumerate(made)
        )
        return cls(wanted, part, tuple(edits))

    def without(self, dropped: set[int], served: Served) -> ReadyTrigger:
        """The trigger without some of its edits; it only flags where none is left."""
        if not dropped:
            return self
        trigger = self.wanted.trigger
        left = tuple(one for index, one in enumerate(applied(trigger)) if index not in dropped)
        wanted = replace(self.wanted, trigger=replace(trigger, action=Apply(left) if left else Flag()))
        return ReadyTrigger.of(wanted, served.trigger(wanted))


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPolicy:
    """A policy with everything that it may do to a request."""

    policy: Policy
    edits: tuple[ReadyEdit, ...]
    triggers: tuple[ReadyTrigger, ...]


def applied(trigger: Trigger) -> tuple[Intervention, ...]:
    """The edits that a trigger makes."""
    return trigger.action.interventions if isinstance(trigger.action, Apply) else ()


def wanted_rules(policy: Policy) -> Iterator[Wanted]:
    """What the policy's rules want."""
    for index, rule in enumerate(policy.rules):
        yield Wanted(
            intervention=rule.intervention,
            field=f"rules[{index}]",
            origin=Origin(policy.name, rule.name),
            is_shadow=policy.mode == "shadow",
            is_limited=False,
        )


def wanted_triggers(policy: Policy) -> Iterator[WantedTrigger]:
    """What the policy's triggers want."""
    for index, trigger in enumerate(policy.triggers):
        yield WantedTrigger(
            trigger=trigger,
            field=f"triggers[{index}]",
            origin=Origin(policy.name, trigger.name),
            is_shadow=policy.mode == "shadow",
            is_limited=False,
        )


def prepare(policy: Policy, served: Served) -> ReadyPolicy:
    """The policy, as the engine can make it.

    Raises:
        UnknownName, InvalidRequest: a field that cannot be applied here.
    """
    return ReadyPolicy(
        policy,
        tuple(ReadyEdit.of(one, served.edit(one)) for one in wanted_rules(policy)),
        tuple(ReadyTrigger.of(one, served.trigger(one)) for one in wanted_triggers(policy)),
    )

"""A policy's rules and triggers ready to be made, so that no request pays for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import combinations
from typing import TypeAlias

from saeguard.catalog import Activation
from saeguard.results import PolicyFacts
from saeguard.types import Apply, FeatureRef, Flag, Intervention, Trigger
from saeguard_server.engine.protocol import Origin
from saeguard_server.errors import PolicyRefusal
from saeguard_server.policy.model import Policy, PolicyLimits
from saeguard_server.policy.tighten import NOTHING, Effect, Where, contains, meets, relation, strictness, tightened
from saeguard_server.steering import EditPart, Served, TriggerPart, Wanted, WantedTrigger


@dataclass(frozen=True, slots=True, eq=False)
class CompiledRule:
    """One edit, what it does in raw units, and where."""

    wanted: Wanted
    part: EditPart
    effect: Effect
    where: Where
    members: tuple[CompiledRule, ...] = ()
    """The rules that it was combined from, where it was."""

    @classmethod
    def of(cls, wanted: Wanted, part: EditPart, *, is_triggered: bool = False) -> CompiledRule:
        """What somebody wants, as it was prepared."""
        one = wanted.intervention
        effect = Effect.of(one.kind, part.affine)
        return cls(wanted, part, effect, Where(one.scope, one.when, is_triggered))

    @property
    def target(self) -> FeatureRef:
        """What is edited."""
        return self.wanted.intervention.ref

    @property
    def origin(self) -> Origin:
        """Who wants it."""
        return self.wanted.origin

    @property
    def rules(self) -> tuple[CompiledRule, ...]:
        """The rules that it stands for."""
        return self.members or (self,)


@dataclass(frozen=True, slots=True, eq=False)
class CompiledTrigger:
    """One trigger with its edits."""

    wanted: WantedTrigger
    part: TriggerPart
    edits: tuple[CompiledRule, ...]

    @classmethod
    def of(cls, wanted: WantedTrigger, part: TriggerPart) -> CompiledTrigger:
        """What somebody wants, as it was prepared."""
        made = zip(trigger_edits(wanted.trigger), part.edits, strict=True)
        edits = (
            CompiledRule.of(
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

    def without(self, dropped: set[int], served: Served) -> CompiledTrigger:
        """The trigger without some of its edits; it only flags where none is left."""
        if not dropped:
            return self
        trigger = self.wanted.trigger
        left = tuple(one for index, one in enumerate(trigger_edits(trigger)) if index not in dropped)
        wanted = replace(self.wanted, trigger=replace(trigger, action=Apply(left) if left else Flag()))
        return CompiledTrigger.of(wanted, served.trigger(wanted))


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPolicy:
    """A policy with everything that it may do to a request."""

    policy: Policy
    edits: tuple[CompiledRule, ...]
    triggers: tuple[CompiledTrigger, ...]


def trigger_edits(trigger: Trigger) -> Sequence[Intervention]:
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


def compile_policy(policy: Policy, served: Served) -> CompiledPolicy:
    """The policy, as the engine can make it.

    Raises:
        UnknownName, InvalidRequest: a field that cannot be applied here.
    """
    return CompiledPolicy(
        policy,
        tuple(CompiledRule.of(one, served.edit(one)) for one in wanted_rules(policy)),
        tuple(CompiledTrigger.of(one, served.trigger(one)) for one in wanted_triggers(policy)),
    )


# The rules of several policies on one request, and a request's own edits beside them, without weakening any rule.


WEAKENS = "it would weaken what the rule does"
ELSEWHERE = "an edit of that feature must have the rule's scope and condition"


class Clash(ValueError):
    """Two rules on one feature that cannot both be kept."""

    def __init__(self, one: CompiledRule, other: CompiledRule) -> None:
        first, second = one.origin, other.origin
        where = f"feature {one.target.feature} of {one.target.sae!r}"
        super().__init__(
            f"{where}: rule {first.rule!r} of policy {first.policy!r} and rule {second.rule!r} of policy "
            f"{second.policy!r} cannot both be kept"
        )
        self.one, self.other = one, other


@dataclass(frozen=True, slots=True)
class Combined:
    """What is enforced on one request: at most one edit of each feature on each token."""

    edits: tuple[CompiledRule, ...]
    triggers: tuple[CompiledTrigger, ...]
    by_feature: dict[FeatureRef, tuple[CompiledRule, ...]]
    """Every edit of a feature, those of triggers too."""


def combine(edits: Sequence[CompiledRule], triggers: Sequence[CompiledTrigger], served: Served) -> Combined:
    """Puts rules together; each is kept, whoever wrote it.

    Raises:
        Clash: two cannot be kept together.
    """
    on_feature: dict[FeatureRef, list[CompiledRule]] = {}
    for one in edits:
        on_feature.setdefault(one.target, []).append(one)
    by_feature = {target: _combined(rules, served) for target, rules in on_feature.items()}
    kept = tuple(_trigger_beside(by_feature, one, served) for one in triggers)
    made = tuple(one for rules in by_feature.values() for one in rules)
    for trigger in kept:
        for one in trigger.edits:
            before = by_feature.setdefault(one.target, ())
            _check_apart(one, before)
            by_feature[one.target] = (*before, one)
    return Combined(made, kept, by_feature)


def clash_of(one: CompiledRule, other: CompiledRule) -> Clash | None:
    """Why two rules of one feature cannot be kept together, if they cannot."""
    if relation(one.where, other.where) == "apart" or _is_absorbed(one, other) or _is_absorbed(other, one):
        return None
    if relation(one.where, other.where) == "same":
        first, then = sorted((one.effect, other.effect), key=strictness)
        if tightened(first, then) is not None:
            return None
    return Clash(one, other)


def tighten(
    rules: Iterable[CompiledRule], asked: CompiledRule, served: Served
) -> tuple[CompiledRule, CompiledRule | None] | None:
    """What becomes of a request's own edit where rules edit its feature: the rule and what takes its place.

    Returns:
        None where no rule is on its tokens: it is made beside them. A pair without a second where the rule alone does
        what was asked already.

    Raises:
        PolicyRefusal: it would weaken a rule; the field, policy and rule are named.
    """
    for rule in rules:
        if relation(rule.where, asked.where) == "apart":
            continue
        if _is_absorbed(rule, asked):
            return rule, None
        if relation(rule.where, asked.where) != "same":
            raise _refusal(asked, rule, _field_elsewhere(rule.where, asked.where), ELSEWHERE)
        effect = tightened(rule.effect, asked.effect)
        if effect is None:
            raise _refusal(asked, _refusing(rule, asked), asked.wanted.intervention.kind, WEAKENS)
        return rule, rule if effect == rule.effect else _made(rule, effect, served)
    return None


def _combined(rules: list[CompiledRule], served: Served) -> tuple[CompiledRule, ...]:
    """At most one edit for each group of tokens.

    Raises:
        Clash: two cannot be kept together.
    """
    if len(rules) == 1:
        return tuple(rules)
    groups: dict[Where, list[CompiledRule]] = {}
    for rule in rules:
        groups.setdefault(rule.where, []).append(rule)
    folded = [_folded(group, served) for group in groups.values()]
    absorbed: set[int] = set()
    for one, other in combinations(range(len(folded)), 2):
        outer, inner = folded[one], folded[other]
        if relation(outer.where, inner.where) == "apart":
            continue
        if _absorbs(outer, inner):
            absorbed.add(other)
        elif _absorbs(inner, outer):
            absorbed.add(one)
        else:
            raise Clash(outer.rules[-1], inner.rules[-1])
    return tuple(one for index, one in enumerate(folded) if index not in absorbed)


def _folded(group: list[CompiledRule], served: Served) -> CompiledRule:
    """One edit that counts as the strictest rule's: the last one that made a difference."""
    if len(group) == 1:
        return group[0]
    ordered = sorted(group, key=lambda rule: strictness(rule.effect))
    effect, strictest = NOTHING, ordered[0]
    for index, rule in enumerate(ordered):
        both = tightened(effect, rule.effect)
        if both is None:
            # What refuses it is one of those before: which bounds or map it met does not matter.
            before = next((one for one in ordered[:index] if tightened(one.effect, rule.effect) is None), ordered[0])
            raise Clash(before, rule)
        if both != effect:
            effect, strictest = both, rule
    return replace(_made(strictest, effect, served), members=tuple(ordered))


def _absorbs(outer: CompiledRule, inner: CompiledRule) -> bool:
    return all(_is_absorbed(outer, rule) for rule in inner.rules)


def _is_absorbed(rule: CompiledRule, asked: CompiledRule) -> bool:
    """Whether the rule alone does, wherever ``asked`` would be made, what it asks."""
    return relation(rule.where, asked.where) in ("within", "same") and meets(rule.effect, asked.effect)


def _trigger_beside(
    by_feature: dict[FeatureRef, tuple[CompiledRule, ...]], trigger: CompiledTrigger, served: Served
) -> CompiledTrigger:
    """A trigger without those edits that rules make anyway."""
    dropped = {
        index
        for index, one in enumerate(trigger.edits)
        if any(_is_absorbed(rule, one) for rule in by_feature.get(one.target, ()))
    }
    return trigger.without(dropped, served)


def _check_apart(one: CompiledRule, others: Iterable[CompiledRule]) -> None:
    for other in others:
        if relation(other.where, one.where) != "apart":
            raise Clash(other.rules[-1], one)


def _made(rule: CompiledRule, effect: Effect, served: Served) -> CompiledRule:
    """The rule's edit with another effect. It counts as the rule's."""
    one = rule.wanted.intervention
    edit = effect.edit_of(one)
    wanted = replace(rule.wanted, intervention=edit, affine=effect.affine)
    return replace(rule, wanted=wanted, part=served.edit(wanted), effect=effect)


def _refusing(rule: CompiledRule, asked: CompiledRule) -> CompiledRule:
    """Of the rules that were combined, one that does not allow it."""
    return next((one for one in rule.rules if tightened(one.effect, asked.effect) is None), rule.rules[-1])


def _field_elsewhere(rule: Where, asked: Where) -> str:
    return "when" if rule.scope == asked.scope or contains(rule.scope, asked.scope) else "scope"


def _refusal(asked: CompiledRule, rule: CompiledRule, field: str, why: str) -> PolicyRefusal:
    named = rule.rules[-1].origin
    return PolicyRefusal(f"{asked.wanted.field}.{field}", why, policy=named.policy, rule=named.rule)


# Which policies are on a request, and what they come to together: worked out once for each set of them.


Selection: TypeAlias = tuple[str, ...]
"""Names of policies, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """Several policies as one."""

    enforced: Combined
    edits: tuple[EditPart, ...]
    """Of a request without its own: what is enforced, then what is only counted."""
    triggers: tuple[TriggerPart, ...]
    """In the same order."""
    shadow_edits: tuple[EditPart, ...]
    shadow_triggers: tuple[TriggerPart, ...]
    limits: tuple[tuple[str, PolicyLimits], ...]
    """What each enforced policy lets callers do, by the policy's name; those without limits are left out."""
    max_relative_edit: float | None
    """The smallest of them."""
    facts: PolicyFacts
    requires_audit: bool
    counterfactual: tuple[tuple[str, float], ...]
    """Policies to be measured, and on which share of the requests."""


def select_policies(
    names: Selection, ready: Mapping[str, CompiledPolicy], activation: Activation, served: Served
) -> Selected:
    """The rules of these policies together.

    Raises:
        Clash: two cannot be kept together. A revision with such two is refused when it is written, unless only a
            request's own ``policies`` can bring them together.
    """
    chosen = [ready[name] for name in names]
    enforcing = [one for one in chosen if one.policy.mode == "enforce"]
    shadows = [one for one in chosen if one.policy.mode == "shadow"]
    enforced = combine(
        [edit for one in enforcing for edit in one.edits],
        [trigger for one in enforcing for trigger in one.triggers],
        served,
    )
    shadow_edits = tuple(edit.part for one in shadows for edit in one.edits)
    shadow_triggers = tuple(trigger.part for one in shadows for trigger in one.triggers)
    limits = tuple((one.policy.name, one.policy.limits) for one in enforcing if one.policy.limits != PolicyLimits())
    return Selected(
        enforced=enforced,
        edits=(*(one.part for one in enforced.edits), *shadow_edits),
        triggers=(*(one.part for one in enforced.triggers), *shadow_triggers),
        shadow_edits=shadow_edits,
        shadow_triggers=shadow_triggers,
        limits=limits,
        max_relative_edit=smallest(one.max_relative_edit for _, one in limits),
        facts=PolicyFacts(
            activation=activation.number,
            revision=activation.revision,
            enforced=tuple(one.policy.name for one in enforcing),
            shadowed=tuple(one.policy.name for one in shadows),
        ),
        requires_audit=any(one.policy.requires_audit for one in chosen),
        counterfactual=tuple(
            (one.policy.name, one.policy.counterfactual_share) for one in enforcing if one.policy.counterfactual_share
        ),
    )


def smallest(limits: Iterable[float | None]) -> float | None:
    """The smallest limit that is one."""
    return min((one for one in limits if one is not None), default=None)


# Which requests a share holds: by a stable hash, so that replicas agree and a share that grows keeps everyone.


_BYTES = 8


def rollout_position(policy: str, by: str, key: str) -> float:
    """Where a caller or conversation stands in a policy's rollout, in [0, 1): in the share exactly if below it."""
    digest = blake2b(f"{policy}\0{by}\0{key}".encode(errors="surrogatepass"), digest_size=_BYTES).digest()
    # The 53 bits that a float holds: rounding all 64 could give 1.
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def is_chosen(policy: Policy, caller: str, conversation: str) -> bool:
    """Whether the policy's rollout holds a request."""
    share = policy.rollout.share
    if share in (0.0, 1.0):
        return share == 1.0
    if policy.rollout.by == "conversation" and conversation:
        return rollout_position(policy.name, "conversation", conversation) < share
    return rollout_position(policy.name, "caller", caller) < share

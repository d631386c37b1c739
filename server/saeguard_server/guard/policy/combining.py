"""The rules of several policies on one request, and a request's own edits beside them, without weakening any rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from saeguard_server.errors import PolicyRefusal
from saeguard_server.guard.policy.prepared import ReadyEdit, ReadyTrigger
from saeguard_server.guard.policy.served import Served
from saeguard_server.guard.policy.weakening import (
    NOTHING,
    Effect,
    Where,
    contains,
    meets,
    relation,
    strictness,
    tightened,
)
from saeguard_server.interventions import FeatureRef, Intervention

WEAKENS = "it would weaken what the rule does"
ELSEWHERE = "an edit of that feature must have the rule's scope and condition"


class Clash(ValueError):
    """Two rules on one feature that cannot both be kept."""

    def __init__(self, one: ReadyEdit, other: ReadyEdit) -> None:
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

    edits: tuple[ReadyEdit, ...]
    triggers: tuple[ReadyTrigger, ...]
    by_feature: dict[FeatureRef, tuple[ReadyEdit, ...]]
    """Every edit of a feature, those of triggers too."""


def combine(edits: Sequence[ReadyEdit], triggers: Sequence[ReadyTrigger], served: Served) -> Combined:
    """Puts rules together; each is kept, whoever wrote it.

    Raises:
        Clash: two cannot be kept together.
    """
    on_feature: dict[FeatureRef, list[ReadyEdit]] = {}
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


def clash_of(one: ReadyEdit, other: ReadyEdit) -> Clash | None:
    """Why two rules of one feature cannot be kept together, if they cannot."""
    if relation(one.where, other.where) == "apart" or _is_absorbed(one, other) or _is_absorbed(other, one):
        return None
    if relation(one.where, other.where) == "same":
        first, then = sorted((one.effect, other.effect), key=strictness)
        if tightened(first, then) is not None:
            return None
    return Clash(one, other)


def tighten(rules: Iterable[ReadyEdit], asked: ReadyEdit, served: Served) -> tuple[ReadyEdit, ReadyEdit | None] | None:
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
            raise _refusal(asked, _refusing(rule, asked), asked.wanted.intervention.edit.kind, WEAKENS)
        return rule, rule if effect == rule.effect else _made(rule, effect, served)
    return None


def _combined(rules: list[ReadyEdit], served: Served) -> tuple[ReadyEdit, ...]:
    """At most one edit for each group of tokens.

    Raises:
        Clash: two cannot be kept together.
    """
    if len(rules) == 1:
        return tuple(rules)
    groups: dict[Where, list[ReadyEdit]] = {}
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


def _folded(group: list[ReadyEdit], served: Served) -> ReadyEdit:
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


def _absorbs(outer: ReadyEdit, inner: ReadyEdit) -> bool:
    return all(_is_absorbed(outer, rule) for rule in inner.rules)


def _is_absorbed(rule: ReadyEdit, asked: ReadyEdit) -> bool:
    """Whether the rule alone does, wherever ``asked`` would be made, what it asks."""
    return relation(rule.where, asked.where) in ("within", "same") and meets(rule.effect, asked.effect)


def _trigger_beside(
    by_feature: dict[FeatureRef, tuple[ReadyEdit, ...]], trigger: ReadyTrigger, served: Served
) -> ReadyTrigger:
    """A trigger without those edits that rules make anyway."""
    dropped = {
        index
        for index, one in enumerate(trigger.edits)
        if any(_is_absorbed(rule, one) for rule in by_feature.get(one.target, ()))
    }
    return trigger.without(dropped, served)


def _check_apart(one: ReadyEdit, others: Iterable[ReadyEdit]) -> None:
    for other in others:
        if relation(other.where, one.where) != "apart":
            raise Clash(other.rules[-1], one)


def _made(rule: ReadyEdit, effect: Effect, served: Served) -> ReadyEdit:
    """The rule's edit with another effect. It counts as the rule's."""
    one = rule.wanted.intervention
    edit = Intervention(one.target, effect.edit, one.scope, one.when)
    wanted = replace(rule.wanted, intervention=edit, affine=effect.affine)
    return replace(rule, wanted=wanted, part=served.edit(wanted), effect=effect)


def _refusing(rule: ReadyEdit, asked: ReadyEdit) -> ReadyEdit:
    """Of the rules that were combined, one that does not allow it."""
    return next((one for one in rule.rules if tightened(one.effect, asked.effect) is None), rule.rules[-1])


def _field_elsewhere(rule: Where, asked: Where) -> str:
    return "when" if rule.scope == asked.scope or contains(rule.scope, asked.scope) else "scope"


def _refusal(asked: ReadyEdit, rule: ReadyEdit, field: str, why: str) -> PolicyRefusal:
    named = rule.rules[-1].origin
    return PolicyRefusal(f"{asked.wanted.field}.{field}", why, policy=named.policy, rule=named.rule)

"""Any policy that can exist, and short ways to write one."""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

from saeguard_sae.edits import UNITS, Add, Cap, Clamp, Edit, Floor, Scale, Zero
from saeguard_server.interventions import (
    COMPARISONS,
    PHASES,
    Apply,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Scope,
    Stop,
    Term,
    Trigger,
    Window,
)
from saeguard_server.policy.model import Limits, Pins, Policy, Rollout, Rule, Target

NOW = datetime(2026, 11, 27, tzinfo=UTC)

numbers = st.floats(-1e30, 1e30, allow_nan=False).map(lambda value: value + 0.0)
"""Without a negative zero, which equals the other one and is written differently."""
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
refs = st.builds(FeatureRef, texts, st.integers(0, 10**6))


def _scope(phase: Any, start: int, length: int | None, special: bool) -> Scope:
    return Scope(phase, start, None if length is None else start + length, special)


scopes = st.builds(_scope, st.sampled_from(PHASES), st.integers(0, 99), st.none() | st.integers(1, 99), st.booleans())
valued = [st.builds(kind, numbers, st.sampled_from(UNITS)) for kind in (Clamp, Add, Cap, Floor)]
edits: st.SearchStrategy[Edit] = st.one_of(st.just(Zero()), st.builds(Scale, numbers), *valued)
windows = st.one_of(
    st.sampled_from([Window(), Window("any_so_far"), Window("maximum")]),
    st.integers(1, 128).map(lambda tokens: Window("rolling_mean", tokens)),
    st.integers(1, 128).flatmap(lambda n: st.integers(1, n).map(lambda k: Window("k_of_n", n, k))),
)


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    """A condition of any form."""
    found = draw(st.lists(refs, min_size=1, max_size=3, unique=True))
    is_plain = len(found) == 1 and draw(st.booleans())
    weights = st.just(1.0) if is_plain else numbers.filter(bool)
    window, threshold, comparison = draw(windows), draw(numbers), draw(st.sampled_from(COMPARISONS))
    has_release = window.kind not in ("any_so_far", "k_of_n") and draw(st.booleans())
    distance = draw(st.floats(0, 1e3)) * (-1 if comparison in ("above", "at_least") else 1)
    return Condition(
        terms=tuple(Term(ref, draw(weights)) for ref in found),
        threshold=threshold,
        comparison=comparison,
        bias=0.0 if is_plain else draw(numbers),
        release=threshold + distance if has_release else None,
        unit=draw(st.sampled_from(UNITS)) if is_plain else "raw",
        window=window,
        scope=draw(scopes),
    )


plain_edits = st.builds(Intervention, refs, edits, scopes)
interventions = st.builds(Intervention, refs, edits, scopes, st.none() | conditions())
applies = st.lists(plain_edits, min_size=1, max_size=2).map(lambda found: Apply(tuple(found)))
actions = st.just(Flag()) | st.just(Stop()) | applies
some_texts = st.lists(texts, max_size=2).map(tuple)


def _time(seconds: int, hours: int) -> datetime:
    return datetime.fromtimestamp(seconds, timezone(timedelta(hours=hours)))


times = st.builds(_time, st.integers(0, 4 * 10**9), st.integers(-12, 12))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A policy of any form."""
    own = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    cut = draw(st.integers(0, len(own)))
    targets = draw(st.lists(interventions, min_size=cut, max_size=cut, unique_by=lambda one: one.target))
    pinned = draw(st.dictionaries(texts, texts, max_size=2))
    return Policy(
        name=draw(names),
        mode=draw(st.sampled_from(["off", "shadow", "enforce"])),
        description=draw(texts | st.just("")),
        owner=draw(texts | st.just("")),
        target=Target(callers=draw(some_texts), tags=draw(some_texts), models=draw(some_texts)),
        rollout=Rollout(share=draw(st.floats(0, 1)) + 0.0, by=draw(st.sampled_from(["caller", "conversation"]))),
        rules=tuple(Rule(name, one) for name, one in zip(own[:cut], targets, strict=True)),
        triggers=tuple(Trigger(name, draw(conditions()), draw(actions)) for name in own[cut:]),
        limits=Limits(
            max_relative_edit=draw(st.none() | st.floats(1e-6, 1e6)),
            allowed_saes=draw(st.none() | some_texts),
            denied_saes=draw(some_texts),
            allowed_features=draw(st.none() | st.lists(refs, max_size=2).map(tuple)),
            denied_features=tuple(draw(st.lists(refs, max_size=2))),
        ),
        pins=Pins(model=draw(st.none() | texts), saes=tuple(sorted(pinned.items()))),
        expires=draw(st.none() | times),
        counterfactual_share=draw(st.floats(0, 1)) + 0.0,
        requires_audit=draw(st.booleans()),
    )


def rule(name: str, edit: Edit, feature: int = 2, sae: str = "mid", **more: Any) -> Rule:
    """An edit of a feature that the fake engine's SAE has."""
    return Rule(name, Intervention(FeatureRef(sae, feature), edit, **more))


def policy(name: str, *rules: Rule, **more: Any) -> Policy:
    """One that is enforced."""
    return Policy(name=name, rules=rules, **{"mode": "enforce", "owner": "safety", **more})


def when(feature: int = 5, above: float = 1.0, sae: str = "mid", **more: Any) -> Condition:
    """A condition on one feature."""
    return Condition(terms=(Term(FeatureRef(sae, feature)),), threshold=above, **more)

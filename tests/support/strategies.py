"""Requests and policies of every shape, for property tests."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from saeguard_sae.edits import FLOAT32_MAX, KINDS, UNITS, Edit
from saeguard_server import interventions as rules
from saeguard_server import request as domain
from saeguard_server.policy import model as policy
from saeguard_server.settings import LimitSettings

LIMITS = LimitSettings()

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
some_words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
numbers = st.integers(0, 2**32 - 1)
values = st.floats(-FLOAT32_MAX, FLOAT32_MAX)
refs = st.builds(rules.FeatureRef, some_words, numbers)


def edits() -> st.SearchStrategy[Edit]:
    arguments = {"value": values, "factor": values, "unit": st.sampled_from(UNITS)}
    return st.one_of(
        [st.builds(kind, **{one.name: arguments[one.name] for one in fields(kind)}) for kind in KINDS.values()]
    )


@st.composite
def scopes(draw: st.DrawFn) -> rules.Scope:
    start = draw(st.integers(0, 2**32 - 2))
    end = draw(st.none() | st.integers(start + 1, 2**32 - 1))
    return rules.Scope(draw(st.sampled_from(rules.PHASES)), start, end, draw(st.booleans()))


@st.composite
def windows(draw: st.DrawFn) -> rules.Window:
    tokens = draw(st.integers(1, rules.MAX_WINDOW))
    return rules.Window(draw(st.sampled_from(rules.WINDOWS)), tokens, draw(st.integers(1, tokens)))


@st.composite
def conditions(draw: st.DrawFn) -> rules.Condition:
    weights = values.filter(lambda weight: weight != 0)
    terms = st.lists(st.builds(rules.Term, refs, weights), min_size=1, max_size=3, unique_by=lambda one: one.feature)
    window, comparison = draw(windows()), draw(st.sampled_from(rules.COMPARISONS))
    low, high = sorted((draw(values), draw(values)))
    rises = comparison in ("above", "at_least")
    has_release = window.kind not in ("any_so_far", "k_of_n") and draw(st.booleans())
    return rules.Condition(
        terms=tuple(draw(terms)),
        bias=draw(values),
        comparison=comparison,
        threshold=high if rises else low,
        release=(low if rises else high) if has_release else None,
        window=window,
        scope=draw(scopes()),
    )


inputs = st.one_of(
    st.builds(domain.TextInput, some_words),
    st.builds(
        domain.ChatInput,
        st.lists(st.builds(domain.ChatMessage, st.sampled_from(domain.ROLES), words), min_size=1, max_size=3).map(
            tuple
        ),
    ),
    st.builds(domain.TokenInput, st.lists(numbers, min_size=1, max_size=5).map(tuple)),
)
samplings = st.builds(
    domain.Sampling,
    max_new_tokens=st.none() | st.integers(1, 2**32 - 1),
    temperature=st.just(0.0) | st.floats(0.001, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=numbers,
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(some_words, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, domain.MAX_LOGPROBS),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.booleans(),
)


def steerings(whens: st.SearchStrategy[rules.Condition | None], least: int) -> st.SearchStrategy[Any]:
    one = st.builds(rules.Intervention, refs, edits(), scopes(), whens)
    return st.lists(one, min_size=least, max_size=3, unique_by=lambda one: one.target).map(tuple)


steering = steerings(st.none() | conditions(), 0)
actions = st.one_of(st.just(rules.Flag()), st.just(rules.Stop()), st.builds(rules.Apply, steerings(st.none(), 1)))
triggers = st.lists(
    st.builds(rules.Trigger, some_words, conditions(), actions), max_size=2, unique_by=lambda one: one.name
).map(tuple)
watches = st.lists(refs, max_size=3, unique=True).map(tuple)
generations = st.builds(
    domain.GenerationRequest,
    prompt=inputs,
    sampling=samplings,
    interventions=steering,
    max_relative_edit=st.none() | st.floats(0, 1e9, exclude_min=True),
    watch=watches,
    triggers=triggers,
    policies=st.lists(some_words, max_size=2, unique=True).map(tuple),
    conversation=words,
    min_policy_activation=st.none() | st.integers(0, 2**64 - 1),
)
selections = st.one_of(
    st.builds(domain.TopK, st.integers(1, LIMITS.max_activation_values)),
    st.builds(domain.Threshold, st.floats(0, FLOAT32_MAX)),
    st.builds(domain.Named, st.lists(refs, min_size=1, max_size=3, unique=True).map(tuple)),
)
readings = st.builds(
    domain.ActivationRequest,
    inputs=st.lists(inputs, min_size=1, max_size=3).map(tuple),
    saes=st.lists(some_words, min_size=1, max_size=3, unique=True).map(tuple),
    selection=selections,
    interventions=steering,
)

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
some_policy_rules = st.lists(
    st.builds(policy.Rule, names, st.builds(rules.Intervention, refs, edits(), scopes(), st.none() | conditions())),
    min_size=1,
    max_size=3,
    unique_by=(lambda one: one.name, lambda one: one.intervention.target),
).map(tuple)
lists_of_words = st.lists(some_words, max_size=2, unique=True).map(tuple)
policy_limits = st.builds(
    policy.Limits,
    max_relative_edit=st.none() | st.floats(0, 1e9, exclude_min=True),
    allowed_saes=st.none() | lists_of_words,
    denied_saes=lists_of_words,
    allowed_features=st.none() | watches,
    denied_features=watches,
)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
policies = st.builds(
    policy.Policy,
    name=names,
    mode=st.sampled_from(policy.MODES),
    description=words,
    owner=words,
    target=st.builds(policy.Target, callers=lists_of_words, tags=lists_of_words, models=lists_of_words),
    rollout=st.builds(policy.Rollout, share=st.floats(0, 1), by=st.sampled_from(policy.HASHED_BY)),
    rules=some_policy_rules,
    triggers=st.lists(
        st.builds(rules.Trigger, names.map(lambda name: f"t-{name}"), conditions(), actions),
        max_size=2,
        unique_by=lambda one: one.name,
    ).map(tuple),
    limits=policy_limits,
    pins=st.builds(
        policy.Pins,
        model=st.none() | digests,
        saes=st.dictionaries(some_words, digests, max_size=2).map(lambda found: tuple(sorted(found.items()))),
    ),
    expires=st.none()
    | st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)),
    counterfactual_share=st.floats(0, 1),
    requires_audit=st.booleans(),
)

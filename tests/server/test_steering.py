"""What conditions and triggers become, and what is refused by name before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from saeguard.types import (
    Apply,
    Cap,
    Clamp,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Scope,
    Stop,
    Term,
    Trigger,
    Window,
    Zero,
)
from saeguard_sae.catalogue import CatalogueFeature, write_catalogue
from saeguard_sae.edit_table import FOREVER
from saeguard_sae.edits import Affine
from saeguard_server.engine.protocol import Origin, Steering
from saeguard_server.engine.tokenizer import EncodedText
from saeguard_server.engine.transformers import TransformersEngine, load_engine
from saeguard_server.errors import InvalidRequest, UnknownName
from saeguard_server.observe import Metrics
from saeguard_server.steering import (
    TokenRange,
    compile_edit,
    compile_steering,
    compile_trigger,
    steer,
    with_affine,
)
from support.engines import make_world

REACH = TokenRange((256, 1, 2, 3), 8, frozenset({256}))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    world = make_world("gpt2", tmp_path_factory.mktemp("gpt2"))
    write_catalogue(Path(world.path / "resid_post"), {4: CatalogueFeature(index=4, maximum=8.0)})
    return load_engine(world.settings(), Metrics(CollectorRegistry()))


def when(*features: FeatureRef, threshold: float = 0.5, **more: Any) -> Condition:
    terms = tuple(Term(one.sae, one.feature) for one in features or (FeatureRef("resid_pre", 1),))
    return Condition(terms=terms, threshold=threshold, **more)


def gated(condition: Condition, sae: str = "resid_post", feature: int = 4) -> Intervention:
    return replace(Clamp(sae, feature, 2.0), when=condition)


def steering(engine: Any, *edits: Intervention, triggers: tuple[Trigger, ...] = ()) -> Steering:
    return compile_steering(engine, edits, None, REACH, triggers)


def test_units_become_raw(engine: TransformersEngine) -> None:
    one = FeatureRef("resid_post", 4)
    found = steering(engine, gated(when(one, threshold=0.5, release=0.25, unit="max"))).conditions[0]
    assert (found.threshold, found.release) == (4.0, 2.0)
    norm = float(engine.saes["resid_post"].dictionary.W_dec[4].norm())
    found = steering(engine, gated(when(one, threshold=3.0, unit="unit_decoder"))).conditions[0]
    assert found.threshold == found.release == pytest.approx(3.0 / norm)


def test_scopes_become_positions_and_equal_conditions_are_shared(engine: TransformersEngine) -> None:
    generated = when(scope=Scope(phase="generated"))
    found = steering(
        engine, gated(generated), gated(generated, feature=5), gated(when(), feature=6), Zero("resid_post", 7),
        triggers=(Trigger("a", generated), Trigger("b", generated, Apply((Zero("resid_post", 9),)))),
    )  # fmt: skip
    assert [one.condition_number for one in found.edits] == [2, 2, 3, None, 1], "a trigger's guard is its own"
    assert [(one.first, one.last) for one in found.conditions] == [(3, FOREVER)] * 3 + [(0, FOREVER)]
    assert [(one.is_trigger, one.latches, one.origin.rule) for one in found.conditions] == [
        (True, False, "a"), (True, True, "b"), (False, False, ""), (False, False, "")
    ]  # fmt: skip


REFUSED: dict[str, tuple[Condition, str]] = {
    "no such SAE": (when(FeatureRef("nowhere", 1)), r"interventions\[0\].when.terms\[0\].sae: no SAE 'nowhere'"),
    "no such feature": (
        when(FeatureRef("resid_pre", 1), FeatureRef("resid_pre", 96)),
        r"interventions\[0\].when.terms\[1\].feature: must be 0 to 95",
    ),
    "no statistics": (
        when(FeatureRef("resid_pre", 1), unit="max"), r"interventions\[0\].when.unit: the catalogue of 'resid_pre'"
    ),
    "no token": (when(scope=Scope(start=8)), r"interventions\[0\].when.scope: selects no token"),
    "only BOS": (when(scope=Scope(end=1)), r"interventions\[0\].when.scope: selects no token"),
    "too large": (when(FeatureRef("resid_post", 4), threshold=3e38, unit="max"), r"when.threshold: is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decided_is_refused_by_field(name: str, engine: TransformersEngine) -> None:
    condition, message = REFUSED[name]
    with pytest.raises((InvalidRequest, UnknownName), match=message):
        steering(engine, gated(condition))
    named = message.replace(r"interventions\[0\]", r"triggers\[0\]")
    with pytest.raises((InvalidRequest, UnknownName), match=named):
        steering(engine, triggers=(Trigger("one", condition),))


def test_an_edit_cannot_wait_for_what_is_decided_after_it(engine: TransformersEngine) -> None:
    late = when(FeatureRef("resid_pre", 1), FeatureRef("resid_post", 2))
    steering(engine, gated(late))
    with pytest.raises(InvalidRequest, match=r"interventions\[0\].when: is decided at resid_post.1, after mlp_out.1"):
        steering(engine, gated(late, "mlp_out"))
    applied = Apply((Zero("resid_post", 3), Zero("attn_z", 3)))
    with pytest.raises(InvalidRequest, match=r"triggers\[0\].when: is decided at resid_post.1, after attn_z.1"):
        steering(engine, triggers=(Trigger("one", late, applied),))


def test_an_engine_without_conditions_says_so(engine: TransformersEngine) -> None:
    can = replace(engine.capabilities, engine="plain", conditions=False)
    plain = SimpleNamespace(saes=engine.saes, capabilities=can)
    steering(plain, Zero("resid_post", 4))
    with pytest.raises(InvalidRequest, match=r"interventions\[0\].when: the plain engine decides no conditions"):
        steering(plain, gated(when()))
    with pytest.raises(InvalidRequest, match=r"triggers\[0\].when: the plain engine decides no conditions"):
        steering(plain, triggers=(Trigger("one", when()),))


def test_two_edits_of_one_feature_on_one_token_are_refused(engine: TransformersEngine) -> None:
    target = Zero("resid_post", 4, scope=Scope(phase="generated"))
    trigger = Trigger("one", when(), Apply((target,)))
    steering(engine, Cap("resid_post", 4, 1.0, scope=Scope(phase="prompt", end=3)), triggers=(trigger,))
    with pytest.raises(InvalidRequest, match=r"triggers\[0\].apply.interventions\[0\].feature: .* interventions\[0\]"):
        steering(engine, Cap("resid_post", 4, 1.0, scope=Scope(phase="prompt")), triggers=(trigger,))


def place_in_chat(engine: TransformersEngine, scope: Scope, turns: tuple[tuple[int, int], ...]) -> Steering:
    return compile_steering(engine, (Zero("resid_post", 4, scope=scope),), None, replace(REACH, assistant_turns=turns))


def test_assistant_turns_count_as_generated(engine: TransformersEngine) -> None:
    """From the token before a turn's content, which predicts its first, to its end."""
    long = replace(REACH, prompt=tuple(range(40)), tokens=44, special_ids=frozenset({39}))
    turns = ((5, 9), (20, 20), (21, 30))

    def spans(scope: Scope, start: int = 0, end: int = 44) -> tuple[tuple[int, int], ...]:
        edits = (Zero("resid_post", 4, scope=scope),)
        placed = compile_steering(engine, edits, None, replace(long, assistant_turns=turns))
        return placed.spans(placed.edits[0], start, end)

    generated = Scope(phase="generated")
    assert spans(generated) == ((4, 9), (19, 30), (39, 44)), "turns that touch are one range"
    assert spans(generated, 6, 21) == ((6, 9), (19, 21))
    assert spans(Scope(phase="generated", start=7, end=25)) == ((7, 9), (19, 25))
    assert spans(Scope(phase="prompt")) == ((0, 40),)
    placed = compile_steering(engine, (Zero("resid_post", 4, scope=generated),), None, long)
    assert placed.spans(placed.edits[0], 0, 44) == ((39, 44),)
    assert placed.special_end == 39
    placed = place_in_chat(engine, generated, ((1, 2),))
    assert placed.is_generated(0, 5).tolist() == [True, True, False, True, True]
    assert placed.special_end == -1
    with pytest.raises(InvalidRequest, match="selects no token"):
        place_in_chat(engine, Scope(phase="generated", start=2, end=3), ((1, 2),))


def test_kv_is_shared_only_where_the_same_tokens_count_as_generated(engine: TransformersEngine) -> None:
    one, other, none = (
        place_in_chat(engine, Scope(phase="generated"), turns) for turns in (((1, 2),), ((2, 3),), ())
    )  # fmt: skip
    assert len({placed.kv_key(0, 3) for placed in (one, other, none)}) == 3
    assert none.kv_key(0, 3) == b""
    assert one.kv_key(2, 3) == b""
    assert one.kv_key(3, 4) == other.kv_key(3, 4) == none.kv_key(3, 4)
    ended = compile_steering(engine, (Zero("resid_post", 4),), None, replace(REACH, special_ids=frozenset({3})))
    going_on = compile_steering(engine, (Zero("resid_post", 4),), None, REACH)
    assert ended.kv_key(0, 3) == going_on.kv_key(0, 3)
    assert ended.kv_key(0, 4) != going_on.kv_key(0, 4)


def test_the_digest_covers_conditions_and_triggers(engine: TransformersEngine) -> None:
    plain, other = Clamp("resid_post", 4, 2.0), Clamp("resid_post", 5, 2.0)
    every = [
        steering(engine, plain),
        steering(engine, gated(when())),
        steering(engine, gated(when(threshold=0.6))),
        steering(engine, gated(when(release=0.4))),
        steering(engine, gated(when(comparison="at_least"))),
        steering(engine, gated(when(window=Window("rolling_mean", 3)))),
        steering(engine, gated(when(window=Window("rolling_mean", 4)))),
        steering(engine, gated(when(bias=0.1))),
        steering(engine, gated(when(scope=Scope(start=1)))),
        steering(engine, gated(when(FeatureRef("resid_pre", 2)))),
        steering(engine, gated(Condition(terms=(Term("resid_pre", 1, 2.0),), threshold=0.5))),
        *(steering(engine, plain, triggers=(Trigger("one", when(), action),)) for action in (Flag(), Stop())),
        steering(engine, plain, triggers=(Trigger("one", when(), Apply((other,))),)),
        steering(engine, plain, other),
    ]
    assert len({one.digest for one in every}) == len(every)
    a, b = gated(when()), gated(when(threshold=0.6), feature=5)
    assert steering(engine, a, b).digest == steering(engine, b, a).digest


def test_what_policies_want_is_kept_apart(engine: TransformersEngine) -> None:
    """Shadow and enforced edits of one feature, one that two made together, scopes beyond the text."""
    origin = Origin("safety", "no-bridges")
    own = compile_edit(engine, gated(when()), "policy", origin)
    wants = [
        with_affine(engine, own, "cap", Affine(lo=1, hi=2)),
        compile_edit(engine, Zero("resid_post", 4, scope=Scope(start=50)), "policy", origin, is_shadow=True),
    ]
    trigger = compile_trigger(engine, Trigger("t", when(), Stop()), "policy", origin, is_shadow=True)
    found = steer(wants, [trigger], None, REACH)
    first, second = found.edits
    assert (first.affine, first.origin, first.condition_number) == (Affine(lo=1, hi=2), origin, 1)
    assert (second.is_shadow, second.first) == (True, 50)
    assert [(one.stops, one.is_shadow) for one in found.conditions] == [(False, True), (False, False)]
    # Who may not know of shadows is told the digest that there is without them.
    assert found.open_digest == steer(wants[:1], [], None, REACH).digest != found.digest
    assert steer(wants[1:], [trigger], None, REACH).open_digest == Steering().digest
    with pytest.raises(InvalidRequest, match="max_relative_edit: has nothing to limit"):
        steer([own], [], 0.5, REACH)


def test_the_last_token_is_read_only_if_it_can_be_stopped(engine: TransformersEngine) -> None:
    def stops(**scope: Any) -> bool:
        trigger = Trigger("t", when(scope=Scope(**scope)), Stop())
        compiled = compile_trigger(engine, trigger, "triggers[0]", Origin())
        return TokenRange.of(EncodedText((256, 1, 2, 3), (None,) * 4), 4, [compiled], frozenset()).tokens == 8

    assert stops()
    assert stops(phase="generated")
    assert not stops(phase="prompt")
    assert not stops(end=7)
    assert stops(start=7)

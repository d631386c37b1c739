"""Overload on a simulated engine and clock: what is refused, what is served in time, and that nobody starves."""

from __future__ import annotations

import asyncio
import random
from math import inf
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeguard_server.engine.pace import Stall, StepPace, StepWatch
from saeguard_server.fair_queue import LONGEST_RETRY_S, SHORTEST_RETRY_S
from saeguard_server.forecast import EnginePlace, Forecast, Work
from support.simulated import Outcomes, SimulatedEngine, Traffic, now, simulate

DEADLINE_S = 2.0
NEW = 48


async def capacity(engine: SimulatedEngine, lengths: Any) -> float:
    """Tokens a second without deadlines, with twice as many callers as slots."""
    traffic, draw = Traffic(engine), random.Random(5)

    async def keep_asking(until: float) -> None:
        while now() < until:
            await traffic.ask("a", draw.randint(16, 48), lengths(draw))

    began = now()
    await asyncio.gather(*(keep_asking(began + 10) for _ in range(2 * engine.slots)))
    return traffic.of["a"].tokens / (now() - began)


async def offer(
    traffic: Traffic, rate: float, lengths: Any, *, caller: str = "a", seconds: float = 10.0,
    within_s: float = DEADLINE_S, most: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Requests that come at random, so many a second -> tokens a second of those complete in time, and of all.

    After a warm-up of two seconds.
    """
    draw, began, mark, offered = random.Random(6), now(), (0.0, 0), 0
    while now() < began + seconds:
        if not mark[0] and now() > began + 2:
            mark, offered = (now(), traffic.of[caller].tokens), 0
        await asyncio.sleep(draw.expovariate(rate))
        length = lengths(draw)
        offered += length
        traffic.ask(caller, draw.randint(16, 48), length, within_s, most=most)
    seconds = now() - mark[0]
    return (traffic.of[caller].tokens - mark[1]) / seconds, offered / seconds


def fixed(_: random.Random) -> int:
    return NEW


def varied(draw: random.Random) -> int:
    return max(1, min(int(draw.lognormvariate(3.2, 0.6)), 150))


@pytest.mark.parametrize("engine", [{"slots": 16}, {"slots": 32, "fixed_s": 0.02, "token_s": 2e-5}], ids=["cpu", "gpu"])
@pytest.mark.parametrize("load", [1.0, 1.5, 2.0, 4.0, 10.0])
def test_goodput_stays_at_nine_tenths_of_the_capacity(engine: dict[str, Any], load: float) -> None:
    full = simulate(capacity(SimulatedEngine(**engine), fixed))
    traffic = Traffic(SimulatedEngine(**engine))
    goodput, offered = simulate(offer(traffic, load * full / NEW, fixed, seconds=30.0 if load == 1.0 else 10.0))
    assert goodput >= 0.9 * min(full, offered)
    outcomes = traffic.of["a"]
    assert outcomes.late <= 0.03 * outcomes.complete
    if outcomes.refused > 20:
        assert sorted(outcomes.refusals_s)[len(outcomes.refusals_s) // 2] < 0.05


def test_answers_shorter_than_what_they_may_be_are_not_refused_for_what_they_may_be() -> None:
    full = simulate(capacity(SimulatedEngine(), varied))
    traffic = Traffic(SimulatedEngine())
    mean = sum(varied(random.Random(seed)) for seed in range(500)) / 500
    goodput, _ = simulate(offer(traffic, 2 * full / mean, varied, most=10_000, seconds=16.0))
    assert goodput >= 0.8 * full
    assert traffic.of["a"].late < 0.1 * traffic.of["a"].complete


def test_a_burst_into_an_engine_of_which_nothing_is_known_is_sorted_out_as_soon_as_it_steps() -> None:
    async def burst() -> Outcomes:
        traffic = Traffic(SimulatedEngine())
        for _ in range(400):
            traffic.ask("a", 20, NEW, DEADLINE_S)
        await asyncio.sleep(0.2)
        refused = traffic.of["a"].refused
        await traffic.all_done()
        assert refused >= 300, "told at once"
        return traffic.of["a"]

    outcomes = simulate(burst())
    assert outcomes.complete >= 16
    assert outcomes.late <= 4


def test_a_flood_with_deadlines_that_nobody_can_meet_costs_nothing_and_spoils_nothing() -> None:
    async def flood() -> tuple[float, Traffic]:
        traffic = Traffic(SimulatedEngine())

        async def lie() -> None:
            while True:
                await asyncio.sleep(0.0005)
                traffic.ask("liar", 5, NEW, 0.02, most=100_000)

        lying = asyncio.create_task(lie())
        goodput, _ = await offer(traffic, full / NEW, fixed)
        lying.cancel()
        return goodput, traffic

    full = simulate(capacity(SimulatedEngine(), fixed))
    alone, _ = simulate(offer(Traffic(SimulatedEngine()), full / NEW, fixed))
    goodput, traffic = simulate(flood())
    assert goodput >= 0.95 * alone
    assert traffic.of["liar"].refused >= 0.99 * (traffic.of["liar"].refused + traffic.of["liar"].late)
    assert traffic.of["liar"].complete == 0


@pytest.mark.parametrize("length", [NEW, 2000])
def test_nobody_with_few_requests_is_refused_because_another_floods(length: int) -> None:
    """Also where the flood's requests are so long that no slot becomes free for a minute."""

    async def flood() -> Traffic:
        traffic = Traffic(SimulatedEngine())
        await traffic.ask("modest", 20, NEW)
        for _ in range(300):
            traffic.ask("flood", 20, length, inf if length > NEW else DEADLINE_S)
        for _ in range(20):
            await asyncio.sleep(1.0)
            traffic.ask("modest", 20, NEW, DEADLINE_S)
            for _ in range(50):
                traffic.ask("flood", 20, length, inf if length > NEW else DEADLINE_S)
        await asyncio.sleep(3.0)
        return traffic

    async def run() -> Outcomes:
        traffic = await flood()
        for task in traffic._tasks:
            task.cancel()
        return traffic.of["modest"]

    outcomes = simulate(run())
    assert (outcomes.complete, outcomes.refused, outcomes.late) == (21, 0, 0)


def test_estimates_recover_after_a_slow_step_a_slow_while_and_an_idle_time() -> None:
    async def run() -> list[bool]:
        engine = SimulatedEngine()
        traffic = Traffic(engine)
        for _ in range(20):
            await traffic.ask("a", 20, NEW, DEADLINE_S)
        served = []
        engine.slow = 300.0  # one step of seconds
        slow = traffic.ask("a", 20, NEW)
        await asyncio.sleep(0.05)
        engine.slow = 1.0
        await slow
        served.append(await traffic.ask("a", 20, NEW, DEADLINE_S))
        engine.slow = 20.0  # a machine on which nothing can be in time
        await traffic.ask("a", 20, NEW, 60.0)
        assert not await traffic.ask("a", 20, NEW, DEADLINE_S)
        assert traffic.of["a"].refused == 1
        engine.slow = 1.0
        await asyncio.sleep(60)
        served.append(await traffic.ask("a", 20, NEW, DEADLINE_S))
        return served

    assert simulate(run()) == [True, True]


def test_whoever_is_refused_is_told_to_come_back_at_different_times() -> None:
    async def run() -> Outcomes:
        traffic = Traffic(SimulatedEngine())
        await traffic.ask("a", 20, NEW)
        for _ in range(300):
            traffic.ask("a", 20, NEW, DEADLINE_S)
        await traffic.all_done()
        return traffic.of["a"]

    retries = simulate(run()).retries_s
    assert len(retries) > 200
    assert all(SHORTEST_RETRY_S <= retry <= 1.5 * LONGEST_RETRY_S for retry in retries)
    by_second = [sum(int(retry) == second for retry in retries) for second in range(60)]
    assert max(by_second) < 0.4 * len(retries), by_second


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_comes_ends_and_whoever_was_let_in_is_not_dropped_for_another(data: st.DataObject) -> None:
    """On an engine without surprises, all that go to it are complete in time."""

    async def run() -> None:
        engine = SimulatedEngine(slots=data.draw(st.integers(1, 9)), noise=0.0, token_s=0.0)
        traffic = Traffic(engine)
        await traffic.ask("warm", 5, 5)
        for _ in range(data.draw(st.integers(1, 40))):
            within_s = data.draw(st.sampled_from([0.001, 0.2, 0.5, 1.0, 3.0, inf]))
            traffic.ask(
                data.draw(st.sampled_from("abc")),
                data.draw(st.integers(1, 200)),
                data.draw(st.integers(1, 60)),
                within_s,
            )
            await asyncio.sleep(data.draw(st.sampled_from([0.0, 0.01, 0.3])))
        await traffic.all_done()
        assert not traffic.turns._places
        assert traffic.turns.waiting == traffic.turns._running == 0
        entered = sum(outcomes.complete + outcomes.late for outcomes in traffic.of.values())
        assert sum(outcomes.late for outcomes in traffic.of.values()) <= 0.1 * entered

    simulate(run())


def test_step_times_are_interpolated_and_one_step_moves_them_little() -> None:
    pace = StepPace()
    assert pace.step_s(5) == 0.0
    for _ in range(60):
        pace.note(1, 1, 0.010, 1.0)
        pace.note(16, 16, 0.025, 1.0)
    assert pace.step_s(1) == pytest.approx(0.010)
    assert pace.step_s(8) == pytest.approx(0.017)
    assert pace.step_s(31) == pytest.approx(0.040), "beyond what was measured, on the same line"
    pace.note(16, 16, 100.0, 1.0)
    assert pace.step_s(16) < 0.032


def test_lengths_are_learnt_from_answers_that_end_and_from_those_that_are_cut() -> None:
    class Engine:
        pace = StepPace()

    for _ in range(10):
        Engine.pace.note(1, 1, 0.01, 1.0)
    forecast, work = Forecast(Engine()), Work(1, 1000)  # type: ignore[arg-type]
    assert forecast.longest_s("a", work, 1, 1.0) == pytest.approx(0.01), "nothing is held against a new caller"

    def learn(tokens: int, *, is_cut: bool) -> float:
        forecast.learn(EnginePlace("a", work, 0.0, 0.0, 1, generated=tokens, is_cut=is_cut), 1.0)
        return forecast.usual_s("a", work, 1)

    for _ in range(60):
        usual_s = learn(64, is_cut=False)
    assert usual_s == pytest.approx(0.64, rel=0.1)
    assert learn(1000, is_cut=False) < 1.1, "one answer of extreme length moves it little"
    for _ in range(60):
        usual_s = learn(500, is_cut=True)
    assert usual_s > 6.0
    late_s = [forecast.longest_s("a", work, 1, 1.0 + age) for age in (0, 10, 30, 120)]
    assert late_s == sorted(late_s, reverse=True), "what was learnt long ago counts less"
    assert late_s[-1] == pytest.approx(0.01)


def test_a_step_hangs_by_the_time_in_which_somebody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("saeguard_server.engine.pace.time.monotonic", lambda: clock[0])
    watch, pace = StepWatch(2.0), StepPace()

    def after(seconds: float) -> bool:
        clock[0] += seconds
        return watch.is_hung(pace, None)

    assert not any(after(1.0) for _ in range(9)), "no step runs"
    pace.begin(8)
    assert not any(after(1.0) for _ in range(21)), "the first of its size"
    assert after(1.0)
    pace.observe(1, 8)
    pace.begin(9)
    assert not after(0.5)
    assert not after(3600.0), "the machine was paused"
    assert not after(0.5)
    assert after(1.0)
    pace.end()
    assert not after(1.0)
    stall = Stall()
    assert [stall.seconds(state) for state in ("a", "a", "b")] == [0.0, 0.0, 0.0]

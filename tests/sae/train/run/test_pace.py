"""How fast a run goes."""

from __future__ import annotations

from saeguard_sae.train.run.progress import Pace


def test_laps_and_the_time_before() -> None:
    now = [10.0]
    pace = Pace(100.0, lambda: now[0])
    pace.add(30)
    now[0] = 13.0
    assert pace.tokens_per_s() == 10.0
    assert pace.lap() == 10.0
    pace.add(8)
    now[0] = 17.0
    assert pace.lap() == 2.0
    assert pace.elapsed_s() == 107.0
    assert pace.left_s(step=2, steps=5) == 107.0 / 2 * 3

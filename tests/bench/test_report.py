"""Figures: medians, ratios, verdicts, and what is said of a side that took no part."""

from __future__ import annotations

import json

import pytest

from bench.report import figure, met, skipped, table


def test_the_ratio_is_of_the_medians(capsys: pytest.CaptureFixture[str]) -> None:
    figure("f", "ms", [3.0, 100.0, 2.0], [6.0, 5.0, 1.0], sides=("a", "b"), target="<= 1.5", more={"probes": 3})
    line = json.loads(capsys.readouterr().out)
    assert (line["a"], line["b"], line["ratio"], line["met"], line["probes"]) == (3.0, 5.0, 0.6, True, 3)
    assert line["rounds"] == {"a": [3.0, 100.0, 2.0], "b": [6.0, 5.0, 1.0]}


@pytest.mark.parametrize(
    ("ratio", "target", "wanted"),
    [
        (0.95, ">= 0.95", True),
        (0.94, ">= 0.95", False),
        (1.2, "<= 1.2", True),
        (1.3, "<= 1.2", False),
        (2.0, "", None),
        (23.0, ">= 24 (bfloat16)", False),
    ],
)
def test_a_target_is_met_or_missed(ratio: float, target: str, wanted: bool | None) -> None:
    assert met(ratio, target) is wanted


def test_the_table_says_what_was_missed_and_why_something_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        figure("slow", "tokens/s", [1.0], [2.0], sides=("us", "them"), target=">= 0.95"),
        skipped("other", ">= 1", "it is not installed"),
        {"profile": "no row"},
    ]
    said = table(lines).splitlines()
    assert len(said) == 3
    assert "MISSED" in said[1]
    assert "1 tokens/s" in said[1]
    assert said[2].endswith("skipped: it is not installed")

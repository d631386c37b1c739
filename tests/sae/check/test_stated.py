"""What a loaded SAE's conventions say."""

from __future__ import annotations

from typing import Any

import pytest

from saeguard_sae import releases
from saeguard_sae.check import diagnosis
from saeguard_sae.formats.parsed import Choices, Convention
from saeguard_sae.models import Site


@pytest.fixture
def saying(loaded: Any) -> Any:
    """An SAE with these conventions: (name, value, source)."""
    return lambda *said: loaded(Site(0, "resid_post"), None, conventions=tuple(Convention(*one) for one in said))


def test_what_was_decided_last_holds(saying: Any) -> None:
    assert diagnosis.processing(saying()) == "none"
    assert diagnosis.processing(saying(("processing", "not stated", "the format"))) is None
    user = ("processing", "centred", "the settings")
    assert diagnosis.processing(saying(("processing", "not stated", "the format"), user)) == "centred"


def test_the_scale(saying: Any) -> None:
    assert diagnosis.scale(saying()) == 1.0
    assert diagnosis.scale(saying(("activation scale", "0.25", "the user"))) == 0.25
    assert diagnosis.scale(saying(("activation scale", "of each token", "hyperparams.json: norm_activation"))) == 1.0


@pytest.mark.parametrize(
    ("source", "can_be_said"),
    [
        (Choices().scale_said_by, True),
        ("the settings", True),
        (releases.source(), True),
        ("activation_scaler.json", False),
        ("the repository: embedding", False),
    ],
)
def test_whether_another_scale_can_be_said(saying: Any, source: str, can_be_said: bool) -> None:
    assert diagnosis.asks_for_scale(saying(("activation scale", "2", source))) is can_be_said
    assert not diagnosis.asks_for_scale(saying())


def test_whose_rule_gates(saying: Any) -> None:
    assert diagnosis.gating(saying()) is None
    assert diagnosis.gating(saying(("gating", "saelens: p > threshold", "the format"))) == "saelens"

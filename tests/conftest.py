"""Fixtures that several packages of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("saeguard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("saeguard")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference" / "reference_saes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hostile", action="store_true", help="attack in full: tests/hostile takes more than half an hour"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20250)


@pytest.fixture(scope="session")
def reference_saes() -> Path:
    """Outputs of the reference libraries, where the checkout has them beside it."""
    if not SHARED.is_dir():
        pytest.skip("no reference outputs beside this checkout")
    return SHARED

"""Fixtures that several packages of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference" / "reference_saes"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20250)


@pytest.fixture(scope="session")
def reference_saes() -> Path:
    """Outputs of the reference libraries, where the checkout has them beside it."""
    if not SHARED.is_dir():
        pytest.skip("no reference outputs beside this checkout")
    return SHARED

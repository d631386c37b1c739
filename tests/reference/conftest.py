"""The environment that holds the reference libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-reference"


@pytest.fixture(scope="session")
def reference_python() -> Path:
    """The interpreter beside SAELens, TransformerLens, dictionary_learning and sparsify; CI must have it."""
    # The marker, not the folder: make writes it once everything is installed.
    if not (ENVIRONMENT / ".ready").is_file():
        missing = "the reference libraries are not installed; make reference-env installs them"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return ENVIRONMENT / "bin" / "python"

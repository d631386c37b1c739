"""The demo: what is served when nothing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeguard_server import app
from saeguard_server.settings import BadSettings, ModelSettings, ServedSaeSettings, Settings


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    for folder in ("model", "saes/beta", "saes/alpha"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "saes" / "README.md").touch()
    return tmp_path


def test_all_bundled_saes_are_served_by_their_folders_names(assets: Path) -> None:
    found = app.resolve_bundled(Settings(), assets)
    assert (found.model.path, found.model.name) == (str(assets / "model"), "demo")
    assert [(one.name, one.path) for one in found.saes] == [
        (name, str(assets / "saes" / name)) for name in ("alpha", "beta")
    ]


def test_named_saes_and_a_named_model_stay(assets: Path) -> None:
    own = (ServedSaeSettings(name="own", path="/own"),)
    found = app.resolve_bundled(Settings(saes=own, model=ModelSettings(name="mine")), assets)
    assert found.saes == own
    assert found.model.name == "mine"
    other = Settings(model=ModelSettings(path="org/model"))
    assert app.resolve_bundled(other, assets) is other


def test_an_installation_without_the_demo_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="--model"):
        app.resolve_bundled(Settings(), tmp_path)

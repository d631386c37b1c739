"""Where the demo model and its SAEs are: what ``saeguard serve`` serves when nothing else is named."""

from __future__ import annotations

from pathlib import Path

import msgspec

from saeguard_server.settings import DEMO, BadSettings, SaeSettings, Settings

ASSETS = Path(__file__).parent / "demo" / "assets"


def resolve(settings: Settings, assets: Path = ASSETS) -> Settings:
    """The settings with "demo" replaced by the bundled folders and text; all bundled SAEs where none is named.

    Raises:
        BadSettings: the assets are not installed.
    """
    if settings.model.path != DEMO:
        return settings
    folder = assets / "model"
    if not folder.is_dir():
        raise BadSettings("model.path: the demo model is not part of this installation; give --model")
    model = msgspec.structs.replace(settings.model, path=str(folder), name=settings.model.name or DEMO)
    text = assets / "calibration.txt"
    check = msgspec.structs.replace(settings.check, text=settings.check.text or (str(text) if text.is_file() else None))
    saes = settings.saes or _bundled_saes(assets / "saes")
    return msgspec.structs.replace(settings, model=model, saes=saes, check=check)


def _bundled_saes(folder: Path) -> tuple[SaeSettings, ...]:
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return tuple(SaeSettings(name=path.name, path=str(path)) for path in found)

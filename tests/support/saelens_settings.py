"""The builders' SAEs of SAELens with some settings otherwise, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saeguard_sae.formats import Choices, ParsedSae, SaeOrigin, Source
from saeguard_sae.loading import read_sae
from support.published import Published, builders

BUILDERS = {name: build for name, build in builders().items() if name.startswith("saelens")}


def built(name: str, path: Path, **change: Any) -> Published:
    """One of them, written into ``path``; ``metadata`` is merged, ``...`` takes a setting away."""
    path.mkdir(exist_ok=True)
    one = BUILDERS[f"saelens_{name}"](path, 61)
    assert one.config is not None
    config = json.loads(one.config.read_text())
    if "metadata" in config:
        config["metadata"] |= change.pop("metadata", {})
    merged = {key: value for key, value in (config | change).items() if value is not Ellipsis}
    one.config.write_text(json.dumps(merged))
    return one


def load(one: Published, origin: SaeOrigin | None = None, **choices: Any) -> ParsedSae:
    """What is read from it."""
    return read_sae(Source(one.path, origin, Choices(**choices)))[1]


def said(found: ParsedSae) -> dict[str, tuple[str, str]]:
    """Value and source of every convention."""
    return {one.name: (one.value, one.source) for one in found.conventions}

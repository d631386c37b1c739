"""Puts features into the catalogue that lies beside an SAE's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from saeguard_sae.catalogue import FEATURES, Feature, read_features

_LABEL = ("label", "label_metric", "label_score")
"""Replaced together: a score belongs to the label that was scored."""


def merge(existing: Mapping[int, Feature], new: Mapping[int, Feature]) -> dict[int, Feature]:
    """Every feature of both, by index. Field by field what ``new`` says wins, and what it does not say stays."""
    both = {index: _merged(existing[index], one) if index in existing else one for index, one in new.items()}
    return dict(sorted({**existing, **both}.items()))


def write(directory: Path, features: Mapping[int, Feature]) -> None:
    """Merges features into the directory's ``features.jsonl``, which afterwards is the old one or the new one.

    Raises:
        BadCatalogue: the one that is there cannot be read.
        OSError: it cannot be written.
    """
    target = directory / FEATURES
    part = directory / f"{FEATURES}.part"
    merged = merge(read_features(target) if target.is_file() else {}, features)
    try:
        with part.open("wb") as stream:
            stream.writelines(msgspec.json.encode(one) + b"\n" for one in merged.values())
            stream.flush()
            # Before it gets its name: after a crash the name must not stand for a file that was not written.
            os.fsync(stream.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _merged(old: Feature, new: Feature) -> Feature:
    said: dict[str, Any] = {
        name: value for name, value in msgspec.structs.asdict(new).items() if value not in (None, (), {})
    }
    if new.label is not None:
        said |= {name: getattr(new, name) for name in _LABEL}
    return msgspec.structs.replace(old, **said)

"""SAELens' format: ``cfg.json`` and ``sae_weights.safetensors``, of every version that wrote these two files.

Also its training checkpoints. Modules named ``saelens_...`` each know one part of the format.
"""

from __future__ import annotations

from pathlib import Path

from saeguard_sae.formats import files
from saeguard_sae.formats.found import Conventions, Found, Source
from saeguard_sae.formats.saelens_arrival import arrival
from saeguard_sae.formats.saelens_coder import Parts, build
from saeguard_sae.formats.saelens_legacy import modernised
from saeguard_sae.formats.saelens_place import belongs
from saeguard_sae.formats.saelens_settings import CONFIG, WEIGHTS, Settings, current, is_current

__all__ = ["CONFIG", "NAME", "WEIGHTS", "load", "recognises"]

NAME = "saelens"


def recognises(path: Path) -> bool:
    """Both files are there."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(source: Source) -> Found:
    """The SAE in the folder, in float32.

    Raises:
        ValueError: a convention that is not supported, an unknown key, missing or surplus weights.
    """
    path, said = source.path, Conventions()
    settings = _settings(path)
    place = belongs(settings, source.origin, said)
    arrives = arrival(source, settings, said)
    coder = build(Parts(settings, files.safetensors(path / WEIGHTS), arrives, source.choices, said))
    chose_k = {one.name for one in said.all() if one.source == "the user"} & {"k"}
    return Found(
        dictionary=coder,
        files=(path / CONFIG, path / WEIGHTS, *arrives.files),
        reads=place.reads,
        writes=place.writes,
        processing=place.processing,
        model=place.model,
        stated_l0=place.stated_l0,
        conventions=said.all(),
        used=arrives.used | chose_k,
    )


def _settings(path: Path) -> Settings:
    config = files.json_object(path / CONFIG)
    return current(config) if is_current(config) else modernised(config)

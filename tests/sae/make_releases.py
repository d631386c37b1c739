"""Writes ``saeguard_sae/releases.json.xz`` from the list of published SAEs inside an installed SAELens.

Facts alone: names, places, factors. The same SAELens gives the same bytes. SAELens itself is looked up, not imported:

    .venv-reference/bin/python tests/sae/make_releases.py [OUT]
"""

from __future__ import annotations

import json
import lzma
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).resolve().parents[2] / "sae" / "saeguard_sae" / "releases.json.xz"

# Column in the output -> key in SAELens' list.
COLUMNS = {
    "scale": "norm_scaling_factor",
    "l0": "l0",
    "variance_explained": "variance_explained",
    "neuronpedia": "neuronpedia",
}
# Overrides of the settings that say nothing about what the weights compute.
IGNORED = {"dataset_path", "model_name"}


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    spec = find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("sae-lens is not installed here")
    listed = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    releases = yaml.load(listed.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    kept = {name: release(value) for name, value in sorted(releases.items())}
    share_facts(list(kept.values()))
    found = {"from": f"SAELens {version('sae-lens')}", "releases": kept}
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    out.write_bytes(lzma.compress(text.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=9))


def release(listed: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one release; a column is as long as ``ids``, with null where an SAE has no such fact."""
    saes = sorted(listed["saes"], key=lambda sae: str(sae["id"]))
    kept: dict[str, Any] = {
        "repo": listed["repo_id"],
        "model": listed["model"],
        "converter": listed["conversion_func"],
        "ids": [sae["id"] for sae in saes],
        "paths": [path(sae["path"], listed["conversion_func"]) for sae in saes],
    }
    columns = {column: [sae.get(key) for sae in saes] for column, key in COLUMNS.items()}
    return kept | overrides(listed.get("config_overrides") or {}) | columns


def share_facts(releases: list[dict[str, Any]]) -> None:
    """What is said of an SAE under one name holds under its others; columns that are empty even so are left out."""
    known: dict[tuple[str, str, str], Any] = {}
    cells = [
        (one, place, row, column) for one in releases for row, place in enumerate(one["paths"]) for column in COLUMNS
    ]
    for one, place, row, column in cells:
        if one[column][row] is not None:
            known.setdefault((one["repo"], place, column), one[column][row])
    for one, place, row, column in cells:
        if one[column][row] is None:
            one[column][row] = known.get((one["repo"], place, column))
    for one in releases:
        for column in COLUMNS:
            if all(value is None for value in one[column]):
                del one[column]


def path(listed: object, converter: str | None) -> str:
    """Where in the repository; SAELens names one layer of a cross-layer transcoder by its number alone."""
    return f"W_enc_{listed}.safetensors" if converter == "mntss_clt_layer_transcoder" else str(listed)


def overrides(listed: dict[str, Any]) -> dict[str, Any]:
    """What a release says of all its SAEs in place of their settings."""
    kept: dict[str, Any] = {}
    for key, value in listed.items():
        if key == "model_from_pretrained_kwargs" and value == {"center_writing_weights": True}:
            kept["is_centred"] = True
        elif key == "normalize_activations":
            kept["normalisation"] = value
        elif key == "hook_name":
            kept["hook"] = value
        elif key not in IGNORED:
            raise SystemExit(f"an override that nobody here knows: {key} = {value!r}")
    return kept


if __name__ == "__main__":
    main()

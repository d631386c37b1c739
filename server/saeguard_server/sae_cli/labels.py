"""``saeguard sae features``: imports labels and statistics that others published into an SAE's catalogue."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from saeguard_sae.metadata import Dropped, import_features, merge_entries, write_catalogue
from saeguard_server.sae_cli import flags
from saeguard_server.sources import open_source


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action's arguments."""
    parser = actions.add_parser(
        "features",
        help="import feature labels and statistics",
        description="Neuronpedia's exports (JSON, JSONL, .gz) or a CSV with index,label[,maximum,density,...].",
    )
    flags.add_sae_flags(parser)
    parser.add_argument("files", type=Path, nargs="+", help="what to import")
    parser.add_argument(
        "--units",
        choices=("unit_decoder", "raw"),
        required=True,
        help="of its activations: unit_decoder for Neuronpedia's folded values, raw for the SAE's own, as "
        "Neuronpedia has of TopK and temporal SAEs",
    )
    parser.add_argument("--source", help='the SAE to take, where files hold several, such as "20-gemmascope-res-16k"')
    parser.add_argument("--out", type=Path, help="folder for features.jsonl; default: beside the weights")
    parser.set_defaults(act=act)


def act(arguments: argparse.Namespace) -> int:
    """Imports, merges with what is there, writes."""
    source = open_source(flags.settings(arguments))
    opened, path = source.sae, source.path
    coder = opened.found.dictionary
    norms = coder.W_dec.float().norm(dim=1) if arguments.units == "unit_decoder" else None
    imported = import_features(
        arguments.files, coder.d_sae, decoder_norms=norms, units=arguments.units, source=arguments.source
    )
    folder = arguments.out or (path if path.is_dir() else path.parent)
    write_catalogue(folder, merge_entries(opened.catalogue.features, imported.features))
    sys.stdout.write(
        f"{imported.read} records, {len(imported.features)} features of {coder.d_sae}: {folder / 'features.jsonl'}\n"
        f"left out: {_counted(imported.dropped)}\n"
    )
    return 0


def _counted(dropped: Dropped) -> str:
    counts = {one.name.replace("_", " "): getattr(dropped, one.name) for one in fields(dropped)}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"

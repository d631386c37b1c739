"""``saeguard sae convert``: writes any SAE in SAELens' current format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from saeguard_sae.coders import SparseCoder
from saeguard_sae.formats import ParsedSae, Source, saelens_save
from saeguard_sae.formats.parsed import Place
from saeguard_sae.formats.saelens_config import CONFIG
from saeguard_sae.loading import read_sae
from saeguard_sae.metadata import write_catalogue as write_features
from saeguard_sae.models import Site
from saeguard_server.sae_cli import flags
from saeguard_server.sources import open_source

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action's arguments."""
    parser = actions.add_parser(
        "convert",
        help="write an SAE in SAELens' format",
        description="Values stay as they are: constant scales and decoder norms are folded into the weights.",
    )
    flags.add_sae_flags(parser)
    parser.add_argument("out", type=Path, help="folder to write; must not hold an SAE")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="of the weights on disk")
    parser.add_argument("--model-name", help="the model it belongs to, as SAELens calls it")
    parser.set_defaults(act=act)


def act(arguments: argparse.Namespace) -> int:
    """Writes, reads back and compares."""
    settings = flags.settings(arguments)
    if settings.normalize_activations is not None or settings.apply_b_dec_to_input is not None:
        raise ValueError(
            "--normalize-activations and --apply-b-dec-to-input are for serving; conversion keeps the files'"
        )
    if (arguments.out / CONFIG).exists():
        raise ValueError(f"{arguments.out} holds an SAE already")
    opened = open_source(settings).sae
    found = opened.found
    saelens_save.save_saelens(
        found.dictionary,
        arguments.out,
        site=_site(settings.site, found.reads, "site"),
        model_name=arguments.model_name or found.model or "unknown",
        dtype=_DTYPES[arguments.dtype],
        writes=_writes(settings.write_site, found),
        processing=settings.processing or found.processing or "none",
    )
    if opened.catalogue.features:
        write_features(arguments.out, opened.catalogue.features)
    difference = _difference(found.dictionary, read_sae(Source(arguments.out))[1].dictionary)
    sys.stdout.write(
        f"{opened.format} -> saelens: {arguments.out}\nread back, features differ by at most {difference:.3g}\n"
    )
    return 0


def _writes(given: str | None, found: ParsedSae) -> tuple[Site, ...]:
    if given is not None:
        return (Site.parse(given),)
    return tuple(_site(None, one, "write-site") for one in found.writes)


def _site(given: str | None, place: Place | None, flag: str) -> Site:
    if given is not None:
        return Site.parse(given)
    if not isinstance(place, Site):
        raise ValueError(f"its files say {place or 'nothing'}, which SAELens cannot be told; give --{flag}")
    return place


def _difference(one: SparseCoder, other: SparseCoder) -> float:
    """Largest difference of a feature on random tokens, relative to the token's largest."""
    x: Tensor = torch.randn(64, one.d_in, generator=torch.Generator().manual_seed(0))
    before, after = one.encode(x), other.encode(x)
    scale = before.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    return float(((before - after).abs() / scale).max())

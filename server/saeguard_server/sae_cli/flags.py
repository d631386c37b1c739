"""The flags that say which SAE is meant and what its files leave open; names as in the settings."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from saeguard_server.settings import SaeSettings

NAME = "sae"
"""What the SAE is called in messages."""

_FLAGS: dict[str, tuple[type, str]] = {
    "site": (str, 'where it reads, such as "resid_post.12"'),
    "write-site": (str, "where a transcoder writes"),
    "scale": (float, "factor to the scale it was trained on, sqrt(d_in) / mean |x|"),
    "gating": (str, "openmoss or saelens: whose rule decides whether a Llama Scope feature fires"),
    "k": (int, "features kept per token, where its files do not say"),
    "processing": (str, "none, centred or transformer_lens: how its model had been processed"),
    "normalize-activations": (str, "none, layer_norm or constant_norm_rescale, against its files"),
}
_BOUNDS: dict[str, str] = {
    "min-l0": "least features that may fire on a token",
    "max-l0": "most features that may fire on a token",
    "max-fvu": "largest share of variance that may stay unexplained",
    "max-ce-increase": "largest rise of the loss, in nats per token",
}


def add_sae_flags(parser: argparse.ArgumentParser) -> None:
    """The SAE's path and what its files leave open."""
    parser.add_argument(
        "path", help='folder or file, "hf://owner/repository/path@revision", or a SAELens "release/sae-id"'
    )
    for flag, (kind, text) in _FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument(
        "--apply-b-dec-to-input", choices=("yes", "no"), help="whether b_dec is subtracted first, against its files"
    )


def add_bound_flags(parser: argparse.ArgumentParser) -> None:
    """What the check must find."""
    for flag, text in _BOUNDS.items():
        parser.add_argument(f"--{flag}", type=float, metavar="FLOAT", help=text)


def settings(arguments: argparse.Namespace) -> SaeSettings:
    """The flags as the settings of one SAE.

    Raises:
        ValueError: a value that the settings do not allow, by name.
    """
    given = {name: _given(arguments, name) for name in _FLAGS}
    bias = arguments.apply_b_dec_to_input
    bounds = {name: _given(arguments, name) for name in _BOUNDS}
    tree: dict[str, Any] = {
        "name": NAME,
        "path": arguments.path,
        "apply_b_dec_to_input": None if bias is None else bias == "yes",
        "bounds": {_key(name): value for name, value in bounds.items() if value is not None},
    }
    tree |= {_key(name): value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(tree, SaeSettings)
    except msgspec.ValidationError as err:
        problem, _, where = str(err).rpartition(" - at `$.")
        raise ValueError(f"--{where.rstrip('`').replace('_', '-')}: {problem}" if problem else str(err)) from err


def _given(arguments: argparse.Namespace, flag: str) -> Any:
    return getattr(arguments, _key(flag), None)


def _key(flag: str) -> str:
    return flag.replace("-", "_")

"""Flags for sampling; each is named like the argument of ``Client.generate`` that it sets."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from saeguard_client.cli.usage import usage
from saeguard_client.sampling import Sampling


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Without a flag the server's default holds."""
    group = parser.add_argument_group("sampling")
    group.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="tokens to generate at most")
    group.add_argument("-t", "--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="smallest set of tokens with this probability")
    group.add_argument("--top-k", type=int, metavar="K", help="most likely tokens kept")
    group.add_argument("--min-p", type=float, metavar="P", help="share of the likeliest token's probability")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities of N likeliest tokens")
    group.add_argument("--prompt-logprobs", action="store_true", help="with --json: those of the prompt's tokens")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for ``Client.generate``.

    Raises:
        UsageError: one of them cannot be sent.
    """
    chosen = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    with usage():
        Sampling(**chosen)
    return chosen

"""Flags for triggers and policies: ``--stop-on resid4:4021=1.5max``, ``--policy NAME``."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard_client.catalog import FeatureRef
from saeguard_client.cli.usage import as_argument
from saeguard_client.conditions import Condition
from saeguard_client.scopes import UNITS, Unit
from saeguard_client.triggers import Action, Flag, Stop, Trigger

_ACTIONS: dict[str, Action] = {"stop": Stop(), "flag": Flag()}


def add_watching(parser: argparse.ArgumentParser) -> None:
    """One flag per action, and what says which policies decide."""
    group = parser.add_argument_group("triggers and policies")
    for name, text in (
        ("stop", "end the text before the first token on which the feature is above THRESHOLD"),
        ("flag", "only tell whether that happened"),
    ):
        group.add_argument(
            f"--{name}-on",
            action="append",
            default=[],
            metavar="SAE:FEATURE=THRESHOLD[UNIT]",
            type=as_argument(_condition),
            help=text,
        )
    group.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help="apply this policy whatever its target and rollout",
    )
    group.add_argument("--conversation", metavar="ID", help="what a rollout by conversation goes by")


def watching(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``generate``; a trigger's name is its action and feature."""
    triggers = [
        Trigger(f"{name} on {when.terms[0].sae}:{when.terms[0].feature}", when, action)
        for name, action in _ACTIONS.items()
        for when in getattr(args, f"{name}_on")
    ]
    return {"triggers": triggers, "policies": args.policy, "conversation": args.conversation}


def _condition(spelling: str) -> Condition:
    target, equals, value = spelling.rpartition("=")
    if not equals:
        raise ValueError(f"{spelling!r} has no threshold; write it like 'resid4:4021=2'")
    unit: Unit = next((unit for unit in UNITS if value.endswith(unit)), "raw")
    ref = FeatureRef.parse(target)
    try:
        return Condition.on(ref.sae, ref.feature, float(value.removesuffix(unit)), unit=unit)
    except ValueError:
        raise ValueError(f"{value!r} is not a number, alone or followed by one of {', '.join(UNITS)}") from None

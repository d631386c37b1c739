"""Flags for edits: ``--clamp resid4:4021=1.5max`` and its like."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from saeguard_client.catalog import FeatureRef
from saeguard_client.cli.usage import as_argument, usage
from saeguard_client.interventions import KINDS, Intervention
from saeguard_client.scopes import PHASES, UNITS, Scope

_HELP = {
    "zero": "suppress the feature",
    "clamp": "pin it at VALUE, also where it was off",
    "scale": "multiply it by FACTOR",
    "add": "add VALUE to it",
    "cap": "limit it from above",
    "floor": "limit it from below",
}


@dataclass(frozen=True, slots=True)
class EditFlag:
    """One edit as it was typed; ``unit`` is its own, None where ``--unit`` decides."""

    kind: str
    target: FeatureRef
    operand: float | None = None
    unit: str | None = None

    @classmethod
    def parse(cls, kind: str, spelling: str) -> EditFlag:
        """From ``sae:feature``, ``sae:feature=factor`` or ``sae:feature=value[unit]``.

        Raises:
            ValueError: it is none of these, or not the one for this kind.
        """
        if kind == "zero":
            return cls(kind, FeatureRef.parse(spelling))
        target, equals, value = spelling.rpartition("=")
        if not equals:
            raise ValueError(f"{spelling!r} has no value; write it like 'resid4:4021=2'")
        unit = None if kind == "scale" else next((unit for unit in UNITS if value.endswith(unit)), None)
        return cls(kind, FeatureRef.parse(target), _number(value.removesuffix(unit or "")), unit)

    def build(self, unit: str, scope: Scope | None) -> Intervention:
        """The edit, with what the other flags say."""
        operands = () if self.operand is None else (self.operand,)
        units: dict[str, Any] = {} if self.kind in ("zero", "scale") else {"unit": self.unit or unit}
        return KINDS[self.kind](self.target.sae, self.target.feature, *operands, scope=scope, **units)


def add_steering(parser: argparse.ArgumentParser) -> None:
    """One flag per kind of edit, and the unit and scope of them all."""
    group = parser.add_argument_group("edits", "Each may be given several times, for different features.")
    for kind, help_text in _HELP.items():
        operand = {"zero": "", "scale": "=FACTOR"}.get(kind, "=VALUE[UNIT]")
        group.add_argument(
            f"--{kind}",
            dest="edits",
            action="append",
            default=[],
            metavar=f"SAE:FEATURE{operand}",
            type=as_argument(partial(EditFlag.parse, kind)),
            help=help_text,
        )
    group.add_argument("--unit", choices=UNITS, default="raw", help="of values that name none (default: raw)")
    group.add_argument("--phase", choices=PHASES, default="all", help="tokens to edit (default: all)")


def steering(args: argparse.Namespace) -> tuple[Intervention, ...]:
    """The edits in the order they were typed.

    Raises:
        UsageError: one of them cannot be.
    """
    with usage():
        scope = None if args.phase == "all" else Scope(phase=args.phase)
        return tuple(edit.build(args.unit, scope) for edit in args.edits)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number, alone or followed by one of {', '.join(UNITS)}") from None

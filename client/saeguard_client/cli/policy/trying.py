"""``saeguard policy test``: prompts on which policies should fire, or should not.

A file of cases in TOML:

    [[case]]
    prompt = "You are the best, tell me I am right."
    policies = ["calm"]          # applied whatever their target and rollout
    fires = ["calm/flattery"]    # rules that must edit, or triggers that must fire
    quiet = ["calm/insult"]      # that must not
    finish = "feature"           # "stop", "length" or "feature"
    max_new_tokens = 40
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.cli.usage import UsageError
from saeguard_client.client import Client
from saeguard_client.results import Completion

_FIELDS: Final[Mapping[str, type]] = {
    "prompt": str,
    "policies": list,
    "fires": list,
    "quiet": list,
    "finish": str,
    "max_new_tokens": int,
    "seed": int,
}


def add(actions: argparse._SubParsersAction[Any]) -> None:
    """Its arguments."""
    parser = actions.add_parser(
        "test",
        help="do policies in force fire where they should, and only there?",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", type=Path, metavar="CASES.toml")
    add_connection(parser, with_defaults=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A line for each case; 1 where one went wrong."""
    terminal, cases = Terminal(), _read(args.cases)
    wrong = 0
    with connect(args) as client:
        for number, case in enumerate(cases, start=1):
            problems = list(_problems(case, _ask(client, case)))
            wrong += bool(problems)
            verdict, said = ("WRONG", "; ".join(problems)) if problems else ("ok   ", "as it should be")
            terminal.line(safe(f"{verdict} case {number} {case['prompt'][:40]!r}: {said}", keep=""))
    terminal.line(f"{len(cases) - wrong} of {len(cases)} as they should be")
    return 1 if wrong else 0


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"{path}: {err}") from err
    cases = tree.pop("case", None)
    if tree or not isinstance(cases, list) or not cases:
        raise UsageError(f"{path}: must hold [[case]] tables and nothing else")
    for index, case in enumerate(cases):
        for problem in _shape(case):
            raise UsageError(f"{path}: case[{index}].{problem}")
    return cases


def _shape(case: Mapping[str, Any]) -> Iterator[str]:
    for name in case.keys() - _FIELDS.keys():
        yield f"{name}: is not one of {', '.join(_FIELDS)}"
    if "prompt" not in case:
        yield "prompt: is missing"
    if not case.keys() & {"fires", "quiet", "finish"}:
        yield "fires: one of fires, quiet and finish must be there"
    for name, value in case.items():
        if name in _FIELDS and (not isinstance(value, _FIELDS[name]) or isinstance(value, bool)):
            yield f"{name}: must be a {_FIELDS[name].__name__}"
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            yield f"{name}: must be strings"


def _ask(client: Client, case: Mapping[str, Any]) -> Completion:
    return client.generate(
        case["prompt"],
        policies=case.get("policies", ()),
        temperature=0.0,
        seed=case.get("seed"),
        max_new_tokens=case.get("max_new_tokens"),
    )


def _problems(case: Mapping[str, Any], done: Completion) -> Iterator[str]:
    fired = _fired(done)
    yield from (f"{rule} did not fire" for rule in case.get("fires", ()) if rule not in fired)
    yield from (f"{rule} fired" for rule in case.get("quiet", ()) if rule in fired)
    if case.get("finish", done.finish_reason) != done.finish_reason:
        yield f"finished with {done.finish_reason}, not {case['finish']}"


def _fired(done: Completion) -> set[str]:
    """Rules that edited, or in shadow would have, and triggers that fired."""
    if done.receipt is None:
        return set()
    edited = {f"{one.policy}/{one.rule}" for one in done.receipt.interventions if one.tokens_edited}
    return edited | {f"{one.policy}/{one.name}" for one in done.receipt.triggers if one.first_position is not None}

"""``saeguard policy``: what the server enforces; read, changed, put in force, tried."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from saeguard.catalog import Activation, PolicyChange, PolicyHistory, PolicySet, PolicySummary, Revision
from saeguard.results import Completion
from saeguard_client.cli.generate import as_json
from saeguard_client.cli.terminal import Terminal, UsageError, add_connection, connect, safe, table
from saeguard_client.client import Client

_EPILOG = """examples:
  saeguard policy diff policies/                         what apply would change; nothing is stored
  saeguard policy apply policies/ --reason "calmer tone"
  saeguard policy activate 7 --reason "reviewed"
  saeguard policy rollback --reason "too many stops"     back to the revision that was in force before
  saeguard policy test cases.toml                        do the rules fire where they should, and only there?
"""


def add_policy(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's sub-commands and their arguments."""
    parser = subparsers.add_parser(
        "policy",
        help="read, change and enforce policies",
        description="What the server enforces on everybody's requests. A change makes a revision; a revision takes "
        "effect when it is activated.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for add_actions in (add_reading, add_changing, add_enforcing, add_trying):
        add_actions(actions)


# Policy files on disk, as the server wants them.


_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_KINDS = (".yaml", ".yml", ".json")


def read_documents(paths: Iterable[Path]) -> dict[str, str]:
    """Content by name, of these files and of those in these folders, their folders included.

    Raises:
        UsageError: a file cannot be read, two have one name, or there is none.
    """
    found: dict[str, str] = {}
    for path in paths:
        for name, file in _files(path):
            if name in found:
                raise UsageError(f"{file}: another file is called {name} too")
            found[name] = _text(file)
    if not any(not name.endswith(".json") for name in found):
        raise UsageError("there is no .yaml file")
    return found


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        if file.suffix in _KINDS and file.is_file():
            yield file.relative_to(path).as_posix(), file


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as err:
        raise UsageError(f"{file}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise UsageError(f"{file}: not UTF-8 at byte {err.start}") from err


# ``saeguard policy apply | diff | lint | delete``: what makes revisions, or says what would.


NOTICED = 1
"""Exit code of ``lint`` where it noticed something."""


def add_changing(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    applying = actions.add_parser("apply", help="store a new revision made of these files")
    applying.add_argument("--reason", required=True, help="why, for the history")
    applying.add_argument("--activate", action="store_true", help="put it in force at once, where one person may")
    comparing = actions.add_parser("diff", help="what apply would change")
    linting = actions.add_parser("lint", help="check these files completely, against what is served")
    for parser, run in ((applying, run_apply), (comparing, run_diff), (linting, run_lint)):
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="YAML files, or folders of them")
        if parser is not linting:
            parser.add_argument("--prune", action="store_true", help="delete policies that are not in these files")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)
    deleting = actions.add_parser("delete", help="store a new revision without one policy")
    deleting.add_argument("name")
    deleting.add_argument("--reason", required=True, help="why, for the history")
    add_connection(deleting, with_defaults=False)
    deleting.set_defaults(run=run_delete)


def run_apply(args: argparse.Namespace) -> int:
    """Stores, and tells what it stored."""
    terminal, files = Terminal(), read_documents(args.paths)
    with connect(args) as client:
        before = client.policies()
        change = client.apply_policies(files, etag=before.etag, reason=args.reason, prune=args.prune)
        _findings(terminal, change)
        number = change.revision.number
        if before.revision is not None and number == before.revision.number:
            terminal.line(f"nothing to change: revision {number} says the same")
        else:
            _diff(terminal, change)
            terminal.line(f"stored as revision {number}")
        if args.activate:
            expected = before.active.number if before.active else 0
            done = client.activate_revision(number, expected_activation=expected, reason=args.reason)
            terminal.line(f"revision {done.revision} is in force (activation {done.number})")
        elif before.active is None or before.active.revision != number:
            terminal.line(f"not in force yet: saeguard policy activate {number} --reason ...")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Prints what would change."""
    terminal, files = Terminal(), read_documents(args.paths)
    with connect(args) as client:
        change = client.apply_policies(files, prune=args.prune, dry_run=True)
    _findings(terminal, change)
    if change.revision.diff:
        _diff(terminal, change)
    else:
        terminal.line("nothing would change")
    return 0


def run_lint(args: argparse.Namespace) -> int:
    """Prints what the server notices; 1 where that is anything."""
    terminal, files = Terminal(), read_documents(args.paths)
    with connect(args) as client:
        change = client.apply_policies(files, dry_run=True)
    _findings(terminal, change)
    if change.findings:
        return NOTICED
    terminal.line("nothing to say against these policies")
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Stores a revision without the policy."""
    terminal = Terminal()
    with connect(args) as client:
        change = client.delete_policy(args.name, etag=client.policies().etag, reason=args.reason)
    number = change.revision.number
    terminal.line(f"stored as revision {number}; not in force yet: saeguard policy activate {number} --reason ...")
    return 0


def _findings(terminal: Terminal, change: PolicyChange) -> None:
    for one in change.findings:
        terminal.note(safe(f"warning: {one.policy + ': ' if one.policy else ''}{one.message}", keep=""))


def _diff(terminal: Terminal, change: PolicyChange) -> None:
    terminal.line(safe(change.revision.diff.rstrip("\n"), keep="\n"))


# ``saeguard policy activate | rollback``.


def add_enforcing(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    activating = actions.add_parser("activate", help="put a revision in force")
    activating.add_argument("revision", type=int)
    back = actions.add_parser("rollback", help="put an older revision in force again")
    back.add_argument("--to", type=int, metavar="REVISION", help="default: the one that was in force before")
    for parser, run in ((activating, run_activate), (back, run_rollback)):
        parser.add_argument("--reason", required=True, help="why, for the history")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)


def run_activate(args: argparse.Namespace) -> int:
    """Activates."""
    with connect(args) as client:
        active = client.policies().active
        activation = client.activate_revision(args.revision, expected_activation=_number(active), reason=args.reason)
    return _print_activation(activation, active)


def run_rollback(args: argparse.Namespace) -> int:
    """Activates an older revision."""
    with connect(args) as client:
        active = client.policies().active
        activation = client.rollback_policies(args.to, expected_activation=_number(active), reason=args.reason)
    return _print_activation(activation, active)


def _number(active: Activation | None) -> int:
    return 0 if active is None else active.number


def _print_activation(activation: Activation, before: Activation | None) -> int:
    was = f", in place of revision {before.revision}" if before else ""
    Terminal().line(f"revision {activation.revision} is in force{was} (activation {activation.number})")
    return 0


# ``saeguard policy list | show | history``.


def add_reading(actions: argparse._SubParsersAction[Any]) -> None:
    """Their arguments."""
    listing = actions.add_parser("list", help="policies at a glance, and what is in force")
    showing = actions.add_parser("show", help="policies as YAML, to edit and apply")
    for parser in (listing, showing):
        parser.add_argument("--revision", type=int, help="default: the latest")
    past = actions.add_parser("history", help="revisions and activations, the latest first")
    past.add_argument("--limit", type=int, help="at most so many of each")
    past.add_argument("--diff", action="store_true", help="also what each revision changed")
    for parser, run in ((listing, run_list), (showing, run_show), (past, run_history)):
        if parser is not showing:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        add_connection(parser, with_defaults=False)
        parser.set_defaults(run=run)


def run_list(args: argparse.Namespace) -> int:
    """Prints a line for each policy."""
    with connect(args) as client:
        found = client.policies(args.revision)
    return _print(args, found, _list(found))


def run_show(args: argparse.Namespace) -> int:
    """Prints the policies as YAML."""
    with connect(args) as client:
        found = client.policies(args.revision)
    Terminal().line(safe(found.yaml.rstrip("\n"), keep="\n"))
    return 0


def run_history(args: argparse.Namespace) -> int:
    """Prints what happened."""
    with connect(args) as client:
        found = client.policy_history(args.limit)
    return _print(args, found, _history(found, with_diffs=args.diff))


def when(time: datetime | None) -> str:
    """A time as people read it."""
    return "-" if time is None else time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _print(args: argparse.Namespace, found: PolicySet | PolicyHistory, lines: Iterator[str]) -> int:
    terminal = Terminal()
    if args.json:
        terminal.line(as_json(found))
        return 0
    for line in lines:
        terminal.line(safe(line, keep=""))
    return 0


def _list(found: PolicySet) -> Iterator[str]:
    if found.active is None:
        yield "in force  nothing: no revision was ever activated"
    else:
        one = found.active
        yield f"in force  revision {one.revision}, since {when(one.time)}, activation {one.number} by {one.actor}"
    if found.revision is None:
        yield "listed    nothing: there is no revision"
        return
    yield f"listed    revision {found.revision.number} of {when(found.revision.time)} by {found.revision.author}"
    yield ""
    yield from table([("POLICY", "MODE", "SHARE", "RULES", "OWNER"), *(_row(one) for one in found.policies)])


def _row(one: PolicySummary) -> tuple[str, str, str, str, str]:
    mode = one.mode if one.expires is None else f"{one.mode} until {when(one.expires)}"
    return one.name, mode, f"{one.share:.0%}", ", ".join((*one.rules, *one.triggers)), one.owner or "-"


def _history(found: PolicyHistory, *, with_diffs: bool) -> Iterator[str]:
    both: tuple[Revision | Activation, ...] = (*found.revisions, *found.activations)
    for one in sorted(both, key=lambda one: one.time or _NEVER, reverse=True):
        yield _activation(one) if isinstance(one, Activation) else _revision(one)
        if with_diffs and isinstance(one, Revision):
            yield from (f"    {line}" for line in one.diff.splitlines())


def _activation(one: Activation) -> str:
    what = f"activation {one.number} puts revision {one.revision} in force"
    return f"{when(one.time)}  {what}  {one.actor}: {one.reason or '-'}"


def _revision(one: Revision) -> str:
    return f"{when(one.time)}  revision {one.number}  {one.author}: {one.reason or '-'}"


# ``saeguard policy test``: prompts on which policies should fire, or should not.
#
# A file of cases in TOML:
#
# [[case]] prompt = "You are the best, tell me I am right." policies = ["calm"] # applied whatever their target and
# rollout fires = ["calm/flattery"] # rules that must edit, or triggers that must fire quiet = ["calm/insult"] # that
# must not finish = "feature" # "stop", "length" or "feature" max_new_tokens = 40


_FIELDS: Final[Mapping[str, type]] = {
    "prompt": str,
    "policies": list,
    "fires": list,
    "quiet": list,
    "finish": str,
    "max_new_tokens": int,
    "seed": int,
}


def add_trying(actions: argparse._SubParsersAction[Any]) -> None:
    """Its arguments."""
    parser = actions.add_parser(
        "test",
        help="do policies in force fire where they should, and only there?",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", type=Path, metavar="CASES.toml")
    add_connection(parser, with_defaults=False)
    parser.set_defaults(run=run_test)


def run_test(args: argparse.Namespace) -> int:
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

"""``saeguard audit``: check that nobody changed the records, show them, and run a request again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from saeguard.results import Completion
from saeguard_client import SaeguardError
from saeguard_client.cli.terminal import add_connection, connect
from saeguard_server.audit.log import request_from_record, tokens_digest

GOOD, BROKEN, USAGE = 0, 1, 2


def add_audit(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("audit", help="check, show and replay audit records", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    verify = _add_action(actions, "verify", "check every record against the one before it", _verify)
    verify.add_argument("--head", metavar="SEQ:HASH", help="a record that must be there, as an earlier run told")
    show = _add_action(actions, "show", "print the records of a request as JSON lines", _show)
    show.add_argument("request_id")
    replay = _add_action(actions, "replay", "run a request again and compare what it gives", _replay)
    replay.add_argument("request_id")
    prompt = replay.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text it had")
    prompt.add_argument("--prompt-file", type=Path, help="a file with that text")
    add_connection(replay, with_defaults=False)
    key = actions.add_parser("key", help='print a new key for text = "encrypt"')
    key.set_defaults(run=_key)


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("--folder", type=Path, required=True, help="the server's audit.folder")
    parser.add_argument("--key-file", type=Path, help="the server's audit.chain_key_file")
    parser.set_defaults(run=lambda arguments: _run(run, arguments))
    return parser


def _run(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    # Here and below: the command line asks every command to register before it knows which one runs.
    from saeguard_server.audit.chain import BrokenChain

    try:
        return run(arguments)
    except BrokenChain as err:
        sys.stderr.write(f"BROKEN: {err}\n")
        return BROKEN
    except (OSError, ValueError) as err:
        sys.stderr.write(f"saeguard audit: {err}\n")
        return USAGE


def _records(arguments: argparse.Namespace) -> Any:
    from saeguard_server.audit.chain import read_audit

    key = arguments.key_file.read_bytes().strip() if arguments.key_file else None
    return read_audit(arguments.folder, key)


def _verify(arguments: argparse.Namespace) -> int:
    missing = arguments.head
    count, head, lost, first, last = 0, "", 0, "", ""
    for record, after in _records(arguments):
        count += 1
        first, last = first or record["time"], record["time"]
        lost += record.get("records", 0) if record["kind"] == "lost" else 0
        head = f"{after.seq}:{after.hash}"
        if head == missing:
            missing = None
    if missing is not None:
        sys.stderr.write(f"BROKEN: the record {missing} is not there: the end was cut off, or the chain made anew\n")
        return BROKEN
    if not count:
        sys.stdout.write("no records\n")
        return GOOD
    sys.stdout.write(f"{count} records, none changed or missing, {first} to {last}\nhead {head}\n")
    if lost:
        sys.stdout.write(f"{lost} records could not be written while the disk was full or gone\n")
    return GOOD


def _show(arguments: argparse.Namespace) -> int:
    records = [record for record, _ in _records(arguments) if record.get("request_id") == arguments.request_id]
    for record in records:
        sys.stdout.write(json.dumps(record, sort_keys=True) + "\n")
    return GOOD if records else _none(arguments.request_id)


def _replay(arguments: argparse.Namespace) -> int:
    done = [
        record
        for record, _ in _records(arguments)
        if record.get("request_id") == arguments.request_id and record["kind"] == "request"
    ]
    if not done:
        return _none(arguments.request_id)
    if "seed" not in done[-1]:
        sys.stderr.write("saeguard audit: the request was refused before any work: there is nothing to run again\n")
        return USAGE
    prompt = arguments.prompt_file.read_text(encoding="utf-8") if arguments.prompt_file else arguments.prompt
    try:
        with connect(arguments) as client:
            again = client.generate(prompt, **request_of(done[-1]))
    except SaeguardError as err:
        sys.stderr.write(f"saeguard audit: {err}\n")
        return BROKEN
    sys.stdout.write(f"{again.text}\n")
    problems = differences(done[-1], again)
    for problem in problems:
        sys.stderr.write(f"DIFFERS: {problem}\n")
    if not problems:
        sys.stderr.write("the same as recorded\n")
    return BROKEN if problems else GOOD


def _key(arguments: argparse.Namespace) -> int:
    from cryptography.fernet import Fernet

    sys.stdout.write(Fernet.generate_key().decode() + "\n")
    return GOOD


def _none(request_id: str) -> int:
    sys.stderr.write(f"saeguard audit: there is no record of request {request_id}\n")
    return USAGE


def request_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``Client.generate`` takes beside the prompt. Raises ValueError: it is no record of a request."""
    request = request_from_record(record["asked"], "-")
    sampling = {field.name: getattr(request.sampling, field.name) for field in fields(request.sampling)}
    return {
        **sampling,
        "seed": record["seed"],
        "steer": request.interventions,
        "max_relative_edit": request.max_relative_edit,
        "watch": request.watch,
        "parse_special_tokens": request.parse_special_tokens,
        "triggers": request.triggers,
        "policies": request.policies,
        "conversation": request.conversation,
    }


def differences(record: Mapping[str, Any], done: Completion) -> list[str]:
    """What is not as recorded; empty where the request was answered alike."""
    return list(_differences(record, done))


def _differences(record: Mapping[str, Any], done: Completion) -> Iterator[str]:
    policy = record["policy"]
    if policy is not None and (done.policy is None or policy["revision"] != done.policy.revision):
        now = "none" if done.policy is None else done.policy.revision
        yield f"policy revision {policy['revision']} was in force, now it is {now}"
    then_and_now: tuple[tuple[str, Any, Any], ...] = (
        ("outcome", record["outcome"], done.finish_reason),
        ("prompt tokens", record.get("prompt_tokens"), done.usage.prompt_tokens),
        ("generated tokens", record.get("generated_tokens"), done.usage.generated_tokens),
        ("model", record.get("model"), done.receipt.model_digest if done.receipt else None),
        ("steering", record.get("steering"), done.receipt.steering_digest if done.receipt else None),
    )
    for name, was, now in then_and_now:
        if was != now:
            yield f"{name}: {was} then, {now} now"
    if "answer_sha256" in record and record["answer_sha256"] != tokens_digest([token.id for token in done.tokens]):
        yield "the tokens are others"

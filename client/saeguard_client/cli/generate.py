"""``saeguard generate``: text as it is made, and one line on what was done to it."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from array import array
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from math import isfinite
from typing import Any

from saeguard.requests import ChatMessage, Input, Sampling
from saeguard.results import Completion, InterventionReceipt, StreamChunk, TriggerReceipt
from saeguard.types import (
    KINDS,
    PHASES,
    UNITS,
    Action,
    Condition,
    FeatureRef,
    Flag,
    Intervention,
    Scope,
    Stop,
    Trigger,
    Unit,
)
from saeguard_client.cli.terminal import (
    Terminal,
    UsageError,
    add_connection,
    as_argument,
    beside,
    connect,
    connect_async,
    safe,
    usage,
)

# Results as one line for people and as JSON for programs.


def summary(completion: Completion) -> str:
    """What happened, on one line: why it ended, how much, how long, what was edited."""
    usage, receipt = completion.usage, completion.receipt
    parts = [
        _reason(completion),
        f"{usage.prompt_tokens} + {usage.generated_tokens} tokens",
        f"{completion.timings.total_s:.2f} s",
        f"seed {completion.seed}",
    ]
    if receipt is not None:
        parts.extend(_edit(one) for one in receipt.interventions)
        parts.extend(_trigger(one) for one in receipt.triggers)
        parts.append(f"steering {receipt.steering_digest[:12]}")
    if completion.policy is not None:
        parts.append(f"policies of revision {completion.policy.revision}")
    return safe(" | ".join(parts), keep="")


def as_json(value: object) -> str:
    """One JSON value; what JSON cannot hold (NaN, infinity) is null."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """Dataclasses as objects, sequences and arrays as lists."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | array):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _reason(completion: Completion) -> str:
    by = completion.stopped_by
    return completion.finish_reason if by is None else f"stopped by {_whose(by.policy, by.name)}"


def _whose(policy: str, name: str) -> str:
    return f"{policy}/{name}" if policy else name


def _trigger(one: TriggerReceipt) -> str:
    fired = "did not fire" if one.first_position is None else f"fired at position {one.first_position}"
    return f"{'shadow ' if one.is_shadow else ''}{_whose(one.policy, one.name)} {fired}"


def _edit(one: InterventionReceipt) -> str:
    whose = f"{'shadow ' if one.is_shadow else ''}{_whose(one.policy, one.rule)}: " if one.policy else ""
    done = f"{whose}{one.kind} {one.sae}:{one.feature} edited {one.tokens_edited}/{one.tokens_eligible} tokens"
    size = f", mean size {one.mean_relative_edit:.2g} of |x|"
    return done + size + (f", {one.tokens_capped} capped" if one.tokens_capped else "")


# ``saeguard generate --compare``: the same prompt and seed, without and with the edits, at the same time.


_TITLES = ("unsteered", "steered")
_NARROW = 60


def run_compare(
    args: argparse.Namespace, prompt: Input, steer: tuple[Intervention, ...], arguments: dict[str, Any]
) -> int:
    """Shows both; 0 when both were answered."""
    terminal = Terminal()
    # One seed for both: otherwise they differ by chance and the edits cannot be seen.
    seed = secrets.randbelow(2**32) if arguments["seed"] is None else arguments["seed"]
    with usage():
        plain, steered = asyncio.run(_both(args, prompt, steer, {**arguments, "seed": seed}))
    if args.json:
        terminal.line(as_json(dict(zip(_TITLES, (plain, steered), strict=True))))
        return 0
    for line in _shown(safe(plain.text), safe(steered.text), terminal):
        terminal.line(line)
    terminal.note(summary(steered))
    return 0


async def _both(
    args: argparse.Namespace, prompt: Input, steer: tuple[Intervention, ...], arguments: dict[str, Any]
) -> tuple[Completion, Completion]:
    async with connect_async(args) as client:
        return await asyncio.gather(
            client.generate(prompt, **arguments), client.generate(prompt, steer=steer, **arguments)
        )


def _shown(plain: str, steered: str, terminal: Terminal) -> list[str]:
    if terminal.is_tty and terminal.width >= _NARROW:
        titles = list(beside(*_TITLES, terminal.width))
        return [terminal.shaded(titles[0], "1"), *beside(plain, steered, terminal.width)]
    return [f"--- {_TITLES[0]}", plain, f"--- {_TITLES[1]}", steered]


# Flags for sampling; each is named like the argument of ``Client.generate`` that it sets.


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
    """Arguments for ``Client.generate``."""
    return {field.name: getattr(args, field.name) for field in fields(Sampling)}


# Flags for edits: ``--clamp resid4:4021=1.5max`` and its like.


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

    def build(self, unit: str, scope: Scope) -> Intervention:
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
        scope = Scope(phase=args.phase)
        return tuple(edit.build(args.unit, scope) for edit in args.edits)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number, alone or followed by one of {', '.join(UNITS)}") from None


# Flags for triggers and policies: ``--stop-on resid4:4021=1.5max``, ``--policy NAME``.


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


EXAMPLES = """examples:
  saeguard generate "Once upon a time" --max-new-tokens 60
  saeguard generate "I live in" --clamp resid4:4021=1.5max --compare
  echo "What is a bridge?" | saeguard generate - --chat --zero resid4:17 --json
"""


def add_generate(subparsers: argparse._SubParsersAction[Any]) -> None:
    """The command's arguments."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt, with or without edits",
        description="Continue a prompt. Text goes to standard output, a line on what was done to standard error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or - to read it from standard input")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message to a chat model")
    parser.add_argument("--compare", action="store_true", help="show the unsteered text beside the steered one")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, nothing else")
    parser.add_argument(
        "--watch",
        action="append",
        default=[],
        metavar="SAE:FEATURE",
        type=as_argument(FeatureRef.parse),
        help="with --json: also read this feature on every token; may be repeated",
    )
    parser.add_argument("--max-relative-edit", type=float, metavar="R", help="limit |edit| / |x| on every token")
    add_steering(parser)
    add_watching(parser)
    add_sampling(parser)
    add_connection(parser, with_defaults=False)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Sends the prompt; 0 when it was answered."""
    arguments = {**sampling(args), "watch": args.watch, "max_relative_edit": args.max_relative_edit}
    steer, prompt, watched = steering(args), read_prompt(args.prompt, args.chat), watching(args)
    if args.compare:
        if not steer:
            raise UsageError("--compare needs an edit, such as --clamp SAE:FEATURE=VALUE")
        if any(watched.values()):
            raise UsageError("--compare shows edits alone, without triggers and policies")
        return run_compare(args, prompt, steer, arguments)
    terminal = Terminal()
    with connect(args) as client:
        with usage():
            stream = client.generate_stream(prompt, steer=steer, **arguments, **watched)
        with closing(stream) as chunks:
            completion = _last(chunks, terminal, is_quiet=args.json)
    if args.json:
        terminal.line(as_json(completion))
    else:
        terminal.note(summary(completion))
    return 0


def read_prompt(spelling: str, is_chat: bool) -> Input:
    """``-`` stands for standard input."""
    text = sys.stdin.read() if spelling == "-" else spelling
    return [ChatMessage("user", text)] if is_chat else text


def _last(chunks: Iterable[StreamChunk], terminal: Terminal, *, is_quiet: bool) -> Completion:
    """The completion, after showing the text; whatever ends it, the next output begins on a line of its own."""
    completion = None
    try:
        for chunk in chunks:
            completion = chunk.completion
            if not is_quiet:
                terminal.write(safe(chunk.text))
    finally:
        terminal.end_line()
    assert completion is not None  # the stream raises rather than end without one
    return completion

"""``saeguard generate``: text as it is made, and one line on what was done to it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from saeguard_client.catalog import FeatureRef
from saeguard_client.cli import compare
from saeguard_client.cli.connection import add_connection, connect
from saeguard_client.cli.report import as_json, summary
from saeguard_client.cli.sampling import add_sampling, sampling
from saeguard_client.cli.steering import add_steering, steering
from saeguard_client.cli.terminal import Terminal, safe
from saeguard_client.cli.usage import UsageError, as_argument, usage
from saeguard_client.cli.watching import add_watching, watching
from saeguard_client.inputs import ChatMessage, Input
from saeguard_client.results import Completion, StreamChunk

EXAMPLES = """examples:
  saeguard generate "Once upon a time" --max-new-tokens 60
  saeguard generate "I live in" --clamp resid4:4021=1.5max --compare
  echo "What is a bridge?" | saeguard generate - --chat --zero resid4:17 --json
"""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sends the prompt; 0 when it was answered."""
    arguments = {**sampling(args), "watch": args.watch, "max_relative_edit": args.max_relative_edit}
    steer, prompt, watched = steering(args), read_prompt(args.prompt, args.chat), watching(args)
    if args.compare:
        if not steer:
            raise UsageError("--compare needs an edit, such as --clamp SAE:FEATURE=VALUE")
        if any(watched.values()):
            raise UsageError("--compare shows edits alone, without triggers and policies")
        return compare.run(args, prompt, steer, arguments)
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

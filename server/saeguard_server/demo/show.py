"""The demonstration: starts the server on the bundled model, steers it through the client, prints what changed.

    python -m saeguard_server.demo.show [--generations 200]

Exit code 1 when a figure is not where it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import textwrap
import time
from typing import Any

from saeguard_client import AsyncClient
from saeguard_server.demo.replay import Replay, Shown
from saeguard_server.demo.scenarios import ASSETS, load
from saeguard_server.demo.scorers import Interval
from saeguard_server.demo.serving import served

SEED = 7_000_000
"""Far from the seeds that made the assets."""


def main() -> int:
    """Runs the demonstration; the exit code says whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=200, help="per scenario and side (default: 200)")
    parser.add_argument("--target", help="use a server that already serves the demo model")
    arguments = parser.parse_args()
    if arguments.target:
        return asyncio.run(_show(arguments.target, arguments.generations))
    with served() as server:
        return asyncio.run(_show(server.target, arguments.generations))


async def _show(target: str, generations: int) -> int:
    demonstration = load()
    async with AsyncClient(target) as client:
        model, saes = await client.model(), await client.saes()
        _say(f"{model.name}: {model.architecture}, {model.num_layers} layers of {model.d_model}, on {target}")
        for sae in saes:
            _say(f"  SAE {sae.name}: {sae.d_sae} features at {sae.site}, {sae.num_labelled} labelled")
        replay, start, shown = Replay(client, demonstration), time.monotonic(), []
        for number, scenario in enumerate(demonstration.scenarios):
            one = await replay.scenario(scenario, generations, SEED + number * 10_000)
            shown.append(one)
            _print(one, generations)
        took = time.monotonic() - start
        same = await replay.untouched(demonstration.scenarios[0], range(SEED, SEED + 16))
    _print_separation()
    _say(f"\nUnsteered requests beside steered ones, compared with the same requests alone: {same} of 16 identical")
    _say(f"{replay.tokens} tokens generated in {took:.0f} s ({replay.tokens / took:.0f} tokens/s)")
    failed = [one.scenario.name for one in shown if not one.holds]
    _say("Every scenario did what it should." if not failed else f"Not where it should be: {', '.join(failed)}")
    return 0 if not failed and same == 16 else 1


def _print(one: Shown, generations: int) -> None:
    scenario = one.scenario
    _say(f"\n{scenario.title}")
    prompt = scenario.prompt
    _say(f"  prompt:     {prompt if isinstance(prompt, str) else ' / '.join(turn.content for turn in prompt)}")
    edits = (f"{edit.kind}{_value(edit.value, edit.unit)} {edit.sae}:{edit.feature}" for edit in scenario.interventions)
    _say(f"  edits:      {', '.join(edits)}")
    name = scenario.scorer.replace("_", " ")
    _say(f"  unsteered:  {_interval(one.base)} {name}, {generations} generations")
    _say(f"  steered:    {_interval(one.steered)} {name}, {one.tokens_edited} tokens edited by the receipts")
    changes = ", ".join(f"{kind} {_signed(change)}" for kind, change in one.loss_change.items())
    _say(f"  neutral text, change of loss in nats per token: {changes}")
    for label, text in zip(("without", "with"), one.samples, strict=True):
        shown = textwrap.shorten(repr(text)[1:-1], width=150, placeholder=" ...")
        _say(f"  {label + ':':<11} {shown}")


def _print_separation() -> None:
    """What the build measured on held-out text: the best feature against the best neuron, chosen alike."""
    rows = json.loads((ASSETS / "separation.json").read_text(encoding="utf-8"))
    _say("\nHow well one unit marks a concept: token F1 (AUROC) on held-out text, measured when the assets were made")
    _say(f"  {'concept':<14}{'SAE':<10}{'best feature':<18}{'best MLP neuron':<18}{'best residual dimension'}")
    for row in rows:
        units = (f"{one['heldout_f1']:.2f} ({one['heldout_auroc']:.2f})" for one in _units(row))
        _say(f"  {row['concept']:<14}{row['sae']:<10}" + "".join(f"{unit:<18}" for unit in units))


def _units(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    return row["feature"], row["mlp_neuron"], row["residual_dimension"]


def _interval(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _signed(value: Interval) -> str:
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f" {value:g}{' max' if unit == 'max' else ''}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

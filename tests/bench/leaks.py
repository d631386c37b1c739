"""Does anything leave the server from a token that fired on? As many generations as you like, in random batches.

A small model on the embedded engine: its answers are known without a trigger, and for each a threshold is set that one
of its tokens is the first to exceed. Then the same is asked under a stop, in batches of random company: too little
memory, parts of any size, prompts that begin alike, cancellations, edits under conditions beside it. Prints JSON; exit
1 where a request got a token, a byte of text or a reading that it must not have.

    PYTHONPATH=tests python -m bench.leaks                     10,000 generations
    PYTHONPATH=tests python -m bench.leaks --generations 500
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from saeguard.requests import GenerateRequest
from saeguard.results import StreamChunk
from saeguard.types import Clamp, Condition, FeatureRef, Scope, Stop, Term, Trigger
from support.engines import greedy, make_world, prompt
from support.stepping import Asked, Loaded, Stepped

NEW, LENGTHS, BATCH = 24, (3, 9, 15, 29, 40, 61), 200
PROBE = FeatureRef("resid_post", 4)


@dataclass(frozen=True)
class Case:
    """A request, and all that it may be sent."""

    request: GenerateRequest
    ids: tuple[int, ...]
    text: str
    last: int
    """The last position of which a reading may be told."""


def cases(core: Stepped, seeds: int) -> list[Case]:
    """For every token of every answer that the probe is larger on than on all before: a stop just below that."""
    found = []
    for seed in range(seeds):
        length = LENGTHS[seed % len(LENGTHS)]
        base = greedy(prompt(seed // 2, length), NEW, watch=(PROBE,))
        answer = core.answer(base)
        values = [one.values[0] for one in answer.readings if one.position >= length]
        for at, value in enumerate(values):
            before = max(values[:at], default=0.0)
            if value > before + 1e-3:
                when = Condition(
                    terms=(Term(PROBE.sae, PROBE.feature),),
                    threshold=(before + value) / 2,
                    scope=Scope(phase="generated"),
                )
                request = replace(base, triggers=(Trigger("secret", when, Stop()),))
                ids = tuple(answer.ids[:at])
                safe = core.answer(replace(base, sampling=replace(base.sampling, max_new_tokens=at))).text if at else ""
                found.append(Case(request, ids, safe, length + at - 1))
    return found


def neighbour(draw: random.Random) -> GenerateRequest:
    """Somebody else, steered under a condition."""
    when = Condition(terms=(Term("resid_pre", draw.randrange(96)),), threshold=0.3)
    gated = Clamp("mlp_out", draw.randrange(96), 4.0, when=when)
    return greedy(prompt(draw.randrange(9), 12), 6, interventions=(gated, Clamp("resid_post", 4, 9.0)))


def batch(loaded: Loaded, known: list[Case], draw: random.Random, told: Counter[str]) -> None:
    """Some generations on a core of its own."""
    tokens, blocks, slots = draw.choice((5, 16, 40, 200)), draw.choice((6, 7, 60)), draw.choice((2, 5, 12))
    core = loaded.core(prefill_tokens=tokens, blocks=blocks, slots=slots)
    asked: list[tuple[Asked, Case]] = []
    for _ in range(BATCH):
        case = draw.choice(known)
        # Who reads along with its prompt reads all of it; the others may go on from what somebody has read.
        request = case.request if draw.random() < 0.4 else replace(case.request, watch=())
        asked.append((core.ask(request), case))
        if draw.random() < 0.2:
            core.ask(neighbour(draw))
        for _ in range(draw.choice((0, 0, 1, 3))):
            core.step()
        if draw.random() < 0.05 and not asked[-1][0].ends:
            core.cancel(asked[-1][0])
    core.finish()
    for one, case in asked:
        told[judge(one, case)] += 1
    told["preemptions"] += int(core.metric("saeguard_preemptions_total"))
    told["tokens reused"] += int(core.metric("saeguard_prompt_tokens_reused_total"))


def judge(one: Asked, case: Case) -> str:
    """What became of a request: stopped, cancelled, or what went wrong."""
    chunks = [event for event in one.events if isinstance(event, StreamChunk)]
    ids = tuple(token.id for chunk in chunks for token in chunk.tokens)
    text = "".join(chunk.text for chunk in chunks)
    positions = [reading.position for chunk in chunks for reading in chunk.readings]
    if ids != case.ids[: len(ids)] or not case.text.startswith(text) or max(positions, default=0) > case.last:
        return "leaked"
    if not one.ends:
        return "cancelled"
    done = chunks[-1].completion if chunks else None
    is_right = done is not None and done.finish_reason == "feature" and (ids, text) == (case.ids, case.text)
    return "stopped" if is_right else "wrong"


def main() -> int:
    """Runs until so many were asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, told, start = random.Random(args.seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loaded = Loaded(make_world("llama", Path(folder)))
        known = cases(loaded.core(reuse=False), 24)
        for _ in range(-(-args.generations // BATCH)):
            batch(loaded, known, draw, told)
    line = {"cases": len(known), "generations": told["stopped"] + told["cancelled"] + told["leaked"] + told["wrong"]}
    sys.stdout.write(json.dumps(line | dict(told) | {"seconds": round(time.monotonic() - start)}) + "\n")
    return 1 if told["leaked"] or told["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""What steering does: scores and fluency of generations, and the change of loss on neutral documents."""

from random import Random

from demo.bundle import Bundle
from demo.plans import Plan
from demo.steering import cross_entropy, log_probabilities, sample, steered
from demo.tokens import Tokens, decode
from saeguard_server.demo.scenarios import SCORERS, Lexicon, NeutralChange, ScenarioEdit, Side, interval, repetition

ROWS = 64
"""Generations that run side by side."""


def generate(
    bundle: Bundle,
    prompt: list[int],
    interventions: tuple[ScenarioEdit, ...],
    generations: int,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """``generations`` continuations of a prompt; group g of ``ROWS`` uses seed + g."""
    rows: list[list[int]] = []
    with steered(bundle.model, bundle.edits(interventions)):
        while len(rows) < generations:
            count = min(ROWS, generations - len(rows))
            group = seed + len(rows) // ROWS
            rows += sample(bundle.model, prompt, count, new_tokens, temperature, bundle.stop, group)
    return rows


def side(
    bundle: Bundle, plan: Plan, interventions: tuple[ScenarioEdit, ...], lexicon: Lexicon, generations: int, seed: int
) -> Side:
    """Generates, scores, and reads the texts again with the unsteered model."""
    ids = bundle.prompt_ids(plan.prompt)
    rows = generate(bundle, ids, interventions, generations, plan.max_new_tokens, plan.temperature, seed)
    texts = [decode(bundle.tokenizer, row) for row in rows]
    shown = Random(seed).sample(range(len(texts)), min(4, len(texts)))
    return Side(
        score=interval([SCORERS[plan.scorer](text, lexicon) for text in texts]),
        nll=continuation_nll(bundle, ids, rows),
        repetition=sum(map(repetition, texts)) / len(texts),
        samples=tuple(texts[index] for index in shown),
    )


def continuation_nll(bundle: Bundle, prompt: list[int], rows: list[list[int]]) -> float:
    """Nats per token of the continuations under the unsteered model."""
    total, count = 0.0, 0
    full = [tuple(prompt + row) for row in rows if row]
    for start in range(0, len(full), ROWS):
        chunk = full[start : start + ROWS]
        log_p, wanted = log_probabilities(bundle.model, chunk)
        chosen = log_p.gather(1, wanted[:, None])[:, 0]
        at = 0
        for row in chunk:
            total -= float(chosen[at + len(prompt) - 1 : at + len(row) - 1].sum())
            count += len(row) - len(prompt)
            at += len(row) - 1
    return total / max(1, count)


def neutral_change(bundle: Bundle, interventions: tuple[ScenarioEdit, ...], rows: list[Tokens]) -> NeutralChange:
    """Loss, KL and flips of the likeliest token on given documents, steered against not."""
    before = after = kl = flips = 0.0
    count = 0
    for start in range(0, len(rows), ROWS):
        ids = [row.ids for row in rows[start : start + ROWS]]
        plain, wanted = log_probabilities(bundle.model, ids)
        with steered(bundle.model, bundle.edits(interventions)):
            changed, _ = log_probabilities(bundle.model, ids)
        before -= float(plain.gather(1, wanted[:, None]).sum())
        after -= float(changed.gather(1, wanted[:, None]).sum())
        kl += float((plain.exp() * (plain - changed)).sum())
        flips += float((plain.argmax(1) != changed.argmax(1)).sum())
        count += len(wanted)
    return NeutralChange(before / count, after / count, kl / count, flips / count)


def loss_change(bundle: Bundle, interventions: tuple[ScenarioEdit, ...], rows: list[Tokens]) -> float:
    """Change of the mean loss in nats per token."""
    ids = [row.ids for row in rows]
    with steered(bundle.model, bundle.edits(interventions)):
        after = cross_entropy(bundle.model, ids)
    return after - cross_entropy(bundle.model, ids)

"""What steering does to the model: generations, their scores and fluency, and the loss on given text.

Edits are made by the product's edit table in the model's hooks, without its engine: the build needs no server, and its
figures are an independent check of the served ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from demo.corpus import END, EOS
from demo.harvest import PASS_TOKENS
from demo.lm import BOS_ID, N_SPECIAL, PAD_ID, Tokens, as_row, decode, token_id
from saeguard.types import KINDS
from saeguard_client import ChatMessage
from saeguard_sae.edit_table import FOREVER, EditColumn, EditTable
from saeguard_sae.edits import Affine
from saeguard_sae.loading import LoadedSae
from saeguard_sae.metrics import NextTokenLoss
from saeguard_sae.models import Site, hooked
from saeguard_sae.rows import Rows, RowSpan
from saeguard_sae.train.data import LanguageModel
from saeguard_sae.train.quality.evaluation_data import EvaluationBatch, evaluation_batches, pad_rows
from saeguard_server.demo.scenarios import SCORERS, Lexicon, NeutralChange, ScenarioEdit, Side, interval, repetition

ROWS = 64
"""Generations that run side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """The language model and its SAEs by name."""

    model: LanguageModel
    saes: dict[str, LoadedSae]

    @property
    def stop(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        return token_id(self.model.tokenizer, EOS), token_id(self.model.tokenizer, END)

    def prompt_ids(self, prompt: str | tuple[ChatMessage, ...]) -> list[int]:
        """A text after BOS, or a chat in the tokenizer's template with the assistant's turn begun."""
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        chat = [{"role": turn.role, "content": turn.content} for turn in prompt]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def columns(self, edits: Sequence[ScenarioEdit]) -> dict[Site, list[EditColumn]]:
        """The edits as columns of a table at each site."""
        columns: dict[Site, list[EditColumn]] = {}
        for edit in edits:
            sae = self.saes[edit.sae]
            maximum = sae.catalogue.feature(edit.feature).maximum or 0.0
            column = EditColumn(sae.dictionary, edit.feature, affine(edit, maximum), last=FOREVER)
            columns.setdefault(sae.site, []).append(column)
        return columns


def affine(edit: ScenarioEdit, maximum: float) -> Affine:
    """The edit as a map of raw activations."""
    scale = maximum if edit.unit == "max" else 1.0
    if edit.kind == "zero":
        return Affine(alpha=0.0)
    if edit.value is None:
        raise ValueError(f"{edit.kind} of feature {edit.feature} needs a value")
    if edit.kind == "scale":
        return Affine(alpha=edit.value)
    return Affine(*KINDS[edit.kind](edit.sae, edit.feature, edit.value).affine(scale))  # type: ignore[call-arg]


@contextmanager
def steered(network: LlamaForCausalLM, columns: Mapping[Site, Sequence[EditColumn]]) -> Iterator[None]:
    """While it lasts, every forward pass is edited on its ordinary tokens: all of them are one slot of the tables."""
    tables = {site: EditTable(1, network.config.hidden_size) for site in columns}
    for site, table in tables.items():
        table.write(0, columns[site])
    rows = Rows()

    def note_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        ids = args[0].flatten()
        rows = Rows.of([RowSpan(0, 0, len(ids))], torch.zeros_like(ids), ids < N_SPECIAL)

    def edit(site: Site, x: Tensor, read: Tensor) -> Tensor:
        return tables[site].apply(x.flatten(0, 1), rows).view_as(x)

    handle = network.get_input_embeddings().register_forward_pre_hook(note_tokens)
    try:
        with hooked(network, network.config, tables, edit):
            yield
    finally:
        handle.remove()


def sample(
    network: LlamaForCausalLM,
    prompt: list[int],
    rows: int,
    new_tokens: int,
    temperature: float,
    stop: tuple[int, ...],
    seed: int,
) -> list[list[int]]:
    """``rows`` continuations of one prompt, each ending before a stop token or after ``new_tokens``."""
    torch.manual_seed(seed)
    ids = torch.tensor([prompt] * rows)
    output = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=new_tokens,
        eos_token_id=list(stop),
        pad_token_id=PAD_ID,
        suppress_tokens=[PAD_ID, BOS_ID],
    )
    return [list(takewhile(lambda token: token not in stop, row)) for row in output[:, len(prompt) :].tolist()]


@torch.inference_mode()
def _logits(network: LlamaForCausalLM, batch: EvaluationBatch) -> Tensor:
    logits: Tensor = network(input_ids=batch.ids, use_cache=False).logits
    return logits


def cross_entropy(network: LlamaForCausalLM, rows: Sequence[Sequence[int]]) -> float:
    """Mean loss in nats per predicted token."""
    loss = NextTokenLoss()
    for batch in evaluation_batches(map(as_row, rows), PASS_TOKENS):
        loss.add(_logits(network, batch), batch.ids, batch.predicted)
    return loss.cross_entropy


def loss_change(bundle: Bundle, edits: tuple[ScenarioEdit, ...], documents: list[Tokens]) -> float:
    """Change of the mean loss in nats per token."""
    network, rows = bundle.model.network, [document.ids for document in documents]
    with steered(network, bundle.columns(edits)):
        after = cross_entropy(network, rows)
    return after - cross_entropy(network, rows)


def neutral_change(bundle: Bundle, edits: tuple[ScenarioEdit, ...], documents: list[Tokens]) -> NeutralChange:
    """Loss, KL and flips of the likeliest token on given documents, steered against not."""
    network, before, after, flips = bundle.model.network, NextTokenLoss(), NextTokenLoss(), 0
    for batch in evaluation_batches((as_row(document.ids) for document in documents), PASS_TOKENS):
        plain = _logits(network, batch)
        with steered(network, bundle.columns(edits)):
            changed = _logits(network, batch)
        before.add(plain, batch.ids, batch.predicted, changed)
        after.add(changed, batch.ids, batch.predicted)
        flips += int((plain.argmax(-1) != changed.argmax(-1))[:, :-1][batch.predicted].sum())
    return NeutralChange(before.cross_entropy, after.cross_entropy, before.divergence, flips / before.positions)


def continuation_nll(network: LlamaForCausalLM, prompt: list[int], rows: list[list[int]]) -> float:
    """Nats per token of the continuations under the unsteered model; 0 where all are empty."""
    loss = NextTokenLoss()
    full = [as_row(prompt + row) for row in rows if row]
    for start in range(0, len(full), ROWS):
        batch = pad_rows(full[start : start + ROWS])
        logits = _logits(network, batch)
        # Only what follows the prompt is predicted.
        generated = torch.arange(batch.ids.shape[1] - 1) >= len(prompt) - 1
        loss.add(logits, batch.ids, batch.predicted & generated)
    return loss.cross_entropy if loss.positions else 0.0


def measure_side(
    bundle: Bundle,
    prompt: str | tuple[ChatMessage, ...],
    edits: tuple[ScenarioEdit, ...],
    scorer: str,
    lexicon: Lexicon,
    *,
    generations: int,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> Side:
    """Generates, scores, and reads the texts again with the unsteered model; group g of ``ROWS`` uses seed + g."""
    network, ids = bundle.model.network, bundle.prompt_ids(prompt)
    rows: list[list[int]] = []
    with steered(network, bundle.columns(edits)):
        while len(rows) < generations:
            count, group = min(ROWS, generations - len(rows)), seed + len(rows) // ROWS
            rows += sample(network, ids, count, new_tokens, temperature, bundle.stop, group)
    texts = [decode(bundle.model.tokenizer, row) for row in rows]
    samples = Random(seed).sample(range(len(texts)), min(4, len(texts)))
    return Side(
        score=interval([SCORERS[scorer](text, lexicon) for text in texts]),
        nll=continuation_nll(network, ids, rows),
        repetition=sum(map(repetition, texts)) / len(texts),
        samples=tuple(texts[index] for index in samples),
    )

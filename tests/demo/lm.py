"""The demonstration's language model: a stock Llama of a few million parameters, trained on the corpus."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from demo.tokens import BOS_ID, EOS_ID, PAD_ID, Tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The model's shape and its training."""

    vocab_size: int = 2048
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 2
    d_mlp: int = 448
    context: int = 256
    steps: int = 1400
    batch_tokens: int = 2048
    """Tokens of one step, padding included; a batch holds documents of about the same length."""
    learning_rate: float = 2.5e-3
    seed: int = 11


def new_model(settings: ModelSettings) -> LlamaForCausalLM:
    """An untrained model of this shape."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.d_model,
            intermediate_size=settings.d_mlp,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=settings.n_heads,
            num_key_value_heads=settings.n_kv_heads,
            max_position_embeddings=settings.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def train_model(settings: ModelSettings, documents: list[Tokens]) -> LlamaForCausalLM:
    """AdamW, warm-up, cosine to a tenth; returned in evaluation mode with weights rounded to bfloat16 values."""
    model = new_model(settings).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    batches = batches_of(documents, settings.batch_tokens, Random(settings.seed))
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        loss = _loss(model, next(batches))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == settings.steps - 1:
            logger.info("language model step %d of %d: loss %.3f", step, settings.steps, loss.item())
    return round_weights(model.eval())


def round_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every weight at its nearest bfloat16 value, kept in float32: what is measured is what is shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def batches_of(documents: list[Tokens], batch_tokens: int, random: Random) -> Iterator[Tensor]:
    """Without end: padded ids [documents, longest], documents of like length together, batches shuffled."""
    while True:
        order = sorted(documents, key=lambda document: (len(document.ids), random.random()))
        rows: list[list[Tokens]] = [[]]
        for document in order:
            if (len(rows[-1]) + 1) * len(document.ids) > batch_tokens:
                rows.append([])
            rows[-1].append(document)
        random.shuffle(rows)
        yield from (padded([document.ids for document in row]) for row in rows)


def padded(rows: list[tuple[int, ...]]) -> Tensor:
    """ids [rows, longest], filled up with PAD on the right."""
    longest = max(map(len, rows))
    return torch.tensor([(*row, *(PAD_ID,) * (longest - len(row))) for row in rows])


def _loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the next token, padding left out."""
    logits: Tensor = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))

"""Steering for the build: hooks that edit features, sampling, and the loss on given text.

The server has its own engine; this one is plain and slow so that the build needs no server, and its figures are an
independent check of the served ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from demo.harvest import N_SPECIAL
from demo.lm import padded
from demo.tokens import BOS_ID, PAD_ID
from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.edits import Affine


@dataclass(frozen=True, slots=True, eq=False)
class LayerEdits:
    """The edits of one request at the output of one layer."""

    layer: int
    dictionary: Dictionary
    features: tuple[int, ...]
    maps: tuple[Affine, ...]

    def apply(self, x: Tensor, ordinary: Tensor) -> Tensor:
        """x [rows, tokens, d_model] -> x + sum (f' - f) * W_dec on ordinary tokens [rows, tokens]."""
        index = list(self.features)
        activation = self.dictionary.activation
        assert isinstance(activation, JumpReLU)
        pre = x @ self.dictionary.W_enc[:, index] + self.dictionary.centred_bias()[index]
        f = pre.relu() * (pre > activation.threshold[index])
        alpha, beta, low, high = (torch.tensor(column) for column in zip(*self.maps, strict=True))
        change = torch.minimum(torch.maximum(alpha * f + beta, low), high) - f
        return x + ordinary[..., None] * (change @ self.dictionary.W_dec[index])


@contextmanager
def steered(model: LlamaForCausalLM, edits: tuple[LayerEdits, ...]) -> Iterator[None]:
    """While it lasts, every forward pass of the model is edited."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0] >= N_SPECIAL]

    handles = [model.model.embed_tokens.register_forward_pre_hook(note)]
    for edit in edits:

        def change(module: nn.Module, inputs: object, output: Tensor, edit: LayerEdits = edit) -> Tensor:
            return edit.apply(output, seen[0])

        handles.append(model.model.layers[edit.layer].register_forward_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    prompt: list[int],
    rows: int,
    new_tokens: int,
    temperature: float,
    stop: tuple[int, ...],
    seed: int,
) -> list[list[int]]:
    """``rows`` continuations of one prompt, each ending before a stop token or after ``new_tokens``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt] * rows)
    cache, step, alive = None, ids, torch.ones(rows, dtype=torch.bool)
    for _ in range(new_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float(), output.past_key_values
        logits[:, [PAD_ID, BOS_ID]] = -torch.inf
        step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        alive &= ~torch.isin(step[:, 0], torch.tensor(stop))
        step = step.masked_fill(~alive[:, None], PAD_ID)
        ids = torch.cat([ids, step], dim=1)
        if not alive.any():
            break
    return [[token for token in row if token != PAD_ID] for row in ids[:, len(prompt) :].tolist()]


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [predictions, vocabulary] of every next token that is not padding, and the right ids."""
    ids = padded(rows)
    wanted = ids[:, 1:] != PAD_ID
    logits = model(input_ids=ids[:, :-1]).logits[wanted].float()
    return F.log_softmax(logits, dim=-1), ids[:, 1:][wanted]


def cross_entropy(model: LlamaForCausalLM, rows: list[tuple[int, ...]], chunk: int = 64) -> float:
    """Mean loss in nats per predicted token."""
    total, count = 0.0, 0
    for start in range(0, len(rows), chunk):
        log_p, wanted = log_probabilities(model, rows[start : start + chunk])
        total -= float(log_p.gather(1, wanted[:, None]).sum())
        count += len(wanted)
    return total / count

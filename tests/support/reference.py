"""Steered generation without our code: Hugging Face ``generate``, one request at a time, with a plain forward hook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from support.saes import PlainSae


@dataclass(frozen=True)
class PlainEdit:
    """One edit of one feature of an SAE at a side of ``module`` (``models.SITES``); ``change`` maps f to f'."""

    sae: PlainSae
    module: str
    side: str
    feature: int
    change: Callable[[Tensor], Tensor]
    applies: Callable[[int, int], bool] = lambda position, token: True
    """Whether the token at a position is in scope."""
    stage: int = 0
    """Edits of a later one read what those before left."""


@dataclass(frozen=True)
class Answer:
    """Generated tokens, and the model's log-probabilities [tokens, vocabulary] before each."""

    tokens: list[int]
    logprobs: Tensor


def generate(model: Any, prompt: list[int], new: int, edits: list[PlainEdit], special: set[int]) -> Answer:
    """Greedy ``generate`` with every edit applied to every token in its scope: of special ones to one that ends the
    prompt."""
    ids = torch.tensor([prompt])
    seen: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        seen.extend(given[0].tolist())

    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        # What the rest of the block shares is edited first: the module then reads the edited stream.
        places = sorted({(edit.module, edit.side) for edit in edits}, key=lambda place: (place[1] != "shared", place))
        for module, side in places:
            here = [edit for edit in edits if (edit.module, edit.side) == (module, side)]
            stack.callback(_hook(model.get_submodule(module), side, here, seen, special, len(prompt) - 1).remove)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            ),
        )
    logprobs = torch.stack([one[0].float().log_softmax(-1) for one in out.logits])
    return Answer(out.sequences[0, len(prompt) :].tolist(), logprobs)


def _token(x: Tensor, position: int, token: int, edits: list[PlainEdit], special: set[int]) -> Tensor:
    """One token [width], edited."""
    for stage in sorted({edit.stage for edit in edits}):
        x = _staged(x, position, token, [edit for edit in edits if edit.stage == stage], special)
    return x


def _staged(x: Tensor, position: int, token: int, edits: list[PlainEdit], special: set[int]) -> Tensor:
    out = x.clone()
    for sae in {id(edit.sae): edit.sae for edit in edits}.values():
        f = sae.encode(x)
        wanted = f.clone()
        for edit in edits:
            if edit.sae is sae and token not in special and edit.applies(position, token):
                wanted[edit.feature] = edit.change(f[edit.feature])
        out += sae.decode(wanted) + (x - sae.decode(f)) - x
    return out


def _hook(module: Any, side: str, edits: list[PlainEdit], seen: list[int], special: set[int], last: int) -> Any:
    def edited(x: Tensor) -> Tensor:
        start = len(seen) - x.shape[1]
        positions = range(start, len(seen))
        spared = {at: set() if 0 < at == last else special for at in positions}
        rows = [_token(x[0, at - start], at, seen[at], edits, spared[at]) for at in positions]
        return torch.stack(rows)[None]

    def swap(value: Any) -> Any:
        return edited(value) if isinstance(value, Tensor) else (edited(value[0]), *value[1:])

    def share(_: Any, args: Any) -> None:
        args[0].copy_(edited(args[0]))

    if side == "shared":
        # The tensor itself is what the block adds the MLP's output to.
        return module.register_forward_pre_hook(share)
    if side == "in":
        return module.register_forward_pre_hook(lambda _, args: swap(args))
    return module.register_forward_hook(lambda _, __, out: swap(out))

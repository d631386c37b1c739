"""Writes the assets."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import END
from demo.tokens import BOS_ID, EOS_ID, PAD_ID, token_id
from saeguard_server.demo.scenarios import Lexicon, Scenario


def model(folder: Path, trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Config, bfloat16 weights, tokenizer and chat template; a chat ends at the end of the assistant's turn."""
    folder.mkdir(parents=True)
    end = token_id(tokenizer, END)
    trained.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, end], pad_token_id=PAD_ID
    )
    # The weights already have bfloat16 values, so this loses nothing; the model in memory goes back to float32.
    nn.Module.to(trained, torch.bfloat16).save_pretrained(folder)
    nn.Module.float(trained)
    tokenizer.save_pretrained(folder)


def json(path: Path, value: Any) -> None:
    """Any structure that msgspec encodes, indented."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def scenarios(path: Path, found: list[Scenario], words: Lexicon, neutral: dict[str, list[str]]) -> None:
    """``scenarios.json``, as ``scenarios.load`` reads it."""
    lexicon = {"french": sorted(words.french), "english": sorted(words.english)}
    json(path, {"scenarios": [_short(asdict(one)) for one in found], "lexicon": lexicon, "neutral": neutral})


def _short(value: Any) -> Any:
    """The same structure with floats at four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value

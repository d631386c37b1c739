"""Writes what is measured: a random Llama of GPT-2-small's size, its tokenizer, and an SAE in its middle layer.

python -m bench.world FOLDER bfloat16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.work import BOS, D_SAE, EOS, FACTS, FIRST_WORD, LAYER, MODEL, PAD, SAE, SPECIAL, VOCAB
from support.saes import plain_sae, save_sae

WIDTH, LAYERS, HEADS, INNER = 768, 12, 12, 2048
CONTEXT = 4096


def main() -> None:
    """Writes the folder that is the first argument, in the dtype that is the second."""
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.manual_seed(20)
    model = LlamaForCausalLM(config()).to(dtype)
    model.save_pretrained(folder / MODEL)
    tokenizer().save_pretrained(folder / MODEL)
    save_sae(plain_sae("jumprelu", WIDTH, D_SAE, seed=3), folder / SAE, f"blocks.{LAYER}.hook_resid_post")
    (folder / FACTS).write_text(json.dumps(facts(model)))


def config() -> LlamaConfig:
    """134M parameters."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def facts(model: Any) -> dict[str, int]:
    """What must be known of the model: its parameters, and the bytes of those that every step reads in full."""
    every = sum(one.numel() for one in model.parameters())
    embedding = model.get_input_embeddings().weight
    return {"parameters": every, "read_bytes": (every - embedding.numel()) * embedding.element_size()}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and invented words up to the vocabulary's size, so that whatever is generated has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [_word(index) for index in range(VOCAB - SPECIAL - FIRST_WORD)]
    backend = Tokenizer(models.BPE({text: index for index, text in enumerate([*alphabet, *words])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _word(index: int) -> str:
    """A space, as byte-level tokenizers write it, and four letters."""
    letters = ""
    for _ in range(4):
        index, at = divmod(index, 26)
        letters += chr(ord("a") + at)
    return "Ġ" + letters


if __name__ == "__main__":
    main()

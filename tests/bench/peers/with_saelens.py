"""SAELens: its hooked transformer with the SAE attached, and a hook on the features. One request after the other.

Everybody in one batch would get the same edits, so requests that differ cannot share one.
"""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig

from bench.work import LAYER, VOCAB, tokens
from bench.work import SAE as SAE_FOLDER
from bench.worker import serve

SITE = f"blocks.{LAYER}.hook_resid_post"
FEATURES = f"{SITE}.hook_sae_acts_post"


class SaeLens:
    """A random model of the benchmark's size; the SAE is the benchmark's, its error term kept."""

    def __init__(self, folder: Path, dtype: str) -> None:
        wanted = HookedTransformerConfig(
            n_layers=12,
            d_model=768,
            n_heads=12,
            d_head=64,
            d_mlp=2048,
            n_ctx=512,
            d_vocab=VOCAB,
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=64,
            dtype=getattr(torch, dtype),
            device="cpu",
            seed=20,
        )
        self._model = HookedSAETransformer(wanted)
        self._model.eval().requires_grad_(False)
        self._model.add_sae(SAE.load_from_disk(folder / SAE_FOLDER, dtype=dtype), use_error_term=True)

    @torch.inference_mode()
    def one_by_one(self, prompts: list[list[int]], new: int, edits: list[Any]) -> float:
        """Tokens per second, each request under its own edits."""
        start = time.perf_counter()
        for one, steer in zip(prompts, edits, strict=True):
            with self._model.hooks(fwd_hooks=[(FEATURES, partial(_edit, steer))]):
                out = self._model.generate(
                    torch.tensor([one]),
                    max_new_tokens=new,
                    do_sample=False,
                    stop_at_eos=False,
                    verbose=False,
                    return_type="tokens",
                )
            assert out.shape[1] == len(one) + new, "every request gets all its tokens"
        return tokens(prompts, new) / (time.perf_counter() - start)


def _edit(steer: list[Any], features: torch.Tensor, hook: Any) -> torch.Tensor:
    """features [1, T, d_sae], edited."""
    for kind, feature, value in steer:
        mine = features[..., feature]
        wanted = {"zero": mine * 0, "clamp": mine * 0 + value, "scale": mine * value, "add": mine + value}
        features[..., feature] = wanted[kind]
    return features


if __name__ == "__main__":
    asyncio.run(serve({"one_by_one": SaeLens(Path(sys.argv[1]), sys.argv[2]).one_by_one}))

"""Kissane and Krzyzanowski's attention SAEs, with the settings that their training script saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from support.published import Builder, Published

D, F = 20, 48
SETTINGS = {
    "seed": 49,
    "batch_size": 4096,
    "buffer_mult": 384,
    "lr": 0.0012,
    "num_tokens": 2000000000,
    "l1_coeff": 0.9,
    "beta1": 0.9,
    "beta2": 0.99,
    "dict_mult": 32,
    "seq_len": 128,
    "enc_dtype": "fp32",
    "model_name": "gpt2-small",
    "site": "z",
    "layer": 3,
    "device": "cuda",
    "reinit": "reinit",
    "head": "cat",
    "concat_heads": True,
    "resample_scheme": "anthropic",
    "anthropic_neuron_resample_scale": 0.2,
    "dead_direction_cutoff": 1e-06,
    "re_init_every": 25000,
    "anthropic_resample_last": 12500,
    "resample_factor": 0.01,
    "num_resamples": 4,
    "wandb_project_name": "gpt2-L3",
    "wandb_entity": "someone",
    "save_state_dict_every": 50000,
    "b_dec_init": "zeros",
    "sched_type": "cosine_warmup",
    "sched_epochs": 1000,
    "sched_lr_factor": 0.1,
    "sched_warmup_epochs": 1000,
    "sched_finish": True,
    "anthropic_resample_batches": 100,
    "eval_every": 1000,
    "model_batch_size": 512,
    "buffer_size": 1572864,
    "buffer_batches": 12288,
    "act_name": "blocks.3.attn.hook_z",
    "act_size": D,
    "dict_size": F,
    "name": f"gpt2-small_3_{F}_z",
}


def hook_z(path: Path, seed: int) -> Published:
    """Layer 3's heads side by side."""
    dice = torch.Generator().manual_seed(seed)
    decoder = torch.randn(F, D, generator=dice)
    weights = {
        "W_enc": torch.randn(D, F, generator=dice) * 0.3,
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True) * (0.3 + 2.2 * torch.rand(F, 1, generator=dice)),
        "b_enc": torch.randn(F, generator=dice) * 0.3 - 1.0,
        "b_dec": torch.randn(D, generator=dice) * 0.5,
    }
    stem = "gpt2-small_L3_Hcat_z_lr1.20e-03_l19.00e-01_v9"
    file, config = path / f"{stem}.pt", path / f"{stem}_cfg.json"
    torch.save(weights, file)
    config.write_text(json.dumps(SETTINGS))
    W, V, b, c = (one.double() for one in weights.values())

    def encode(x: Tensor) -> Tensor:
        return ((x - c) @ W + b).relu()

    return Published(
        path=file,
        weights=file,
        config=config,
        d_in=D,
        encode=encode,
        reconstruct=lambda x: encode(x) @ V + c,
    )


BUILDERS: dict[str, Builder] = {"connor_rob_hook_z": hook_z}

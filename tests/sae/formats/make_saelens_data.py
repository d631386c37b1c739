"""Writes ``data/saelens/``: small SAEs saved by SAELens, with what SAELens computes from them.

Run it where SAELens 6 is installed; the tests only read what it wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import (
    SAE,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAEConfig,
    TopKSAEConfig,
    TrainingSAE,
)

D_IN, D_SAE = 16, 48
BASE: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"}


def fill(sae: Any, seed: int) -> None:
    """Random parameters under which about a third of the features fire."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        by = 0.3 if parameter.ndim == 2 else 0.1
        value = torch.randn(parameter.shape, generator=g) * by
        parameter.data = value.abs() if name == "threshold" else value


def save(sae: Any, path: Path, seed: int) -> None:
    """The SAE's files, an input, and its features and reconstruction."""
    sae.cfg.metadata.model_name = "tiny"
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(str(path)) if not isinstance(sae, TrainingSAE) else sae.save_inference_model(str(path))
    loaded = SAE.load_from_disk(str(path))
    x = torch.randn(12, D_IN, generator=torch.Generator().manual_seed(seed + 1)) * 1.5
    with torch.no_grad():
        features = loaded.encode(x)
        recon = loaded.decode(features)
    np.savez_compressed(path / "ref.npz", x=x.numpy(), features=features.numpy(), recon=recon.numpy())


def main(out: Path) -> None:
    """One folder per architecture."""
    configs = {
        "standard": StandardSAEConfig(**BASE),
        "standard_uncentred": StandardSAEConfig(**BASE, apply_b_dec_to_input=False),
        "jumprelu": JumpReLUSAEConfig(**BASE),
        "gated": GatedSAEConfig(**BASE),
        "topk": TopKSAEConfig(**BASE, k=5),
        "topk_rescaled": TopKSAEConfig(**BASE, k=5, rescale_acts_by_decoder_norm=True),
    }
    for seed, (name, config) in enumerate(configs.items(), start=500):
        sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
        fill(sae, seed)
        save(sae, out / name, seed)
    trained = TrainingSAE.from_dict(
        MatryoshkaBatchTopKTrainingSAEConfig(**BASE, k=5, matryoshka_widths=[12, D_SAE]).to_dict()
    )
    fill(trained, 600)
    trained.topk_threshold.fill_(0.35)
    save(trained, out / "matryoshka_batchtopk", 600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

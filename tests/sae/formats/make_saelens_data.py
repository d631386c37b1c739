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
    AbsTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUSkipTranscoderConfig,
    MatchingPursuitSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAEConfig,
    TopKSAEConfig,
    TrainingSAE,
    TranscoderConfig,
)
from sae_lens.saes.temporal_sae import TemporalSAEConfig

D_IN, D_SAE, D_OUT = 16, 48, 12
BASE: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"}
PLAIN = BASE | {"apply_b_dec_to_input": False}


def fill(sae: Any, seed: int) -> None:
    """Random parameters under which about a third of the features fire."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        by = 0.3 if parameter.ndim == 2 else 0.1
        value = torch.randn(parameter.shape, generator=g) * by
        parameter.data = value.abs() if name == "threshold" else value
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)


def save(sae: Any, path: Path, seed: int) -> None:
    """The SAE's files, an input, and its features, what they decode to, and the whole reconstruction."""
    sae.cfg.metadata.model_name = "tiny"
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    if "transcoder" in sae.cfg.architecture():
        sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    sae.save_model(str(path)) if not isinstance(sae, TrainingSAE) else sae.save_inference_model(str(path))
    loaded = SAE.load_from_disk(str(path))
    # One sequence: a temporal SAE reads its tokens together.
    x = torch.randn(1, 12, D_IN, generator=torch.Generator().manual_seed(seed + 1)) * 1.5
    with torch.no_grad():
        features = loaded.encode(x)
        # At once: SAELens keeps what it normalised by for the next decode alone.
        recon = loaded.decode(features)
        forward = loaded(x)
    arrays = {"x": x, "features": features, "recon": recon, "forward": forward}
    np.savez_compressed(path / "ref.npz", **{name: array[0].numpy() for name, array in arrays.items()})


def main(out: Path) -> None:
    """One folder per architecture and normalisation."""
    configs = {
        "standard": StandardSAEConfig(**BASE),
        "standard_uncentred": StandardSAEConfig(**PLAIN),
        "jumprelu": JumpReLUSAEConfig(**BASE),
        "gated": GatedSAEConfig(**BASE),
        "topk": TopKSAEConfig(**BASE, k=5),
        "topk_rescaled": TopKSAEConfig(**BASE, k=5, rescale_acts_by_decoder_norm=True),
        "abstopk_rescaled": AbsTopKSAEConfig(**BASE, k=5, rescale_acts_by_decoder_norm=True),
        "standard_layer_norm": StandardSAEConfig(**BASE, normalize_activations="layer_norm"),
        "gated_constant_norm": GatedSAEConfig(**BASE, normalize_activations="constant_norm_rescale"),
        "transcoder": TranscoderConfig(**PLAIN, d_out=D_OUT),
        "jumprelu_skip_transcoder": JumpReLUSkipTranscoderConfig(
            **PLAIN, d_out=D_OUT, normalize_activations="layer_norm"
        ),
        "matching_pursuit": MatchingPursuitSAEConfig(**BASE, residual_threshold=0.8, max_iterations=10),
        "temporal": TemporalSAEConfig(
            **PLAIN,
            n_heads=2,
            n_attn_layers=2,
            bottleneck_factor=8,
            kval_topk=5,
            tied_weights=False,
            normalize_activations="constant_scalar_rescale",
            activation_normalization_factor=0.4,
        ),
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

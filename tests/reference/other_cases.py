"""dictionary_learning's seven classes as its trainers leave them, and sparsify's sparse coders."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor
from writer import Compute, Writer

K = 13
TRAINERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "AutoEncoder": (StandardTrainer, {}),
    "AutoEncoder_april": (StandardTrainerAprilUpdate, {}),
    "AutoEncoderNew": (StandardTrainer, {"dict_class": AutoEncoderNew}),
    "GatedAutoEncoder": (GatedSAETrainer, {}),
    "JumpReluAutoEncoder": (JumpReluTrainer, {}),
    "AutoEncoderTopK": (TopKTrainer, {"k": K}),
    "BatchTopKSAE": (BatchTopKTrainer, {"k": K}),
    "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": [0.25, 0.25, 0.5]}),
}
UNIT = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
"""Their trainers keep decoder norms at 1, which their loader checks."""
BUFFER = {
    "d_submodule": 40, "io": "out", "n_ctxs": 8, "ctx_len": 64, "refresh_batch_size": 8, "out_batch_size": 64,
    "device": "cpu",
}  # fmt: skip
SPARSIFY: dict[str, dict[str, Any]] = {
    "sae": {},
    "free_norm": {"normalize_decoder": False},
    "multi": {"multi_topk": True},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
}


def write(to: Writer) -> None:
    """Every case of the two."""
    for name, (trainer, own) in TRAINERS.items():
        _dictionary_learning(to, name, trainer, own)
    for activation, (name, own) in product(("topk", "groupmax"), SPARSIFY.items()):
        _sparsify(to, f"sparsify_{activation}_{name}", activation=activation, **own)


def _dictionary_learning(to: Writer, name: str, trainer: Callable[..., Any], own: dict[str, Any]) -> None:
    folder = to.out / f"dictionary_learning_{name}"
    common = {"steps": 10_000, "activation_dim": to.d_in, "dict_size": to.d_sae, "layer": 3, "device": "cpu"}
    trained = trainer(**common, lm_name="EleutherAI/pythia-70m-deduped", submodule_name="resid_post_layer_3", **own)
    to.fill(trained.ae, name, unit=name in UNIT)
    # The trainer's own config says AutoEncoder whatever class it was given.
    config = trained.config | ({"dict_class": "AutoEncoderNew"} if name == "AutoEncoderNew" else {})
    folder.mkdir()
    torch.save(trained.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": BUFFER | {"d_submodule": to.d_in}}))
    to.emit(folder.name, _outputs(load_dictionary(str(folder), "cpu")[0]))


def _outputs(dictionary: Any) -> Compute:
    def compute(x: Tensor) -> dict[str, Tensor]:
        features = dictionary.encode(x)
        return {"features": features, "recon": dictionary.decode(features), "forward": dictionary(x)}

    return compute


def _sparsify(to: Writer, name: str, **own: Any) -> None:
    folder = f"{name}/layers.3.mlp" if own.get("transcode") else f"{name}/layers.3"
    coder = SparseCoder(to.d_in, SparseCoderConfig(num_latents=to.d_sae, k=K, **own))
    to.fill(coder, name)
    coder.save_to_disk(to.out / folder)
    again = SparseCoder.load_from_disk(to.out / folder)

    def compute(x: Tensor) -> dict[str, Tensor]:
        found = again.encode(x)
        dense = torch.zeros(*x.shape[:-1], to.d_sae).scatter_(-1, found.top_indices, found.top_acts)
        recon = again.decode(found.top_acts, found.top_indices)
        # Its forward answers what that loss wants: the reconstruction from four times as many features.
        forward = recon if again.cfg.multi_topk else again(x).sae_out
        return {"features": dense, "recon": recon, "forward": forward}

    to.emit(folder, compute)

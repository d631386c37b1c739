"""The two architectures of SAELens that are more than one matrix product: matching pursuit and temporal SAEs."""

from __future__ import annotations

import json
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import Builder, Published

D_IN, D_SAE, K, HEADS, NARROW, FACTOR = 20, 48, 6, 2, 6, 1.7


def _write(path: Path, weights: dict[str, Tensor], **own: Any) -> dict[str, Any]:
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"},
    }
    (path / "cfg.json").write_text(json.dumps(config | own))
    save_file(weights, path / "sae_weights.safetensors")
    return {"path": path, "weights": path / "sae_weights.safetensors", "config": path / "cfg.json", "d_in": D_IN}


def _normals(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, by=0.3: torch.randn(*shape, generator=g) * by


def _pursuit(
    path: Path,
    seed: int,
    *,
    centre: bool,
    rounds: int | None,
    stops: bool,
    below: float,
    normalisation: str = "none",
    scale: float = 1.0,
) -> Published:
    """``scale``: as SAELens folds it, features are found in the model's units."""
    normal = _normals(seed)
    w = {"W_dec": torch.nn.functional.normalize(normal(D_SAE, D_IN), dim=1), "b_dec": normal(D_IN)}
    own = {"residual_threshold": below, "max_iterations": rounds, "stop_on_duplicate_support": stops}
    own |= {"normalize_activations": normalisation, "apply_b_dec_to_input": centre}
    files = _write(path, w, architecture="matching_pursuit", **own)
    W_dec, b_dec = w["W_dec"].double(), w["b_dec"].double() * centre / scale

    def shift_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
        if normalisation != "layer_norm":
            return torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)

    def one(residual: Tensor) -> Tensor:
        """residual [d_in] -> features [d_sae]."""
        features = torch.zeros(D_SAE, dtype=torch.float64)
        for _ in range(D_IN if rounds is None else rounds):
            best = int((W_dec @ residual).relu().argmax())
            value = (W_dec[best] @ residual).relu()
            before = features != 0
            features[best] += value
            residual = residual - value * W_dec[best]
            if (stops and torch.equal(before, features != 0)) or (below > 0 and residual.norm() < below / scale):
                break
        return features

    def encode(x: Tensor) -> Tensor:
        shift, deviation = shift_and_deviation(x)
        n = (x - shift) / (deviation + 1e-5) if normalisation == "layer_norm" else x
        return torch.stack([one(token) for token in n - b_dec])

    def reconstruct(x: Tensor) -> Tensor:
        shift, deviation = shift_and_deviation(x)
        return (encode(x) @ W_dec + b_dec) * deviation + shift

    choices = {} if scale == 1 else {"scale": scale}
    return Published(**files, encode=encode, reconstruct=reconstruct, choices=choices)


class _Layer(NamedTuple):
    """One attention layer in float64."""

    w: dict[str, Tensor]

    def apply(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def predict(self, here: Tensor) -> Tensor:
        """here [T, d_sae] -> what the tokens before say."""
        before = torch.cat([torch.zeros_like(here[:1]), here[:-1]])
        q, k, v = (self.apply("q_target", here), self.apply("k_ctx", before), self.apply("v_ctx", before))
        heads = []
        for q1, k1, v1 in zip(q.chunk(HEADS, 1), k.chunk(HEADS, 1), v.chunk(HEADS, 1), strict=True):
            scores = q1 @ k1.T / sqrt(NARROW // HEADS)
            scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -torch.inf)
            heads.append(scores.softmax(dim=1) @ v1)
        return self.apply("c_proj", torch.cat(heads, dim=1)).relu()


def _attention(normal: Any) -> dict[str, Tensor]:
    rows = {"k_ctx": NARROW, "q_target": NARROW, "v_ctx": D_SAE, "c_proj": D_SAE}
    weights = {f"{name}.weight": normal(size, D_SAE) for name, size in rows.items()}
    return weights | {f"{name}.bias": normal(size) for name, size in rows.items()}


def _temporal(path: Path, seed: int, *, tied: bool, centre: bool, layers: int, top: bool, scaled: bool) -> Published:
    normal = _normals(seed)
    w = {"W_dec": normal(D_SAE, D_IN, by=1.0), "b_dec": normal(D_IN)}
    w |= {} if tied else {"W_enc": normal(D_IN, D_SAE, by=1.0)}
    attention = [_attention(normal) for _ in range(layers)]
    w |= {f"attn_layers.{index}.{name}": one for index, layer in enumerate(attention) for name, one in layer.items()}
    own = {"n_heads": HEADS, "n_attn_layers": layers, "bottleneck_factor": D_SAE // NARROW, "tied_weights": tied}
    own |= {"sae_diff_type": "topk" if top else "relu", "kval_topk": K if top else None, "apply_b_dec_to_input": centre}
    own |= {"normalize_activations": "constant_scalar_rescale" if scaled else "none"}
    files = _write(path, w, architecture="temporal", activation_normalization_factor=FACTOR, **own)
    W_dec, b_dec = w["W_dec"].double(), w["b_dec"].double()
    W_enc = W_dec.T if tied else w["W_enc"].double()
    factor = FACTOR if scaled else 1.0
    parts = [_Layer({name: one.double() for name, one in layer.items()}) for layer in attention]

    def novel_and_predicted(x: Tensor) -> tuple[Tensor, Tensor]:
        residual = x * factor - b_dec * centre
        predicted = torch.zeros(len(x), D_SAE, dtype=torch.float64)
        for part in parts:
            guess = part.predict((residual @ W_enc / (4 * D_IN)).relu())
            vector = guess @ W_dec
            fit = (vector * residual).sum(1, keepdim=True) / (vector.norm(dim=1, keepdim=True) + 1e-6) ** 2
            predicted, residual = predicted + fit * guess, residual - fit * vector
        novel = (residual @ W_enc / (4 * D_IN)).relu()
        if top:
            novel = novel * torch.zeros_like(novel).scatter(1, novel.topk(K, dim=1).indices, 1.0)
        return novel, predicted

    def reconstruct(x: Tensor) -> Tensor:
        novel, predicted = novel_and_predicted(x)
        return ((novel + predicted) @ W_dec + b_dec * (centre or not tied)) / factor

    return Published(**files, encode=lambda x: novel_and_predicted(x)[0], reconstruct=reconstruct)


BUILDERS: dict[str, Builder] = {
    "saelens_matching_pursuit": partial(_pursuit, centre=True, rounds=None, stops=True, below=0.5),
    "saelens_matching_pursuit_rounds": partial(_pursuit, centre=False, rounds=7, stops=False, below=0.0),
    "saelens_matching_pursuit_normalised": partial(
        _pursuit, centre=True, rounds=9, stops=True, below=0.0, normalisation="layer_norm"
    ),
    "saelens_matching_pursuit_scaled": partial(
        _pursuit,
        centre=True,
        rounds=None,
        stops=True,
        below=0.5,
        normalisation="expected_average_only_in",
        scale=0.4,
    ),
    "saelens_temporal": partial(_temporal, tied=True, centre=True, layers=1, top=True, scaled=False),
    "saelens_temporal_plain": partial(_temporal, tied=True, centre=False, layers=1, top=False, scaled=True),
    "saelens_temporal_untied": partial(_temporal, tied=False, centre=False, layers=2, top=False, scaled=True),
}

"""SAELens: everything it can save, and what it leaves behind while it trains."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from torch import Tensor
from writer import Compute, Writer

K, HEADS, SCALE = 12, 4, 0.37
TOPK = ("topk", "abstopk")
NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
RESIDUAL = {"hook_name": "blocks.1.hook_resid_post"}
ATTENTION = {"hook_name": "blocks.1.attn.hook_z"}
MLP = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
TRAINED = ("standard", "gated", "jumprelu", *TOPK, "batchtopk", "matryoshka_batchtopk", "matching_pursuit")
TEMPORAL = (
    {"tied_weights": True, "apply_b_dec_to_input": True, "n_attn_layers": 1, "sae_diff_type": "topk", "kval_topk": K},
    {"tied_weights": True, "apply_b_dec_to_input": False, "n_attn_layers": 2, "sae_diff_type": "relu"},
    {"tied_weights": False, "apply_b_dec_to_input": True, "n_attn_layers": 1, "sae_diff_type": "relu"},
    {"tied_weights": False, "apply_b_dec_to_input": False, "n_attn_layers": 2, "sae_diff_type": "topk", "kval_topk": K},
)
FIXED_SCALE = {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.21}


def write(to: Writer) -> None:
    """Every SAELens case."""
    _plain(to)
    _heads(to)
    _transcoders(to)
    _pursuit(to)
    _temporal(to)
    for architecture, norm in product(
        TRAINED, ("none", "expected_average_only_in", "covariance_whitening", "layer_norm")
    ):
        for rescale in (True, False) if architecture.endswith("topk") else (None,):
            # Its encoder is its decoder, so that SAELens cannot fold a whitening into it.
            if (architecture, norm) != ("matching_pursuit", "covariance_whitening"):
                _trained(to, architecture, norm, rescale)


def _plain(to: Writer) -> None:
    """Every architecture x normalisation x centring, x rescaling where there is such a thing."""
    for architecture, norm, centre in product(("standard", "gated", "jumprelu", *TOPK), NORMS, (True, False)):
        for rescale in (True, False) if architecture in TOPK else (None,):
            name = f"saelens_{architecture}_{norm}_{'centred' if centre else 'plain'}{'_rescaled' if rescale else ''}"
            _save(to, name, architecture, normalize_activations=norm, apply_b_dec_to_input=centre, **_select(rescale))


def _heads(to: Writer) -> None:
    for architecture, norm in product(("standard", "jumprelu", "topk"), ("none", "layer_norm")):
        own = {"normalize_activations": norm, "reshape_activations": "hook_z"} | (
            {"k": K} if architecture == "topk" else {}
        )
        _save(to, f"saelens_hook_z_{architecture}_{norm}", architecture, ATTENTION, heads=HEADS, **own)


def _transcoders(to: Writer) -> None:
    """Into another width, and into the same."""
    kinds = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    norms = ("none", "constant_norm_rescale", "layer_norm")
    for kind, norm, d_out in product(kinds, norms, (to.d_in - 16, to.d_in)):
        own = {"normalize_activations": norm, "apply_b_dec_to_input": False, "d_out": d_out}
        _save(to, f"saelens_{kind}_{norm}_{d_out}", kind, MLP, **own)


def _pursuit(to: Writer) -> None:
    for norm, centre, rounds, residual in product(("none", "layer_norm"), (True, False), (None, 9), (0.0, 1.5)):
        own = {"normalize_activations": norm, "apply_b_dec_to_input": centre, "max_iterations": rounds}
        own |= {"residual_threshold": residual, "stop_on_duplicate_support": rounds is None}
        name = f"saelens_matching_pursuit_{norm}_{'centred' if centre else 'plain'}_{rounds}_{residual}"
        _save(to, name, "matching_pursuit", **own)


def _temporal(to: Writer) -> None:
    for index, own in enumerate(TEMPORAL):
        scale = FIXED_SCALE if index % 2 else {}
        _save(
            to, f"saelens_temporal_{index}", "temporal", batch=True, n_heads=HEADS, bottleneck_factor=13, **own, **scale
        )


def _save(
    to: Writer, name: str, architecture: str, hooks: Any = RESIDUAL, heads: int = 0, batch: bool = False, **own: Any
) -> None:
    """One SAE through ``save_model``. The scale that its files leave open is folded as ``from_pretrained`` folds it."""
    kind, config = get_sae_class(architecture)
    sae = kind(config(d_in=to.d_in, d_sae=to.d_sae, metadata=_metadata(hooks), **own))
    to.fill(sae, name, unit=architecture == "matching_pursuit")
    sae.save_model(to.out / name)
    again, choices = SAE.load_from_disk(to.out / name), {}
    if own.get("normalize_activations") == "expected_average_only_in":
        again.fold_activation_norm_scaling_factor(SCALE)
        choices = {"scale": SCALE}
    to.emit(name, _outputs(again), heads, batch, **choices)


def _trained(to: Writer, architecture: str, norm: str, rescale: bool | None) -> None:
    """A checkpoint beside the state of its scaler, and the inference model that training ends with.

    The checkpoint means what that model computes: a top-k over a whole batch is no property of a token.
    """
    name = f"saelens_trained_{architecture}_{norm}{'_rescaled' if rescale else ''}"
    kind, config = get_sae_training_class(architecture)
    own = _select(rescale) | {"normalize_activations": norm}
    if architecture == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [to.d_sae // 4, to.d_sae // 2, to.d_sae]
    sae = kind(config(d_in=to.d_in, d_sae=to.d_sae, metadata=_metadata(RESIDUAL), **own))
    to.fill(sae, name, unit=architecture == "matching_pursuit")
    sae.save_model(to.out / f"{name}_checkpoint")
    _fold(to, sae, norm, name)
    sae.save_inference_model(to.out / f"{name}_inference")
    for folder in (f"{name}_checkpoint", f"{name}_inference"):
        to.emit(folder, _outputs(SAE.load_from_disk(to.out / f"{name}_inference")))


def _fold(to: Writer, sae: TrainingSAE[Any], norm: str, name: str) -> None:
    """What SAELens' trainer writes about the scaling of its inputs, and folds at the end."""
    scaler = ActivationScaler()
    if norm == "expected_average_only_in":
        scaler.scaling_factor = SCALE
    if norm == "covariance_whitening":
        scaler.whitening = _whitening(to, name)
    scaler.save(str(to.out / f"{name}_checkpoint" / "activation_scaler.json"))
    if scaler.scaling_factor:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening:
        sae.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)


def _whitening(to: Writer, name: str) -> ActivationWhitening:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    random = to.random("whitening", name)
    matrix = torch.eye(to.d_in, dtype=torch.float64) + 0.08 * draw(to.d_in, to.d_in)
    return ActivationWhitening(0.5 * draw(to.d_in), matrix, torch.linalg.inv(matrix))


def _select(rescale: bool | None) -> dict[str, Any]:
    return {} if rescale is None else {"k": K, "rescale_acts_by_decoder_norm": rescale}


def _metadata(hooks: dict[str, str]) -> SAEMetadata:
    return SAEMetadata(model_name="tiny", context_size=64, prepend_bos=True, hook_head_index=None, **hooks)


def _outputs(sae: SAE[Any]) -> Compute:
    def compute(x: Tensor) -> dict[str, Tensor]:
        features = sae.encode(x)
        # At once: it keeps what it normalised by, for the next decode alone.
        recon = sae.decode(features)
        return {"features": features, "recon": recon, "forward": sae(x)}

    return compute

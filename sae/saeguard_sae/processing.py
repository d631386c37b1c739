"""SAEs of models that TransformerLens had changed, on the model as Hugging Face runs it.

TransformerLens folds norms into the weights after them, centres what writes to the residual stream, and moves value
biases; the model computes the same, but the activations that an SAE saw differ. Each difference is exact and has an
exact counterpart on our side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saeguard_sae.architectures import ModelConfig, layout
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.formats.found import Processing
from saeguard_sae.site import Site

_CENTRED = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_read", "mlp_out", "resid_post")
"""Points whose activations lose their mean under ``center_writing_weights``."""


def as_unprocessed(
    dictionary: Dictionary, site: Site, processing: Processing, model: nn.Module, config: ModelConfig
) -> tuple[Dictionary, Site]:
    """The same SAE on the unprocessed model: its weights and the site where it reads.

    Models with RMS norms have no mean to take out. On models with layer norms a difference in the stream's mean changes
    nothing downstream, so the edits need no counterpart.

    Raises:
        ValueError: a combination that has no exact counterpart.
    """
    if processing == "none":
        return dictionary, site
    if layout(config.model_type).norm.kind == "layer" and site.point in _CENTRED:
        dictionary = _centred(dictionary)
    if processing == "centred":
        return dictionary, site
    if site.point == "mlp_in":
        return dictionary, Site(site.layer, "mlp_normalized")  # with the gain folded into the MLP
    if site.point == "attn_z":
        return _shifted(dictionary, value_bias(model, config, site.layer)), site
    return dictionary, site


def matters(dictionary: Dictionary, site: Site, config: ModelConfig) -> bool:
    """Whether an SAE at this site would compute something else if its model had been processed."""
    if site.point in ("mlp_in", "attn_z"):
        return True
    is_centred = layout(config.model_type).norm.kind == "layer" and site.point in _CENTRED
    return is_centred and dictionary.normalisation != "layer_norm"


def _centred(dictionary: Dictionary) -> Dictionary:
    if dictionary.normalisation == "layer_norm":
        return dictionary  # takes the mean out itself
    if dictionary.normalisation != "none":
        raise ValueError(f"centred activations under {dictionary.normalisation} are not supported")
    return replace(dictionary, normalisation="centred")


def _shifted(dictionary: Dictionary, shift: Tensor | None) -> Dictionary:
    """The SAE of ``x - shift`` as an SAE of x."""
    if shift is None:
        return dictionary
    if dictionary.normalisation != "none" or dictionary.is_transcoder:
        raise ValueError("a value bias under a normalisation is not supported")
    shift = shift.to(dictionary.W_enc)
    b_dec = dictionary.b_dec + shift
    if dictionary.centre:
        return replace(dictionary, b_dec=b_dec)
    return replace(dictionary, b_enc=dictionary.b_enc - shift @ dictionary.W_enc, b_dec=b_dec)


def value_bias(model: nn.Module, config: ModelConfig, layer: int) -> Tensor | None:
    """[heads * d_head] what every head puts out for its value bias, the folded norm's bias included; None for none.

    Attention weights sum to 1, so the bias goes through attention as it is.

    Raises:
        ValueError: an architecture whose value weights are not known here.
    """
    block: Any = model.get_submodule(f"{layout(config.model_type).blocks}.{layer}")
    match config.model_type:
        case "gpt2":
            width = block.ln_1.bias.shape[0]
            weight, bias = block.attn.c_attn.weight[:, 2 * width :], block.attn.c_attn.bias[2 * width :]
            shift: Tensor = block.ln_1.bias.float() @ weight.float() + bias.float()
            return shift.detach()
        case "gpt_neox":
            return _neox_value_bias(block)
        case "llama" | "mistral" | "qwen2" | "qwen3" | "gemma2" | "gemma3_text":
            attention = block.self_attn
            if attention.v_proj.bias is None:
                return None
            heads: Tensor = attention.v_proj.bias.float().detach().unflatten(0, (-1, attention.head_dim))
            return heads.repeat_interleave(attention.num_key_value_groups, dim=0).flatten()
    raise ValueError(f"the value bias of {config.model_type} models is not known")


def _neox_value_bias(block: Any) -> Tensor:
    """Query, key and value of one head lie side by side, head after head."""
    both = block.attention.query_key_value
    heads = block.attention.config.num_attention_heads
    weight = both.weight.float().unflatten(0, (heads, 3, -1))[:, 2]
    folded: Tensor = weight @ block.input_layernorm.bias.float()
    if both.bias is not None:
        folded = folded + both.bias.float().unflatten(0, (heads, 3, -1))[:, 2]
    return folded.flatten().detach()

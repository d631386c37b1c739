"""Where each site is in each Hugging Face architecture: the input or the output of which module.

Verified against TransformerLens' hooks. To add an architecture, add its ``model_type`` here and to the engine's proof
test; nothing else knows module names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from saeguard_sae.site import Point, Site


class ModelConfig(Protocol):
    """The part of a Hugging Face configuration that is needed to find sites."""

    model_type: str
    num_hidden_layers: int


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in the model: the input (first argument) or output (first element) of ``module``."""

    module: str
    side: Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Module paths of one architecture; ``points`` are relative to a block, "" is the block itself."""

    embed: str
    blocks: str
    points: Mapping[Point, Place]


_RESIDUAL: dict[Point, Place] = {"resid_pre": Place("", "in"), "resid_post": Place("", "out")}

_LLAMA = Layout(
    "model.embed_tokens",
    "model.layers",
    _RESIDUAL
    | {
        "resid_mid": Place("post_attention_layernorm", "in"),
        "attn_z": Place("self_attn.o_proj", "in"),
        "attn_out": Place("self_attn", "out"),
        "mlp_in": Place("post_attention_layernorm", "out"),
        "mlp_act": Place("mlp.down_proj", "in"),
        "mlp_out": Place("mlp", "out"),
    },
)
# Gemma normalises what attention and MLP write; SAEs read and edit the normalised output.
_GEMMA = Layout(
    "model.embed_tokens",
    "model.layers",
    _RESIDUAL
    | {
        "resid_mid": Place("pre_feedforward_layernorm", "in"),
        "attn_z": Place("self_attn.o_proj", "in"),
        "attn_out": Place("post_attention_layernorm", "out"),
        "mlp_in": Place("pre_feedforward_layernorm", "out"),
        "mlp_act": Place("mlp.down_proj", "in"),
        "mlp_out": Place("post_feedforward_layernorm", "out"),
    },
)
_GPT2 = Layout(
    "transformer.wte",
    "transformer.h",
    _RESIDUAL
    | {
        "resid_mid": Place("ln_2", "in"),
        "attn_z": Place("attn.c_proj", "in"),
        "attn_out": Place("attn", "out"),
        "mlp_in": Place("ln_2", "out"),
        "mlp_act": Place("mlp.c_proj", "in"),
        "mlp_out": Place("mlp", "out"),
    },
)
# Attention and MLP run in parallel from the same stream: there is no resid_mid.
_NEOX = Layout(
    "gpt_neox.embed_in",
    "gpt_neox.layers",
    _RESIDUAL
    | {
        "attn_z": Place("attention.dense", "in"),
        "attn_out": Place("attention", "out"),
        "mlp_in": Place("post_attention_layernorm", "out"),
        "mlp_act": Place("mlp.dense_4h_to_h", "in"),
        "mlp_out": Place("mlp", "out"),
    },
)

LAYOUTS: dict[str, Layout] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


class UnknownArchitecture(ValueError):
    """A model whose sites are not known."""


def layout(model_type: str) -> Layout:
    """The module paths of an architecture.

    Raises:
        UnknownArchitecture: names the known ones and how to add one.
    """
    if model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UnknownArchitecture(
            f"model_type {model_type!r} is not known; known are {known}. "
            f"To add it, give its module paths in {__name__}.LAYOUTS"
        )
    return LAYOUTS[model_type]


def sites(config: ModelConfig) -> frozenset[Site]:
    """Every site of a model with this configuration."""
    points = layout(config.model_type).points
    found = {Site(layer, point) for layer in range(config.num_hidden_layers) for point in points}
    return frozenset(found | {Site(0, "embed")})


def locate(model: nn.Module, config: ModelConfig, site: Site) -> tuple[nn.Module, Literal["in", "out"]]:
    """The module of a site, and whether the site is its input or its output.

    Raises:
        ValueError: the model has no such site.
    """
    where = layout(config.model_type)
    if site not in sites(config):
        raise ValueError(f"{site} is not a site of this {config.model_type} model")
    if site.point == "embed":
        return model.get_submodule(where.embed), "out"
    place = where.points[site.point]
    block = f"{where.blocks}.{site.layer}"
    return model.get_submodule(f"{block}.{place.module}" if place.module else block), place.side

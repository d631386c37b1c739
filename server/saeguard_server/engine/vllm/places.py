"""Where our ops go in vLLM's models, whose modules have the names that Hugging Face gives them.

Llama's and Gemma's blocks pass the residual stream on in two tensors, and the norm that follows adds them. What is
sharded under tensor parallelism cannot be edited: an SAE reads and writes whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saeguard_sae.models import ModelConfig, Point, Site, depth, layout, locate, sites
from saeguard_server.engine.tables import SteeringTables
from saeguard_server.engine.vllm import ops

MODELS: Mapping[str, str] = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""vLLM's class by ``model_type``: those whose forward pass the places below were verified against."""

_SHARDED: frozenset[Point] = frozenset({"attn_z", "mlp_act"})
# The norm's own view of the stream is a tensor of its own nowhere in vLLM: it adds and normalises in one step.
_NOWHERE: frozenset[Point] = frozenset({"mlp_read"})
# vLLM scales Gemma's embeddings outside the module that looks them up.
_SCALED_EMBEDDINGS = ("gemma2", "gemma3_text")


def check_class(model: nn.Module, config: ModelConfig) -> None:
    """Refuses an implementation of the model that is not the one whose places are known.

    Raises:
        ValueError: names both.
    """
    wanted, found = MODELS[config.model_type], type(model).__name__
    if found != wanted:
        raise ValueError(f"vLLM runs this {config.model_type} model as {found}; its sites are known in {wanted}")


def offered(config: ModelConfig, tensor_parallel: int) -> frozenset[Site]:
    """The sites of a model that can be read and edited in vLLM."""
    missing = _NOWHERE | (_SHARDED if tensor_parallel > 1 else frozenset())
    if config.model_type in _SCALED_EMBEDDINGS:
        missing |= {"embed"}
    return frozenset(site for site in sites(config) if site.point not in missing)


def attach(model: nn.Module, config: ModelConfig, tables: SteeringTables) -> None:
    """Puts an op into the model at every site of the tables, which this process must hold; before it is compiled."""
    # Sites may share a module: those that change what later ones see come first.
    placed = sorted(tables.sites, key=depth)
    ops.install([_edit(model, config, tables, site) for site in placed])
    for number, site in enumerate(placed):
        _hook(model, config, site, number)


def held(model: nn.Module, config: ModelConfig, wanted: Iterable[Site]) -> frozenset[Site]:
    """Those of the sites whose module is in this process: pipeline stages hold a part of the layers each."""
    return frozenset(site for site in wanted if _is_here(model, config, site))


def _is_here(model: nn.Module, config: ModelConfig, site: Site) -> bool:
    where = layout(config.model_type)
    path = where.embed if site.point == "embed" else f"{where.blocks}.{site.layer}"
    return type(model.get_submodule(path)).__name__ != "PPMissingLayer"


def _edit(model: nn.Module, config: ModelConfig, tables: SteeringTables, site: Site) -> ops.Edit:
    see = locate(model, config, site).see
    return lambda x: tables.edit(site, x, see)


def _hook(model: nn.Module, config: ModelConfig, site: Site, number: int) -> None:
    where = locate(model, config, site)
    if where.side == "in":
        where.module.register_forward_pre_hook(lambda _, args: _apply(args, number))
    else:
        where.module.register_forward_hook(lambda _, __, out: _apply_out(site, out, number))


def _apply_out(site: Site, out: Any, number: int) -> None:
    # A norm that adds first puts out what it normalised and the sum: an SAE behind the norm reads the former alone.
    is_stream = site.point == "resid_post"
    _apply(out if is_stream or isinstance(out, Tensor) else out[:1], number)


def _apply(value: Any, number: int) -> None:
    """Edits the activations among a module's arguments or output in place: one tensor, or two that are summed."""
    given = (value,) if isinstance(value, Tensor) else value
    # Blocks get positions first, in integers.
    x, *more = [one for one in given if isinstance(one, Tensor) and one.is_floating_point()]
    if more:
        torch.ops.saeguard_vllm.edit_sum(x, more[0], number)
    else:
        torch.ops.saeguard_vllm.edit(x, number)

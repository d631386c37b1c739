"""Our settings as arguments of vLLM's engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from saeguard_sae.loading import LoadedSae
from saeguard_server.engine.model_files import ModelFiles
from saeguard_server.engine.vllm.orders import KEY
from saeguard_server.engine.vllm.plan import Plan
from saeguard_server.settings import BadSettings, EngineSettings, Settings

_BYTES = {"float32": 4, "bfloat16": 2}
_BLOCK = 16
_CPU_BLOCK = 32
"""Tokens in a block of KV memory; vLLM's attention on a CPU wants multiples of 32."""


def check_settings(settings: Settings) -> None:
    """Refuses what vLLM has no use for.

    Raises:
        BadSettings: names the setting, and what is there instead.
    """
    engine, own = settings.engine, settings.engine.vllm
    on_cpu = _is_cpu(settings)
    refused = {
        "engine.threads": (engine.threads is not None, "vLLM reads VLLM_CPU_OMP_THREADS_BIND instead"),
        "engine.pack_weights": (not engine.pack_weights, "vLLM lays weights out as it does; leave it out"),
        "engine.compile": (engine.compile != "none", "vLLM compiles all or, with engine.vllm.eager, nothing"),
        "engine.vllm.memory_share": (on_cpu and own.memory_share != 0.9, "on a CPU, give engine.kv_cache_mb"),
        "engine.vllm.eager": (
            on_cpu and own.eager and own.pipeline_parallel > 1,
            "on a CPU, vLLM's pipeline stages work only when it compiles",
        ),
    }
    for name, (is_given, instead) in refused.items():
        if is_given:
            raise BadSettings(f"{name}: {instead}")
    from vllm.platforms import current_platform

    wanted = torch.device(settings.model.device).type
    if current_platform.device_type != wanted:
        raise BadSettings(f"model.device: the installed vLLM runs on {current_platform.device_type}, not on {wanted}")


def arguments(settings: Settings, model: ModelFiles, saes: Mapping[str, LoadedSae]) -> dict[str, Any]:
    """What vLLM's ``EngineArgs`` take.

    Args:
        saes: as they were checked; the workers must load the same.
    """
    engine, own = settings.engine, settings.engine.vllm
    plan = Plan(
        saes=settings.saes,
        digests={name: sae.digest for name, sae in saes.items()},
        slots=engine.max_slots,
        special_ids=tuple(sorted(model.tokenizer.special_ids)),
    )
    on_cpu = _is_cpu(settings)
    given: dict[str, Any] = {
        "model": str(model.path),
        "served_model_name": model.info.name,
        "dtype": settings.model.dtype,
        "max_model_len": model.info.max_context,
        "max_num_seqs": engine.max_slots,
        # The running requests' tokens count too, so that a prompt's part is as long as the settings say.
        "max_num_batched_tokens": engine.prefill_tokens + engine.max_slots,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": engine.prefix_cache,
        "enforce_eager": own.eager,
        "block_size": _CPU_BLOCK if on_cpu else _BLOCK,
        "tensor_parallel_size": own.tensor_parallel,
        "pipeline_parallel_size": own.pipeline_parallel,
        "additional_config": {KEY: msgspec.to_builtins(plan)},
    }
    if own.executor != "auto":
        given["distributed_executor_backend"] = own.executor
    if on_cpu or engine.kv_cache_mb is not None:
        given["kv_cache_memory_bytes"] = _kv_bytes(engine, model)
    if not on_cpu:
        given["gpu_memory_utilization"] = own.memory_share
        # A recorded graph replays the edits of the pass in which it was recorded.
        given["compilation_config"] = {"cudagraph_mode": "NONE"}
    return given


def _is_cpu(settings: Settings) -> bool:
    return torch.device(settings.model.device).type == "cpu"


def _kv_bytes(engine: EngineSettings, model: ModelFiles) -> int:
    """KV memory of each worker: what the settings say, else what every slot needs when it is full."""
    if engine.kv_cache_mb is not None:
        return engine.kv_cache_mb * 2**20
    config, own = model.config, engine.vllm
    heads = -(-_kv_heads(config) // own.tensor_parallel)
    layers = -(-config.num_hidden_layers // own.pipeline_parallel)
    block: int = 2 * heads * _head_size(config) * layers * _BYTES[model.info.dtype] * _CPU_BLOCK
    per_request = -(-model.info.max_context // _CPU_BLOCK)
    # One block is vLLM's own.
    return block * (per_request * engine.max_slots + 1)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

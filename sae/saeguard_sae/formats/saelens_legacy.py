"""Flat ``cfg.json`` of SAELens before 6.0, which held the settings of the whole training run beside the SAE's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard_sae.formats import files
from saeguard_sae.formats.saelens_settings import ARCHITECTURES, BASE_KEYS, CONFIG, Settings, words

_NOW_CALLED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_METADATA = words(
    """model_name hook_name hook_head_index model_class_name model_from_pretrained_kwargs prepend_bos neuronpedia_id
    exclude_special_tokens context_size seqpos_slice dataset_path sae_lens_version sae_lens_training_version
    hook_name_out hook_head_index_out hf_hook_name hf_hook_name_out"""
)
_OWN = frozenset({"activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor"})
# Settings of the training run that every version up to 5.10 could write; none changes what the weights compute.
_RUN = words(
    """act_store_device adam_beta1 adam_beta2 autocast autocast_dtype autocast_lm b_dec_init_method begin_batch_token
    begin_sequence_token cached_activations_path checkpoint_path coefficient_warm_up_steps compile_llm compile_sae
    dataset_trust_remote_code dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_orthogonal_init disable_concat_sequences end_pos_offset
    eval_batch_size_prompts eval_every_n_wandb_logs exclude_bos_between_sequences expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path hook_eval
    hook_layer hook_point_eval hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold l0_lambda l0_warm_up_steps l1_coefficient l1_normalization_fn
    l1_warm_up_steps l1_warmup_steps llm_compilation_mode log_activations_store_to_wandb log_optimizer_state_to_wandb
    log_to_wandb logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_kwargs
    mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles noise_scale
    normalize_sae_decoder resample_batches resume run_name sae_compilation_mode scale_sparsity_penalty_by_decoder_norm
    seed sequence_separator_token sparsity_coefficient start_pos_offset store_batch_size store_batch_size_prompts
    streaming tokens_per_buffer total_training_tokens train_batch_size train_batch_size_tokens training_tokens
    use_cached_activations use_ghost_grads verbose wandb_entity wandb_id wandb_log_frequency wandb_project"""
)


def modernised(config: Mapping[str, Any]) -> Settings:
    """The settings as SAELens 6 would write them.

    Raises:
        ValueError: a key or a value that is not known.
    """
    flat, spelled = _renamed(config)
    stated = frozenset(flat)
    flat.setdefault("architecture", "standard")
    files.choice(flat, "architecture", ARCHITECTURES, CONFIG)
    files.check_keys(flat, BASE_KEYS | ARCHITECTURES[flat["architecture"]] | _METADATA | _OWN | _RUN, CONFIG)
    activation = _activation(flat)
    if activation == "topk":
        stated |= _take_k(flat, spelled)
    flat["normalize_activations"] = _normalisation(flat.get("normalize_activations"))
    own = BASE_KEYS | ARCHITECTURES[flat["architecture"]]
    return Settings(
        table={key: value for key, value in flat.items() if key in own},
        metadata={key: value for key, value in flat.items() if key in _METADATA},
        stated=stated,
        where=f"{CONFIG}: ",
        spelled=spelled,
        is_tanh=activation == "tanh-relu",
        is_finetuned=_finetuned(flat),
    )


def _renamed(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The table with today's names, and what the file called them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        now = _NOW_CALLED.get(key, key)
        if now in flat and flat[now] != value:
            raise ValueError(f"{CONFIG}: {key} is {value!r}, but the same is {flat[now]!r} under another name")
        flat[now] = value
    return flat, {now: old for old, now in _NOW_CALLED.items() if old in config}


def _activation(flat: dict[str, Any]) -> str:
    """What the features go through; only plain SAEs could have anything but ReLU."""
    name = files.choice({"activation_fn": "relu"} | flat, "activation_fn", ("relu", "tanh-relu", "topk"), CONFIG)
    allowed = {"topk": ("standard", "topk"), "tanh-relu": ("standard",)}
    if name in allowed and flat["architecture"] not in allowed[name]:
        raise ValueError(f"{CONFIG}: activation_fn {name!r} is not supported for architecture {flat['architecture']!r}")
    return name


def _take_k(flat: dict[str, Any], spelled: dict[str, str]) -> set[str]:
    """Makes a plain SAE with that activation what SAELens 6 calls it; the keys that this states."""
    flat["architecture"], spelled["architecture"] = "topk", spelled.get("activation_fn", "activation_fn")
    given = flat.get("activation_fn_kwargs") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{CONFIG}: activation_fn_kwargs must be a table, got {given!r}")
    files.check_keys(given, {"k"}, f"{CONFIG}: activation_fn_kwargs")
    if "k" in given:
        flat["k"], spelled["k"] = given["k"], "activation_fn_kwargs.k"
    return {"architecture", "k"}


def _normalisation(said: object) -> object:
    # Until May 2024 it was a question with one possible answer.
    if isinstance(said, bool):
        return "expected_average_only_in" if said else "none"
    return "none" if said is None else said


def _finetuned(flat: dict[str, Any]) -> bool | None:
    if "finetuning_scaling_factor" not in flat:
        return None
    return files.flag(flat, "finetuning_scaling_factor", None, CONFIG)

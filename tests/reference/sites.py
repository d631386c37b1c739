"""Compares every site with TransformerLens' hook of that place: what is there, and what adding a vector there does.

Run by ``test_sites.py`` inside the reference environment, which has TransformerLens. Prints one JSON line per site.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformer_lens.loading_from_pretrained as loading
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from saeguard_sae.dictionary import Dictionary, ReLU
from saeguard_sae.formats.parsed import hook_name
from saeguard_sae.loading import as_unprocessed
from saeguard_sae.models import Located, Site, locate, norm_gain, sites
from support.models import CONFIGS, VOCAB

COMMON: dict[str, Any] = {"n_ctx": 256, "d_vocab": VOCAB, "device": "cpu", "default_prepend_bos": False}


def hooked_config(model_type: str, c: Any) -> HookedTransformerConfig:
    """What TransformerLens needs to know of these small models."""
    sizes = {"d_model": c.hidden_size, "n_heads": c.num_attention_heads, "n_layers": c.num_hidden_layers, **COMMON}
    sizes["d_head"] = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if model_type == "gpt2":
        return HookedTransformerConfig(
            **sizes, d_mlp=4 * c.hidden_size, act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN",
            original_architecture="GPT2LMHeadModel",
        )  # fmt: skip
    if model_type == "gpt_neox":
        return HookedTransformerConfig(
            **sizes, d_mlp=c.intermediate_size, act_fn="gelu", eps=c.layer_norm_eps, normalization_type="LN",
            positional_embedding_type="rotary", rotary_dim=sizes["d_head"] // 2, rotary_adjacent_pairs=False,
            parallel_attn_mlp=True, original_architecture="GPTNeoXForCausalLM",
        )  # fmt: skip
    gated = dict(
        **sizes, d_mlp=c.intermediate_size, eps=c.rms_norm_eps, normalization_type="RMS", gated_mlp=True,
        positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=sizes["d_head"],
        n_key_value_heads=c.num_key_value_heads, final_rms=True,
    )  # fmt: skip
    if model_type == "llama":
        return HookedTransformerConfig(**gated, act_fn="silu", original_architecture="LlamaForCausalLM")
    assert model_type == "gemma2"
    return HookedTransformerConfig(
        **gated, act_fn="gelu_pytorch_tanh", use_normalization_before_and_after=True,
        attn_scale=c.query_pre_attn_scalar**0.5, attn_scores_soft_cap=c.attn_logit_softcapping,
        output_logits_soft_cap=c.final_logit_softcapping, use_local_attn=True, window_size=c.sliding_window,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in c.layer_types],
        original_architecture="Gemma2ForCausalLM",
    )  # fmt: skip


CONVERT = {
    "gpt2": loading.convert_gpt2_weights,
    "gpt_neox": loading.convert_neox_weights,
    "llama": loading.convert_llama_weights,
    "gemma2": loading.convert_gemma_weights,
}


def both(model_type: str, *, processed: bool = False) -> tuple[Any, HookedTransformer]:
    """The model as transformers and as TransformerLens run it."""
    config = CONFIGS[model_type]()
    if model_type == "gpt_neox":
        config.rope_parameters["partial_rotary_factor"] = 0.5  # TransformerLens rotates an even number
    torch.manual_seed(41)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model, as_hooked(model_type, model, processed=processed)


def as_hooked(model_type: str, model: Any, *, processed: bool = False) -> HookedTransformer:
    """The model as TransformerLens runs it."""
    cfg = hooked_config(model_type, model.config)
    hooked = HookedTransformer(cfg)
    state = {name: tensor.clone() for name, tensor in CONVERT[model_type](model, cfg).items()}
    is_layer_norm = cfg.normalization_type == "LN"
    hooked.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed and is_layer_norm,
        center_unembed=False,
        fold_value_biases=processed,
    )
    hooked.set_use_hook_mlp_in(True)
    return hooked.eval()


def look_at(model: Any, site: Site, tokens: torch.Tensor) -> torch.Tensor:
    """What is at a site [rows, tokens, width]."""
    where = locate(model, model.config, site)
    seen: list[torch.Tensor] = []

    def look(value: Any) -> None:
        x = value if isinstance(value, torch.Tensor) else value[0]
        seen.append((x if where.see is None else where.see(x)).clone())

    with hooked_at(where, look):
        model(tokens)
    return seen[0]


def steered(model: Any, site: Site, tokens: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """The logits with ``vector`` added at a site."""
    if site.point == "mlp_normalized":
        vector, site = vector * norm_gain(model, model.config, site.layer), Site(site.layer, "mlp_in")
    where = locate(model, model.config, site)

    def edit(value: Any) -> Any:
        x = value if isinstance(value, torch.Tensor) else value[0]
        if where.shared:
            x += vector
            return value
        return x + vector if isinstance(value, torch.Tensor) else (x + vector, *value[1:])

    with hooked_at(where, edit):
        return model(tokens).logits


@contextmanager
def hooked_at(where: Located, act: Any) -> Iterator[None]:
    """While it lasts, ``act`` is called with the arguments or the output of the site's module."""
    module = where.module
    if where.side == "in":
        handle = module.register_forward_pre_hook(lambda _, args: act(args))
    else:
        handle = module.register_forward_hook(lambda _, __, out: act(out))
    try:
        yield
    finally:
        handle.remove()


def some_sites(model: Any, hooked: HookedTransformer) -> Iterator[tuple[Site, str]]:
    """Every site of the middle layer, and the embedding, that TransformerLens has a hook for."""
    for site in sorted(sites(model.config)):
        hook = "" if site.point in ("attn_raw", "mlp_raw") else hook_name(site)
        hook = "" if site.point in ("attn_raw", "mlp_raw") else hook_name(site)
        if (site.layer == 1 or site.point == "embed") and hook in hooked.hook_dict:
            yield site, hook


def say(**facts: Any) -> None:
    """One JSON line."""
    sys.stdout.write(json.dumps(facts) + "\n")


def processed(model_type: str, tokens: torch.Tensor) -> None:
    """What an identity dictionary encodes at each site, against the processed model's own activation."""
    model, hooked = both(model_type, processed=True)
    _, cache = hooked.run_with_cache(tokens)
    for site, hook in some_sites(model, hooked):
        wanted = cache[hook].flatten(2)
        width = wanted.shape[-1]
        one = torch.eye(width)
        lift = float(wanted.abs().max()) + 10  # keeps everything above ReLU's corner
        linear = Dictionary(one, torch.full((width,), lift), one, torch.zeros(width), ReLU(), centre=False)
        adapted, where = as_unprocessed(linear, site, "transformer_lens", model, model.config)
        error = (adapted.encode(look_at(model, where, tokens)) - lift - wanted).abs().max() / wanted.abs().max()
        say(processed=str(site), hook=hook, activation=float(error))


def unprocessed(model_type: str, tokens: torch.Tensor) -> None:
    """What is at each site, and what adding a vector there does."""
    model, hooked = both(model_type)
    _, cache = hooked.run_with_cache(tokens)
    base = model(tokens).logits
    for site, hook in some_sites(model, hooked):
        wanted, shape = cache[hook].flatten(2), cache[hook].shape[2:]
        vector = torch.randn(wanted.shape[-1], generator=torch.Generator().manual_seed(6))
        add = vector.view(shape)
        theirs = hooked.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook, add=add: x + add)])
        mine = steered(model, site, tokens, vector)
        say(
            site=str(site),
            hook=hook,
            activation=float((look_at(model, site, tokens) - wanted).abs().max() / wanted.abs().max()),
            steered=float((mine.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()),
            effect=float((mine - base).abs().max()),
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    some = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(5))
    processed(sys.argv[1], some)
    unprocessed(sys.argv[1], some)

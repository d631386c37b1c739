"""Places in a model as other libraries spell them: TransformerLens' hooks and Hugging Face's module paths."""

from __future__ import annotations

import re

from saeguard_sae.formats.found import ModulePlace, Place
from saeguard_sae.site import Point, Site

_POINTS: dict[str, Point] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "mlp_read",
    "ln2.hook_normalized": "mlp_normalized",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
# The list of blocks as it is called in causal language models, in their bases, and inside multimodal models.
_BLOCKS = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.|transformer\.|gpt_neox\.)?"
    r"(?:layers|h)\.(\d+)(?:\.(.+))?"
)
_EMBEDDINGS = ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte", "gpt_neox.embed_in", "embed_in")


def hook_site(name: str) -> Site | None:
    """The site of a TransformerLens hook such as ``blocks.5.hook_resid_post``; None for one that is no site of ours."""
    if name == "hook_embed":
        return Site(0, "embed")
    match = _HOOK.fullmatch(name)
    point = _POINTS.get(match[2]) if match else None
    return Site(int(match[1]), point) if match and point else None


def module_place(path: str) -> Place | None:
    """The place of a Hugging Face module path such as ``model.layers.3.mlp``: its output, unless ``.input`` follows."""
    side = "in" if path.endswith(".input") else "out"
    path = path.removesuffix(".input").removesuffix(".output")
    if path in _EMBEDDINGS and side == "out":
        return Site(0, "embed")
    match = _BLOCKS.fullmatch(path)
    if match is None:
        return None
    layer, module = int(match[1]), match[2] or ""
    if not module:
        return Site(layer, "resid_pre" if side == "in" else "resid_post")
    return ModulePlace(layer, module, "in" if side == "in" else "out")


def place(name: str) -> Place | None:
    """Either spelling."""
    match = _HOOK.fullmatch(name)
    if match and match[2] == "mlp.hook_out":
        # The MLP module's own output: what hook_mlp_out is, except where a norm follows it (Gemma).
        return ModulePlace(int(match[1]), "mlp", "out")
    return hook_site(name) or module_place(name)


def in_and_out(inward: object, outward: object, key: str) -> tuple[Place | None, tuple[Place, ...]]:
    """Where it reads, and where it writes if that is elsewhere; ``key`` names what says ``outward``.

    Raises:
        ValueError: it writes at a place that nobody here knows.
    """
    reads = place(inward) if isinstance(inward, str) else None
    if outward is None or outward == inward:
        return reads, ()
    writes = place(outward) if isinstance(outward, str) else None
    if writes is None:
        raise ValueError(f"{key} {outward!r} is not a place that is known")
    return reads, (writes,)


def hook_name(site: Site) -> str:
    """A site as TransformerLens spells it.

    Raises:
        ValueError: it has no hook there.
    """
    if site.point == "embed":
        return "hook_embed"
    hooks = [hook for hook, point in _POINTS.items() if point == site.point]
    if not hooks:
        raise ValueError(f"TransformerLens has no hook at {site}")
    return f"blocks.{site.layer}.{hooks[0]}"

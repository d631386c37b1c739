"""Where each site is in each Hugging Face architecture: the input or the output of which module.

Verified against TransformerLens' hooks. To add an architecture, add its ``model_type`` here and to the engine's proof
test; nothing else knows module names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

if TYPE_CHECKING:
    from torch import Tensor, nn

# A place in the model, with one spelling: ``resid_post.12``.


Point: TypeAlias = Literal[
    "embed",
    "resid_pre",
    "attn_z",
    "attn_raw",
    "attn_out",
    "resid_mid",
    "mlp_read",
    "mlp_normalized",
    "mlp_in",
    "mlp_act",
    "mlp_raw",
    "mlp_out",
    "resid_post",
]
"""Where in a layer, in the order of a forward pass: the token embedding (layer 0 only); the residual stream before the
block; the heads' outputs before the output projection; what attention adds to the stream, before (``attn_raw``, where
the architecture has one) and after the norm on it; the stream between attention and MLP; the same as the MLP alone
reads it, before its norm; that normalised, without the norm's gain and bias; the MLP's input after its norm; its hidden
activation; what it adds to the stream, before (``mlp_raw``) and after the norm on it; the stream after the block."""

POINTS: tuple[Point, ...] = get_args(Point)


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """``point`` of block ``layer``; prints and parses as ``point.layer``."""

    layer: int
    point: Point

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"{self.point!r} is not a point; one of {', '.join(POINTS)}")
        if self.layer < 0 or (self.point == "embed" and self.layer != 0):
            raise ValueError(f"{self.point}.{self.layer} is not a site: no such layer")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site a text names.

        Raises:
            ValueError: anything but ``point.layer``.
        """
        for point in POINTS:
            layer = text.removeprefix(f"{point}.")
            if layer != text and layer.isascii() and layer.isdigit() and str(int(layer)) == layer:
                return cls(int(layer), point)
        raise ValueError(f"{text!r} is not a site; write it like 'resid_post.12', points are {', '.join(POINTS)}")


class ModelConfig(Protocol):
    """The part of a Hugging Face configuration that is needed to find sites."""

    model_type: str
    num_hidden_layers: int


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in the model: the input (first argument) or output (first element) of ``module``.

    ``shared``: the residual stream itself, which the block goes on to use past this module, so that an edit must change
    the tensor in place. ``normalised``: not the tensor but what the module's norm makes of it before gain and bias.
    """

    module: str
    side: Literal["in", "out"]
    shared: bool = False
    normalised: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """An architecture's norm: with the mean taken out ("layer") or without ("rms"); its gain is ``offset + weight``."""

    kind: Literal["layer", "rms"]
    eps: str
    """Name of the setting that holds its epsilon."""
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Module paths of one architecture; ``points`` are relative to a block, "" is the block itself."""

    embed: str
    blocks: str
    norm: Norm
    points: Mapping[Point, Place]


@dataclass(frozen=True, slots=True)
class Located:
    """A site in a model that is loaded: a side of ``module``, and how to see and edit its tensor."""

    module: nn.Module
    side: Literal["in", "out"]
    shared: bool
    see: Callable[[Tensor], Tensor] | None
    """What the SAE reads, computed from the module's tensor; None where that is the tensor itself."""


def _points(attention: str, out: str, norm: str, mlp: str, down: str) -> dict[Point, Place]:
    """What every architecture with this naming has; module names are relative to the block."""
    return {
        "resid_pre": Place("", "in"),
        "attn_z": Place(f"{attention}.{out}", "in"),
        "attn_out": Place(attention, "out"),
        "resid_mid": Place(norm, "in", shared=True),
        "mlp_read": Place(norm, "in"),
        "mlp_normalized": Place(norm, "in", normalised=True),
        "mlp_in": Place(norm, "out"),
        "mlp_act": Place(f"{mlp}.{down}", "in"),
        "mlp_out": Place(mlp, "out"),
        "resid_post": Place("", "out"),
    }


_LLAMA = Layout(
    "model.embed_tokens",
    "model.layers",
    Norm("rms", "rms_norm_eps"),
    _points("self_attn", "o_proj", "post_attention_layernorm", "mlp", "down_proj"),
)
# Gemma normalises what attention and MLP write; SAEs read and edit the normalised output.
_GEMMA = Layout(
    "model.embed_tokens",
    "model.layers",
    Norm("rms", "rms_norm_eps", offset=1.0),
    _points("self_attn", "o_proj", "pre_feedforward_layernorm", "mlp", "down_proj")
    | {
        "attn_raw": Place("self_attn", "out"),
        "attn_out": Place("post_attention_layernorm", "out"),
        "mlp_raw": Place("mlp", "out"),
        "mlp_out": Place("post_feedforward_layernorm", "out"),
    },
)
_GPT2 = Layout(
    "transformer.wte",
    "transformer.h",
    Norm("layer", "layer_norm_epsilon"),
    _points("attn", "c_proj", "ln_2", "mlp", "c_proj"),
)
# Attention and MLP run in parallel from the same stream: there is no resid_mid.
_NEOX = Layout(
    "gpt_neox.embed_in",
    "gpt_neox.layers",
    Norm("layer", "layer_norm_eps"),
    {
        point: place
        for point, place in _points("attention", "dense", "post_attention_layernorm", "mlp", "dense_4h_to_h").items()
        if point != "resid_mid"
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


def site_of(model_type: str, layer: int, module: str, side: Literal["in", "out"]) -> Site:
    """The site that is the input or output of a module, named relative to its block.

    Raises:
        ValueError: no site of this architecture is there; names the modules that have one.
    """
    where = layout(model_type)
    # An MLP's input is what the norm before it puts out.
    mlp = where.points["mlp_act"].module.rpartition(".")[0]
    if (module, side) == (mlp, "in"):
        return Site(layer, "mlp_in")
    # A module's own input is what it alone reads: not the stream, and not what its norm makes of it.
    for point, place in where.points.items():
        if (place.module, place.side) == (module, side) and not (place.shared or place.normalised):
            return Site(layer, point)
    known = ", ".join(sorted({f"{one.module or 'the block'} ({one.side}put)" for one in where.points.values()}))
    raise ValueError(f"the {side}put of {module!r} is not a site of {model_type} models; there are: {known}")


def depth(site: Site) -> tuple[int, int]:
    """Orders sites as a forward pass reaches them."""
    return (-1 if site.point == "embed" else site.layer, POINTS.index(site.point))


def locate(model: nn.Module, config: ModelConfig, site: Site) -> Located:
    """The module of a site and how to reach its tensor.

    Raises:
        ValueError: the model has no such site.
    """
    where = layout(config.model_type)
    if site not in sites(config):
        raise ValueError(f"{site} is not a site of this {config.model_type} model")
    if site.point == "embed":
        return Located(model.get_submodule(where.embed), "out", shared=False, see=None)
    place = where.points[site.point]
    block = f"{where.blocks}.{site.layer}"
    module = model.get_submodule(f"{block}.{place.module}" if place.module else block)
    see = _normaliser(where.norm, config) if place.normalised else None
    return Located(module, place.side, place.shared, see)


def norm_gain(model: nn.Module, config: ModelConfig, layer: int) -> Tensor:
    """[d_model] by which the norm before a layer's MLP multiplies what it normalised."""
    where = layout(config.model_type)
    norm: Any = locate(model, config, Site(layer, "mlp_in")).module
    weight: Tensor = norm.weight.detach().float()
    return weight + where.norm.offset


def _normaliser(norm: Norm, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    eps = float(getattr(config, norm.eps))

    def see(x: Tensor) -> Tensor:
        wide = x.float()
        if norm.kind == "layer":
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()

    return see

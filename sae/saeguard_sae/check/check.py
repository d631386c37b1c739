"""Which convention an SAE was most likely given wrongly: the others are tried on activations captured once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from saeguard_sae import releases
from saeguard_sae.catalogue import Quality
from saeguard_sae.check.measure import (
    Captured,
    Reader,
    SaeMeasurements,
    Variant,
    capture,
    is_transcoder,
    reader,
    reconstruct_text,
    target,
)
from saeguard_sae.coders import SparseCoder, Temporal
from saeguard_sae.dictionary import NORMALISATIONS, Dictionary, JumpReLU, Normalisation, is_selection
from saeguard_sae.formats.parsed import Choices, Convention, Processing
from saeguard_sae.loading import USER, LoadedSae, as_unprocessed, matters, value_bias
from saeguard_sae.metrics import SaeMetrics
from saeguard_sae.models import ModelConfig, Site, depth, sites

# One thing about an SAE done otherwise, with what to write into its settings for it.


Kind: TypeAlias = Literal["site", "bias", "normalisation", "decoder norms", "scale", "processing"]


class Setup(NamedTuple):
    """Where an SAE reads, whose activations it must reproduce, and by which conventions."""

    reads: Site
    target: Site | None
    reader: Reader


@dataclass(frozen=True, slots=True, eq=False)
class ConventionChange:
    """One thing done otherwise. ``setting``: what to write into the settings for it, None where there is none."""

    kind: Kind
    what: str
    setting: str | None
    apply: Callable[[Setup], Setup]

    def then(self, other: ConventionChange) -> ConventionChange:
        """Both at once."""
        both = None if self.setting is None or other.setting is None else f"{self.setting}\n{other.setting}"
        return ConventionChange(
            self.kind, f"{self.what}, and {other.what}", both, lambda setup: other.apply(self.apply(setup))
        )


def of_coder(**fields: Any) -> Callable[[Setup], Setup]:
    """The change of these fields of what is served."""

    def apply(setup: Setup) -> Setup:
        reader = setup.reader
        assert not isinstance(reader, Temporal), "its conventions are never changed"
        if isinstance(reader, Variant):
            return setup._replace(reader=replace(reader, dictionary=replace(reader.dictionary, **fields)))
        return setup._replace(reader=replace(reader, **fields))

    return apply


def of_variant(**fields: Any) -> Callable[[Setup], Setup]:
    """The change of these factors, which leaves the weights alone."""

    def apply(setup: Setup) -> Setup:
        assert isinstance(setup.reader, Variant), "only a dictionary is read with factors"
        return setup._replace(reader=replace(setup.reader, **fields))

    return apply


def of_dictionary(change: Callable[[Dictionary], Dictionary]) -> Callable[[Setup], Setup]:
    """A change that depends on what the dictionary is by then."""

    def apply(setup: Setup) -> Setup:
        assert isinstance(setup.reader, Variant), "only a dictionary is changed so"
        return setup._replace(reader=replace(setup.reader, dictionary=change(setup.reader.dictionary)))

    return apply


# What a loaded SAE's conventions say that its weights do not.


_SCALE = "activation scale"
"""What formats call the factor that is folded into the weights."""


def convention(sae: LoadedSae, name: str) -> Convention | None:
    """A convention by its name, as it was decided last when the SAE was loaded."""
    return next((one for one in reversed(sae.conventions) if one.name == name), None)


def processing(sae: LoadedSae) -> Processing | None:
    """How the model was changed that it was trained on; None where nobody said so and it does not matter."""
    known = convention(sae, "processing")
    if known is None:
        return "none"
    return next((one for one in get_args(Processing) if one == known.value), None)


def scale(sae: LoadedSae) -> float:
    """The factor that takes activations to the scale of training, folded into the weights; 1 for none."""
    known = convention(sae, _SCALE)
    try:
        return 1.0 if known is None else float(known.value)
    except ValueError:  # "none", or that of each token
        return 1.0


def asks_for_scale(sae: LoadedSae) -> bool:
    """Whether the settings can say another factor; where files state it or have none, the format refuses it."""
    known = convention(sae, _SCALE)
    return known is not None and known.source in (Choices().scale_said_by, USER, releases.source())


def gating(sae: LoadedSae) -> str | None:
    """Whose rule decides what fires, where there are two."""
    known = convention(sae, "gating")
    return None if known is None else known.value.partition(":")[0]


# The units of an SAE's inputs and features, each got wrong: decoder norms and the scale of activations.


_ALIKE = 0.01
"""Factors all this near to 1 make no difference that could be seen."""


def decoder_norms(sae: LoadedSae, dictionary: Dictionary) -> Iterator[ConventionChange]:
    """Rows as the files have them: a scale that was folded into them is taken out again."""
    rows = torch.linalg.vector_norm(dictionary.W_dec, dim=1, dtype=torch.float32)
    rows = rows * scale(sae)
    if bool(((rows - 1).abs() < _ALIKE).all()):
        return
    dtype = dictionary.W_dec.dtype
    norms = rows.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    competes = is_selection(dictionary.activation)
    # Features that do not compete only change by the factor, whether it comes before or after.
    side = "before" if competes else "after"
    yield ConventionChange(
        "decoder norms", "its features are of unit decoder rows", None, of_variant(**{side: 1 / norms})
    )
    text = "its features are to be multiplied by the norms of their decoder rows"
    yield ConventionChange("decoder norms", text, None, of_variant(**{side: norms}))
    if competes or isinstance(dictionary.activation, JumpReLU):
        compared = "ranked by" if competes else "compared with their thresholds as"
        yield ConventionChange("decoder norms", f"its features are {compared} value x norm of the decoder row",
                     _gating(sae, "saelens", "openmoss"), of_variant(before=norms, after=1 / norms))  # fmt: skip
        yield ConventionChange("decoder norms", f"its features are {compared} value / norm of the decoder row",
                     _gating(sae, "openmoss", "saelens"), of_variant(before=1 / norms, after=norms))  # fmt: skip


def _gating(sae: LoadedSae, own: str, other: str) -> str | None:
    return f'gating = "{other}"' if gating(sae) == own else None


def scales(sae: LoadedSae, x: Tensor, target: Tensor | None) -> Iterator[ConventionChange]:
    """The mean norm that the SAE was trained on is sqrt(width) in most libraries; files often leave the factor out."""
    total, known = _factor(x), scale(sae)
    ahead = total / known
    if not isfinite(ahead) or ahead <= 0 or abs(ahead - 1) < _ALIKE:
        return
    what = f"its activations are scaled by {total:.4g} (sqrt(d_in) / their mean norm here), not by {known:.4g}"
    setting = f"scale = {total:.4g}" if asks_for_scale(sae) else None
    yield ConventionChange("scale", what, setting, of_variant(scale_in=ahead, scale_out=ahead))
    if target is not None and is_transcoder(sae):
        out = _factor(target)
        what = f"what it reads is scaled by {total:.4g}, what it writes by {out:.4g} (from their mean norms here)"
        yield ConventionChange("scale", what, None, of_variant(scale_in=ahead, scale_out=out / known))


def _factor(x: Tensor) -> float:
    return float(x.shape[-1] ** 0.5 / x.float().norm(dim=-1).mean())


# The conventions by which an activation reaches the encoder, each got wrong: bias, normalisation, processing.


def conventions(
    sae: LoadedSae, model: nn.Module, config: ModelConfig, x: Tensor, target: Tensor | None
) -> list[ConventionChange]:
    """The changes of everything but the site.

    Args:
        x: [n, d_in] what it reads.
        target: [n, d_out] what it must reproduce.
    """
    coder = sae.dictionary
    if isinstance(coder, Temporal):
        return []
    if not isinstance(coder, Dictionary):
        return [*_bias(coder), *_normalisation(sae, coder, model, config)]
    # In this order: an SAE is loaded so, and what is folded last has taken in what came before.
    folded = [*_processing(sae, coder, model, config), *decoder_norms(sae, coder)]
    if sae.site.point == "attn_z" and processing(sae) == "transformer_lens":
        return folded
    return [*_bias(coder), *_normalisation(sae, coder, model, config), *folded, *scales(sae, x, target)]


def _bias(coder: SparseCoder) -> Iterator[ConventionChange]:
    assert not isinstance(coder, Temporal), "it leaves no such choice"
    if coder.d_in != coder.d_out or not bool(coder.b_dec.any()):
        return
    flipped = not coder.centre
    what = f"b_dec is {'' if flipped else 'not '}subtracted from what it encodes"
    setting = f"apply_b_dec_to_input = {'true' if flipped else 'false'}"
    yield ConventionChange("bias", what, setting, of_coder(centre=flipped))


def _normalisation(
    sae: LoadedSae, coder: SparseCoder, model: nn.Module, config: ModelConfig
) -> Iterator[ConventionChange]:
    assert not isinstance(coder, Temporal), "it leaves no such choice"
    own = coder.normalisation
    for kind in NORMALISATIONS:
        if kind != own and (kind != "centred" or _has_mean(sae, coder, model, config)):
            what = f"{_NORMALISED[kind]}{_NOT[own]}"
            yield ConventionChange(
                "normalisation", what, _normalisation_setting(own, kind), of_coder(normalisation=kind)
            )


def _has_mean(sae: LoadedSae, coder: SparseCoder, model: nn.Module, config: ModelConfig) -> bool:
    """Only a stream that layer norms read has a mean which can be taken out."""
    if not isinstance(coder, Dictionary):
        return False
    plain = replace(coder, normalisation="none")
    return as_unprocessed(plain, sae.site, "centred", model, config)[0].normalisation == "centred"


_NORMALISED: dict[Normalisation, str] = {
    "none": "each token is encoded as it is",
    "layer_norm": "each token is encoded after layer_norm",
    "constant_norm_rescale": "each token is encoded after constant_norm_rescale",
    "centred": "the mean is taken out of each token before it is encoded",
}
_NOT: dict[Normalisation, str] = {
    "none": "",
    "layer_norm": ", not after layer_norm",
    "constant_norm_rescale": ", not after constant_norm_rescale",
    "centred": ", not without its mean",
}


def _normalisation_setting(own: Normalisation, kind: Normalisation) -> str:
    if kind == "centred":
        centred = 'processing = "centred"'
        return centred if own == "none" else f'normalize_activations = "none"\n{centred}'
    if own != "centred":
        return f'normalize_activations = "{kind}"'
    plain = 'processing = "none"'
    return plain if kind == "none" else f'normalize_activations = "{kind}"\n{plain}'


def _processing(
    sae: LoadedSae, dictionary: Dictionary, model: nn.Module, config: ModelConfig
) -> Iterator[ConventionChange]:
    """Value biases moved out of attention. The other half, an MLP's input without the norm's gain, is a site."""
    if sae.site.point != "attn_z" or dictionary.normalisation != "none" or dictionary.is_transcoder:
        return
    try:
        bias = value_bias(model, config, sae.site.layer)
    except ValueError:  # an architecture where it is not known: nobody can have set it either
        return
    if bias is None:
        return
    shift = bias.to(dictionary.W_enc)
    if processing(sae) == "transformer_lens":
        what, setting = "the model it was trained on had its value biases in place", 'processing = "none"'
        yield ConventionChange("processing", what, setting, of_dictionary(lambda one: _moved_convention(one, -shift)))
    else:
        what, setting = "the model it was trained on had its value biases folded", 'processing = "transformer_lens"'
        yield ConventionChange("processing", what, setting, of_dictionary(lambda one: _moved_convention(one, shift)))


def _moved_convention(dictionary: Dictionary, shift: Tensor) -> Dictionary:
    """The SAE of ``x - shift`` as an SAE of x."""
    b_dec = dictionary.b_dec + shift
    if dictionary.centre:
        return replace(dictionary, b_dec=b_dec)
    return replace(dictionary, b_enc=dictionary.b_enc - shift @ dictionary.W_enc, b_dec=b_dec)


# The other places that an SAE may belong to, nearest first: the neighbouring layers, this layer's other points.


def relocations(sae: LoadedSae, config: ModelConfig) -> list[ConventionChange]:
    """The changes of site; whether an activation there is as wide as the SAE, only the model tells."""
    own = target(sae)
    if own is None:
        return [_reads(sae, site, None, config) for site in _others(sae, sae.site, config)]
    if not is_transcoder(sae):
        return [_reads(sae, site, site, config) for site in _others(sae, sae.site, config)]
    found = [_moved(sae, own, *both, config) for both in _both(sae.site, own, config)]
    found += [_reads(sae, site, own, config) for site in _others(sae, sae.site, config) if depth(site) <= depth(own)]
    return found + [_writes(sae, own, site) for site in _others(sae, own, config) if depth(site) >= depth(sae.site)]


def _others(sae: LoadedSae, here: Site, config: ModelConfig) -> Iterator[Site]:
    """The same point in layers near by, the other points of this layer, the same point in layers further off."""
    same, own = _same_point(here, config), processing(sae)
    found = [*same[:2], *sorted((one for one in sites(config) if one.layer == here.layer), key=depth), *same[2:]]
    return (site for site in found if site != here and _binds_alike(own, here, site))


def _same_point(here: Site, config: ModelConfig) -> list[Site]:
    """In the other layers, by distance."""
    found = [one for one in sites(config) if one.point == here.point and one != here]
    return sorted(found, key=lambda one: (abs(one.layer - here.layer), one.layer))


def _both(reads: Site, writes: Site, config: ModelConfig) -> Iterator[tuple[Site, Site]]:
    """Reading and writing moved by as many layers."""
    known = sites(config)
    for moved in _same_point(reads, config):
        layer = writes.layer + moved.layer - reads.layer
        if layer >= 0 and (other := Site(layer, writes.point)) in known:
            yield moved, other


def _binds_alike(processing: Processing | None, here: Site, there: Site) -> bool:
    """Whether an SAE of a processed model has the same weights at both: what is folded in depends on the site."""
    if processing in (None, "none"):
        return True
    if here.point == there.point:
        return here.point != "attn_z"
    points = {here.point, there.point}
    return points == {"mlp_normalized", "mlp_in"} or all(point.startswith("resid") for point in points)


def _read_setting(sae: LoadedSae, site: Site, config: ModelConfig) -> str:
    """The settings by which it reads there, by the conventions that it has here."""
    said, own = f'site = "{site}"', processing(sae)
    is_open = own is None and isinstance(sae.dictionary, Dictionary) and matters(sae.dictionary, site, config)
    # What is an MLP's input to a processed model is another site of this one.
    is_plain = own == "transformer_lens" and site.point == "mlp_in"
    return f'{said}\nprocessing = "none"' if is_open or is_plain else said


def _reads(sae: LoadedSae, site: Site, wanted: Site | None, config: ModelConfig) -> ConventionChange:
    what = f"it reads {site}, not {sae.site}"
    return ConventionChange(
        "site", what, _read_setting(sae, site, config), lambda setup: Setup(site, wanted, setup.reader)
    )


def _writes(sae: LoadedSae, own: Site, site: Site) -> ConventionChange:
    what = f"it writes {site}, not {own}"
    return ConventionChange("site", what, f'write_site = "{site}"', lambda setup: setup._replace(target=site))


def _moved(sae: LoadedSae, own: Site, site: Site, wanted: Site, config: ModelConfig) -> ConventionChange:
    what = f"it reads {site} and writes {wanted}, not {sae.site} and {own}"
    setting = f'{_read_setting(sae, site, config)}\nwrite_site = "{wanted}"'
    return ConventionChange("site", what, setting, lambda setup: Setup(site, wanted, setup.reader))


# What the check must find: what the settings say, else what an SAE's files state, with a margin.
#
# The margins are wide. Files state numbers from other text, from contexts of another length, sometimes from another
# model of the family, and tens of percent lie between such measurements. A wrong convention does not change them by
# tens of percent: the wrong site, bias, normalisation or scale typically multiplies or divides L0 by more than 3, or
# leaves as much unexplained as the mean would.


L0_FACTOR = 3.0
"""L0 may be this many times what is stated, or as many times less."""
FVU_FACTOR, FVU_MARGIN = 2.0, 0.1
"""FVU may be twice what is stated, or 0.1 more, whichever is more: small ones grow by the text's own strangeness."""
CE_FACTOR, CE_MARGIN = 3.0, 0.5
"""The rise in cross-entropy may be 3 times what is stated and 0.5 nats more: it depends most on the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckBounds:
    """None is no bound. Values that are not finite never pass."""

    min_l0: float | None = None
    """Least features that fire on a token, mean."""
    max_l0: float | None = None
    """Most features that fire on a token, mean."""
    max_fvu: float | None = None
    """Largest share of variance that may be left unexplained."""
    max_ce_increase: float | None = None
    """Largest rise of the model's cross-entropy, in nats per token."""
    stated: Mapping[str, str] = field(default_factory=dict, compare=False)
    """How the bounds of these names follow from what the files state; the settings give those not in it."""

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise ValueError(f"{name} must be a number, got {value}")
        if self.min_l0 is not None and self.max_l0 is not None and self.min_l0 > self.max_l0:
            raise ValueError(f"min_l0 {self.min_l0:g} is above max_l0 {self.max_l0:g}")

    @property
    def middle_l0(self) -> float | None:
        """What L0 is expected to be: as many times above the least as below the most, which is what files state."""
        if not self.min_l0 or not self.max_l0:
            return None
        return sqrt(self.min_l0) * sqrt(self.max_l0)

    def admits(self, l0: float, fvu: float | None) -> bool:
        """Whether these lie inside; an FVU that was not measured does."""
        numbers = [l0] if fvu is None else [l0, fvu]
        low, high = self.min_l0, self.max_l0
        within = (low is None or l0 >= low) and (high is None or l0 <= high)
        return all(map(isfinite, numbers)) and within and (fvu is None or self.max_fvu is None or fvu <= self.max_fvu)


_NAMES = ("min_l0", "max_l0", "max_fvu", "max_ce_increase")


class _Derived(NamedTuple):
    value: float
    why: str


def bounds_from(stated: Quality | None, stated_l0: float | None, given: CheckBounds) -> CheckBounds:
    """The bounds that are given; for each that is not, what follows from what is stated.

    Args:
        stated: what ``quality.json`` beside the weights says.
        stated_l0: what the SAE's own files say, where that does not.
        given: what the settings say.
    """
    derived = _derived(stated or Quality(), stated_l0)
    # A bound that is given takes the opposite one along where the two would contradict each other.
    if given.min_l0 is not None and "max_l0" in derived and derived["max_l0"].value < given.min_l0:
        del derived["max_l0"]
    if given.max_l0 is not None and "min_l0" in derived and derived["min_l0"].value > given.max_l0:
        del derived["min_l0"]
    own = {name: value for name in _NAMES if (value := getattr(given, name)) is not None}
    rest = {name: one for name, one in derived.items() if name not in own}
    reasons = {**given.stated, **{name: one.why for name, one in rest.items()}}
    return CheckBounds(**own, **{name: one.value for name, one in rest.items()}, stated=reasons)


def _derived(stated: Quality, stated_l0: float | None) -> dict[str, _Derived]:
    found: dict[str, _Derived] = {}
    l0 = stated.l0 if stated.l0 is not None else stated_l0
    if l0 is not None and l0 > 0:
        found["min_l0"] = _Derived(l0 / L0_FACTOR, f"the {_said(l0)} that its files state, by {L0_FACTOR:g}")
        found["max_l0"] = _Derived(l0 * L0_FACTOR, f"{L0_FACTOR:g} x the {_said(l0)} that its files state")
    if stated.fvu is not None and stated.fvu >= 0:
        value = max(stated.fvu * FVU_FACTOR, stated.fvu + FVU_MARGIN)
        by = f"{FVU_FACTOR:g} x" if value == stated.fvu * FVU_FACTOR else f"{FVU_MARGIN:g} more than"
        found["max_fvu"] = _Derived(value, f"{by} the {_said(stated.fvu)} that its files state")
    if stated.ce_base is not None and stated.ce_spliced is not None:
        rise = stated.ce_spliced - stated.ce_base
        why = f"{CE_FACTOR:g} x the {_said(rise)} that its files state, and {CE_MARGIN:g}"
        found["max_ce_increase"] = _Derived(max(rise, 0.0) * CE_FACTOR + CE_MARGIN, why)
    return found


class _Limit(NamedTuple):
    """One bound beside what it is about."""

    bound: str
    label: str
    value: float | None
    side: str

    def breaks(self, limit: float) -> bool:
        assert self.value is not None, "measured"
        return self.value > limit if self.side == "above" else self.value < limit


def violations(measured: SaeMeasurements, bounds: CheckBounds) -> list[str]:
    """What lies outside, in words with both numbers."""
    found = [f"{label} is {value}, not a number that means anything" for label, value in _senseless(measured)]
    for one in _limits(measured):
        limit, why = getattr(bounds, one.bound), bounds.stated.get(one.bound)
        if limit is None:
            continue
        if one.value is None:
            if why is None:  # a bound that somebody set must not be passed over
                found.append(f"{one.bound} is set, but {one.label} cannot be measured of this SAE alone")
        elif isfinite(one.value) and one.breaks(limit):
            value, bound = _pair(one.value, limit)
            found.append(f"{one.label} {value} is {one.side} {bound} ({why or f'{one.bound} in the settings'})")
    return found


def _limits(measured: SaeMeasurements) -> Iterator[_Limit]:
    rise = "the rise in cross-entropy with its reconstructions in place, in nats per token,"
    yield _Limit("min_l0", "L0", measured.l0, "below")
    yield _Limit("max_l0", "L0", measured.l0, "above")
    yield _Limit("max_fvu", "FVU", measured.fvu, "above")
    yield _Limit("max_ce_increase", rise, measured.ce_increase, "above")


def _senseless(measured: SaeMeasurements) -> Iterator[tuple[str, float]]:
    labels = {
        "l0": "L0",
        "fvu": "FVU",
        "ce_base": "the model's cross-entropy",
        "ce_spliced": "the cross-entropy with its reconstructions in place",
    }
    for name, label in labels.items():
        value = getattr(measured, name)
        if value is not None and not isfinite(value):
            yield label, value


def _said(value: float) -> str:
    return f"{value:.4g}"


def _pair(value: float, limit: float) -> tuple[str, str]:
    """Both as people read them, with as many digits as it takes to tell them apart."""
    for digits in (4, 6, 9):
        if (one := f"{value:.{digits}g}") != (two := f"{limit:.{digits}g}"):
            return one, two
    return repr(value), repr(limit)


SHOWN = 5
"""Suspects that are named at most."""

# The settings refuse a moved value bias under a normalisation.
_EXCLUSIVE = ({"bias"}, {"normalisation"}, {"decoder norms"}, {"scale"}, {"normalisation", "processing"})
_BETTER = 2.0
"""An alternative outside the bounds counts if it leaves this many times less unexplained,"""
_USABLE = 0.9
"""and less than this: just below what the mean leaves."""
_CLEARLY = 1.2
"""Within the bounds, an alternative is a doubt if it leaves this many times less unexplained."""
NEIGHBOURS = 2
"""Sites that are tried of an SAE within its bounds: the layers before and after."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An alternative that fits better than what the SAE was given."""

    what: str
    """In words: "it reads resid_post.3, not resid_post.4"."""
    setting: str | None
    """What to write into the SAE's settings, a line each; None where there is no setting for it."""
    l0: float
    fvu: float | None


@dataclass(frozen=True, slots=True)
class _Tried:
    change: ConventionChange
    l0: float
    fvu: float | None


@torch.inference_mode()
def hypotheses(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: CheckBounds,
) -> list[Hypothesis]:
    """Alternatives inside the bounds, then those that clearly leave less unexplained; best first.

    One change at a time, and pairs of two where no single one lies inside the bounds. The model runs once.
    """
    moves = relocations(sae, config)
    search, rest = _prepared(model, config, sae, tokens, special_ids, bounds, moves)
    return _named(search.through(moves, rest), bounds)


@torch.inference_mode()
def unstated_warnings(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: CheckBounds,
) -> list[Hypothesis]:
    """What bounds alone let pass: near alternatives that leave clearly less unexplained; best first.

    The neighbouring layers, the bias convention and the normalisation: few, since every SAE that is served is tried.
    """
    moves = relocations(sae, config)[:NEIGHBOURS]
    search, rest = _prepared(model, config, sae, tokens, special_ids, bounds, moves)
    near = [one for one in rest if one.kind in ("bias", "normalisation")]
    return _named(search.clearly_better([*moves, *near]), bounds)


def _prepared(
    model: nn.Module,
    config: ModelConfig,
    sae: LoadedSae,
    tokens: Sequence[Tensor],
    special_ids: frozenset[int],
    bounds: CheckBounds,
    moves: list[ConventionChange],
) -> tuple[_Search, list[ConventionChange]]:
    """The search over activations at the sites of these moves, and every other change."""
    own = Setup(sae.site, target(sae), reader(sae.dictionary))
    wanted = {site for one in (own, *(move.apply(own) for move in moves)) for site in one[:2] if site is not None}
    captured = capture(model, config, wanted, {sae.dictionary.d_in, sae.write_width}, tokens, special_ids)
    target_rows = None if own.target is None else captured.rows(own.target)
    rest = conventions(sae, model, config, captured.rows(own.reads), target_rows)
    return _Search(own, captured, bounds), rest


def _named(found: list[_Tried], bounds: CheckBounds) -> list[Hypothesis]:
    found.sort(key=lambda one: (not bounds.admits(one.l0, one.fvu), merit(one.l0, one.fvu, bounds)))
    return [Hypothesis(one.change.what, one.change.setting, one.l0, one.fvu) for one in found[:SHOWN]]


def merit(l0: float, fvu: float | None, bounds: CheckBounds) -> float:
    """Less is better: the FVU, times how many times L0 is off where it is known what to expect.

    FVU alone would favour whatever makes more features fire.
    """
    left, expected = 1.0 if fvu is None else fvu, bounds.middle_l0
    if expected is None:
        return left
    return left * max(l0 / expected, expected / l0) if l0 else inf


def _pairs(moves: list[ConventionChange], rest: list[ConventionChange]) -> Iterator[ConventionChange]:
    """Two conventions of different kinds, or another site with the other bias convention."""
    for at, one in enumerate(rest):
        yield from (one.then(other) for other in rest[at + 1 :] if {one.kind, other.kind} not in _EXCLUSIVE)
    for bias in rest:
        if bias.kind == "bias":
            yield from (move.then(bias) for move in moves)


class _Search:
    """Tries changes of one SAE and keeps those that count."""

    def __init__(self, own: Setup, captured: Captured, bounds: CheckBounds) -> None:
        self._own = own
        self._captured = captured
        self._bounds = bounds
        l0, self._best = self._measure(own)
        self._fails = not bounds.admits(l0, self._best)

    def through(self, moves: list[ConventionChange], rest: list[ConventionChange]) -> list[_Tried]:
        """The changes that count; of pairs too where no single one lies inside the bounds."""
        found = self._among([*moves, *rest])
        if any(self._bounds.admits(one.l0, one.fvu) for one in found):
            return found
        # A second change must be worth it beside the best of the first.
        self._best = min((one.fvu for one in found if one.fvu is not None), default=self._best)
        return found + self._among(_pairs(moves, rest))

    def clearly_better(self, changes: list[ConventionChange]) -> list[_Tried]:
        """Those that leave less unexplained by more than the text's chance."""
        now = self._best
        if now is None or not isfinite(now):
            return []
        return [one for one in self._tried(changes) if one.fvu is not None and one.fvu * _CLEARLY <= min(now, _USABLE)]

    def _among(self, changes: Iterable[ConventionChange]) -> list[_Tried]:
        """Those of the changes that count."""
        return [one for one in self._tried(changes) if self._counts(one)]

    def _tried(self, changes: Iterable[ConventionChange]) -> list[_Tried]:
        tried = []
        for change in changes:
            setup = change.apply(self._own)
            if self._is_as_wide(setup):
                tried.append(_Tried(change, *self._measure(setup)))
        return tried

    def _is_as_wide(self, setup: Setup) -> bool:
        """As where it is now: that the SAE fits there was seen before."""
        same = self._captured.width(setup.reads) == self._captured.width(self._own.reads)
        if setup.target is None or self._own.target is None:
            return same
        return same and self._captured.width(setup.target) == self._captured.width(self._own.target)

    def _measure(self, setup: Setup) -> tuple[float, float | None]:
        metrics, at = SaeMetrics(setup.reader.d_sae), self._captured.at
        written = at[setup.target] if setup.target is not None else [None] * len(self._captured.ordinary)
        for x, goal, rows in zip(at[setup.reads], written, self._captured.ordinary, strict=True):
            rows = rows.to(x.device)
            reconstruction = reconstruct_text(setup.reader, x, rows, metrics, decodes=goal is not None)
            if reconstruction is not None and goal is not None:
                metrics.compare(reconstruction, goal[rows].float())
        return metrics.l0, None if setup.target is None else metrics.fvu

    def _counts(self, one: _Tried) -> bool:
        if self._fails and self._bounds.admits(one.l0, one.fvu) and self._is_usable(one):
            return True
        if one.fvu is None or self._best is None or not one.fvu < _USABLE:
            return False
        return not isfinite(self._best) or one.fvu * _BETTER <= self._best

    def _is_usable(self, one: _Tried) -> bool:
        return one.fvu is None or self._bounds.max_fvu is not None or one.fvu < _USABLE

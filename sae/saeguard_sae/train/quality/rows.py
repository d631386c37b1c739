"""The report's table in words: each figure, what the SAE and the baseline have, and what is good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from saeguard_sae.train.quality.evaluation import Evaluation, Figures
from saeguard_sae.train.quality.settings import DEAD_TOKENS

_GOOD_FVU = 0.15
_GOOD_RECOVERED = 0.95
_GOOD_DEAD = 0.10


class Line(NamedTuple):
    """A line of the table. ``warns``: the SAE's value lies outside what is usual."""

    group: str
    name: str
    sae: str
    frozen: str
    good: str
    warns: bool = False


def lines(found: Evaluation) -> list[Line]:
    """The whole table."""
    sae, frozen = found.sae, found.frozen
    return [*_sparsity(sae, frozen), *_fit(sae, frozen), *_cost(found), *_features(found)]


def summary(found: Evaluation) -> str:
    """What was found, in two sentences."""
    sae, base = found.sae, found.losses.ce_base
    return (
        f"On average {sae.l0:.3g} of {found.subjects.d_sae:,} features fire on a token, and together they leave "
        f"{sae.fvu:.1%} of the variance unexplained. With the reconstruction in place of the activations the model's "
        f"loss goes from {base:.3f} to {sae.ce_spliced:.3f} nats per token; with the frozen baseline's it goes to "
        f"{found.frozen.ce_spliced:.3f}."
    )


def _sparsity(sae: Figures, frozen: Figures) -> Iterator[Line]:
    yield Line(
        "Sparsity",
        "L0: features that fire on a token, mean",
        f"{sae.l0:.2f}",
        f"{frozen.l0:.2f}",
        "what it was trained for; the baseline's was set equal",
    )


def _fit(sae: Figures, frozen: Figures) -> Iterator[Line]:
    group = "Reconstruction"
    yield Line(
        group,
        "FVU: share of variance unexplained",
        f"{sae.fvu:.4f}",
        f"{frozen.fvu:.4f}",
        f"0.05 to {_GOOD_FVU:g} at an ordinary layer of a language model",
        sae.fvu > _GOOD_FVU,
    )
    yield Line(group, "Cosine with the activation", f"{sae.cosine:.4f}", f"{frozen.cosine:.4f}", "near 1")
    yield Line(
        group,
        "Length of the reconstruction by the activation's",
        f"{sae.norm_ratio:.4f}",
        f"{frozen.norm_ratio:.4f}",
        "near 1; lower is shrinkage",
    )


def _cost(found: Evaluation) -> Iterator[Line]:
    sae, frozen, losses = found.sae, found.frozen, found.losses
    group = "Cost to the model, nats per token"
    yield Line(
        group,
        "Cross-entropy with the reconstruction in place",
        f"{sae.ce_spliced:.4f}",
        f"{frozen.ce_spliced:.4f}",
        f"the model as it is has {losses.ce_base:.4f}",
    )
    yield Line(
        group,
        "Rise of the cross-entropy",
        f"{sae.ce_increase:+.4f}",
        f"{frozen.ce_increase:+.4f}",
        "near 0; judge by this, shares recovered saturate",
    )
    yield Line(group, "KL(spliced || base)", f"{sae.kl:.4f}", f"{frozen.kl:.4f}", "near 0")
    ablations = (
        ("mean", losses.ce_mean_ablated, losses.kl_mean_ablated),
        ("zero", losses.ce_zero_ablated, losses.kl_zero_ablated),
    )
    for kind, ce, kl in ablations:
        for what, ablated in (("ce", ce), ("kl", kl)):
            yield _recovered(group, kind, what, ablated, sae, frozen)


def _recovered(group: str, kind: str, what: str, ablated: float, sae: Figures, frozen: Figures) -> Line:
    field = f"{what}_recovered_{kind}"
    own: float | None = getattr(sae, field)
    other: float | None = getattr(frozen, field)
    name = "Cross-entropy" if what == "ce" else "KL"
    usual = f"{_GOOD_RECOVERED:g} to 0.98 is usual; " if field == "ce_recovered_zero" else ""
    return Line(
        group,
        f"{name} recovered against {kind} ablation",
        _share(own),
        _share(other),
        f"{usual}near 1; the ablated model has {ablated:.4f}",
        bool(usual) and own is not None and own < _GOOD_RECOVERED,
    )


def _features(found: Evaluation) -> Iterator[Line]:
    sae, frozen = found.sae, found.frozen
    group = "Features"
    few = found.text.tokens < DEAD_TOKENS
    bound = f"; an upper bound: {found.text.tokens:,} tokens, {DEAD_TOKENS:,} are needed" if few else ""
    yield Line(
        group,
        "Dead: never fired",
        f"{sae.dead_share:.2%}",
        f"{frozen.dead_share:.2%}",
        f"below 5% to {_GOOD_DEAD:.0%}{bound}",
        sae.dead_share > _GOOD_DEAD,
    )
    yield Line(
        group,
        "Dense: fire on more than a tenth of the tokens",
        f"{sae.dense_share:.2%}",
        f"{frozen.dense_share:.2%}",
        "few; they seldom stand for one thing",
    )
    part = "" if sae.cosine_features == found.subjects.d_sae else f"; of {sae.cosine_features:,} taken by chance"
    yield Line(
        group,
        "Largest cosine with another feature, mean",
        f"{sae.max_cosine:.4f}",
        f"{frozen.max_cosine:.4f}",
        f"the baseline's is what chance gives{part}",
    )
    yield Line(
        group,
        "Near to duplicates: such a cosine above 0.9",
        f"{sae.duplicate_share:.2%}",
        f"{frozen.duplicate_share:.2%}",
        f"near 0{part}",
    )


def _share(value: float | None) -> str:
    return "does not apply" if value is None else f"{value:.4f}"

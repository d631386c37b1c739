"""The plots of an evaluation as PNG, each in a light and a dark version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from saeguard_sae.train.quality.evaluation import Evaluation
from saeguard_sae.train.quality.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (5.6, 3.0)
_DPI = 144
_SHOWN = 0.99
"""Share of the tokens that the plot of L0 reaches: a few may lie very far out."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours, as the report's page has them. The two series also differ in fill and line, for those who see no hue."""

    surface: str
    ink: str
    quiet: str
    grid: str
    sae: str
    frozen: str


LIGHT = Theme("#ffffff", "#1c2430", "#566173", "#e3e7ed", "#2563c9", "#b4530a")
DARK = Theme("#191f28", "#e6eaf0", "#a3adbb", "#323b48", "#7fb0ff", "#f2a45c")


@dataclass(frozen=True, slots=True)
class Plot:
    """``alt`` says in words what the picture shows."""

    name: str
    title: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


_Draw = Callable[["Axes", Theme], None]


def plots(found: Evaluation) -> tuple[Plot, ...]:
    """All that there is something to show of."""
    return tuple(_all(found))


def _all(found: Evaluation) -> Iterator[Plot]:
    sae, frozen, losses = found.sae, found.frozen, found.losses
    yield _plot(
        "loss",
        "Cross-entropy with the site replaced",
        f"Bars: as it is {losses.ce_base:.3f}, SAE {sae.ce_spliced:.3f}, frozen baseline {frozen.ce_spliced:.3f}, "
        f"mean {losses.ce_mean_ablated:.3f}, zeros {losses.ce_zero_ablated:.3f} nats per token.",
        "Nats per token. The nearer the SAE is to the model as it is, the less is lost.",
        lambda axes, theme: _losses(axes, theme, found),
    )
    yield _plot(
        "l0",
        "Features that fire on a token",
        f"Histogram of tokens by the number of features that fire; the mean is {sae.l0:.1f} for the SAE and "
        f"{frozen.l0:.1f} for the frozen baseline.",
        "Share of tokens by the number of features that fire. The baseline's mean was set equal. The rarest "
        "hundredth on the right is cut off.",
        lambda axes, theme: _pair(
            axes, theme, sae.l0_histogram, frozen.l0_histogram, "features", "share of tokens, by unit", True
        ),
    )
    yield _plot(
        "density",
        "How often features fire",
        f"Histogram of features by density; {sae.dead_share:.1%} of the SAE's features never fired and are not in it, "
        f"{sae.dense_share:.1%} fire on more than a tenth of the tokens.",
        "Share of the features that fired, by log10 of the share of tokens on which they do. Right of -1: dense.",
        lambda axes, theme: _pair(
            axes, theme, sae.density_histogram, frozen.density_histogram, "log10 density", "share of features"
        ),
    )
    yield _plot(
        "cosine",
        "Nearest other feature",
        f"Histogram of features by their largest cosine with another; the mean is {sae.max_cosine:.2f} for the SAE and "
        f"{frozen.max_cosine:.2f} for the frozen baseline.",
        "Share of features by the largest cosine with another decoder row. Above 0.9 they are near to duplicates.",
        lambda axes, theme: _pair(
            axes, theme, sae.cosine_histogram, frozen.cosine_histogram, "largest cosine", "share of features"
        ),
    )
    if found.probes is not None:
        probes = found.probes
        scores = ", ".join(
            f"with {one.k}: {one.auroc:.2f} and {two.auroc:.2f}"
            for one, two in zip(probes.sae, probes.frozen, strict=True)
        )
        yield _plot(
            "probes",
            "Telling the labels apart with few features",
            f"Held-out AUROC, SAE and frozen baseline, {scores}; with all dimensions {probes.dense.auroc:.2f}.",
            "Held-out AUROC by the number of features; the dotted line is a probe on the activations themselves.",
            lambda axes, theme: _probes(axes, theme, found),
        )


def _plot(name: str, title: str, alt: str, caption: str, draw: _Draw) -> Plot:
    return Plot(name, title, alt, caption, _png(draw, LIGHT), _png(draw, DARK))


def _png(draw: _Draw, theme: Theme) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor=theme.surface, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(theme.surface)
    draw(axes, theme)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.quiet, labelsize=9, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.quiet)
        label.set_fontsize(9)
    axes.set_axisbelow(True)
    target = BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="best")


def _pair(
    axes: Axes, theme: Theme, sae: Histogram, frozen: Histogram, across: str, up: str, per_unit: bool = False
) -> None:
    axes.stairs(_shares(sae, per_unit=per_unit), sae.edges, fill=True, color=theme.sae, alpha=0.85, label="SAE")
    axes.stairs(
        _shares(frozen, per_unit=per_unit),
        frozen.edges,
        color=theme.frozen,
        linewidth=1.8,
        linestyle=(0, (4, 1.5)),
        label="frozen",
    )
    axes.set_xlim(*_shown(_SHOWN if per_unit else 1, sae, frozen))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    _legend(axes, theme)


def _shares(histogram: Histogram, *, per_unit: bool) -> list[float]:
    """By width where the bins of the two may differ in it, so that areas compare."""
    total = sum(histogram.counts) or 1
    widths = [high - low for low, high in pairwise(histogram.edges)]
    return [count / total / (width if per_unit else 1) for count, width in zip(histogram.counts, widths, strict=True)]


def _shown(share: float, *histograms: Histogram) -> tuple[float, float]:
    """From the first bin that holds something to where this share of each histogram is reached."""
    low, high = [], []
    for one in histograms:
        wanted = share * sum(one.counts)
        low.append(one.edges[next((at for at, count in enumerate(one.counts) if count), 0)])
        high.append(one.edges[next(at for at, below in enumerate(accumulate(one.counts)) if below >= wanted) + 1])
    return min(low), max(high)


def _losses(axes: Axes, theme: Theme, found: Evaluation) -> None:
    bars = {
        "model as it is": (found.losses.ce_base, theme.quiet),
        "SAE": (found.sae.ce_spliced, theme.sae),
        "frozen baseline": (found.frozen.ce_spliced, theme.frozen),
        "mean": (found.losses.ce_mean_ablated, theme.quiet),
        "zeros": (found.losses.ce_zero_ablated, theme.quiet),
    }
    names = list(bars)[::-1]
    values = [bars[name][0] for name in names]
    drawn = axes.barh(names, values, color=[bars[name][1] for name in names], height=0.62)
    axes.bar_label(drawn, labels=[f"{value:.3f}" for value in values], padding=4, fontsize=9, color=theme.ink)
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel("nats per token")
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)


def _probes(axes: Axes, theme: Theme, found: Evaluation) -> None:
    probes = found.probes
    assert probes is not None, "there is something to show"
    across = [str(one.k) for one in probes.sae]
    axes.plot(across, [one.auroc for one in probes.sae], color=theme.sae, marker="o", linewidth=2, label="SAE")
    axes.plot(
        across,
        [one.auroc for one in probes.frozen],
        color=theme.frozen,
        marker="s",
        linewidth=1.8,
        linestyle=(0, (4, 1.5)),
        label="frozen",
    )
    axes.axhline(probes.dense.auroc, color=theme.quiet, linewidth=1.4, linestyle=":", label="all dimensions")
    axes.set_ylim(min(0.45, *(one.auroc for one in (*probes.sae, *probes.frozen))), 1.02)
    axes.set_xlabel("features that the probe may use")
    axes.set_ylabel("AUROC, held out")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    _legend(axes, theme)

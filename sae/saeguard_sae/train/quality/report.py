"""The report: one HTML file with everything in it, for a person to read; it loads nothing from anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from saeguard_sae.loading import LoadedSae, LoadError, Overrides, bind, open_sae
from saeguard_sae.models import Site
from saeguard_sae.train.data import context_length
from saeguard_sae.train.lm import LanguageModel
from saeguard_sae.train.quality import evaluate
from saeguard_sae.train.quality.evaluate import (
    Evaluation,
    Material,
    Progress,
    QualityMetrics,
    evaluate_saes,
    labelled_rows,
    text_rows,
)
from saeguard_sae.train.quality.metrics import (
    DEAD_TOKENS,
    Agreement,
    Context,
    EvaluateSettings,
    FeatureExamples,
    Histogram,
)
from saeguard_sae.train.quality.probes import Probes, read_labelled
from saeguard_sae.train.settings import DataSettings, StreamSettings, TrainError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The report's table in words: each figure, what the SAE and the baseline have, and what is good.


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


def _sparsity(sae: QualityMetrics, frozen: QualityMetrics) -> Iterator[Line]:
    yield Line(
        "Sparsity",
        "L0: features that fire on a token, mean",
        f"{sae.l0:.2f}",
        f"{frozen.l0:.2f}",
        "what it was trained for; the baseline's was set equal",
    )


def _fit(sae: QualityMetrics, frozen: QualityMetrics) -> Iterator[Line]:
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


def _recovered(group: str, kind: str, what: str, ablated: float, sae: QualityMetrics, frozen: QualityMetrics) -> Line:
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


# The plots of an evaluation as PNG, each in a light and a dark version.


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


FILE = "report.html"


def write_report(found: Evaluation, folder: Path) -> tuple[Path, ...]:
    """``evaluation.json``, ``report.html`` and a PNG of each plot in the folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(found)
    page = html(found, drawn)
    written = [evaluate.write_evaluation(found, folder)]
    written += [evaluate.write_whole(folder / f"{one.name}.png", one.light) for one in drawn]
    written.append(evaluate.write_whole(folder / FILE, page.encode("utf-8")))
    return tuple(written)


def html(found: Evaluation, drawn: Sequence[Plot]) -> str:
    """The page."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = escape(f"Evaluation of {found.subjects.sae}")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            *_body(found, drawn),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _body(found: Evaluation, drawn: Sequence[Plot]) -> Iterator[str]:
    what = found.subjects
    place = what.reads if what.reads == what.writes else f"{what.reads} to {what.writes}"
    yield f'<h1>{escape(what.sae)}</h1>\n<p class="place">{escape(what.model)}, {escape(place)}</p>'
    yield f'<p class="lead">{escape(summary(found))}</p>'
    yield _facts(found)
    yield '<h2>Figures</h2>\n<div class="card scroll" tabindex="0" role="region" aria-label="Figures">'
    yield f"{_table(lines(found))}</div>"
    yield f'<p class="quiet">The frozen baseline: {escape(found.frozen_what)}</p>'
    yield '<h2>Plots</h2>\n<div class="plots">'
    yield from (_figure(one) for one in drawn)
    yield "</div>"
    if found.probes is not None:
        yield _probe_section(found.probes)
    if found.agreement is not None:
        yield _agreement(found.agreement, found.agreement_by_chance, found.agreement_with or "")
    if found.examples:
        yield _examples(found.examples)
    yield _method(found)


def _facts(found: Evaluation) -> str:
    what, text = found.subjects, found.text
    facts = {
        "Model": what.model,
        "SAE": f"{what.architecture}, {what.d_sae:,} features of width {what.d_in:,}",
        "Reads and replaces": what.reads if what.reads == what.writes else f"{what.reads}, {what.writes}",
        "Text": text.source,
        "Tokens measured": f"{text.tokens:,}",
        "Of these with losses": f"{text.loss_tokens:,}",
        "Tokens the baseline was fit on": f"{text.fit_tokens:,}",
        "Left out as outliers": f"{text.outliers:,}",
    }
    digest = f'<div class="wide"><dt>SHA-256 of the SAE</dt><dd>{escape(what.digest)}</dd></div>'
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts card">{entries}{digest}</dl>'


def _table(rows: Iterable[Line]) -> str:
    body, group = [], ""
    for line in rows:
        if line.group != group:
            group = line.group
            body.append(f'<tr class="group"><th colspan="4" scope="colgroup">{escape(group)}</th></tr>')
        warning = '<span class="warn">▲ outside the usual</span>' if line.warns else ""
        body.append(
            f'<tr><th scope="row">{escape(line.name)}</th><td class="number own">{escape(line.sae)}{warning}</td>'
            f'<td class="number">{escape(line.frozen)}</td><td class="good">{escape(line.good)}</td></tr>'
        )
    head = _head("Figure", "SAE", "Frozen baseline", "What is good")
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _head(*names: str) -> str:
    return "<thead><tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr></thead>"


def _figure(plot: Plot) -> str:
    light, dark = (f"data:image/png;base64,{b64encode(data).decode('ascii')}" for data in (plot.light, plot.dark))
    return (
        f'<figure class="card"><h3>{escape(plot.title)}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(plot.alt)}"></picture>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _plain_table(caption: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(one)}</td>' for one in row[1:])
        + "</tr>"
        for row in rows
    )
    head = _head(*names)
    return (
        f'<div class="card scroll"><table><caption>{escape(caption)}</caption>{head}<tbody>{body}</tbody></table></div>'
    )


def _probe_section(probes: Probes) -> str:
    caption = (
        f"Labels {', '.join(probes.labels)}; features chosen and weighted on {probes.train_texts:,} texts, scored on "
        f"{probes.test_texts:,} others. Always giving the commoner answer is right on {probes.majority:.1%}."
    )
    rows = [
        (str(one.k), f"{one.auroc:.3f}", f"{two.auroc:.3f}", f"{one.accuracy:.1%}", f"{two.accuracy:.1%}")
        for one, two in zip(probes.sae, probes.frozen, strict=True)
    ]
    dense = probes.dense
    rows.append((f"all {dense.k} dimensions, no SAE", f"{dense.auroc:.3f}", "", f"{dense.accuracy:.1%}", ""))
    names = ("Features", "AUROC, SAE", "AUROC, frozen", "Right, SAE", "Right, frozen")
    return "<h2>Probes with few features</h2>\n" + _plain_table(caption, names, rows)


def _agreement(found: Agreement, chance: Agreement | None, other: str) -> str:
    sample = ", a sample matched among its nearest" if found.is_sample else ""
    caption = f"Decoder rows against those of {other}, {found.matched:,} pairs{sample}. Chance: random directions."
    fields = {
        "MCC: mean cosine of features matched one to one": "mcc",
        "Mean of the largest cosine": "mean_max_cosine",
        "Share of the pairs above 0.9": "share_above_09",
    }
    rows = [
        (name, f"{getattr(found, field):.4f}", "" if chance is None else f"{getattr(chance, field):.4f}")
        for name, field in fields.items()
    ]
    return "<h2>Agreement with another SAE</h2>\n" + _plain_table(caption, ("Figure", "SAE", "Chance"), rows)


def _examples(found: Sequence[FeatureExamples]) -> str:
    blocks = "".join(
        f'<section class="card"><h3>Feature {one.feature} <span class="quiet">fires on {one.density:.3%} of the tokens'
        f"</span></h3><ol>{''.join(map(_context, one.contexts)) or '<li>did not fire</li>'}</ol></section>"
        for one in found
    )
    return (
        "<h2>Where some features fire most strongly</h2>\n<p>Taken evenly over the densities, not for their looks. The "
        f'marked token is where it fires; the number is by how much.</p>\n<div class="features">{blocks}</div>'
    )


def _context(one: Context) -> str:
    before, token, after = (escape(_visible(text)) for text in (one.before, one.token, one.after))
    text = f"{before}<mark>{token}</mark>{after}"
    return f'<li><span class="value">{one.value:.2f}</span><span class="text">{text}</span></li>'


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")


def _method(found: Evaluation) -> str:
    return f"""<h2>How it was measured</h2>
<p>In the model the site's tensor was replaced by the reconstruction on ordinary tokens; BOS and other special tokens
kept theirs, as did tokens left out as outliers. Losses are means over all positions whose next token is text
({found.text.loss_positions:,}). KL is of the changed model from the model as it is, KL(spliced || base). Ablations put
the mean of the tokens that the baseline was fit on, or zeros, in the same places. FVU divides sums over all tokens;
cosine and length are means over tokens.</p>
<p class="quiet">Figures that the frozen baseline reaches too say nothing about the features. Everything on this page
is in {escape(evaluate.FILE)} beside it.</p>"""


# Evaluates an SAE on disk: loads it, ties it to the model, measures, writes the report.


def evaluate_folder(
    path: Path,
    model: LanguageModel,
    data: DataSettings,
    stream: StreamSettings,
    out: Path,
    *,
    settings: EvaluateSettings | None = None,
    site: Site | None = None,
    other: Path | None = None,
    probe: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of the SAE in ``path``; ``evaluation.json``, ``report.html`` and PNGs in ``out``.

    Args:
        data: text that should not have trained the SAE.
        stream: how it becomes rows; its outlier norm and masks hold here too.
        site: where the SAE reads, where its files do not say.
        other: an SAE to compare directions with.
        probe: JSONL of labelled texts.

    Raises:
        TrainError: a file or setting that cannot be used; the message names it.
    """
    settings = settings or EvaluateSettings(outlier_norm=stream.outlier_norm)
    sae = _opened(path, model, site, "sae")
    far = None if other is None else _opened(other, model, site, "other")
    _make(out)
    labelled = [] if probe is None else read_labelled(probe)
    material = Material(
        model=model.network,
        name=model.name,
        rows=text_rows(model, data, stream),
        source=data.path,
        decode=lambda ids: str(model.tokenizer.decode(ids)),
        labelled=labelled_rows(model, labelled, context_length(model, stream)),
    )
    found = evaluate_saes(sae, material, settings, other=far, progress=progress)
    try:
        write_report(found, out)
    except OSError as err:
        raise TrainError(f"out: {out} cannot be written: {err.strerror}") from err
    return found


def _make(out: Path) -> None:
    """Now, not after hours of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise TrainError(f"out: {out} cannot be made: {err.strerror}") from err


def _opened(path: Path, model: LanguageModel, site: Site | None, field: str) -> LoadedSae:
    try:
        # Its last two folders tell the SAEs of a run apart.
        name = "/".join(path.resolve().parts[-2:])
        return bind(open_sae(name, path), model.network, model.config, Overrides(site=site))
    except LoadError as err:
        raise TrainError(f"{field}: {err}") from err

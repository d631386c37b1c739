"""The report: one HTML file with everything in it, for a person to read; it loads nothing from anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from saeguard_sae.train.quality import evaluation
from saeguard_sae.train.quality.decoder import Agreement
from saeguard_sae.train.quality.evaluation import Evaluation
from saeguard_sae.train.quality.examples import Context, FeatureExamples
from saeguard_sae.train.quality.plots import Plot, plots
from saeguard_sae.train.quality.probes import Probes
from saeguard_sae.train.quality.rows import Line, lines, summary

FILE = "report.html"


def write(found: Evaluation, folder: Path) -> tuple[Path, ...]:
    """``evaluation.json``, ``report.html`` and a PNG of each plot in the folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(found)
    page = html(found, drawn)
    written = [evaluation.write(found, folder)]
    written += [evaluation.write_whole(folder / f"{one.name}.png", one.light) for one in drawn]
    written.append(evaluation.write_whole(folder / FILE, page.encode("utf-8")))
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
        yield _probes(found.probes)
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


def _probes(probes: Probes) -> str:
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
is in {escape(evaluation.FILE)} beside it.</p>"""

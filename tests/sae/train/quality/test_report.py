"""The page holds everything, loads nothing, says what it shows in words, and says it of these numbers."""

from __future__ import annotations

import re
import struct
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from saeguard_sae.train.quality.evaluate import Evaluation
from saeguard_sae.train.quality.feature_stats import Agreement, Context, FeatureExamples
from saeguard_sae.train.quality.report import html, plots, summary, table_lines, write_report

VOID = {"meta", "img", "source", "br"}
Shown = Callable[[Evaluation], tuple["Page", str]]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Tags with what they hold; refuses those that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def shown(evaluation: Evaluation) -> Shown:
    """The page of an evaluation and its text, with the pictures of the first one: drawing takes a second."""
    drawn = tuple(plots(evaluation))

    def page(changed: Evaluation) -> tuple[Page, str]:
        text = html(changed, drawn)
        return Page(text), text

    return page


def test_it_loads_nothing(evaluation: Evaluation, shown: Shown) -> None:
    page, text = shown(evaluation)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    sources = [value for _, given in page.tags for name, value in given.items() if name in ("src", "srcset", "href")]
    assert len(sources) == 2 * 5
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in sources)
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert "//" not in outside
    assert "url(" not in outside
    assert "@import" not in outside


def test_pictures_have_words_and_a_dark_version(evaluation: Evaluation, shown: Shown) -> None:
    page, _ = shown(evaluation)
    pictures = [given for tag, given in page.tags if tag == "img"]
    dark = [given for tag, given in page.tags if tag == "source"]
    assert len(pictures) == len(dark) == 5
    for picture, other in zip(pictures, dark, strict=True):
        assert len(picture["alt"] or "") > 40
        assert other["media"] == "(prefers-color-scheme: dark)"
        assert picture["src"] != other["srcset"]
        data = b64decode((picture["src"] or "").partition(",")[2])
        assert data.startswith(PNG)
        width, height = struct.unpack(">II", data[16:24])
        assert (width, height) == (806, 432)


def test_every_figure_has_the_baseline_and_what_is_good(evaluation: Evaluation, shown: Shown) -> None:
    page, text = shown(evaluation)
    table = table_lines(evaluation)
    assert len(table) == 15
    for line in table:
        assert line.good
        assert line.frozen
        for part in (line.name, line.sae, line.frozen, line.good):
            assert part in page.text
    assert summary(evaluation) in page.text
    assert evaluation.frozen_what in page.text
    assert "KL(spliced || base)" in page.text
    assert '<html lang="en">' in text


def test_values_outside_the_usual_are_marked_in_words(evaluation: Evaluation, shown: Shown) -> None:
    good = msgspec.structs.replace(evaluation.sae, fvu=0.1, dead_share=0.02, ce_recovered_zero=0.97)
    bad = msgspec.structs.replace(evaluation.sae, fvu=0.3, dead_share=0.3, ce_recovered_zero=0.5)
    for figures, marks in ((good, 0), (bad, 3)):
        _, text = shown(msgspec.structs.replace(evaluation, sae=figures))
        assert text.count("outside the usual") == marks


def test_a_dead_share_of_few_tokens_says_so(evaluation: Evaluation, shown: Shown) -> None:
    many = msgspec.structs.replace(evaluation, text=msgspec.structs.replace(evaluation.text, tokens=1_000_000))
    assert "1,000,000 are needed" in shown(evaluation)[0].text
    assert "are needed" not in shown(many)[0].text


def test_what_comes_from_outside_is_no_markup(evaluation: Evaluation, shown: Shown) -> None:
    evil = '<script>alert("&")</script>'
    context = Context(before=evil, token=evil, after="\n", value=1.0)
    changed = msgspec.structs.replace(
        evaluation,
        subjects=msgspec.structs.replace(evaluation.subjects, sae=evil, model=evil),
        text=msgspec.structs.replace(evaluation.text, source=evil),
        examples=(FeatureExamples(feature=1, density=0.1, contexts=(context,)),),
        agreement_with=evil,
    )
    page, _ = shown(changed)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 6


def test_parts_that_were_not_asked_for_are_left_out(evaluation: Evaluation, shown: Shown) -> None:
    bare = msgspec.structs.replace(evaluation, probes=None, agreement=None, agreement_with=None, examples=())
    page, whole = Page(html(bare, tuple(plots(bare)))), shown(evaluation)[0]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    for heading in ("Probes with few features", "Agreement with another SAE", "Where some features fire"):
        assert heading in whole.text
        assert heading not in page.text


def test_a_recovery_that_means_nothing(evaluation: Evaluation, shown: Shown) -> None:
    figures = msgspec.structs.replace(evaluation.sae, ce_recovered_zero=None, ce_recovered_mean=None)
    page, _ = shown(msgspec.structs.replace(evaluation, sae=figures))
    assert page.text.count("does not apply") == 2


def test_a_sample_says_that_it_is_one(evaluation: Evaluation, shown: Shown) -> None:
    sample = Agreement(mcc=0.5, mean_max_cosine=0.6, share_above_09=0.1, matched=2048, is_sample=True)
    wide = msgspec.structs.replace(
        evaluation, agreement=sample, sae=msgspec.structs.replace(evaluation.sae, cosine_features=50)
    )
    page, _ = shown(wide)
    assert "2,048 pairs, a sample" in page.text
    assert "of 50 taken by chance" in page.text


def test_files(tmp_path: Path, evaluation: Evaluation) -> None:
    written = write_report(evaluation, tmp_path / "new" / "folder")
    names = ["cosine.png", "density.png", "evaluation.json", "l0.png", "loss.png", "probes.png", "report.html"]
    assert sorted(one.name for one in written) == names
    assert sorted(one.name for one in (tmp_path / "new" / "folder").iterdir()) == names
    assert (tmp_path / "new" / "folder" / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("field", ["density_histogram", "l0_histogram"])
def test_an_sae_of_which_nothing_fires_has_plots_too(evaluation: Evaluation, field: str) -> None:
    histogram = getattr(evaluation.sae, field)
    none = msgspec.structs.replace(histogram, counts=(0,) * len(histogram.counts))
    sae = msgspec.structs.replace(evaluation.sae, **{field: none})
    assert len(tuple(plots(msgspec.structs.replace(evaluation, sae=sae)))) == 5

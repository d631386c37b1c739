"""Units of a unit decoder against raw ones, and what becomes of a catalogue that is already there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from saeguard_sae import catalogue
from saeguard_sae.catalogue import (
    BadCatalogue,
    CatalogueFeature,
    CatalogueToken,
    Example,
    merge_entries,
    write_catalogue,
)
from saeguard_sae.dictionary import Dictionary, ReLU
from saeguard_sae.metadata import import_features


def record(index: int, **said: object) -> str:
    return json.dumps({"modelId": "m", "layer": "1-res", "index": str(index)} | said) + "\n"


def test_published_values_become_what_the_served_sae_gives(tmp_path: Path) -> None:
    """Publishes what the SAE with a unit decoder gives, and finds what the SAE itself gives."""
    W_enc, W_dec, b_enc = torch.randn(6, 9), torch.randn(9, 6) * torch.rand(9, 1) * 3, torch.randn(9)
    norms, unembed, x = W_dec.norm(dim=1), torch.randn(6, 4), torch.randn(50, 6)
    served = Dictionary(W_enc, b_enc, W_dec, torch.zeros(6), ReLU())
    published = Dictionary(W_enc * norms, b_enc * norms, W_dec / norms[:, None], torch.zeros(6), ReLU())
    lines = []
    for index, (column, row) in enumerate(zip(published.encode(x).T, published.W_dec @ unembed, strict=True)):
        fired = {"tokens": ["a"], "values": [float(column[0])], "maxValue": float(column[0]), "maxValueTokenIndex": 0}
        said = {"maxActApprox": float(column.max()), "pos_str": list("abcd"), "pos_values": row.tolist()}
        lines += [record(index, **said), record(index, **fired)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    found = import_features([tmp_path / "a.jsonl"], 9, decoder_norms=norms, units="unit_decoder").features
    raw, logits = served.encode(x), served.W_dec @ unembed
    for index in range(9):
        assert found[index].maximum == pytest.approx(float(raw[:, index].max()), rel=1e-5)
        shown = [one.value for one in found[index].examples]
        assert shown == ([pytest.approx(float(raw[0, index]), rel=1e-5)] if raw[0, index] > 0 else [])
        assert [one.logit for one in found[index].top_tokens] == pytest.approx(logits[index].tolist(), rel=1e-4)


def test_raw_units_leave_values_alone_and_tables_have_units_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("index,label,maximum,density\n1,a,6,0.5\n")
    norms = torch.tensor([1.0, 3.0])
    as_is = import_features([tmp_path / "a.csv"], 2, decoder_norms=norms, units="raw").features[1]
    folded = import_features([tmp_path / "a.csv"], 2, decoder_norms=norms, units="unit_decoder").features[1]
    assert (as_is.maximum, folded.maximum, folded.density) == (6.0, 2.0, 0.5)


def test_norms_that_are_needed_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("index,label,maximum\n0,a,6\n1,b,\n")
    for norms in (None, torch.ones(3)):
        with pytest.raises(ValueError, match="need the decoder's 2 norms"):
            import_features([tmp_path / "a.csv"], 2, decoder_norms=norms, units="unit_decoder")
    with pytest.raises(ValueError, match="units must be unit_decoder or raw"):
        import_features([tmp_path / "a.csv"], 2, units="folded")  # type: ignore[arg-type]
    with pytest.raises(BadCatalogue, match=r"a\.csv:2: index: feature 0 has a decoder norm of 0"):
        import_features([tmp_path / "a.csv"], 2, decoder_norms=torch.tensor([0.0, 1.0]), units="unit_decoder")
    # Where nothing has to be converted the norm does not matter.
    import_features([tmp_path / "a.csv"], 2, decoder_norms=torch.tensor([1.0, 0.0]), units="unit_decoder")
    tiny = torch.tensor([5e-324, 1.0], dtype=torch.float64)
    with pytest.raises(BadCatalogue, match=r"a\.csv:2: a value is too large"):
        import_features([tmp_path / "a.csv"], 2, decoder_norms=tiny, units="unit_decoder")


OLD = CatalogueFeature(
    index=1, label="old", label_metric="auroc", label_score=0.99, maximum=4.0, quantiles={"0.5": 1.0}, density=0.25,
    top_tokens=(CatalogueToken("a", 1.0),), examples=(Example("t", 0, 3.0),),
)  # fmt: skip


def test_what_is_imported_wins_and_the_rest_stays() -> None:
    merged = merge_entries(
        {1: OLD, 0: CatalogueFeature(index=0, label="zero")},
        {2: CatalogueFeature(index=2), 1: CatalogueFeature(index=1, maximum=5.0)},
    )
    assert list(merged) == [0, 1, 2]
    assert merged[1].maximum == 5.0
    assert (merged[1].label, merged[1].density, merged[1].quantiles) == ("old", 0.25, {"0.5": 1.0})
    assert (merged[1].top_tokens, merged[1].examples) == (OLD.top_tokens, OLD.examples)
    assert (
        merge_entries({1: OLD}, {1: CatalogueFeature(index=1, examples=(Example("u", 1, 2.0),))})[1].examples[0].text
        == "u"
    )


def test_a_new_label_does_not_inherit_the_old_ones_score() -> None:
    merged = merge_entries({1: OLD}, {1: CatalogueFeature(index=1, label="new")})[1]
    assert (merged.label, merged.label_metric, merged.label_score) == ("new", None, None)


def test_written_catalogues_read_back(tmp_path: Path) -> None:
    write_catalogue(tmp_path, {1: OLD})
    write_catalogue(
        tmp_path, {3: CatalogueFeature(index=3, label="é \u2028 \n"), 1: CatalogueFeature(index=1, density=0.5)}
    )
    read = catalogue.read_catalogue(tmp_path, 4).features
    assert list(read) == [1, 3]
    assert (read[1].label, read[1].density, read[3].label) == ("old", 0.5, "é \u2028 \n")
    assert [one.name for one in tmp_path.iterdir()] == ["features.jsonl"]


def test_a_catalogue_that_cannot_be_written_or_read_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_catalogue(tmp_path, {1: OLD})
    before = (tmp_path / "features.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            write_catalogue(tmp_path, {2: CatalogueFeature(index=2)})
    assert (tmp_path / "features.jsonl").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["features.jsonl"]
    (tmp_path / "features.jsonl").write_bytes(before + b"{")
    with pytest.raises(BadCatalogue, match=r"features\.jsonl:2"):
        write_catalogue(tmp_path, {2: CatalogueFeature(index=2)})
    assert (tmp_path / "features.jsonl").read_bytes() == before + b"{"

"""Plain tables of labels."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.catalogue import BadCatalogue, CatalogueFeature
from saeguard_sae.metadata import ImportReport, import_features


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def imported(*files: Path, **given: Any) -> ImportReport:
    return import_features(files, 8, units="raw", **given)


def test_columns_in_any_order_and_empty_cells(tmp_path: Path) -> None:
    text = (
        'label,index,density,label_metric,label_score,maximum\n"a, ""b""\nc",3,0.25,f1,.9,1e2\n,4,,,,2\n\n é ,5,,,,\n'
    )
    found = imported(table(tmp_path / "labels.csv", text))
    first = CatalogueFeature(
        index=3, label='a, "b"\nc', density=0.25, label_metric="f1", label_score=0.9, maximum=100.0
    )
    assert found.features == {
        3: first,
        4: CatalogueFeature(index=4, maximum=2.0),
        5: CatalogueFeature(index=5, label="é"),
    }
    assert found.read == 3


def test_packed_tables_and_marks_at_the_beginning(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv.gz"
    file.write_bytes(gzip.compress(b"\xef\xbb\xbfindex,label\r\n1,a\r\n"))
    assert imported(file).features[1].label == "a"


def test_the_best_scored_row_of_a_feature_stays(tmp_path: Path) -> None:
    found = imported(table(tmp_path / "a.csv", "index,label,label_score\n1,a,\n1,b,0.5\n1,c,0.4\n"))
    assert (found.features[1].label, found.dropped.labels) == ("b", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"a\.csv:1: no column index; the header is index,label\["),
        ("index\n1\n", r"a\.csv:1: no column label"),
        ("index,label,colour\n", r"a\.csv:1: unknown column 'colour'"),
        ("index,label,index\n", r"a\.csv:1: column index twice"),
        ("index,label\n1\n", r"a\.csv:2: 1 cells, but the header has 2"),
        ("index,label\n1,a,b\n", r"a\.csv:2: 3 cells"),
        ("index,label\nx,a\n", r"a\.csv:2: index: must be a whole number, got 'x'"),
        ("index,label\n8,a\n", r"a\.csv:2: index: 8 is outside 0\.\.7"),
        ("index,label\n,a\n", r"a\.csv:2: index: must be"),
        ("index,label,maximum\n1,a,nan\n", r"a\.csv:2: maximum: must be a number, got 'nan'"),
        ("index,label,maximum\n1,a,1_0\n", r"a\.csv:2: maximum: must be a number"),
        ("index,label,maximum\n1,a,1e999\n", r"a\.csv:2: maximum: must be a finite number"),
        ("index,label,density\n1,a,-0.1\n", r"a\.csv:2: density: must be 0 to 1"),
        ("index,label,label_score\n1,,0.5\n", r"a\.csv:2: label: empty, but it has a score"),
        ('index,label\n1,"a', r"a\.csv:2: not CSV"),
        ('index,label\n1,"a"b\n', r"a\.csv:2: not CSV"),
        ('index,label\n1,"a\nb"\n2,"c\n', r"a\.csv:4: not CSV"),
    ],
)
def test_refuses_by_file_line_and_column(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadCatalogue, match=says):
        imported(table(tmp_path / "a.csv", text))


def test_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"index,label\n1,\xff\n")
    with pytest.raises(BadCatalogue, match=r"a\.csv:2: not UTF-8"):
        imported(tmp_path / "a.csv")

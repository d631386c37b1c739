"""Whatever the files hold: a valid catalogue or a named error, and never much memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saeguard_sae import catalogue, metadata
from saeguard_sae.catalogue import BadCatalogue, write_catalogue
from saeguard_sae.metadata import import_features

D_SAE = 6
NORMS = torch.linspace(0.0, 2.0, D_SAE)
odd = st.one_of(st.integers(-3, 9), st.floats(width=32), st.sampled_from([0.5, 1e300, -1e300, 5e-324, 10**400]))
words = st.text(max_size=6)
anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), odd, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=4,
)


finite = st.floats(-9, 99)
paired = st.lists(st.tuples(words, finite), max_size=2)
scores = st.lists(st.fixed_dictionaries({"value": finite, "explanationScoreTypeName": words}), max_size=2)
explanations = st.fixed_dictionaries({"description": words}, optional={"scores": scores})
activations = st.lists(st.tuples(words, finite), min_size=1, max_size=3).map(
    lambda pairs: {"tokens": [one for one, _ in pairs], "values": [value for _, value in pairs]}
)
placed = st.tuples(activations, finite).map(lambda two: two[0] | {"maxValue": two[1], "maxValueTokenIndex": 0})
statistics = st.fixed_dictionaries(
    {"maxActApprox": finite, "frac_nonzero": st.floats(0, 1)},
    optional={"explanations": st.lists(explanations, max_size=2), "activations": st.lists(activations, max_size=2)},
)
promoted = st.tuples(statistics, paired).map(
    lambda two: two[0] | {"pos_str": [one for one, _ in two[1]], "pos_values": [value for _, value in two[1]]}
)
places = st.fixed_dictionaries({"index": st.integers(0, D_SAE - 1).map(str), "layer": st.just("1-res")})
records = st.tuples(places, st.one_of(explanations, activations, placed, statistics, promoted)).map(
    lambda two: two[0] | two[1]
)
KEYS = ("index", "layer", "modelId", "description", "scores", "tokens", "values", "maxValue", "maxValueTokenIndex",
        "maxActApprox", "frac_nonzero", "pos_str", "pos_values", "explanations", "activations")  # fmt: skip
broken = st.one_of(
    anything, st.tuples(records, st.sampled_from(KEYS), anything).map(lambda three: three[0] | {three[1]: three[2]})
)
several = st.tuples(st.lists(records, max_size=5), st.lists(broken, max_size=1)).map(lambda two: two[0] + two[1])


def lines(found: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, found)).encode()


def array(found: list[Any]) -> bytes:
    return json.dumps(found).encode()


exports = st.tuples(several, st.sampled_from([lines, array])).map(lambda two: two[1](two[0]))
cells = st.one_of(st.integers(0, D_SAE).map(str), st.sampled_from(["", "0.5", "-1", "1e9", "nan", '"', "a\nb"]), words)
columns = st.permutations(["index", "label", "maximum", "density", "label_score", "label_metric"]).map(
    lambda all: all[:4]
)
tables = st.tuples(columns, st.lists(st.lists(cells, min_size=4, max_size=4), max_size=4)).map(
    lambda two: "\n".join(map(",".join, [two[0], *two[1]])).encode("utf-8", "surrogatepass")
)
packed = st.one_of(exports, tables, st.binary(max_size=60)).map(gzip.compress)
damaged = st.tuples(packed, st.integers(0, 60)).map(lambda two: two[0][: two[1]])


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.one_of(exports, exports, exports, tables, packed, damaged, st.binary(max_size=60)),
    name=st.sampled_from(["a.jsonl", "a.csv"]),
    units=st.sampled_from(["raw", "unit_decoder"]),
    source=st.sampled_from([None, None, "1-res", "m/2-res"]),
)
def test_a_valid_catalogue_or_a_named_error(
    data: bytes, name: str, units: Any, source: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(data)
    try:
        found = import_features([folder / name], D_SAE, decoder_norms=NORMS, units=units, source=source)
    except BadCatalogue as err:
        names_the_place = str(folder / name) in str(err) or "no record of source" in str(err)
        assert names_the_place
        return
    write_catalogue(folder, found.features)
    again = catalogue.read_catalogue(folder, D_SAE).features
    assert again == found.features
    for feature in again.values():
        numbers = [feature.maximum, feature.label_score, *(one.value for one in feature.examples)]
        assert all(one is None or abs(one) < float("inf") for one in numbers)
        assert feature.density is None or 0 <= feature.density <= 1
        assert feature.label is None or feature.label == feature.label.strip() != ""


def test_the_property_sees_catalogues_with_everything(tmp_path: Path) -> None:
    """Of the strategies above, so that the property is not about errors alone."""
    seen: set[str] = set()

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(exports)
    def look(data: bytes) -> None:
        (tmp_path / "a.jsonl").write_bytes(data)
        try:
            found = import_features([tmp_path / "a.jsonl"], D_SAE, units="raw").features
        except BadCatalogue:
            return
        for one in found.values():
            seen.update(key for key, value in msgspec.structs.asdict(one).items() if value not in (None, (), {}))

    look()
    assert seen >= {"label", "label_score", "maximum", "density", "top_tokens", "examples"}


def test_large_files_are_read_line_by_line(tmp_path: Path) -> None:
    """8,000 activations, 20 MB of JSON: only what the catalogue keeps stays."""
    line = json.dumps({"modelId": "m", "layer": "1", "tokens": ["word"] * 100, "values": [0.5] * 300, "maxValue": 0.5})
    with gzip.open(tmp_path / "batch-0.jsonl.gz", "wt", compresslevel=1) as stream:
        for index in range(8_000):
            stream.write(f'{{"index": "{index % 50}", "maxValueTokenIndex": {index % 90}, {line[1:]}\n')
    tracemalloc.start()
    found = import_features([tmp_path / "batch-0.jsonl.gz"], 50, units="raw")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.read, len(found.features)) == (8_000, 50)
    assert peak < 8 * 2**20


@pytest.mark.parametrize(("limit", "data", "says"), [
    ("LONGEST_LINE", b'{"index": 0, "layer": "1", "description": "a"}', "a.jsonl:1: a line of more than 20 bytes"),
    ("LARGEST_ARRAY", b'[{"index": 0, "layer": "1", "description": "a"}]', "a.jsonl: an array of more than 20 bytes"),
])  # fmt: skip
def test_what_is_read_as_a_whole_has_a_limit(
    limit: str, data: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, limit, 20)
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(BadCatalogue, match=says):
        import_features([tmp_path / "a.jsonl"], 1, units="raw")

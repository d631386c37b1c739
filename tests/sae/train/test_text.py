"""Documents of every kind of data set: the same from any place on, and what each mistake says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard_sae.train import data as records
from saeguard_sae.train.data import DataSettings, Documents, open_documents
from saeguard_sae.train.settings import TrainError
from support.streams import texts

TEXTS = texts(45, seed=811)


def _jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"number": 1, "text": text}) + "\n" for text in rows).encode()


def plain_folder(path: Path) -> DataSettings:
    (path / "deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        where = path / "deep" if number > 20 else path
        (where / f"{'x' if number > 20 else 'a'}{number:03}.txt").write_text(text, encoding="utf-8")
    (path / "deep").rename(path / "z")
    return DataSettings(path=str(path))


def blank_lines(path: Path) -> DataSettings:
    path.mkdir()
    (path / "all.txt").write_text("\n\n".join(TEXTS) + "\n\n\n\n", encoding="utf-8")
    return DataSettings(path=str(path / "all.txt"), separator="\n\n")


def jsonl(path: Path) -> DataSettings:
    path.mkdir()
    (path / "a.jsonl").write_bytes(_jsonl(TEXTS[:20]) + b"\n")
    (path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl(TEXTS[20:])))
    return DataSettings(path=str(path))


def parquet(path: Path) -> DataSettings:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.mkdir()
    for name, part in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        table = arrow.table({"text": [*part, None, ""], "id": list(range(len(part) + 2))})
        files.write_table(table, path / f"{name}.parquet", row_group_size=7)
    return DataSettings(path=str(path))


def hub(path: Path) -> DataSettings:
    pytest.importorskip("datasets")
    path.mkdir()
    (path / "a.jsonl").write_bytes(_jsonl(TEXTS[:30]))
    (path / "b.jsonl").write_bytes(_jsonl(TEXTS[30:]))
    return DataSettings(path=str(path), kind="hub")


KINDS: dict[str, Callable[[Path], DataSettings]] = {
    "files": plain_folder,
    "blank lines": blank_lines,
    "jsonl": jsonl,
    "parquet": parquet,
    "hub": hub,
}


@pytest.fixture(scope="module", params=KINDS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    return KINDS[request.param](tmp_path_factory.mktemp("data") / "set")


def test_all_in_order_and_over_again(data: DataSettings) -> None:
    read = open_documents(data)
    assert [text.strip() for text in islice(read, 100)] == [text.strip() for text in (TEXTS * 3)[:100]]
    assert (read.epoch, read.number) == (2, 100)


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 130), ahead=st.integers(1, 60))
def test_goes_on_where_it_was(data: DataSettings, before: int, ahead: int) -> None:
    read = open_documents(data)
    for _ in range(before):
        next(read)
    state = json.loads(json.dumps(read.state()))
    wanted = [next(read) for _ in range(ahead)]
    resumed = Documents(data)
    resumed.resume(state)
    assert resumed.state() == state
    assert [next(resumed) for _ in range(ahead)] == wanted
    assert (resumed.epoch, resumed.number) == (read.epoch, read.number)


def test_a_part_of_the_data_and_the_rest(tmp_path: Path) -> None:
    both = DataSettings(path=blank_lines(tmp_path / "set").path, separator="\n\n", skip=40, limit=3)
    read = open_documents(both)
    assert [next(read) for _ in range(5)] == [*TEXTS[40:43], *TEXTS[40:42]]


def refusal(**given: object) -> str:
    with pytest.raises(TrainError) as caught:
        open_documents(DataSettings(**given))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(path=jsonl(tmp_path / "set").path, column="body").endswith(
        "a.jsonl line 1 has no column 'body'; it has number, text"
    )


def test_a_column_that_is_not_there_in_parquet(tmp_path: Path) -> None:
    assert refusal(path=parquet(tmp_path / "set").path, column="body").endswith("no column 'body'; it has text, id")


def test_a_column_that_is_not_there_on_the_hub(tmp_path: Path) -> None:
    path = hub(tmp_path / "set").path
    assert refusal(path=path, kind="hub", column="body").endswith("has no column 'body'; it has number, text")


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    assert "valid" in refusal(path=hub(tmp_path / "set").path, kind="hub", split="valid")


def test_a_column_without_text(tmp_path: Path) -> None:
    assert refusal(path=jsonl(tmp_path / "set").path, column="number").endswith("holds int, not text")


def test_a_parquet_column_without_text(tmp_path: Path) -> None:
    assert refusal(path=parquet(tmp_path / "set").path, column="id").endswith("holds int64, not text")


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["one"]) + b"{'text'\n")
    read = open_documents(DataSettings(path=str(tmp_path / "a.jsonl")))
    next(read)
    with pytest.raises(TrainError, match=r"a\.jsonl line 2 is not JSON"):
        next(read)


def test_a_record_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'["one"]\n')
    assert "JSON list, not an object" in refusal(path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", ["", " \n\n  \n"])
def test_no_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert refusal(path=str(tmp_path / "a.txt")).endswith("holds no text")


def test_nothing_left_behind_what_is_skipped(tmp_path: Path) -> None:
    assert "data.skip" in refusal(path=blank_lines(tmp_path / "set").path, separator="\n\n", skip=100)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    assert "a.txt cannot be read" in refusal(path=str(tmp_path / "a.txt"))


def test_damaged_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(TEXTS))[:-20])
    read = Documents(DataSettings(path=str(tmp_path / "a.jsonl.gz")))
    with pytest.raises(TrainError, match=r"a\.jsonl\.gz cannot be read"):
        list(islice(read, 46))


def test_a_document_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST", 100)
    (tmp_path / "a.txt").write_text("word " * 1000)
    assert refusal(path=str(tmp_path / "a.txt")).startswith("data.separator: ")


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(path=str(tmp_path / "a.jsonl")).startswith("data.path: there is no file or folder")
    assert "holds no files" in refusal(path=str(tmp_path))
    assert "holds no .jsonl" in refusal(path=str(tmp_path), kind="jsonl")


def test_several_kinds_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["two"]))
    assert refusal(path=str(tmp_path)).endswith("say one of text, jsonl")
    assert next(open_documents(DataSettings(path=str(tmp_path), kind="jsonl"))) == "two"


def test_files_that_changed_are_not_gone_on_with(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "set")
    read = open_documents(data)
    next(read)
    state = read.state()
    (Path(data.path) / "a.jsonl").write_bytes(_jsonl(TEXTS))
    with pytest.raises(TrainError, match="when the checkpoint was written"):
        Documents(data).resume(state)


@pytest.mark.parametrize("wrong", [{"path": ""}, {"kind": "csv"}, {"skip": -1}, {"limit": -1}, {"column": ""}])
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainError, match=r"data\.\w+: must"):
        DataSettings(**({"path": "x"} | wrong))  # type: ignore[arg-type]


def test_what_one_skips_another_reads(tmp_path: Path) -> None:
    """Blank records count for neither: what is measured on is never trained on."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(_jsonl([text, " "]) for text in TEXTS))
    held = open_documents(DataSettings(path=str(tmp_path / "a.jsonl"), limit=10))
    trained = open_documents(DataSettings(path=str(tmp_path / "a.jsonl"), skip=10))
    assert [*islice(held, 10), *islice(trained, 35)] == TEXTS

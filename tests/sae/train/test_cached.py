"""Activations on disk: what was streamed comes back, in any number of epochs, whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train import stream as caching
from saeguard_sae.train.data import LanguageModel
from saeguard_sae.train.settings import DataSettings, StreamSettings, TrainError
from saeguard_sae.train.stream import ActivationStream, cache_activations
from support.streams import blank_line_file, small_model, texts

POST, MLP = Site(0, "resid_post"), Site(1, "mlp_out")
SETTINGS = StreamSettings(batch=50, buffer=1000, context=16, rows=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("model") / "mine")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    path = blank_line_file(tmp_path_factory.mktemp("data") / "all.txt", texts(300, seed=5))
    return DataSettings(path=str(path), separator="\n\n")


def streaming(model: LanguageModel, text: DataSettings, **given: Any) -> ActivationStream:
    chosen = StreamSettings(batch=50, buffer=1000, context=16, rows=4, **given)
    return ActivationStream(model, [POST, MLP], text, chosen)


@pytest.fixture(scope="module")
def folder(model: LanguageModel, text: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 tokens in shards of 150, 150 and 100."""
    path = tmp_path_factory.mktemp("cache") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "_SHARD_BYTES", 150 * 2 * 48 * 4)
        cache_activations(streaming(model, text), path, 390)
    return path


def opened(folder: Path, *sites: Site, **given: Any) -> ActivationStream:
    chosen = StreamSettings(**{"batch": 50, "buffer": 200, "outlier_norm": 0.0} | given)
    return ActivationStream(None, sites or (POST, MLP), DataSettings(path=str(folder)), chosen)


def rows(x: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


def test_what_was_streamed_comes_back(model: LanguageModel, text: DataSettings, folder: Path) -> None:
    stream = streaming(model, text)
    batches = [stream.batch() for _ in range(8)]
    wanted = {site: torch.cat([batch[site] for batch in batches]) for site in (POST, MLP)}
    read = opened(folder)
    assert (read.model_name, read.widths) == ("mine", {POST: 48, MLP: 48})
    first = read.sample(400)
    assert torch.equal(first[POST], wanted[POST])
    assert torch.equal(first[MLP], wanted[MLP])
    big = opened(folder, MLP, buffer=800)
    got = Counter(key for _ in range(40) for key in rows(big.batch()[MLP]))
    there = Counter(rows(wanted[MLP]))
    assert set(got) == set(there)
    # 2,000 of 400: five times over, and what the buffer held back or had ahead.
    assert all(2 <= got[key] / there[key] <= 7 for key in there)
    assert big.epoch >= 4


def test_the_index_says_what_there_is(folder: Path) -> None:
    index = json.loads((folder / "activations.json").read_text())
    assert (index["model"], index["tokens"], index["dtype"]) == ("mine", 400, "float32")
    assert index["sites"] == {"resid_post.0": 48, "mlp_out.1": 48}
    assert [shard["tokens"] for shard in index["shards"]] == [150, 150, 100]
    assert sorted(one.name for one in folder.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "activations.json",
    ]  # fmt: skip


def test_bfloat16(model: LanguageModel, text: DataSettings, tmp_path: Path) -> None:
    cache_activations(streaming(model, text, store="bfloat16"), tmp_path / "set", 100)
    assert load_file(tmp_path / "set" / "00000.safetensors")["mlp_out.1"].dtype == torch.bfloat16
    stream = streaming(model, text, store="bfloat16")
    wanted = torch.cat([stream.batch()[MLP] for _ in range(2)])
    assert torch.equal(opened(tmp_path / "set").sample(100)[MLP], wanted)


@settings(max_examples=12, deadline=None)
@given(before=st.integers(0, 30))
def test_goes_on_bit_for_bit(folder: Path, before: int) -> None:
    stream = opened(folder)
    for _ in range(before):
        stream.batch()
    state = stream.state()
    wanted = [stream.batch()[MLP] for _ in range(20)]
    resumed = opened(folder)
    resumed.resume(state)
    assert all(torch.equal(resumed.batch()[MLP], one) for one in wanted)


def test_written_whole_or_not_at_all(
    model: LanguageModel, text: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "_SHARD_BYTES", 1)
    write, count = caching.save_file, [0]

    def second_fails(*given: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            full()
        write(*given)

    monkeypatch.setattr(caching, "save_file", second_fails)
    with pytest.raises(TrainError, match=r"cannot be written: .*No space left"):
        cache_activations(streaming(model, text), tmp_path / "set", 200)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(model: LanguageModel, text: DataSettings, folder: Path) -> None:
    with pytest.raises(TrainError, match="exists already"):
        cache_activations(streaming(model, text), folder, 100)
    with pytest.raises(TrainError, match="tokens: must be at least 1"):
        cache_activations(streaming(model, text), folder.parent / "none", 0)


def test_a_site_that_was_not_kept(folder: Path) -> None:
    with pytest.raises(TrainError, match=r"resid_post\.2 is not in the activations .*have resid_post\.0, mlp_out\.1"):
        opened(folder, Site(2, "resid_post"))


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_file_that_is_missing_damaged_or_another(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "set")
    file = path / "00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(TrainError, match=r"00001\.safetensors cannot be used"):
        opened(path)
    file.write_bytes((path / "00002.safetensors").read_bytes())
    with pytest.raises(TrainError, match=r"has the shape \[100, 48\].* says \[150, 48\]"):
        opened(path)
    file.unlink()
    with pytest.raises(TrainError, match=r"00001\.safetensors cannot be used"):
        opened(path)


@pytest.mark.parametrize("wrong", ["{", "[]", '{"version": 2}', '{"version": 1, "model": "m", "dtype": "float32", "tokens": 0, "sites": {"mlp_out.1": 48}, "shards": []}'])  # fmt: skip # noqa: E501
def test_an_index_that_is_wrong(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "activations.json").write_text(wrong)
    with pytest.raises(TrainError, match=r"activations\.json"):
        opened(tmp_path)


def test_activations_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "set")
    tensors = load_file(path / "00001.safetensors")
    tensors["mlp_out.1"][17, 3] = float("nan")
    save_file(tensors, path / "00001.safetensors")
    with pytest.raises(TrainError, match=r"mlp_out\.1 are not finite .* row 17 of 00001\.safetensors"):
        opened(path, outlier_norm=10.0).batch()


def test_outliers_are_left_out(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "set")
    tensors = load_file(path / "00001.safetensors")
    tensors["mlp_out.1"][17] *= 1000
    save_file(tensors, path / "00001.safetensors")
    stream = opened(path, outlier_norm=10.0)
    norms = torch.cat([stream.batch()[MLP].norm(dim=1) for _ in range(16)])
    assert float(norms.max()) < 10 * float(norms.median())


def test_a_folder_that_changed_is_not_gone_on_with(folder: Path, tmp_path: Path, text: DataSettings) -> None:
    stream = opened(folder)
    stream.batch()
    state = stream.state()
    path = copied(folder, tmp_path / "set")
    index = json.loads((path / "activations.json").read_text())
    index["shards"].pop()
    (path / "activations.json").write_text(json.dumps(index))
    with pytest.raises(TrainError, match="when the checkpoint was written"):
        opened(path).resume(state)

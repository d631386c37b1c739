"""The whole stream against plain Hugging Face activations: rows together, each once, outliers out, exact resume."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train.data import Contexts, LanguageModel
from saeguard_sae.train.settings import DataSettings, StreamSettings, TrainError
from saeguard_sae.train.stream import ActivationStream
from support.models import WIDTH
from support.streams import blank_line_file, plain_activations, small_model, texts

POST, PRE, MLP = Site(0, "resid_post"), Site(1, "resid_pre"), Site(1, "mlp_out")
SETTINGS = StreamSettings(batch=32, buffer=512, context=16, rows=4, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    path = blank_line_file(tmp_path_factory.mktemp("data") / "all.txt", texts(300, seed=919))
    return DataSettings(path=str(path), separator="\n\n")


def plain(model: LanguageModel, data: DataSettings, site: Site, rows: int, chosen: StreamSettings) -> Tensor:
    """[tokens, width] of the first rows, those that are kept, in their order; in forward passes of the same size."""
    read = Contexts(model, data, chosen)
    parts = []
    for _ in range(rows // chosen.rows):
        taken = read.rows(chosen.rows)
        parts.append(plain_activations(model.network, "llama", site, taken.ids)[taken.mask])
    return torch.cat(parts)


def keys(x: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


def test_rows_of_a_batch_are_the_same_tokens_everywhere(model: LanguageModel, data: DataSettings) -> None:
    """What goes into a block is what the block before put out."""
    stream = ActivationStream(model, [PRE, MLP, POST], data, SETTINGS)
    wanted = dict(
        zip(keys(plain(model, data, POST, 200, SETTINGS)), plain(model, data, MLP, 200, SETTINGS), strict=True)
    )
    for _ in range(40):
        batch = stream.batch()
        assert {x.shape for x in batch.values()} == {(32, WIDTH)}
        assert torch.equal(batch[POST], batch[PRE])
        for key, x in zip(keys(batch[POST]), batch[MLP], strict=True):
            assert torch.equal(wanted[key], x)


def test_each_token_is_given_once(model: LanguageModel, data: DataSettings) -> None:
    chosen = StreamSettings(batch=32, buffer=512, context=16, rows=4, outlier_norm=0.0)
    stream = ActivationStream(model, [MLP], data, chosen)
    given_out = [key for _ in range(30) for key in keys(stream.batch()[MLP])]
    there = keys(plain(model, data, MLP, 160, chosen))
    # Counted, not as sets: at the start of rows, tokens may have the same activations.
    assert Counter(given_out) <= Counter(there)
    # All but what a full buffer still holds.
    assert (Counter(there[:448]) - Counter(given_out)).total() < 200


def test_a_batch_can_be_learned_from(model: LanguageModel, data: DataSettings) -> None:
    """Activations of inference mode cannot be saved for a backward pass."""
    stream = ActivationStream(model, [MLP], data, SETTINGS)
    weight = torch.ones(WIDTH, requires_grad=True)
    for x in (stream.batch()[MLP], stream.sample(50)[MLP]):
        (x * weight).square().sum().backward()  # type: ignore[no-untyped-call]
        x[0] = 0.0


def test_the_sample_is_the_start_and_takes_nothing_away(model: LanguageModel, data: DataSettings) -> None:
    one, other = (ActivationStream(model, [POST, MLP], data, SETTINGS) for _ in range(2))
    first = one.sample(100)
    assert torch.equal(first[MLP], plain(model, data, MLP, 40, SETTINGS)[:100])
    for _ in range(30):
        got, wanted = one.batch(), other.batch()
        assert torch.equal(got[POST], wanted[POST])
    assert torch.equal(one.sample(100)[POST], first[POST])


def test_outliers_are_left_out(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    documents = [text.replace("a", "Q") if number % 3 == 0 else text for number, text in enumerate(texts(200, 33))]
    data = DataSettings(path=str(blank_line_file(tmp_path / "all.txt", documents)), separator="\n\n")
    token = model.tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    model.network.model.embed_tokens.weight[token] *= 1000
    embed = Site(0, "embed")

    def norms(**given: float) -> Tensor:
        chosen = StreamSettings(batch=100, buffer=1000, context=16, rows=4, **given)
        stream = ActivationStream(model, [MLP, embed], data, chosen)
        return torch.cat([stream.sample(200)[embed], *(stream.batch()[embed] for _ in range(10))]).norm(dim=1)

    everything = norms(outlier_norm=0.0)
    assert float((everything > 10 * everything.median()).double().mean()) > 0.005
    assert float(norms().max()) <= 10 * float(everything.median()) * 1.1


def continuation(stream: ActivationStream, batches: int) -> list[Tensor]:
    return [torch.cat(list(stream.batch().values()), dim=1) for _ in range(batches)]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


@settings(max_examples=12, deadline=None)
@given(
    before=st.integers(0, 60),
    packing=st.sampled_from(["packed", "documents"]),
    store=st.sampled_from(["model", "bfloat16"]),
)
def test_goes_on_bit_for_bit(model: LanguageModel, data: DataSettings, before: int, packing: Any, store: Any) -> None:
    chosen = StreamSettings(batch=32, buffer=512, context=16, rows=4, packing=packing, store=store)
    stream = ActivationStream(model, [POST, MLP], data, chosen)
    for _ in range(before):
        stream.batch()
    state = saved(stream.state())
    wanted = continuation(stream, 40)
    resumed = ActivationStream(model, [POST, MLP], data, chosen)
    resumed.resume(state)
    assert all(torch.equal(a, b) for a, b in zip(continuation(resumed, 40), wanted, strict=True))
    assert resumed.epoch == stream.epoch


def test_another_seed_draws_another_order(model: LanguageModel, data: DataSettings) -> None:
    other = StreamSettings(batch=32, buffer=512, context=16, rows=4, seed=8)
    one, two = (ActivationStream(model, [MLP], data, chosen).batch()[MLP] for chosen in (SETTINGS, other))
    assert not torch.equal(one, two)


def test_counts_epochs(model: LanguageModel, tmp_path: Path) -> None:
    data = DataSettings(path=str(blank_line_file(tmp_path / "a.txt", ["few words"])), separator="\n\n")
    stream = ActivationStream(model, [MLP], data, SETTINGS)
    assert stream.epoch == 0
    stream.batch()
    assert stream.epoch > 10


def test_estimate(model: LanguageModel, data: DataSettings) -> None:
    stream = ActivationStream(model, [POST, MLP], data, SETTINGS)
    stream.batch()
    held = sum(one.nbytes for one in stream.state()["buffer"]["tokens"].values())
    assert held <= stream.buffer_bytes == 512 * (2 * WIDTH * 4 + 24)


def test_states_of_another_run_are_refused(model: LanguageModel, data: DataSettings) -> None:
    stream = ActivationStream(model, [POST], data, SETTINGS)
    stream.batch()
    state = stream.state()
    with pytest.raises(TrainError, match=r"sites: the checkpoint has resid_post\.0, the settings mlp_out\.1"):
        ActivationStream(model, [MLP], data, SETTINGS).resume(state)
    other = StreamSettings(batch=32, buffer=1024, context=16, rows=4, seed=7)
    with pytest.raises(TrainError, match=r"stream\.buffer: the checkpoint has 512, the settings 1024"):
        ActivationStream(model, [POST], data, other).resume(state)


def test_what_cannot_work(model: LanguageModel, data: DataSettings) -> None:
    with pytest.raises(
        TrainError, match=r"stream\.buffer: must hold twice the tokens of one forward pass, 1 rows of 256"
    ):
        ActivationStream(model, [MLP], data, StreamSettings(batch=8, buffer=500))
    with pytest.raises(TrainError, match="17 rows of 16"):
        ActivationStream(model, [MLP], data, StreamSettings(batch=8, buffer=512, context=16, rows=17))
    with pytest.raises(TrainError, match="only cached activations need no model"):
        ActivationStream(None, [MLP], data, SETTINGS)


def test_nothing_left_to_learn_from(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeguard_sae.train.stream._PATIENCE", 20)
    data = DataSettings(path=str(blank_line_file(tmp_path / "a.txt", ["<eos><pad>"])), separator="\n\n")
    with pytest.raises(TrainError, match="left no token to learn from"):
        ActivationStream(model, [MLP], data, StreamSettings(batch=8, buffer=512, context=16, rows=1)).batch()

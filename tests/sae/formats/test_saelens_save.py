"""What is written as SAELens writes it reads back as it was; what SAELens cannot say is not written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard_sae.coders import SparseCoder
from saeguard_sae.dictionary import AbsTopK, Dictionary, GroupMax, TanhReLU, TopK
from saeguard_sae.formats import ParsedSae, Source, saelens, saelens_save
from saeguard_sae.models import POINTS, Point, Site
from support.coders import D_IN, D_SAE, SAVEABLE, dictionary

READS, WRITES = Site(4, "mlp_in"), Site(4, "mlp_out")
NO_HOOK = ("attn_raw", "mlp_raw")


def places(coder: SparseCoder) -> dict[str, Any]:
    is_transcoder = isinstance(coder, Dictionary) and coder.is_transcoder
    return {"site": READS, "writes": (WRITES,) if is_transcoder else ()}


def written(coder: SparseCoder, path: Path, **own: Any) -> ParsedSae:
    saelens_save.save_saelens(coder, path, model_name="tiny", **places(coder) | own)
    return saelens.parse(Source(path))


@pytest.mark.parametrize("name", SAVEABLE)
def test_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    coder = SAVEABLE[name](31)
    found = written(coder, tmp_path)
    again = found.dictionary
    assert (found.reads, found.writes) == (READS, places(coder)["writes"])
    assert (found.model, found.processing) == ("tiny", "none")
    assert again.architecture == coder.architecture
    for weight, tensor in coder.tensors().items():
        assert torch.equal(again.tensors()[weight], tensor), weight
    x = torch.randn(9, D_IN) * 2
    assert torch.equal(again.encode(x), coder.encode(x))
    assert torch.equal(again.reconstruct(x), coder.reconstruct(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_the_file_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    coder = SAVEABLE["jumprelu"](32)
    again = written(coder, tmp_path, dtype=dtype).dictionary
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(again.tensors()["threshold"], coder.tensors()["threshold"].to(dtype).float())


def test_everyone_may_read_both_files(tmp_path: Path) -> None:
    written(SAVEABLE["relu"](33), tmp_path)
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes["sae_weights.safetensors"] == modes["cfg.json"]
    assert sorted(modes) == ["cfg.json", "sae_weights.safetensors"]


def test_a_write_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SAVEABLE["relu"](34)
    written(first, tmp_path)

    def fails(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("saeguard_sae.formats.saelens_save.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        saelens_save.save_saelens(SAVEABLE["relu"](35), tmp_path, site=READS, model_name="tiny")
    assert torch.equal(saelens.parse(Source(tmp_path)).dictionary.tensors()["W_dec"], first.tensors()["W_dec"])


@pytest.mark.parametrize("point", [point for point in POINTS if point not in NO_HOOK])
def test_every_site_with_a_hook_reads_back(point: Point, tmp_path: Path) -> None:
    site = Site(0 if point == "embed" else 7, point)
    assert written(SAVEABLE["relu"](36), tmp_path, site=site).reads == site


@pytest.mark.parametrize("point", NO_HOOK)
def test_a_site_without_a_hook_is_refused(point: Point, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no hook at {point}\.3"):
        written(SAVEABLE["relu"](36), tmp_path, site=Site(3, point))


def test_heads_are_flattened_by_saelens_too(tmp_path: Path) -> None:
    written(SAVEABLE["relu"](37), tmp_path, site=Site(1, "attn_z"))
    assert json.loads((tmp_path / "cfg.json").read_text())["reshape_activations"] == "hook_z"


@pytest.mark.parametrize("processing", ["centred", "transformer_lens"])
def test_says_how_the_model_was_processed(processing: Any, tmp_path: Path) -> None:
    assert written(SAVEABLE["relu"](38), tmp_path, processing=processing).processing == processing


def test_a_centred_input_is_said_of_the_model(tmp_path: Path) -> None:
    coder = replace(dictionary(39), normalisation="centred")
    found = written(coder, tmp_path)
    assert found.processing == "centred"
    assert isinstance(found.dictionary, Dictionary)
    assert found.dictionary.normalisation == "none"


def test_metadata_may_be_added(tmp_path: Path) -> None:
    assert written(SAVEABLE["relu"](40), tmp_path, metadata={"l0": 12.5, "context_size": 64}).stated_l0 == 12.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": TanhReLU()}, "no tanh_relu SAE"),
        ({"activation": GroupMax(6)}, "no groupmax SAE"),
        ({"activation": TopK(6, keeps_negative=True)}, "keeps negative"),
        ({"activation": TopK(6, gain=torch.ones(D_SAE))}, "gain"),
        ({"activation": AbsTopK(6, gain=torch.ones(D_SAE))}, "gain"),
        ({"W_skip": torch.ones(D_IN, D_IN)}, "skip connection in an SAE"),
    ],
)
def test_refuses_what_saelens_cannot_say(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        written(replace(dictionary(41), **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_transcoders_that_saelens_cannot_say(tmp_path: Path) -> None:
    transcoder = dictionary(42, centre=False, is_transcoder=True)
    with pytest.raises(ValueError, match="no topk transcoder"):
        written(replace(transcoder, activation=TopK(6)), tmp_path)
    with pytest.raises(ValueError, match="takes b_dec off its input"):
        written(replace(dictionary(42), is_transcoder=True), tmp_path)
    for several in ((), (WRITES, Site(5, "mlp_out"))):
        with pytest.raises(ValueError, match=f"writes names {len(several)}"):
            written(transcoder, tmp_path, writes=several)


def test_refuses_an_sae_that_writes_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes where it reads, which is mlp_in\.4"):
        written(SAVEABLE["relu"](43), tmp_path, writes=(WRITES,))
    assert written(SAVEABLE["relu"](43), tmp_path, writes=(READS,)).writes == ()


def test_refuses_a_gated_sae_with_an_encoder_bias(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no b_enc"):
        written(replace(dictionary(44, "gated"), b_enc=torch.ones(D_SAE)), tmp_path)

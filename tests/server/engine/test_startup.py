"""Before the port opens: an SAE that does not do what is stated keeps the server from starting, with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from saeguard_client import AsyncClient
from saeguard_sae.loading import LoadError
from saeguard_server import app as bundled
from saeguard_server.app import App
from saeguard_server.engine.load import PASSAGE_TOKENS, calibration_tokens
from saeguard_server.engine.transformers import load_engine
from saeguard_server.observe import Metrics
from saeguard_server.settings import (
    BadSettings,
    BoundsSettings,
    CheckSettings,
    ServedSaeSettings,
    ServerSettings,
    Settings,
    load_settings,
)
from support.models import WIDTH, save_model
from support.saes import plain_sae, save_sae

RESID2 = bundled.ASSETS / "saes" / "resid2"


def demo(**change: Any) -> Settings:
    """The demo model with one of its SAEs, changed."""
    sae = ServedSaeSettings(**({"name": "mine", "path": str(RESID2)} | change))
    return bundled.resolve_bundled(
        Settings(saes=(sae,), server=ServerSettings(listen="127.0.0.1:0", metrics_listen=""))
    )


def load(settings: Settings) -> tuple[Any, Metrics]:
    metrics = Metrics(CollectorRegistry())
    return load_engine(settings, metrics), metrics


def test_what_is_measured_is_recorded() -> None:
    engine, metrics = load(demo())
    found, stated = engine.saes["mine"].measured, engine.saes["mine"].catalogue.quality
    assert found is not None
    assert stated is not None
    assert found.l0 == pytest.approx(stated.l0, rel=0.25)
    assert found.fvu == pytest.approx(stated.fvu, rel=0.5)
    assert found.ce_spliced - found.ce_base == pytest.approx(stated.ce_spliced - stated.ce_base, abs=0.05)
    value = metrics.registry.get_sample_value
    assert value("saeguard_sae_l0", {"sae": "mine"}) == found.l0
    assert value("saeguard_sae_fvu", {"sae": "mine"}) == found.fvu
    assert value("saeguard_sae_ce_increase_nats", {"sae": "mine"}) == found.ce_spliced - found.ce_base


async def test_what_is_measured_is_in_the_catalogue() -> None:
    async with App.build(demo()) as app, AsyncClient(f"127.0.0.1:{app.port}") as client:
        (sae,) = await client.saes()
        measured = app.engine.saes["mine"].measured
    assert sae.measured is not None
    assert measured is not None
    assert (sae.measured.l0, sae.measured.fvu, sae.measured.tokens) == (measured.l0, measured.fvu, measured.tokens)
    assert (sae.format, sae.write_sites) == ("saelens", ("resid_post.2",))
    assert ("architecture", "jumprelu", "cfg.json: architecture") in [
        (one.name, one.value, one.source) for one in sae.conventions
    ]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"site": "resid_post.5"}, 'site = "resid_post.2"'),
        ({"site": "mlp_in.2"}, 'site = "resid_post.2"'),
        ({"normalize_activations": "layer_norm"}, 'normalize_activations = "none"'),
    ],
)
def test_a_wrong_convention_is_named_with_its_setting(change: dict[str, Any], setting: str) -> None:
    with pytest.raises(LoadError, match="SAE 'mine' does not fit this model: ") as caught:
        load(demo(**change))
    first = next(line for line in str(caught.value).splitlines() if line.startswith("Most likely"))
    assert setting in first


@pytest.mark.parametrize(
    ("sae", "change", "setting"),
    [
        ("resid2", {"site": "resid_post.1"}, 'site = "resid_post.2"'),
        ("resid4", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input = true"),
        ("resid2", {}, None),
        ("resid4", {}, None),
    ],
)
def test_what_bounds_let_pass_is_said_in_the_log(
    sae: str, change: dict[str, Any], setting: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer off by one can lie within any bounds; a right one must raise no doubt."""
    with caplog.at_level("WARNING"):
        load(demo(path=str(RESID2.parent / sae), **change))
    doubts = [one for one in caplog.records if "another reading fits it better" in one.message]
    assert [one.fields["setting"] for one in doubts] == ([] if setting is None else [setting])  # type: ignore[attr-defined]


def test_bounds_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "saeguard.toml").write_text(
        '[[saes]]\nname = "a"\npath = "b"\nbounds = { min_l0 = 9.0, max_l0 = 3.0 }\n', encoding="utf-8"
    )
    with pytest.raises(BadSettings, match="min_l0: 9 is above max_l0, 3"):
        load_settings(tmp_path / "saeguard.toml")


def test_a_text_too_short_to_measure_on_is_refused() -> None:
    short = msgspec.structs.replace(demo(), check=CheckSettings(text=demo().check.text, max_tokens=2))
    with pytest.raises(LoadError, match="the check cannot be made"):
        load(short)


async def test_the_server_does_not_start_then(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"L0 7.177 is above 5 \(max_l0 in the settings\)"):
        async with App.build(demo(bounds=BoundsSettings(max_l0=5.0))):
            raise AssertionError("it listens")


def test_bounds_in_the_settings_win_over_what_files_state() -> None:
    with pytest.raises(LoadError, match=r"resid_post\.2"):
        load(demo(site="resid_post.5"))
    wide = BoundsSettings(min_l0=0.0, max_l0=768.0, max_fvu=1e6, max_ce_increase=1e6)
    assert load(demo(site="resid_post.5", bounds=wide))[0].saes["mine"].measured is not None


def test_the_check_can_be_turned_off() -> None:
    settings = demo(site="resid_post.5")
    off = msgspec.structs.replace(settings, check=CheckSettings(enabled=False))
    assert load(off)[0].saes["mine"].measured is None


def test_an_sae_that_states_nothing_is_measured_and_served(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "model")
    save_sae(plain_sae("standard", WIDTH, 64, seed=5), tmp_path / "sae", "blocks.1.hook_resid_post")
    settings = Settings(
        model=msgspec.convert({"path": str(tmp_path / "model")}, type(Settings().model)),
        saes=(ServedSaeSettings(name="one", path=str(tmp_path / "sae")),),
        check=CheckSettings(max_tokens=200),
    )
    measured = load(settings)[0].saes["one"].measured
    assert measured is not None
    assert 150 <= measured.tokens <= 200
    assert measured.fvu is not None
    assert measured.fvu > 0.5, "a random SAE explains nothing"


@pytest.mark.parametrize(
    ("text", "says"), [(None, "check.text: .*No such file"), (b"\xff\xfe", "check.text"), (b"  \n\n ", "holds no text")]
)
def test_a_text_that_cannot_be_read_is_refused(text: bytes | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    settings = msgspec.structs.replace(demo(), check=CheckSettings(text=str(tmp_path / "text")))
    with pytest.raises(LoadError, match=says):
        load(settings)


def test_passages_are_read_apart_and_within_the_budget(tmp_path: Path) -> None:
    engine, _ = load(demo())
    model = engine._core.model
    (tmp_path / "text").write_text("She walks to the river.\n\n" + "The king buys bread. " * 200, encoding="utf-8")
    found = calibration_tokens(CheckSettings(text=str(tmp_path / "text"), max_tokens=400), model)
    assert sum(map(len, found)) <= 400
    assert len(found[1]) == PASSAGE_TOKENS
    assert found[0][0] == found[1][0] == model.tokenizer.encode(_text("x")).ids[0]


def _text(text: str) -> Any:

    return text


def test_a_damaged_copy_of_a_good_sae_is_caught(tmp_path: Path) -> None:
    """Finite, of the right shape, and wrong: nothing but the check can tell."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(RESID2, tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    order = torch.randperm(weights["W_dec"].shape[0], generator=torch.Generator().manual_seed(1))
    save_file(weights | {"W_dec": weights["W_dec"][order].contiguous()}, tmp_path / "sae" / "sae_weights.safetensors")
    with pytest.raises(LoadError, match=r"No other site of its width|Nothing that was tried"):
        load(demo(path=str(tmp_path / "sae")))

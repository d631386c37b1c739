"""SAELens' format, of every version: what SAELens computed from the same files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeguard_sae.formats import Choices, Source, saelens
from saeguard_sae.loading import load_sae
from saeguard_sae.models import Site
from support.near import close
from support.saes import ARCHITECTURES, plain_sae, save_sae

DATA = Path(__file__).parent / "data" / "saelens"
CASES = sorted(path.name for path in DATA.iterdir())
SHARED = ("sl_*", "sl1_*", "sl5_*")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def folders(reference: Path) -> list[Path]:
    """Every case of the larger reference that SAELens made."""
    return sorted(path for pattern in SHARED for path in reference.glob(pattern))


def choices(path: Path, reference: Any) -> Choices:
    """SAELens computes as if the scale were 1 where it knows none, which its files say nothing about."""
    if "expected_average" not in path.name:
        return Choices()
    return Choices(scale=float(reference["norm_scaling_factor"]) if "norm_scaling_factor" in reference else 1.0)


def outputs(path: Path) -> Any:
    """What SAELens computes from the case, or for a checkpoint of batch top-k, from what it exports of it."""
    exported = path.with_name(path.name.replace("_training_ckpt", "_inference"))
    return np.load((exported if exported.is_dir() else path) / "ref.npz")


def flat(x: np.ndarray[Any, Any]) -> Tensor:
    """x with its heads side by side, as activations at attn_z are here."""
    tensor = torch.from_numpy(x)
    return tensor.flatten(-2) if tensor.ndim == 4 else tensor


@pytest.mark.parametrize("case", CASES)
def test_equals_saelens(case: str) -> None:
    found, reference = saelens.parse(Source(DATA / case)), np.load(DATA / case / "ref.npz")
    coder, x = found.dictionary, torch.from_numpy(reference["x"])
    features = coder.encode(x)
    close(features, reference["features"])
    close(coder.decode(features, x), reference["recon"])
    close(coder.reconstruct(x), reference["forward"])
    assert found.reads == Site(1, "resid_post")
    assert found.writes == ((Site(1, "mlp_out"),) if "transcoder" in case else ())
    assert (found.model, found.processing) == ("tiny", "none")


def test_equals_the_larger_reference(reference_saes: Path) -> None:
    paths = [path for path in folders(reference_saes) if not path.name.endswith(tuple(HALF))]
    assert len(paths) >= 54
    for path in paths:
        reference = outputs(path)
        coder = saelens.parse(Source(path, choices=choices(path, reference))).dictionary
        x = flat(reference["x"])
        features = coder.encode(x)
        close(features, reference["feature_acts"])
        close(coder.decode(features, x), reference["recon"])
        if "forward" in reference:
            close(coder.reconstruct(x), reference["forward"])


def test_half_precision_is_close_in_float32_and_equal_in_its_own(reference_saes: Path) -> None:
    paths = [path for path in folders(reference_saes) if path.name.endswith(tuple(HALF))]
    assert len(paths) == 4
    for path in paths:
        reference, dtype = np.load(path / "ref.npz"), HALF[path.name.rsplit("_", 1)[1]]
        coder, x = saelens.parse(Source(path)).dictionary, torch.from_numpy(reference["x"])
        wanted, features = torch.from_numpy(reference["feature_acts"]), coder.encode(x)
        both = (wanted != 0) & (features != 0)
        assert float(((features - wanted).abs() / wanted.abs())[both].median()) <= 1e-2
        assert float(((features != 0) != (wanted != 0)).float().mean()) <= 1e-2
        half = coder.to("cpu", dtype)
        exact = half.encode(x)
        assert torch.equal(exact.float(), wanted)
        assert torch.equal(half.decode(exact, x).float(), torch.from_numpy(reference["recon"]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("centre", [True, False])
def test_equals_the_plain_formulas(architecture: str, centre: bool, tmp_path: Path) -> None:
    plain = plain_sae(architecture, 20, 50, seed=31, centre=centre)
    save_sae(plain, tmp_path, "blocks.0.hook_mlp_out", centre=centre)
    dictionary = saelens.parse(Source(tmp_path)).dictionary
    x = torch.randn(40, 20)
    torch.testing.assert_close(dictionary.encode(x), plain.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode(x)), plain.decode(plain.encode(x)), rtol=1e-5, atol=1e-5
    )


def test_is_found_by_its_files(tmp_path: Path) -> None:
    save_sae(plain_sae("standard", 4, 8, seed=32), tmp_path / "anything", "blocks.2.hook_mlp_out")
    loaded = load_sae("mine", tmp_path / "anything")
    assert (loaded.format, loaded.site, loaded.write_sites) == ("saelens", Site(2, "mlp_out"), (Site(2, "mlp_out"),))
    (tmp_path / "anything" / "sae_weights.safetensors").unlink()
    assert not saelens.recognises(tmp_path / "anything")


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("jumprelu", {"b_enc": torch.zeros(4), "threshold": torch.ones(4)}),
        ("batchtopk", {"b_enc": torch.zeros(4), "topk_threshold": torch.tensor(1.0, dtype=torch.float64)}),
        ("gated", {"b_gate": -torch.ones(4), "b_mag": torch.zeros(4), "r_mag": torch.zeros(4)}),
    ],
)
def test_a_feature_at_its_threshold_is_off(architecture: str, own: dict[str, Tensor], tmp_path: Path) -> None:
    weights = {"W_enc": torch.eye(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)} | own
    save_sae(
        replace(plain_sae("standard", 4, 4, seed=33), architecture=architecture, weights=weights), tmp_path, "hook"
    )
    x = torch.tensor([0.0, 1.0, 1.5, -2.0])
    assert saelens.parse(Source(tmp_path)).dictionary.encode(x).tolist() == [0.0, 0.0, 1.5, 0.0]

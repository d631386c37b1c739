"""What is picked, against every feature computed in float64 by the formulas and sorted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeguard_sae import encoding
from saeguard_sae.dictionary import (
    AbsTopK,
    ActivationFunction,
    Dictionary,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TanhReLU,
    TopK,
)
from saeguard_sae.encoding import FeatureSelector, SelectedFeatures, above_of, largest_per_row, named_of, top_of
from saeguard_sae.ranks import has_bfloat16
from support.coders import SAVEABLE

D, F = 24, 8200
HAS_BFLOAT16 = has_bfloat16(torch.device("cpu"))


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ACTIVATIONS: dict[str, Callable[[int], ActivationFunction]] = {
    "relu": lambda seed: ReLU(),
    "tanh_relu": lambda seed: TanhReLU(),
    "jumprelu": lambda seed: JumpReLU(normals(seed, F) * 0.5 + 1.5),
    "gated": lambda seed: Gated(normals(seed, F) - 1, normals(seed + 1, F) * 0.1, normals(seed + 2, F) * 0.3),
    "topk": lambda seed: TopK(11),
    "topk_gain": lambda seed: TopK(20, gain=normals(seed, F).abs()),
    "topk_negative": lambda seed: TopK(F - 3, keeps_negative=True),
    "abstopk": lambda seed: AbsTopK(30),
    "groupmax": lambda seed: GroupMax(40),
}
FAST = ("relu", "tanh_relu", "jumprelu", "gated", "topk", "topk_gain")


def sae(name: str, seed: int, **own: Any) -> Dictionary:
    W_enc = normals(seed, D, F) * D**-0.5
    b_enc = torch.zeros(F) if name == "gated" else normals(seed + 1, F) * 0.2
    activation = ACTIVATIONS[name](seed + 4)
    return Dictionary(W_enc, b_enc, normals(seed + 2, F, D), normals(seed + 3, D) * 0.1, activation, **own)


def formula(one: Dictionary, x: Tensor) -> Tensor:
    """[N, F] every feature in float64."""
    x = x.double()
    if one.normalisation == "layer_norm":
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
    p = (x - one.b_dec.double() if one.centre else x) @ one.W_enc.double() + one.b_enc.double()
    match one.activation:
        case ReLU():
            return p.relu()
        case TanhReLU():
            return p.relu().tanh()
        case JumpReLU(threshold):
            return torch.where(p > threshold.double(), p.relu(), 0.0)
        case Gated(gate, magnitude, gain):
            return torch.where(p + gate.double() > 0, (p * gain.double().exp() + magnitude.double()).relu(), 0.0)
        case GroupMax(k):
            blocks = p.view(len(p), k, -1)
            return torch.where(blocks == blocks.amax(-1, keepdim=True), blocks.relu(), 0.0).flatten(1)
        case TopK() | AbsTopK():
            return _selected(one.activation, p)
    raise AssertionError(one.activation)


def _selected(activation: TopK | AbsTopK, p: Tensor) -> Tensor:
    score = p.abs() if isinstance(activation, AbsTopK) else p
    worst = score.sort(dim=-1, descending=True).values[:, activation.k - 1 : activation.k]
    kept = p if isinstance(activation, AbsTopK) or activation.keeps_negative else p.relu()
    gain = 1.0 if activation.gain is None else activation.gain.double()
    return torch.where(score >= worst, kept * gain, 0.0)


def check_top(found: SelectedFeatures, wanted: Tensor, k: int) -> None:
    """As many as asked for, largest first; each its own value, and in each place as large as the reference's."""
    assert found.values.dtype == torch.float32
    assert found.features.shape == found.values.shape == found.keep.shape
    best = wanted.abs().sort(dim=-1, descending=True).values[:, :k]
    # Fewer columns where fewer can be on.
    values = torch.nn.functional.pad(found.values.abs().double(), (0, best.shape[1] - found.values.shape[1]))
    torch.testing.assert_close(values, best, rtol=2e-5, atol=2e-5)
    assert found.keep.equal(found.values != 0)
    for row, keep in enumerate(found.keep):
        index = found.features[row][keep]
        assert len(set(index.tolist())) == len(index)
        torch.testing.assert_close(found.values[row][keep].double(), wanted[row, index], rtol=2e-5, atol=2e-5)


def check_above(found: SelectedFeatures, wanted: Tensor, threshold: float) -> None:
    """All that are clearly above, none that is clearly not, largest first."""
    near = 2e-5 * (1 + abs(threshold))
    for row, keep in enumerate(found.keep):
        index, values = found.features[row][keep], found.values[row][keep].double()
        must = (wanted[row].abs() > threshold + near).nonzero()[:, 0].tolist()
        assert set(must) <= set(index.tolist())
        assert len(set(index.tolist())) == len(index)
        assert (wanted[row, index].abs() > threshold - near).all()
        torch.testing.assert_close(values, wanted[row, index], rtol=2e-5, atol=2e-5)
        assert (values.abs().diff() <= 0).all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_kind_of_pick_of_every_kind_of_sae(name: str, fast: bool) -> None:
    one, x = sae(name, 100), normals(101, 19, D)
    picker, wanted = FeatureSelector(one, fast=fast), formula(one, x)
    assert picker.prepare() == (fast and name in FAST and HAS_BFLOAT16)
    for k in (1, 16, 60):
        check_top(picker.top(x, k), wanted, k)
    for threshold in (0.0, 0.4, 2.5, 50.0):
        check_above(picker.above(x, threshold), wanted, threshold)
    names = (5, 8199, 17, 5, 4000)
    found = picker.named(x, names)
    assert found.features.tolist() == [list(names)] * 19
    assert found.keep.all()
    torch.testing.assert_close(found.values.double(), wanted[:, names], rtol=2e-5, atol=2e-5)


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(FAST),
    k=st.integers(1, 80),
    size=st.sampled_from([0.01, 1.0, 40.0]),
    outlier=st.sampled_from([0.0, 100.0]),
    halves=st.booleans(),
    own=st.sampled_from([{}, {"centre": False}, {"normalisation": "layer_norm"}]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_largest_in_any_company(
    seed: int, name: str, k: int, size: float, outlier: float, halves: bool, own: dict[str, Any]
) -> None:
    one, x = sae(name, 20_000 + seed, **own), normals(seed, 6, D) * size
    x[:3, 2] += outlier * size
    x[3] = x[4]
    x = x.bfloat16() if halves else x
    check_scaled(FeatureSelector(one).top(x, k), formula(one, x), k)


def check_scaled(found: SelectedFeatures, wanted: Tensor, k: int) -> None:
    """As ``check_top``, in units of each token's largest."""
    unit = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1)
    check_top(found._replace(values=found.values / unit.float()), wanted / unit, k)


def test_features_that_bfloat16_cannot_tell_apart() -> None:
    """Six thousand copies of one direction that differ in the fourth digit: only float32 knows which are largest."""
    one = sae("relu", 30)
    W_enc = one.W_enc.clone()
    W_enc[:, :6000] = W_enc[:, :1] * (1 + 1e-3 * normals(31, 6000))
    copies = Dictionary(W_enc, torch.zeros(F), one.W_dec, torch.zeros(D), ReLU())
    x = normals(32, 6, D) + 4 * one.W_enc[:, 0]
    check_top(FeatureSelector(copies).top(x, 16), formula(copies, x), 16)


def test_a_few_more_than_the_spare_candidates_are_looked_at_before_everything_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fifty copies: more than 16 and their spares, fewer than pay."""
    one = sae("relu", 33)
    W_enc = one.W_enc.clone()
    W_enc[:, 100:150] = W_enc[:, :1] * (1 + 1e-4 * normals(34, 50))
    copies = Dictionary(W_enc, torch.zeros(F), one.W_dec, torch.zeros(D), ReLU())
    x = normals(35, 6, D) * 0.1 + 4 * one.W_enc[:, 0]
    wanted, asked = formula(copies, x), []
    monkeypatch.setattr(
        encoding, "largest_per_row", lambda values, n: asked.append((len(values), n)) or largest_per_row(values, n)
    )
    check_top(FeatureSelector(copies).top(x, 16), wanted, 16)
    if HAS_BFLOAT16:
        assert (6, 33) in asked
        assert (6, 129) in asked
        assert not any(values == 16 for _, values in asked)


@pytest.mark.parametrize("name", FAST)
def test_tokens_that_are_not_finite_are_as_if_all_were_encoded(name: str) -> None:
    one, x = sae(name, 40), normals(41, 5, D)
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    found, wanted = FeatureSelector(one).top(x, 11), FeatureSelector(one, fast=False).top(x, 11)
    assert found.keep.equal(wanted.keep)
    torch.testing.assert_close(found.values, wanted.values, equal_nan=True, rtol=2e-5, atol=2e-5)
    above, wanted = FeatureSelector(one).above(x, 1.0), FeatureSelector(one, fast=False).above(x, 1.0)
    assert above.keep.sum(dim=-1).equal(wanted.keep.sum(dim=-1))


def test_a_sparse_token_is_settled_among_the_features_that_may_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds keep all but a few of the largest off, so that the first candidates prove nothing."""
    base, x = sae("relu", 64), normals(65, 6, D)
    threshold = torch.where(torch.arange(F) % 100 == 0, 0.0, 50.0)
    one = Dictionary(base.W_enc, base.b_enc, base.W_dec, base.b_dec, JumpReLU(threshold))
    wanted, asked = formula(one, x), []

    widest = 0

    def counted(values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """It looks into itself for narrower rows; those calls are not counted."""
        nonlocal widest
        widest = max(widest, values.shape[1])
        if values.shape[1] == widest:
            asked.append((len(values), n))
        return largest_per_row(values, n)

    monkeypatch.setattr(encoding, "largest_per_row", counted)
    check_top(FeatureSelector(one).top(x, 16), wanted, 16)
    if HAS_BFLOAT16:
        assert asked == [(6, 33), (6, 33)]


def test_parts_of_a_batch_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = sae("jumprelu", 50), normals(51, 19, D) * torch.linspace(0.2, 3, 19)[:, None]
    wanted = formula(one, x)
    monkeypatch.setattr(encoding, "CELLS", 4 * F)
    for fast in (True, False):
        check_top(FeatureSelector(one, fast=fast).top(x, 16), wanted, 16)
        check_above(FeatureSelector(one, fast=fast).above(x, 1.5), wanted, 1.5)


def test_many_above_the_threshold() -> None:
    one, x = sae("relu", 52), normals(53, 4, D)
    check_above(FeatureSelector(one).above(x, 0.0), formula(one, x), 0.0)


@pytest.mark.parametrize("ties", ["first", "last"])
def test_where_fewer_are_on_than_were_asked_for(ties: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last feature, beside which there are rows that are none; whichever of equals ``topk`` takes."""
    one = sae("relu", 62)
    b_enc = torch.full((F,), -100.0)
    b_enc[-1] = 100.0
    one = Dictionary(one.W_enc, b_enc, one.W_dec, one.b_dec, ReLU())
    x = normals(63, 5, D)
    if ties == "last":
        monkeypatch.setattr(encoding, "largest_per_row", last_of_ties)
    for found in (FeatureSelector(one).top(x, 16), FeatureSelector(one).above(x, 1.0)):
        assert found.keep.sum(dim=-1).tolist() == [1] * 5
        assert (found.features[:, 0] == F - 1).all()
    for k in (16, 40, 80):
        check_top(FeatureSelector(one).top(x, k), formula(one, x), k)
    assert FeatureSelector(one).above(x, -1.0).keep.sum(dim=-1).tolist() == [F] * 5


def last_of_ties(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    found, index = values.flip(1).sort(dim=1, descending=True, stable=True)
    return found[:, :n], values.shape[1] - 1 - index[:, :n]


def test_a_view_of_a_wider_tensor_and_no_tokens_at_all() -> None:
    one, wide = sae("relu", 54, centre=False), normals(55, 7, 2 * D)
    check_top(FeatureSelector(one).top(wide[:, ::2], 16), formula(one, wide[:, ::2]), 16)
    with torch.inference_mode():
        check_top(FeatureSelector(one).top(wide[:, :D], 16), formula(one, wide[:, :D]), 16)
    for fast in (True, False):
        picker = FeatureSelector(one, fast=fast)
        assert picker.top(wide[:0, :D], 16).values.shape == (0, 16)
        assert picker.above(wide[:0, :D], 1.0).values.shape[0] == 0
        assert picker.named(wide[:0, :D], (1, 2)).values.shape == (0, 2)


def test_in_half_precision_everything_is_encoded() -> None:
    one, x = sae("relu", 56).to("cpu", torch.bfloat16), normals(57, 5, D)
    picker = FeatureSelector(one)
    assert not picker.prepare()
    wanted = one.encode(x).float()
    assert picker.top(x, 16).values.equal(wanted.sort(dim=-1, descending=True).values[:, :16])
    assert picker.named(x, (3, 9)).values.dtype == torch.float32


def test_more_than_there_are() -> None:
    assert FeatureSelector(sae("relu", 58)).top(normals(59, 2, D), F + 7).values.shape == (2, F)


@pytest.mark.parametrize("name", [name for name in SAVEABLE if "temporal" not in name])
def test_small_saes_of_every_kind_equal_their_own_encoding(name: str) -> None:
    one = SAVEABLE[name](60)
    x = normals(61, 9, one.d_in)
    features, picker = one.encode(x).float(), FeatureSelector(one)
    signed = name == "abstopk"
    for found, wanted in (
        (picker.top(x, 5), top_of(features, 5, signed=signed)),
        (picker.above(x, 0.2), above_of(features, 0.2, signed=signed)),
        (picker.named(x, (7, 0, 47)), named_of(features, (7, 0, 47))),
    ):
        torch.testing.assert_close(found.values * found.keep, wanted.values * wanted.keep)
    size = features.abs() if signed else features
    torch.testing.assert_close(picker.top(x, 5).values.abs(), size.sort(dim=-1, descending=True).values[:, :5])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FeatureSelector(SAVEABLE["relu"](60)).top(normals(61, 2, 20), 0)
    with pytest.raises(ValueError, match="whole prefixes"):
        FeatureSelector(SAVEABLE["temporal"](60))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    x = normals(71, 19, D)
    for name in ACTIVATIONS:
        one = sae(name, 70)
        picker, wanted = FeatureSelector(one.to("cuda")), formula(one, x)
        assert picker.prepare() == (name in FAST)
        check_top(SelectedFeatures(*(part.cpu() for part in picker.top(x.cuda(), 16))), wanted, 16)
        check_above(SelectedFeatures(*(part.cpu() for part in picker.above(x.cuda(), 1.0))), wanted, 1.0)

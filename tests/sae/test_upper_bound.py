"""The bounds against pre-activations in float64: never below one, and not much above."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeguard_sae.dictionary import ActivationFunction, Dictionary, Gated, JumpReLU, ReLU, TanhReLU, TopK
from saeguard_sae.ranks import UpperBound, checked_number, has_bfloat16

D, F = 21, 500  # neither a multiple of anything

pytestmark = pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU multiplies no bfloat16")


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary(seed: int, activation: ActivationFunction, spread: float = 1.0, bias: float = 1.0) -> Dictionary:
    """Encoder rows of very different sizes, where ``spread`` says so."""
    W_enc = normals(seed, D, F) * torch.exp(spread * normals(seed + 1, F))
    return Dictionary(W_enc, bias * normals(seed + 2, F), normals(seed + 3, F, D), torch.zeros(D), activation)


def ceiling(sae: Dictionary) -> UpperBound:
    found = UpperBound.of(sae)
    assert found is not None
    return found


def limits(sae: Dictionary, z: Tensor, above: float = 0.0) -> Tensor:
    """[N, F] in float64, 0 for what is certainly off."""
    one = ceiling(sae)
    return checked_number(one.without_those_off(one(z), above).pattern)[:, :F].double()


def exactly(sae: Dictionary, z: Tensor) -> Tensor:
    """[N, F] pre-activations in float64."""
    return z.double() @ sae.W_enc.double() + sae.b_enc.double()


@given(
    seed=st.integers(0, 10_000),
    size=st.floats(-6, 6),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    bias=st.sampled_from([0.0, 1.0, 1e4]),
    outlier=st.sampled_from([0.0, 1e3]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_pre_activation_is_above_its_bound(
    seed: int, size: float, spread: float, bias: float, outlier: float
) -> None:
    sae = dictionary(seed, ReLU(), spread, bias)
    z = normals(seed + 4, 7, D) * 10**size
    z[:, 3] += outlier * 10**size
    bounds = ceiling(sae)(z)
    assert bounds.holds.all()
    limit = checked_number(bounds.pattern)[:, :F].double()
    pre = exactly(sae, z)
    assert (limit >= pre.relu()).all()
    # Each rounding to bfloat16 loses at most 2**-8, and there are three: token, row, and the bound itself.
    most = z.double().norm(dim=1)[:, None] * sae.W_enc.double().norm(dim=0)
    loose = (limit - pre.relu())[pre > 0]
    assert (loose <= (2.1 * 2**-8 * most + 2.2 * 2**-8 * (pre + most * 2**-7) + 2**-6 * sae.b_enc.abs())[pre > 0]).all()


def test_it_holds_where_squares_underflow() -> None:
    """The token loses all that a rounding can lose, and so does the bound: 256.9 is 256 in bfloat16."""
    W_enc = torch.full((D, F), 12.75)
    W_enc[20] = 1.875
    sae = Dictionary(W_enc, torch.zeros(F), W_enc.T, torch.zeros(D), ReLU())
    z = torch.full((1, D), 2.0**-70 * (1 + 0.99 * 2**-8))
    assert (checked_number(ceiling(sae)(z).pattern)[:, :F].double() >= exactly(sae, z)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_token_that_sums_might_not_hold_is_told(value: float) -> None:
    z = normals(7, 3, D)
    z[1, 4] = value
    assert ceiling(dictionary(8, ReLU()))(z).holds.tolist() == [True, False, True]


def test_what_is_off_for_certain_is_0_and_nothing_else_is() -> None:
    z = normals(9, 40, D)
    threshold = normals(10, F) * 3
    sae = dictionary(11, JumpReLU(threshold))
    kept = limits(sae, z) > 0
    pre, limit = exactly(sae, z), threshold.double()
    on = (pre > 0) & (pre > limit)
    assert kept[on].all()
    margin = 2**-6 * (limit.abs() + z.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0) * 2) + 2**-6
    assert not kept[(pre < limit - margin) | (pre < -margin)].any()


def test_a_gate_is_a_threshold() -> None:
    z = normals(12, 40, D)
    gate, magnitude, gain = normals(13, F), normals(14, F), normals(15, F)
    sae = dictionary(16, Gated(gate, magnitude, gain), bias=0.0)
    q = exactly(sae, z)
    value = (q * gain.double().exp() + magnitude.double()).relu() * (q + gate.double() > 0)
    limit = limits(sae, z)
    assert (limit >= value).all()
    assert (limit[value == 0] == 0).float().mean() > 0.9


def test_what_cannot_exceed_a_value_is_0() -> None:
    z, sae = normals(17, 40, D), dictionary(18, ReLU())
    kept = limits(sae, z, 4.0) > 0
    pre = exactly(sae, z)
    assert kept[pre > 4.0].all()
    assert not kept[pre < 1.0].all()
    assert kept.float().mean() < (pre > 0).float().mean()


def test_past_the_last_feature_all_is_0() -> None:
    for activation in (ReLU(), TanhReLU(), TopK(5), JumpReLU(torch.full((F,), 0.5))):
        assert (ceiling(dictionary(19, activation))(normals(20, 5, D)).pattern[:, F:] == 0).all()


def test_weights_that_it_cannot_bound_have_none() -> None:
    sae = dictionary(21, ReLU())
    assert UpperBound.of(sae.to("cpu", torch.bfloat16)) is None
    huge = Dictionary(sae.W_enc * 1e30, sae.b_enc, sae.W_dec, sae.b_dec, ReLU())
    assert UpperBound.of(huge) is None
    assert not has_bfloat16(torch.device("meta"))

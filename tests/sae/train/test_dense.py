"""ReLU, gated and JumpReLU: their losses by formula in float64, and a dictionary that we made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard_sae.train import SaeSettings, make_learner
from saeguard_sae.train.dense import DenseLearner
from support.dictionaries import TRUE_FEATURES, observations, recovery, truth
from support.training import evaluate, shuffled, train

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = SaeSettings(
    d_sae=TRUE_FEATURES, architecture="relu", sparsity=1.0, steps=600, batch=256, learning_rate=5e-3, seed=5
)
KINDS: list[dict[str, Any]] = [
    {"architecture": "relu", "sparsity": 1.5},
    {"architecture": "gated", "sparsity": 2.5},
    {"architecture": "jumprelu", "sparsity": 0.3, "jump_loss": "tanh"},
    {"architecture": "jumprelu", "sparsity": 0.3, "jump_loss": "l0"},
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["architecture"] + kind.get("jump_loss", ""))


def learner(x: Tensor, **more: Any) -> DenseLearner:
    made = make_learner(replace(SETTINGS, **more), x)
    assert isinstance(made, DenseLearner)
    return made


@each_kind
def test_recovers_a_known_dictionary(kind: dict[str, Any]) -> None:
    rows = truth(11)
    dictionary = train(replace(SETTINGS, **kind), observations(rows, 10_000, 11))
    fit = evaluate(dictionary, observations(rows, 5_000, 12))
    assert recovery(dictionary.W_dec, rows) > 0.85
    assert fit.fvu < 0.4
    assert fit.l0 < TRUE_FEATURES / 3


@each_kind
def test_the_loss_and_its_gradients_are_the_papers(kind: dict[str, Any]) -> None:
    x = observations(truth(12), 2_000, 13)
    mine = learner(x, **kind, warm_up=0.0)
    generator = torch.Generator().manual_seed(83_000)
    for name, tensor in mine.weights.items():
        if name != "log_threshold":
            tensor.detach().add_(0.05 * torch.randn(tensor.shape, generator=generator))
    mine.steps = 300
    loss, _, _ = mine._loss(x[:200], None)
    loss.backward()  # type: ignore[no-untyped-call]
    W = {name: tensor.detach().double().requires_grad_() for name, tensor in mine.weights.items()}
    wanted = _formula(mine, W, x[:200].double() / mine.scaling.read) / mine.scaling.variance
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, tensor in mine.weights.items():
        if name == "log_threshold":
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0
            continue
        mine_grad, theirs = tensor.grad, W[name].grad
        assert mine_grad is not None
        assert theirs is not None
        torch.testing.assert_close(mine_grad.double(), theirs, rtol=1e-3, atol=1e-5)


def _formula(mine: DenseLearner, W: dict[str, Tensor], x: Tensor) -> Tensor:
    settings = mine.settings
    own = (x - W["b_dec"]) @ W["W_enc"].T
    norms = W["W_dec"].norm(dim=1)
    more = torch.zeros((), dtype=torch.float64)
    match settings.architecture, settings.jump_loss:
        case "relu", _:
            f = (own + W["b_enc"]).relu()
            price = (f * norms).sum(1)
        case "gated", _:
            gate = own + W["b_enc"]
            f = (own * W["r_mag"].exp() + W["b_mag"]).relu() * (gate > 0)
            price = (gate.relu() * norms).sum(1)
            alone = gate.relu() @ W["W_dec"].detach() + W["b_dec"].detach()
            more = (alone - x).square().sum(1).mean()
        case _, "tanh":
            pre, theta = own + W["b_enc"], W["log_threshold"].exp()
            f = pre * (pre > theta)
            price = torch.tanh(4 * f * norms).sum(1)
            more = 3e-6 * ((theta - pre).relu() * norms).sum(1).mean()
        case _:
            pre, theta = own + W["b_enc"], W["log_threshold"].exp()
            f = pre * (pre > theta)
            price = (pre > theta).double().sum(1)
    slow = settings.architecture == "jumprelu" and settings.jump_loss == "tanh"
    weight = settings.sparsity * (301 / settings.steps if slow else 1.0)
    return (f @ W["W_dec"] + W["b_dec"] - x).square().sum(1).mean() + weight * price.mean() + more


def test_thresholds_gradient_is_the_papers_rectangle() -> None:
    """Rajamanoharan et al. 2024, equations 11 and 12: by hand, over every token near the jump."""
    x = observations(truth(13), 2_000, 14)
    mine = learner(x, architecture="jumprelu", jump_loss="l0", sparsity=0.3, warm_up=0.0)
    mine.weights["log_threshold"].detach().fill_(torch.tensor(0.3).log())
    mine._loss(x[:1_500], None)[0].backward()  # type: ignore[no-untyped-call]
    W = {name: tensor.detach().double() for name, tensor in mine.weights.items()}
    scaled = x[:1_500].double() / mine.scaling.read
    pre, theta, width = (scaled - W["b_dec"]) @ W["W_enc"].T + W["b_enc"], 0.3, 2.0
    f = pre * (pre > theta)
    error = f @ W["W_dec"] + W["b_dec"] - scaled
    near = ((pre - theta).abs() < width / 2).double() / width
    by_jump = -theta * near * (2 * error @ W["W_dec"].T)
    by_theta = (by_jump - 0.3 * near).sum(0) / 1_500 / mine.scaling.variance
    grad = mine.weights["log_threshold"].grad
    assert grad is not None
    assert near.sum() > 0
    torch.testing.assert_close(grad.double(), by_theta * theta, rtol=1e-3, atol=1e-6)


@each_kind
def test_export_computes_what_was_trained(kind: dict[str, Any]) -> None:
    x = observations(truth(14), 4_000, 15)
    mine = learner(x, **kind)
    for rows, _ in zip(shuffled(len(x), 256, 2), range(30), strict=False):
        mine.step(x[rows])
    dictionary = mine.export()
    with torch.no_grad():
        scaled = x / mine.scaling.read
        read = mine._read(scaled - mine.weights["b_dec"], scaled)
        wanted = (read.features @ mine.weights["W_dec"] + mine.weights["b_dec"]) * mine.scaling.written
    torch.testing.assert_close(dictionary.reconstruct(x), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(TRUE_FEATURES))


@each_kind
def test_state_goes_on_bit_for_bit(kind: dict[str, Any]) -> None:
    x = observations(truth(15), 4_000, 16)
    batches = [rows for rows, _ in zip(shuffled(len(x), 256, 3), range(30), strict=False)]
    whole, first = learner(x, **kind), learner(x, **kind)
    for rows in batches:
        whole.step(x[rows])
    for rows in batches[:13]:
        first.step(x[rows])
    kept = {name: tensor.clone() for name, tensor in first.state().items()}
    second = learner(x[:300], **kind)
    second.load_state(kept)
    for rows in batches[13:]:
        second.step(x[rows])
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name

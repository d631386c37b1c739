"""The trainer finds a dictionary that we made, revives dead features, and exports what it learnt."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saeguard_sae.activations import JumpReLU
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.train import Learner, TrainSettings, evaluate, shuffled, train
from saeguard_sae.train.learner import batch_threshold

D_IN, TRUE_FEATURES, ACTIVE = 24, 40, 2
SETTINGS = TrainSettings(d_sae=40, k=ACTIVE, steps=500, batch=256, learning_rate=5e-3, seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def truth(seed: int) -> Tensor:
    """Unit rows [TRUE_FEATURES, D_IN]. Its seeds are never the trainer's: shared ones would leak the answer."""
    rows = torch.randn(TRUE_FEATURES, D_IN, generator=torch.Generator().manual_seed(90_000 + seed))
    return rows / rows.norm(dim=1, keepdim=True)


def observations(rows: Tensor, tokens: int, seed: int) -> Tensor:
    """Sparse positive mixtures of the rows plus a constant, [tokens, D_IN], of no particular scale."""
    generator = torch.Generator().manual_seed(80_000 + seed)
    fires = torch.rand(tokens, len(rows), generator=generator) < ACTIVE / len(rows)
    strength = fires * (0.5 + torch.rand(tokens, len(rows), generator=generator))
    return 7.0 * (strength @ rows) + 2.0


def recovery(dictionary: Dictionary, rows: Tensor) -> float:
    """Mean over the true rows of the best cosine among the learnt ones (MMCS)."""
    learnt = dictionary.W_dec / dictionary.W_dec.norm(dim=1, keepdim=True)
    return float((rows @ learnt.T).max(1).values.mean())


@pytest.mark.parametrize("widths", [(), (10, 40)])
def test_recovers_a_known_dictionary(widths: tuple[int, ...]) -> None:
    rows = truth(1)
    dictionary = train(replace(SETTINGS, widths=widths), observations(rows, 10_000, 1))
    # An untrained SAE of this size scores about 0.47; one whose decoder gets no gradient 0.47 too.
    assert recovery(dictionary, rows) > 0.9
    assert evaluate(dictionary, observations(rows, 5_000, 2)).fvu < 0.2


def test_a_trainer_that_cannot_move_the_decoder_is_seen_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(self: Learner) -> None:
        self.W_dec.grad = None

    monkeypatch.setattr(Learner, "project_gradient", drop)
    rows = truth(1)
    assert recovery(train(SETTINGS, observations(rows, 10_000, 1)), rows) < 0.7


def test_exported_threshold_gives_the_trained_sparsity() -> None:
    rows = truth(2)
    dictionary = train(SETTINGS, observations(rows, 10_000, 3))
    assert evaluate(dictionary, observations(rows, 5_000, 4)).l0 == pytest.approx(ACTIVE, rel=0.25)


@pytest.mark.parametrize(("aux_weight", "revives"), [(1 / 32, True), (0.0, False)])
def test_auxk_revives_features_that_died(aux_weight: float, revives: bool) -> None:
    x = observations(truth(3), 10_000, 5)
    learner = Learner(replace(SETTINGS, aux_weight=aux_weight, steps=400), x)
    with torch.no_grad():
        learner.b_enc[:20] = -3.0
    optimiser = torch.optim.Adam(learner.parameters(), lr=3e-3)
    for step, rows in zip(range(400), shuffled(len(x), 256, 0), strict=False):
        optimiser.zero_grad()
        learner.loss(x[rows], step).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        learner.normalise()
    dead = float((learner.silent[:20] > 20).float().mean())
    # Without AuxK about 0.95 of them stay dead; with it about 0.35, those whose pre-activation nothing lifts above 0.
    assert dead < 0.5 if revives else dead > 0.8


def test_export_folds_the_scale_and_reads_the_same_numbers() -> None:
    x = observations(truth(4), 4_000, 6)
    learner = Learner(replace(SETTINGS, k=4), x)
    with torch.no_grad():
        for step in range(3):
            learner.loss(x[:256], step)
        learner.b_enc += 0.01 * torch.arange(40)
    dictionary = learner.export()
    scaled = x.double() / learner.scale
    pre = (scaled - learner.b_dec.double()) @ learner.W_enc.double() + learner.b_enc.double()
    wanted = torch.where(pre > learner.threshold.double(), pre.clamp(min=0), 0.0) * learner.scale
    assert isinstance(dictionary.activation, JumpReLU)
    torch.testing.assert_close(dictionary.encode(x).double(), wanted, rtol=1e-4, atol=1e-3)


def test_matryoshka_loss_is_the_mean_over_prefixes() -> None:
    x = observations(truth(5), 2_000, 7)
    learner = Learner(replace(SETTINGS, widths=(8, 40)), x)
    scaled = x[:256] / learner.scale
    positive = ((scaled - learner.b_dec) @ learner.W_enc + learner.b_enc).relu()
    features = positive * (positive >= batch_threshold(positive, ACTIVE))
    errors = [(features[:, :w] @ learner.W_dec[:w] + learner.b_dec - scaled).square().sum(1).mean() for w in (8, 40)]
    wanted = sum(errors) / 2 / learner.variance
    torch.testing.assert_close(learner.loss(x[:256], 0), wanted, rtol=1e-4, atol=1e-5)


def test_smoothness_cannot_be_had_by_features_that_never_change() -> None:
    """A constant added to a feature leaves the term as it is, and white noise costs 1."""
    x = observations(truth(7), 4_000, 9)
    learner = Learner(replace(SETTINGS, widths=(8, 40)), x)
    now, before = x[:2000] / learner.scale, x[2000:] / learner.scale
    with torch.no_grad():
        terms = []
        for offset in (50.0, 500.0):
            learner.b_enc.fill_(offset)
            positive = ((now - learner.b_dec) @ learner.W_enc + learner.b_enc).relu()
            terms.append(float(learner._change(positive, before)))
    assert terms == pytest.approx([1.0, 1.0], abs=0.1)


def test_smoothness_asks_for_predecessors() -> None:
    with pytest.raises(ValueError, match="predecessor"):
        train(replace(SETTINGS, smooth_weight=0.5), torch.randn(1000, D_IN))


def test_batch_threshold_keeps_k_per_token_on_average() -> None:
    positive = torch.rand(100, 50, generator=torch.Generator().manual_seed(1))
    assert int((positive >= batch_threshold(positive, 7)).sum()) == 700


def test_the_same_seed_gives_the_same_sae_and_another_does_not() -> None:
    x = observations(truth(6), 4_000, 8)
    short = replace(SETTINGS, steps=5)
    assert torch.equal(train(short, x).W_dec, train(short, x).W_dec)
    assert not torch.equal(train(short, x).W_dec, train(replace(short, seed=6), x).W_dec)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 41}, {"widths": (40, 10)}, {"widths": (16,)}, {"steps": 0}])
def test_refuses_settings_that_cannot_work(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(SETTINGS, **wrong)


def test_refuses_fewer_activations_than_a_batch() -> None:
    with pytest.raises(ValueError, match="256"):
        next(shuffled(10, 256, 0))

"""Activations of training against plain hooks on Hugging Face models, and that nothing is computed behind the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard_sae.models import Site
from saeguard_sae.train.activations import ActivationReader
from saeguard_sae.train.data import LanguageModel, TokenRows
from saeguard_sae.train.settings import TrainError
from support.models import CONFIGS, SITES, WIDTH
from support.streams import plain_activations, small_model


def some_rows(seed: int, rows: int = 3, context: int = 11) -> TokenRows:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, context), generator=random)
    kept = torch.rand(rows, context, generator=random) > 0.3
    return TokenRows(ids, kept, tuple(range(5, 5 + rows)), first=41)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_all_sites_of_one_pass_are_what_plain_hooks_see(tmp_path: Path, model_type: str) -> None:
    model = small_model(tmp_path, model_type)
    wanted = [Site(0 if point == "embed" else 1, point) for point in SITES[model_type]]  # type: ignore[arg-type]
    rows = some_rows(71)
    found = ActivationReader(model, wanted).read(rows)
    assert set(found) == set(wanted)
    for site in wanted:
        plain = plain_activations(model.network, model_type, site, rows.ids)
        assert torch.equal(found[site], plain[rows.mask]), site


def test_the_residual_stream_is_transformers_own(llama: LanguageModel) -> None:
    rows = some_rows(72)
    states = llama.network(input_ids=rows.ids, output_hidden_states=True).hidden_states
    sites = [Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_post")]
    found = ActivationReader(llama, sites).read(rows)
    for site, state in zip(sites, states, strict=False):
        assert torch.equal(found[site], state[rows.mask])


def test_what_the_norm_makes_of_the_stream(llama: LanguageModel) -> None:
    rows, site = some_rows(73), Site(1, "mlp_normalized")
    x = plain_activations(llama.network, "llama", Site(1, "mlp_read"), rows.ids)[rows.mask].double()
    eps = llama.config.rms_norm_eps
    wanted = x / (x.square().mean(dim=1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(ActivationReader(llama, [site]).read(rows)[site].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sites", "blocks", "mlps"),
    [
        (["resid_post.1", "resid_post.0"], 2, 2),
        (["resid_pre.2"], 2, 2),
        (["resid_mid.1"], 1, 1),
        (["embed.0"], 0, 0),
        (["mlp_out.0", "attn_out.0"], 0, 1),
    ],
)
def test_nothing_behind_the_last_site_is_computed(
    llama: LanguageModel, sites: list[str], blocks: int, mlps: int
) -> None:
    """Counts modules that put something out: one that is stopped inside does not."""
    done: dict[str, int] = {"blocks": 0, "mlps": 0, "head": 0}
    network: Any = llama.network

    def count(name: str) -> Any:
        def counted(*_: object) -> None:
            done[name] += 1

        return counted

    handles = [network.lm_head.register_forward_hook(count("head"))]
    for block in network.model.layers:
        handles.append(block.register_forward_hook(count("blocks")))
        handles.append(block.mlp.register_forward_hook(count("mlps")))
    try:
        ActivationReader(llama, [Site.parse(site) for site in sites]).read(some_rows(74))
    finally:
        for handle in handles:
            handle.remove()
    assert done == {"blocks": blocks, "mlps": mlps, "head": 0}


def hooks_of(model: LanguageModel) -> list[int]:
    """How many each module has: transformers puts some there itself."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.network.modules()]


def test_leaves_the_model_as_it_was(llama: LanguageModel) -> None:
    rows = some_rows(75)
    before, hooks = llama.network(input_ids=rows.ids).logits, hooks_of(llama)
    harvester = ActivationReader(llama, [Site(0, "resid_post"), Site(1, "mlp_act")])
    harvester.read(rows)
    assert torch.equal(llama.network(input_ids=rows.ids).logits, before)
    assert hooks_of(llama) == hooks


def test_widths(llama: LanguageModel) -> None:
    sites = [Site(0, "resid_post"), Site(1, "mlp_act")]
    assert ActivationReader(llama, sites).widths() == {sites[0]: WIDTH, sites[1]: 80}


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(llama: LanguageModel, worst: float) -> None:
    rows, site = some_rows(76), Site(1, "resid_post")
    rows.mask[1, 7] = True

    def spoil(_: object, __: object, out: Tensor) -> Tensor:
        out[1, 7, 3] = worst
        return out

    handle = llama.network.model.layers[1].register_forward_hook(spoil)
    try:
        with pytest.raises(TrainError) as caught:
            ActivationReader(llama, [Site(0, "resid_post"), site]).read(rows)
        # What SAEs do not learn from may be what it is.
        rows.mask[1, 7] = False
        ActivationReader(llama, [site]).read(rows)
    finally:
        handle.remove()
    assert "resid_post.1 are not finite" in str(caught.value)
    assert "token 7 of row 42, which begins in document 6" in str(caught.value)


def test_a_site_that_the_model_lacks(llama: LanguageModel) -> None:
    with pytest.raises(TrainError, match=r"has no resid_post\.7; its layers are 0 to 2, its points .*mlp_act"):
        ActivationReader(llama, [Site(7, "resid_post")])
    with pytest.raises(TrainError, match=r"has no attn_raw\.0"):
        ActivationReader(llama, [Site(0, "attn_raw")])
    with pytest.raises(TrainError, match="at least one"):
        ActivationReader(llama, [])

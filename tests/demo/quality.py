"""How well the model and its SAEs do on held-out documents."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from demo.harvest import N_SPECIAL
from demo.steering import cross_entropy
from demo.tokens import Tokens
from saeguard_sae.catalogue import Quality
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.train import evaluate


def loss_by_kind(model: LlamaForCausalLM, documents: list[Tokens]) -> dict[str, float]:
    """Nats per token for each kind of document, and for all."""
    kinds: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for document in documents:
        kinds["all"].append(document.ids)
        kinds[document.kind].append(document.ids)
    return {kind: cross_entropy(model, rows) for kind, rows in kinds.items()}


def quality(
    model: LlamaForCausalLM, layer: int, dictionary: Dictionary, activations: Tensor, documents: list[Tokens]
) -> Quality:
    """Fit on ``activations`` [tokens, d_model], and the loss on their documents with the layer's output replaced.

    Replaced are ordinary tokens only, by the SAE's reconstruction or by the mean activation.
    """
    fit = evaluate(dictionary, activations)
    rows = [document.ids for document in documents]
    mean = activations.mean(0)
    with replaced(model, layer, lambda x: dictionary.decode(dictionary.encode(x))):
        spliced = cross_entropy(model, rows)
    with replaced(model, layer, lambda x: mean.expand_as(x)):
        ablated = cross_entropy(model, rows)
    return Quality(
        l0=round(fit.l0, 3),
        fvu=round(fit.fvu, 5),
        ce_base=round(cross_entropy(model, rows), 4),
        ce_spliced=round(spliced, 4),
        ce_mean_ablated=round(ablated, 4),
        dead_share=round(fit.dead_share, 4),
        tokens=fit.tokens,
    )


@contextmanager
def replaced(model: LlamaForCausalLM, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, the layer's output on ordinary tokens is what ``change`` makes of it."""
    ordinary: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ordinary[:] = [inputs[0] >= N_SPECIAL]

    def swap(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.where(ordinary[0][..., None], change(output), output)

    handles = [
        model.model.embed_tokens.register_forward_pre_hook(note),
        model.model.layers[layer].register_forward_hook(swap),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

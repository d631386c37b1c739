"""What the model does on documents: residual streams and MLP activations of every ordinary token, with its concept."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from demo import corpus
from demo.lm import padded
from demo.tokens import Tokens

N_SPECIAL = len(corpus.SPECIAL)
"""Special tokens have the first ids; SAEs neither learn from them nor are read on them."""


@dataclass(frozen=True, slots=True, eq=False)
class Harvest:
    """One row per ordinary token of the documents."""

    ids: Tensor
    """[tokens]"""
    next_ids: Tensor
    """[tokens] the id that follows."""
    document: Tensor
    """[tokens] index of the token's document."""
    position: Tensor
    """[tokens] index in its document."""
    concepts: tuple[str, ...]
    resid: dict[int, Tensor]
    """Output of a layer [tokens, d_model]."""
    mlp: dict[int, Tensor]
    """Hidden activation of a layer's MLP [tokens, d_mlp]; only where asked for."""

    def labels(self, concept: str) -> Tensor:
        """[tokens] whether the token was written as this concept."""
        return torch.tensor([one == concept for one in self.concepts])

    def before(self) -> Tensor:
        """[tokens] the row of the token before in the same document, or the token's own row."""
        row = torch.arange(len(self.document))
        follows = torch.cat([torch.tensor([False]), self.document[1:] == self.document[:-1]])
        return row - follows.long()


@torch.no_grad()
def harvest(
    model: LlamaForCausalLM, documents: list[Tokens], layers: tuple[int, ...], with_mlp: bool = False, rows: int = 32
) -> Harvest:
    """Runs the documents through the model, ``rows`` of like length at a time; they are numbered by length."""
    documents = sorted(documents, key=lambda document: len(document.ids))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(documents), rows):
        parts.append(_part(model, documents[start : start + rows], layers, with_mlp, start))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    concepts = (
        concept
        for document in documents
        for token, concept in zip(document.ids, document.concepts, strict=True)
        if token >= N_SPECIAL
    )
    return Harvest(
        ids=joined["ids"],
        next_ids=joined["next_ids"],
        document=joined["document"],
        position=joined["position"],
        concepts=tuple(concepts),
        resid={layer: joined[f"resid {layer}"] for layer in layers},
        mlp={layer: joined[f"mlp {layer}"] for layer in layers if with_mlp},
    )


def _part(
    model: LlamaForCausalLM, documents: list[Tokens], layers: tuple[int, ...], with_mlp: bool, start: int
) -> dict[str, Tensor]:
    ids = padded([document.ids for document in documents])
    kept: dict[str, Tensor] = {}
    handles = [_keep_output(model, layer, kept) for layer in layers]
    handles += [_keep_mlp(model, layer, kept) for layer in layers if with_mlp]
    model.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    ordinary = ids >= N_SPECIAL
    rows, columns = ordinary.nonzero(as_tuple=True)
    following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    index = {"ids": ids[ordinary], "next_ids": following[ordinary], "document": rows + start, "position": columns}
    return index | {name: tensor[ordinary] for name, tensor in kept.items()}


def _keep_output(model: LlamaForCausalLM, layer: int, kept: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        kept[f"resid {layer}"] = output

    layers: nn.ModuleList = model.model.layers
    return layers[layer].register_forward_hook(keep)


def _keep_mlp(model: LlamaForCausalLM, layer: int, kept: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[f"mlp {layer}"] = inputs[0]

    projection: nn.Linear = model.model.layers[layer].mlp.down_proj
    return projection.register_forward_pre_hook(keep)

"""What the model does on documents: activations at sites on every ordinary token, with its concept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.lm import N_SPECIAL, Tokens, as_row
from saeguard_sae.models import Site
from saeguard_sae.train.activations import ActivationReader
from saeguard_sae.train.data import LanguageModel, TokenRows
from saeguard_sae.train.quality.evaluation_data import evaluation_batches

PASS_TOKENS = 4096
"""Of one forward pass, padding included."""


@dataclass(frozen=True, slots=True, eq=False)
class Harvest:
    """One row per ordinary token of the documents."""

    ids: Tensor
    """[tokens]"""
    next_ids: Tensor
    """[tokens] the id that follows, 0 at the end of a document."""
    document: Tensor
    """[tokens] index of the token's document."""
    position: Tensor
    """[tokens] index in its document."""
    concepts: tuple[str, ...]
    activations: dict[Site, Tensor]
    """[tokens, width] each."""

    def labels(self, concept: str) -> Tensor:
        """[tokens] whether the token was written as this concept."""
        return torch.tensor([name == concept for name in self.concepts])

    def before(self) -> Tensor:
        """[tokens] the row of the token before in the same document, or the token's own row."""
        row = torch.arange(len(self.document))
        follows = torch.cat([torch.tensor([False]), self.document[1:] == self.document[:-1]])
        return row - follows.long()


def by_length(documents: Iterable[Tokens]) -> list[Tokens]:
    """In the order in which ``harvest`` numbers them."""
    return sorted(documents, key=lambda document: len(document.ids))


def harvest(model: LanguageModel, documents: Iterable[Tokens], sites: Sequence[Site]) -> Harvest:
    """Runs the documents through the model, those of like length together."""
    documents = by_length(documents)
    harvester = ActivationReader(model, sites)
    parts: list[dict[Site, Tensor]] = []
    first = 0
    for batch in evaluation_batches((as_row(document.ids) for document in documents), PASS_TOKENS):
        numbers = range(first, first := first + len(batch.ids))
        parts.append(harvester.read(TokenRows(batch.ids, batch.ordinary, tuple(numbers), numbers.start)))
    tokens = [
        (token, following, number, position, concept)
        for number, document in enumerate(documents)
        for position, (token, following, concept) in enumerate(
            zip(document.ids, (*document.ids[1:], 0), document.concepts, strict=True)
        )
        if token >= N_SPECIAL
    ]
    *columns, concepts = zip(*tokens, strict=True)
    ids, next_ids, numbers_of, positions = (torch.tensor(column) for column in columns)
    activations = {site: torch.cat([part[site] for part in parts]) for site in harvester.sites}
    return Harvest(ids, next_ids, numbers_of, positions, concepts, activations)

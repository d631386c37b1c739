"""Feature activations per token as sparse rows (CSR), and the merging of a stream's parts.

The arrays are ``array.array``, which numpy and scipy take without copying; numpy is imported only when asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token that was read.

    Attributes:
        text: may be a part of a character.
        offset: of its first character in the input's text; None for token ids and for tokens that were added.
    """

    id: int
    text: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of tokens: row i holds ``indices[indptr[i]:indptr[i+1]]`` and the same of ``values``.

    Attributes:
        input: index into the request's inputs.
        indptr: [tokens + 1], int64.
        indices: [stored], uint32; largest value first within a row, in the order asked for with ``features``.
        values: [stored], float32.
    """

    input: int
    sae: str
    tokens: tuple[TokenText, ...]
    indptr: array[int]
    indices: array[int]
    values: array[float]

    def __post_init__(self) -> None:
        stored = len(self.indices)
        rows_fit = len(self.indptr) == len(self.tokens) + 1 and self.indptr[0] == 0 and self.indptr[-1] == stored
        if not rows_fit or len(self.values) != stored:
            raise ValueError("indptr, indices, values and tokens do not fit together")
        if any(self.indptr[i] > self.indptr[i + 1] for i in range(len(self.tokens))):
            raise ValueError("indptr must not fall")

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, i: int) -> tuple[tuple[int, float], ...]:
        """(feature, value) pairs of token ``i``; negative ``i`` counts from the end.

        Raises:
            IndexError: no such token.
        """
        i = range(len(self.tokens))[i]
        stored = slice(self.indptr[i], self.indptr[i + 1])
        return tuple(zip(self.indices[stored], self.values[stored], strict=True))

    def to_numpy(self) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """``(indptr, indices, values)`` over the same memory."""
        import numpy as np

        return np.asarray(self.indptr), np.asarray(self.indices), np.asarray(self.values)

    def to_dense(self, d_sae: int) -> NDArray[np.float32]:
        """[tokens, d_sae], zero where nothing is stored.

        Raises:
            ValueError: ``d_sae`` does not reach the largest index.
        """
        import numpy as np

        if self.indices and max(self.indices) >= d_sae:
            raise ValueError(f"d_sae: must be above the largest index {max(self.indices)}, got {d_sae}")
        indptr, indices, values = self.to_numpy()
        dense = np.zeros((len(self), d_sae), dtype=np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(indptr)), indices] = values
        return dense


@dataclass(frozen=True, slots=True)
class ActivationPart(_Rows):
    """Consecutive tokens of one input under one SAE; ``start`` is the first one's position, ``last`` ends the pair."""

    start: int
    last: bool


@dataclass(frozen=True, slots=True)
class Activations(_Rows):
    """Every token of one input under one SAE."""


def merge(parts: Iterable[ActivationPart]) -> list[Activations]:
    """One matrix per input and SAE, ordered by input and then by first appearance of the SAE.

    Raises:
        ValueError: a part does not begin where the one before it ended.
    """
    pairs: dict[tuple[int, str], _Growing] = {}
    for part in parts:
        pairs.setdefault((part.input, part.sae), _Growing()).add(part)
    ordered = sorted(pairs.items(), key=lambda item: item[0][0])
    return [Activations(index, sae, *grown.arrays()) for (index, sae), grown in ordered]


class _Growing:
    """One matrix while its parts arrive."""

    def __init__(self) -> None:
        self._tokens: list[TokenText] = []
        self._indptr: array[int] = array("q", [0])
        self._indices: array[int] = array("I")
        self._values: array[float] = array("f")

    def add(self, part: ActivationPart) -> None:
        if part.start != len(self._tokens):
            raise ValueError(f"a part starts at token {part.start}, but {len(self._tokens)} are there")
        stored = len(self._indices)
        self._tokens.extend(part.tokens)
        self._indptr.extend(stored + end for end in part.indptr[1:])
        self._indices.extend(part.indices)
        self._values.extend(part.values)

    def arrays(self) -> tuple[tuple[TokenText, ...], array[int], array[int], array[float]]:
        return tuple(self._tokens), self._indptr, self._indices, self._values

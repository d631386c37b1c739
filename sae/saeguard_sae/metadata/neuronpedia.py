"""Neuronpedia's exports: explanations, features with statistics, activations, and features as its API answers them.

The exports are the rows of its tables Explanation, Neuron and Activation, one JSON object a line (``batch-0.jsonl.gz``
below ``v1/<model>/<source>/`` of its datasets), formerly one array. Relied on, and everything else left alone:

- all: ``modelId``, ``layer`` (the source, such as "20-gemmascope-res-16k"), ``index`` (text, or a number);
- explanations: ``description``; ``scores`` with ``value`` and ``explanationScoreTypeName`` (the API has them, the
  exports do not);
- features: ``maxActApprox``, ``frac_nonzero``, ``pos_str`` with ``pos_values`` (the tokens that the decoder's row
  promotes, by their logits); a zero in the first two is the table's default and means unknown;
- activations: ``tokens``, ``values``, ``maxValue``, ``maxValueTokenIndex``;
- the API's features have ``explanations`` and ``activations`` inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from saeguard_sae.catalogue import BadCatalogue, Example, PromotedToken
from saeguard_sae.metadata.entries import Entry, Label, finite, index_of, share
from saeguard_sae.metadata.files import json_records

BOS = (
    "<bos>",
    "<s>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "[CLS]",
    "[BOS]",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
"""Not part of an example's text: encoding the text puts it there again."""
_VOCABULARY = {
    "▁": " ", "Ġ": " ", "Ċ": "\n", "ĉ": "\t", "<0x0A>": "\n", "âĢĶ": "\u2014", "âĢĵ": "\u2013",
    "âĢľ": "\u201c", "âĢĿ": "\u201d", "âĢĺ": "\u2018", "âĢĻ": "\u2019",
}  # fmt: skip
"""Tokens are partly written as vocabularies spell them; the website shows these so."""
_SPELLED = re.compile("|".join(map(re.escape, _VOCABULARY)))
_PATH = re.compile(r" - at `\$\.?(.*)`$")


class _Score(msgspec.Struct):
    value: float
    metric: str | None = msgspec.field(name="explanationScoreTypeName", default=None)


class _Explanation(msgspec.Struct):
    description: str
    scores: list[_Score] | None = None


class _Activation(msgspec.Struct):
    tokens: list[str]
    values: list[float] | None = None
    maximum: float | None = msgspec.field(name="maxValue", default=None)
    position: int | None = msgspec.field(name="maxValueTokenIndex", default=None)


class _Record(msgspec.Struct):
    """A row of any of the tables."""

    index: int | str
    layer: str
    model: str | None = msgspec.field(name="modelId", default=None)
    description: str | None = None
    scores: list[_Score] | None = None
    maximum: float | None = msgspec.field(name="maxActApprox", default=None)
    density: float | None = msgspec.field(name="frac_nonzero", default=None)
    pos_str: list[str] | None = None
    pos_values: list[float] | None = None
    tokens: list[str] | None = None
    values: list[float] | None = None
    max_value: float | None = msgspec.field(name="maxValue", default=None)
    position: int | None = msgspec.field(name="maxValueTokenIndex", default=None)
    explanations: list[_Explanation] | None = None
    activations: list[_Activation] | None = None

    def says_nothing(self) -> bool:
        parts = (self.description, self.maximum, self.density, self.pos_str, self.tokens)
        return all(one is None for one in (*parts, self.explanations, self.activations))


_DECODER = msgspec.json.Decoder(_Record)


def entries(file: Path) -> Iterator[Entry]:
    """Every record of a file.

    Raises:
        BadCatalogue: not JSON, not a record of these tables, or a value that cannot be; names file, line and field.
    """
    for where, data in json_records(file):
        record = _decode(data, where)
        if record.says_nothing():
            raise BadCatalogue(f"{where}: neither description, tokens nor maxActApprox: not a record that is known")
        yield _entry(record, where)


def _decode(data: bytes, where: str) -> _Record:
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError as err:
        found = _PATH.search(str(err))
        at = f"{found[1]}: " if found and found[1] else ""
        raise BadCatalogue(f"{where}: {at}{_PATH.sub('', str(err))}") from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadCatalogue(f"{where}: not JSON: {err}; wanted is one record a line, or an array of them") from err


def _entry(record: _Record, where: str) -> Entry:
    explained = list(record.explanations or ())
    if record.description is not None:
        explained.append(_Explanation(record.description, record.scores))
    fired = list(record.activations or ())
    if record.tokens is not None:
        fired.append(_Activation(record.tokens, record.values, record.max_value, record.position))
    return Entry(
        where=where,
        index=index_of(record.index, where),
        model=record.model,
        source=record.layer,
        labels=tuple(_label(one, where) for one in explained),
        maximum=finite(record.maximum, "maxActApprox", where) if record.maximum else None,
        density=share(record.density, "frac_nonzero", where) if record.density else None,
        top_tokens=_promoted(record.pos_str or [], record.pos_values or [], where),
        examples=tuple(example for one in fired if (example := _example(one, where))),
    )


def _label(explanation: _Explanation, where: str) -> Label:
    """Its best score, by whichever metric: the exports of one source use one."""
    scores = [(finite(one.value, "scores", where), one.metric) for one in explanation.scores or ()]
    best = max(scores, key=lambda one: one[0], default=(None, None))
    return Label(explanation.description.strip(), *best)


def _promoted(tokens: list[str], logits: list[float], where: str) -> tuple[PromotedToken, ...]:
    if len(tokens) != len(logits):
        raise BadCatalogue(f"{where}: pos_values: {len(logits)} values for {len(tokens)} tokens")
    pairs = zip(tokens, logits, strict=True)
    return tuple(PromotedToken(_shown(token), finite(logit, "pos_values", where)) for token, logit in pairs)


def _example(activation: _Activation, where: str) -> Example | None:
    """The text up to the token on which the feature fired most; None where it did not fire."""
    tokens, values = activation.tokens, activation.values or []
    value = activation.maximum if activation.maximum is not None else max(values, default=0.0)
    if finite(value, "maxValue", where) <= 0.0:
        return None
    at = activation.position if activation.position is not None else values.index(value) if value in values else -1
    if not 0 <= at < len(tokens):
        raise BadCatalogue(f"{where}: maxValueTokenIndex: {at} is outside the {len(tokens)} tokens")
    first = 1 if tokens[0] in BOS else 0
    return Example("".join(map(_shown, tokens[first : at + 1])), at, value)


def _shown(token: str) -> str:
    return _SPELLED.sub(lambda found: _VOCABULARY[found[0]], token)

"""Linear probes from JSON."""

from __future__ import annotations

import pytest

from saeguard.types import Term
from saeguard_server.policy.document import BadProbe, parse_probe


def test_both_forms_say_the_same() -> None:
    dense = parse_probe('{"sae": "m", "bias": 0.5, "weights": [0, 1.5, 0.0, -2], "labels": {"1": "rude"}}')
    listed = parse_probe(
        '{"description": "d", "sae": "m", "bias": 0.5, "terms": [{"feature": 1, "weight": 1.5, "label": "rude"}, '
        '{"sae": "m", "feature": 3, "weight": -2}]}'
    )
    assert dense == listed
    assert dense.terms == (Term("m", 1, 1.5), Term("m", 3, -2.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "truncated"),
        ('{"sae": "m"}', "one of terms and weights"),
        ('{"sae": "m", "weights": [1], "terms": []}', "one of terms and weights"),
        ('{"weights": [1]}', "sae: must be set with weights"),
        ('{"terms": [{"feature": 1, "weight": 1}]}', r"terms\[0\].sae: must be set"),
        ('{"sae": "m", "terms": [{"feature": 1, "weight": 0}]}', r"terms\[0\].weight: must not be 0"),
        ('{"sae": "m", "terms": [{"feature": -1, "weight": 1}]}', r"terms\[0\].feature: must be 0 to"),
        ('{"sae": "m", "weights": [0, 1e300]}', r"weights\[1\].weight: must be finite"),
        ('{"sae": "m", "weights": [0, 0]}', "1 to 4096 weights that are not 0, got 0"),
        ('{"sae": "m", "weights": [' + "1, " * 4096 + "1]}", "got 4097"),
        ('{"sae": "m", "weight": [1]}', "unknown field"),
        ('{"sae": "m", "weights": [NaN]}', "invalid"),
    ],
)
def test_what_is_no_probe_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadProbe, match=said):
        parse_probe(text)

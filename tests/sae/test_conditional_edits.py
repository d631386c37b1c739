"""Edits that wait for a guard, that are only counted, and that no limit may shorten, in the edit table."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saeguard_sae.dictionary import Dictionary, JumpReLU
from saeguard_sae.edit_table import FOREVER, EditColumn, EditCounts, EditTable
from saeguard_sae.edits import Affine
from support.saes import PlainSae, plain_sae
from support.tables import rows

D, F = 24, 64
PLAIN: PlainSae = plain_sae("jumprelu", D, F, seed=78)
W = PLAIN.weights
DICTIONARY = Dictionary(W["W_enc"], W["b_enc"], W["W_dec"], W["b_dec"], JumpReLU(W["threshold"]))


def column(feature: int, affine: Affine, **more: object) -> EditColumn:
    return replace(EditColumn(DICTIONARY, feature, affine, 0, FOREVER), **more)  # type: ignore[arg-type]


def tokens(seed: int, count: int, length: int) -> Tensor:
    return torch.randn(count, length, D, generator=torch.Generator().manual_seed(seed))


def apply(table: EditTable, x: Tensor, held: Tensor | None = None) -> Tensor:
    return table.apply(x.flatten(0, 1), rows(x), None, [held]).view_as(x)


def what(x: Tensor, edits: dict[int, Affine]) -> Tensor:
    """One token's change, by the formula."""
    f = PLAIN.encode(x)
    wanted = f.clone()
    for feature, affine in edits.items():
        wanted[feature] = torch.clamp(affine.alpha * f[feature] + affine.beta, affine.lo, affine.hi)
    return PLAIN.decode(wanted) - PLAIN.decode(f)


CLAMP, ADD = Affine(alpha=0.0, beta=3.0), Affine(beta=1.5)


def test_an_edit_is_made_only_where_its_guard_is_on() -> None:
    table, x = EditTable(3, D), tokens(1, 3, 9)
    held = torch.rand(3, 9, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    held[..., 0] = True
    table.write(0, [column(1, CLAMP, condition=1), column(2, ADD, condition=0), column(3, ADD)])
    table.write(2, [column(4, CLAMP, condition=1)])
    out = apply(table, x, held)
    for slot, gated in ((0, {1: (CLAMP, 2), 2: (ADD, 1), 3: (ADD, 0)}), (1, {}), (2, {4: (CLAMP, 2)})):
        for at in range(9):
            edits = {feature: affine for feature, (affine, guard) in gated.items() if held[slot, at, guard]}
            if edits:
                torch.testing.assert_close(out[slot, at], x[slot, at] + what(x[slot, at], edits), rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(out[slot, at], x[slot, at])
    assert [(one.eligible, one.edited) for one in table.counts(0)[:2]] == [
        (9, int(held[0, :, 2].sum())), (9, int(held[0, :, 1].sum()))
    ]  # fmt: skip


def test_a_shadow_edit_counts_as_made_and_changes_nothing() -> None:
    """Beside an applied edit of the same feature: each measures from the same value."""
    x, edits = tokens(3, 2, 20), [column(1, CLAMP), column(2, Affine(alpha=0.0), condition=0)]
    held = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(4)) < 0.5
    held[..., 0] = True
    made, shadow, both = EditTable(2, D), EditTable(2, D), EditTable(2, D)
    for slot in range(2):
        made.write(slot, edits)
        shadow.write(slot, [replace(one, is_shadow=True) for one in edits])
        both.write(slot, [*edits, *(replace(one, is_shadow=True, affine=ADD) for one in edits)])
    changed = apply(made, x, held)
    assert torch.equal(apply(shadow, x, held).view(torch.int32), x.view(torch.int32))
    torch.testing.assert_close(apply(both, x, held), changed, rtol=0, atol=1e-6)
    assert not torch.equal(changed, x)
    for slot in range(2):
        near(shadow.counts(slot), made.counts(slot))
        near(both.counts(slot)[:2], made.counts(slot))
        assert both.counts(slot)[2].edited == 20


def near(found: list[EditCounts], wanted: list[EditCounts]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.eligible, one.edited, one.capped) == (other.eligible, other.edited, other.capped)
        torch.testing.assert_close(
            torch.tensor([one.mean_activation, one.max_activation, one.mean_relative_edit]),
            torch.tensor([other.mean_activation, other.max_activation, other.mean_relative_edit]),
        )


def test_a_limit_shortens_the_sum_of_a_slots_edits() -> None:
    table, x = EditTable(2, D), tokens(5, 2, 30)
    table.write(0, [column(1, CLAMP), column(2, ADD)], max_relative_edit=0.2)
    table.write(1, [column(1, CLAMP), column(3, CLAMP)])
    out = apply(table, x)
    capped = 0
    for at in range(30):
        token = x[0, at]
        limited = what(token, {1: CLAMP, 2: ADD})
        most = 0.2 * token.norm()
        capped += bool(limited.norm() > most)
        shrunk = limited * min(1.0, float(most / limited.norm()))
        torch.testing.assert_close(out[0, at], token + shrunk, rtol=1e-4, atol=1e-5)
        unlimited = what(x[1, at], {1: CLAMP, 3: CLAMP})
        torch.testing.assert_close(out[1, at], x[1, at] + unlimited, rtol=1e-4, atol=1e-5)
    assert 0 < capped < 30
    assert [one.capped for one in table.counts(0)] == [capped, capped]
    norms = PLAIN.weights["W_dec"].norm(dim=1)
    sizes = (3.0 - PLAIN.encode(x[1])[:, 3]).abs() * norms[3] / x[1].norm(dim=-1)
    torch.testing.assert_close(table.counts(1)[1].mean_relative_edit, float(sizes.mean()), rtol=1e-5, atol=1e-6)


def test_a_request_of_its_own_rows_beside_many_that_share_theirs() -> None:
    """Rows that most have are read once; which they are changes as requests come and go."""
    alone, x = EditTable(1, D), tokens(6, 6, 4)
    table = EditTable(6, D)
    for slot in range(5):
        table.write(slot, [column(j, CLAMP) for j in range(4)])
    table.write(5, [column(9, ADD), column(2, CLAMP)])
    for _ in range(2):
        out = apply(table, x)
        alone.write(0, [column(9, ADD), column(2, CLAMP)])
        torch.testing.assert_close(out[5:], apply(alone, x[5:]), rtol=0, atol=1e-6)
        alone.clear(0)
        alone.write(0, [column(j, CLAMP) for j in range(4)])
        torch.testing.assert_close(out[3:4], apply(alone, x[3:4]), rtol=0, atol=1e-6)
        alone.clear(0)
        for slot in range(3):
            table.clear(slot)
            table.write(slot, [column(20 + 7 * slot + j, ADD) for j in range(6)])

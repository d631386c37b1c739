"""One gradient of the whole batch, from those that several processes have of their rows."""

from __future__ import annotations

import torch

from saeguard_sae.train.kernels import FeatureRows
from saeguard_sae.train.parallel.mesh import Mesh

_AT_ONCE = 1 << 24
"""Numbers that are sent at once."""


def add_up(rows: FeatureRows, mesh: Mesh) -> None:
    """Gradients become the sum over the batch; a row is active where it is in any process."""
    if mesh.data == 1:
        return
    here = rows.active.bool()
    at = mesh.any_row(rows.active).nonzero().flatten()
    d_in, d_out = rows.g_enc.shape[1], rows.g_dec.shape[1]
    for part in torch.split(at, max(1, _AT_ONCE // (d_in + d_out + 1))):
        sums = torch.cat([rows.g_enc[part], rows.g_dec[part], rows.g_bias[part, None]], dim=1)
        # What a row holds that is not active here is left over from other steps.
        sums[~here[part]] = 0
        mesh.sum_rows(sums)
        rows.g_enc[part], rows.g_dec[part] = sums[:, :d_in], sums[:, d_in:-1]
        rows.g_bias[part] = sums[:, -1]

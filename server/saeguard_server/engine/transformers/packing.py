"""Linear layers on the CPU in oneDNN's own weight layout, which a product over few rows reads at full bandwidth.

The plain layout is turned on every call: measured at 125M parameters in bfloat16 with one row, 18 ms against 12.

oneDNN makes a kernel of about half a MiB for every number of rows that a layer ever sees, and torch keeps a thousand of
them: rows are padded to a few sizes, so that the memory of a server that reads prompts of all lengths stays flat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saeguard_server.engine.transformers import ops


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with packed weights; takes the place of ``nn.Linear`` and of GPT-2's ``Conv1D``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias
        self._handle = ops.register(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            found: Tensor = ops.linear(x, self._handle, self.out_features)
            return found
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], outside of any graph."""
        rows = x.flatten(0, -2)
        count = len(rows)
        padded = nn.functional.pad(rows, (0, 0, 0, padded_rows(count) - count))
        found: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self.packed, self.bias, "none", [], "")
        return found[:count].view(*x.shape[:-1], self.out_features)


def padded_rows(count: int) -> int:
    """As how many rows ``count`` of them are multiplied: at most an eighth more, eight sizes for every doubling."""
    step = 1 << max((count - 1).bit_length() - 4, 0)
    return -(-count // step) * step


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of that type there."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_library and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack(model: nn.Module) -> None:
    """Packs every linear layer of a model that will not be trained; an embedding that shares its weight keeps it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            found = _weights(child)
            if found is not None:
                setattr(parent, name, _like(child, PackedLinear(*found)))


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module) is Conv1D:
        return module.weight.T, module.bias
    return None


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hooks are of the layer, not of its layout."""
    kept: Any = (old._forward_hooks, old._forward_pre_hooks)
    assert not any(kept), "layers are packed before anything is hooked"
    return new

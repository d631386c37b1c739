"""The sparse arithmetic of a training step, in C++ for CPUs and in torch for everything; both give the same results.

A step's cost beyond the one dense product that proposes features is that of the pairs (token, feature) which fire.
"""

from saeguard_sae.train.kernels.compiled import choose_kernels
from saeguard_sae.train.kernels.torch_kernels import (
    AdamStep,
    Decoded,
    FeatureRows,
    Kernels,
    LowPrecision,
    Pairs,
    TorchKernels,
)

__all__ = ["AdamStep", "Decoded", "FeatureRows", "Kernels", "LowPrecision", "Pairs", "TorchKernels", "choose_kernels"]

"""The sparse arithmetic of a training step, in C++ for CPUs and in torch for everything; both give the same results.

A step's cost beyond the one dense product that proposes features is that of the pairs (token, feature) which fire.
"""

from saeguard_sae.train.kernels.compiled import Decoded, FeatureRows, Kernels, Pairs, Rates, Rough
from saeguard_sae.train.kernels.torch_kernels import TorchKernels, choose

__all__ = ["Decoded", "FeatureRows", "Kernels", "Pairs", "Rates", "Rough", "TorchKernels", "choose"]

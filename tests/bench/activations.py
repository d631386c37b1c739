"""The 16 largest features of every token of a prompt, against the encoder's bare product in bfloat16.

128 random tokens, a random SAE of 24,576 features of a 768-wide stream held in float32; then one of 131,072. Of
JumpReLU about 100 features are on at a token. Sides run in turn. No model, no published SAE.

    python -m bench.activations
    python -m bench.activations --threads 2 --tokens 512
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.report import figure
from saeguard_sae.dictionary import ActivationFunction, Dictionary, JumpReLU, ReLU, TopK
from saeguard_sae.encoding import FeatureSelector

K = 16
ON = 100
"""Features that are on at a token, where the activation decides that."""


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[24576, 131072])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for d_sae in args.d_sae:
        compare(args.d_in, d_sae, args.tokens, args.rounds)


@torch.inference_mode()
def compare(d_in: int, d_sae: int, tokens: int, rounds: int) -> None:
    """Milliseconds of each side, for three kinds of SAE with the same weights."""
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(7)), dim=1)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(8))
    on = (x[:8] @ W_dec.T).topk(ON, dim=-1).values[:, -1].mean()
    kinds: dict[str, ActivationFunction] = {"relu": ReLU(), "jumprelu": JumpReLU(on.expand(d_sae)), "topk": TopK(ON)}
    saes = {name: Dictionary(W_dec.T, torch.zeros(d_sae), W_dec, torch.zeros(d_in), one) for name, one in kinds.items()}
    product = bare(x, W_dec)
    for name, sae in saes.items():
        fast, whole = FeatureSelector(sae), FeatureSelector(sae, fast=False)
        fast.prepare()
        sides = [product, lambda fast=fast: fast.top(x, K), lambda whole=whole: whole.top(x, K)]
        times = measure(sides, rounds)
        label = f"top {K} of {tokens} tokens, {name}, {d_in} x {d_sae}"
        figure(label, "ms", times[1], times[0], sides=("picked", "bfloat16_product"), target="<= 1.5")
        figure(f"{label}, everything encoded", "ms", times[2], times[0], sides=("whole", "bfloat16_product"), target="")


def bare(x: Tensor, rows: Tensor) -> Callable[[], object]:
    """The product alone, operands rounded and packed beforehand."""
    near, weight = x.bfloat16(), rows.bfloat16()
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(near, packed, None, "none", [], "")
    return lambda: torch.nn.functional.linear(near, weight)


def measure(sides: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of every round, each side in turn; two rounds warm up."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 2):
        for side, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if turn > 1:
                found.append((time.perf_counter() - start) * 1000)
    return times


if __name__ == "__main__":
    main()

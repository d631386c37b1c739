"""Random parameters, random tokens, and the files of one case; what every library's cases share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKENS = 14
LEVELS = {
    "b_enc": (-0.6, 0.4), "encoder.bias": (-0.6, 0.4), "b_gate": (-0.6, 0.4), "gate_bias": (-0.6, 0.4),
    "b_mag": (-0.2, 0.3), "mag_bias": (-0.2, 0.3), "r_mag": (0.0, 0.3), "b_dec": (0.0, 0.4), "bias": (0.0, 0.4),
    "decoder_bias": (0.0, 0.4), "decoder.bias": (0.0, 0.4), "W_skip": (0.0, 0.1), "threshold": (0.5, 0.15),
    "log_threshold": (-0.7, 0.2), "topk_threshold": (0.6, 0.1),
}  # fmt: skip
"""Mean and spread of the parameters that are neither an encoder nor a decoder."""
ENCODERS, DECODERS = ("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")

Compute = Callable[[Tensor], dict[str, Tensor]]
"""x -> features, recon and forward, as the library computes them."""


@dataclass
class Writer:
    """Where cases go, and how large they are."""

    out: Path
    seed: int
    d_in: int
    d_sae: int
    cases: list[dict[str, Any]] = field(default_factory=list)

    def random(self, *names: object) -> torch.Generator:
        """Its own stream of random numbers for everything that has a name."""
        return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (self.seed, *names))).encode()))

    def fill(self, module: torch.nn.Module, name: str, unit: bool = False) -> None:
        """Random parameters of every kind that the module has; decoder norms far from 1 unless ``unit``."""
        random, state = self.random("w", name), module.state_dict()
        for key, old in state.items():
            if old.is_floating_point():
                state[key] = self._values(key, old, random, unit)
        module.load_state_dict(state)

    def emit(self, folder: str, compute: Compute, heads: int = 0, batch: bool = False, **choices: float) -> None:
        """Computes a case's reference.

        Args:
            folder: what a loader is given, relative to ``out``.
            heads: the library wants [tokens, heads, d_head]; written flat.
            batch: the library wants [1, tokens, d_in]; written so.
            choices: what the files leave open.
        """
        x = self._steady(folder, lambda flat: compute(_shaped(flat, heads, batch)))
        found = compute(_shaped(x, heads, batch)) | {"x": x}
        lead = (1, TOKENS) if batch else (TOKENS,)
        np.savez(self.out / folder / "ref.npz", **{key: one.detach().reshape(*lead, -1) for key, one in found.items()})
        self.cases.append({"path": folder, "choices": choices})

    def list_cases(self) -> None:
        """``cases.json``, written last: it says that everything is there."""
        (self.out / "cases.json").write_text(json.dumps(self.cases, indent=1))

    def _steady(self, name: str, compute: Compute) -> Tensor:
        """Tokens for which rounding does not decide what fires: two machines would disagree about others."""
        for attempt in range(100):
            x = self._tokens(self.random("x", name, attempt))
            fires = [compute(x * near)["features"] != 0 for near in (1.0, 0.99999, 1.00001)]
            if torch.equal(fires[0], fires[1]) and torch.equal(fires[0], fires[2]):
                return x
        raise RuntimeError(f"{name}: rounding decides what fires, whatever the tokens")

    def _tokens(self, random: torch.Generator) -> Tensor:
        """With offsets, as in a residual stream; the first is huge, as attention sinks are, the last one tiny."""
        spread, offset = torch.randn(2, self.d_in, generator=random)
        x = torch.randn(TOKENS, self.d_in, generator=random) * torch.exp(0.3 * spread) + 0.5 * offset
        x[0] *= 40.0
        x[-1] *= 0.05
        return x

    def _values(self, key: str, old: Tensor, random: torch.Generator, unit: bool) -> Tensor:
        noise = torch.randn(old.shape, generator=random).to(old.dtype)
        if key in LEVELS:
            mean, spread = LEVELS[key]
            return mean + spread * noise
        if key in ENCODERS:
            return noise / self.d_in**0.5
        if key in DECODERS:
            across = 0 if key == "decoder.weight" else 1
            rows = noise / noise.norm(dim=across, keepdim=True)
            norms = torch.exp(0.4 * torch.randn(rows.shape[1 - across], generator=random)).unsqueeze(across)
            return rows if unit else rows * norms
        return noise * (0.2 if old.ndim > 1 else 0.05)


def _shaped(x: Tensor, heads: int, batch: bool) -> Tensor:
    x = x.unflatten(-1, (heads, -1)) if heads else x
    return x[None] if batch else x

"""Two linear layers with a ReLU between: Goodfire's, in bfloat16, and qresearch's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from support.published import Builder, Published

D, F = 20, 48


def build(encoder: str, decoder: str, dtype: torch.dtype, repo: str, path: Path, seed: int) -> Published:
    """One SAE, in a file that is named after its repository."""
    dice = torch.Generator().manual_seed(seed)
    columns = torch.randn(D, F, generator=dice)
    weights = {
        f"{encoder}.weight": torch.randn(F, D, generator=dice) * 0.3,
        f"{encoder}.bias": torch.randn(F, generator=dice) * 0.3 - 1.0,
        f"{decoder}.weight": columns / columns.norm(dim=0) * (0.3 + 2.2 * torch.rand(F, generator=dice)),
        f"{decoder}.bias": torch.randn(D, generator=dice) * 0.5,
    }
    file = path / f"{repo.rpartition('/')[2]}.pt"
    weights = {name: one.to(dtype) for name, one in weights.items()}
    torch.save(weights, file)
    W, b, V, c = (one.double() for one in weights.values())

    def encode(x: Tensor) -> Tensor:
        return (x @ W.T + b).relu()

    return Published(
        path=file,
        weights=file,
        config=None,
        d_in=D,
        encode=encode,
        reconstruct=lambda x: encode(x) @ V.T + c,
        repo=repo,
        repo_path=file.name,
    )


goodfire = partial(build, "encoder_linear", "decoder_linear", torch.bfloat16, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19")
qresearch = partial(build, "encoder", "decoder", torch.float32, "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19")

BUILDERS: dict[str, Builder] = {"linear_pair_goodfire": goodfire, "linear_pair_qresearch": qresearch}

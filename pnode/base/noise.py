"""Random numbers that are the same each time, wherever they are drawn."""

from __future__ import annotations

import torch

from pnode.base.transforms import drawing

__all__ = ["noise"]


@drawing()
def noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return normal random numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

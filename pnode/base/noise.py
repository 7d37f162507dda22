"""Random numbers that are the same each time, wherever they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["drawing", "noise"]


@contextmanager
def drawing() -> Iterator[None]:
    """Let random numbers be drawn inside of the vmap of torch.autograd.functional."""
    depth = torch._C._vmapmode_increment_nesting()
    for _ in range(depth):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(depth - 1):
            torch._C._vmapmode_increment_nesting()


@drawing()
def noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return normal random numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

"""What a backward sweep returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["CostGradients"]


@dataclass(frozen=True)
class CostGradients:
    """Derivatives of the loss, of one backward sweep.

    Attributes
    ----------
    state : Tensor
        With respect to y0, shape ``(size,)``, PETSc's precision.
    parameters : list of Tensor or None
        With respect to each parameter, PETSc's precision; None for one that f never used.
    initial : Tensor
        The part of ``state`` that came through the flow, without the first output's own cotangent:
        what the derivative with respect to t_0 needs.
    times : dict
        With respect to the time of each interpolated output, by its index.
    """

    state: torch.Tensor
    parameters: list[torch.Tensor | None]
    initial: torch.Tensor
    times: dict[int, float] = field(default_factory=dict)

"""A residual F(t, y, y') as a vector field, of y and y' in one tensor: what it is traced as."""

from __future__ import annotations

from typing import Any

import torch

from pnode.field.vectorfield import VectorField

__all__ = ["StackedResidual", "stacked"]


class StackedResidual(VectorField):
    """-F of points (y, y'), shape ``(2, *shape)`` or flat; y' is the user's.

    Parameters
    ----------
    residual : VectorField
        That of the same problem, which is told of the parameters that F uses.
    """

    def __init__(self, residual: VectorField) -> None:
        super().__init__(residual.problem, residual.ledger)
        self.used, self.recording = residual.used, residual.recording
        self.suspects = residual.suspects
        if self._shape is not None:
            self._shape = torch.Size((2, *self._shape))

    def _call(self, s: float, own: torch.Tensor, time: torch.Tensor, *rate: Any) -> torch.Tensor:
        """Call F at a point, as :class:`Residual` does: what it writes into y' stays its own."""
        state, slope = (own[0], own[1]) if self._shape is not None else own.view(2, -1)
        slope = slope.clone()
        given: Any = slope if self._shape is not None else self._layout.unflatten(slope)
        return -super()._call(s, state, time, given)


def stacked(part: VectorField, y0: torch.Tensor) -> tuple[VectorField, torch.Tensor]:
    """Return a field as it is traced, and where it is looked at: a residual at y' = 0."""
    if part.has_rhs:
        return part, y0
    return StackedResidual(part), torch.cat([y0.detach(), torch.zeros_like(y0)])

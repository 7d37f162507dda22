"""What the adjoint of one step needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ["Checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the adjoint of one step needs; see ``TimeIntegrator.checkpoint``.

    Attributes
    ----------
    stages : tuple of Tensor
        States of the step, flat: those where the adjoint evaluates f. BDF: its end alone; its
        start by extrapolated implicit Euler: all substeps' states, stacked. Compiled steps: with
        what their graphs save of f there, see ``StepGraphs.checkpoint``.
    weights : Tensor or None
        The coefficients d_0..d_k of a BDF step.
    rate : Tensor or None
        Its u_dot, where the field is a residual.
    start : Tensor or None
        The state at the start, where a sweep is to be taken up again from files.
    """

    stages: tuple[torch.Tensor, ...]
    weights: torch.Tensor | None = None
    rate: torch.Tensor | None = None
    start: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all tensors, as they are stored; :meth:`of` is the inverse."""
        if self.weights is None and self.start is None:
            return self.stages
        others = (self.weights, self.rate, self.start)
        return (*self.stages, *(tensor for tensor in others if tensor is not None))

    @classmethod
    def of(
        cls, tensors: Sequence[torch.Tensor], multistep: bool = False, started: bool = False
    ) -> Checkpoint:
        """Return the checkpoint whose :meth:`tensors` these are.

        Parameters
        ----------
        tensors : sequence of Tensor
            As stored.
        multistep : bool
            Whether it is of a multistep method.
        started : bool
            Whether the start of the step is with it.
        """
        start = tensors[-1] if started else None
        own = tuple(tensors[:-1] if started else tensors)
        if not multistep:
            return cls(own, start=start)
        state, weights, rate = (*own, None, None)[:3]
        assert state is not None
        return cls((state,), weights, rate, start)

    def with_start(self, start: torch.Tensor | None) -> Checkpoint:
        """Return it with the state at the start of its step, or without."""
        return replace(self, start=start)

"""Discrete adjoint of symplectic methods."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.base.ledger import Ledger
from pnode.field.linearization import Linearization
from pnode.solvers.stepping import Step
from pnode.solvers.symplectic_schemes import HalfUpdate

__all__ = ["SymplecticAdjoint"]


class SymplecticAdjoint(TorchAdjointStepper):
    """Adjoint of a symplectic step: its half-updates backwards.

    The adjoint of ``p += h d f(x)`` at x = (q, p) is ``lambda += h d f_x^T lambda_p``, and the same
    for q; for a separable field only the other part of lambda changes. Cost integrals are last
    among the momenta, and depend on both.
    """

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        updates = list(enumerate(self._half_updates()))
        for index, (update, part, stage) in reversed(updates):
            weight, s = step.length * update.weight, step.at(update.offset)
            w = torch.zeros_like(self.state)
            w[..., part] = weight * self.state[..., part]
            if self.field.look is not None:
                self.field.look(s, stage, w, weight, ("positions", "momenta")[update.part])
            point = self._point(index, update, stage, step)
            self.state = self.state + self.pull_back(point.vjp, w)
        ledger.steps += 1

    def updates(self, step: Step) -> Iterator[tuple[slice, float, Linearization]]:
        """Yield the entries that each half-update changes, its factor, and f with its graph."""
        for index, (update, part, stage) in enumerate(self._half_updates()):
            point = self._point(index, update, stage, step)
            yield part, step.length * update.weight, point

    def _half_updates(self) -> Iterator[tuple[HalfUpdate, slice, torch.Tensor]]:
        split = self.settings.split
        parts = (slice(None, split), slice(split, None))
        given = zip(self.settings.method.half_updates, self.checkpoint.stages, strict=True)
        return ((update, parts[update.part], stage) for update, stage in given)

    def _point(
        self, index: int, update: HalfUpdate, stage: torch.Tensor, step: Step
    ) -> Linearization:
        s = step.at(update.offset)
        with update.within(self.field.problem.flow, step.length):
            point = self.linearize(s, stage, step)
        self.verify(point.flat_value(), index, s, step)
        return point

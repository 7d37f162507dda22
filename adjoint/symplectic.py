"""Discrete adjoint of symplectic methods."""

from __future__ import annotations

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.solution import Ledger
from pnode.solvers.stepping import Step

__all__ = ["SymplecticAdjoint"]


class SymplecticAdjoint(TorchAdjointStepper):
    """Adjoint of a symplectic step: its half-updates backwards.

    The adjoint of ``p += h d f(x)`` at x = (q, p) is ``lambda += h d f_x^T lambda_p``, and the same
    for q; for a separable field only the other part of lambda changes.
    """

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        split = self.settings.split
        parts = (slice(None, split), slice(split, None))
        stages = list(zip(self.settings.method.half_updates, self.checkpoint.stages, strict=True))
        for index, (update, stage) in reversed(list(enumerate(stages))):
            part = parts[update.part]
            w = torch.zeros_like(self.state)
            w[part] = step.length * update.weight * self.state[part]
            s = step.at(update.offset)
            if self.field.look is not None:
                name = ("positions", "momenta")[update.part]
                self.field.look(s, stage, w, step.length * update.weight, name)
            point = self.linearize(s, stage, step)
            self.verify(point.flat_value(), index, s, step)
            self.state = self.state + self.pull_back(point.vjp, w)
        ledger.steps += 1

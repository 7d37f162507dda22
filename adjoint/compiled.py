"""The discrete adjoint of an explicit step as one compiled graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.steps import StepGraphs
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step

__all__ = ["CompiledAdjoint"]


class CompiledAdjoint(TorchAdjointStepper):
    """Takes the adjoint of each step by one call of a compiled graph.

    Parameters
    ----------
    settings : IntegratorSettings
        With ``graphs``.
    parameters : bool
        Whether gradients with respect to parameters are wanted.
    """

    def __init__(self, settings: IntegratorSettings, parameters: bool) -> None:
        super().__init__(settings, parameters)
        assert settings.graphs is not None
        self._graphs: StepGraphs = settings.graphs
        self._run = self._graphs.adjoint

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field, batch)
        self._inputs = self._graphs.traced.inputs()
        self._sums = self._graphs.zeros()
        self._stepped = False

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        super().end()
        self._inputs, self._sums = [], []

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded."""
        t = torch.scalar_tensor(self._direction * step.start, dtype=REAL)
        h = torch.scalar_tensor(self._direction * step.length, dtype=REAL)
        results = self._run([t, h, self.state, *self.checkpoint.stages, *self._sums, *self._inputs])
        self.state, self._sums = results[0], results[1:]
        self._stepped = True
        products = self._graphs.products
        self.field.ledger.vjp += products
        if not self._graphs.keeps_saved:
            self.field.ledger.rhs += products
        ledger.steps += 1

    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return mu: one tensor per parameter, None for those that the field never used."""
        gradients: list[torch.Tensor | None] = [None] * count
        if self._stepped:
            for index, gradient in self._graphs.gradients(self._sums):
                gradients[index] = gradient
        return gradients

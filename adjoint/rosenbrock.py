"""Discrete adjoint of the Rosenbrock-W methods."""

from __future__ import annotations

import numpy as np
import torch

from pnode.adjoint.implicit import ImplicitAdjointStepper
from pnode.linearization import Linearization
from pnode.options import SolverOptions
from pnode.solution import Ledger
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.solvers.stepping import Step
from pnode.vectors import REAL

__all__ = ["RosenbrockAdjoint"]


class RosenbrockAdjoint(ImplicitAdjointStepper):
    """Adjoint of a Rosenbrock step, from the state at its start.

    Notes
    -----
    In the variables of ``Scheme.transformed``, with the matrices
    M_i = M / (h Gamma_ii) - J and J = g_u, g_t at the start (t, u) of the step::

        M_i Y_i = g(t_i, Z_i) - M sum_{j<i} Ginv_ij Y_j / h + gamma_i h g_t,
        Z_i = u + sum At_ij Y_j

    Backwards from lambda' at u' = u + sum_i bt_i Y_i, with Y*_i = bt_i lambda' at first::

        w_i = M_i^-T Y*_i                      (h Y*_i where Gamma_ii = 0)
        Z*_i = g_u(Z_i)^T w_i                  (and mu += g_p(Z_i)^T w_i)
        Y*_j += At_ij Z*_i - Ginv_ij M^T w_i / h   (+ Corr_ij J^T w_i where Gamma_ii = 0), j < i
        lambda = lambda' + sum_i Z*_i + d/du sum_i w_i^T (J Y_i + gamma_i h g_t)

    where J multiplies sum_j Corr_ij Y_j instead of Y_i if Gamma_ii = 0, and mu gets the last sum's
    derivative with respect to the parameters. The stages are computed again first, from the values
    that the graphs of g at the Z_i bring along, so that a checkpoint is one state. All solves of a
    step share one matrix unless the method has several.
    """

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, parameters: bool
    ) -> None:
        super().__init__(settings, options, parameters)
        self._scheme = ROSENBROCK[settings.method.subtype]
        self._At, self._Ginv, self._corr, self._bt = self._scheme.transformed()

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Raises
        ------
        LinearSolveFailed
            If a solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        (u,) = self.checkpoint.stages
        dtype, h, mass = self.field.dtype, step.length, self.field.mass
        stages, base = self._stages(step, u, ledger)
        number = len(stages)
        end = u + _combine(self._bt, [stage[1] for stage in stages], torch.zeros_like(u))
        self.verify(end, 0, step.start, step, "the step's end, from its value")
        cotangents = [self._bt[i] * self.state for i in range(number)]
        time_weight = torch.zeros_like(self.state)
        for i in reversed(range(number)):
            point, _, v = stages[i]
            explicit = self._scheme.gamma_diagonal[i] == 0.0
            if explicit:
                w = h * cotangents[i]
            else:
                self._use_matrix(i, step, u)
                w = self.solve(cotangents[i], step, ledger)
            Z = self.pull_back(point.vjp, w)
            self.state = self.state + Z + self.pull_back(base.second_vjp, w, v)
            moved = w if mass is None else mass.apply_transpose(w)
            through = base.vjp(w.to(dtype)).state.to(REAL) if explicit and i else None
            for j in range(i):
                cotangents[j] = cotangents[j] + self._At[i, j] * Z - self._Ginv[i, j] / h * moved
                if through is not None:
                    cotangents[j] = cotangents[j] + self._corr[i, j] * through
            time_weight += self._scheme.gamma[i] * h * w
        if self._scheme.needs_slope_of(mass):
            self.state = self.state + self.pull_back(base.time_derivative_vjp, time_weight)
        ledger.steps += 1

    def _stages(
        self, step: Step, u: torch.Tensor, ledger: Ledger
    ) -> tuple[list[tuple[Linearization, torch.Tensor, torch.Tensor]], Linearization]:
        """Compute the stages again.

        Returns
        -------
        stages : list of (Linearization, Tensor, Tensor)
            g at (t_i, Z_i), Y_i, and what J multiplies: Y_i, or the sum of Corr_ij Y_j.
        base : Linearization
            g at (t, u).
        """
        scheme, h, dtype, mass = self._scheme, step.length, self.field.dtype, self.field.mass
        start, timed = self.bridge.point_at(step.start, u), scheme.needs_slope_of(mass)
        if start.linearization is None:
            start.linearization = self.linearize(
                step.start, start.u, step, differentiate_time=timed
            )
        base = start.linearization
        slope = base.time_derivative().to(REAL) if timed else None
        stages: list[tuple[Linearization, torch.Tensor, torch.Tensor]] = []
        zero = torch.zeros_like(u)
        for i, alpha in enumerate(scheme.c):
            done = [stage[1] for stage in stages]
            Z = u + _combine(self._At[i], done, zero)
            point = base
            if i:
                point = self.linearize(step.start + alpha * h, Z.to(dtype, copy=True), step)
            driven = _combine(self._Ginv[i], done, zero) / h
            b = point.flat_value().to(REAL) - (driven if mass is None else mass.apply(driven))
            if slope is not None:
                b = b + scheme.gamma[i] * h * slope
            if scheme.gamma_diagonal[i] == 0.0:
                v = _combine(self._corr[i], done, zero)
                Y = h * (b + base.jvp(v.to(dtype)).to(REAL)) if i else h * b
            else:
                self._use_matrix(i, step, u, again=i == 0)
                v = Y = self.solve(b, step, ledger, transposed=False)
            stages.append((point, Y, v))
        return stages, base

    def _use_matrix(self, stage: int, step: Step, u: torch.Tensor, again: bool = False) -> None:
        """Set the matrix of a stage, unless it is the one of the stage before."""
        if again or not self._scheme.one_matrix:
            shift = 1.0 / (step.length * self._scheme.gamma_diagonal[stage])
            self.set_matrix(step.start, u, shift, step)


def _combine(row: np.ndarray, tensors: list[torch.Tensor], zero: torch.Tensor) -> torch.Tensor:
    """Return the sum of row_j tensors_j."""
    return sum((row[j] * tensor for j, tensor in enumerate(tensors) if row[j]), start=zero)

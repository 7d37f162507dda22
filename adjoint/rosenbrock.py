"""Discrete adjoint of the Rosenbrock-W methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from pnode.adjoint.implicit import ImplicitAdjointStepper
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.solvers.scheme import combine
from pnode.solvers.stepping import Step

__all__ = ["RosenbrockAdjoint", "RosenbrockStage"]

# Entries of a state beyond which products of all stages at once would take memory, not less time.
_LARGE = 1 << 12


class RosenbrockStage(NamedTuple):
    """A stage that was computed again.

    Attributes
    ----------
    Z : Tensor
        Z_i.
    graph : Linearization
        g at (t_i, Z_i).
    Y : Tensor
        Y_i.
    v : Tensor
        What J multiplies: Y_i, or the sum of Corr_ij Y_j.
    """

    Z: torch.Tensor
    graph: Linearization
    Y: torch.Tensor
    v: torch.Tensor


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
        self.scheme = ROSENBROCK[settings.method.subtype]
        self.coefficients = self.scheme.transformed()

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Raises
        ------
        LinearSolveFailed
            If a solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        h, mass, (At, Ginv, corr, bt) = step.length, self.field.mass, self.coefficients
        stages, base = self.stages(step, ledger)
        cotangents = [bt[i] * self.state for i in range(len(stages))]
        solved: list[torch.Tensor] = []
        for i, stage in reversed(list(enumerate(stages))):
            explicit = self.scheme.gamma_diagonal[i] == 0.0
            if explicit:
                w = h * cotangents[i]
            else:
                self.use_matrix(i, step)
                w = self.solve(cotangents[i], step, ledger)
            Z = self.pull_back(stage.graph.vjp, w)
            self.state = self.state + Z
            moved = w if mass is None else mass.apply_transpose(w)
            through = base.vjp(w.to(self.field.dtype)).state.to(REAL) if explicit and i else None
            for j in range(i):
                cotangents[j] = cotangents[j] + At[i, j] * Z - Ginv[i, j] / h * moved
                if through is not None:
                    cotangents[j] = cotangents[j] + corr[i, j] * through
            solved.insert(0, w)
        w = torch.stack(solved, -2)
        for rows, v, time in self.through_jacobian(stages, step):
            product = partial(base.second_vjp, v=v, time=time)
            self.state = self.state + self.pull_back(product, w[..., rows, :])
        ledger.steps += 1

    def through_jacobian(
        self, stages: Sequence[RosenbrockStage], step: Step
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Yield what J and g_t of a step multiply in its stages: all at once if that is small.

        Yields
        ------
        rows : slice
            The stages.
        v, time : Tensor, Tensor or None
            What J multiplies, shape ``(n, size)``, and gamma_i h; the user's precision.
        """
        number, dtype = len(stages), self.field.dtype
        together = number if self.settings.size <= _LARGE else 1
        for first in range(0, number, together):
            rows, time = slice(first, first + together), None
            v = torch.stack([stage.v for stage in stages[rows]]).to(dtype)
            if self.scheme.needs_slope_of(self.field.mass):
                time = torch.tensor(self.scheme.gamma[rows], dtype=dtype, device=v.device)
                time *= step.length
            yield rows, v, time

    def stages(self, step: Step, ledger: Ledger) -> tuple[list[RosenbrockStage], Linearization]:
        """Compute the stages of the step again; also g at its start, with its graph. Collective.

        Raises
        ------
        FieldChanged
            If they do not lead to where the forward sweep went.
        """
        scheme, h, dtype, mass = self.scheme, step.length, self.field.dtype, self.field.mass
        (u,), (At, Ginv, corr, bt) = self.checkpoint.stages, self.coefficients
        start, timed = self.bridge.point_at(step.start, u), scheme.needs_slope_of(mass)
        if start.linearization is None:
            start.linearization = self.linearize(
                step.start, start.u, step, differentiate_time=timed
            )
        base = start.linearization
        slope = base.time_derivative().to(REAL) if timed else None
        stages: list[RosenbrockStage] = []
        zero = torch.zeros_like(u)
        for i, alpha in enumerate(scheme.c):
            done = [stage.Y for stage in stages]
            Z = u + combine(At[i], done, zero)
            graph = base
            if i:
                graph = self.linearize(step.at(alpha), Z.to(dtype, copy=True), step)
            driven = combine(Ginv[i], done, zero) / h
            b = graph.flat_value().to(REAL) - (driven if mass is None else mass.apply(driven))
            if slope is not None:
                b = b + scheme.gamma[i] * h * slope
            if scheme.gamma_diagonal[i] == 0.0:
                v = combine(corr[i], done, zero)
                Y = h * (b + base.jvp(v.to(dtype)).to(REAL)) if i else h * b
            else:
                self.use_matrix(i, step, again=i == 0)
                v = Y = self.solve(b, step, ledger, transposed=False)
            stages.append(RosenbrockStage(Z, graph, Y, v))
        end = u + combine(bt, [stage.Y for stage in stages], zero)
        self.verify(end, 0, step.start, step, "the step's end, from its value")
        return stages, base

    def use_matrix(self, stage: int, step: Step, again: bool = False) -> None:
        """Set the matrix of a stage, unless it is the one of the stage before. Collective."""
        if again or not self.scheme.one_matrix:
            shift = 1.0 / (step.length * self.scheme.gamma_diagonal[stage])
            self.set_matrix(step.start, self.checkpoint.stages[0], shift, step)

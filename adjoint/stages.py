"""Discrete adjoints of explicit methods, from the states that f was evaluated at.

One product with the transposed Jacobian per evaluation, and no PETSc: the methods here have no
TSAdjoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.solution import Ledger
from pnode.solvers.integrator import IntegratorSettings
from pnode.solvers.stepping import Step
from pnode.solvers.tableaus import ExplicitTableau, symplectic_scheme

__all__ = ["ExplicitAdjoint", "SymplecticAdjoint"]


class ExplicitAdjoint(TorchAdjointStepper):
    """Adjoint of an explicit Runge-Kutta step, from its Butcher tableau.

    Parameters
    ----------
    settings : IntegratorSettings
        Those of the forward integrator.
    parameters : bool
        Whether gradients with respect to parameters are wanted.
    tableau : ExplicitTableau
        A, b and c. Checkpoints hold the stages U_1, ..., U_s; the last ones may be missing where
        nothing depends on their slopes (FSAL).

    Notes
    -----
    The step is U_i = u + h sum_j a_ij k_j, k_i = g(t + c_i h, U_i), u' = u + h sum_i b_i k_i. With
    lambda' the cotangent of u', backwards through the stages::

        w_i = h (b_i lambda' + sum_{j>i} a_ji l_j),   l_i = g_u(U_i)^T w_i,
        lambda = lambda' + sum_i l_i,                  mu += sum_i g_p(U_i)^T w_i

    (E. Hairer, C. Lubich & G. Wanner, Geometric Numerical Integration, section VI.9; A. Sandu, On
    the properties of Runge-Kutta discrete adjoints, ICCS 2006).
    """

    def __init__(
        self, settings: IntegratorSettings, parameters: bool, tableau: ExplicitTableau
    ) -> None:
        super().__init__(settings, parameters)
        self._tableau = tableau

    def step(
        self,
        step: Step,
        ledger: Ledger,
        outputs: Iterable[tuple[Sequence[float], torch.Tensor]] = (),
    ) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Parameters
        ----------
        step : Step
            The step.
        ledger : Ledger
            Counts it.
        outputs : iterable of (weights, cotangent)
            Further outputs ``u + h sum_i weights_i k_i`` inside the step, with the derivative of
            the loss with respect to each, shape ``(size,)``.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        A, c, h = self._tableau.A, self._tableau.c, step.length
        ends = [(self._tableau.b, self.state), *outputs]
        below: list[tuple[int, torch.Tensor]] = []  # (j, l_j) of the stages done so far
        for i in reversed(range(len(c))):
            terms = [(weights[i], cotangent) for weights, cotangent in ends if weights[i]]
            terms += [(A[j][i], product) for j, product in below if A[j][i]]
            if not terms:
                continue
            w = h * torch.stack([weight * tensor for weight, tensor in terms]).sum(dim=0)
            point = self.linearize(step.start + c[i] * h, self.checkpoint[i], step)
            below.append((i, self.pull_back(point.vjp, w)))
        inside = [cotangent for _, cotangent in ends[1:]]
        self.state = sum((product for _, product in below), start=sum(inside, start=self.state))
        ledger.steps += 1


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
        updates = symplectic_scheme(self.settings.method.subtype).half_updates()
        for update, stage in reversed(list(zip(updates, self.checkpoint, strict=True))):
            part = parts[update.part]
            w = torch.zeros_like(self.state)
            w[part] = step.length * update.weight * self.state[part]
            point = self.linearize(step.start + update.offset * step.length, stage, step)
            self.state = self.state + self.pull_back(point.vjp, w)
        ledger.steps += 1

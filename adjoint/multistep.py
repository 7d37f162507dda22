"""The discrete adjoint of BDF.

A step solves F(t_n, u_n, sum_j d_j u_{n-j}) = 0. With lambda_n the derivative of the loss with
respect to u_n, through everything that came after it,

    (F_u + d_0 F_udot)^T w = lambda_n,
    lambda_{n-j} -= d_j F_udot^T w,   j = 1, 2..., k,
    mu -= F_p^T w.

A step contributes to up to six states before it: those contributions wait here until their turn.
Times, orders and coefficients are those of the forward sweep, held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.adjoint.implicit import ImplicitAdjointStepper
from pnode.adjoint.stepper import NOTHING, StageCotangents
from pnode.base.devices import HOST
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.bdf import start_weights
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.stepping import Step

__all__ = ["MultistepAdjoint"]


class MultistepAdjoint(ImplicitAdjointStepper):
    """Adjoint of BDF and of its start; see :class:`MultistepIntegrator`."""

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field, batch)
        self._waiting: list[torch.Tensor] = []  # parts of lambda_{n-1}, lambda_{n-2}...

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self._waiting = []
        super().end()

    def placeholder(self, step: Step, state: torch.Tensor) -> Checkpoint:
        """Return what stands for a step's checkpoint that cannot be had, in a sweep that is lost.

        Of an ODE: residuals are not for several ranks, where alone a sweep goes on when it is lost.
        """
        if step.order < 0:
            return Checkpoint((state.expand(-step.order * (1 - step.order) // 2, -1),))
        d = torch.full((step.order + 1,), 1.0 / step.length, dtype=REAL, device=HOST.device)
        return Checkpoint((state,), d)

    def step(self, step: Step, ledger: Ledger, inside: StageCotangents = NOTHING) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Parameters
        ----------
        step : Step
            The step.
        ledger : Ledger
            Counts it.
        inside : StageCotangents
            Further cotangents, of the states of the checkpoint.

        Raises
        ------
        LinearSolveFailed
            If a transposed solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        if step.order < 0:
            parts = [self._extrapolated(step, -step.order, ledger, inside.states)]
        else:
            checkpoint = self.checkpoint
            (u,), weights = checkpoint.stages, checkpoint.weights
            assert weights is not None
            first, *others = weights.tolist()
            for own in inside.states:
                self.state = self.state if own is None else self.state + own
            rate = self._solve(
                step.end, u, checkpoint.rate, shift=first, b=self.state, step=step, ledger=ledger,
                weight=step.length,
            )  # fmt: skip
            parts = [rate * -weight for weight in others]
        for index, waiting in enumerate(self._waiting):
            if index < len(parts):
                parts[index] = parts[index] + waiting
            else:
                parts.append(waiting)
        self.state, *self._waiting = parts
        ledger.steps += 1

    def _extrapolated(
        self, step: Step, order: int, ledger: Ledger, inside: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """Adjoint of extrapolated implicit Euler: of each chain of substeps, weighted."""
        (states,) = self.checkpoint.stages
        residual = self.settings.form == "residual"
        total = torch.zeros_like(self.state)
        end = int(residual)  # a residual's start comes first
        for number, weight in enumerate(start_weights(order), start=1):
            h, end = step.length / number, end + number
            gradient = self.state * weight
            for i in range(number, 0, -1):
                index = end - number + i - 1
                u, u_dot, own = states[index], None, inside[index] if inside else None
                gradient = gradient if own is None else gradient + own
                if residual:
                    u_dot = (u - states[index - 1 if i > 1 else 0]) / h
                gradient = self._solve(
                    step.start + i * h, u, u_dot, shift=1.0 / h, b=gradient, step=step,
                    ledger=ledger, weight=weight * h, system=number * (number - 1) // 2 + i - 1,
                ) / h  # fmt: skip
            total += gradient
        return total

    def _solve(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        *,
        shift: float,
        b: torch.Tensor,
        step: Step,
        ledger: Ledger,
        weight: float,
        system: int = 0,
    ) -> torch.Tensor:
        """Solve for w, add its products to mu, and return F_udot^T w.

        ``weight`` is that of the rate in the step, ``system`` counts the systems that the forward
        step solved.
        """
        w = self.solve_transposed(s, u, shift, b, step, ledger, u_dot)
        doubt = self.evidence[2 * system + 1] if self.evidence else 0.0
        self.verify(self.value(s, u, u_dot), 2 * system, s, step, slack=doubt)
        if self.field.look is not None:
            self.field.look(s, u, w, weight, "rhs")
        products = self.products(s, u, w, u_dot)
        self.accumulate(products.parameters)
        return w if products.rate is None else products.rate.to(w)

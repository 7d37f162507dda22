"""The discrete adjoint of backward Euler for F(t, y, y') = 0.

PETSc's own takes dF/dy' at the rate of some other step, which is wrong unless F is linear in y'.
"""

from __future__ import annotations

from pnode.adjoint.stepper import ImplicitAdjointStepper
from pnode.evidence import notes
from pnode.solution import Ledger
from pnode.solvers.stepping import Step

__all__ = ["BackwardEulerAdjoint"]


class BackwardEulerAdjoint(ImplicitAdjointStepper):
    """F(s_1, u_1, (u_1 - u_0) / h) = 0; a checkpoint holds u_0 and u_1."""

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        ``(F_u + F_u_dot / h)^T x = lambda_1``, ``lambda_0 = F_u_dot^T x / h``, and
        ``mu -= F_p^T x``.
        """
        start, end = self.checkpoint
        self.bridge.expected = notes(self.evidence)
        shift = 1.0 / step.length
        rate = start * -shift + end * shift  # with the bits of PETSc's
        x = self.solve_transposed(step.end, end, shift, self.state, step, ledger, rate)
        products = self.products(step.end, end, x, rate)
        assert products.rate is not None
        self.state = products.rate.to(x) * shift
        self.accumulate(products.parameters, 1.0)
        ledger.steps += 1

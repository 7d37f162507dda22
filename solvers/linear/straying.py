"""When an iteration with old Jacobians is given up, for one with a new Jacobian at each iterate."""

from __future__ import annotations

from typing import Any

from pnode.base.options import PETSc

__all__ = ["Straying"]

# A Newton iteration that leaves more than this part of the residual wants a new Jacobian.
_SLOW = 0.1
# One whose residual grows by more than this has left the solution that it was to find: what it
# comes to from there may be another one, which solves the equations as well.
_LOST = 2.0
# What is smaller beside the first residual may be round-off.
_ROUND_OFF = 1e-8


class Straying:
    """Looks at the residuals of a fixed step's iteration; see :func:`with_new_jacobians`.

    An adaptive step that leads elsewhere has a large estimate of its error. Newton's method with
    the Jacobian of each iterate is left alone: that is what would come instead.

    Attributes
    ----------
    watched : bool
        Whether to give up at all.
    """

    def __init__(self) -> None:
        self.watched = self._kept = False
        self._first = 0.0

    def begin(self, norm: float, kept: bool) -> None:
        """Begin an iteration with this residual, and perhaps a Jacobian from before."""
        self._first, self._kept = norm, kept

    def slow(self, snes: Any, norm: float, before: float) -> bool:
        """Whether an iterate that left ``norm`` of a residual ``before`` wants a new Jacobian."""
        slow = not norm <= _SLOW * before
        if self.watched and self._kept and norm > max(_LOST * before, _ROUND_OFF * self._first):
            snes.setConvergenceTest(_GiveUp(snes))
            self._kept = False  # so it is given up once
        self._kept = self._kept or not slow
        return slow


class _GiveUp:
    """Ends the iteration under way instead of the test that SNES has."""

    def __init__(self, snes: Any) -> None:
        self._test = snes.getConvergenceTest()

    def __call__(self, snes: Any, iteration: int, norms: Any) -> Any:
        snes.setConvergenceTest(self._test or "default")
        if iteration == 0:  # the one before has ended otherwise
            return snes.callConvergenceTest(iteration, *norms)
        return PETSc.SNES.ConvergedReason.DIVERGED_DTOL

"""Steps whose Jacobian is taken for constant, because it seems to be."""

from __future__ import annotations

from typing import Any

from pnode.base.options import SolverOptions
from pnode.solvers.linear.jacobians import Jacobian

__all__ = ["GuessedSteps"]

# What is recorded of steps: whether their Jacobian was taken for constant.
_GUESSED, _EVALUATED = 1, 2
# By how much the residual test is weaker then: what one iteration leaves is round-off.
_LINEAR = 100.0


class GuessedSteps:
    """Where steps of one TS begin, so that those with a wrong guess can be repeated.

    Parameters
    ----------
    ts : TS
        Takes the steps.
    jacobian : Jacobian or None
        Guesses.
    options : SolverOptions
        Which of SNES's tolerances someone has set.
    """

    def __init__(self, ts: Any, jacobian: Jacobian | None, options: SolverOptions) -> None:
        self._ts = ts
        self._jacobian = jacobian
        self._keeps_rtol = "snes_rtol" in options.given
        self._before: Any = None
        self._linear = False

    def begin(self, recorded: int) -> None:
        """Begin a step at the solution; ``recorded`` is what :meth:`taken` has told of it, or 0."""
        jacobian, solution = self._jacobian, self._ts.getSolution()
        if jacobian is None:
            return
        jacobian.begin_step(None if recorded == 0 else recorded == _GUESSED)
        if jacobian.guessing:
            if self._before is None:
                self._before = solution.duplicate()
            solution.copy(self._before)
        if jacobian.guessing != self._linear and not self._keeps_rtol:
            self._linear, snes = jacobian.guessing, self._ts.getSNES()
            factor = _LINEAR if self._linear else 1.0 / _LINEAR
            snes.setTolerances(rtol=snes.getTolerances()[0] * factor)

    @property
    def mistaken(self) -> bool:
        """Whether the step just taken is to be repeated without a guess."""
        return self._jacobian is not None and self._jacobian.mistaken

    def back(self, s: float, step: float, index: int) -> None:
        """Begin the step again, without a guess."""
        ts = self._ts
        self._before.copy(ts.getSolution())
        ts.restartStep()
        ts.setTime(s)
        ts.setTimeStep(step)
        ts.setStepNumber(index)
        self.begin(_EVALUATED)

    def taken(self) -> int:
        """Return what is to be recorded of the step just taken."""
        if self._jacobian is None or self._jacobian.constancy is None:
            return 0
        return _GUESSED if self._jacobian.guessing else _EVALUATED

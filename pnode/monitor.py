"""The user's monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pnode import vectors
from pnode.problem import InitialValueProblem
from pnode.solvers.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step

__all__ = ["Monitor"]


class Monitor(Observer):
    """Calls ``function(step, t, y)`` after every accepted step.

    Parameters
    ----------
    function : callable
        The user's.
    problem : InitialValueProblem
        What is solved.
    """

    def __init__(
        self, function: Callable[[int, float, Any], None], problem: InitialValueProblem
    ) -> None:
        self._function = function
        self._problem = problem

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Show a copy of the solution."""
        problem = self._problem
        state = vectors.copy_out(integrator.solution, problem.layout.dtype)
        time = problem.direction * step.end
        problem.ranks.attempt(self._function, step.index + 1, time, problem.layout.unflatten(state))

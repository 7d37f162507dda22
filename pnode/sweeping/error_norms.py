"""Error norms of the user's, by which adaptive steps are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.problems.calls import Call
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.step_control import StepControl, check_grid

__all__ = ["controlled"]


def controlled(
    problem: InitialValueProblem, control: StepControl, dense: bool, call: Call
) -> InitialValueProblem:
    """Return a problem whose errors are measured as steps want it, and check their grid.

    Parameters
    ----------
    problem : InitialValueProblem
        Of the state alone.
    control : StepControl
        With the norm and the grid that the user gave.
    dense : bool
        Whether outputs are interpolated.
    call : Call
        Knows the user's structure of the state.

    Raises
    ------
    ConfigurationError
        For a function on a part of a state, and for a grid that does not go with the times.
    """
    check_grid(problem, control, dense)
    norm = control.norm
    if norm == "rms":
        return problem
    if not callable(norm):
        return problem.but(norm=problem.ranks.greatest)
    if problem.ranks.parallel or problem.exchange is not None:
        raise ConfigurationError(
            f"norm={norm!r} is a function of the whole state, and several ranks (or a layout=) "
            "share it: take norm='max' or 'rms', which are reduced over the ranks"
        )
    return problem.but(norm=_measured(problem, norm, call))


def _measured(
    problem: InitialValueProblem, norm: Callable[[Any], Any], call: Call
) -> Callable[[torch.Tensor], float]:
    """Return the user's norm as a function of a flat error, which integrals may follow."""
    layout = problem.layout

    def measure(flat: torch.Tensor) -> float:
        own = flat[: layout.size].to(layout.dtype)
        if not bool(own.isfinite().all()):
            return math.inf
        if problem.compute is not None:
            own = own.to(problem.compute)
        with torch.no_grad():
            return _checked(norm(call.restored(layout.unflatten(own))))

    return measure


def _checked(found: Any) -> float:
    """Return what a norm returned as a number that is not negative."""
    single = not isinstance(found, (bool, str)) and (
        not isinstance(found, torch.Tensor)
        or (found.numel() == 1 and not found.is_complex() and found.dtype is not torch.bool)
    )
    try:
        number = float(found if single else "none")
    except (TypeError, ValueError, RuntimeError) as error:
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else repr(found)
        raise ConfigurationError(
            f"norm returned {what}: return one real number, such as error.abs().max()"
        ) from error
    if not number >= 0.0:
        raise ConfigurationError(
            f"norm returned {number!r} for a finite error: return a number that is not negative"
        )
    return number

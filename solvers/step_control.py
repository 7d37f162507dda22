"""How the steps of a forward sweep are chosen: fixed ones, limits, the first of adaptive ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import ConfigurationError, StepSizeUnderflow
from pnode.base.real_times import real_times
from pnode.base.transforms import depends, plain
from pnode.field.vectorfield import VectorField
from pnode.problems import tolerances
from pnode.problems.problem import InitialValueProblem
from pnode.problems.step_controllers import PID, Norm
from pnode.solvers.clock import FixedGrid, PrescribedGrid
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = [
    "StepControl", "as_grid", "automatic_step", "check_grid", "check_steps", "first_step",
    "fixed_grid", "unresolved",
]  # fmt: skip

# Nobody waits for more, in minutes of compiled steps.
_MOST_STEPS = 1e9


@dataclass(frozen=True)
class StepControl:
    """How the steps are chosen.

    Attributes
    ----------
    step_size : float or None
        Largest fixed step, None for adaptive steps.
    first_step : float or None
        First adaptive step, None for an automatic one.
    min_step, max_step : float
        Limits of adaptive steps.
    max_steps : int or None
        Largest number of accepted steps.
    rtol, atol : float, Tensor or tuple
        Tolerances as the user gave them.
    controller : str or PID
        Who chooses adaptive steps.
    steps_before : int
        Steps taken before, which count as well, of a sweep that goes on with a solve.
    grid : tuple of float or None
        Times, of the user's, from which and to which fixed steps go; ``step_size`` is the longest.
    norm : str or callable
        Of the error of adaptive steps.
    """

    step_size: float | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int | None = None
    rtol: tolerances.Tolerance = 1e-6
    atol: tolerances.Tolerance = 1e-8
    controller: str | PID = "basic"
    steps_before: int = 0
    grid: tuple[float, ...] | None = None
    norm: Norm = "rms"


def as_grid(given: Any) -> tuple[float, ...] | None:
    """Return a grid of times as float64 numbers, None for None.

    Raises
    ------
    ConfigurationError
        If these are no numbers, not finite, not strictly monotone, fewer than two, or require grad.
    """
    if given is None:
        return None
    parts = given if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, torch.Tensor) and depends(part) for part in parts):
        raise ConfigurationError(
            "steps requires grad, and the ends of steps count as constants: give steps.detach(), "
            "or breakpoints= for times that f jumps at"
        )
    wanted = "give a grid of times, two or more, a 1-D tensor or a sequence of numbers"
    times = plain(real_times("steps", given, wanted))
    if times.dim() != 1 or len(times) < 2:
        raise ConfigurationError(f"steps has shape {tuple(times.shape)}: {wanted}")
    numbers = tuple(times.to(torch.float64).tolist())
    if not all(map(math.isfinite, numbers)):
        raise ConfigurationError("steps contains NaN or infinity: give a grid of finite times")
    up = numbers[-1] > numbers[0]
    for index, (a, b) in enumerate(itertools.pairwise(numbers)):
        if a == b or (b > a) != up:
            raise ConfigurationError(
                f"steps[{index + 1}] = {b!r} follows steps[{index}] = {a!r}: give a grid that "
                "strictly increases or strictly decreases"
            )
    return numbers


def check_grid(problem: InitialValueProblem, control: StepControl, dense: bool) -> None:
    """Refuse a prescribed grid that a solve does not go along.

    Raises
    ------
    ConfigurationError
        If its ends are not those of the solve, or an output that is to be hit, or a break point,
        is not on it.
    """
    if control.grid is None:
        return
    d, points = problem.direction, set(control.grid)
    times = [d * s for s in problem.times]
    ends, wanted = (control.grid[0], control.grid[-1]), (times[0], times[-1])
    if ends != wanted:
        raise ConfigurationError(
            f"steps is a grid from {ends[0]!r} to {ends[1]!r}, and t is from {wanted[0]!r} to "
            f"{wanted[1]!r}: begin and end it there"
        )
    breaks = [] if problem.breaks is None else problem.breaks.times.detach().tolist()
    for name, hit in (("t", [] if dense else times), ("breakpoints", breaks)):
        for time in (time for time in hit if time not in points):
            nearest = min(control.grid, key=lambda point: abs(point - time))
            instead = ", or dense=True, which interpolates" if name == "t" else ""
            raise ConfigurationError(
                f"{name} has {time!r}, which is not on the grid steps (the nearest there is "
                f"{nearest!r}): give a grid that has it, in the same precision{instead}"
            )


def fixed_grid(times: Sequence[float], control: StepControl, resolution: float) -> FixedGrid | None:
    """Return the fixed steps through ``times``, None for adaptive ones.

    ``resolution`` is that of the problem: see :class:`FixedGrid`.
    """
    if control.step_size is None:
        return None
    if control.grid is not None:
        grid = control.grid
        points = grid if grid[-1] > grid[0] else tuple([-time for time in grid])
        return PrescribedGrid(tuple(times), control.step_size, resolution, points)
    return FixedGrid(tuple(times), control.step_size, resolution)


def check_steps(
    problem: InitialValueProblem, times: Sequence[float], control: StepControl, method: str
) -> None:
    """Refuse, before a solve that only ends at its last output, what would not come to an end.

    Parameters
    ----------
    problem : InitialValueProblem
        What is to be solved.
    times : sequence of float
        The output times that steps are to hit.
    control : StepControl
        How steps are chosen.
    method : str
        Its name, for error messages.

    Raises
    ------
    ConfigurationError
        If there are more steps than anyone waits for.
    StepSizeUnderflow
        If float64 does not tell the steps apart.
    """
    grid = fixed_grid(times, control, problem.resolution)
    name, size, span = "max_step", control.max_step, times[-1] - times[0]
    if grid is not None:
        name, size = "step_size", grid.step_size
    if span / size > _MOST_STEPS and control.max_steps is None:
        start, end = (problem.direction * s for s in (times[0], times[-1]))
        raise ConfigurationError(
            f"{name}={size!r} makes {span / size:.1e} steps of t = {start!r} to {end!r}: take "
            "larger ones, or say with max_steps= that so many are meant"
        )
    if grid is not None and grid.unresolved is not None:
        at = problem.direction * times[grid.unresolved]
        raise unresolved(name, size, time=at, step=0, method=method)


def unresolved(name: str, size: float, **where: Any) -> StepSizeUnderflow:
    """Return the error for steps that float64 does not tell apart at a time."""
    spacing = math.ulp(where["time"])
    return StepSizeUnderflow(
        f"{name}={size!r}, and float64 times are {spacing:.2e} apart there: take larger steps, or "
        "measure t from nearby",
        **where,
    )


def first_step(
    integrator: TimeIntegrator, field: VectorField, start: float, end: float, control: StepControl
) -> float:
    """Choose a first step; see :func:`automatic_step`."""
    y0 = vectors.copy_out(integrator.solution, field.dtype)
    settings = integrator.settings
    return automatic_step(field, y0, settings, integrator.first_order, start, end, control)


def automatic_step(
    field: VectorField, y0: torch.Tensor, settings: IntegratorSettings, order: int,
    start: float, end: float, control: StepControl, f0: torch.Tensor | None = None,
) -> float:  # fmt: skip
    """Choose a first step from two evaluations of the field, one if ``f0`` is at hand.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4, "Starting
    Step Size". Where y0' is not at hand (a mass matrix, a residual), a millionth of the first
    output interval, or of 1 where that has no end.
    """
    if not field.problem.gives_rate:
        span = end - start if math.isfinite(end) else 1.0
        return min(1e-6 * span, control.max_step)
    if f0 is None:
        f0 = field.slope(start, y0.clone())
    rtol, atol = (tolerances.values(value, y0.device) for value in (settings.rtol, settings.atol))
    scale = atol + rtol * y0.abs()
    size = field.problem.measure
    d0, d1 = (size(tolerances.in_units(v, scale)) for v in (y0, f0))
    moves = d0 >= 1e-5 and 1e-5 <= d1 < math.inf
    guess = min(0.01 * d0 / d1 if moves else 1e-6, end - start)
    change = field.slope(start + guess, y0 + guess * f0) - f0
    d2 = size(tolerances.in_units(change, scale)) / guess
    steepest = max(d1, d2)
    if not math.isfinite(steepest):  # outside the field's domain: let the controller feel its way
        return guess
    if steepest <= 1e-15:
        better = max(1e-6, 1e-3 * guess)
    else:
        better = (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100.0 * guess, better, control.max_step)

"""The forward sweep: choose the steps, land on every output time, go back after a failure.

PETSc's own TSSolve is not used: it does not tell the accepted step sizes exactly after a
rejection, accepts a bad step at its minimum step size, and goes on through NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode import tolerances, vectors
from pnode.errors import (
    ConfigurationError,
    NonFiniteVectorField,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.solvers.clock import FixedGrid, least_step, move
from pnode.solvers.integrator import IntegratorSettings, TimeIntegrator
from pnode.vectorfield import VectorField

__all__ = [
    "Step", "StepControl", "automatic_step", "check_steps", "first_step", "fixed_grid",
    "forward_sweep",
]  # fmt: skip

# Nobody waits for more, in minutes of compiled steps.
_MOST_STEPS = 1e9
# After a failed nonlinear solve or a non-finite vector field there is no error estimate to go by.
_FAILURE_FACTOR = 0.25


@dataclass(frozen=True, slots=True)
class Step:
    """An accepted step: index, start time and length in the integrator's time.

    ``order`` is the one taken, where a method has several (see ``MultistepIntegrator.attempt``).
    """

    index: int
    start: float
    length: float
    end: float
    order: int = 0

    def at(self, c: float) -> float:
        """Return the time of a stage at ``c`` lengths of the step: its very ends at 0 and 1."""
        return self.end if c == 1.0 else self.start + c * self.length


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
    controller : str
        Who chooses adaptive steps.
    """

    step_size: float | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int | None = None
    rtol: tolerances.Tolerance = 1e-6
    atol: tolerances.Tolerance = 1e-8
    controller: str = "basic"


def fixed_grid(times: Sequence[float], control: StepControl, resolution: float) -> FixedGrid | None:
    """Return the fixed steps through ``times``, None for adaptive ones.

    ``resolution`` is that of the problem: see :class:`FixedGrid`.
    """
    if control.step_size is None:
        return None
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


def forward_sweep(
    integrator: TimeIntegrator,
    field: VectorField,
    times: tuple[float, ...],
    control: StepControl,
    ledger: Ledger,
    on_step: Callable[[Step], None],
    on_output: Callable[[int], None],
    end_at_event: Callable[[Step], Step | None] | None = None,
    before_step: Callable[[int], None] = lambda index: None,
    done: Sequence[Step] = (),
) -> None:
    """Integrate from ``times[0]`` to ``times[-1]``; the integrator has begun. Collective.

    Parameters
    ----------
    integrator : TimeIntegrator
        Holds the initial state.
    field : VectorField
        For the automatic first step and the direction of time.
    times : tuple of float
        Increasing output times.
    control : StepControl
        How to choose steps.
    ledger : Ledger
        Counts steps and rejections.
    on_step : callable
        Called after every accepted step.
    on_output : callable
        Called with the index of each output time reached, 0 included.
    end_at_event : callable, optional
        Called after every accepted step, first. It may return the step shortened, with the solution
        moved accordingly: the sweep then ends after :func:`on_step`.
    before_step : callable
        Called with the index of every step before it is first tried.
    done : sequence of Step
        Steps taken in another process; the integrator stands at the end of the last.
    """
    sweep = _Sweep(integrator, field, control, ledger, on_step, end_at_event, before_step)
    sweep.index = len(done)
    reached = done[-1].end if done else times[0]
    if done:
        sweep.natural = done[-1].length
    else:
        integrator.monitor(0, times[0])
        on_output(0)
    number, grid = 0, fixed_grid(times, control, field.problem.resolution)
    doubtful = grid is not None and grid.unresolved is not None
    for index, (start, end) in enumerate(itertools.pairwise(times), start=1):
        if grid is not None:
            if doubtful:
                sweep.check_resolution(grid, index - 1)
            for before, length, after in grid.steps(index - 1):
                number += 1
                if number <= len(done):
                    continue
                sweep.fixed(before, length, after)
                if sweep.ended:
                    return
        else:
            sweep.adapt(max(start, reached), end)
            if sweep.ended:
                return
        if end >= reached:
            on_output(index)


class _Sweep:
    """Step counter and natural step size of one forward sweep."""

    def __init__(
        self,
        integrator: TimeIntegrator,
        field: VectorField,
        control: StepControl,
        ledger: Ledger,
        on_step: Callable[[Step], None],
        end_at_event: Callable[[Step], Step | None] | None,
        before_step: Callable[[int], None],
    ) -> None:
        self.end_at_event = end_at_event
        self.before_step = before_step
        self.announced = -1
        self.ended = False
        self.integrator = integrator
        self.field = field
        self.control = control
        self.ledger = ledger
        self.on_step = on_step
        self.index = 0
        self.natural: float | None = None

    def fixed(self, start: float, length: float, end: float) -> None:
        """Take one step of given length; any failure is final."""
        self._check_limit(start)
        self._announce()
        outcome = self.integrator.attempt(start, length, self.index, end=end)
        if not outcome.accepted:
            assert outcome.error is not None
            raise outcome.error
        self._accept(Step(self.index, start, length, end, outcome.order))

    def adapt(self, start: float, end: float) -> None:
        """Step from output time to output time under PETSc's controller."""
        control, s = self.control, start
        if self.natural is None:
            self.natural = self._first_step(start, end)
        error: SolveError | None = None
        while s < end and not self.ended:
            self._check_limit(s)
            least = least_step(s, end - s)
            natural = min(max(self.natural, control.min_step, least), control.max_step)
            if natural < min(least, end - s):
                raise unresolved("max_step", control.max_step, **self._where(s))
            wanted = _fit(natural, end - s)
            after = end if wanted == end - s else move(s, wanted)
            length = after - s
            self._announce()
            outcome = self.integrator.attempt(s, length, self.index, end=after)
            if outcome.accepted:
                # A step shortened to meet an output time says nothing against the natural one.
                shortened = (
                    not self.integrator.proposes_absolute
                    and wanted < natural
                    and outcome.next_step >= length
                )
                self.natural = max(outcome.next_step, natural) if shortened else outcome.next_step
                self._accept(Step(self.index, s, length, after, outcome.order))
                s, error = after, None
                continue
            self.ledger.rejected += 1
            error = outcome.error or error
            self._check_minimum(s, wanted, least, error)
            proposed = outcome.next_step if outcome.error is None else _FAILURE_FACTOR * length
            self.natural = proposed if 0.0 < proposed < length else _FAILURE_FACTOR * length

    def _first_step(self, start: float, end: float) -> float:
        """Return the user's first step, or an automatic one.

        PETSc's theta methods estimate their error from past steps and accept the first one
        unseen: the automatic step, which is cautious, is then the longest allowed.
        """
        wanted = self.control.first_step
        if wanted is not None and not self.integrator.settings.method.implicit:
            return wanted
        automatic = first_step(self.integrator, self.field, start, end, self.control)
        return automatic if wanted is None else min(wanted, automatic)

    def _announce(self) -> None:
        if self.announced < self.index:
            self.announced = self.index
            self.before_step(self.index)

    def _accept(self, step: Step) -> None:
        last = self.end_at_event(step) if self.end_at_event is not None else None
        if last is not None:
            step, self.ended = last, True
        self.index += 1
        self.ledger.steps += 1
        self.integrator.monitor(self.index, step.end)
        self.on_step(step)

    def _check_limit(self, s: float) -> None:
        if self.control.max_steps is not None and self.index >= self.control.max_steps:
            raise StepLimitReached(
                f"max_steps={self.control.max_steps} steps did not reach the last output time: "
                "raise max_steps, loosen the tolerances, or use an implicit method if the "
                "problem is stiff",
                **self._where(s),
            )

    def check_resolution(self, grid: FixedGrid, interval: int) -> None:
        """Refuse fixed steps that float64 does not tell apart."""
        if not grid.resolves(interval):
            start = grid.times[interval]
            raise unresolved("step_size", grid.step_size, **self._where(start))

    def _check_minimum(
        self, s: float, length: float, least: float, error: SolveError | None
    ) -> None:
        """Stop when a failed step was the smallest; the last failure, if any, is the reason.

        ``least`` is the smallest by the resolution of time alone.
        """
        min_step = self.control.min_step
        smallest = max(min_step, least)
        if length > smallest:
            return
        if isinstance(error, NonFiniteVectorField):
            if min_step <= least:
                raise error
            raise NonFiniteVectorField(
                f"{error.message} (min_step={min_step!r} allows none)",
                reason=error.reason, rank=error.rank, **self._where(s),
            ) from error  # fmt: skip
        limit, remedy = "times of float64 tell no shorter one apart there", "measure t from nearby"
        if min_step > least:
            limit, remedy = f"min_step={min_step!r}", "lower min_step"
        raise StepSizeUnderflow(
            f"a step of {length:.2e} failed, and the smallest one is {smallest:.2e} ({limit}): "
            f"{remedy}, loosen rtol and atol, use an implicit method if the problem is stiff, or "
            "look for a singularity of the vector field",
            reason=error.reason if error else None,
            **self._where(s),
        ) from error

    def _where(self, s: float) -> dict[str, Any]:
        return {
            "time": self.field.problem.direction * s,
            "step": self.index,
            "method": self.integrator.settings.method.name,
        }


def unresolved(name: str, size: float, **where: Any) -> StepSizeUnderflow:
    """Return the error for steps that float64 does not tell apart at a time."""
    spacing = math.ulp(where["time"])
    return StepSizeUnderflow(
        f"{name}={size!r}, and float64 times are {spacing:.2e} apart there: take larger steps, or "
        "measure t from nearby",
        **where,
    )


def _fit(natural: float, remaining: float) -> float:
    """Shorten (or stretch by round-off) a step so that output times are met without a sliver."""
    if natural >= remaining * (1.0 - 1e-10):
        return remaining
    return remaining / 2.0 if natural > remaining / 2.0 else natural


def first_step(
    integrator: TimeIntegrator, field: VectorField, start: float, end: float, control: StepControl
) -> float:
    """Choose a first step; see :func:`automatic_step`.

    Where y0' is not at hand (a mass matrix, a residual), a millionth of the first output interval,
    or of 1 where that has no end.
    """
    if field.problem.form in ("mass", "residual"):
        span = end - start if math.isfinite(end) else 1.0
        return min(1e-6 * span, control.max_step)
    y0 = vectors.copy_out(integrator.solution, field.dtype)
    settings = integrator.settings
    return automatic_step(field, y0, settings, integrator.first_order, start, end, control)


def automatic_step(
    field: VectorField, y0: torch.Tensor, settings: IntegratorSettings, order: int,
    start: float, end: float, control: StepControl, f0: torch.Tensor | None = None,
) -> float:  # fmt: skip
    """Choose a first step from two evaluations of the field, one if ``f0`` is at hand.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4, "Starting
    Step Size".
    """
    if f0 is None:
        f0 = field.slope(start, y0.clone())
    rtol, atol = (tolerances.values(value, y0.device) for value in (settings.rtol, settings.atol))
    scale = atol + rtol * y0.abs()
    rms = field.problem.ranks.rms
    d0, d1 = rms(y0 / scale), rms(f0 / scale)
    moves = d0 >= 1e-5 and 1e-5 <= d1 < math.inf
    guess = min(0.01 * d0 / d1 if moves else 1e-6, end - start)
    d2 = rms((field.slope(start + guess, y0 + guess * f0) - f0) / scale) / guess
    steepest = max(d1, d2)
    if not math.isfinite(steepest):  # outside the field's domain: let the controller feel its way
        return guess
    if steepest <= 1e-15:
        better = max(1e-6, 1e-3 * guess)
    else:
        better = (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100.0 * guess, better, control.max_step)

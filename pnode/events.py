"""Terminal events: where the sign of ``event_fn(t, y)`` changes, and the derivatives of that time.

The end state lies on the discrete solution: the step in which the sign changes is taken again
from its start, shorter, until it ends at the root. It has reached the other side of zero, or zero,
so that a solve that goes on from there does not find the event again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pnode.errors import BackwardError, ConfigurationError, EventError
from pnode.event_path import EventPath, call_event
from pnode.event_search import SAMPLES, Sides, first_crossing
from pnode.problem import InitialValueProblem, StateLayout
from pnode.products import directional_derivative
from pnode.solution import Ledger
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step
from pnode.vectorfield import VectorField, vector_field

__all__ = ["Event", "EventLocator", "check_rate", "end_at_event"]

# Where a step that starts on an event is looked at, apart from the samples of any step: a flight
# between two bounces may be much shorter than the step.
_FIRST = tuple(4.0**-k for k in range(10, 3, -1))
# What Newton's method leaves in a state, relative to it.
_ITERATION = 1e-9
# A coarse event_tol does not make events near the start those that the solve starts on.
_LARGEST = 1e-6
# By how much event_fn may differ between two evaluations near to a root, relative to its values
# around, before it is said to jump: round-off, and of single precision and Newton's method.
_SMOOTH, _ROUGH = 1e-6, 1e-2


@dataclass(frozen=True)
class Event:
    """A root found: its time in the integrator's time, and which entry of event_fn vanishes.

    ``jump`` tells whether that entry jumps across zero instead.
    """

    time: float
    entry: int
    jump: bool = False


class EventLocator(Observer):
    """Looks for an event after each accepted step.

    Parameters
    ----------
    function : callable
        ``event_fn(t, y)`` as the user wrote it.
    problem : InitialValueProblem
        State layout and direction of time.
    tolerance : float
        Of the root, relative to the length of the step.
    integrator : TimeIntegrator
        Stands at the start.
    lease : callable
        Returns an integrator without error control, which begins a sweep: it takes the trial steps.
    field : VectorField
        For slopes at the ends of steps.

    Attributes
    ----------
    event : Event or None
        What was found.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        problem: InitialValueProblem,
        tolerance: float,
        integrator: TimeIntegrator,
        lease: Callable[[], TimeIntegrator],
        field: VectorField,
    ) -> None:
        self._problem = problem
        self._tolerance = tolerance
        self.event: Event | None = None
        self._path = EventPath(function, problem, tolerance, integrator, lease, field)
        self._signs: Any = None  # not before the first step tells what is near to zero
        self._start = abs(self._path.known[1.0])
        method, single = integrator.settings.method, problem.layout.dtype is not torch.float64
        self._epsilon = torch.finfo(problem.layout.dtype).eps
        self._iterates = method.implicit
        self._noise = _ROUGH if single or method.implicit else _SMOOTH

    def shorten(self, step: Step, integrator: TimeIntegrator) -> tuple[Step, TimeIntegrator] | None:
        """Return the step shortened to the event, with the solution there; None without event."""
        path = self._path
        path.begin_step(step)
        sides, grid = self._sides(step)
        found = first_crossing(path, sides, grid, path.resolution, self._noise)
        if found is None:
            self._signs = sides.signs
            path.exact(1.0)  # finite
            path.end_step()
            return None
        taker = integrator
        if found.theta < 1.0:
            step = path.retake(found.theta)
            assert path.trial is not None
            taker = path.trial
            taker.solution.copy(integrator.solution)
        self.event = Event(step.end, found.entry, found.jump)
        return step, taker

    def _sides(self, step: Step) -> tuple[Sides, list[float]]:
        """Return the side of each entry before the step, and where to look.

        The solution leaves an event that it starts on: the side of such an entry is that on which
        the step is seen first.
        """
        path = self._path
        since = np.zeros(len(self._start))
        if self._signs is None:
            with np.errstate(invalid="ignore"):
                change = np.fmax.reduce([abs(path.guess(q) - path.known[0.0]) for q in SAMPLES])
            near = self._start <= self._instant(step) / step.length * change
            self._signs = np.where(near, 0.0, np.sign(path.known[0.0]))
        signs = self._signs.copy()
        if signs.all():
            return Sides(signs, since), [0.0, *SAMPLES]
        grid = [*_FIRST, *SAMPLES]
        for theta in grid:
            values = path.guess(theta)
            seen = (signs == 0.0) & (abs(values) > 2.0 * self._start)
            signs[seen], since[seen] = np.sign(values[seen]), theta
        return Sides(signs, since), [0.0, *grid]

    def _instant(self, step: Step) -> float:
        """Return how long after the start an event is the one that the solve starts on.

        The tolerance of roots and round-off, in units of the step, or of the time in which the
        state changes by its own size if that is longer: the steps before may have been.
        """
        before, after = self._path.states
        moved = float((after - before).abs().max())
        size = float(torch.maximum(before.abs(), after.abs()).max())
        span = self._problem.times[-1] - self._problem.times[0]
        scale = min(step.length * size / moved if moved else math.inf, span)
        scale = max(step.length, scale) if math.isfinite(scale) else step.length
        relative = min(16.0 * self._tolerance, _LARGEST) + 64.0 * self._epsilon
        if self._iterates:
            relative += _ITERATION
        return relative * scale + 4.0 * self._epsilon * abs(step.start)


def check_rate(form: str) -> None:
    """Refuse gradients through an event where y' is not at hand."""
    if form in ("mass", "residual"):
        raise ConfigurationError(
            f"gradients through an event need y', and a problem given as {form}= does not tell it: "
            "solve under torch.no_grad(), or give y' = f(t, y) as rhs="
        )


def end_at_event(
    function: Callable[..., Any],
    problem: InitialValueProblem,
    event: Event,
    times: torch.Tensor,
    ys: torch.Tensor,
    method: str,
    stats: Ledger,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the times and states of a solve that an event ended, differentiable.

    Parameters
    ----------
    function, problem
        As in :class:`EventLocator`.
    event : Event
        What it found.
    times : Tensor
        The output times that the user asked for.
    ys : Tensor
        Flat states, shape ``(K + 1, size)``: those of the K outputs before the event, and that at
        the fixed time T of the event.
    method : str
        Its name, for error messages.
    stats : Ledger
        Of the forward sweep; counts one more evaluation of the vector field.

    Returns
    -------
    times : Tensor
        Shape ``(K + 1,)``, the last being the event's.
    ys : Tensor
        As given, the last state moving with the event.

    Notes
    -----
    By the implicit function theorem t* with g(t*, y(t*)) = 0 moves by
    ``dt* = -(g_y dy_T + g_p dp) / (g_t + g_y f)``, and y* = y(t*) by ``dy_T + f dt*`` (R. T. Q.
    Chen, B. Amos & M. Nickel, Learning Neural Event Functions for Ordinary Differential Equations,
    ICLR 2021). f dt* is along the exact flow, as for output times.
    """
    if not times.is_floating_point():
        times = times.to(torch.float64)
    layout = problem.layout
    at = problem.direction * event.time
    where: dict[str, Any] = {"time": at, "step": stats.steps - 1, "method": method}
    end = torch.tensor(at, dtype=torch.float64, device=layout.device)
    time, state = end.to(ys), ys[-1]
    if torch.is_grad_enabled():
        value = call_event(function, layout, time, state, where)[event.entry]
        if event.jump and (value.requires_grad or ys.requires_grad):
            raise EventError(
                "event_fn jumps across zero at the event, so its time has no derivative: let "
                "event_fn cross zero continuously, such as t - 2 for a given time, or solve under "
                "torch.no_grad()",
                **where,
            )
        if value.requires_grad:
            check_rate(problem.form)
            field = vector_field(replace(problem, check_undeclared=False), stats)
            with torch.no_grad():
                slope = problem.direction * field.slope(event.time, state.detach().clone())
            rate = _rate(function, layout, event, time, state, slope, where)
            shift = _Shift.apply(value, rate)
            end, state = end + shift.to(end), state + slope * shift
    reached = len(ys) - 1
    return (
        torch.cat([times[:reached], end.to(times).reshape(1)]),
        torch.cat([ys[:reached], state.reshape(1, -1)]),
    )


class _Shift(torch.autograd.Function):
    """Zero, with the derivative of the event's time by the value of event_fn at a fixed time."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rate: float) -> torch.Tensor:
        ctx.rate = rate
        ctx.save_for_backward(value)
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (output,) = outputs
        gradient = -output / ctx.rate
        if torch.is_grad_enabled():
            gradient = _FirstOrder.apply(gradient, *ctx.saved_tensors)
        return gradient, None


class _FirstOrder(torch.autograd.Function):
    """Identity that refuses to be differentiated: the rate is not the function that it was."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        raise BackwardError(
            "second derivatives through an event are not supported: differentiate the gradient "
            "by finite differences, or end the solve at a fixed time"
        )


def _rate(
    function: Callable[..., Any],
    layout: StateLayout,
    event: Event,
    time: torch.Tensor,
    state: torch.Tensor,
    slope: torch.Tensor,
    where: dict[str, Any],
) -> float:
    """Return g_t + g_y f at the event."""
    t, y = time.clone().requires_grad_(), state.detach().clone().requires_grad_()
    value = call_event(function, layout, t, y, where)[event.entry]
    rate = directional_derivative(value, (t, y), (torch.ones_like(t), slope))
    if rate == 0.0 or not math.isfinite(rate):
        raise EventError(
            f"the rate of event_fn along the solution is {rate} at the event, so its time has no "
            "derivative: let event_fn cross zero at an angle, or solve under torch.no_grad()",
            **where,
        )
    return rate

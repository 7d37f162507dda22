"""Terminal events: where the sign of ``event_fn(t, y)`` changes, and the derivatives of that time.

The end state lies on the discrete solution: the step in which the sign changes is taken again
from its start, shorter, until it ends at the root.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from pnode import vectors
from pnode.devices import HOST
from pnode.errors import ConfigurationError, EventError
from pnode.problem import InitialValueProblem, StateLayout
from pnode.solution import Ledger
from pnode.solvers.integrator import TimeIntegrator
from pnode.solvers.stepping import Step
from pnode.vectorfield import directional_derivative, vector_field

__all__ = ["Event", "EventLocator", "check_rate", "end_at_event"]

# Brent's method bisects at least every third time: a few hundred trials reach any tolerance.
_MAX_TRIALS = 1000
_RELATIVE = 4.0 * float(np.finfo(float).eps)  # the least that SciPy allows


@dataclass(frozen=True)
class Event:
    """A root found: its time in the integrator's time, and which entry of event_fn vanishes."""

    time: float
    entry: int


class EventLocator:
    """Looks for a sign change after each accepted step.

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

    Attributes
    ----------
    event : Event or None
        What was found.
    integrator : TimeIntegrator
        The one that took the last step.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        problem: InitialValueProblem,
        tolerance: float,
        integrator: TimeIntegrator,
        lease: Callable[[], TimeIntegrator],
    ) -> None:
        self._function = function
        self._problem = problem
        self._tolerance = tolerance
        self._lease = lease
        self.event: Event | None = None
        self.integrator = integrator
        self._history = integrator.history
        self._values = self._evaluate(problem.times[0], 0)

    def after_step(self, step: Step) -> Step | None:
        """Return the step shortened to the event, with the solution there; None without event."""
        main = self.integrator
        values = self._evaluate(step.end, step.index)
        before, self._values = self._values, values
        if len(values) != len(before):
            raise EventError(
                f"event_fn returned {len(values)} numbers after {len(before)} the time before",
                **self._where(step.end, step.index),
            )
        # A zero at the start of a step is not an event: the solution is leaving it.
        changed = np.flatnonzero((before != 0.0) & (np.sign(values) != np.sign(before)))
        if not len(changed):
            self._history = main.history
            return None
        values_at = {0.0: before, 1.0: values}
        theta, entry = min(
            (self._root(step, entry, values_at), entry) for entry in changed.tolist()
        )
        if len(values_at) > 2:
            self._retake(step, theta)
            self.integrator.solution.copy(main.solution)
        if theta < 1.0:
            length = theta * step.length
            step = replace(step, length=length, end=step.start + length)
        self.event = Event(step.end, entry)
        return step

    def _root(self, step: Step, entry: int, values_at: dict[float, Any]) -> float:
        """Return a root of one entry, as a fraction of the step (Brent's method)."""

        def value(theta: float) -> float:
            if theta not in values_at:
                self._retake(step, theta)
                values_at[theta] = self._evaluate(step.start + theta * step.length, step.index)
            return float(values_at[theta][entry])

        root: float = brentq(
            value, 0.0, 1.0, xtol=self._tolerance, rtol=_RELATIVE, maxiter=_MAX_TRIALS
        )
        return max(root, self._tolerance, _RELATIVE)  # implicit methods divide by the length

    def _retake(self, step: Step, theta: float) -> None:
        """Take the step again from its start, shortened."""
        main = self.integrator
        if main.settings.adaptive:  # its controller would object
            self.integrator = self._lease()
        self.integrator.restore(self._history)
        outcome = self.integrator.attempt(step.start, theta * step.length, step.index, step.order)
        if outcome.error is not None:
            raise outcome.error

    def _evaluate(self, s: float, step: int) -> Any:
        """Return event_fn's entries at the integrator's solution, as an array."""
        layout = self._problem.layout
        time = torch.tensor(self._problem.direction * s, dtype=layout.dtype, device=layout.device)
        with torch.no_grad():
            u = vectors.copy_out(self.integrator.solution, layout.dtype)
            values = _call(self._function, layout, time, u, self._where(s, step))
        return values.to(device=HOST.device, dtype=torch.float64).numpy()

    def _where(self, s: float, step: int) -> dict[str, Any]:
        return {
            "time": self._problem.direction * s,
            "step": step,
            "method": self.integrator.settings.method.name,
        }


def _call(
    function: Callable[..., Any],
    layout: StateLayout,
    time: torch.Tensor,
    u: torch.Tensor,
    where: dict[str, Any],
) -> torch.Tensor:
    """Call event_fn, check what comes back, and return it flat.

    Parameters
    ----------
    function : callable
        ``event_fn(t, y)``.
    layout : StateLayout
        Of the state.
    time : Tensor
        The user's time, 0-dim.
    u : Tensor
        Flat state, the user's precision; not written into by anybody else.
    where : dict
        Time, step and method, for error messages.
    """
    result = function(time, layout.unflatten(u))
    wrong = None
    if not isinstance(result, torch.Tensor):
        wrong = f"a {type(result).__name__}, not a tensor"
    elif not result.dtype.is_floating_point:
        wrong = f"a tensor of dtype {result.dtype}: an event is a sign change of real numbers"
    elif result.numel() == 0:
        wrong = "an empty tensor"
    elif not bool(torch.isfinite(result.detach()).all()):
        wrong = "NaN or infinity: return finite numbers wherever the solution may come"
    if wrong is not None:
        raise EventError(f"event_fn returned {wrong}", **where)
    return result.reshape(-1)


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
    where = {"time": problem.direction * event.time, "step": stats.steps - 1, "method": method}
    end = torch.tensor(where["time"], dtype=torch.float64, device=layout.device)
    time, state = end.to(ys), ys[-1]
    if torch.is_grad_enabled():
        value = _call(function, layout, time, state, where)[event.entry]
        if value.requires_grad:
            check_rate(problem.form)
            field = vector_field(replace(problem, check_undeclared=False), stats)
            with torch.no_grad():
                slope = problem.direction * field.slope(event.time, state.detach().clone())
            rate = _rate(function, layout, event, time, state, slope, where)
            shift = -(value - value.detach()) / rate
            end, state = end + shift.to(end), state + slope * shift
    reached = len(ys) - 1
    return (
        torch.cat([times[:reached], end.to(times).reshape(1)]),
        torch.cat([ys[:reached], state.reshape(1, -1)]),
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
    value = _call(function, layout, t, y, where)[event.entry]
    rate = directional_derivative(value, (t, y), (torch.ones_like(t), slope))
    if rate == 0.0 or not math.isfinite(rate):
        raise EventError(
            f"the rate of event_fn along the solution is {rate} at the event, so its time has no "
            "derivative: let event_fn cross zero at an angle, or solve under torch.no_grad()",
            **where,
        )
    return rate

"""Events: where the sign of a function of (t, y) changes, and the derivatives of that time.

The state there lies on the discrete solution: the step in which the sign changes is taken again
from its start, shorter, until it ends at the root. It has reached the other side of zero, or zero,
so that a solve that goes on from there does not find the event again. A solve that an event does
not end goes on with a step from there: it is cut in two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pnode.errors import BackwardError, ConfigurationError, EventError
from pnode.event_functions import Events, call_event
from pnode.event_locator import Root
from pnode.integrals import of_state
from pnode.problem import InitialValueProblem, StateLayout
from pnode.products import directional_derivative
from pnode.run import Run
from pnode.solution import Ledger, Stats
from pnode.transfers import remote
from pnode.vectorfield import vector_field
from pnode.watching import watched

__all__ = ["adapted", "check_rate", "split"]


def check_rate(form: str) -> None:
    """Refuse gradients through an event where y' is not at hand."""
    if form in ("mass", "residual"):
        raise ConfigurationError(
            f"gradients through an event need y', and a problem given as {form}= does not tell it: "
            "solve under torch.no_grad(), or give y' = f(t, y) as rhs="
        )


def adapted(
    event_fn: Any,
    problem: InitialValueProblem,
    compute: torch.device | None,
    start: Stats,
    as_called: Callable[[Any], Any],
) -> Events | None:
    """Return what is to be looked for, as functions of the state that is integrated.

    Parameters
    ----------
    event_fn : callable, Event, list of these or None
        The user's.
    problem : InitialValueProblem
        What is solved.
    compute : torch.device or None
        Where they are to be evaluated, if not where the state is.
    start : Stats
        Counts copies there.
    as_called : callable
        Returns a function of the user's for the state inside.
    """
    if event_fn is None:
        return None

    def fit(function: Any) -> Any:
        function = as_called(watched(function))
        function = of_state(problem, function) if problem.integrals else function
        return remote(function, compute, start, strict=False)

    return Events.of(event_fn).mapped(fit)


def split(
    events: Events | None, run: Run, times: torch.Tensor, ys: torch.Tensor, method: str
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return outputs and events, each by itself and differentiable.

    Parameters
    ----------
    events : Events or None
        What was looked for.
    run : Run
        The solve; its ledger counts an evaluation of the vector field for each event.
    times : Tensor
        The output times that the user asked for.
    ys : Tensor
        Flat states, shape ``(K + E, size)``: those of the K outputs, and those at the fixed times
        of the E events; of another shape without events.
    method : str
        Its name, for error messages.

    Returns
    -------
    times, ys : Tensor
        Of the outputs, and last of the event that has ended the solve.
    found : list of (Tensor, Tensor)
        Times and flat states for each event.

    Notes
    -----
    By the implicit function theorem t* with g(t*, y(t*)) = 0 moves by
    ``dt* = -(g_y dy_T + g_p dp) / (g_t + g_y f)``, and y* = y(t*) by ``dy_T + f dt*`` (R. T. Q.
    Chen, B. Amos & M. Nickel, Learning Neural Event Functions for Ordinary Differential Equations,
    ICLR 2021). f dt* is along the exact flow, as for output times.
    """
    if events is None:
        return times, ys, []
    if not times.is_floating_point():
        times = times.to(torch.float64)
    number, problem = len(run.problem.times) - len(run.roots), run.problem
    rows = ys.reshape(len(problem.times), -1)
    points = [
        _at_event(events, problem, root, times, state, method, run.stats)
        for root, state in zip(run.roots, rows[number:], strict=True)
    ]
    owners = [events.owner(root.entry) for root in run.roots]
    found = []
    for index in range(len(events)):
        mine = [point for owner, point in zip(owners, points, strict=True) if owner == index]
        found.append(
            (
                torch.stack([time for time, _ in mine]) if mine else times.detach()[:0],
                torch.stack([state for _, state in mine]) if mine else rows.detach()[:0],
            )
        )
    if run.last is not None:
        time, state = points[list(run.roots).index(run.last)]
        times = torch.cat([times[:number], time.reshape(1)])
        ys = torch.cat([rows[:number], state.reshape(1, -1)])
    elif run.roots:
        ys = rows[:number]
    return times, ys, found


def _at_event(
    events: Events,
    problem: InitialValueProblem,
    root: Root,
    times: torch.Tensor,
    state: torch.Tensor,
    method: str,
    stats: Ledger,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the time of one event, and the state that moves with it."""
    layout = problem.layout
    at = problem.direction * root.time
    where: dict[str, Any] = {"time": at, "step": root.node - 1, "method": method}
    end = torch.tensor(at, dtype=torch.float64, device=layout.device)
    time = end.to(state)
    if torch.is_grad_enabled():
        value = call_event(events, layout, time, state, where)[root.entry]
        name = events.name(events.owner(root.entry))
        if root.jump and (value.requires_grad or state.requires_grad):
            raise EventError(
                f"{name} jumps across zero at the event, so its time has no derivative: let it "
                "cross zero continuously, such as t - 2 for a given time, or solve under "
                "torch.no_grad()",
                **where,
            )
        if value.requires_grad:
            check_rate(problem.form)
            field = vector_field(replace(problem, check_undeclared=False), stats)
            with torch.no_grad():
                slope = problem.direction * field.slope(root.time, state.detach().clone())
            rate = _rate(events, layout, root, time, state, slope, where)
            shift = _Shift.apply(value, rate)
            end, state = end + shift.to(end), state + slope * shift
    return end.to(times), state


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
    events: Events,
    layout: StateLayout,
    root: Root,
    time: torch.Tensor,
    state: torch.Tensor,
    slope: torch.Tensor,
    where: dict[str, Any],
) -> float:
    """Return g_t + g_y f at the event."""
    t, y = time.clone().requires_grad_(), state.detach().clone().requires_grad_()
    value = call_event(events, layout, t, y, where)[root.entry]
    rate = directional_derivative(value, (t, y), (torch.ones_like(t), slope))
    if rate == 0.0 or not math.isfinite(rate):
        raise EventError(
            f"the rate of {events.name(events.owner(root.entry))} along the solution is {rate} at "
            "the event, so its time has no derivative: let it cross zero at an angle, or solve "
            "under torch.no_grad()",
            **where,
        )
    return rate

"""Times and states of events as functions of all that they depend on.

A solve gives the state at a fixed time T, which is where the event is. With the exact flow from
there, phi(tau) with phi(0) = y(T), the event is at T + tau with g(T + tau, phi(tau)) = 0. Its tau
is zero as a number, and a function of y(T), of f and of g with derivatives: two steps of Newton's
method with the rate r = g_t + g_y f at the event give these up to the second, and so does a step of
Heun's method, the mean of two slopes, for phi. To first order it is the implicit function theorem
of R. T. Q. Chen, B. Amos & M. Nickel, Learning Neural Event Functions for Ordinary Differential
Equations, ICLR 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pnode.base.errors import BackwardError, EventError
from pnode.base.ledger import Ledger
from pnode.base.transforms import lowered, moves, outside
from pnode.field.products import directional_derivative
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.sweeping.event_functions import Events, call_event
from pnode.sweeping.event_locator import Root
from pnode.sweeping.output_times import flow_slope

__all__ = ["Vanishing", "at_event"]


def at_event(
    events: Events, problem: InitialValueProblem, root: Root, state: torch.Tensor, method: str,
    stats: Ledger,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the time of one event, and the state that moves with it.

    Parameters
    ----------
    events : Events
        What was looked for.
    problem : InitialValueProblem
        What was solved, as it was given.
    root : Root
        The event.
    state : Tensor
        Flat state at its time, as a function of what it depends on at a fixed time.
    method : str
        For error messages.
    stats : Ledger
        Counts evaluations of the vector field.
    """
    layout = problem.layout
    at = problem.direction * root.time
    where: dict[str, Any] = {"time": at, "step": root.node - 1, "method": method}
    end = torch.tensor(at, dtype=torch.float64, device=layout.device)
    if not (torch.is_grad_enabled() or moves(state)):
        return end, state
    time = end.to(state)
    value = call_event(events, layout, time, state, where)[root.entry]
    name = events.name(events.owner(root.entry))
    if root.jump and (moves(value) or moves(state)):
        raise EventError(
            f"{name} jumps across zero at the event, so its time has no derivative: let it cross "
            "zero continuously, such as t - 2 for a given time, or solve under torch.no_grad()",
            **where,
        )
    if not moves(value):
        return end, state
    stats.rhs += 2
    first = flow_slope(problem, time, state)
    rate = _rate(events, layout, root, time, lowered(state), lowered(first), where)
    tau = _newton(value, rate)
    second = flow_slope(problem, time + tau.to(time), state + tau.to(state) * first)
    mean = 0.5 * (first + second)
    moved = state + tau.to(state) * mean
    value = call_event(events, layout, time + tau.to(time), moved, where)[root.entry]
    tau = tau + _newton(value, rate)
    tau = tau + Vanishing.apply(tau, 0)
    return end + tau.to(end), state + tau.to(state) * mean


def _newton(value: torch.Tensor, rate: float) -> torch.Tensor:
    """Return a step of Newton's method from what counts as a root."""
    return (value - lowered(value).detach().item()) * (-1.0 / rate)


class Vanishing(torch.autograd.Function):
    """Zero, with first and second derivatives that are zero; others are refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, order: int) -> torch.Tensor:
        """Return zero."""
        if order > 2:
            raise BackwardError(
                "third derivatives through an event, or through the time of an output at a break, "
                "are not supported: differentiate the second ones by finite differences, or end "
                "the solve at a fixed time"
            )
        return torch.zeros_like(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        """Keep what derivatives need."""
        value, ctx.order = inputs
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Return zero, with derivatives of its own."""
        (value,) = ctx.saved_tensors
        return outputs[0] * Vanishing.apply(value, ctx.order + 1), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        """Return zero, with derivatives of its own."""
        (value,) = ctx.saved_tensors
        return tangents[0] * Vanishing.apply(value, ctx.order + 1)


def _rate(
    events: Events, layout: StateLayout, root: Root, time: torch.Tensor, state: torch.Tensor,
    slope: torch.Tensor, where: dict[str, Any],
) -> float:  # fmt: skip
    """Return g_t + g_y f at the event."""
    with outside(), torch.enable_grad():
        t, y = time.detach().clone().requires_grad_(), state.detach().clone().requires_grad_()
        value = call_event(events, layout, t, y, where)[root.entry]
        directions = (torch.ones_like(t), slope.detach())
        rate = directional_derivative(value, (t, y), directions)
    if rate == 0.0 or not math.isfinite(rate):
        raise EventError(
            f"the rate of {events.name(events.owner(root.entry))} along the solution is {rate} at "
            "the event, so its time has no derivative: let it cross zero at an angle, or solve "
            "under torch.no_grad()",
            **where,
        )
    return rate

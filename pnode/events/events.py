"""Events: where the sign of a function of (t, y) changes, and the derivatives of that time.

The state there lies on the discrete solution: the step in which the sign changes is taken again
from its start, shorter, until it ends at the root. It has reached the other side of zero, or zero,
so that a solve that goes on from there does not find the event again. A solve that an event does
not end goes on with a step from there: it is cut in two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pnode.base.ledger import Stats
from pnode.events.event_derivatives import at_event
from pnode.field.watching import of_numbers
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import remote
from pnode.sweeping.event_functions import Events
from pnode.sweeping.integrals import of_state
from pnode.sweeping.run import Run

__all__ = ["adapted", "split"]


def adapted(
    event_fn: Any,
    problem: InitialValueProblem,
    compute: torch.device | None,
    start: Stats,
    as_called: Callable[[Any], Any],
) -> tuple[Events | None, Events | None]:
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

    Returns
    -------
    events, differentiable : Events or None
        For the sweep, which sees numbers; for derivatives at the events.
    """
    if event_fn is None:
        return None, None

    def fit(function: Any) -> Any:
        function = as_called(function)
        function = of_state(problem, function) if problem.integrals else function
        return remote(function, compute, start, strict=False)

    given = Events.of(event_fn)
    return given.mapped(lambda function: fit(of_numbers(function))), given.mapped(fit)


def split(
    events: Events | None,
    differentiable: Events | None,
    problem: InitialValueProblem,
    run: Run,
    times: torch.Tensor,
    ys: torch.Tensor,
    method: str,
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return outputs and events, each by itself and differentiable.

    Parameters
    ----------
    events, differentiable : Events or None
        What was looked for; see :func:`adapted`.
    problem : InitialValueProblem
        What was solved, as it was given.
    run : Run
        The solve; its ledger counts two evaluations of the vector field for each event.
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
    """
    if events is None or differentiable is None:
        return times, ys, []
    if not times.is_floating_point():
        times = times.to(torch.float64)
    rows = ys.reshape(len(run.problem.times), -1)
    number = len(rows) - len(run.roots)
    points = []
    for root, state in zip(run.roots, rows[number:], strict=True):
        time, state = at_event(differentiable, problem, root, state, method, run.stats)
        points.append((time.to(times), state))
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

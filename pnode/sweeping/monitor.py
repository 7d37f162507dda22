"""What looks on while a solve runs: the user's monitor, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from pnode.base import vectors
from pnode.base.ledger import Stats
from pnode.base.notices import shown_to
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import carry_once
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step
from pnode.sweeping.run import Requests

__all__ = ["Callbacks", "Monitor", "at_home", "backward_bar", "onlookers", "progress_bar"]


class Monitor(Observer):
    """Calls ``function(step, t, y)`` after every accepted step.

    Parameters
    ----------
    function : callable
        The user's.
    problem : InitialValueProblem
        What is solved.
    before : int
        Steps that were taken before those of the sweep.
    shown : int
        Steps of the sweep that it was shown before.
    """

    def __init__(
        self,
        function: Callable[[int, float, Any], None],
        problem: InitialValueProblem,
        before: int = 0,
        shown: int = 0,
    ) -> None:
        self._function = function
        self._problem = problem
        self._first, self._shown = before + 1, shown

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Show a copy of the solution."""
        if step.index < self._shown:
            return
        problem = self._problem
        state = vectors.copy_out(integrator.solution, problem.layout.dtype)
        time = problem.direction * step.end
        number = self._first + step.index
        problem.ranks.attempt(self._function, number, time, problem.layout.unflatten(state))


class Callbacks(Observer):
    """Tells of steps as torchdiffeq does: where they begin, and how long they are.

    Parameters
    ----------
    function : callable
        ``function((name, dt), t, y)``, see ``Requests``.
    problem : InitialValueProblem
        What is solved.
    """

    def __init__(
        self, function: Callable[[Any, float, Any], None],
        problem: InitialValueProblem,
    ) -> None:  # fmt: skip
        self._function, self._problem = function, problem
        self._start: Any = None

    def before_attempt(self, s: float, length: float, integrator: TimeIntegrator) -> None:
        """Tell of a step that is going to be tried."""
        self._start = vectors.copy_out(integrator.solution, self._problem.layout.dtype)
        self._tell("callback_step", s, length)

    def after_rejection(self, s: float, length: float) -> None:
        """Tell of a step that was rejected."""
        self._tell("callback_reject_step", s, length)

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Tell of a step that was accepted."""
        self._tell("callback_accept_step", step.start, step.length)

    def _tell(self, name: str, s: float, length: float) -> None:
        problem = self._problem
        state = problem.layout.unflatten(self._start.clone())
        problem.ranks.attempt(self._function, (name, length), problem.direction * s, state)


def onlookers(requests: Requests, problem: InitialValueProblem) -> list[Observer]:
    """Return those that a sweep's steps are shown to."""
    found: list[Observer] = []
    if requests.monitor is not None:
        before = requests.steps_before or 0
        found.append(Monitor(requests.monitor, problem, before, requests.shown))
    if requests.callbacks is not None:
        found.append(Callbacks(requests.callbacks, problem))
    return found


def at_home(monitor: Any, compute: torch.device | None, stats: Stats) -> Any:
    """Return the monitor as it is called with a state on the host."""
    if monitor is None or compute is None:
        return monitor
    return lambda step, t, y: monitor(step, t, carry_once(y, compute, stats))


def progress_bar(
    problem: InitialValueProblem, requests: Requests, wanted: bool
) -> AbstractContextManager[Requests]:
    """Let the monitor move a progress bar over time before it calls the user's, if wanted.

    The bar also shows what is being compiled; backward sweeps have one of their own.
    """
    return _progress_bar(problem, requests) if wanted else nullcontext(requests)


@contextmanager
def _progress_bar(problem: InitialValueProblem, requests: Requests) -> Iterator[Requests]:
    start, end = problem.times[0], problem.times[-1]

    def monitor(step: int, t: float, y: Any) -> None:
        fraction = (problem.direction * t - start) / (end - start)
        bar.set_postfix_str(f"t = {t:.4g}, step {step}", refresh=False)
        bar.update(fraction - bar.n)
        if requests.monitor is not None:
            requests.monitor(step, t, y)

    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]") as bar:
        with shown_to(bar.set_postfix_str):
            yield replace(requests, monitor=monitor, progress=True)


def backward_bar(steps: int, wanted: bool) -> AbstractContextManager[Callable[[int], None] | None]:
    """Yield what moves a bar over the steps of a backward sweep; None if it is not wanted."""
    return _backward_bar(steps) if wanted else nullcontext()


@contextmanager
def _backward_bar(steps: int) -> Iterator[Callable[[int], None]]:
    # Autograd may run backward sweeps in a thread of its own, where tqdm is at home, too.
    with tqdm(total=steps, desc="backward", unit="step") as bar:

        def told(step: int) -> None:
            bar.update(steps - step - bar.n)

        yield told

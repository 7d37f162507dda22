"""Looks for events after each accepted step, and cuts the step short at the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnode.base import vectors
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.event_programs import EventPrograms
from pnode.solvers.compiled.shown_steps import GivenUp, Sieve
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step
from pnode.sweeping.event_functions import Events
from pnode.sweeping.event_path import EventPath
from pnode.sweeping.event_search import SAMPLES, Crossing, Sides, first_crossing

__all__ = ["EventLocator", "Root"]

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


@dataclass(frozen=True, eq=False)
class Root:
    """A root found: its time in the integrator's time, and which number vanishes.

    Attributes
    ----------
    time : float
        The integrator's.
    entry : int
        Of all numbers that the events' functions return.
    node : int
        How many steps come before, with that which ends here.
    state : Tensor
        There, flat, PETSc's precision.
    jump : bool
        Whether the number jumps across zero instead.
    """

    time: float
    entry: int
    node: int
    state: torch.Tensor
    jump: bool = False


class EventLocator(Observer):
    """Looks for events after each accepted step.

    Parameters
    ----------
    events : Events
        What to look for.
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
    before : ndarray, optional
        :attr:`sides` of the solve that this one goes on from.

    Attributes
    ----------
    roots : list of Root
        What was found, one for each event at each time.
    last : Root or None
        That among them which ended the solve.
    """

    def __init__(
        self,
        events: Events,
        problem: InitialValueProblem,
        tolerance: float,
        integrator: TimeIntegrator,
        lease: Callable[[], TimeIntegrator],
        field: VectorField,
        before: Any = None,
    ) -> None:
        self._problem = problem
        self._tolerance = tolerance
        self._events = events
        self.roots: list[Root] = []
        self.last: Root | None = None
        self._path = EventPath(events, problem, tolerance, integrator, lease, field)
        self._signs: Any = None  # not before the first step tells what is near to zero
        self._start = abs(self._path.known[1.0])
        self._before = before
        method, single = integrator.settings.method, problem.layout.dtype is not torch.float64
        self._epsilon = torch.finfo(problem.layout.dtype).eps
        self._iterates = method.implicit
        self._noise = _ROUGH if single or method.implicit else _SMOOTH

    @property
    def sides(self) -> Any:
        """On which side of zero each entry is, 0 for none yet; None without a step."""
        return self._signs

    @property
    def trials(self) -> list[TimeIntegrator]:
        """What has taken steps that ended at events."""
        return [self._path.trial] if self._path.trial is not None and self.roots else []

    def pass_over(self, s: float, step: int, state: torch.Tensor) -> None:
        """Go on at the start of a step, from a state behind steps that cannot hold an event.

        Raises
        ------
        GivenUp
            If they have held one: a number is not on its side any more.
        """
        self._path.pass_over(s, step, state)
        if not np.array_equal(np.sign(self._path.known[1.0]), self._signs):
            raise GivenUp("machine code passed over an event")

    def sieve(self, programs: EventPrograms) -> Sieve | None:
        """Return what finds the steps to look at in machine code; see :class:`EventPath`."""
        return self._path.sieve(programs, self)

    def before_step(self, index: int, integrator: TimeIntegrator) -> None:
        """Let steps start afresh where the last slope of one cut short would be the next's first.

        That slope is a difference divided by the length of its step.
        """
        if self._events.cut and integrator.settings.method.carries_slope:
            integrator.restart_step()

    def shorten(
        self, step: Step, integrator: TimeIntegrator
    ) -> tuple[Step, TimeIntegrator, bool] | None:
        """Return the step up to the first event in it, who took it, and whether the solve ends."""
        path = self._path
        path.begin_step(step)
        sides, grid = self._sides(step)
        found, hits = self._first(sides, grid)
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
        state = vectors.copy_out(integrator.solution)
        for entry in hits:
            jump = found.jump and entry == found.entry
            root = Root(step.end, entry, step.index + 1, state, jump)
            self.roots.append(root)
            if self.last is None and self._events[self._events.owner(entry)].terminal:
                self.last = root
        if self.last is not None:
            return step, taker, True
        self._go_on(sides, found.theta, step, integrator, taker)
        return step, taker, False

    def _first(self, sides: Sides, grid: list[float]) -> tuple[Crossing | None, list[int]]:
        """Return the first crossing that is an event, and an entry for each event there."""
        path, events = self._path, self._events
        while True:
            found = first_crossing(path, sides, grid, path.resolution, self._noise)
            if found is None:
                return None, []
            theta = found.theta
            left = np.flatnonzero(sides.left(theta, path.known[theta])).tolist()
            hits: dict[int, int] = {}
            for entry in [found.entry, *left]:
                owner = events.owner(entry)
                if events[owner].direction in (0, -sides.signs[entry]):
                    hits.setdefault(owner, entry)
            if hits:
                return found, [hits[owner] for owner in sorted(hits)]
            self._forget(sides, left, path.known[theta])
            if theta >= 1.0:  # nothing is left of the step
                return None, []
            grid = [theta + q * (1.0 - theta) for q in (0.0, *_FIRST, *SAMPLES)]
            self._look(sides, grid[1:])

    def _forget(self, sides: Sides, entries: list[int], values: Any) -> None:
        """Take entries to be on no side from here on, until they are clearly on one."""
        sides.signs[entries] = 0.0
        self._start[entries] = np.maximum(abs(values), self._unclear())[entries]

    def _look(self, sides: Sides, grid: list[float]) -> None:
        """Find the sides of entries that are on none, where they are first seen on one."""
        for theta in grid:
            values = self._path.guess(theta)
            seen = (sides.signs == 0.0) & (abs(values) > 2.0 * self._start)
            sides.signs[seen], sides.since[seen] = np.sign(values[seen]), theta

    def _go_on(
        self, sides: Sides, theta: float, step: Step, main: TimeIntegrator, taker: TimeIntegrator
    ) -> None:
        """Let the next step begin at an event."""
        path = self._path
        values = path.known[theta]
        crossed = np.flatnonzero(sides.left(theta, values)).tolist()
        # What had not been seen on a side before the event still has none.
        sides.signs[sides.since >= theta] = 0.0
        self._forget(sides, crossed, values)
        self._signs = sides.signs
        if taker is not main:
            main.restore(taker.history)
        path.cut(step, theta)

    def _sides(self, step: Step) -> tuple[Sides, list[float]]:
        """Return the side of each entry before the step, and where to look.

        The solution leaves an event that it starts on: the side of such an entry is that on which
        the step is seen first.
        """
        path = self._path
        since = np.zeros(len(self._start))
        self._step = step
        if self._signs is None:
            near = self._start <= self._unclear()
            self._signs = np.where(near, 0.0, np.sign(path.known[0.0]))
            if self._before is not None:  # an event of the solve before is not one again
                self._signs = np.where(self._before != 0.0, self._before, self._signs)
        sides = Sides(self._signs.copy(), since)
        if sides.signs.all():
            return sides, [0.0, *SAMPLES]
        grid = [*_FIRST, *SAMPLES]
        self._look(sides, grid)
        return sides, [0.0, *grid]

    def _unclear(self) -> Any:
        """Return which values in this step are not told from zero."""
        path, step = self._path, self._step
        with np.errstate(invalid="ignore"):
            change = np.fmax.reduce([abs(path.guess(q) - path.known[0.0]) for q in SAMPLES])
        return self._instant(step) / step.length * change

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

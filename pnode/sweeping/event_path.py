"""event_fn along the steps of a sweep: on the discrete solution, and on an interpolant of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pnode.adjoint.identity import describe
from pnode.base import vectors
from pnode.base.devices import HOST
from pnode.base.errors import EventError
from pnode.base.interpolation import hermite, lagrange
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.event_programs import EventPrograms
from pnode.solvers.compiled.shown_steps import Seeker, Sieve
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Step
from pnode.sweeping.event_functions import Events, call_event
from pnode.sweeping.event_search import RELATIVE, SAMPLES

__all__ = ["EventPath"]

# A method's own interpolant is used if it is of higher degree than the Hermite cubic.
_OWN_DEGREE = 4
# Up to so many entries the interpolant is evaluated at all samples at once.
_SMALL = 1 << 14
# Nodes of the interpolant where y' is not at hand.
_NODES = 4


@lru_cache(maxsize=16)
def _weights(thetas: tuple[float, ...]) -> torch.Tensor:
    """Return the weights of both states and both slopes of the Hermite cubic, a row for each."""
    cubics = map(hermite, thetas)
    rows = [(*map(float, cubic.state), *map(float, cubic.slope)) for cubic in cubics]
    return torch.tensor(rows, dtype=vectors.REAL, device=HOST.device)


class EventPath:
    """The values of event_fn along the last step.

    Parameters
    ----------
    events : Events
        As the user wrote them.
    problem : InitialValueProblem
        State layout and direction of time.
    tolerance : float
        Least theta at which the step is taken again.
    main : TimeIntegrator
        Takes the sweep's steps; stands at the start.
    lease : callable
        Returns an integrator without error control, which begins a sweep: it takes the trial steps,
        and the sweep's own goes on from where it stands if they find nothing.
    field : VectorField
        For the slopes of the Hermite interpolant: one evaluation at either end of a step, shared
        between neighbours.

    Attributes
    ----------
    known : dict
        The entries at points of the discrete solution, by theta.
    states : tuple of Tensor
        At both ends of the step, PETSc's precision.
    trial : TimeIntegrator or None
        The one that takes trial steps, once there is one.
    """

    def __init__(
        self,
        events: Events,
        problem: InitialValueProblem,
        tolerance: float,
        main: TimeIntegrator,
        lease: Callable[[], TimeIntegrator],
        field: VectorField,
    ) -> None:
        self._events = events
        self._problem = problem
        self._tolerance = tolerance
        self._main = main
        self._lease = lease
        self._field = field
        self.trial: TimeIntegrator | None = None
        self._at: Step | None = None  # where the trial integrator stands
        self._history = main.history
        settings = main.settings
        self._own = (
            settings.method.scheme is not None
            and main.interpolates
            and settings.method.scheme.interpolation_degree >= _OWN_DEGREE
        )
        state = vectors.copy_out(main.solution)
        self.states = state, state
        self._nodes = [(problem.times[0], state)]
        self._slopes: list[torch.Tensor | None] = [None, None]
        self._guesses: dict[float, Any] = {}
        self._sampled: torch.Tensor | None = None  # the interpolant at all samples
        self.known: dict[float, Any] = {1.0: self._evaluate(problem.times[0], 0, state)}
        self._checked(self.known[1.0], problem.times[0], 0)

    def begin_step(self, step: Step) -> None:
        """Look at a step that the main integrator has just taken."""
        self._step = step
        self._clock = 2.0 * float(np.spacing(abs(step.end))) / step.length
        self._least = max(self._tolerance, RELATIVE, self._clock)
        state = vectors.copy_out(self._main.solution)
        self.states = self.states[1], state
        self._nodes = [*self._nodes, (step.end, state)][-_NODES:]
        self._slopes = [self._slopes[1], None]
        self._guesses, self._at, self._sampled = {}, None, None
        end = self._evaluate(step.end, step.index, state)
        self.known = {0.0: self.known[1.0], 1.0: end}

    def pass_over(self, s: float, step: int, state: torch.Tensor) -> None:
        """Go on at the start of a step, from a state behind steps that were not looked at."""
        self.states, self._slopes = (state, state), [None, None]
        self.known = {1.0: self._evaluate(s, step, state)}

    def sieve(self, programs: EventPrograms, seeker: Seeker) -> Sieve | None:
        """Return what finds the steps to look at in machine code, if that can do so."""
        problem, layout = self._problem, self._problem.layout
        if not problem.gives_rate or layout.dtype is not torch.float64:
            return None

        def values(time: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            where = self._where(problem.times[0], 0)
            return call_event(self._events, layout, time, u.clone(), where)

        program = programs.find(
            (layout, len(self._events)), values,
            lambda: describe("event_fn", self._events.given), self._time(problem.times[0]),
            self.states[1],
        )  # fmt: skip
        thetas = (0.0, *SAMPLES)
        return None if program is None else Sieve(program, seeker, thetas, _weights(thetas))

    def end_step(self) -> None:
        """Go on from the end of the step."""
        self._history = self._main.history

    def cut(self, step: Step, theta: float) -> None:
        """Go on from where the step, taken again, ends; all that was seen behind it is gone."""
        state = vectors.copy_out(self._main.solution)
        self.states = self.states[0], state
        self._nodes = [*self._nodes[:-1], (step.end, state)]
        self._slopes = [self._slopes[0], None]
        self.known = {1.0: self.known[theta]}
        self.end_step()

    @property
    def resolution(self) -> float:
        """The tolerance of theta: the user's, or that of time.

        Brent's method, which converges fast, is asked for a little more: the point returned is not
        the best one, but the best beyond the root.
        """
        return max(self._tolerance / 16.0, RELATIVE, self._clock)

    def guess(self, theta: float) -> Any:
        """Return the entries at a point of the interpolant, or the known ones; NaN may be one."""
        if theta in self.known:
            return self.known[theta]
        if theta not in self._guesses:
            s = self._step.start + theta * self._step.length
            self._guesses[theta] = self._evaluate(s, self._step.index, self._interpolate(theta))
        return self._guesses[theta]

    def exact(self, theta: float) -> Any:
        """Return the entries where the step, taken again, ends at this point; they are finite."""
        step = self._step
        if theta > 0.0:
            theta = max(theta, self._least)  # implicit methods divide by the length
        if theta not in self.known:
            end = self.retake(theta)
            state = vectors.copy_out(self._trial().solution)
            self.known[theta] = self._evaluate(end.end, step.index, state)
        return self._checked(self.known[theta], step.start + theta * step.length, step.index)

    def retake(self, theta: float) -> Step:
        """Take the step again from its start, shortened, and return what it is then."""
        step = self._step
        if theta == 1.0:
            return step
        end = step.start + theta * step.length
        shorter = replace(step, length=end - step.start, end=end)
        if shorter != self._at:
            trial = self._trial()
            trial.restore(self._history)
            self._at = None
            outcome = trial.attempt(
                shorter.start, shorter.length, step.index, step.order, shorter.end
            )
            if outcome.error is not None:
                raise outcome.error
            self._at = shorter
        return shorter

    def _trial(self) -> TimeIntegrator:
        if self.trial is None:
            self.trial = self._lease()
        return self.trial

    def _interpolate(self, theta: float) -> torch.Tensor:
        """Return a state within the step: of the method's interpolant, or of a cubic's."""
        step = self._step
        if self._own:
            return self._main.interpolate(step.start + theta * step.length)
        if not self._problem.gives_rate:
            weights = lagrange([s for s, _ in self._nodes], step.start + theta * step.length)
            result = torch.zeros_like(self.states[1])
            for weight, (_, state) in zip(weights, self._nodes, strict=True):
                result.add_(state, alpha=weight)
            return result
        small = theta in SAMPLES and len(self.states[0]) <= _SMALL
        if small and self._sampled is not None:
            return self._sampled[SAMPLES.index(theta)]
        rows = [*self.states]
        for end, s in enumerate((step.start, step.end)):
            slope = self._slopes[end]
            if slope is None:
                slope = self._slopes[end] = self._slope_at(s, self.states[end])
            rows.append(slope)
        ends = torch.stack(rows)
        ends[2:] *= step.length
        if not small:
            return _weights((theta,)).to(ends)[0] @ ends
        self._sampled = _weights(SAMPLES).to(ends) @ ends
        return self._interpolate(theta)

    def _slope_at(self, s: float, state: torch.Tensor) -> torch.Tensor:
        """Return y', or NaN where f cannot be evaluated, as it may be beyond an event.

        A guess that is not finite is not used. If there is no event, the next step evaluates f
        there, and what it raises comes through.
        """
        try:
            return self._field.slope(s, state.to(self._field.dtype, copy=True)).to(vectors.REAL)
        except Exception:
            return torch.full_like(state, math.nan)

    def _evaluate(self, s: float, step: int, state: torch.Tensor) -> Any:
        """Return event_fn's entries at a state, as an array."""
        layout, where = self._problem.layout, self._where(s, step)
        with torch.no_grad():
            u = state.to(layout.dtype, copy=True)
            values = call_event(self._events, layout, self._time(s), u, where)
        return values.to(device=HOST.device, dtype=torch.float64).numpy().copy()

    def _time(self, s: float) -> torch.Tensor:
        layout = self._problem.layout
        return torch.tensor(self._problem.direction * s, dtype=layout.dtype, device=layout.device)

    def _checked(self, values: Any, s: float, step: int) -> Any:
        """Refuse numbers that are not finite, on the discrete solution."""
        if not np.isfinite(values).all():
            raise EventError(
                "event_fn returned NaN or infinity: return finite numbers wherever the solution "
                "may come",
                **self._where(s, step),
            )
        return values

    def _where(self, s: float, step: int) -> dict[str, Any]:
        return {
            "time": self._problem.direction * s,
            "step": step,
            "method": self._main.settings.method.name,
        }

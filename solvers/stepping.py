"""The forward sweep: choose the steps, land on every output time, go back after a failure.

PETSc's own TSSolve is not used: it does not tell the accepted step sizes exactly after a
rejection, accepts a bad step at its minimum step size, and goes on through NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pnode.base.errors import NonFiniteVectorField, SolveError, StepLimitReached, StepSizeUnderflow
from pnode.base.ledger import Ledger
from pnode.field.vectorfield import VectorField
from pnode.solvers.clock import FixedGrid, least_step, move
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.step_control import StepControl, first_step, fixed_grid, unresolved

__all__ = ["Observer", "Step", "forward_sweep"]


@dataclass(frozen=True, slots=True)
class Step:
    """An accepted step: index, start time and length in the integrator's time.

    ``order`` is the one taken, where a method has several (see ``MultistepIntegrator.attempt``); of
    implicit one-step methods, how (see ``TimeIntegrator.attempt``).
    """

    index: int
    start: float
    length: float
    end: float
    order: int = 0

    def at(self, c: float) -> float:
        """Return the time of a stage at ``c`` lengths of the step: its very ends at 0 and 1."""
        return self.end if c == 1.0 else self.start + c * self.length


class Observer:
    """What looks at a forward sweep: it records, interpolates, ends it, or shows it.

    Every method does nothing unless it is overridden, and is collective: called on all ranks.
    """

    def before_step(self, index: int, integrator: TimeIntegrator) -> None:
        """Look at the start of a step, before it is first tried."""

    def before_attempt(self, s: float, length: float, integrator: TimeIntegrator) -> None:
        """Look at the start of a step of this length, each time one is tried."""

    def after_rejection(self, s: float, length: float) -> None:
        """Hear of a step that was tried and not accepted."""

    def shorten(
        self, step: Step, integrator: TimeIntegrator
    ) -> tuple[Step, TimeIntegrator, bool] | None:
        """Cut an accepted step short, before any observer hears of it.

        Returns
        -------
        tuple or None
            The step shortened, the integrator that took it, and whether the sweep ends there; the
            solution of ``integrator`` is there, too. None to go on.
        """
        return None

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Look at an accepted step; ``integrator`` took it.

        ``last`` tells whether the sweep ends here, before its last output time.
        """

    def output(self, index: int, integrator: TimeIntegrator) -> None:
        """Look at the solution at output time ``index``, 0 included, unless it lies in a step."""


def forward_sweep(
    integrator: TimeIntegrator,
    field: VectorField,
    times: tuple[float, ...],
    control: StepControl,
    ledger: Ledger,
    observers: Iterable[Observer],
    done: Sequence[Step] = (),
) -> TimeIntegrator:
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
    observers : iterable of Observer
        Told of steps and outputs, each in this order.
    done : sequence of Step
        Steps taken in another process; the integrator stands at the end of the last.

    Returns
    -------
    TimeIntegrator
        The one that took the last step.
    """
    sweep = _Sweep(integrator, field, control, ledger, tuple(observers))
    sweep.index = len(done)
    sweep.number += len(done)
    reached = done[-1].end if done else times[0]
    if done:
        sweep.natural = done[-1].length
    else:
        if not control.steps_before:
            integrator.monitor(0, times[0])
        sweep.output(0)
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
                    return sweep.taker
        else:
            sweep.adapt(max(start, reached), end)
            if sweep.ended:
                return sweep.taker
        if end >= reached:
            sweep.output(index)
    return sweep.taker


def _overridden(observers: Iterable[Observer], name: str) -> list[Callable[..., Any]]:
    """Return a method of those observers that have one of their own."""
    nothing = getattr(Observer, name)
    return [getattr(one, name) for one in observers if getattr(type(one), name) is not nothing]


class _Sweep:
    """Step counter and natural step size of one forward sweep."""

    def __init__(
        self,
        integrator: TimeIntegrator,
        field: VectorField,
        control: StepControl,
        ledger: Ledger,
        observers: tuple[Observer, ...],
    ) -> None:
        self.integrator = self.taker = integrator
        self.field = field
        self.control = control
        self.ledger = ledger
        self.announced = -1
        self.ended = False
        # Steps of this sweep so far, and of the whole solve.
        self.index, self.number = 0, control.steps_before
        self.natural: float | None = None
        # What does nothing is not called in every step.
        self.before = _overridden(observers, "before_step")
        self.attempts = _overridden(observers, "before_attempt")
        self.rejections = _overridden(observers, "after_rejection")
        self.shorten = _overridden(observers, "shorten")
        self.after = _overridden(observers, "after_step")
        self.outputs = _overridden(observers, "output")

    def output(self, index: int) -> None:
        """Say that an output time is reached."""
        for look in self.outputs:
            look(index, self.integrator)

    def fixed(self, start: float, length: float, end: float) -> None:
        """Take one step of given length, in parts if events cut it; any failure is final."""
        while True:
            self._check_limit(start)
            self._announce()
            for look in self.attempts:
                look(start, length, self.integrator)
            outcome = self.integrator.attempt(start, length, self.number, end=end)
            if not outcome.accepted:
                assert outcome.error is not None
                raise outcome.error
            start = self._accept(Step(self.index, start, length, end, outcome.order))
            length = end - start
            if self.ended or start == end:
                return

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
            for look in self.attempts:
                look(s, length, self.integrator)
            outcome = self.integrator.attempt(s, length, self.number, end=after)
            if outcome.accepted:
                # A step shortened to meet an output time says nothing against the natural one.
                shortened = (
                    not self.integrator.proposes_absolute
                    and wanted < natural
                    and outcome.next_step >= length
                )
                self.natural = max(outcome.next_step, natural) if shortened else outcome.next_step
                s = self._accept(Step(self.index, s, length, after, outcome.order))
                error = None
                continue
            self.ledger.rejected += 1
            for look in self.rejections:
                look(s, length)
            error = outcome.error or error
            self._check_minimum(s, wanted, least, error)
            shorter = self.integrator.failure_factor * length
            proposed = outcome.next_step if outcome.error is None else shorter
            self.natural = proposed if 0.0 < proposed < length else shorter

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
            for look in self.before:
                look(self.index, self.integrator)

    def _accept(self, step: Step) -> float:
        """Tell of an accepted step, and return where it ends: an event may cut it short."""
        taker = self.integrator
        for shorten in self.shorten:
            shortened = shorten(step, self.integrator)
            if shortened is not None:
                step, taker, self.ended = shortened
        self.taker = taker if self.ended else self.integrator
        self.index += 1
        self.number += 1
        self.ledger.steps += 1
        self.integrator.monitor(self.number, step.end)
        for look in self.after:
            look(step, taker, self.ended)
        return step.end

    def _check_limit(self, s: float) -> None:
        if self.control.max_steps is not None and self.number >= self.control.max_steps:
            raise StepLimitReached(
                f"max_steps={self.control.max_steps} steps did not reach the last output time, "
                "or an event that ends the solve: raise max_steps, loosen the tolerances, or use "
                "an implicit method if the problem is stiff",
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
            raise type(error)(
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
            "step": self.number,
            "method": self.integrator.settings.method.name,
        }


def _fit(natural: float, remaining: float) -> float:
    """Shorten (or stretch by round-off) a step so that output times are met without a sliver."""
    if natural >= remaining * (1.0 - 1e-10):
        return remaining
    return remaining / 2.0 if natural > remaining / 2.0 else natural

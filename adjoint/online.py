"""Multistage checkpointing of a number of steps that is not known in advance. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise

from pnode.adjoint.costs import A, R
from pnode.adjoint.optimal import minimal_units
from pnode.adjoint.schedule import (
    Action,
    Adjoint,
    DiscardSolution,
    DiscardStages,
    KeepEnd,
    RestoreEnd,
    RestoreSolution,
    RestoreStages,
    Schedule,
    StoreSolution,
    StoreStages,
)
from pnode.adjoint.sweeper import Sweeper
from pnode.base.errors import ConfigurationError

__all__ = ["OnlineSchedule"]


class OnlineSchedule(Schedule):
    """A schedule that can turn round after any step, as adaptive step sizes need it.

    Parameters
    ----------
    units : int
        Units of memory; one holds a state.
    stage_units : int
        Units of a stage checkpoint.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end, and can be restarted from.
    initial_free : bool
        Whether the initial state can be restored without having been stored. It then takes no
        unit, and no actions but ``RestoreSolution(0)``.

    Raises
    ------
    ConfigurationError
        If an argument is out of range, or there is no unit and the initial state is not free.

    Notes
    -----
    Bases are states that the sweep can start again from. First, they are so far apart that the
    steps between two of them can be repeated once, with all their stages stored, when their turn
    comes; meanwhile the other units hold the stages of the latest steps. When there is a base for
    every unit, n steps after the start, one is made of step n whenever the square of the steps
    since the last one has grown to n / units, and the base whose loss costs least is dropped.
    Backwards, the steps after each base are done by the optimal schedule in the free units.

    The base after an interval of k steps is a solution checkpoint. For stiffly accurate methods
    it may be the end of a stored step; if stages take one unit, all bases are such.
    """

    def __init__(
        self,
        units: int,
        stage_units: int,
        stiffly_accurate: bool,
        *,
        initial_free: bool = False,
    ) -> None:
        least = minimal_units(2, stage_units, stiffly_accurate, initial_free=initial_free)
        if not isinstance(units, int) or units < least:
            raise ConfigurationError(f"{units=} must be an integer of at least {least}")
        self.units = units
        self.stage_units = stage_units
        self.stiffly_accurate = stiffly_accurate
        self.initial_free = initial_free
        self._ends_only = stiffly_accurate and stage_units == 1
        self._sweeper = Sweeper(stage_units, stiffly_accurate)
        self._least_cost = lru_cache(maxsize=1 << 16)(self._sweeper.costs)
        self._begin()

    def _begin(self) -> None:
        self._bases: list[int] = [0] if self.initial_free else []
        self._stages: deque[int] = deque()  # stored steps that are not there for their ends
        self._grid: set[int] = set()  # those of their ends that are to become bases
        self._free = self.units
        self._points = 0  # grid points passed
        self._point = int(self._ends_only)  # the next one
        if self.initial_free:
            self._next_point(0)
        self._thinning = False

    def before_step(self, step: int) -> Iterator[Action]:
        """Store the start of ``step`` or the stages of the step before; make room first."""
        if step == 0:
            self._begin()
        if not self._thinning:
            yield from self._fill(step)
        if self._thinning:
            yield from self._thin(step)

    def reverse(self, steps: int) -> Iterator[Action]:
        """Take the adjoint of the stored steps and of the intervals between, last first."""
        solutions, stages, free = list(self._bases), sorted(self._stages), self._free
        if self._ends_only:
            solutions = [base for base in solutions if base == 0]
            stages = sorted({base - 1 for base in self._bases if base > 0}.union(stages))
        yield Adjoint(steps - 1)
        at = steps - 1
        while True:
            while solutions and solutions[-1] >= at and not self._is_free(solutions[-1]):
                yield DiscardSolution(solutions.pop())
                free += 1
            if at == 0:
                return
            if stages and stages[-1] == at - 1:
                at = stages.pop()
                yield RestoreStages(at)
                yield Adjoint(at)
                yield DiscardStages(at)
                free += self.stage_units
                continue
            base, situation = solutions[-1] if solutions else -1, R
            if self.stiffly_accurate and stages and stages[-1] + 1 > base:
                base = stages[-1] + 1
                yield RestoreEnd(base - 1)
            else:
                yield RestoreSolution(base)
                if not self._is_free(base):
                    yield DiscardSolution(solutions.pop())
                    free += 1
                    situation = A
            yield from self._sweeper.actions(situation, base, at - base, free)
            at = base

    def _is_free(self, base: int) -> bool:
        return base == 0 and self.initial_free

    def _fill(self, step: int) -> Iterator[Action]:
        """Keep the latest steps' stages, and bases at the points of the grid."""
        on_grid = step == self._point
        if step > 0:
            need = self.stage_units + (on_grid and not self.stiffly_accurate)
            while self._free < need and self._stages:
                oldest = self._stages.popleft()
                if oldest + 1 in self._grid:
                    yield KeepEnd(oldest)
                    self._bases.append(oldest + 1)
                    self._free += self.stage_units - 1
                else:
                    yield DiscardStages(oldest)
                    self._free += self.stage_units
            if self._free >= need:
                yield StoreStages(step - 1)
                self._free -= self.stage_units
                if on_grid and self._ends_only:
                    self._bases.append(step)
                else:
                    self._stages.append(step - 1)
                if on_grid and self.stiffly_accurate:
                    self._grid.add(step)
                    self._next_point(step)
                    return
        if on_grid:
            if self._free == 0 or self._ends_only:
                self._thinning = True
                return
            yield StoreSolution(step)
            self._free -= 1
            self._bases.append(step)
            self._next_point(step)

    def _next_point(self, point: int) -> None:
        """Find the point up to which the steps after ``point`` need only be repeated once."""
        free = self._free_after(self._points)
        self._point = point + 1 + free // self.stage_units + self._ends_only
        self._points += 1

    def _free_after(self, index: int) -> int:
        """Return how many units are free for the interval after a base, the later bases gone."""
        if self._ends_only:
            return self.units - index - (not self.initial_free)
        return self.units - max(index - self.initial_free, 0)

    def _thin(self, step: int) -> Iterator[Action]:
        """Make a base of this step, in place of the one whose loss costs least."""
        bases = self._bases
        if len(bases) < 2 or (step - bases[-1]) ** 2 * self.units < step:
            return
        lengths = [end - start for start, end in pairwise([*bases, step])]
        last = len(bases) - 1
        before = list(accumulate(self._cost(i, lengths[i]) for i in range(last)))
        after = list(accumulate(self._cost(i - 1, lengths[i]) for i in range(last, 1, -1)))
        after = [*reversed(after), 0]

        def cost(index: int) -> int:
            merged = self._cost(index - 1, lengths[index - 1] + lengths[index])
            return (before[index - 2] if index > 1 else 0) + merged + after[index - 1]

        lost = bases.pop(min(range(1, last + 1), key=cost))
        bases.append(step)
        if self._ends_only:
            yield DiscardStages(lost - 1)
            yield StoreStages(step - 1)
        else:
            yield DiscardSolution(lost)
            yield StoreSolution(step)

    def _cost(self, index: int, length: int) -> int:
        """Return how many steps are repeated for the interval after a base."""
        situation = R if self._ends_only or (index == 0 and self.initial_free) else A
        length -= self._ends_only
        return length + self._least_cost(situation, length, self._free_after(index))

"""Optimal actions for an interval of steps, decided at the edges of the hulls. Pure.

The recurrences and their notation are in :mod:`pnode.adjoint.costs`. :class:`_Hulls` gets the
decisions from the edges of the hulls, when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from math import inf
from typing import NamedTuple

from pnode.adjoint.costs import A, Costs, P, R
from pnode.adjoint.schedule import (
    DISK,
    RAM,
    Action,
    Adjoint,
    Advance,
    DiscardSolution,
    DiscardStages,
    RestoreEnd,
    RestoreSolution,
    RestoreStages,
    StoreSolution,
    StoreStages,
)

__all__ = ["Sweeper"]

#: What to do first: advance to the last step; to a solution; to stages; store the start itself.
_LAST, _SOLUTION, _STAGES, _START = range(4)


class _Option(NamedTuple):
    """One way to begin: its hull's edge and, of that, the part left of the first checkpoint."""

    what: int
    value: int
    low: int
    high: int
    left_low: int = 0
    left_high: int = 0


class _Hulls:
    """Ways to begin at the hulls' edges of slope ``r + a / c``; a / c is 0 or 1 / c.

    The conjugate of F, the greatest ``c (slope m - F(m, u))``, turns the recurrences' convolutions
    into sums: if it and the m where it is taken are known for the right part at this slope and for
    the left part at this slope less one, those of the whole are the sums.
    """

    def __init__(self, costs: Costs, solutions: bool, c: int = 0) -> None:
        self.denominator = c or 1
        self._c = c
        self._costs = costs
        self._solutions = solutions
        self._after = R if costs.stiffly_accurate else A
        # Bounded: with very many units there are as many edges.
        self._edge = lru_cache(maxsize=1 << 13)(self._find_edge)
        self.options = lru_cache(maxsize=1 << 12)(self._find_options)

    def slope(self, r: int) -> int:
        """Return c (r + a / c)."""
        return r * self.denominator + (self._c > 0)

    def _find_edge(self, situation: int, r: int, units: int) -> tuple[int, int, int]:
        """Return the conjugate, the first m where it is taken and the last."""
        if r < 0:
            return self.slope(r), 1, 1
        low, high = self._costs.edge(situation, units, r, self._c)
        value = self.slope(r) * low - self.denominator * self._costs(situation, low, units)
        return value, low, high

    def _find_options(self, situation: int, r: int, units: int) -> tuple[int, tuple[_Option, ...]]:
        """Return the conjugate and the ways to begin, in the order of preference."""
        return self._edge(situation, r, units)[0], tuple(self._ways(situation, r, units))

    def _ways(self, situation: int, r: int, units: int) -> Iterator[_Option]:
        one = self.slope(r)
        free = units - (situation == P)  # without the start
        stage_units = self._costs.stage_units
        if situation == A:
            if free >= stage_units:
                value, low, high = self._edge(self._after, r, free - stage_units)
                yield _Option(_STAGES, one + value, 1 + low, 1 + high)
            if free >= 1 and self._solutions:
                yield _Option(_START, *self._edge(P, r, units))
            return
        value, low, high = self._edge(A if situation == P else R, r - 1, units)
        yield _Option(_LAST, one + value, 1 + low, 1 + high, low, high)
        if free >= 1 and self._solutions:
            right = self._edge(P, r, free)
            yield _Option(_SOLUTION, right[0] + value, right[1] + low, right[2] + high, low, high)
        if free >= stage_units:
            if value <= 0:  # nothing left of it is as good
                low, value, high = 0, 0, high if value == 0 else 0
            right = self._edge(self._after, r, free - stage_units)
            yield _Option(
                _STAGES, one + right[0] + value, 1 + right[1] + low, 1 + right[2] + high, low, high
            )


class Sweeper:
    """Yields the optimal actions for intervals of steps.

    Parameters
    ----------
    stage_units : int
        Units of a stage checkpoint.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end.
    solutions : bool
        Whether solution checkpoints are allowed.
    ram : int or math.inf
        Units in memory; what does not fit goes to disk.
    """

    def __init__(
        self,
        stage_units: int,
        stiffly_accurate: bool,
        *,
        solutions: bool = True,
        ram: float = inf,
    ) -> None:
        self.costs = Costs(stage_units, stiffly_accurate)
        self._solutions = solutions
        self._ram = ram
        self._plain = _Hulls(self.costs, solutions)
        self._hulls = lru_cache(maxsize=4)(partial(_Hulls, self.costs, solutions))

    def actions(
        self, situation: int, first: int, steps: int, units: int, *, swept: bool = False
    ) -> Iterator[Action]:
        """Yield the actions that take the adjoint over steps first .. first + steps - 1.

        Parameters
        ----------
        situation : {A, R}
            That of the start of step ``first``, which is live.
        first, steps, units : int
            The interval, and the free units.
        swept : bool
            Leave out the advances of the first pass: they are those of the forward sweep.
        """
        l, stiffly_accurate = self.costs.stage_units, self.costs.stiffly_accurate  # noqa: E741
        _, r, c = self.costs.locate(situation, steps, units)
        if c == 1:
            r, c = r + 1, 0
        hulls = self._hulls(c) if c else self._plain
        later: list[tuple] = []  # intervals to the left and steps between, nearest last
        stored = False
        while True:
            # The start of step ``first`` is live, and stored in situation P, or in A if ``stored``.
            if (steps - 1) * l <= units - (situation == P):
                if stored or situation == P:
                    yield DiscardSolution(first)
                yield from self._straight(first, steps, swept)
                stored = swept = False
            else:
                what, left, hulls = self._decide(situation, steps, units, r, hulls)
                if what == _START:
                    if not stored:
                        yield StoreSolution(first, self._level(units))
                    situation, stored = P, False
                    continue
                if stored:
                    yield DiscardSolution(first)
                    stored = False
                free = units - (situation == P)
                middle = first + left + (what != _SOLUTION)
                if not swept:
                    for step in range(first, middle):
                        yield Advance(step)
                if left:
                    later.append((situation, first, left, units, r - 1, hulls))
                elif situation == P:
                    yield DiscardSolution(first)
                if what == _LAST:
                    yield Adjoint(middle - 1)
                    swept = False
                else:
                    first, steps = middle, steps - (middle - first)
                    if what == _STAGES:
                        yield StoreStages(middle - 1, self._level(free))
                        later.append((middle - 1,))
                        situation, units = R if stiffly_accurate else A, free - l
                    elif (steps - 1) * l <= free:  # no need to store this solution
                        situation, units = A, free
                    else:
                        yield StoreSolution(middle, self._level(free))
                        situation, units = P, free
                    continue
            while later and len(later[-1]) == 1:
                yield from _between(*later.pop())
            if not later:
                return
            situation, first, steps, units, r, hulls = later.pop()
            behind = situation == R and first > 0
            yield RestoreEnd(first - 1) if behind else RestoreSolution(first)
            if situation == P:
                situation, stored = A, True

    def _decide(
        self, situation: int, steps: int, units: int, r: int, hulls: _Hulls
    ) -> tuple[int, int, _Hulls]:
        """Return what to do first, the number of steps left of it, and the hulls for the parts."""
        l = self.costs.stage_units  # noqa: E741
        if not (self._solutions or self.costs.stiffly_accurate):
            return _SOLUTION, steps - 1 - units // l, hulls  # the rest's stages find room
        value, options = hulls.options(situation, r, units)
        for option in options:
            if option.value == value and option.low <= steps <= option.high:
                break
        else:  # between the hull's corners: F is the hull rounded up
            cost = -((value - hulls.slope(r) * steps) // hulls.denominator)
            hulls = self._plain
            value = r * steps - cost
            for option in hulls.options(situation, r, units)[1]:
                if option.value == value and option.low <= steps <= option.high:
                    break
            else:
                raise AssertionError("the hulls have no such step")
        left = option.left_low + min(steps - option.low, option.left_high - option.left_low)
        return option.what, left, hulls

    def _straight(self, first: int, steps: int, swept: bool) -> Iterator[Action]:
        """Yield the actions for an interval whose stages all find room."""
        last = first + steps - 1
        l = self.costs.stage_units  # noqa: E741
        for step in range(first, last):
            if not swept:
                yield Advance(step)
            yield StoreStages(step, self._level((last - step) * l))
        if not swept:
            yield Advance(last)
        yield Adjoint(last)
        for step in range(last - 1, first - 1, -1):
            yield RestoreStages(step)
            yield Adjoint(step)
            yield DiscardStages(step)

    def _level(self, units: int) -> int:
        """Return where to put a checkpoint that together with all later ones takes ``units``."""
        return RAM if units <= self._ram else DISK


def _between(step: int) -> Iterator[Action]:
    """Yield the actions for a step between intervals, whose stages are stored."""
    yield RestoreStages(step)
    yield Adjoint(step)
    yield DiscardStages(step)

"""The clock of a sweep: which steps float64 times tell apart, and how many fixed ones there are.

Pure, in the integrator's increasing time.
"""

from __future__ import annotations

import itertools
import math
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["FixedGrid", "PrescribedGrid", "least_step", "move"]

# Spacings of float64 at t. The stages of a shorter step could not be told apart.
_FEWEST_SPACINGS = 4.0
# In spacings of the output times: what the difference of two of them, from linspace say, is off by.
_ROUNDINGS = 4.0
# Where the output times do not resolve the step size, steps are longer by this fraction at most.
_LARGEST_SLACK = 0.1


def least_step(s: float, span: float) -> float:
    """Return the shortest adaptive step at time ``s`` with ``span`` to go (infinite: 1)."""
    return max(_FEWEST_SPACINGS * math.ulp(s), 1e-30 * (span if math.isfinite(span) else 1.0))


def move(s: float, wanted: float) -> float:
    """Return the end of a step of at most this length.

    The step's length is the result minus ``s``, which is not ``wanted`` far from zero: clock and
    state must move by the same. Never longer, so that a rejected step does become shorter.
    """
    after = s + wanted
    return after if after - s <= wanted else math.nextafter(after, s)


@lru_cache(maxsize=8)
def _counts(times: tuple[float, ...], step_size: float, resolution: float) -> tuple[int, ...]:
    """Return the number of steps of each interval; 0 for one without end.

    A quotient that exceeds a whole number by round-off only does not add a step: the times are
    known to a few spacings of the largest.
    """
    largest = max(abs(s) for s in (times[0], *times[-2:]) if math.isfinite(s))
    slack = min(_ROUNDINGS * resolution * largest / step_size, _LARGEST_SLACK)
    exact = (1.0 - 4.0 * sys.float_info.epsilon) / step_size
    quotients = [(end - start) * exact for start, end in itertools.pairwise(times)]
    return tuple(
        max(1, math.ceil(parts - slack)) if math.isfinite(parts) else 0 for parts in quotients
    )


@dataclass(frozen=True)
class FixedGrid:
    """Fixed steps from output time to output time.

    Attributes
    ----------
    times : tuple of float
        Increasing output times; the last may be infinite.
    step_size : float
        Largest step, but for the round-off of the output times.
    resolution : float
        Relative spacing of the numbers that they were given in (float32: 1e-7).
    """

    times: tuple[float, ...]
    step_size: float
    resolution: float = sys.float_info.epsilon

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of steps of each interval; 0 for one without end."""
        return _counts(self.times, self.step_size, self.resolution)

    @property
    def total(self) -> int:
        """Number of all steps."""
        return sum(self.counts)

    @property
    def unresolved(self) -> int | None:
        """The first interval whose steps float64 does not tell apart, if there is one."""
        largest = max(abs(self.times[0]), abs(self.times[-1]))
        if 0.5 * self.step_size >= _FEWEST_SPACINGS * math.ulp(largest):
            return None
        intervals = range(len(self.counts))
        return next((index for index in intervals if not self.resolves(index)), None)

    def resolves(self, interval: int) -> bool:
        """Whether the steps of an interval are told apart at its start; one alone always is."""
        start, number = self.times[interval], self.counts[interval]
        return number == 1 or self._length(interval) >= _FEWEST_SPACINGS * math.ulp(start)

    def steps(self, interval: int) -> Iterator[tuple[float, float, float]]:
        """Return start, length and end of each of the equal steps of an interval."""
        start, end = self.times[interval : interval + 2]
        number, h = self.counts[interval], self._length(interval)
        return (
            (start + (i - 1) * h, h, end if i == number else start + i * h)
            for i in (range(1, number + 1) if number else itertools.count(1))
        )

    def _length(self, interval: int) -> float:
        start, end = self.times[interval : interval + 2]
        number = self.counts[interval]
        return (end - start) / number if number else self.step_size


@dataclass(frozen=True)
class PrescribedGrid(FixedGrid):
    """Steps along a grid that the user has given, which has the output times.

    Attributes
    ----------
    points : tuple of float
        The grid, increasing.
    """

    points: tuple[float, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of steps of each interval."""
        places = [bisect_left(self.points, s) for s in self.times]
        return tuple(after - before for before, after in itertools.pairwise(places))

    @property
    def unresolved(self) -> None:
        """Nothing: the user's times are those of single steps."""

    def along(self) -> tuple[float, ...]:
        """Return the points from the first time to the last."""
        first, last = (bisect_left(self.points, s) for s in (self.times[0], self.times[-1]))
        return self.points[first : last + 1]

    def steps(self, interval: int) -> Iterator[tuple[float, float, float]]:
        """Return start, length and end of each step of an interval."""
        first, last = (bisect_left(self.points, s) for s in self.times[interval : interval + 2])
        pairs = itertools.pairwise(self.points[first : last + 1])
        return ((start, end - start, end) for start, end in pairs)

"""Where event_fn first leaves its side of zero within a step. Pure arithmetic.

theta runs over the step from 0 to 1. An entry of event_fn has a side, the sign that it had before;
it has left it where its sign is another one, zero included. Steps cost more than interpolated
states: the step is scanned on an interpolant, for signs and for the lowest points between them, and
what is found there counts only where the step, taken again up to there, agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy  # scipy.optimize, which takes a seventh of a second, where it is needed

__all__ = ["RELATIVE", "SAMPLES", "Crossing", "Path", "Sides", "first_crossing"]

#: Where a step is looked at, besides the turning points of event_fn: near its ends too, where these
#: may be.
SAMPLES = (1.0 / 64.0, 0.25, 0.5, 0.75, 63.0 / 64.0, 1.0)
#: The least relative tolerance that SciPy's brentq allows.
RELATIVE = 4.0 * float(np.finfo(float).eps)
# Brent's method bisects at least every third time: a few hundred trials reach any tolerance.
_MAX_TRIALS = 1000
# Searches of [0, root) for a root before the one found. Each halves what is left or ends.
_MAX_ROUNDS = 50
# Lowest points that come this near to zero are looked at on the discrete solution too, relative to
# event_fn's values around: what an interpolant may be wrong by.
_NEAR = 0.05
# Accuracy of lowest points, relative to the interval: its square is what is left of the value.
_LOWEST = 1e-5
# What lies before a root this near to the start, in tolerances, is not told from it.
_FINEST = 2048.0
_TINY = 1e-300


class Path(Protocol):
    """event_fn along one step."""

    #: Values at points of the discrete solution, by theta.
    known: dict[float, Any]

    def guess(self, theta: float) -> Any:
        """Return the entries at a point of an interpolant, or the known ones."""
        ...

    def exact(self, theta: float) -> Any:
        """Return the entries at a point of the discrete solution, finite."""
        ...


@dataclass
class Sides:
    """Which side of zero each entry is on, 0 if that is not known, and since which theta."""

    signs: Any
    since: Any

    def left(self, theta: float, values: Any) -> Any:
        """Return which entries are not on their sides. NaN is on neither."""
        return (self.signs != 0.0) & (theta > self.since) & (np.sign(values) != self.signs)

    def height(self, entry: int, theta: float, values: Any) -> float:
        """Return how far an entry is on its side; never zero, which counts as beyond it."""
        height = float(self.signs[entry] * values[entry])
        if theta <= self.since[entry]:
            return max(abs(height), _TINY)
        return height if height > 0.0 else min(height, -_TINY)


class Crossing(NamedTuple):
    """The first point found at which an entry has left its side.

    ``jump`` tells whether its values on both sides stay apart however near the points are.
    """

    theta: float
    entry: int
    jump: bool


def first_crossing(
    path: Path, sides: Sides, grid: list[float], tolerance: float, noise: float
) -> Crossing | None:
    """Return the first crossing that a scan finds, None without any.

    Parameters
    ----------
    path : Path
        The step.
    sides : Sides
        Before it.
    grid : list of float
        Where to look first, from 0 to 1.
    tolerance : float
        Of theta.
    noise : float
        By how much values at the same point may differ, relative to their change over a bracket.
    """
    found = None
    for _ in range(_MAX_ROUNDS):
        bracket = _bracket(path, sides, grid)
        if bracket is None:
            break
        found = _narrow(path, sides, *bracket, tolerance, noise)
        # There may be an even number of roots before it.
        if found.theta < _FINEST * tolerance:
            break
        grid = [theta * found.theta for theta in (0.0, *SAMPLES[:-1])]
    return found


def _bracket(path: Path, sides: Sides, grid: list[float]) -> tuple[float, float] | None:
    """Return neighbouring points before and after a crossing, the first that the scan sees."""
    seen = [(theta, path.guess(theta)) for theta in grid]
    suspects = {
        theta for theta, values in seen[1:]
        if sides.left(theta, values).any() or not np.isfinite(values).all()
    }  # fmt: skip
    before = [point for point in seen if point[0] < min(suspects, default=2.0)]
    suspects |= _low_points(path, sides, before)
    points = sorted({*grid, *suspects})
    for index, theta in enumerate(points):
        if theta in suspects and sides.left(theta, path.exact(theta)).any():
            while index > 1 and sides.left(points[index - 1], path.exact(points[index - 1])).any():
                index -= 1
            return points[index - 1], points[index]
    return None


def _low_points(path: Path, sides: Sides, seen: list[tuple[float, Any]]) -> set[float]:
    """Return where an entry, on its side at all points seen, comes near to zero between them."""
    found: set[float] = set()
    for entry in np.flatnonzero(sides.signs).tolist():
        searched = -1.0
        for triple in zip(seen, seen[1:], seen[2:], strict=False):
            thetas = [theta for theta, _ in triple]
            heights = [sides.height(entry, theta, values) for theta, values in triple]
            vertex = _vertex(thetas, heights)
            if vertex is None or vertex <= searched:
                continue

            def height(theta: float, entry: int = entry) -> float:
                return sides.height(entry, theta, path.guess(theta))

            theta, lowest = _lowest(height, thetas[0], thetas[2])
            searched = thetas[2]
            if not _NEAR * max(heights) < lowest < math.inf:
                found.add(theta)
    return found


def _vertex(thetas: list[float], heights: list[float]) -> float | None:
    """Return the lowest point of the parabola through three points, None if it is not inside."""
    (a, b, c), (fa, fb, fc) = thetas, heights
    if not (min(heights) > 0.0 and math.isfinite(sum(heights))):
        return None
    slope = (fb - fa) / (b - a)
    curvature = ((fc - fb) / (c - b) - slope) / (c - a)
    if not curvature > 0.0:
        return None
    vertex = (a + b) / 2.0 - slope / (2.0 * curvature)
    return vertex if a < vertex < c else None


class _Below(Exception):
    """A search has come to zero or beyond."""


def _lowest(height: Callable[[float], float], a: float, c: float) -> tuple[float, float]:
    """Return a lowest point in (a, c) and its height, or the first point found beyond zero.

    Or one at which it is not finite, to be looked at.
    """
    below: list[tuple[float, float]] = []

    def value(theta: float) -> float:
        result = height(float(theta))
        if not 0.0 < result < math.inf:
            below.append((float(theta), result))
            raise _Below
        return result

    try:
        found = scipy.optimize.minimize_scalar(
            value, bounds=(a, c), method="bounded", options={"xatol": _LOWEST * (c - a)}
        )
    except _Below:
        return below[0]
    return float(found.x), float(found.fun)


def _narrow(
    path: Path, sides: Sides, low: float, high: float, tolerance: float, noise: float
) -> Crossing:
    """Locate a crossing in a bracket by Brent's method, for every entry that has left its side."""
    at_low, at_high = path.exact(low), path.exact(high)
    for entry in np.flatnonzero(sides.left(high, at_high)).tolist():

        def height(theta: float, entry: int = entry) -> float:
            return sides.height(entry, theta, path.exact(theta))

        scipy.optimize.brentq(height, low, high, xtol=tolerance, rtol=RELATIVE, maxiter=_MAX_TRIALS)
    inside = [theta for theta in sorted(path.known) if low <= theta <= high]
    before, after = next(
        pair for pair in pairwise(inside) if sides.left(pair[1], path.known[pair[1]]).any()
    )
    first = int(np.argmax(sides.left(after, path.known[after])))
    gap = abs(path.known[after][first] - path.known[before][first])
    scale = max(abs(at_low[first]), abs(at_high[first]))
    width = (after - before) / (high - low)
    return Crossing(after, first, bool(gap > max(100.0 * width, noise) * scale))

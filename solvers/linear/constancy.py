"""Whether the Jacobian of a sweep proves constant, and matrices that do not depend on history."""

from __future__ import annotations

import math
from typing import Any

import torch

from pnode.solvers.linear.linearizer import Point

__all__ = ["Constancy", "rounded"]

# Different points at which a Jacobian is the same, bit for bit, before it is taken for constant.
_POINTS = 3
# A Newton iteration with the right matrix of linear equations leaves less of the residual, if not
# round-off.
_LEFT = 1e-9
# Bits of a shift that a matrix is formed with: lengths of fixed steps differ in the others.
_BITS = 38


def rounded(shift: float) -> float:
    """Return a shift rounded to 38 bits, the same one for lengths that differ by round-off."""
    mantissa, exponent = math.frexp(shift)
    if not math.isfinite(mantissa):
        return shift
    return math.ldexp(round(math.ldexp(mantissa, _BITS)), exponent - _BITS)


class Constancy:
    """A guess: the Jacobian is constant, since it was the same, bit for bit, at several points.

    It is given up for the rest of the sweep once the Jacobian is another one somewhere.

    Attributes
    ----------
    holds : bool
        Whether the Jacobian seems to be constant.
    used : bool
        Whether the step under way takes it for that.
    mistaken : bool
        Whether that was found wrong in this step.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a sweep: nothing is known."""
        self.holds = self.used = self.mistaken = False
        self._open = True
        self._values: Any = None
        self._points: list[torch.Tensor] = []
        self._noise = 0.0

    def begin_step(self, used: bool | None) -> None:
        """Begin a step; ``used`` tells whether it is one that took the guess, if it is known."""
        self.mistaken = False
        self.used = self.holds if used is None else used

    def look(self, values: Any, point: Point, before: Any) -> None:
        """Look at an evaluation of the Jacobian; ``before`` is what is used instead, or None."""
        if before is not None and not _equal(values, before):
            self.mistaken, self.used = self.used, False
            self._close()
        if not self._open:
            return
        if values is None or point.field.problem.ranks.parallel:
            self._close()
        elif self._values is None:
            self._values, self._points = values, [point.u]
        elif not _equal(values, self._values):
            self._close()
        elif not self.holds and not any(torch.equal(point.u, u) for u in self._points):
            self._points.append(point.u)
            if len(self._points) == _POINTS:
                self.holds, self._points = True, []

    def doubts(self, norm: float, before: float) -> bool:
        """Whether an iteration that left ``norm`` of a residual ``before`` says otherwise."""
        if norm <= max(_LEFT * before, 10.0 * self._noise):
            return False
        self._noise = norm  # the Jacobian will be looked at; if it is the same, this is round-off
        return True

    def _close(self) -> None:
        self.holds = self._open = False
        self._values, self._points = None, []


def _equal(one: Any, two: Any) -> bool:
    """Whether two evaluations, tuples of tensors and None, are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return one is two or (isinstance(two, torch.Tensor) and torch.equal(one, two))
    if isinstance(one, tuple):
        same = isinstance(two, tuple) and len(one) == len(two)
        return same and all(map(_equal, one, two))
    return one is None and two is None

"""Least costs of multistage checkpointing, in closed form. Pure.

One unit of storage holds one state; a solution checkpoint takes 1 unit, a stage checkpoint
``stage_units``. The cost of a schedule is its extra forward steps, those beyond the forward sweep.
Let F(m, u) be the least cost of m steps with u units, in one of three situations:

- A: the start of the first step is live and not stored, u units are free;
- P: it is live and stored in one of the u units;
- R: it is live and can be restored without taking any of the u units: it is the initial state, if
  that is free, or the end of a stored step of a stiffly accurate method.

Dynamic programming over the first checkpoint (as Griewank & Walther, ACM TOMS 26, 2000, for
solution checkpoints; Zhang & Constantinescu, J. Comput. Sci. 69, 2023, and Maddison, J. Comput.
Sci. 82, 2024, for stage checkpoints) gives, with l for ``stage_units`` and X = R for stiffly
accurate methods, X = A for the others, and 1 <= k < m::

    A(m, u) = min(P(m, u),                                       store the start
                  X(m - 1, u - l))                               store the first step's stages
    P(m, u) = min(m - 1 + A(m - 1, u),                           store nothing
                  k + P(m - k, u - 1) + A(k, u),                 store the start of step k
                  k - 1 + X(m - k, u - 1 - l) + A(k - 1, u))     store the stages of step k - 1
    R(m, u) = min(m - 1 + R(m - 1, u),
                  k + P(m - k, u) + R(k, u),
                  k - 1 + X(m - k, u - l) + R(k - 1, u))

A, P and R are 0 for m <= 1, and infinite for m > 1 if P or A has no unit. As functions of m they
are their convex hulls, rounded up (tested, not proved).
"""

from __future__ import annotations

from bisect import bisect_left
from math import comb

__all__ = ["A", "Costs", "P", "R"]

#: Situations of the start of the first step; see the module's docstring.
A, P, R = range(3)


class Costs:
    """The least cost F(m, u) of m steps with u units, in closed form.

    Parameters
    ----------
    stage_units : int
        Units of a stage checkpoint, l.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end.

    Notes
    -----
    With q = floor(u / l), L = l - 1 for stiffly accurate methods, else l, A is zero up to
    ``N(u, 0) = 1 + q``, and between the breakpoints ``N(u, r) = sum(C(u - l k + r, r), k = 0..q)``
    its increments are, in order: w times r; then for k = q, ..., 1, C(u - l k + r - 1, r - 1)
    blocks of L k steps, each with increments r + 1, r, ..., r. For stiffly accurate methods with
    l = 1 there are no blocks, and N(u, r) = C(u + r + 1, r + 1).
    """

    def __init__(self, stage_units: int, stiffly_accurate: bool) -> None:
        self.stage_units = stage_units
        self.stiffly_accurate = stiffly_accurate
        self._length = stage_units - 1 if stiffly_accurate else stage_units  # L

    def __call__(self, situation: int, steps: int, units: int) -> int:
        """Return F(steps, units) in a situation A, P or R, which must be feasible."""
        cost = self.locate(R if situation == R else A, steps, units)[0]
        if situation != P or steps <= 1:
            return cost
        if self._length == 0:
            return cost + (steps > units)
        return max(cost, steps - 1 - (units - 1) // self.stage_units)

    def locate(self, situation: int, steps: int, units: int) -> tuple[int, int, int]:
        """Return F(steps, units) and where it lies: the edge of slope ``r + 1 / c`` of the hull.

        Parameters
        ----------
        situation : {A, R}
            A, with at least one unit or step; or R.
        steps, units : int
            m and u.

        Returns
        -------
        cost, r, c : int
            c = 0 stands for the edge of slope r.
        """
        l, length = self.stage_units, self._length  # noqa: E741
        shifted = 0
        if situation == R:  # R(m, u) is A(m, u + 1), unless that has room for one checkpoint more
            units += 1
            shifted = int(units % l == 0)
            steps += shifted
        if self._breakpoint(units, 0) >= steps:
            return 0, 0, 0
        r = 1
        while self._breakpoint(units, r) < steps:
            r *= 2
        r = bisect_left(range(r), steps, r // 2 + 1, key=lambda r: self._breakpoint(units, r))
        corner = self._breakpoint(units, r - 1)
        excess = steps - corner
        cost = (r - 1) * corner + r * excess
        if length == 0:
            return cost - comb(units + r, r - 1) + 1, r, 0
        if r > 1:
            cost -= comb(units + r - 1, r - 2) + (r - 1) * shifted
        number, k = self._blocks(units, r, excess, shifted)
        return cost + number, r, length * k

    def edge(self, situation: int, units: int, r: int, c: int) -> tuple[int, int]:
        """Return between which numbers of steps the hull of F has slope ``r + 1 / c``.

        Parameters
        ----------
        situation : {A, P, R}
            P with at least one unit.
        units, r, c : int
            c is 0 for slope r, else a multiple of L.

        Returns
        -------
        low, high : int
            Equal where the hull has no such edge: the corner that a line of this slope touches.
        """
        length = self._length
        if situation == R:
            units += 1
        q, rest = divmod(units, self.stage_units)

        def short(r: int) -> int:
            """One step less is free than in A; the block of k = q, one, joins those of slope r."""
            return int(rest == 0 and (situation == R or (situation == P and r < 2)))

        shifted = short(r)
        earlier = shifted * (situation == R)  # R has all its corners one step earlier
        low = self._breakpoint(units, r - 1) - shifted if r > 0 else 1
        if length == 0 or r == 0:
            high = self._breakpoint(units, r) - (earlier if r else shifted)
            return (high if c else low), high
        high = self._breakpoint(units, r - 1) + self._plain(units, r) - earlier
        high += shifted * length * q
        if c == 0:
            if length == 1 and r > 1 and q > short(r - 1):  # blocks of one step, of slope r, too
                low -= self._block_count(units, r - 1, 1)
            return low, high
        last, k = q - shifted, c // length
        if r == 1:  # one block of each k
            low = high + length * max(0, (last - k) * (last + k + 1) // 2)
        else:
            low = high + length * sum(
                j * self._block_count(units, r, j) for j in range(k + 1, last + 1)
            )
        return low, low + c * self._block_count(units, r, k) * (k <= last)

    def _plain(self, units: int, r: int) -> int:
        """Return w."""
        l, length = self.stage_units, self._length  # noqa: E741
        q = units // l
        if r == 1:
            return (q + 1) * (2 * units - (l + length) * q) // 2
        blocks = sum(k * self._block_count(units, r, k) for k in range(1, q + 1))
        between = self._breakpoint(units, r) - self._breakpoint(units, r - 1)
        return between - length * blocks

    def _block_count(self, units: int, r: int, k: int) -> int:
        rest = units - self.stage_units * k + r - 1
        return comb(rest, r - 1) if rest >= r - 1 else 0

    def _blocks(self, units: int, r: int, excess: int, shifted: int) -> tuple[int, int]:
        """Return how many blocks are entered ``excess`` steps after N(u, r - 1), and the last's k.

        ``shifted`` merges the block of k = q, of which there is one, into the w steps.
        """
        length = self._length
        q = units // self.stage_units
        last = q - shifted
        excess -= self._plain(units, r) + shifted * length * q
        if r == 1:  # one block of each k
            number = bisect_left(
                range(last + 1), excess, key=lambda j: length * j * (2 * last + 1 - j) // 2
            )
            return number, last + 1 - number if number else 0
        number = k = 0
        while excess > 0:
            k = last
            count = self._block_count(units, r, k)
            number += min(count, -(-excess // (length * k)))
            excess -= length * k * count
            last -= 1
        return number, k

    def _breakpoint(self, units: int, r: int) -> int:
        """Return N(units, r)."""
        l = self.stage_units  # noqa: E741
        if self._length == 0:
            return comb(units + r + 1, r + 1)
        q = units // l
        if r < 2:
            return (1 + q) * (2 + r * (2 * units - l * q)) // 2
        return sum(comb(u + r, r) for u in range(units, -1, -l))

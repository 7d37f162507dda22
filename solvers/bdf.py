"""Backward differentiation formulas on any grid, and the choice of step and order. Pure.

Nodes are given by their distances behind the new time t_n: ``distances[j - 1] = t_n - t_{n-j}``,
increasing and positive. Coefficients are those of the polynomial through the nodes.

References
----------
K. E. Brenan, S. L. Campbell, L. R. Petzold, Numerical Solution of Initial-Value Problems in
Differential-Algebraic Equations (1996), chapter 5.
E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, section III.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = [
    "HIGHEST_ORDER",
    "OrderControl",
    "derivative_weights",
    "difference_weights",
    "error_constant",
    "extrapolation_weights",
    "start_weights",
]

#: Variable-order BDF goes up to here; order 6 is nearly unstable.
HIGHEST_ORDER = 5


def derivative_weights(distances: Sequence[float]) -> list[float]:
    """Return d with u'(t_n) = sum_j d_j u_{n-j}, exact for polynomials of the order.

    The order is the number of distances; d_0 = sum_j 1 / (t_n - t_{n-j}) comes first.
    """
    weights = [sum(1.0 / x for x in distances)]
    for j, x in enumerate(distances):
        product = -1.0 / x
        for i, other in enumerate(distances):
            if i != j:
                product *= other / (other - x)
        weights.append(product)
    return weights


def extrapolation_weights(distances: Sequence[float]) -> list[float]:
    """Return c such that sum_j c_j u_{n-j}, j = 1, 2..., is the value at t_n of the polynomial."""
    return [
        math.prod(other / (other - x) for i, other in enumerate(distances) if i != j)
        for j, x in enumerate(distances)
    ]


def difference_weights(distances: Sequence[float]) -> list[float]:
    """Return the weights of u_n, u_{n-1}... in h^m times their divided difference of order m.

    m is the number of distances and h the first of them.
    """
    h = distances[0]
    nodes = [0.0, *(x / h for x in distances)]
    return [
        1.0 / math.prod(other - x for i, other in enumerate(nodes) if i != j)
        for j, x in enumerate(nodes)
    ]


def error_constant(distances: Sequence[float]) -> float:
    """Return C with local error = C times h^{k+1} times the (k+1)-st divided difference.

    The derivative of the interpolation error at t_n, prod_j (t_n - t_{n-j}) u[...], divided by
    d_0, in units of h, the first distance; k is the number of distances.
    """
    h = distances[0]
    return math.prod(x / h for x in distances) / sum(h / x for x in distances)


def start_weights(order: int) -> list[float]:
    """Return the weights that extrapolate implicit Euler with 1, 2... ``order`` substeps.

    Aitken-Neville at zero for errors in powers of 1/1, 1/2... (Hairer & Wanner, Solving Ordinary
    Differential Equations II, section IV.9, harmonic sequence): local error of order + 1.
    """
    return [
        math.prod(j / (j - i) for i in range(1, order + 1) if i != j) for j in range(1, order + 1)
    ]


class OrderControl:
    """Choose order and step from local error estimates at orders k - 1, k and k + 1.

    Parameters
    ----------
    lowest, highest : int
        Range of orders once enough history is there. Below ``lowest`` the order is raised as
        soon as it can be.

    Attributes
    ----------
    order : int
        Order of the next step.
    """

    # Local error aimed at, relative to the tolerance; smaller for a higher order, which must pay.
    _AIM, _AIM_HIGHER = 1.0 / 6.0, 1.0 / 10.0
    # A step grows by at least this factor or not at all: a new step size costs Newton's method.
    _LEAST_GROWTH, _LEAST_SHRINKAGE = 1.5, 0.9
    _GROWTH, _FIRST_GROWTH = 10.0, 1e3
    # Rejections in a row after which the history counts for nothing.
    _MANY = 3

    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest, self._highest = lowest, highest
        self.restart()

    def restart(self) -> None:
        """Begin at order 1."""
        self.order = 1
        self._since = 0  # accepted steps since the order was last changed
        self._taken = 0
        self._failures = 0
        self._proposed = 0.0

    def accept(self, step: float, lengths: Sequence[float], size: Callable[[int], float]) -> float:
        """Choose order and length of the step after an accepted one.

        Parameters
        ----------
        step : float
            Length of the accepted step.
        lengths : sequence of float
            Lengths of the steps in the history, that one first.
        size : callable
            ``size(m)``: norm, relative to the tolerance, of ``step^m`` times the divided
            difference of order m at the new time.

        Returns
        -------
        float
            Length proposed.
        """
        k, self._failures = self.order, 0
        self._since += 1
        self._taken += 1
        best, order = self._length(k, step, lengths, size, self._AIM), k
        if self._since > k:
            choices = [(k - 1, self._AIM), (k + 1, self._AIM_HIGHER)]
            for q, aim in choices:
                if not 1 <= q <= self._highest or len(lengths) <= q:
                    continue
                length = self._length(q, step, lengths, size, aim)
                if k < self._lowest:  # on the way up
                    best, order = length, q
                elif q >= self._lowest and length > best:
                    best, order = length, q
        growth = self._FIRST_GROWTH if self._taken == 1 else self._GROWTH
        best = min(best, growth * max(lengths[: k + 1]))
        if order > k >= self._lowest and best <= self._LEAST_GROWTH * step:
            order = k
        if order != k:
            self.order, self._since = order, 0
        # What was proposed last, of which a step that meets an output time is a part.
        natural = self._proposed or step
        if not self._LEAST_SHRINKAGE * natural <= best <= self._LEAST_GROWTH * natural:
            natural = best
        self._proposed = natural
        return natural

    def reject(
        self, step: float, lengths: Sequence[float], size: Callable[[int], float], error: float
    ) -> float:
        """Choose order and length of the step after one whose error was too large.

        As :meth:`accept`, with ``step`` rejected and first in ``lengths``; ``error`` is its local
        error relative to the tolerance.
        """
        k = self.order
        self._failures += 1
        self._since = 0
        shrunk = step * min(0.9, (6.0 * error) ** (-1.0 / (k + 1)))
        if k > self._lowest and len(lengths) >= k:
            lower = self._length(k - 1, step, lengths, size, self._AIM)
            if lower > shrunk:
                self.order, shrunk = k - 1, min(lower, 0.9 * step)
        self._proposed = max(shrunk, (0.2 if self._failures < 2 else 0.1) * step)
        return self._proposed

    def fail(self) -> None:
        """Note that there was no solution to estimate the error of."""
        self._proposed = 0.0

    @property
    def lost(self) -> bool:
        """Whether rejections in a row say that the history is no guide any more."""
        return self._failures >= self._MANY

    @staticmethod
    def _length(
        q: int, step: float, lengths: Sequence[float], size: Callable[[int], float], aim: float
    ) -> float:
        """Return the step at which order q's local error is ``aim``."""
        s = size(q + 1)
        if not s > 0.0:
            return math.inf
        # Equal steps r h: distances r, 2 r..., so C = q! r^{q+1} / (1 + ... + 1/q).
        constant = math.factorial(q) / sum(1.0 / j for j in range(1, q + 1))
        ratio: float = (aim / (constant * s)) ** (1.0 / (q + 1))
        behind = [0.0]  # distances from the accepted step's end, in units of its length
        for length in lengths[: q - 1]:
            behind.append(behind[-1] + length / step)

        # Long steps behind make the next one's error larger than that: shrink, the error falls
        # at least as r^2.
        for _ in range(20):
            distances = [ratio + x for x in behind]
            error = s * math.prod(distances) / sum(1.0 / x for x in distances)
            if error <= 1.05 * aim:
                break
            ratio *= max(0.1, (aim / error) ** 0.5)
        return ratio * step

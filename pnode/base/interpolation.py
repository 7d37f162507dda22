"""Interpolation inside a step, as weights of states and slopes. Pure arithmetic.

With theta in [0, 1] and h the length of the step from u_0 to u_1, of slopes f_0 and f_1:

* Hermite: the polynomial through states and slopes at both ends, y = a u_0 + b u_1 + h (c f_0 +
  d f_1), of error h^4 (E. Hairer, S. P. Norsett & G. Wanner, Solving Ordinary Differential
  Equations I, section II.6, equation (6.7)); for methods of high order through those at the ends
  of steps around, too: of error h^(2 m) with m of them (J. Stoer & R. Bulirsch, Introduction to
  Numerical Analysis, section 2.1.5);
* the polynomial through the last few states, where slopes are not at hand;
* a Runge-Kutta method's own: y = u_0 + h sum_i b_i(theta) k_i, where it has one (Hairer et al.).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import polynomial as powers

__all__ = [
    "Hermite",
    "hermite",
    "hermite_polynomials",
    "hermite_rate",
    "lagrange",
    "polynomial",
    "polynomial_rate",
]


class Hermite(NamedTuple):
    """Weights of the states and slopes at the nodes; those of the slopes go with h."""

    state: tuple[float, ...]
    slope: tuple[float, ...]


@lru_cache(maxsize=16)
def hermite_polynomials(nodes: tuple[float, ...] = (0.0, 1.0)) -> Any:
    """Return the weights of a Hermite interpolant as polynomials.

    Parameters
    ----------
    nodes : tuple of float
        Where states and slopes are known, distinct, in lengths of the step from its start.

    Returns
    -------
    ndarray
        Shape ``(2, m, 2 m)``: of the states and the slopes, for each node, by powers of theta.
    """
    found = np.zeros((2, len(nodes), 2 * len(nodes)))
    for i, node in enumerate(nodes):
        bump, rate = np.ones(1), 0.0
        for other in (other for other in nodes if other != node):
            factor = np.array([-other, 1.0]) / (node - other)
            bump = np.convolve(bump, np.convolve(factor, factor))
            rate += 2.0 / (node - other)
        found[0, i] = np.convolve(bump, [1.0 + rate * node, -rate])
        found[1, i] = np.convolve(bump, [-node, 1.0])
    found.flags.writeable = False
    return found


def hermite(theta: float, nodes: tuple[float, ...] = (0.0, 1.0)) -> Hermite:
    """Return the weights of the Hermite interpolant, the cubic one of a step by default."""
    return _evaluated(theta, np.moveaxis(hermite_polynomials(nodes), -1, 0))


def hermite_rate(theta: float, nodes: tuple[float, ...] = (0.0, 1.0)) -> Hermite:
    """Return the derivatives of the weights with respect to theta."""
    rates = powers.polyder(np.moveaxis(hermite_polynomials(nodes), -1, 0))
    return _evaluated(theta, rates)


def _evaluated(theta: float, polynomials: Any) -> Hermite:
    weights: Any = powers.polyval(theta, polynomials)
    state, slope = weights.tolist()
    return Hermite(tuple(state), tuple(slope))


def lagrange(nodes: Sequence[float], s: float) -> list[float]:
    """Return the weights of values at distinct ``nodes`` in their polynomial's value at ``s``."""
    return [
        math.prod((s - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]


def polynomial(coefficients: Any, theta: float) -> list[float]:
    """Return b_i = sum_j coefficients[i, j] theta^(j + 1), one per stage."""
    coefficients = np.asarray(coefficients)
    degrees = np.arange(1, coefficients.shape[1] + 1)
    weights: list[float] = (coefficients @ theta**degrees).tolist()
    return weights


def polynomial_rate(coefficients: Any, theta: float) -> list[float]:
    """Return the derivatives of :func:`polynomial` with respect to theta."""
    coefficients = np.asarray(coefficients)
    degrees = np.arange(1, coefficients.shape[1] + 1)
    weights: list[float] = (coefficients @ (degrees * theta ** (degrees - 1))).tolist()
    return weights

"""Interpolation inside a step, as weights of states and slopes. Pure arithmetic.

With theta in [0, 1] and h the length of the step from u_0 to u_1, of slopes f_0 and f_1:

* cubic Hermite: y = a u_0 + b u_1 + h (c f_0 + d f_1), of third order (error h^4), for any method
  (E. Hairer, S. P. Norsett & G. Wanner, Solving Ordinary Differential Equations I, section II.6,
  equation (6.7));
* the polynomial through the last few states, where slopes are not at hand;
* a Runge-Kutta method's own: y = u_0 + h sum_i b_i(theta) k_i, where it has one (the same section).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Hermite", "hermite", "hermite_rate", "lagrange", "polynomial", "polynomial_rate"]


class Hermite(NamedTuple):
    """Weights of the states and slopes at both ends; those of the slopes go with h."""

    state: tuple[float, float]
    slope: tuple[float, float]


def hermite(theta: float) -> Hermite:
    """Return the weights of the cubic Hermite interpolant."""
    rest = 1.0 - theta
    return Hermite(
        (rest * rest * (1.0 + 2.0 * theta), theta * theta * (3.0 - 2.0 * theta)),
        (theta * rest * rest, -theta * theta * rest),
    )


def hermite_rate(theta: float) -> Hermite:
    """Return the derivatives of the weights with respect to theta."""
    rest = 1.0 - theta
    return Hermite(
        (-6.0 * theta * rest, 6.0 * theta * rest),
        (rest * (1.0 - 3.0 * theta), theta * (3.0 * theta - 2.0)),
    )


def lagrange(nodes: Sequence[float], s: float) -> list[float]:
    """Return the weights of values at distinct ``nodes`` in their polynomial's value at ``s``."""
    return [
        math.prod((s - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]


def polynomial(coefficients: Any, theta: float) -> list[float]:
    """Return b_i = sum_j coefficients[i, j] theta^(j + 1), one per stage."""
    coefficients = np.asarray(coefficients)
    powers = theta ** np.arange(1, coefficients.shape[1] + 1)
    weights: list[float] = (coefficients @ powers).tolist()
    return weights


def polynomial_rate(coefficients: Any, theta: float) -> list[float]:
    """Return the derivatives of :func:`polynomial` with respect to theta."""
    coefficients = np.asarray(coefficients)
    degrees = np.arange(1, coefficients.shape[1] + 1)
    weights: list[float] = (coefficients @ (degrees * theta ** (degrees - 1))).tolist()
    return weights

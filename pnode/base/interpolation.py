"""Interpolation inside a step, as weights of states and slopes. Pure arithmetic.

With theta in [0, 1] and h the length of the step from u_0 to u_1, of slopes f_0 and f_1:

* Hermite: the polynomial through states and slopes at both ends, y = a u_0 + b u_1 + h (c f_0 +
  d f_1), of error h^4 (E. Hairer, S. P. Norsett & G. Wanner, Solving Ordinary Differential
  Equations I, section II.6, equation (6.7)); through m nodes of error h^(2 m) (J. Stoer & R.
  Bulirsch, Introduction to Numerical Analysis, section 2.1.5);
* for explicit methods of high order, a polynomial through slopes inside of the step too, which are
  taken on a polynomial through fewer of them (:class:`Extension`);
* the polynomial through states alone, where slopes are not at hand, or magnify the states' errors;
* a Runge-Kutta method's own: y = u_0 + h sum_i b_i(theta) k_i, where it has one (Hairer et al.).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import Legendre
from numpy.polynomial import polynomial as powers

__all__ = [
    "Extension",
    "Hermite",
    "extension",
    "hermite",
    "hermite_polynomials",
    "hermite_rate",
    "lagrange",
    "lagrange_polynomials",
    "lobatto",
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


@dataclass(frozen=True, eq=False)
class Extension:
    """A continuous extension by bootstrapping.

    From Hermite's cubic on, slopes are taken at points inside of the step on one interpolant, which
    make up the next, of an error one order higher: W. H. Enright, K. R. Jackson, S. P. Norsett &
    P. G. Thomsen, Interpolants for Runge-Kutta formulas, ACM TOMS 12 (1986) 193. The points are
    those of Lobatto's quadrature; the polynomial through the slopes is integrated from u_0 on. What
    then is missing at u_1, by the error of the quadrature, is added by a cubic that is flat at both
    ends:

        y = u_0 + d(theta) (u_1 - u_0) + h sum_j b_j(theta) k_j,    d = theta^2 (3 - 2 theta).

    Attributes
    ----------
    c : tuple of float
        Where the slopes k_j are taken: at 0, at 1, then inside.
    weights : tuple of Hermite
        Of u_0 and u_1 and of the slopes before, in the states at which those inside are taken.
    coefficients : ndarray
        b_j = sum_i coefficients[j, i] theta^(i + 1) of the last interpolant.
    last : int
        Of which k_j on b_j is not zero, the first two besides.
    """

    c: tuple[float, ...]
    weights: tuple[Hermite, ...]
    coefficients: Any
    last: int

    def at(self, theta: float) -> Hermite:
        """Return the weights of u_0 and u_1 and the slopes in the last interpolant."""
        return _with_bump(self.coefficients, theta)

    def rate(self, theta: float) -> Hermite:
        """Return the derivatives of the weights with respect to theta."""
        change = 6.0 * theta * (1.0 - theta)
        return Hermite((-change, change), tuple(polynomial_rate(self.coefficients, theta)))

    def power(self, k: int) -> Hermite:
        """Return the weights in the coefficient of theta^k."""
        change = (*_BUMP, *(0.0 for _ in range(k)))[k]
        slopes = self.coefficients[:, k - 1].tolist() if k else [0.0] * len(self.c)
        return Hermite((float(k == 0) - change, change), tuple(slopes))


# Of d, by powers of theta.
_BUMP = (0.0, 0.0, 3.0, -2.0)


def _with_bump(coefficients: Any, theta: float) -> Hermite:
    change = theta * theta * (3.0 - 2.0 * theta)
    return Hermite((1.0 - change, change), tuple(polynomial(coefficients, theta)))


@lru_cache(maxsize=16)
def extension(most: int) -> Extension:
    """Return the extension by 2, then 3, ... then ``most`` slopes inside of a step."""
    c: list[float] = [0.0, 1.0]
    weights: list[Hermite] = []
    known = _through_slopes(c)
    for number in range(2, most + 1):
        first, inside = len(c), lobatto(number)
        weights.extend(_with_bump(known, theta) for theta in inside)
        c.extend(inside)
        own = _through_slopes([0.0, 1.0, *inside])
        known = np.zeros((len(c), own.shape[1]))
        known[:2], known[first:] = own[:2], own[2:]
    known.flags.writeable = False
    return Extension(tuple(c), tuple(weights), known, len(c) - most)


@lru_cache(maxsize=16)
def lobatto(number: int) -> tuple[float, ...]:
    """Return so many points of Lobatto's quadrature between 0 and 1, the ends excepted."""
    roots = Legendre.basis(number + 1).deriv().roots().real
    return tuple((0.5 * (1.0 + np.sort(roots))).tolist())


def _through_slopes(nodes: Sequence[float]) -> Any:
    """Return b_j, by powers of theta from the first on, of the polynomial through slopes."""
    found = np.zeros((len(nodes), max(len(nodes), 3)))
    for j, node in enumerate(nodes):
        basis = np.ones(1)
        for other in (other for other in nodes if other != node):
            basis = np.convolve(basis, np.array([-other, 1.0]) / (node - other))
        whole = powers.polyint(basis)[1:]
        found[j, : len(whole)] = whole
        found[j, :3] -= whole.sum() * np.array(_BUMP[1:])
    return found


def lagrange(nodes: Sequence[float], s: float) -> list[float]:
    """Return the weights of values at distinct ``nodes`` in their polynomial's value at ``s``."""
    return [
        math.prod((s - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]


@lru_cache(maxsize=16)
def lagrange_polynomials(nodes: tuple[float, ...]) -> Any:
    """Return the weights of values at ``nodes`` by powers of theta, shape ``(m, m)``."""
    found = np.zeros((len(nodes), len(nodes)))
    for i, node in enumerate(nodes):
        row = np.ones(1)
        for other in (other for other in nodes if other != node):
            row = np.convolve(row, np.array([-other, 1.0]) / (node - other))
        found[i] = row
    found.flags.writeable = False
    return found


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

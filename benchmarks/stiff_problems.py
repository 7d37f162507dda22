"""Stiff test problems with reference end values, for torch, JAX and plain Python alike.

HIRES, OREGO, POLLU, ROBER and VDPOL as in Mazzia & Magherini, Test Set for Initial Value Problem
Solvers, and Hairer & Wanner, Solving Ordinary Differential Equations II; the end values are theirs.
VDPOL is there in the time t / mu: here y_2 is that one's divided by mu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PROBLEMS", "SENSITIVITIES", "Problem", "Sensitivity"]


@dataclass(frozen=True)
class Problem:
    """y' = f(y, p) on [0, end].

    Attributes
    ----------
    field : callable
        ``field(y, p)``: the components of f as a list, from the components of y and p, which may
        be floats, tensors or arrays.
    jacobian : callable
        ``jacobian(y, p)``: the rows of df/dy, for floats.
    parameters : tuple of float
        p.
    start : tuple of float
        y(0).
    end : float
        The end time.
    reference : tuple of float
        y(end), all published digits.
    ratio : float
        Absolute over relative tolerance.
    """

    field: Callable[[Any, Any], list[Any]]
    jacobian: Callable[[Sequence[float], Sequence[float]], list[list[float]]]
    parameters: tuple[float, ...]
    start: tuple[float, ...]
    end: float
    reference: tuple[float, ...]
    ratio: float


@dataclass(frozen=True)
class Sensitivity:
    """The derivative of one component of the end state with respect to all parameters.

    Attributes
    ----------
    problem : Problem
        What to solve; its end value is not known.
    component : int
        Which component.
    by_parameter : callable
        ``by_parameter(y, p)``: the rows of df/dp, for floats.
    gradient : tuple of float
        Its derivatives. By forward sensitivity equations (SciPy's Radau, relative tolerance
        1e-12) and by fourth-order central differences of Radau's end values (1e-13), which agree
        to 3e-9. For VDPOL, whose sensitivity equations are ill-conditioned, they agree to 1e-7,
        and the figure is that of the differences, extrapolated once (it changes by 5e-9).
        ``python benchmarks/stiff_gradients.py`` repeats both.
    published : str
        What others print for it.
    """

    problem: Problem
    component: int
    by_parameter: Callable[[Sequence[float], Sequence[float]], list[list[float]]]
    gradient: tuple[float, ...]
    published: str = ""


def _hires(y: Any, p: Any) -> list[Any]:
    """Photomorphogenesis, eight species."""
    a, b, c, d, e, f, g, h = y
    r = 280.0 * f * h
    return [
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -r + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        r - 1.81 * g,
        -r + 1.81 * g,
    ]


def _hires_jacobian(y: Any, p: Any) -> list[list[float]]:
    f, h = 280.0 * y[5], 280.0 * y[7]
    return [
        [-1.71, 0.43, 8.32, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.71, -8.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, -10.03, 0.43, 0.035, 0.0, 0.0, 0.0],
        [0.0, 8.32, 1.71, -1.12, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, -1.745, 0.43, 0.43, 0.0],
        [0.0, 0.0, 0.0, 0.69, 1.71, -h - 0.43, 0.69, -f],
        [0.0, 0.0, 0.0, 0.0, 0.0, h, -1.81, f],
        [0.0, 0.0, 0.0, 0.0, 0.0, -h, 1.81, -f],
    ]


def _orego(y: Any, p: Any) -> list[Any]:
    """Oregonator, a relaxation oscillation."""
    a, b, c = y
    return [
        77.27 * (b + a * (1.0 - 8.375e-6 * a - b)),
        (c - (1.0 + a) * b) / 77.27,
        0.161 * (a - c),
    ]


def _orego_jacobian(y: Any, p: Any) -> list[list[float]]:
    a, b, _ = y
    return [
        [77.27 * (1.0 - 2 * 8.375e-6 * a - b), 77.27 * (1.0 - a), 0.0],
        [-b / 77.27, -(1.0 + a) / 77.27, 1.0 / 77.27],
        [0.161, 0.0, -0.161],
    ]


# POLLU, chemistry of polluted air: rate constant, what reacts, what comes of it; species from 1.
_REACTIONS = (
    (0.35, (1,), (2, 3)), (26.6, (2, 4), (1,)), (1.23e4, (5, 2), (6, 1)),
    (8.6e-4, (7,), (5, 5, 8)), (8.2e-4, (7,), (8,)), (1.5e4, (7, 6), (5, 8)),
    (1.3e-4, (9,), (5, 8, 10)), (2.4e4, (9, 6), (11,)), (1.65e4, (11, 2), (1, 10, 12)),
    (9e3, (11, 1), (13,)), (0.022, (13,), (1, 11)), (1.2e4, (10, 2), (1, 14)),
    (1.88, (14,), (5, 7)), (1.63e4, (1, 6), (15,)), (4.8e6, (3,), (4,)), (3.5e-4, (4,), (16,)),
    (0.0175, (4,), (3,)), (1e8, (16,), (6, 6)), (4.44e11, (16,), (3,)), (1240.0, (17, 6), (5, 18)),
    (2.1, (19,), (2,)), (5.78, (19,), (1, 3)), (0.0474, (1, 4), (19,)), (1780.0, (19, 1), (20,)),
    (3.12, (20,), (1, 19)),
)  # fmt: skip


def _pollu(y: Any, p: Any) -> list[Any]:
    slopes: list[Any] = [0.0] * 20
    for rate, inputs, outputs in _REACTIONS:
        speed = rate * math.prod((y[k - 1] for k in inputs[1:]), start=y[inputs[0] - 1])
        for k in inputs:
            slopes[k - 1] = slopes[k - 1] - speed
        for k in outputs:
            slopes[k - 1] = slopes[k - 1] + speed
    return slopes


def _pollu_jacobian(y: Any, p: Any) -> list[list[float]]:
    rows = [[0.0] * 20 for _ in range(20)]
    for rate, inputs, outputs in _REACTIONS:
        for column in inputs:  # each reacts once
            slope = rate * math.prod(y[k - 1] for k in inputs if k != column)
            for k in inputs:
                rows[k - 1][column - 1] -= slope
            for k in outputs:
                rows[k - 1][column - 1] += slope
    return rows


def _rober(y: Any, p: Any) -> list[Any]:
    """Robertson's kinetics with rates p of A -> B, 2B -> C + B, B + C -> A + C."""
    a, b, c = y
    ab, bc, ba = p[0] * a, p[1] * b * b, p[2] * b * c
    return [ba - ab, ab - ba - bc, bc]


def _rober_jacobian(y: Any, p: Any) -> list[list[float]]:
    _, b, c = y
    by_b = 2.0 * p[1] * b
    return [
        [-p[0], p[2] * c, p[2] * b],
        [p[0], -p[2] * c - by_b, -p[2] * b],
        [0.0, by_b, 0.0],
    ]


def _rober_by_rate(y: Any, p: Any) -> list[list[float]]:
    a, b, c = y[:3]
    return [[-a, 0.0, b * c], [a, -b * b, -b * c], [0.0, b * b, 0.0]]


def _rober_integral(y: Any, p: Any) -> list[Any]:
    """Robertson's kinetics and the integral of C."""
    return [*_rober(y[:3], p), y[2]]


def _rober_integral_jacobian(y: Any, p: Any) -> list[list[float]]:
    return [*([*row, 0.0] for row in _rober_jacobian(y[:3], p)), [0.0, 0.0, 1.0, 0.0]]


def _rober_integral_by_rate(y: Any, p: Any) -> list[list[float]]:
    return [*_rober_by_rate(y, p), [0.0, 0.0, 0.0]]


def _vdpol(y: Any, p: Any) -> list[Any]:
    """Van der Pol's oscillator with parameter mu."""
    x, v = y
    return [v, p[0] * (1.0 - x * x) * v - x]


def _vdpol_jacobian(y: Any, p: Any) -> list[list[float]]:
    x, v = y
    return [[0.0, 1.0], [-2.0 * p[0] * x * v - 1.0, p[0] * (1.0 - x * x)]]


def _vdpol_by_mu(y: Any, p: Any) -> list[list[float]]:
    x, v = y
    return [[0.0], [(1.0 - x * x) * v]]


_RATES = (0.04, 3e7, 1e4)
_ROBER_WITH_RATES = (_rober, _rober_jacobian, _rober_by_rate, _RATES, (1.0, 0.0, 0.0))

PROBLEMS = {
    "HIRES": Problem(
        _hires, _hires_jacobian, (), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057), 321.8122, (
            .7371312573325668e-3, .1442485726316185e-3, .5888729740967575e-4,
            .1175651343283149e-2, .2386356198831331e-2, .6238968252742796e-2,
            .2849998395185769e-2, .2850001604814231e-2,
        ), 1e-3,
    ),
    "OREGO": Problem(
        _orego, _orego_jacobian, (), (1.0, 2.0, 3.0), 360.0,
        (1.000814870318523, 1228.178521549917, 132.0554942846706), 1e-3,
    ),
    "POLLU": Problem(
        _pollu, _pollu_jacobian, (),
        (
            0.0, 0.2, 0.0, 0.04, 0.0, 0.0, 0.1, 0.3, 0.01, 0.0,
            0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.007, 0.0, 0.0, 0.0,
        ), 60.0,
        (
            .5646255480022769e-1, .1342484130422339, .4139734331099427e-8, .5523140207484359e-2,
            .2018977262302196e-6, .1464541863493966e-6, .7784249118997964e-1, .3245075353396018,
            .7494013383880406e-2, .1622293157301561e-7, .1135863833257075e-7, .2230505975721359e-2,
            .2087162882798630e-3, .1396921016840158e-4, .8964884856898295e-2, .4352846369330103e-17,
            .6899219696263405e-2, .1007803037365946e-3, .1772146513969984e-5, .5682943292316392e-4,
        ), 1e-3,
    ),
    "ROBER": Problem(
        _rober, _rober_jacobian, _RATES, (1.0, 0.0, 0.0), 1e11,
        (.2083340149701255e-7, .8333360770334713e-13, .9999999791665050), 1e-6,
    ),
    "VDPOL": Problem(
        _vdpol, _vdpol_jacobian, (1e3,), (2.0, 0.0), 2e3,
        (.1706167732170483e1, -.8928097010247975e-3), 1e-3,
    ),
}  # fmt: skip


def _sensitivity(
    field: Any, jacobian: Any, by_parameter: Any, parameters: tuple[float, ...], start: Any,
    end: float, component: int, gradient: tuple[float, ...], ratio: float, published: str = "",
) -> Sensitivity:  # fmt: skip
    problem = Problem(field, jacobian, parameters, start, end, (), ratio)
    return Sensitivity(problem, component, by_parameter, gradient, published)


#: By name, which begins with that of the problem.
SENSITIVITIES = {
    "ROBER A(40)": _sensitivity(
        *_ROBER_WITH_RATES, 40.0, 0,
        (-4.24755877170573, -2.28835508890567e-9, 1.37308079734462e-5), 1e-6,
    ),
    "ROBER A(1e5)": _sensitivity(
        *_ROBER_WITH_RATES, 1e5, 0,
        (-0.7930471281178, -5.281803362167e-10, 3.169075834109e-6), 1e-6,
    ),
    "ROBER integral of C to 4e7": _sensitivity(
        _rober_integral, _rober_integral_jacobian, _rober_integral_by_rate, _RATES,
        (1.0, 0.0, 0.0, 0.0), 4e7, 3,
        (7.68377326607e5, 5.114889978839e-4, -3.06892092002), 1e-6,
        "CVODES 7.6842e+05, 5.1145e-04, -3.0691e+00 (SUNDIALS, cvsRoberts_ASAi_dns.out)",
    ),
    "VDPOL x(2000)": _sensitivity(
        _vdpol, _vdpol_jacobian, _vdpol_by_mu, (1e3,), (2.0, 0.0), 2e3, 0, (1.784793623e-3,), 1e-3,
    ),
}  # fmt: skip

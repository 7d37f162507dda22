"""tanh in float64 as a rational function, which vectorises and takes half of a library's time.

tanh(x) = x P(x^2) / Q(x^2) for |x| <= 19.1, beyond which it rounds to 1. The approximation is off
by 8e-17 of the value, less than round-off; the coefficients, which ``tools/tanh_coefficients.py``
computes, are positive, so that nothing cancels: results are within 8 units in the last place, 1 in
the root mean square.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DECOMPOSITIONS", "tanh"]

# Rising powers of x^2.
_P = (
    1.0,
    0.15180528675547905,
    0.005974701271841179,
    9.360239439704248e-05,
    6.830284502189151e-07,
    2.44026682961207e-09,
    4.169899074518632e-12,
    3.0620319649231218e-15,
    7.4067145151082865e-19,
    2.4976380401589566e-23,
)
_Q = (
    1.0,
    0.4851386200888118,
    0.03435424130144652,
    0.0008281207846235795,
    8.753505738747663e-06,
    4.4629763149417694e-08,
    1.1109633139976823e-10,
    1.2699273911916724e-13,
    5.627556281604895e-17,
    6.215748469716789e-21,
)
_LARGEST = 19.1


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Return tanh(x), float64; of NaN NaN, of a zero that zero."""
    z = x.clamp(-_LARGEST, _LARGEST)
    u = z * z
    v = u * u
    return (z * _polynomial(_P, u, v) / _polynomial(_Q, u, v)).clamp(-1.0, 1.0)


def _polynomial(coefficients: tuple[float, ...], u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return sum_j c_j u^j, even and odd powers by themselves: shorter chains, less round-off."""
    return _horner(coefficients[1::2], v) * u + _horner(coefficients[0::2], v)


def _horner(coefficients: tuple[float, ...], v: torch.Tensor) -> torch.Tensor:
    *others, last = coefficients
    total = v * last + others.pop()
    for coefficient in reversed(others):
        total = total * v + coefficient
    return total


def _decompose(x: torch.Tensor) -> Any:
    return tanh(x) if x.dtype is torch.float64 else NotImplemented


#: For ``make_fx``.
DECOMPOSITIONS = {torch.ops.aten.tanh.default: _decompose}

"""Coefficients of the Gauss and Radau IIA methods, and what a step is solved with.

References
----------
E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, sections IV.5 and IV.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pnode.solvers.scheme import Scheme, rows

__all__ = ["GAUSS4", "GAUSS6", "RADAU3", "RADAU5", "Transformation", "transformation"]

_REFERENCE = "Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.5"
_ROOT3, _ROOT6, _ROOT15 = 3.0**0.5, 6.0**0.5, 15.0**0.5

GAUSS4 = Scheme(
    rows([[1 / 4, 1 / 4 - _ROOT3 / 6], [1 / 4 + _ROOT3 / 6, 1 / 4]]), (0.5, 0.5), _REFERENCE
)
GAUSS6 = Scheme(
    rows([
        [5 / 36, 2 / 9 - _ROOT15 / 15, 5 / 36 - _ROOT15 / 30],
        [5 / 36 + _ROOT15 / 24, 2 / 9, 5 / 36 - _ROOT15 / 24],
        [5 / 36 + _ROOT15 / 30, 2 / 9 + _ROOT15 / 15, 5 / 36],
    ]),
    (5 / 18, 4 / 9, 5 / 18), _REFERENCE,
)  # fmt: skip
RADAU3 = Scheme(rows([[5 / 12, -1 / 12], [3 / 4, 1 / 4]]), (3 / 4, 1 / 4), _REFERENCE)
_RADAU5 = (
    ((88 - 7 * _ROOT6) / 360, (296 - 169 * _ROOT6) / 1800, (-2 + 3 * _ROOT6) / 225),
    ((296 + 169 * _ROOT6) / 1800, (88 + 7 * _ROOT6) / 360, (-2 - 3 * _ROOT6) / 225),
    ((16 - _ROOT6) / 36, (16 + _ROOT6) / 36, 1 / 9),
)
RADAU5 = Scheme(rows(_RADAU5), _RADAU5[-1], _REFERENCE)


@dataclass(frozen=True, eq=False)
class Transformation:
    """A step in the variables Z_i = Y_i - u, and A^-1 in its eigenvectors.

    With G_i = g(t + c_i h, u + Z_i) a step is (A^-1 x M) Z = h G and u' = u + sum d_i Z_i. In
    W = V^-1 Z the systems of A^-1 x M / h - I x J fall apart, one for each eigenvalue.

    Attributes
    ----------
    inverse : ndarray
        A^-1, shape (s, s).
    end : ndarray
        d = A^-T b.
    eigenvalues : ndarray
        Of A^-1, a real one first, then one of each pair of complex ones.
    vectors : ndarray
        Columns of V that belong to these, shape (s, k), those of pairs doubled:
        Z = Re(vectors W).
    covectors : ndarray
        Rows of V^-1 that belong to these, shape (k, s).
    """

    inverse: np.ndarray
    end: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray
    covectors: np.ndarray

    @property
    def separated(self) -> np.ndarray:
        """RADAU5's variables by Z, real: their equations fall apart, and one of each sums to Z_s.

        An eigenvector is known up to a factor: here those are the last row of V.
        """
        rows = []
        for value, last, own in zip(
            self.eigenvalues, self.vectors[-1], self.covectors, strict=True
        ):
            rows += [(last * own).real, (last * own).imag][: 2 if abs(value.imag) > 1e-9 else 1]
        return np.array(rows)

    @property
    def from_start(self) -> np.ndarray:
        """What a constant state is driven by in each stage: row sums of A^-1."""
        return self.inverse.sum(axis=1)

    @property
    def start_weight(self) -> float:
        """Weight of u in u' = start_weight u + sum d_i Y_i; exactly zero where it is small."""
        weight = 1.0 - float(self.end.sum())
        return weight if abs(weight) > 1e-12 else 0.0


@lru_cache(maxsize=8)
def transformation(scheme: Scheme) -> Transformation:
    """Return the transformation of a method whose A is regular."""
    A = np.array(scheme.A)
    inverse = np.linalg.inv(A)
    end = np.linalg.solve(A.T, np.array(scheme.b))
    if scheme.stiffly_accurate:
        end = np.eye(scheme.stages)[-1]
    values, vectors = np.linalg.eig(inverse)
    covectors = np.linalg.inv(vectors)
    chosen = [i for i in np.argsort(np.abs(values.imag)) if values[i].imag > -1e-9]
    twice = np.where(np.abs(values.imag) > 1e-9, 2.0, 1.0)
    vectors = (vectors * twice)[:, chosen]
    return Transformation(inverse, end, values[chosen], vectors, covectors[chosen])

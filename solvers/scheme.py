"""Coefficients of one-step methods: one kind of table for the Runge-Kutta family, one for pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = [
    "Row",
    "Rows",
    "Scheme",
    "combine",
    "rows",
    "ssp_scheme",
]

Row: TypeAlias = tuple[float, ...]
Rows: TypeAlias = tuple[Row, ...]


# Of coefficients that are sums of others.
_ROUND_OFF = 1e-13


@dataclass(frozen=True)
class Scheme:
    """A Runge-Kutta method: explicit, diagonally or fully implicit, IMEX or Rosenbrock-W.

    A step of length h from u at t has stages Y_i and slopes K_i::

        Y_i = u + h sum_j a_ij K_j,   K_i = g(t + c_i h, Y_i),   u' = u + h sum_i b_i K_i

    An IMEX method has two slopes a stage, and coefficients for each. Of a Rosenbrock method, with
    J = g_u(t, u) and g_t = g_t(t, u) (E. Hairer & G. Wanner, Solving Ordinary Differential
    Equations II, equation IV.7.4)::

        k_i = h g(t + c_i h, u + sum_j a_ij k_j) + h J sum_j Gamma_ij k_j + gamma_i h^2 g_t
        u'  = u + sum_i b_i k_i,      gamma_i = sum_j Gamma_ij

    Attributes
    ----------
    A : tuple of tuple of float
        Stage coefficients, shape (s, s), lower triangular unless the stages are coupled; a zero on
        the diagonal is an explicit stage. Of an IMEX method those of the implicit part.
    b : tuple of float
        Weights.
    reference : str
        Where the coefficients are from.
    b_embedded : tuple of float or None
        Weights of the embedded solution, if there is one and it is known.
    A_explicit, b_explicit : tuple or None
        Of the explicit part of an IMEX method.
    Gamma : tuple of tuple of float or None
        Of a Rosenbrock method, lower triangular.
    interpolation : tuple of tuple of float or None
        Coefficients of theta, ..., theta^p in each stage's weight inside a step.
    b_explicit_embedded : tuple of float or None
        Embedded weights of the explicit part, where they are not those of the implicit one.
    """

    A: Rows
    b: Row
    reference: str = ""
    b_embedded: Row | None = None
    A_explicit: Rows | None = None
    b_explicit: Row | None = None
    Gamma: Rows | None = None
    interpolation: Rows | None = None
    b_explicit_embedded: Row | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.b)

    @cached_property
    def c(self) -> Row:
        """Abscissae, the row sums of A."""
        return _abscissae(self.A)

    @cached_property
    def c_explicit(self) -> Row:
        """Abscissae of the explicit part of an IMEX method."""
        return _abscissae(self.A_explicit or ())

    @cached_property
    def nodes(self) -> Row:
        """Abscissae of both parts."""
        return tuple(dict.fromkeys(self.c + self.c_explicit))

    @cached_property
    def explicit(self) -> bool:
        """Whether a step solves no systems."""
        diagonal = any(row[i] for i, row in enumerate(self.A))
        return not diagonal and self.A_explicit is None and self.Gamma is None

    @cached_property
    def coupled(self) -> bool:
        """Whether a stage depends on later ones: all are solved for at once."""
        return any(any(row[i + 1 :]) for i, row in enumerate(self.A))

    @property
    def explicit_first(self) -> bool:
        """Whether the first stage is the state at the step's start."""
        return self.A[0][0] == 0.0

    @cached_property
    def stiffly_accurate(self) -> bool:
        """Whether the step ends at its last stage. Not of one with two parts, which are added."""
        return self.A[-1] == self.b and self.A_explicit is None and self.Gamma is None

    @property
    def fsal(self) -> bool:
        """First Same As Last: a step's first stage is the explicit one that ended the last."""
        return self.explicit and self.stages > 1 and self.stiffly_accurate

    @property
    def interpolation_degree(self) -> int:
        """Degree of the method's own interpolant; 0 without one."""
        return len(self.interpolation[0]) if self.interpolation else 0

    def live_stages(self, fsal: bool = False) -> frozenset[int]:
        """Return the stages that the solution depends on.

        Parameters
        ----------
        fsal : bool
            Whether the last stage counts in any case, as the next step's first.
        """
        live: set[int] = set()
        for i in reversed(range(self.stages)):
            if self.b[i] or (fsal and i == self.stages - 1) or any(self.A[j][i] for j in live):
                live.add(i)
        return frozenset(live)

    def without_idle_stages(self, fsal: bool = False) -> Scheme:
        """Return the method without stages that its own solution does not need, for fixed steps.

        Neither of an IMEX method nor of a Rosenbrock method.

        Parameters
        ----------
        fsal : bool
            Whether the last stage is the next step's first, and stays.
        """
        kept = sorted(self.live_stages(fsal))
        if len(kept) == self.stages:
            return self
        A = tuple(tuple(self.A[i][j] for j in kept) for i in kept)
        return Scheme(A, tuple(self.b[i] for i in kept), self.reference)

    # ------------------------------------------------------------------------ Rosenbrock methods

    @cached_property
    def gamma(self) -> Row:
        """Row sums of Gamma."""
        return tuple(map(sum, self.Gamma or ()))

    @cached_property
    def gamma_diagonal(self) -> Row:
        """The diagonal of Gamma; a stage with zero there is explicit."""
        return tuple(row[i] for i, row in enumerate(self.Gamma or ()))

    @cached_property
    def one_matrix(self) -> bool:
        """Whether all stages have the same matrix, I / (h gamma) - J."""
        return len(set(self.gamma_diagonal)) == 1

    @cached_property
    def needs_time_slope(self) -> bool:
        """Whether the order on y' = f(t, y) is lost without g_t.

        The methods of W type do not need it: sum b_i gamma_i = 0, and the conditions of higher
        order hold for any approximation of the Jacobian of the autonomous form.
        """
        defect = sum(b * gamma for b, gamma in zip(self.b, self.gamma, strict=True))
        return abs(defect) > 1e-12

    def needs_slope_of(self, mass: Any) -> bool:
        """Whether a step has g_t: always where a singular mass matrix leaves equations in t."""
        return self.needs_time_slope or (mass is not None and mass.singular)

    @cached_property
    def ends_at_stage(self) -> bool:
        """Whether a step ends at a stage that is solved for, where algebraic equations hold too.

        Of a Rosenbrock method: where those of linear equations do (stiffly accurate: the end is
        the state of the last stage after its solve). Both parts of an IMEX method have that row.
        """
        if self.Gamma is not None:
            At, _, _, bt = self.transformed()
            last = [*At[-1][:-1], 1.0]
            return bool(np.allclose(bt, last, rtol=0.0, atol=_ROUND_OFF))
        parts = [(self.A, self.b)]
        if self.A_explicit is not None and self.b_explicit is not None:
            parts.append((self.A_explicit, self.b_explicit))
        return any(
            self.A[i][i] != 0.0
            and all(np.allclose(A[i], b, rtol=0.0, atol=_ROUND_OFF) for A, b in parts)
            for i in range(self.stages)
        )

    def transformed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return At, Ginv, Corr and bt for the variables Y = G k that PETSc solves for.

        G is Gamma with ones for zeros of its diagonal (explicit stages). A stage is then::

            Y_i / (h Gamma_ii) - J Y_i = g(t_i, Z_i) - sum_{j<i} Ginv_ij Y_j / h + gamma_i h g_t
            Y_i / h = g(t_i, Z_i) - sum_{j<i} Ginv_ij Y_j / h + J sum_j Corr_ij Y_j + gamma_i h g_t

        the second one for Gamma_ii = 0, both with Z_i = u + sum_j At_ij Y_j; u' = u + sum bt_i Y_i.
        """
        A, Gamma = np.array(self.A), np.array(self.Gamma)
        inverse = np.linalg.inv(Gamma + np.diag((np.diag(Gamma) == 0.0).astype(float)))
        return A @ inverse, inverse, Gamma @ inverse, np.array(self.b) @ inverse


def rows(matrix: Any) -> Rows:
    """Return an array, or rows that end where only zeros follow, as rows of one length.

    The lower triangle of a square matrix may be given: as many columns as rows.
    """
    width = max(len(matrix), *map(len, matrix))
    return tuple((*map(float, row), *[0.0] * (width - len(row))) for row in matrix)


def _abscissae(A: Rows) -> Row:
    """Return row sums; what is 0 or 1 but for their round-off is exactly that."""
    sums = [float(sum(row)) for row in A]
    return tuple(float(round(c)) if abs(c - round(c)) < 1e-13 else c for c in sums)


# -------------------------------------------------------------- strong stability preserving methods


class _LowStorage:
    """A register of a low-storage method: u_n + h sum_j row_j k_j, row exact."""

    def __init__(self, row: list[Fraction]) -> None:
        self.row = row

    def plus(self, stage: int, weight: Fraction) -> _LowStorage:
        """Add h weight k_stage."""
        row = list(self.row)
        row[stage] += weight
        return _LowStorage(row)

    def mixed(self, weight: Fraction, other: _LowStorage) -> _LowStorage:
        """Return (1 - weight) self + weight other."""
        pairs = zip(self.row, other.row, strict=True)
        return _LowStorage([(1 - weight) * mine + weight * theirs for mine, theirs in pairs])


def ssp_scheme(subtype: str, stages: int) -> Scheme:
    """Return the coefficients of an optimal strong-stability-preserving method.

    Parameters
    ----------
    subtype : {"rks2", "rks3", "rk104"}
        PETSc's name: SSPRK(s, 2), SSPRK(n^2, 3) or SSPRK(10, 4).
    stages : int
        Number of stages.

    References
    ----------
    D. I. Ketcheson, Highly efficient strong stability-preserving Runge-Kutta methods with
    low-storage implementations, SIAM J. Sci. Comput. 30 (2008) 2113-2136. The low-storage forms
    given there are convex combinations of forward Euler steps; carrying each register's weights
    of the slopes along gives A and b as fractions.
    """
    start = _LowStorage([Fraction(0)] * stages)
    register, found = start, []

    def euler_steps(first: int, last: int, length: Fraction) -> None:
        nonlocal register
        for stage in range(first, last):
            found.append(register.row)
            register = register.plus(stage, length)

    if subtype == "rks2":
        euler_steps(0, stages, Fraction(1, stages - 1))
        end = start.mixed(Fraction(stages - 1, stages), register)
    elif subtype == "rks3":
        n = round(stages**0.5)
        length = Fraction(1, stages - n)
        kept, mixing = (n - 1) * (n - 2) // 2, n * (n + 1) // 2
        euler_steps(0, kept, length)
        saved = register
        euler_steps(kept, mixing, length)
        register = register.mixed(Fraction(n, 2 * n - 1), saved)
        euler_steps(mixing, stages, length)
        end = register
    else:
        euler_steps(0, 5, Fraction(1, 6))
        # Two registers: q2 = (u + 9 q1) / 25 and q1 = 15 q2 - 5 q1.
        first = start.mixed(Fraction(9, 10), register)  # 5/2 q2
        register = register.mixed(Fraction(6), first)  # 6 first - 5 q1 = 15 q2 - 5 q1
        euler_steps(5, 10, Fraction(1, 6))
        # The end is q2 + 3/5 (q1 + h k/6), whose weights 2/5 and 3/5 are those of `first` and q1.
        end = first.mixed(Fraction(3, 5), register)
    return Scheme(
        rows(found), tuple(map(float, end.row)), "Ketcheson, SIAM J. Sci. Comput. 30 (2008)"
    )


def combine(
    row: Iterable[Any], tensors: Iterable[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """Return the sum of row_j tensors_j, over as many as there are tensors."""
    total = torch.zeros_like(like)
    for weight, tensor in zip(row, tensors, strict=False):
        if weight:
            total = total + float(weight) * tensor
    return total

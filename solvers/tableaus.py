"""Coefficients that PETSc does not tell, for the adjoints that are not PETSc's.

The tests check every one of them against a step of PETSc's.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from pnode.options import PETSc
from pnode.solvers import petsc_c
from pnode.solvers.methods import Method

__all__ = [
    "ExplicitTableau",
    "HalfUpdate",
    "SymplecticScheme",
    "explicit_nodes",
    "rk_tableau",
    "ssp_tableau",
    "symplectic_scheme",
]


@dataclass(frozen=True)
class ExplicitTableau:
    """Butcher tableau of an explicit Runge-Kutta method.

    Attributes
    ----------
    A : tuple of tuple of float
        Stage coefficients, strictly lower triangular.
    b : tuple of float
        Weights.
    c : tuple of float
        Abscissae.
    """

    A: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def live_stages(self, fsal: bool = False) -> frozenset[int]:
        """Return the stages that the solution depends on.

        Parameters
        ----------
        fsal : bool
            Whether the last stage counts in any case, as the next step's first.
        """
        live: set[int] = set()
        for i in reversed(range(len(self.c))):
            if self.b[i] or (fsal and i == len(self.c) - 1) or any(self.A[j][i] for j in live):
                live.add(i)
        return frozenset(live)

    def without_idle_stages(self, fsal: bool) -> ExplicitTableau:
        """Return the method without stages that only an embedded solution needs.

        Parameters
        ----------
        fsal : bool
            Whether the last stage is the next step's first, and stays.
        """
        kept = sorted(self.live_stages(fsal))
        return ExplicitTableau(
            tuple(tuple(self.A[i][j] for j in kept) for i in kept),
            tuple(self.b[i] for i in kept),
            tuple(self.c[i] for i in kept),
        )


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


@cache
def rk_tableau(method: Method) -> tuple[ExplicitTableau, tuple[float, ...] | None]:
    """Return the tableau of a method of PETSc's type "rk", and its embedded weights, if any."""
    if method.tableau is not None:
        given = method.tableau
        c = tuple(map(sum, given.A))
        return ExplicitTableau(given.A, given.b, c), given.b_embedded or None
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    try:
        ts.setType("rk")
        ts.setRKType(method.subtype)
        found = petsc_c.rk_tableau(ts)
    finally:
        ts.destroy()
    embedded = found["b_embedded"]
    return (
        ExplicitTableau(
            tuple(map(tuple, found["A"].tolist())), tuple(found["b"].tolist()),
            tuple(found["c"].tolist()),
        ),
        None if embedded is None else tuple(embedded.tolist()),
    )  # fmt: skip


def explicit_nodes(method: Method) -> tuple[float, ...]:
    """Return the abscissae c of an explicit Runge-Kutta method; none of others.

    What is 0 or 1 but for the round-off of its sum is exactly that.
    """
    if method.ts_type == "rk":
        nodes = rk_tableau(method)[0].c
    elif method.ts_type == "ssp":
        nodes = ssp_tableau(method.subtype, method.stages).c
    else:
        return ()
    return tuple(round(c) * 1.0 if abs(c - round(c)) < 1e-13 else c for c in nodes)


def ssp_tableau(subtype: str, stages: int) -> ExplicitTableau:
    """Return the Butcher tableau of an optimal strong-stability-preserving method.

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
    register, rows = start, []

    def euler_steps(first: int, last: int, length: Fraction) -> None:
        nonlocal register
        for stage in range(first, last):
            rows.append(register.row)
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
    return ExplicitTableau(
        tuple(tuple(map(float, row)) for row in rows),
        tuple(map(float, end.row)),
        tuple(float(sum(row)) for row in rows),
    )


@dataclass(frozen=True)
class HalfUpdate:
    """One half-update of a symplectic step: ``part += weight h f_part``.

    Attributes
    ----------
    part : int
        0 for the positions q, 1 for the momenta p.
    weight : float
        c_i or d_i.
    offset : float
        f is evaluated at t + offset h.
    """

    part: int
    weight: float
    offset: float


@dataclass(frozen=True)
class SymplecticScheme:
    """Coefficients of ``q += c_i h q'(p), p += d_i h p'(q)``, i = 1..s.

    Attributes
    ----------
    c, d : tuple of float
        Weights of the position and momentum updates.
    reference : str
        Where they are from.
    """

    c: tuple[float, ...]
    d: tuple[float, ...]
    reference: str

    def half_updates(self) -> tuple[HalfUpdate, ...]:
        """Return the updates in their order, without those of weight zero.

        In the autonomous form of q' = g(t, p), p' = f(t, q), each part carries a clock of its own
        along: the momenta's clock reads the sum of d so far, and drives g; the positions' clock
        reads the sum of c, and drives f. Both end at t + h.
        """
        updates, position_clock, momentum_clock = [], 0.0, 0.0
        for c, d in zip(self.c, self.d, strict=True):
            if c:
                updates.append(HalfUpdate(0, c, momentum_clock))
            position_clock += c
            if d:
                updates.append(HalfUpdate(1, d, position_clock))
            momentum_clock += d
        return tuple(updates)


_ROOT = 2.0 ** (1.0 / 3.0)
_W1, _W0 = 1.0 / (2.0 - _ROOT), -_ROOT / (2.0 - _ROOT)

_SYMPLECTIC = {
    "1": SymplecticScheme((1.0,), (1.0,), "symplectic Euler"),
    "2": SymplecticScheme((0.0, 1.0), (0.5, 0.5), "velocity Verlet"),
    "3": SymplecticScheme(
        (1.0, -2 / 3, 2 / 3), (-1 / 24, 3 / 4, 7 / 24),
        "R. D. Ruth, IEEE Trans. Nucl. Sci. 30 (1983) 2669-2671",
    ),
    "4": SymplecticScheme(
        (_W1 / 2, (_W1 + _W0) / 2, (_W1 + _W0) / 2, _W1 / 2), (_W1, _W0, _W1, 0.0),
        "E. Forest & R. D. Ruth, Physica D 43 (1990) 105-117",
    ),
}  # fmt: skip


def symplectic_scheme(subtype: str) -> SymplecticScheme:
    """Return the scheme of PETSc's TSBASICSYMPLECTIC ``subtype``."""
    return _SYMPLECTIC[subtype]

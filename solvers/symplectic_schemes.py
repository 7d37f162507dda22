"""Coefficients of symplectic partitioned steps, whose half-updates take turns."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

__all__ = ["SYMPLECTIC", "HalfUpdate", "SymplecticScheme"]


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

    def within(self, flow: Any, h: float) -> Any:
        """Return a context for evaluations of f in a step of length h; see MomentumFlow."""
        return nullcontext() if flow is None else flow.over(self.weight * h if self.part else None)


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

#: By PETSc's type.
SYMPLECTIC = {
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

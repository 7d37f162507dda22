"""Solutions by PETSc's sparse LU, judged: it takes pivots as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy  # scipy.sparse, which takes a tenth of a second, where it is needed

from pnode.base.errors import LinearSolveFailed
from pnode.base.options import PETSc
from pnode.base.ranks import Ranks
from pnode.solvers.linear.linearizer import Linearizer

__all__ = ["DirectSolves", "judge"]

# What is left of an equation, of its terms (Oettli & Prager, Numer. Math. 6 (1964) 405).
_PART = 2.0**12 * float(np.finfo(PETSc.RealType).eps)
_SMALLEST = float(np.finfo(PETSc.RealType).tiny)
_REFINED = 3


class DirectSolves:
    """Judges what a KSP has found by factors of a sparse matrix alone, and mends it.

    A solution is good if what it leaves of each equation is small beside that equation's terms,
    which takes a product. Else it is refined, and where that does not do, SuperLU, which chooses
    pivots among all rows, has its turn. Among several ranks, each of which factors its own part of
    the matrix, so for each.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, int] = (0, -1)
        #: The matrix as SciPy has it, and its transpose.
        self._forms: list[Any] = []
        self._diagonal: Any = None
        self._factors: Any = None

    def mend(self, ksp: Any, b: Any, x: Any, transposed: bool, ranks: Ranks) -> bool:
        """Mend the solution x of ``A x = b`` or ``A^T x = b``; False if A is singular.

        Not collective: where it is on one of several ranks, those are told later.
        """
        matrix = _factored(ksp)
        if matrix is None or ksp.getConvergedReason() < 0:
            return True
        self._read(matrix)
        right, own = b.getArray(readonly=True), x.getArray(readonly=True)
        with np.errstate(invalid="ignore", over="ignore"):
            left = self._left(right, own, transposed)
            if left is None or not (np.isfinite(right).all() and self._is_finite()):
                return True  # or the fault of no solve
            own = own.copy()
            good = self._mended(right, own, left, transposed, ksp if b.comm.size == 1 else None)
        if good:
            x.setArray(own)
        elif ranks.parallel:
            ranks.fail(LinearSolveFailed(
                "a rank's part of a sparse matrix is singular: take another step size, or use "
                "jacobian='matrix-free'"
            ))  # fmt: skip
        return good or ranks.parallel

    def _read(self, matrix: Any) -> None:
        seen = matrix.handle, matrix.stateGet()
        if seen != self._seen:
            rows, columns, values = matrix.getValuesCSR()
            sparse = scipy.sparse.csr_matrix((values, columns, rows), matrix.getSize())
            self._forms, self._diagonal = [sparse, sparse.T], sparse.diagonal()
            self._seen, self._factors = seen, None

    def _is_finite(self) -> bool:
        return bool(np.isfinite(self._forms[0].data).all())

    def _left(self, b: Any, x: Any, transposed: bool) -> Any:
        """Return what x leaves of b, None if that is small."""
        matrix = self._forms[transposed]
        left = b - matrix @ x
        sizes = np.abs(x) + _SMALLEST  # entries below are rounded as that one
        terms = np.abs(b) + np.abs(self._diagonal) * sizes
        if bool((np.abs(left) <= _PART * terms).all()):
            return None
        terms = np.abs(b) + abs(matrix) @ sizes  # all of them
        return None if bool((np.abs(left) <= _PART * terms).all()) else left

    def _mended(self, b: Any, x: Any, left: Any, transposed: bool, ksp: Any) -> bool:
        """Refine x, by the factors of a KSP at first if there is one; False if A is singular."""
        if ksp is not None and self._factors is None and np.isfinite(x).all():
            pc, (right, found) = ksp.getPC(), ksp.getOperators()[1].createVecs()
            apply = pc.applyTranspose if transposed else pc.apply
            for _ in range(_REFINED):
                right.setArray(left)
                apply(right, found)
                x += found.getArray(readonly=True)
                left = self._left(b, x, transposed)
                if left is None:
                    return True
        if self._factors is None:
            from scipy.sparse.linalg import splu

            try:
                self._factors = splu(self._forms[0].tocsc())
            except RuntimeError as error:
                if "singular" not in str(error):
                    raise
                return False
        form = "T" if transposed else "N"
        x[:] = self._factors.solve(b, form)
        for _ in range(_REFINED):
            left = self._left(b, x, transposed)
            if left is None:
                break
            x += self._factors.solve(left, form)
        return True


def _factored(ksp: Any) -> Any:
    """Return the sparse matrix, or this rank's part of it, whose factors alone a KSP applies."""
    if ksp.getType() != "preonly":
        return None
    kind, matrix = ksp.getPC().getType(), ksp.getOperators()[1]
    if "aij" not in matrix.getType():
        return None
    if kind == "bjacobi" and matrix.comm.size > 1:
        return matrix.getDiagonalBlock()
    return matrix if kind == "lu" and matrix.comm.size == 1 else None


def judge(ts: Any, bridge: Linearizer) -> None:
    """Judge the solutions of a TS whose nonlinear solver takes one linear solve for all."""
    solves = DirectSolves()

    def look(ksp: Any, b: Any, x: Any) -> None:
        good = bridge.guarded("jacobian", solves.mend, ksp, b, x, False, bridge.ranks)
        if good is False:
            ksp.setConvergedReason(PETSc.KSP.ConvergedReason.DIVERGED_PC_FAILED)

    ts.getSNES().getKSP().setPostSolve(look)

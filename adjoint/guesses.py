"""Transposed solves with a matrix that may not be the right one, checked by a product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import LinearSolveFailed
from pnode.base.ledger import Ledger
from pnode.base.options import OWN_PREFIX, PETSc
from pnode.base.vectors import REAL
from pnode.field.linearization import Products
from pnode.solvers.linear.linearizer import Point
from pnode.solvers.linear.shells import JacobianShell, shell_matrix
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import reason_name
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step

__all__ = ["ExactSolves", "checked_solution", "correction"]

# Residuals that are taken for round-off, in units of it.
_ROUND_OFF = 1e3


def correction(
    b: torch.Tensor,
    x: torch.Tensor,
    shift: float,
    products: Products,
    norm: Callable[[torch.Tensor], float],
) -> torch.Tensor | None:
    """Return what remains of b after ``(F_u + shift F_u_dot)^T x``, if it is small. Collective.

    Parameters
    ----------
    b, x : Tensor
        Right-hand side and solution, PETSc's precision; or rows of several.
    shift : float
        Of the matrix.
    products : Products
        Those of g = -F with x.
    norm : callable
        Norm of a vector.

    Returns
    -------
    Tensor or None
        Zero if it is round-off, or not finite; another right-hand side if one more solve brings it
        down to that; None if the matrix is another one.
    """
    eps = torch.finfo(products.state.dtype).eps
    moved = x if products.rate is None else products.rate.to(REAL)
    left = b - shift * moved + products.state.to(REAL)
    small = True
    for found in zip(*map(_rows, (left, b, moved, products.state)), strict=True):
        size, *sizes = map(norm, found)
        scale = sizes[0] + shift * sizes[1] + sizes[2]
        if math.isfinite(size) and size > _ROUND_OFF * eps * scale:
            if size > math.sqrt(eps) * scale:
                return None
            small = False
    return torch.zeros_like(left) if small else left


def _rows(vectors_: torch.Tensor) -> torch.Tensor:
    return vectors_ if vectors_.dim() > 1 else vectors_[None]


class ExactSolves:
    """Transposed solves by GMRES with products, preconditioned with a matrix that misses entries.

    Parameters
    ----------
    ts : TS
        Whose SNES has the preconditioner.
    bridge : Bridge
        Has the products.
    settings : IntegratorSettings
        Size and place.
    """

    def __init__(self, ts: Any, bridge: Bridge, settings: IntegratorSettings) -> None:
        size, comm, place = settings.size, settings.comm, settings.place
        self._shell = JacobianShell(bridge)
        self._operator = shell_matrix(self._shell, size, size, comm, place)
        self._inner = ts.getSNES().getKSP()
        self._ksp = PETSc.KSP().create(comm)
        self._ksp.setOptionsPrefix(OWN_PREFIX)
        self._ksp.setType("gmres")
        self._ksp.setGMRESRestart(100)
        self._ksp.setTolerances(rtol=1e-12 if settings.dtype is torch.float64 else 1e-6)
        self._ksp.setPC(self._inner.getPC())
        self._b, self._x = (vectors.create(comm, size, place) for _ in range(2))

    def solve(self, point: Point, shift: float, b: torch.Tensor) -> torch.Tensor:
        """Return ``(F_u + shift F_u_dot)^-T b`` at a point.

        Raises
        ------
        LinearSolveFailed
            If GMRES does not converge.
        """
        if b.dim() > 1:
            return torch.stack([self.solve(point, shift, row) for row in b])
        self._shell.move_to(point, shift, -1.0)
        matrices = self._inner.getOperators()
        self._ksp.setOperators(self._operator, matrices[1])
        vectors.copy_in(self._b, b)
        self._ksp.solveTranspose(self._b, self._x)
        reason = self._ksp.getConvergedReason()
        self._inner.setOperators(*matrices)
        if reason < 0:
            raise LinearSolveFailed(
                "the Jacobian has entries that jacobian='auto' did not find where it looked, and a "
                "transposed solve without them failed: use jacobian='matrix-free' or 'dense'",
                reason=reason_name(PETSc.KSP.ConvergedReason, reason),
            )
        return vectors.copy_out(self._x)

    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""
        self._ksp.destroy()
        self._operator.destroy()


def checked_solution(
    solver: Any, s: float, u: torch.Tensor, shift: float, b: torch.Tensor, step: Step,
    ledger: Ledger, u_dot: torch.Tensor | None,
) -> tuple[torch.Tensor, Products | None]:  # fmt: skip
    """Solve with a matrix that may be a guess, and what mends it. Collective.

    Parameters
    ----------
    solver : ImplicitAdjointStepper
        Has matrix and products.
    s, u, shift, b, step, ledger, u_dot
        As ``ImplicitAdjointStepper.solve_transposed`` takes them.

    Returns
    -------
    tuple
        The solution, and its products where they are known.
    """
    solver.set_matrix(s, u, shift, step, u_dot, exactly=False)
    x = solver.solve(b, step, ledger)
    jacobian, found = solver.bridge.jacobian, solver.settings.jacobian_options.found
    if not (jacobian.guessed or found):
        return x, None
    for _ in range(2):
        products = solver.products(s, u, x, u_dot)
        left = correction(b, x, shift, products, solver.field.problem.ranks.norm)
        if left is not None:
            exact = not bool(left.any())
            return (x, products) if exact else (x + solver.solve(left, step, ledger), None)
        if not jacobian.guessed:  # it misses entries
            break
        solver.set_matrix(s, u, shift, step, u_dot)  # it is not constant
        x = solver.solve(b, step, ledger)
        if not found:
            return x, None
    return solver.exact_solves.solve(solver.bridge.point_at(s, u, u_dot), shift, b), None

"""Matrices of products with the Jacobian, for PETSc: nothing is assembled."""

from __future__ import annotations

from typing import Any

from pnode.base.devices import HOST, Place
from pnode.base.options import PETSc
from pnode.base.vectors import add_to, copy_in, view
from pnode.solvers.linear.linearizer import Linearizer, Point

__all__ = ["JacobianShell", "shell_matrix"]


class JacobianShell:
    """Python context of the matrix ``rate_factor dF/du_dot + jacobian_factor dg/du``."""

    point: Point | None = None
    rate_factor = 0.0
    jacobian_factor = 1.0

    def __init__(self, linearizer: Linearizer) -> None:
        self._linearizer = linearizer
        linearizer.shells.add(self)

    def move_to(self, point: Point, rate_factor: float, jacobian_factor: float) -> None:
        """Stand at a point; nothing is evaluated until the first product."""
        self.point = point
        self.rate_factor = rate_factor
        self.jacobian_factor = jacobian_factor

    def scale(self, mat: Any, factor: float) -> None:
        """A = factor A, which TSDIRK does for its initial slope."""
        self.rate_factor *= factor
        self.jacobian_factor *= factor

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        assert self.point is not None
        product = self._linearizer.jvp(self.point, x, self.jacobian_factor, self.rate_factor)
        if product is None:  # filler: keep Krylov methods going until the step is over
            copy_in(y, view(x))
        else:
            copy_in(y, product)

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        assert self.point is not None
        product = self._linearizer.vjp(self.point, x)
        if product is None:
            copy_in(y, view(x))
            return
        copy_in(y, product.state)
        if self.jacobian_factor != 1.0:
            y.scale(self.jacobian_factor)
        if self.rate_factor:
            if product.rate is None:
                y.axpy(self.rate_factor, x)
            else:
                add_to(y, product.rate, self.rate_factor)


def shell_matrix(context: Any, rows: int, columns: int, comm: Any, place: Place = HOST) -> Any:
    """Create the PETSc matrix of a shell, local sizes given. Collective on ``comm``.

    Vectors that PETSc makes to fit it live at ``place``.
    """
    matrix = PETSc.Mat().create(comm=comm)
    matrix.setSizes(((rows, PETSc.DETERMINE), (columns, PETSc.DETERMINE)))
    matrix.setType("python")
    matrix.setPythonContext(context)
    if not place.on_host:
        matrix.setVecType(place.vec_type)
    matrix.setUp()
    matrix.assemble()
    return matrix

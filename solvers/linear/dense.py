"""Dense Jacobians."""

from __future__ import annotations

from typing import Any

from pnode.base.vectors import create_dense, matrix_view
from pnode.solvers.linear.assembly import Assembly
from pnode.solvers.linear.linearizer import Linearizer, Point

__all__ = ["DenseAssembly"]


class DenseAssembly(Assembly):
    """A dense matrix, from ``size`` batched products."""

    def create(self, size: int, comm: Any) -> Any:
        """Return a dense matrix."""
        return create_dense(comm, size, self._place)

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return dg/du and dF/du_dot (None for the identity)."""
        linearization = linearizer.linearize(point)
        return linearization.jacobian(), linearization.rate_jacobian()

    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Fill the matrix."""
        state, rate = (None, None) if values is None else values
        entries = matrix_view(matrix, self._place)
        if state is None:
            entries.zero_()
        else:
            entries.copy_(state).neg_()
        if rate is None:
            entries.diagonal().add_(shift)
        else:
            entries.add_(rate, alpha=shift)
        matrix.assemble()

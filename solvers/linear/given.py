"""The user's own approximation of the Jacobian, to precondition with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # scipy.sparse, which takes a tenth of a second, where it is needed
import torch

from pnode.base.devices import HOST, Place
from pnode.base.errors import ConfigurationError, VectorFieldError
from pnode.base.options import PETSc
from pnode.base.vectors import REAL, set_dense_type
from pnode.problems.transfers import remote
from pnode.solvers.linear.dense import DenseAssembly
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.sparse import EntryAssembly

__all__ = ["GivenAssembly", "GivenMatrix", "as_matrix"]


class GivenMatrix:
    """The user's approximation of df/dy.

    Parameters
    ----------
    matrix : Tensor, sparse matrix of SciPy, Mat of PETSc, or callable
        Shape ``(size, size)`` for the flattened state; or ``matrix(t, y)`` that returns one.
    """

    def __init__(self, matrix: Any) -> None:
        varies = callable(matrix) and not isinstance(matrix, PETSc.Mat)
        self._function: Callable[..., Any] | None = matrix if varies else None
        self._constant = None if varies else as_matrix(matrix, "preconditioner")

    @property
    def varies(self) -> bool:
        """Whether a callable of time and state makes it."""
        return self._function is not None

    def at(self, point: Point) -> torch.Tensor:
        """Return the approximation of dg/du at ``point``, dense or sparse, PETSc's precision."""
        problem = point.field.problem
        matrix = self._constant
        if self._function is not None:
            layout = problem.layout
            time = torch.scalar_tensor(
                problem.direction * point.s, dtype=layout.dtype, device=layout.device
            )
            function = remote(self._function, problem.compute, point.field.ledger, strict=False)
            with torch.no_grad():
                state = layout.unflatten(point.u.detach().clone())
                matrix = as_matrix(function(time, state), "preconditioner(t, y)")
        assert matrix is not None
        size = problem.layout.size
        if matrix.shape != (size, size):
            raise VectorFieldError(
                f"preconditioner has shape {tuple(matrix.shape)} for a state of {size} entries: "
                f"give ({size}, {size}), for the flattened state"
            )
        values = matrix if matrix.layout is torch.strided else matrix.values()
        if not bool(torch.isfinite(values).all()):
            raise VectorFieldError(
                "preconditioner contains NaN or infinity: give finite values wherever the solution "
                "may come"
            )
        matrix = matrix.to(problem.layout.device)
        return matrix if problem.direction > 0 else -matrix


def as_matrix(matrix: Any, name: str) -> torch.Tensor:
    """Return a real matrix as a dense or coalesced sparse tensor in PETSc's precision.

    Raises
    ------
    ConfigurationError
        For anything but a real 2-D tensor, array or sparse matrix, and for a Mat of several ranks.
    """
    if isinstance(matrix, PETSc.Mat):
        matrix = _from_petsc(matrix, name)
    if hasattr(matrix, "tocoo"):  # SciPy's
        coo = matrix.tocoo()
        indices = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
        matrix = torch.sparse_coo_tensor(
            indices, torch.from_numpy(np.array(coo.data)), coo.shape, check_invariants=True
        )
    elif isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(matrix)
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2 or matrix.is_complex():
        shape = f" of shape {tuple(matrix.shape)}" if isinstance(matrix, torch.Tensor) else ""
        raise ConfigurationError(
            f"{name} is a {type(matrix).__name__}{shape}: give a real matrix, as a tensor (dense "
            "or sparse), a sparse matrix of SciPy or a Mat"
            + (", or precondition with a PC or KSP" if name == "preconditioner" else "")
        )
    matrix = matrix.detach().to(HOST.device, REAL)
    return matrix if matrix.layout is torch.strided else matrix.to_sparse_coo().coalesce()


def _from_petsc(matrix: Any, name: str) -> Any:
    """Return the values of a Mat, as they are now, as an array or a sparse matrix of SciPy."""
    if not matrix or not matrix.isAssembled():
        raise ConfigurationError(f"{name} is a Mat without values: assemble it before")
    if matrix.comm.size > 1:
        raise ConfigurationError(
            f"{name} is a Mat on {matrix.comm.size} ranks: give each rank's own part, a Mat on "
            "COMM_SELF; of a state with layout=, use 'sparse', or a PC made of the Mat"
        )
    try:
        kind = "dense" if "dense" in matrix.getType() else "aij"
        found = matrix.convert(kind, PETSc.Mat())
        if kind == "dense":
            return found.getDenseArray().copy()
        return scipy.sparse.csr_array(found.getValuesCSR()[::-1], found.getSize())
    except PETSc.Error as error:
        raise ConfigurationError(
            f"{name} is a Mat of type {matrix.getType()!r}, which gives no values: give an "
            "assembled one, or a PC made of it"
        ) from error


class GivenAssembly(EntryAssembly):
    """The user's approximation of df/dy, with the mass matrix; dense or sparse as it comes."""

    def __init__(self, given: GivenMatrix, place: Place = HOST) -> None:
        super().__init__(place)
        self._given = given
        self._dense = DenseAssembly(place)
        self._is_dense: bool | None = None

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the approximation and the mass matrix."""
        matrix = self._given.at(point)
        if self._is_dense is None:
            self._is_dense = matrix.layout is torch.strided and not self._parallel
        if self._is_dense:
            mass = point.field.mass
            return matrix.to_dense(), None if mass is None else mass.dense()
        if matrix.layout is torch.strided:
            rows, columns = torch.ones_like(matrix).nonzero().T
            values = matrix.reshape(-1)
        else:
            matrix = matrix.to_sparse_coo().coalesce()
            (rows, columns), values = matrix.indices(), matrix.values()
        entries = self._entries(
            rows + self._first_row, columns + self._first_row, -values, torch.zeros_like(values),
            self._mass_entries(point),
        )  # fmt: skip
        known = self._structure
        if self._parallel and known is not None and not all(map(torch.equal, entries[:2], known)):
            raise VectorFieldError(
                "preconditioner(t, y) has other entries than at first, which a solve of several "
                "ranks cannot take: return the same sparsity pattern each time"
            )
        return entries

    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Fill the matrix."""
        if self._is_dense:
            if not matrix.isAssembled():  # nothing depends on the type that it was made with
                set_dense_type(matrix, self._place)
            self._dense.form(matrix, values, shift)
        else:
            super().form(matrix, values, shift)

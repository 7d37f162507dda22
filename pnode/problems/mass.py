"""The constant mass matrix M of M y' = f(t, y), and the algebraic equations a singular one leaves.

Source: Hairer & Wanner, Solving Ordinary Differential Equations II, section VI.1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pnode.base.errors import ConfigurationError
from pnode.base.transforms import outside
from pnode.base.vectors import REAL
from pnode.problems.nullspaces import Bordered, null_spaces, unit_vectors
from pnode.problems.problem import StateLayout

__all__ = ["MassMatrix", "Solve"]

# Null spaces of the user's matrices, which come again with every solve, and the versions of these.
_known: Any = WeakTensorKeyDictionary()


class MassMatrix:
    """A constant square matrix: diagonal, dense or sparse.

    Parameters
    ----------
    matrix : Tensor or tuple of Tensor
        Diagonal: a vector of ``size`` entries, or tensors of the state's own shapes. Otherwise
        ``(size, size)``, dense or sparse; rows and columns are those of the flattened state.
    layout : StateLayout
        Of the state.

    Raises
    ------
    ConfigurationError
        For another shape, NaN, zero, or a matrix that requires grad.
    """

    @outside()  # nothing of it moves
    def __init__(self, matrix: Any, layout: StateLayout) -> None:
        size = layout.size
        parts = tuple(matrix) if isinstance(matrix, (tuple, list)) else (matrix,)
        for part in parts:
            if not isinstance(part, torch.Tensor) or not part.is_floating_point():
                what = part.dtype if isinstance(part, torch.Tensor) else repr(part)
                raise ConfigurationError(
                    f"mass is {what}: give a tensor of real numbers, the diagonal or the matrix"
                )
            if part.requires_grad:
                raise ConfigurationError(
                    "mass requires grad, and a mass matrix is constant here: detach it, or write "
                    "the problem as residual="
                )
        shapes = tuple(part.shape for part in parts)
        own = self._own = parts[0]
        self.size = size
        if shapes == layout.shapes or (len(parts) == 1 and own.shape == (size,)):
            values = torch.cat([part.to_dense().reshape(-1) for part in parts])
            self.diagonal: torch.Tensor | None = values.detach().to(layout.device, REAL)
            self._matrix: torch.Tensor | None = None
        elif len(parts) == 1 and own.shape == (size, size):
            self.diagonal = None
            values = own.detach().to(layout.device, REAL)
            if values.layout is not torch.strided:
                values = values.to_sparse_coo().coalesce()
            self._matrix = values
            values = values if values.layout is torch.strided else values.values()
        else:
            raise ConfigurationError(
                f"mass has shape {[tuple(shape) for shape in shapes]} for a state of {size} "
                f"entries: give the diagonal ({size},) or the matrix ({size}, {size}) of the "
                "flattened state"
            )
        if not bool(torch.isfinite(values).all()) or not bool(values.ne(0).any()):
            raise ConfigurationError("mass is zero or not finite: give a matrix with finite values")
        self._transpose = None if self._matrix is None else self._matrix.T
        self._factors: Bordered | None = None

    def apply(self, v: torch.Tensor) -> torch.Tensor:
        """Return M v, shape ``(..., size)``, v's precision."""
        return self._times(self._matrix, v)

    def apply_transpose(self, v: torch.Tensor) -> torch.Tensor:
        """Return M^T v, shape ``(..., size)``, v's precision."""
        return self._times(self._transpose, v)

    @cached_property
    def singular(self) -> bool:
        """Whether M leaves algebraic equations."""
        return self.null_spaces()[0].shape[1] > 0

    @outside()
    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """Return x with M x = v, shape ``(..., size)``, v's precision.

        Of a singular M: with L and R orthonormal bases of its left and right null space, the x with
        M x = v - L L^T v and R^T x = 0, which is that of a v that M can reach.
        """
        return self._solved(v, transposed=False)

    @outside()
    def solve_transpose(self, w: torch.Tensor) -> torch.Tensor:
        """Return the transpose of :meth:`solve` times w, shape ``(..., size)``, w's precision."""
        return self._solved(w, transposed=True)

    def _solved(self, v: torch.Tensor, transposed: bool) -> torch.Tensor:
        if self.diagonal is not None:
            inverse = torch.where(self.diagonal == 0.0, 0.0, 1.0 / self.diagonal)
            return inverse.to(v.dtype) * v
        if self._factors is None:
            assert self._matrix is not None
            self._factors = Bordered(self._matrix, *self.null_spaces())
        rows = v.to(REAL).reshape(-1, self.size)
        return self._factors.solve(rows, transposed).reshape(v.shape).to(v.dtype)

    def dense(self) -> torch.Tensor:
        """Return M as a dense matrix in PETSc's precision."""
        if self.diagonal is not None:
            return torch.diag(self.diagonal)
        assert self._matrix is not None
        return self._matrix if self._matrix.layout is torch.strided else self._matrix.to_dense()

    @outside()
    def repeated(self, number: int, layout: StateLayout) -> MassMatrix:
        """Return the mass matrix of so many states in one, each with this one.

        Parameters
        ----------
        number : int
            How many.
        layout : StateLayout
            Of all of them, one flat tensor.
        """
        if self.diagonal is not None:
            return MassMatrix(self.diagonal.repeat(number), layout)
        rows, columns, values = self.entries()
        shifts = self.size * torch.arange(number, device=rows.device)[:, None]
        index = torch.stack([(part + shifts).reshape(-1) for part in (rows, columns)])
        return MassMatrix(_sparse(index, values.repeat(number), layout.size), layout)

    @outside()
    def with_identity(self, layout: StateLayout) -> MassMatrix:
        """Return the mass matrix of a state that goes on with entries of mass one.

        Parameters
        ----------
        layout : StateLayout
            Of the whole state.
        """
        more = torch.arange(self.size, layout.size, device=self._own.device)
        ones = torch.ones_like(more, dtype=REAL)
        if self.diagonal is not None:
            own = torch.cat([self.diagonal, ones])
            return MassMatrix(layout.unflatten(own) if layout.is_tuple else own, layout)
        rows, columns, values = self.entries()
        index = torch.stack([torch.cat([rows, more]), torch.cat([columns, more])])
        return MassMatrix(_sparse(index, torch.cat([values, ones]), layout.size), layout)

    @outside()
    def null_spaces(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bases of the left and right null space; see :mod:`pnode.problems.nullspaces`."""
        if self.diagonal is not None:
            units = unit_vectors(self.diagonal.eq(0))
            return units, units
        assert self._matrix is not None
        version = None if self._own.is_inference() else self._own._version
        found, known = _known.get(self._own, (None, None))
        if known is None or found != version or version is None:
            known = null_spaces(self._matrix)
            _known[self._own] = (version, known)
        return known

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows, columns and values of the entries, the whole diagonal among them."""
        if self.diagonal is not None:
            diagonal = torch.arange(self.size, device=self.diagonal.device)
            return diagonal, diagonal, self.diagonal
        assert self._matrix is not None
        diagonal = torch.arange(self.size, device=self._matrix.device)
        matrix = self._matrix.to_sparse_coo()
        (rows, columns), values = matrix.coalesce().indices(), matrix.coalesce().values()
        return (
            torch.cat([rows, diagonal]),
            torch.cat([columns, diagonal]),
            torch.cat([values, torch.zeros_like(diagonal, dtype=REAL)]),
        )

    def blocks(self, samples: int) -> torch.Tensor:
        """Return the diagonal blocks, shape ``(samples, m, m)``, PETSc's precision.

        Raises
        ------
        ConfigurationError
            If there are entries elsewhere.
        """
        width = self.size // samples
        rows, columns, values = self.entries()
        sample = rows // width
        if bool((values.ne(0) & (columns // width != sample)).any()):
            raise ConfigurationError(
                f"mass couples the {samples} samples of the state, and jacobian='block' (or "
                "preconditioner='block') takes them as independent: use jacobian='dense' or "
                "'sparse'"
            )
        kept = columns // width == sample
        blocks = torch.zeros(samples, width, width, dtype=REAL, device=values.device)
        index = (sample[kept], rows[kept] % width, columns[kept] % width)
        return blocks.index_put_(index, values[kept], accumulate=True)

    def _times(self, matrix: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor:
        if self.diagonal is not None:
            return self.diagonal.to(v.dtype) * v
        assert matrix is not None
        found = matrix @ v.to(REAL) if v.dim() == 1 else (matrix @ v.to(REAL).T).T
        return found.to(v.dtype)


def _sparse(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(index, values, (size, size), check_invariants=True)


class Solve(torch.autograd.Function):
    """``solve`` of a MassMatrix, or of what has its two methods, which can be differentiated."""

    @staticmethod
    def forward(v: torch.Tensor, matrix: Any, transposed: bool) -> torch.Tensor:
        """Solve."""
        return matrix.solve_transpose(v) if transposed else matrix.solve(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep the matrix."""
        _, ctx.matrix, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Solve with the transpose."""
        return Solve.apply(outputs[0], ctx.matrix, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        """Solve for a tangent."""
        found: torch.Tensor = Solve.apply(tangents[0], ctx.matrix, ctx.transposed)
        return found

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], v: torch.Tensor, matrix: Any, transposed: bool
    ) -> tuple[torch.Tensor, int]:
        """Solve for all at once."""
        rows = v.movedim(in_dims[0], 0)
        found: torch.Tensor = Solve.apply(rows, matrix, transposed)
        return found, 0

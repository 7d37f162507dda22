"""Null spaces of square matrices, and whether one known by its products alone is singular.

A basis is a matrix of orthonormal columns, sparse where it would be large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # its parts, which take a quarter of a second, where they are needed
import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError
from pnode.base.vectors import REAL

__all__ = [
    "DENSE_ENTRIES",
    "Bordered",
    "SquareOperator",
    "cond",
    "null_spaces",
    "times",
    "unit_vectors",
]

#: Bases, and matrices to factor, have at most so many entries; products serve beyond.
DENSE_ENTRIES = 2048**2
# Parts of a matrix whose singular values are computed unasked.
_SMALL_PART = 256**2
# A connected part of a sparse matrix is searched for null vectors up to this many.
_MOST_VECTORS = 512
# Null spaces of matrices with up to so many rows are remembered: mostly the same in each solve.
_FEW = 32
_PROBES = 4
_MAX_ITERATIONS = 500

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Solution:
    """What LSMR came to: ``converged``, ``singular`` (a least-squares solution only) or neither."""

    x: torch.Tensor
    converged: bool
    singular: bool


class SquareOperator:
    """A square matrix known by its products: whether it is singular, and solves with it.

    Rows and columns are scaled to about the same length, from products with random signs, which
    LSMR (Fong & Saunders, SIAM J. Sci. Comput. 33, 2011) needs to converge in few iterations; it
    does so for any arrangement of rows and columns.

    Parameters
    ----------
    product, transposed : callable
        A v and A^T w, flat tensors in PETSc's precision.
    size : int
        Number of rows.
    single : bool
        Whether the products are as exact as float32 only.
    device : torch.device
        Of the tensors.

    Attributes
    ----------
    zero_rows, zero_columns : Tensor
        bool, shape ``(size,)``.
    finite : bool
        Whether the products are.
    """

    def __init__(
        self, product: Product, transposed: Product, size: int, single: bool, device: torch.device
    ) -> None:
        self._product, self._transposed = product, transposed
        self._size, self._device = size, device
        self._generator = torch.Generator(HOST.device).manual_seed(1)
        # LSMR stops at a residual of _residual, or where A^T r says that none is smaller.
        self._residual, self._stationary = (1e-4, 1e-6) if single else (1e-7, 1e-10)
        rows = sum(product(self.signs()).square() for _ in range(_PROBES))
        assert isinstance(rows, torch.Tensor)
        self.zero_rows = rows == 0.0
        self._rows = torch.where(self.zero_rows, 1.0, rows.rsqrt())
        columns = sum(transposed(self._rows * self.signs()).square() for _ in range(_PROBES))
        assert isinstance(columns, torch.Tensor)
        self.zero_columns = columns == 0.0
        self._columns = torch.where(self.zero_columns, 1.0, columns.rsqrt())
        self.finite = bool(torch.isfinite(rows).all() and torch.isfinite(columns).all())

    def signs(self) -> torch.Tensor:
        """Return random signs, the same in every solve."""
        signs = torch.randint(
            2, (self._size,), generator=self._generator, dtype=torch.int8, device=HOST.device
        )
        return (2.0 * signs.to(REAL) - 1.0).to(self._device)

    def test(self) -> Solution:
        """Solve for random signs, where rows are not zero: this fails for a singular matrix."""
        signs = torch.where(self.zero_rows, 0.0, self.signs())
        return self.solve(signs / self._rows)

    def solve(self, b: torch.Tensor) -> Solution:
        """Solve A x = b."""
        from scipy.sparse.linalg import LinearOperator, lsmr

        operator = LinearOperator(
            (self._size, self._size),
            matvec=lambda v: _numbers(self._rows * self._product(self._columns * self._tensor(v))),
            rmatvec=lambda w: _numbers(
                self._columns * self._transposed(self._rows * self._tensor(w))
            ),
            dtype=np.float64,
        )
        right = _numbers(self._rows * b)
        x, reason, _, residual, *_ = lsmr(
            operator, right, atol=self._stationary, btol=self._residual, conlim=1e12,
            maxiter=_MAX_ITERATIONS,
        )  # fmt: skip
        small = bool(residual <= 10.0 * self._residual * np.linalg.norm(right))
        return Solution(
            self._columns * self._tensor(x), small, not small and reason in (2, 3, 5, 6)
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, REAL).reshape(-1)


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.detach().to(HOST.device, torch.float64).numpy()


def cond(matrix: torch.Tensor) -> float:
    """Return the condition number with rows and columns scaled: units are not what it is about."""
    scaled = matrix / matrix.abs().amax(dim=1, keepdim=True)
    scaled = scaled / scaled.abs().amax(dim=0, keepdim=True)
    return float(torch.linalg.cond(scaled, 1)) if bool(scaled.isfinite().all()) else torch.inf


def times(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the product of a dense or sparse matrix and a vector."""
    return (matrix @ v.unsqueeze(1)).squeeze(1)


def unit_vectors(chosen: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors of the entries where ``chosen`` (bool) is true, as a basis."""
    entries = chosen.nonzero().squeeze(1)
    return _basis(
        entries, torch.arange(len(entries), device=entries.device),
        torch.ones(len(entries), dtype=REAL, device=entries.device), len(chosen), len(entries),
    )  # fmt: skip


def _basis(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, size: int, count: int
) -> torch.Tensor:
    if size * count <= DENSE_ENTRIES:
        basis = values.new_zeros(size, count)
        basis[rows, columns] = values
        return basis
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, (size, count), check_invariants=False,
        device=values.device,
    ).coalesce()  # fmt: skip


def null_spaces(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return orthonormal bases of the left and right null space of a square matrix.

    Parameters
    ----------
    matrix : Tensor
        Shape ``(n, n)``, dense or sparse, finite, PETSc's precision.

    Returns
    -------
    left, right : Tensor
        Shape ``(n, k)`` each: ``left.T @ matrix = 0`` and ``matrix @ right = 0``. Dense or sparse.

    Raises
    ------
    ConfigurationError
        If a large sparse matrix has too many null vectors that hang together.
    """
    size = matrix.shape[0]
    if matrix.layout is torch.strided and matrix.device == HOST.device and size <= _FEW:
        return _spaces_of(size, _numbers(matrix).tobytes())
    return _spaces(_scipy(matrix), matrix.device)


@lru_cache(maxsize=16)
def _spaces_of(size: int, numbers: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = np.frombuffer(numbers).reshape(size, size)
    with torch.inference_mode(False):
        return _spaces(scipy.sparse.csr_matrix(matrix), HOST.device)


def _spaces(matrix: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    size = matrix.shape[0]
    parts = _parts(matrix)
    # Singular values are measured by the largest one of all.
    largest = max(part.largest for part in parts)
    threshold = largest * size * np.finfo(np.float64).eps
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for part in parts:
        pairs = zip((part.rows, part.columns), part.null_vectors(threshold), strict=True)
        for side, pair in zip(found, pairs, strict=True):
            side.append(pair)
    left, right = (_joined(side, size, device) for side in found)
    return left, right


class Bordered:
    """The factors of ``[[M, L], [R^T, 0]]``, which is regular whether or not M is.

    Parameters
    ----------
    matrix : Tensor
        M, shape ``(n, n)``, dense or sparse, PETSc's precision.
    left, right : Tensor
        L and R: bases of its null spaces.
    """

    def __init__(self, matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        self._size, self._count = left.shape
        if matrix.layout is torch.strided and left.layout is torch.strided:
            corner = matrix.new_zeros(self._count, self._count)
            whole = torch.cat([torch.cat([matrix, left], 1), torch.cat([right.T, corner], 1)])
            self._dense: tuple[torch.Tensor, torch.Tensor] | None = torch.linalg.lu_factor(whole)
            return
        from scipy.sparse import bmat
        from scipy.sparse.linalg import splu

        self._dense = None
        blocks = [[_scipy(matrix), _scipy(left)], [_scipy(right).T, None]]
        self._sparse = splu(bmat(blocks, "csc") if self._count else blocks[0][0].tocsc())

    def solve(self, rows: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return x of ``(x, y)`` for each row v of ``(v, 0)``, shape ``(m, n)``."""
        right = torch.cat([rows, rows.new_zeros(len(rows), self._count)], 1).T
        if self._dense is not None:
            found = torch.linalg.lu_solve(*self._dense, right, adjoint=transposed)
        else:
            solved = self._sparse.solve(_numbers(right), "T" if transposed else "N")
            found = torch.from_numpy(solved).to(rows.device)
        return found[: self._size].T


def _scipy(matrix: torch.Tensor) -> Any:
    if matrix.layout is torch.strided:
        return scipy.sparse.csr_matrix(_numbers(matrix))
    coo = matrix.to_sparse_coo().coalesce()
    rows, columns = (index.numpy() for index in coo.indices().to(HOST.device))
    sparse = scipy.sparse.csr_matrix((_numbers(coo.values()), (rows, columns)), matrix.shape)
    sparse.eliminate_zeros()
    return sparse


class _Parts:
    """Blocks of one shape that share no row or column with the rest of a matrix.

    ``rows`` and ``columns`` have shape ``(blocks, r)`` and ``(blocks, c)``.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, matrix: scipy.sparse.csr_matrix):
        self.rows, self.columns = rows, columns
        self._sparse: scipy.sparse.csr_matrix | None = None
        (count, r), c = rows.shape, columns.shape[1]
        if min(r, c) == 0:
            self.largest = 0.0
        elif r * c > _SMALL_PART:  # one of them alone
            self._sparse = matrix[rows[0]][:, columns[0]]
            size = abs(self._sparse)
            self.largest = float(np.sqrt(size.sum(axis=0).max() * size.sum(axis=1).max()))
        else:
            blocks = np.zeros((count, r, c))
            places = np.full(matrix.shape[1], -1)
            places[columns.reshape(-1)] = np.tile(np.arange(c), count)
            chosen = matrix[rows.reshape(-1)].tocoo()
            blocks[chosen.row // r, chosen.row % r, places[chosen.col]] = chosen.data
            self._u, self._s, self._vh = torch.linalg.svd(torch.from_numpy(blocks))
            self.largest = float(self._s.max())

    def null_vectors(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Return orthonormal vectors, (blocks, r, k) and (blocks, c, l), zeros among them."""
        (count, r), c = self.rows.shape, self.columns.shape[1]
        if min(r, c) == 0:
            return np.ones((count, r, r)), np.ones((count, c, c))
        if self._sparse is not None:
            left, right = _sparse_null_vectors(self._sparse, threshold)
            return left[None], right[None]
        small = torch.zeros(count, max(r, c), dtype=torch.bool, device=HOST.device)
        small[:, : min(r, c)] = self._s <= threshold
        small[:, min(r, c) :] = True
        left = self._u * small[:, None, :r]
        right = self._vh.transpose(1, 2) * small[:, None, :c]
        return left.numpy(), right.numpy()


def _parts(matrix: scipy.sparse.csr_matrix) -> list[_Parts]:
    """Cut a matrix into blocks that share no rows and columns, those of one shape together."""
    from scipy.sparse import csgraph

    size = matrix.shape[0]
    graph = scipy.sparse.bmat([[None, matrix], [matrix.T, None]]) if matrix.nnz else None
    count, labels = (
        (2 * size, np.arange(2 * size))
        if graph is None
        else csgraph.connected_components(graph, directed=False)
    )
    heights = np.bincount(labels[:size], minlength=count)
    widths = np.bincount(labels[size:], minlength=count)
    by_row = np.argsort(labels[:size], kind="stable")
    by_column = np.argsort(labels[size:], kind="stable")
    row_starts, column_starts = (np.cumsum(x) - x for x in (heights, widths))
    parts = []
    for r, c in np.unique(np.stack([heights, widths]), axis=1).T:
        alike = np.flatnonzero((heights == r) & (widths == c))
        rows = by_row[row_starts[alike, None] + np.arange(r)]
        columns = by_column[column_starts[alike, None] + np.arange(c)]
        together = 1 if r * c > _SMALL_PART else len(alike)
        for first in range(0, len(alike), together):
            chosen = slice(first, first + together)
            parts.append(_Parts(rows[chosen], columns[chosen], matrix))
    return parts


def _joined(
    side: list[tuple[np.ndarray, np.ndarray]], size: int, device: torch.device
) -> torch.Tensor:
    """Return vectors of all parts as one basis, without the zeros."""
    entries, numbers, values, count = [], [], [], 0
    for places, vectors in side:
        kept = vectors.any(axis=1)  # (blocks, k)
        block, which = np.nonzero(kept)
        chosen = vectors[block, :, which]
        entries.append(places[block].reshape(-1))
        numbers.append(np.repeat(count + np.arange(len(block)), places.shape[1]))
        values.append(chosen.reshape(-1))
        count += len(block)
    rows, columns, data = (
        torch.from_numpy(np.concatenate(parts)).to(device) for parts in (entries, numbers, values)
    )
    return _basis(rows, columns, data.to(REAL), size, count)


def _sparse_null_vectors(
    matrix: scipy.sparse.csr_matrix, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the null vectors of one large connected part: none, as a rule.

    Otherwise by subspace iteration with the inverse of [[0, M], [M^T, 0]], shifted a little.
    """
    from scipy.sparse.linalg import splu

    r, c = matrix.shape
    transpose = matrix.T.tocsr()
    if r == c:
        operator = SquareOperator(
            lambda v: torch.from_numpy(matrix @ v.numpy()),
            lambda w: torch.from_numpy(transpose @ w.numpy()),
            r, False, HOST.device,
        )  # fmt: skip
        if operator.test().converged:
            return np.zeros((r, 0)), np.zeros((c, 0))
    if r * c <= 4 * _SMALL_PART or matrix.nnz > 0.1 * r * c:
        u, s, vh = torch.linalg.svd(torch.from_numpy(matrix.toarray()))
        rank = int((s > threshold).sum())
        return u[:, rank:].numpy(), vh[rank:].T.numpy()
    both = scipy.sparse.bmat([[None, matrix], [transpose, None]]).tocsc()
    scale = abs(both).sum(0).max()
    factors = splu(both - 1e-8 * scale * scipy.sparse.identity(r + c, format="csc"))
    count, generator = 16, np.random.default_rng(1)
    while count <= _MOST_VECTORS:
        x = generator.standard_normal((r + c, min(count, r + c)))
        for _ in range(4):
            x = np.linalg.qr(factors.solve(x))[0]
        values, rotation = np.linalg.eigh(x.T @ (both @ x))
        small = np.abs(values) <= threshold
        if not small.all():
            null = x @ rotation[:, small]
            left, right = (
                u[:, s > 0.5]
                for u, s, _ in (
                    np.linalg.svd(half, full_matrices=False) for half in (null[:r], null[r:])
                )
            )
            return left, right
        count *= 2
    raise ConfigurationError(
        f"mass has more than {_MOST_VECTORS // 2} null vectors in one connected part of {r} "
        "equations: combine its rows so that those of algebraic equations are zero"
    )

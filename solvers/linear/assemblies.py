"""Assembled Jacobians: dense, blocks of independent samples, sparse, or the user's own.

An :class:`Assembly` evaluates dg/du (and dF/du_dot) at a point and forms the matrix
``shift dF/du_dot - dg/du`` for a shift.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from pnode.communicators import as_communicator
from pnode.devices import HOST, Place
from pnode.errors import ConfigurationError, VectorFieldError
from pnode.linearization import Linearization
from pnode.options import PETSc, log_event
from pnode.problem import StateLayout
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.shells import shell_matrix
from pnode.solvers.petsc.library import color_columns, set_values_coo
from pnode.transfers import remote
from pnode.vectors import (
    REAL,
    copy_in,
    create_dense,
    matrix_view,
    set_dense_type,
    view,
)

__all__ = [
    "BLOCK_LU",
    "Assembly",
    "BlockAssembly",
    "BlockLU",
    "DenseAssembly",
    "GivenAssembly",
    "GivenMatrix",
    "SparseAssembly",
    "SparsityPattern",
    "as_matrix",
    "differ",
    "probe",
    "sample_count",
]

# Entries of a Jacobian looked at together when its pattern is detected.
_ENTRIES_AT_ONCE = 1 << 20
_PROBES = 3


class Assembly(ABC):
    """One kind of assembled Jacobian.

    Parameters
    ----------
    place : Place
        Where the matrix lives.
    """

    def __init__(self, place: Place = HOST) -> None:
        self._place = place

    @abstractmethod
    def create(self, size: int, comm: Any) -> Any:
        """Return a new PETSc matrix, ``size`` rows and columns on this rank. Collective."""

    @abstractmethod
    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return what :meth:`form` needs of the derivatives at ``point``.

        The graph there is made on first use: not every assembly has use for it.
        With ``check``, compare with a product of the true Jacobian where that can differ.
        """

    @abstractmethod
    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Fill ``matrix`` for a shift; with ``shift`` times the identity if ``values`` is None."""


# ----------------------------------------------------------------------------------------- checks


def probe(linearization: Linearization) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a random w and its products w^T dg/du (and w^T dF/du_dot, for a residual)."""
    like = linearization.flat_value()
    w = _noise(like.shape, torch.Generator(HOST.device).manual_seed(0)).to(like)
    return w, [product[0] for product in linearization.rows(w[None])]


def _noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return normal random numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def differ(exact: torch.Tensor, found: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two products differ by more than round-off of ``scale``, their absolute sum."""
    tolerance = math.sqrt(torch.finfo(exact.dtype).eps)
    return bool(((exact - found).abs() > tolerance * (scale + exact.abs())).any())


# ------------------------------------------------------------------------------------------ dense


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


# ------------------------------------------------------------------------------------------ block

#: Options value of the preconditioner.
BLOCK_LU = "pnode.solvers.linear.assemblies.BlockLU"


def sample_count(layout: StateLayout) -> int:
    """Return B of a state of shape (B, ...).

    Raises
    ------
    ConfigurationError
        For a tuple or a single number.
    """
    if layout.is_tuple or not layout.shapes[0]:
        shapes = [tuple(shape) for shape in layout.shapes]
        raise ConfigurationError(
            "jacobian='block' (or preconditioner='block') needs a state that is one tensor of "
            f"shape (B, ...), B independent samples, and y0 has the shape {shapes}: stack the "
            "parts along a later dimension, or use jacobian='sparse'"
        )
    return layout.shapes[0][0]


class BlockMatrix:
    """Python context of a block-diagonal matrix.

    Attributes
    ----------
    blocks : Tensor
        Shape ``(B, m, m)``, PETSc's precision.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        copy_in(y, self._product(self.blocks, x))

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        copy_in(y, self._product(self.blocks.mT, x))

    def scale(self, mat: Any, factor: float) -> None:
        """A = factor A."""
        self.blocks = self.blocks * factor

    @staticmethod
    def _product(blocks: torch.Tensor, x: Any) -> torch.Tensor:
        return torch.bmm(blocks, view(x).view(len(blocks), -1, 1)).reshape(-1)


class BlockLU:
    """Python context of a preconditioner: LU of every block of a :class:`BlockMatrix`."""

    def setUp(self, pc: Any) -> None:
        """Factor; a singular block fails the solve, as PETSc's own LU does."""
        event = log_event("pnode block LU")
        event.begin()
        blocks = pc.getOperators()[1].getPythonContext().blocks
        self._factors, self._pivots, info = torch.linalg.lu_factor_ex(blocks)
        self._singular = bool(info.ne(0).any())
        event.end()
        reasons = PETSc.PC.FailedReason
        pc.setFailedReason(reasons.FACTOR_NUMERIC_ZEROPIVOT if self._singular else reasons.NOERROR)

    def apply(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-1 x."""
        self._solve(x, y, False)

    def applyTranspose(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-T x."""
        self._solve(x, y, True)

    def _solve(self, x: Any, y: Any, transposed: bool) -> None:
        if self._singular:
            x.copy(y)
            return
        b = view(x).view(len(self._factors), -1, 1)
        solution = torch.linalg.lu_solve(self._factors, self._pivots, b, adjoint=transposed)
        copy_in(y, solution.reshape(-1))


class BlockAssembly(Assembly):
    """Samples that do not know of one another: B blocks from m products for all at once."""

    def __init__(self, samples: int, place: Place = HOST) -> None:
        super().__init__(place)
        self._samples = samples
        self._width = 0

    def create(self, size: int, comm: Any) -> Any:
        """Return a python matrix."""
        self._width = size // self._samples
        blocks = torch.zeros(
            self._samples, self._width, self._width, dtype=REAL, device=self._place.device
        )
        return shell_matrix(BlockMatrix(blocks), size, size, comm, self._place)

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the blocks of dg/du and dF/du_dot (None for the identity), (B, m, m) each."""
        linearization = linearizer.linearize(point)
        batch, width = self._samples, self._width
        # Row j of every sample's Jacobian at once: no entry of the state has two of them.
        units = torch.eye(width, dtype=point.u.dtype, device=self._place.device)
        units = units[:, None, :].expand(width, batch, width)
        found = linearization.assemble(units.reshape(width, -1))
        blocks = [rows.view(width, batch, width).transpose(0, 1).contiguous() for rows in found]
        if check:
            self._check(linearization, blocks)
        if len(blocks) == 2:
            return blocks[0].to(REAL), blocks[1].to(REAL)
        mass = point.field.mass
        return blocks[0].to(REAL), None if mass is None else mass.blocks(batch)

    def _check(self, linearization: Linearization, blocks: list[torch.Tensor]) -> None:
        w, exact = probe(linearization)
        rows = w.view(self._samples, 1, self._width)
        for block, product in zip(blocks, exact, strict=True):
            found = torch.bmm(rows, block).reshape(-1)
            if differ(product, found, torch.bmm(rows.abs(), block.abs()).reshape(-1)):
                raise ConfigurationError(
                    "jacobian='block' (or preconditioner='block') needs a vector field that acts "
                    f"on each of the {self._samples} rows of the batch by itself, and this one "
                    "couples them: use jacobian='dense', 'sparse' or 'matrix-free', or put each "
                    "system of coupled samples into one row"
                )

    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Put the blocks into the matrix's context."""
        context = matrix.getPythonContext()
        state, rate = (None, None) if values is None else values
        unit = rate
        if unit is None:
            unit = torch.eye(self._width, dtype=REAL, device=self._place.device)
        blocks = (shift * unit).expand(self._samples, -1, -1)
        context.blocks = blocks.contiguous() if state is None else blocks - state
        matrix.assemble()
        matrix.stateIncrease()


# ----------------------------------------------------------------------------------------- sparse


class Entries(NamedTuple):
    """The matrix ``fixed + shift * scaled`` in coordinates; repeated ones add up.

    Attributes
    ----------
    rows, columns : Tensor
        Shape ``(k,)``.
    fixed, scaled : Tensor
        Shape ``(k,)``, PETSc's precision.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    fixed: torch.Tensor
    scaled: torch.Tensor


class SparsityPattern:
    """Where the Jacobian of a state of ``size`` entries may be non-zero.

    Parameters
    ----------
    rows, columns : Tensor, optional
        Coordinates; detected on first use if not given.
    size : int, optional
        Rows and columns of a given pattern.
    columns_to : Tensor, optional
        For columns that are ghosted entries: the global index of each, -1 for none.

    Attributes
    ----------
    colors : Tensor
        A color per row: rows of one color have no column in common, so that one product with
        their sum tells all their entries (Curtis, Powell & Reid, J. Inst. Maths Applics 13, 1974).
    """

    def __init__(
        self,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        size: int = 0,
        columns_to: torch.Tensor | None = None,
    ) -> None:
        self.detected = rows is None
        self.size = size
        self.columns_to = columns_to
        empty = torch.empty(0, dtype=torch.int64, device=HOST.device)
        self.rows = self.columns = self.colors = empty
        if rows is not None and columns is not None:
            self._add(rows, columns)

    @property
    def known(self) -> bool:
        """Whether there is a pattern yet."""
        return len(self.colors) > 0

    @property
    def color_count(self) -> int:
        """Products that an assembly costs."""
        return int(self.colors.max()) + 1 if self.known else 0

    def _add(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Join entries and color the rows anew."""
        width = self.width
        flat = torch.cat([self.rows * width + self.columns, rows * width + columns])
        flat = flat.to(HOST.device).unique()
        self.rows, self.columns = flat // width, flat % width
        self.colors = _color_rows(self.rows, self.columns, self.size, width)

    def bring_to(self, device: torch.device) -> None:
        """Keep the entries on a device from now on."""
        if self.colors.device != device:
            self.rows, self.columns = self.rows.to(device), self.columns.to(device)
            self.colors = self.colors.to(device)
            if self.columns_to is not None:
                self.columns_to = self.columns_to.to(device)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.size if self.columns_to is None else len(self.columns_to)

    def detect(self, point: Point, linearization: Linearization) -> None:
        """Add what is not zero in dense Jacobians at ``point`` and at random states near it.

        Rows are looked at a block at a time. NaN counts as an entry.
        """
        self.size = size = len(point.u)
        generator = torch.Generator(HOST.device).manual_seed(1)

        def near(values: torch.Tensor) -> torch.Tensor:
            scale = torch.maximum(values.abs(), values.abs().mean())
            scale = 0.01 * torch.where(scale > 0, scale, torch.ones_like(scale))
            return values + scale * _noise(values.shape, generator).to(values)

        rows, columns = [], []
        together = max(1, _ENTRIES_AT_ONCE // size)
        for probe in range(_PROBES):
            if probe > 0:
                rate = None if point.u_dot is None else near(point.u_dot.detach())
                linearization = point.field.linearize(point.s, near(point.u.detach()), rate)
            for start in range(0, size, together):
                stop = min(start + together, size)
                units = torch.zeros(stop - start, size, dtype=point.u.dtype, device=point.u.device)
                units.diagonal(start).fill_(1.0)
                for part in linearization.rows(units):
                    found = part.ne(0).nonzero().to(self.rows)
                    rows.append(found[:, 0] + start)
                    columns.append(found[:, 1])
        self._add(torch.cat(rows), torch.cat(columns))


def _color_rows(rows: torch.Tensor, columns: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """Color the rows of a pattern: the columns of its transpose, for PETSc."""
    order = torch.argsort(columns * size + rows)
    pointers = torch.zeros(width + 1, dtype=torch.int64, device=HOST.device)
    pointers[1:] = torch.bincount(columns, minlength=width).cumsum(0)
    csr = (
        pointers.numpy().astype(PETSc.IntType), rows[order].numpy().astype(PETSc.IntType)
    )  # fmt: skip
    values = np.ones(len(rows), dtype=PETSc.RealType)
    transpose = PETSc.Mat().createAIJ((width, size), csr=(*csr, values), comm=PETSc.COMM_SELF)
    transpose.assemble()
    colors = torch.from_numpy(color_columns(transpose)).to(torch.int64)
    transpose.destroy()
    return colors


class EntryAssembly(Assembly):
    """Fills a sparse matrix from coordinates, its structure once.

    Setting the structure is collective: among several ranks it stays what it was at first.
    """

    def __init__(self, place: Place = HOST) -> None:
        super().__init__(place)
        self._structure: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parallel = False
        self._first_row = 0

    def create(self, size: int, comm: Any) -> Any:
        """Return a sparse matrix without structure."""
        self._parallel = comm.size > 1
        if self._parallel:
            self._first_row = as_communicator(comm).exscan(size) or 0
        matrix = PETSc.Mat().create(comm=comm)
        matrix.setSizes(((size, PETSc.DETERMINE),) * 2)
        matrix.setType(self._place.sparse_type)
        return matrix

    def form(self, matrix: Any, values: Entries | None, shift: float) -> None:
        """Fill the matrix."""
        if values is None:
            if self._parallel and self._structure is not None:
                rows, columns = self._structure
            else:
                rows = columns = torch.arange(
                    *matrix.getOwnershipRange(), device=self._place.device
                )
            ones = (rows == columns).to(REAL)
            values = Entries(rows, columns, 0 * ones, ones)
        structure = (values.rows, values.columns)
        if self._structure is None or not (
            self._parallel or all(map(torch.equal, structure, self._structure))
        ):
            indices = [index.cpu().numpy().astype(PETSc.IntType) for index in structure]
            matrix.setPreallocationCOO(*indices)
            self._structure = structure
        set_values_coo(matrix, values.fixed + shift * values.scaled)
        matrix.assemble()


def _identity(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    diagonal = torch.arange(size, device=device)
    return diagonal, diagonal, torch.ones(size, dtype=REAL, device=device)


class SparseAssembly(EntryAssembly):
    """A sparse matrix from one product per color of its pattern."""

    def __init__(self, pattern: SparsityPattern, place: Place = HOST) -> None:
        super().__init__(place)
        self._pattern = pattern

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the entries of dg/du and of dF/du_dot."""
        pattern, linearization = self._pattern, linearizer.linearize(point)
        if not pattern.known:
            pattern.detect(point, linearization)
        pattern.bring_to(self._place.device)
        parts = self._parts(linearization)
        if check and self._wrong(linearization, parts):
            # Entries may have vanished when it was detected. Among several ranks the structure
            # stays.
            if pattern.detected and not self._parallel:
                pattern.detect(point, linearization)
                pattern.bring_to(self._place.device)
                parts = self._parts(linearization)
            if self._wrong(linearization, parts):
                raise ConfigurationError(
                    "the sparsity pattern of jacobian='sparse' (or preconditioner='sparse') misses "
                    "entries: a product with the Jacobian differs from one with the assembled "
                    "matrix; give every entry that can be non-zero in jacobian_pattern="
                )
        fixed = -parts[0].to(REAL)
        if len(parts) == 2:
            # The diagonal belongs to the structure: factorizations want it.
            rows, columns, scaled = _identity(pattern.size, self._place.device)
            scaled, own = 0 * scaled, parts[1].to(REAL)
        else:
            mass = point.field.mass
            if mass is None:
                rows, columns, scaled = _identity(pattern.size, self._place.device)
            else:
                rows, columns, scaled = mass.entries()
            own = torch.zeros_like(fixed)
        first = self._first_row
        inner = pattern.columns + first
        if pattern.columns_to is not None:
            inner = pattern.columns_to[pattern.columns]
        kept = inner >= 0
        return Entries(
            torch.cat([pattern.rows[kept] + first, rows + first]),
            torch.cat([inner[kept], columns + first]),
            torch.cat([fixed[kept], torch.zeros_like(scaled)]),
            torch.cat([own[kept], scaled]),
        )

    def _parts(self, linearization: Linearization) -> list[torch.Tensor]:
        """Return the values of the entries of dg/du (and dF/du_dot), from compressed products."""
        pattern = self._pattern
        dtype, device = linearization.flat_value().dtype, self._place.device
        seeds = torch.zeros(pattern.color_count, pattern.size, dtype=dtype, device=device)
        seeds[pattern.colors, torch.arange(pattern.size, device=device)] = 1.0
        chosen = (pattern.colors[pattern.rows], pattern.columns)
        return [part[chosen] for part in linearization.assemble(seeds)]

    def _wrong(self, linearization: Linearization, parts: list[torch.Tensor]) -> bool:
        pattern = self._pattern
        w, exact = probe(linearization)
        for part, product in zip(parts, exact, strict=True):
            terms = part * w[pattern.rows]
            found, scale = (
                torch.zeros_like(product).index_add_(0, pattern.columns, addends)
                for addends in (terms, terms.abs())
            )
            if differ(product, found, scale):
                return True
        return False


# -------------------------------------------------------------------------- the user's own matrix


class GivenMatrix:
    """The user's approximation of df/dy.

    Parameters
    ----------
    matrix : Tensor, sparse matrix of SciPy, or callable
        Shape ``(size, size)`` for the flattened state; or ``matrix(t, y)`` that returns one.
    """

    def __init__(self, matrix: Any) -> None:
        self._function: Callable[..., Any] | None = matrix if callable(matrix) else None
        self._constant = None if callable(matrix) else as_matrix(matrix, "preconditioner")

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
        For anything but a real 2-D tensor, array or sparse matrix.
    """
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
            "or sparse) or a sparse matrix of SciPy"
        )
    matrix = matrix.detach().to(HOST.device, REAL)
    return matrix if matrix.layout is torch.strided else matrix.to_sparse_coo().coalesce()


class GivenAssembly(EntryAssembly):
    """The user's approximation of df/dy, with the mass matrix; dense or sparse as it comes."""

    def __init__(self, given: GivenMatrix, place: Place = HOST) -> None:
        super().__init__(place)
        self._given = given
        self._dense = DenseAssembly(place)
        self._is_dense: bool | None = None

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the approximation and the mass matrix."""
        matrix, mass = self._given.at(point), point.field.mass
        if self._is_dense is None:
            self._is_dense = matrix.layout is torch.strided and not self._parallel
        if self._is_dense:
            matrix = matrix.to_dense()
            return matrix, None if mass is None else mass.dense()
        if matrix.layout is torch.strided:
            rows, columns = torch.ones_like(matrix).nonzero().T
            values = matrix.reshape(-1)
        else:
            matrix = matrix.to_sparse_coo().coalesce()
            (rows, columns), values = matrix.indices(), matrix.values()
        others = _identity(len(matrix), matrix.device) if mass is None else mass.entries()
        first = self._first_row
        entries = Entries(
            torch.cat([rows, others[0]]) + first,
            torch.cat([columns, others[1]]) + first,
            torch.cat([-values, torch.zeros_like(others[2])]),
            torch.cat([torch.zeros_like(values), others[2]]),
        )
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

"""Sparse Jacobians: patterns, their coloring, and matrices filled from coordinates."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import numpy as np
import torch

from pnode.base.communicators import as_communicator
from pnode.base.devices import HOST, Place
from pnode.base.errors import ConfigurationError
from pnode.base.evidence import projection_weights
from pnode.base.noise import noise
from pnode.base.options import PETSc
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.solvers.linear.assembly import Assembly, differ
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.petsc.library import color_columns, set_values_coo

__all__ = ["Entries", "EntryAssembly", "SparseAssembly", "SparsityPattern", "color_rows"]

# Entries of a Jacobian looked at together when its pattern is detected.
_ENTRIES_AT_ONCE = 1 << 20
_PROBES = 3

#: Rows, columns and values of the entries of this rank's part of a matrix.
Coordinates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        self.colors = color_rows(self.rows, self.columns, self.size, width)

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
            return values + scale * noise(values.shape, generator).to(values)

        # In one array: what is kept of each block alone lies in room that the next one wants.
        places = array("q")
        together = max(1, _ENTRIES_AT_ONCE // size)
        for index in range(_PROBES):
            if index > 0:
                rate = None if point.u_dot is None else near(point.u_dot.detach())
                linearization = point.field.linearize(point.s, near(point.u.detach()), rate)
            for start in range(0, size, together):
                stop = min(start + together, size)
                units = torch.zeros(stop - start, size, dtype=point.u.dtype, device=point.u.device)
                units.diagonal(start).fill_(1.0)
                for part in linearization.rows(units):
                    found = part.ne(0).nonzero().to(self.rows)
                    found[:, 0] += start
                    places.frombytes(found.numpy().tobytes())
        entries = torch.tensor(places, dtype=torch.int64, device=HOST.device).view(-1, 2)
        self._add(entries[:, 0], entries[:, 1])


def color_rows(rows: torch.Tensor, columns: torch.Tensor, size: int, width: int) -> torch.Tensor:
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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


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

    def _mass_entries(self, point: Point) -> Coordinates:
        """Return rows, columns and values of the mass matrix, of the identity without one."""
        mass, size = point.field.mass, len(point.u)
        if mass is not None:
            return mass.entries()
        diagonal = torch.arange(size, device=self._place.device)
        return diagonal, diagonal, torch.ones(size, dtype=REAL, device=self._place.device)

    def _entries(
        self, rows: torch.Tensor, columns: torch.Tensor, fixed: torch.Tensor, scaled: torch.Tensor,
        mass: Coordinates,
    ) -> Entries:  # fmt: skip
        """Return entries, numbered over all ranks, with those of the mass matrix beside them."""
        return Entries(
            torch.cat([rows, mass[0] + self._first_row]),
            torch.cat([columns, mass[1] + self._first_row]),
            torch.cat([fixed, torch.zeros_like(mass[2])]),
            torch.cat([scaled, mass[2]]),
        )

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
            self._parallel or all(map(_same, structure, self._structure))
        ):
            indices = [index.cpu().numpy().astype(PETSc.IntType) for index in structure]
            matrix.setPreallocationCOO(*indices)
            self._structure = structure
        set_values_coo(matrix, values.fixed + shift * values.scaled)
        matrix.assemble()


class _Places(NamedTuple):
    """Where the entries of a pattern are.

    Attributes
    ----------
    pattern : Tensor
        Its colors, which are others with other entries.
    flat : Tensor
        In compressed products, flat.
    kept : Tensor or None
        Which of them belong to the matrix; None: all.
    rows, columns : Tensor
        Of these, numbered over all ranks.
    like : Entries or None
        Of a Jacobian beside the identity, as far as it is always the same.
    """

    pattern: torch.Tensor
    flat: torch.Tensor
    kept: torch.Tensor | None
    rows: torch.Tensor
    columns: torch.Tensor
    like: Entries | None = None


class SparseAssembly(EntryAssembly):
    """A sparse matrix from one product per color of its pattern.

    Parameters
    ----------
    pattern : SparsityPattern
        Where entries may be.
    place : Place
        Where the matrix lives.
    exact : bool
        Whether what is solved with it is not corrected later: then every evaluation is compared
        with a product, not only those that ask for it.
    """

    def __init__(self, pattern: SparsityPattern, place: Place = HOST, exact: bool = False) -> None:
        super().__init__(place)
        self._pattern = pattern
        self._exact = exact
        self._places: _Places | None = None

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the entries of dg/du and of dF/du_dot."""
        pattern, linearization = self._pattern, linearizer.linearize(point)
        check = check or self._exact
        if not pattern.known:
            pattern.detect(point, linearization)
        pattern.bring_to(self._place.device)
        parts, complete = self._parts(linearization, check)
        if not complete:
            # Entries may have vanished where it was detected. Among several ranks the structure
            # stays.
            if pattern.detected and not self._parallel:
                pattern.detect(point, linearization)
                pattern.bring_to(self._place.device)
                parts, complete = self._parts(linearization, check)
            if not complete:
                raise ConfigurationError(
                    "the sparsity pattern of jacobian='sparse' (or preconditioner='sparse') misses "
                    "entries: a product with the Jacobian differs from one with the assembled "
                    "matrix; give every entry that can be non-zero in jacobian_pattern="
                )
        places, fixed = self._places, -parts[0].to(REAL)
        assert places is not None
        if places.kept is not None:
            fixed = fixed[places.kept]
        if len(parts) == 1 and point.field.mass is None:
            beside = places.like
            if beside is None or len(beside.fixed) != len(fixed) + len(point.u):
                own = torch.zeros_like(fixed)
                mass = self._mass_entries(point)
                beside = self._entries(places.rows, places.columns, fixed, own, mass)
                self._places = places._replace(like=beside)
            own = fixed.new_zeros(len(beside.fixed))
            own[: len(fixed)] = fixed
            return beside._replace(fixed=own)
        mass = self._mass_entries(point)
        if len(parts) == 2:  # the diagonal belongs to the structure: factorizations want it
            mass, own = (*mass[:2], 0 * mass[2]), parts[1].to(REAL)
            own = own if places.kept is None else own[places.kept]
        else:
            own = torch.zeros_like(fixed)
        return self._entries(places.rows, places.columns, fixed, own, mass)

    def _placed(self, width: int) -> _Places:
        """Return where the entries of the pattern are, found once; products have a width."""
        pattern, known = self._pattern, self._places
        if known is None or known.pattern is not pattern.colors:
            first = self._first_row
            inner = pattern.columns + first
            if pattern.columns_to is not None:
                inner = pattern.columns_to[pattern.columns]
            kept = inner >= 0
            rows, columns = pattern.rows[kept] + first, inner[kept]
            flat = pattern.colors[pattern.rows] * width + pattern.columns
            known = _Places(pattern.colors, flat, None if kept.all() else kept, rows, columns)
            self._places = known
        return known

    def _parts(self, linearization: Linearization, check: bool) -> tuple[list[torch.Tensor], bool]:
        """Return the values of the entries of dg/du (and dF/du_dot), from compressed products.

        With ``check`` also whether there are no others, by one product more among them.
        """
        pattern = self._pattern
        like = linearization.flat_value()
        units = torch.arange(pattern.size, device=self._place.device)
        seeds = like.new_zeros(pattern.color_count + check, pattern.size)
        seeds[pattern.colors, units] = 1.0
        if check:
            seeds[-1] = w = projection_weights(like)
        products = linearization.assemble(seeds)
        flat = self._placed(products[0].shape[1]).flat
        parts = [part.reshape(-1).index_select(0, flat) for part in products]
        if not check:
            return parts, True
        for part, product in zip(parts, products, strict=True):
            terms = part * w[pattern.rows]
            found, scale = (
                torch.zeros_like(product[-1]).index_add_(0, pattern.columns, addends)
                for addends in (terms, terms.abs())
            )
            if differ(product[-1], found, scale):
                return parts, False
        return parts, True

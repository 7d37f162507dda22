"""States distributed over ranks: who owns what, and the exchange of ghost cells.

A layout turns the rank's own (owned) part of a state into the ghosted part, which its neighbours'
cells belong to, and has the exact adjoint of that map. Everything else of pnode sees owned parts.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pnode import ranks, vectors
from pnode.devices import HOST, place_of
from pnode.errors import ConfigurationError
from pnode.options import PETSc, log_event
from pnode.vectors import REAL

__all__ = ["GhostLayout", "Grid", "Layout"]

_BOUNDARIES = ("periodic", "zero", "mirror", "replicate")


class Layout(ABC):
    """A distributed state.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        Its communicator.
    shape : tuple of int
        Shape of the owned part on this rank, which y0 has.
    ghosted_shape : tuple of int
        Shape that the vector field gets.
    """

    comm: Any
    shape: tuple[int, ...]
    ghosted_shape: tuple[int, ...]

    def gather(self, owned: torch.Tensor) -> torch.Tensor:
        """Return the ghosted part. Collective.

        Parameters
        ----------
        owned : Tensor
            Owned part, any shape with its number of entries; not differentiated.

        Returns
        -------
        Tensor
            Shape ``ghosted_shape``, dtype of ``owned``, new.
        """
        with log_event("pnode ghosts"):
            return self._gather(owned.detach())

    def scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        """Return the transpose of :meth:`gather` applied to ``ghosted``, flat. Collective."""
        with log_event("pnode ghosts"):
            return self._scatter(ghosted.detach().reshape(self.ghosted_shape))

    @abstractmethod
    def _gather(self, owned: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def pattern(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return where the derivative of owned values by ghosted ones may be non-zero.

        Returns
        -------
        rows, columns : Tensor
            Indices into the flattened owned and ghosted parts. None if it is not known.
        """

    @property
    def size(self) -> int:
        """Number of owned entries."""
        return math.prod(self.shape)

    def columns(self) -> torch.Tensor:
        """Return the global index of each ghosted entry, flat; -1 for zero. Collective.

        Entries are numbered rank by rank, in the order of the flattened owned parts.
        """
        start = self.comm.exscan(self.size) or 0
        numbers = torch.arange(start + 1, start + 1 + self.size, dtype=REAL, device=HOST.device)
        return self.gather(numbers).reshape(-1).round().to(torch.int64) - 1


class Grid(Layout):
    """A regular grid over the ranks, with ghost cells around each part (PETSc's DMDA).

    Parameters
    ----------
    shape : sequence of int
        Number of cells in each of one to three dimensions, the last of which is contiguous in
        memory, as in a torch tensor.
    fields : int, optional
        Number of fields. The owned part has shape ``(fields, *cells)``, ready for a convolution;
        without ``fields`` it has the shape of the cells alone.
    width : int
        Ghost cells on each side: how far the vector field looks.
    boundary : str or sequence of str
        What lies beyond the ends of each dimension: "periodic"; "zero"; "mirror" (ghost cell k is
        cell k from that end, no flux through the boundary); "replicate" (the last cell). A
        vector field may overwrite ghost cells (``torch.where``, ``torch.cat``), for other values:
        see :attr:`at_ends`.
    stencil : {"box", "star"}
        Whether ghost cells at corners are wanted ("star" leaves them zero and sends less).
    coupled : bool
        Whether the derivative of a field depends on other fields. With False (states of a batch on
        one grid) ``jacobian="sparse"`` has that many fewer entries and colors.
    comm : mpi4py.MPI.Intracomm, optional
        Ranks that share the grid; this process alone by default.

    Attributes
    ----------
    starts, cells : tuple of int
        First owned cell and number of owned cells in each dimension.
    at_ends : tuple of (bool, bool)
        For each dimension, whether the owned cells reach its lower and its upper end; False for
        periodic ones.

    Raises
    ------
    ConfigurationError
        For unusable arguments, and for a grid with too few cells for its ranks.

    Notes
    -----
    Collective on ``comm``.

    Examples
    --------
    >>> grid = Grid((8,), width=1, boundary="periodic")
    >>> grid.gather(torch.arange(8.0))
    tensor([7., 0., 1., 2., 3., 4., 5., 6., 7., 0.])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        fields: int | None = None,
        width: int = 1,
        boundary: str | Sequence[str] = "periodic",
        stencil: str = "box",
        coupled: bool = True,
        comm: Any = None,
    ) -> None:
        self.comm = ranks.as_communicator(comm)
        group = ranks.Ranks(self.comm)
        ranks.clean_up(self.comm)
        checked = group.attempt(_check_grid, shape, fields, width, boundary, stencil)
        names = ("shape", "fields", "width", "boundary", "stencil")
        facts = None if checked is None else dict(zip(names, checked, strict=True))
        group.compare(names, facts, 0)
        self.global_shape, self.fields, self.width, self.boundary, self.stencil = checked
        # PETSc looks at the cells of each rank by itself: those with too few would raise, and leave
        # the others waiting. Its partition, which all know, is looked at first.
        try:
            partition = self._create(0).getOwnershipRanges()
            fits = all(min(cells) >= max(self.width, 1) for cells in partition)
        except PETSc.Error:  # fewer cells than ranks, in one of the dimensions: on all of them
            fits = False
        if not fits:
            raise ConfigurationError(
                f"shape={self.global_shape} with width={self.width} does not split over "
                f"{self.comm.size} ranks, each of which needs {max(self.width, 1)} or more cells "
                "in every dimension: take fewer ranks or a larger grid"
            )
        self._dm = self._create(self.width)
        corners, ghost_corners = self._dm.getCorners(), self._dm.getGhostCorners()
        self.starts, self.cells = (tuple(part[::-1]) for part in corners)
        ghost_starts, ghosted = (tuple(part[::-1]) for part in ghost_corners)
        lead = () if self.fields is None else (self.fields,)
        self.shape, self.ghosted_shape = (*lead, *self.cells), (*lead, *ghosted)
        self.at_ends = tuple(
            (kind != "periodic" and first == 0, kind != "periodic" and first + number == total)
            for kind, first, number, total in zip(
                self.boundary, self.starts, self.cells, self.global_shape, strict=True
            )
        )
        self.coupled = bool(coupled)
        self._vectors: dict[torch.device, tuple[Any, Any]] = {}
        self._vectors_on(HOST.device)
        self._offsets = tuple(a - b for a, b in zip(self.starts, ghost_starts, strict=True))
        self._ghosted_cells = ghosted

    def _vectors_on(self, device: torch.device) -> tuple[Any, Any]:
        """Return the global and the local vector on a device. Collective the first time."""
        if device not in self._vectors:
            place = place_of(device)
            self._dm.setVecType(place.vec_type)
            made = self._dm.createGlobalVec(), self._dm.createLocalVec()
            vectors.adopt(made[0], place)
            vectors.adopt(made[1], place)
            made[1].set(0.0)
            self._vectors[device] = made
        return self._vectors[device]

    def _create(self, width: int) -> Any:
        periodic, other = PETSc.DM.BoundaryType.PERIODIC, PETSc.DM.BoundaryType.GHOSTED
        kinds = PETSc.DMDA.StencilType
        return PETSc.DMDA().create(
            dim=len(self.global_shape),
            dof=self.fields or 1,
            sizes=self.global_shape[::-1],  # PETSc's first dimension is contiguous
            boundary_type=[
                periodic if kind == "periodic" else other for kind in self.boundary[::-1]
            ],
            stencil_type=kinds.BOX if self.stencil == "box" else kinds.STAR,
            stencil_width=width,
            comm=self.comm,
        )

    def __repr__(self) -> str:
        """Show the arguments."""
        return (
            f"Grid({self.global_shape}, fields={self.fields}, width={self.width}, "
            f"boundary={self.boundary}, stencil={self.stencil!r})"
        )

    @property
    def owned(self) -> tuple[Any, ...]:
        """The owned part of a tensor over the whole grid, as indices of its last dimensions."""
        pairs = zip(self.starts, self.cells, strict=True)
        return tuple(slice(first, first + number) for first, number in pairs)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor over the whole grid. Not collective."""
        if tuple(whole.shape[-len(self.cells) :]) != self.global_shape:
            raise ConfigurationError(
                f"the tensor has shape {tuple(whole.shape)}: its last dimensions must be the "
                f"grid's, {self.global_shape}"
            )
        return whole[(..., *self.owned)].clone()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """Return the tensor over the whole grid, on every rank. Collective, not differentiable."""
        dimensions = len(self.cells)
        if tuple(part.shape[-dimensions:]) != self.cells:
            raise ConfigurationError(
                f"the tensor has shape {tuple(part.shape)}: its last dimensions must be this "
                f"rank's cells, {self.cells}"
            )
        result = part.new_empty((*part.shape[:-dimensions], *self.global_shape)).detach()
        for owned, values in self.comm.allgather((self.owned, part.detach().cpu().numpy())):
            result[(..., *owned)] = torch.from_numpy(values).to(result)
        return result

    def coordinates(self, dimension: int = 0, ghosted: bool = False) -> torch.Tensor:
        """Return the indices of the cells along a dimension. Not collective.

        Parameters
        ----------
        dimension : int
            Which.
        ghosted : bool
            Whether to include ghost cells; those beyond a periodic end go on counting.
        """
        first, number = self.starts[dimension], self.cells[dimension]
        if ghosted:
            first -= self._offsets[dimension]
            number = self._ghosted_cells[dimension]
        return torch.arange(first, first + number, device=HOST.device)

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        number = self.fields or 1
        whole, local = self._vectors_on(owned.device)
        inside = vectors.overwrite(whole).view(*self.cells, number)
        inside.movedim(-1, 0).copy_(owned.reshape(number, *self.cells))
        del inside
        self._dm.globalToLocal(whole, local)
        values = vectors.view(local).view(*self._ghosted_cells, number)
        result = values.movedim(-1, 0).to(
            owned.dtype, copy=True, memory_format=torch.contiguous_format
        )
        del values
        for cells, ghosts in self._fills():
            result[(slice(None), *ghosts)] = result[(slice(None), *cells)]
        return result.view(self.ghosted_shape)

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        number = self.fields or 1
        values = ghosted.reshape(number, *self._ghosted_cells).clone()
        for cells, ghosts in reversed(self._fills()):
            values[(slice(None), *cells)] += values[(slice(None), *ghosts)]
            values[(slice(None), *ghosts)] = 0.0
        whole, local = self._vectors_on(ghosted.device)
        cells = vectors.overwrite(local).view(*self._ghosted_cells, number)
        cells.movedim(-1, 0).copy_(values)
        del cells
        whole.set(0.0)
        self._dm.localToGlobal(local, whole, addv=PETSc.InsertMode.ADD_VALUES)
        inside = vectors.view(whole).view(*self.cells, number)
        result = inside.movedim(-1, 0).to(
            ghosted.dtype, copy=True, memory_format=torch.contiguous_format
        )
        del inside
        vectors.fill(local, 0.0)  # what lies beyond the ends stays zero
        return result.reshape(-1)

    def _fills(self) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Return single layers of cells and the ghost layers beyond the ends that repeat them."""
        found = []
        everything = tuple(
            slice(None) if self.stencil == "box" else slice(first, first + number)
            for first, number in zip(self._offsets, self.cells, strict=True)
        )
        for dimension, (kind, ends) in enumerate(zip(self.boundary, self.at_ends, strict=True)):
            if kind not in ("mirror", "replicate"):
                continue
            low = self._offsets[dimension]
            high = low + self.cells[dimension] - 1
            for reached, edge, outwards in ((ends[0], low, -1), (ends[1], high, 1)):
                for k in range(self.width if reached else 0):
                    cell = edge - outwards * (k if kind == "mirror" else 0)
                    pair = []
                    for index in (cell, edge + outwards * (k + 1)):
                        layer = list(everything)
                        layer[dimension] = slice(index, index + 1)
                        pair.append(tuple(layer))
                    found.append((pair[0], pair[1]))
        return found

    def pattern(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stencil: every field, or the same one, at every cell within ``width``."""
        reach = range(-self.width, self.width + 1)
        offsets = [
            offset
            for offset in itertools.product(reach, repeat=len(self.cells))
            if self.stencil == "box" or sum(step != 0 for step in offset) <= 1
        ]
        number = self.fields or 1
        local, ghosted = (
            torch.arange(number * math.prod(cells), device=HOST.device)
            for cells in (self.cells, self._ghosted_cells)
        )
        local = local.view(number, *self.cells)
        ghosted = ghosted.view(number, *self._ghosted_cells)
        rows, columns = [], []
        for offset in offsets:
            window = tuple(
                slice(start + step, start + step + cells)
                for start, step, cells in zip(self._offsets, offset, self.cells, strict=True)
            )
            seen = ghosted[(slice(None), *window)]
            if not self.coupled:
                rows.append(local.reshape(-1))
                columns.append(seen.reshape(-1))
                continue
            for field in range(number):
                rows.append(local.reshape(-1))
                columns.append(seen[field : field + 1].expand(local.shape).reshape(-1))
        return torch.cat(rows), torch.cat(columns)


def _check_grid(
    shape: Any, fields: Any, width: Any, boundary: Any, stencil: Any
) -> tuple[Any, ...]:
    """Return the arguments of a grid in their final form."""

    def whole(name: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least {least}")
        return int(value)

    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    if not isinstance(shape, (tuple, list, torch.Size)) or not 1 <= len(shape) <= 3:
        raise ConfigurationError(f"shape={shape!r}: give the numbers of cells of 1 to 3 dimensions")
    shape = tuple(whole("shape", cells, 1) for cells in shape)
    fields = None if fields is None else whole("fields", fields, 1)
    width = whole("width", width, 0)
    boundaries = (boundary,) * len(shape) if isinstance(boundary, str) else tuple(boundary)
    if len(boundaries) != len(shape) or not set(boundaries) <= set(_BOUNDARIES):
        choices = ", ".join(map(repr, _BOUNDARIES))
        raise ConfigurationError(
            f"boundary={boundary!r} for {len(shape)} dimensions: give one of {choices}, or one per "
            "dimension"
        )
    if stencil not in ("box", "star"):
        raise ConfigurationError(f"stencil={stencil!r} is unknown: choose 'box' or 'star'")
    if min(shape) < width:
        raise ConfigurationError(
            f"shape={shape} has fewer cells than width={width} in a dimension: take a larger grid"
        )
    return shape, fields, width, boundaries, stencil


class GhostLayout(Layout):
    """A distribution of the user's own: each rank owns entries and names those it looks at.

    Parameters
    ----------
    owned : int
        Number of items (cells, nodes) that this rank owns. Items are numbered rank by rank.
    ghosts : Tensor or sequence of int
        Numbers of other ranks' items that the vector field needs, shape ``(G,)``.
    fields : int, optional
        Values per item. The owned part has shape ``(owned, fields)``, or ``(owned,)`` without.
    pattern : tuple of Tensor, optional
        ``(rows, columns)``: where the derivative of the owned items may be non-zero, as indices
        into the owned items and into the ghosted ones (own items first, then ``ghosts``). For
        ``jacobian="sparse"``; detected if None.
    comm : mpi4py.MPI.Intracomm, optional
        Ranks that share the state; this process alone by default.

    Raises
    ------
    ConfigurationError
        For unusable arguments.

    Notes
    -----
    Collective on ``comm``. The vector field gets ``(owned + G, ...)``: first the rank's own items,
    then the ghosts in their order.
    """

    def __init__(
        self,
        owned: int,
        ghosts: Any = (),
        *,
        fields: int | None = None,
        pattern: tuple[torch.Tensor, torch.Tensor] | None = None,
        comm: Any = None,
    ) -> None:
        self.comm = ranks.as_communicator(comm)
        group = ranks.Ranks(self.comm)
        ranks.clean_up(self.comm)
        checked = group.attempt(_check_layout, owned, ghosts, fields, pattern)
        facts = None if checked is None else {"fields": checked[2], "pattern": checked[3] is None}
        group.compare(("fields", "pattern"), facts, 0)
        number, indices, self.fields, self._pattern = checked
        width = self.fields or 1
        self.owned, self.ghosts = number, indices
        total = self.comm.allreduce(number)
        group.attempt(_check_indices, indices, total)
        group.compare((), {}, 0)
        tail = () if self.fields is None else (self.fields,)
        self.shape, self.ghosted_shape = (number, *tail), (number + len(indices), *tail)
        blocks = indices.numpy().astype(PETSc.IntType)
        self._source = PETSc.IS().createBlock(width, blocks, comm=self.comm)
        self._vectors: dict[torch.device, tuple[Any, Any, Any]] = {}
        self._vectors_on(HOST.device)

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"GhostLayout({self.owned}, ghosts={len(self.ghosts)}, fields={self.fields})"

    def _vectors_on(self, device: torch.device) -> tuple[Any, Any, Any]:
        """Return the vectors of own and ghost entries on a device, and what sends one to the other.

        Collective the first time.
        """
        if device not in self._vectors:
            place, width = place_of(device), self.fields or 1
            own = vectors.create(self.comm, self.owned * width, place)
            ghosts = vectors.create(PETSc.COMM_SELF, len(self.ghosts) * width, place)
            exchange = PETSc.Scatter().create(own, self._source, ghosts, None)
            self._vectors[device] = own, ghosts, exchange
        return self._vectors[device]

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        own, beyond, exchange = self._vectors_on(owned.device)
        vectors.copy_in(own, owned.reshape(-1))
        exchange.scatter(own, beyond, addv=False, mode="forward")
        ghosts = vectors.copy_out(beyond, owned.dtype)
        return torch.cat([owned.reshape(-1), ghosts]).view(self.ghosted_shape)

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        flat = ghosted.reshape(-1)
        own, beyond, exchange = self._vectors_on(flat.device)
        vectors.copy_in(own, flat[: self.size])
        vectors.copy_in(beyond, flat[self.size :])
        exchange.scatter(beyond, own, addv=True, mode="reverse")
        return vectors.copy_out(own, ghosted.dtype)

    def pattern(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the user's pattern, for all fields of the items."""
        if self._pattern is None:
            return None
        rows, columns = self._pattern
        width = self.fields or 1
        inner = torch.arange(width, device=HOST.device)
        return (
            (rows[:, None, None] * width + inner[None, :, None]).expand(-1, -1, width).reshape(-1),
            (columns[:, None, None] * width + inner[None, None, :])
            .expand(-1, width, -1)
            .reshape(-1),
        )


def _check_layout(owned: Any, ghosts: Any, fields: Any, pattern: Any) -> tuple[Any, ...]:
    """Return the arguments of a layout in their final form."""
    for name, value in (("owned", owned), ("fields", 1 if fields is None else fields)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
    try:
        indices = torch.as_tensor(ghosts, device=HOST.device)
        if indices.numel() == 0:
            indices = indices.to(torch.int64)
        whole = not indices.is_floating_point() and not indices.is_complex()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"ghosts={ghosts!r}: give the numbers of items") from error
    if not whole or indices.dim() != 1 or indices.dtype is torch.bool:
        raise ConfigurationError(
            f"ghosts has dtype {indices.dtype} and shape {tuple(indices.shape)}: give the numbers "
            "of items, shape (G,)"
        )
    if pattern is not None:
        rows, columns = (
            torch.as_tensor(part, device=HOST.device).to(torch.int64) for part in pattern
        )
        inside = (
            rows.shape == columns.shape
            and rows.dim() == 1
            and bool(((rows >= 0) & (rows < owned)).all())
            and bool(((columns >= 0) & (columns < owned + len(indices))).all())
        )
        if not inside:
            raise ConfigurationError(
                f"pattern has indices that are not those of {owned} rows and "
                f"{owned + len(indices)} columns: give (rows, columns), shape (k,) each"
            )
        pattern = (rows, columns)
    return int(owned), indices.to(torch.int64), None if fields is None else int(fields), pattern


def _check_indices(indices: torch.Tensor, total: int) -> None:
    wrong = (indices < 0) | (indices >= total)
    if bool(wrong.any()):
        raise ConfigurationError(
            f"ghosts contains {int(indices[wrong][0])}, and the ranks own {total} items: give "
            f"numbers from 0 to {total - 1}"
        )

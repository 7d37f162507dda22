"""Structured grids, by PETSc's DMDA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pnode.base import vectors
from pnode.base.communicators import as_communicator, clean_up
from pnode.base.devices import HOST, place_of
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc
from pnode.base.ranks import Ranks
from pnode.layout.layouts import Layout

__all__ = ["Grid"]

_BOUNDARIES = ("periodic", "zero", "mirror", "replicate")


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

    copies = True

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
        self.comm = as_communicator(comm)
        group = Ranks(self.comm)
        clean_up(self.comm)
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

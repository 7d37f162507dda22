"""Solutions on grids as XDMF and HDF5, which ParaView and VisIt read, by meshio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pnode.base.errors import ConfigurationError
from pnode.base.optional import need
from pnode.base.paths import target_of
from pnode.base.ranks import Ranks
from pnode.layout.grids import Grid
from pnode.solutions.series import array, chosen_names, single_clock

__all__ = ["write"]

_KINDS = ("line", "quad", "hexahedron")
# Corners of a cell in the order of VTK: around its lower face, then around its upper one.
_CORNERS = (
    ((0,), (1,)),
    ((0, 0), (1, 0), (1, 1), (0, 1)),
    (
        (0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0),
        (0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1),
    ),
)  # fmt: skip


def write(
    solution: Any,
    path: Any,
    grid: Grid,
    names: Sequence[str] | None,
    spacing: float | Sequence[float],
    origin: float | Sequence[float],
) -> None:
    """Write the states over time; see ``Solution.write_xdmf``. Collective."""
    if not isinstance(grid, Grid):
        raise ConfigurationError(f"grid={grid!r} must be a pnode.parallel.Grid")
    ranks = Ranks(grid.comm)
    with ranks.together():
        rows = ranks.attempt(_check, solution, grid)
        times = ranks.attempt(single_clock, solution.ts, "write_xdmf")
        default = ["y"] if grid.fields is None else [f"y[{i}]" for i in range(grid.fields)]
        labels = ranks.attempt(chosen_names, names, len(default), default)
        mesh = ranks.attempt(_mesh, grid, spacing, origin)
    # Whatever was refused was refused on all ranks: those that follow all take part.
    with ranks.together():
        first = grid.comm.rank == 0
        writer = ranks.attempt(_open, path, mesh) if first else None
        try:
            for time, row in zip(times, rows, strict=True):
                whole = grid.whole(row)
                if first:
                    values = array(whole).reshape(len(labels), -1)
                    ranks.attempt(_write_row, writer, time, dict(zip(labels, values, strict=True)))
        finally:
            if writer is not None:
                writer.__exit__()


def _check(solution: Any, grid: Grid) -> torch.Tensor:
    ys = solution.ys
    if not isinstance(ys, torch.Tensor) or ys.shape[1:] != torch.Size(grid.shape):
        found = tuple(ys.shape) if isinstance(ys, torch.Tensor) else type(ys).__name__
        raise ConfigurationError(
            f"ys ({found}) must be one tensor of shape (T, {', '.join(map(str, grid.shape))}), "
            f"this rank's part of {grid!r}"
        )
    return ys.detach()


def _mesh(
    grid: Grid, spacing: float | Sequence[float], origin: float | Sequence[float]
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Return the corners of all cells, and for each cell its own, cells in the grid's order."""
    shape = grid.global_shape
    dimensions = len(shape)
    steps, start = (_per_dimension(n, v, dimensions) for n, v in
                    (("spacing", spacing), ("origin", origin)))  # fmt: skip
    if not all(step > 0 for step in steps):
        raise ConfigurationError(f"spacing={spacing!r} must be positive")
    corners = [length + 1 for length in shape]
    points = np.zeros((math.prod(corners), 3))
    for axis, index in enumerate(np.indices(corners).reshape(dimensions, -1)):
        points[:, axis] = start[axis] + steps[axis] * index
    cells = np.indices(shape).reshape(dimensions, -1)
    numbers = [
        np.ravel_multi_index([row + move for row, move in zip(cells, corner, strict=True)], corners)
        for corner in _CORNERS[dimensions - 1]
    ]
    return points, [(_KINDS[dimensions - 1], np.stack(numbers, axis=1))]


def _per_dimension(name: str, value: Any, dimensions: int) -> list[float]:
    try:
        found = np.broadcast_to(np.asarray(value, float), (dimensions,)).tolist()
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ConfigurationError(f"{name}={value!r} must be a number, or {dimensions} of them")
    return found


def _open(path: Any, mesh: tuple[np.ndarray, list[tuple[str, np.ndarray]]]) -> Any:
    meshio = need("meshio", "io", "write_xdmf()")
    h5py = need("h5py", "io", "write_xdmf()")
    target = Path(target_of(path))
    if target.suffix != ".xdmf":
        raise ConfigurationError(f"path={str(target)!r} must end in .xdmf")
    writer = meshio.xdmf.TimeSeriesWriter(target)
    # meshio's own __enter__ would put this file into the current folder.
    writer.h5_filename = str(target.with_suffix(".h5"))
    writer.h5_file = h5py.File(writer.h5_filename, "w")
    writer.write_points_cells(*mesh)
    return writer


def _write_row(writer: Any, time: float, values: dict[str, np.ndarray]) -> None:
    writer.write_data(float(time), cell_data={name: [row] for name, row in values.items()})

"""Solutions as labelled arrays, by xarray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pnode.base.errors import ConfigurationError
from pnode.base.optional import need
from pnode.layout.grids import Grid
from pnode.solutions.series import array, chosen_names, leaves, single_clock

__all__ = ["to_xarray"]

_CELLS = ("cell_0", "cell_1", "cell_2")


def to_xarray(solution: Any, names: Sequence[str] | None, grid: Grid | None) -> Any:
    """Make a Dataset; see ``Solution.to_xarray``."""
    times = single_clock(solution.ts, "to_xarray")
    parts = list(leaves(solution.ys))
    labels = chosen_names(names, len(parts), [name for name, _ in parts])
    taken = {"time", "costs", *_CELLS, *(f"event_{i}" for i in range(len(solution.events)))}
    if not taken.isdisjoint(labels):
        raise ConfigurationError(
            f"names={names!r}: {', '.join(sorted(taken.intersection(labels)))} has a meaning of "
            "its own in the Dataset; take another name"
        )
    xarray = need("xarray", "io", "to_xarray()")
    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {"time": times}
    for label, (_, part) in zip(labels, parts, strict=True):
        variables[label] = (("time", *_dimensions(label, part, grid)), array(part))
    if grid is not None:
        for dimension in range(len(grid.cells)):
            coordinates[_CELLS[dimension]] = array(grid.coordinates(dimension))
    if solution.costs is not None:
        costs = solution.costs
        own = (f"costs_{axis}" for axis in range(costs.ndim - 1))
        variables["costs"] = (("time", *own), array(costs))
    for index, event in enumerate(solution.events):
        clock = f"event_{index}"
        coordinates[clock] = array(event.times)
        states = [states for _, states in leaves(event.states)]
        for label, part in zip(labels, states, strict=True):
            axes = _dimensions(label, part, grid)
            variables[f"{clock}_{label}"] = ((clock, *axes), array(part))
    attributes = {"reason": solution.reason, "stats": json.dumps(asdict(solution.stats))}
    return xarray.Dataset(variables, coordinates, attributes)


def _dimensions(label: str, part: Any, grid: Grid | None) -> list[str]:
    """Return the names of a part's dimensions after the first."""
    if grid is not None and tuple(part.shape[1:]) == tuple(grid.shape):
        cells = list(_CELLS[: len(grid.cells)])
        return cells if grid.fields is None else ["field", *cells]
    return [f"{label}_{axis}" for axis in range(part.ndim - 1)]

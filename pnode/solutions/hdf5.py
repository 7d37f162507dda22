"""Solutions in HDF5 files: one group for each rank's part.

Attributes of the file: ``format``, ``version``, ``pnode`` (which wrote it), ``ranks``, and of a
grid ``cells``. Of a group ``part0``...: ``reason``, ``event``, ``stats``, ``structure`` and of a
grid ``first`` and ``number`` of its cells; its datasets are ``ts``, ``ys/0``... in the order of the
structure's tensors, ``costs``, ``events/0/times``, ``events/0/states/0``...
"""

from __future__ import annotations

import collections
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pnode.base.communicators import as_communicator
from pnode.base.errors import ConfigurationError
from pnode.base.optional import need
from pnode.base.paths import path_of, target_of
from pnode.base.ranks import Ranks
from pnode.layout.grids import Grid
from pnode.solutions.series import array, leaves

__all__ = ["FORMAT", "VERSION", "Part", "open_file", "pack", "parts", "unpack", "write"]

FORMAT, VERSION = "pnode solution", 1
_CORE_TYPES = (str, int, bool)

Part = Mapping[str, Any]


def pack(state: Any) -> Any:
    """Return what a state is made of, for JSON: ``"tensor"``, or a container and its parts."""
    if isinstance(state, torch.Tensor):
        return "tensor"
    if isinstance(state, dict):
        odd = [key for key in state if not isinstance(key, _CORE_TYPES)]
        if odd:
            raise ConfigurationError(f"a state's key {odd[0]!r} is none that save() can keep")
        return {"dict": [[key, pack(part)] for key, part in state.items()]}
    if hasattr(state, "_fields"):
        return {"namedtuple": [type(state).__name__, list(state._fields), [*map(pack, state)]]}
    if isinstance(state, (tuple, list)):
        return {"list" if isinstance(state, list) else "tuple": [*map(pack, state)]}
    raise ConfigurationError(f"save() cannot keep a state in a {type(state).__name__}")


def unpack(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return the state that :func:`pack` has described, made of its tensors in their order."""
    if structure == "tensor":
        return next(tensors)
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {key: unpack(part, tensors) for key, part in content}
    if kind == "namedtuple":
        name, names, inner = content
        return collections.namedtuple(name, names)(*(unpack(part, tensors) for part in inner))
    found = [unpack(part, tensors) for part in content]
    return found if kind == "list" else tuple(found)


def write(solution: Any, path: Any, comm: Any, grid: Grid | None, version: str) -> None:
    """Write a solution; see ``Solution.save``. Collective."""
    ranks = Ranks(as_communicator(comm if grid is None else grid.comm))
    with ranks.together():
        h5py = ranks.attempt(need, "h5py", "io", "save()")
        own = ranks.attempt(_contents, solution, grid)
        if ranks.rank:
            ranks.comm.send(own, 0)
            return
        others = _received(ranks)
        try:
            if h5py is not None and own is not None:
                _write_all(h5py, path, itertools.chain([own], others), grid, version)
        except BaseException as error:
            if not ranks.parallel:
                raise
            ranks.fail(error)
        for _ in others:  # nobody is to wait
            pass


def _received(ranks: Ranks) -> Iterator[dict[str, Any] | None]:
    for rank in range(1, ranks.size):
        yield ranks.comm.recv(source=rank)


def _write_all(h5py: Any, path: Any, contents: Any, grid: Grid | None, version: str) -> None:
    """Write the parts of all ranks: in full, or not at all. What was there stays until then."""
    path = target_of(path)
    unfinished, number, complete = f"{path}.part", 0, True
    try:
        with h5py.File(unfinished, "w") as file:
            for number, content in enumerate(contents, 1):
                complete &= content is not None  # None: of a rank that failed
                _write_part(file.create_group(f"part{number - 1}"), content)
            file.attrs.update({"format": FORMAT, "version": VERSION, "pnode": version})
            file.attrs["ranks"] = number
            if grid is not None:
                file.attrs["cells"] = list(grid.global_shape)
        if complete:
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            os.remove(unfinished)


def _write_part(group: Any, content: dict[str, Any] | None) -> None:
    if content is not None:
        group.attrs.update(content["attributes"])
        for name, values in content["arrays"].items():
            group.create_dataset(name, data=values)


def _contents(solution: Any, grid: Grid | None) -> dict[str, Any]:
    """Return attributes and arrays of this rank's part."""
    attributes = {
        "reason": solution.reason,
        "event": -1 if solution.event is None else solution.event,
        "stats": json.dumps(asdict(solution.stats)),
        "structure": json.dumps(pack(solution.ys)),
    }
    if grid is not None:
        for name, part in leaves(solution.ys):
            if tuple(part.shape[-len(grid.cells) :]) != grid.cells:
                raise ConfigurationError(
                    f"{name} has shape {tuple(part.shape)}: its last dimensions must be this "
                    f"rank's cells of the grid, {grid.cells}"
                )
        attributes |= {"first": list(grid.starts), "number": list(grid.cells)}
    arrays = {"ts": array(solution.ts)}
    arrays |= {f"ys/{i}": array(part) for i, (_, part) in enumerate(leaves(solution.ys))}
    if solution.costs is not None:
        arrays["costs"] = array(solution.costs)
    for index, event in enumerate(solution.events):
        arrays[f"events/{index}/times"] = array(event.times)
        for i, (_, part) in enumerate(leaves(event.states)):
            arrays[f"events/{index}/states/{i}"] = array(part)
    return {"attributes": attributes, "arrays": arrays}


def open_file(path: Any) -> Any:
    """Open a file of :func:`write`; its ``with`` closes it. Not collective."""
    h5py = need("h5py", "io", "load()")
    path = path_of(path)
    if not os.path.exists(path):
        raise ConfigurationError(f"path={path!r}: there is no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ConfigurationError(
            f"path={path!r} is not a file that save() has finished: {error}"
        ) from error
    kind, version = file.attrs.get("format"), file.attrs.get("version")
    if kind != FORMAT or version > VERSION:
        file.close()
        what = "is no solution of pnode's" if kind != FORMAT else "was written by a newer pnode"
        raise ConfigurationError(f"path={path!r} {what}")
    return file


def parts(file: Any, cells: Sequence[slice] | None, wanted: Part) -> dict[str, torch.Tensor]:
    """Return the arrays of a group, or with ``cells`` those over these cells, from all groups.

    Parameters
    ----------
    file : h5py.File
        The file.
    cells : sequence of slice or None
        The wanted cells of the grid.
    wanted : h5py.Group
        The group, which in any case tells what there is.
    """
    names: list[str] = []
    wanted.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)  # type: ignore[attr-defined]
    found = {}
    for name in names:
        if cells is None or name == "ts" or name.endswith("/times"):
            found[name] = torch.from_numpy(np.asarray(wanted[name][()]))
        elif name == "costs":
            raise ConfigurationError(
                "the file has costs, of each rank its own: load it with the same ranks and grid"
            )
        else:
            found[name] = torch.from_numpy(_over(file, name, cells))
    return found


def _over(file: Any, name: str, cells: Sequence[slice]) -> np.ndarray:
    """Return an array over some cells of the grid, read from the groups that have them."""
    result: np.ndarray | None = None
    for rank in range(file.attrs["ranks"]):
        group = file[f"part{rank}"]
        data, first = group[name], group.attrs["first"]
        if result is None:
            lead = data.shape[: data.ndim - len(cells)]
            lengths = (part.stop - part.start for part in cells)
            result = np.empty((*lead, *lengths), data.dtype)
        source: list[Any] = [...]
        target: list[Any] = [...]
        for part, start, number in zip(cells, first, group.attrs["number"], strict=True):
            low, high = max(part.start, start), min(part.stop, start + number)
            source.append(slice(low - start, max(high, low) - start))
            target.append(slice(low - part.start, max(high, low) - part.start))
        result[tuple(target)] = data[tuple(source)]
    assert result is not None
    return result

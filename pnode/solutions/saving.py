"""Solutions read back from files."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pnode.base.communicators import as_communicator
from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger, Stats
from pnode.base.ranks import Ranks
from pnode.layout.grids import Grid
from pnode.solutions import hdf5
from pnode.solutions.solution import Occurrences, Solution

__all__ = ["load"]


def load(
    path: Any, *, comm: Any = None, rank: int | None = None, grid: Grid | None = None
) -> Solution:
    """Read a solution that :meth:`Solution.save` wrote. Collective on ``comm``, or the grid's.

    Parameters
    ----------
    path : str or os.PathLike
        The file.
    comm : mpi4py.MPI.Intracomm, optional
        As many ranks as wrote the file: each gets its part.
    rank : int, optional
        Instead: whose part of such a file to read.
    grid : Grid, optional
        Of a file that was saved with one: each rank gets its cells, however many ranks wrote the
        file. Without ``grid``, ``comm`` and ``rank`` the whole grid is read.

    Returns
    -------
    Solution
        On the host, without gradients; dtypes and bits are those that were saved. NamedTuples
        come back as such, of a class of their own with the same name and fields.

    Raises
    ------
    ConfigurationError
        If there is no such file, if it is of another kind, or for other ranks or another grid;
        for ``costs`` over the cells of other ranks, which belong to none.
    MissingPackage
        Without h5py.
    """
    if sum(each is not None for each in (comm, rank, grid)) > 1:
        raise ConfigurationError("comm=, rank= and grid= exclude one another: give one of them")
    group = Ranks(as_communicator(comm if grid is None else grid.comm))
    with group.together():
        solution = group.attempt(_read, path, comm, rank, grid)
    return solution


def _read(path: Any, comm: Any, rank: int | None, grid: Grid | None) -> Solution:
    with hdf5.open_file(path) as file:
        ranks, shape = int(file.attrs["ranks"]), file.attrs.get("cells")
        if grid is not None and (shape is None or tuple(shape) != grid.global_shape):
            of = "no grid" if shape is None else f"a grid of {tuple(map(int, shape))} cells"
            raise ConfigurationError(
                f"grid={grid!r}: {path} was saved with {of}; save() and load() take the same"
            )
        cells, number = None, 0
        if grid is not None:
            cells, number = grid.owned, min(grid.comm.rank, ranks - 1)
        elif shape is not None and comm is None and rank is None:
            cells = tuple(slice(0, int(length)) for length in shape)
        elif rank is not None:
            number = rank
        elif comm is not None:
            number = comm.rank
        if cells is not None and _same_cells(file[f"part{number}"], cells):
            cells = None
        if cells is None and grid is None:
            _check_ranks(path, ranks, comm, rank)
        return _solution(file, cells, file[f"part{number}"])


def _same_cells(part: Any, cells: Any) -> bool:
    pairs = zip(part.attrs["first"], part.attrs["number"], strict=True)
    return all(
        (own.start, own.stop) == (first, first + number)
        for own, (first, number) in zip(cells, pairs, strict=True)
    )


def _check_ranks(path: Any, ranks: int, comm: Any, rank: int | None) -> None:
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks:
            raise ConfigurationError(
                f"rank={rank!r}: {path} has the parts of ranks 0 to {ranks - 1}"
            )
    elif ranks != (1 if comm is None else comm.size):
        raise ConfigurationError(
            f"{path} has the parts of {ranks} ranks: load it with comm= of as many, or with rank= "
            "for the part of one"
        )


def _solution(file: Any, cells: Any, part: Any) -> Solution:
    arrays, structure = hdf5.parts(file, cells, part), json.loads(part.attrs["structure"])

    def state(prefix: str) -> Any:
        number = sum(name.startswith(prefix) for name in arrays)
        return hdf5.unpack(structure, (arrays[f"{prefix}{i}"] for i in range(number)))

    events = sum(name.endswith("/times") for name in arrays)
    occurrences = tuple(
        Occurrences(arrays[f"events/{i}/times"], state(f"events/{i}/states/"))
        for i in range(events)
    )
    reason, event = str(part.attrs["reason"]), int(part.attrs["event"])
    ts = arrays["ts"]
    return Solution(
        ts,
        state("ys/"),
        _stats(json.loads(part.attrs["stats"])),
        reason,
        ts[-1] if reason == "event" else None,
        arrays.get("costs"),
        events=occurrences,
        event=None if event < 0 else event,
    )


def _stats(counts: dict[str, Any]) -> Stats:
    """Return a ledger; counts that this pnode does not know are left out."""
    known = {each.name for each in fields(Ledger)}

    def ledger(given: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name in known}

    found = Stats(**ledger(counts))
    found.backward = Ledger(**ledger(counts["backward"]))
    found.tangents = Ledger(**ledger(counts["tangents"]))
    return found

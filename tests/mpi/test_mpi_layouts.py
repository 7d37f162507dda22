"""Ghost cells against the padding of the whole state, and their adjoints."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ranks import checks, comm

from pnode.errors import ConfigurationError
from pnode.parallel import GhostLayout, Grid, total

BOUNDARIES = ("periodic", "zero", "mirror", "replicate")
MODES = {"periodic": "circular", "zero": "constant", "replicate": "replicate"}


def pad(values: torch.Tensor, width: int, boundary: str) -> torch.Tensor:
    """Extend the last dimension by its boundary condition."""
    if not width:
        return values
    if boundary == "mirror":
        around = [(0, 0)] * (values.dim() - 1) + [(width, width)]
        return torch.from_numpy(np.pad(values.numpy(), around, mode="symmetric"))
    rows = values.reshape(1, -1, values.shape[-1])
    padded = torch.nn.functional.pad(rows, (width, width), mode=MODES[boundary])
    return padded.reshape(*values.shape[:-1], -1)


def expected(grid: Grid, whole: torch.Tensor) -> torch.Tensor:
    """This rank's window of the padded whole state; corners are zero for a star."""
    dimensions = len(grid.cells)
    for dimension in range(-dimensions, 0):
        padded = pad(whole.movedim(dimension, -1), grid.width, grid.boundary[dimension])
        whole = padded.movedim(-1, dimension)
    window = tuple(
        slice(first, first + number + 2 * grid.width)
        for first, number in zip(grid.starts, grid.cells, strict=True)
    )
    result = whole[(..., *window)].clone()
    if grid.stencil == "star":
        outside = torch.zeros(result.shape[-dimensions:], dtype=torch.int64)
        for dimension, number in enumerate(grid.cells):
            index = torch.arange(number + 2 * grid.width) - grid.width
            beyond = ((index < 0) | (index >= number)).to(torch.int64)
            outside += beyond.view(-1, *[1] * (dimensions - 1 - dimension))
        result[..., outside > 1] = 0.0
    return result


def adjoint(layout: Grid | GhostLayout, *what: object) -> None:
    """<gather x, w> = <x, scatter w> over all ranks, for random x and w."""
    generator = torch.Generator().manual_seed(17 + comm.rank)
    x = torch.randn(layout.shape, generator=generator, dtype=torch.float64)
    w = torch.randn(layout.ghosted_shape, generator=generator, dtype=torch.float64)
    ghosted, back = layout.gather(x), layout.scatter(w)
    left, right, a, b = (
        comm.allreduce(float(value))
        for value in ((ghosted * w).sum(), x.reshape(-1) @ back, w.square().sum(), x.square().sum())
    )
    checks.below(abs(left - right), 1e-14 * (a * b) ** 0.5, "adjoint", *what)
    checks.true(ghosted.shape == layout.ghosted_shape and back.shape == (layout.size,), *what)


def one_grid(shape: tuple[int, ...], **options: object) -> None:
    """Ghost cells, adjoint, dtype, global numbers and pattern of one grid."""
    grid = Grid(shape, comm=comm, **options)
    what = (grid,)
    lead = () if grid.fields is None else (grid.fields,)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)
    part = grid.part(whole)
    checks.true(part.shape == grid.shape, "shape", *what)
    checks.true(torch.equal(grid.whole(part), whole), "whole", *what)
    adjoint(grid, *what)  # before gather: nothing of it may be left behind
    wanted = expected(grid, whole)
    checks.true(torch.equal(grid.gather(part), wanted), "gather", *what)
    checks.true(torch.equal(grid.gather(part.float()), wanted.float()), "float32", *what)
    # The numbers of the ghosted entries find them in the state as PETSc numbers it.
    state = torch.cat([torch.from_numpy(values) for values in comm.allgather(part.numpy().ravel())])
    columns = grid.columns()
    found = torch.where(columns >= 0, state[columns.clamp(min=0)], 0.0)
    checks.true(torch.equal(found, wanted.reshape(-1)), "columns", *what)
    # A field that weighs all cells within reach has its derivatives in the pattern, and no others.
    rows, entries = grid.pattern()
    reach = range(-grid.width, grid.width + 1)
    near = [
        offset
        for offset in itertools.product(reach, repeat=len(shape))
        if grid.stencil == "box" or sum(map(bool, offset)) <= 1
    ]
    number = (grid.fields or 1) ** 2 * math.prod(grid.cells) * len(near)
    checks.true(len(rows) == len(entries) == number, "pattern", *what)


@pytest.mark.mpi
def test_ghost_cells_of_grids() -> None:
    """Every boundary, width, stencil, with fields and without, in one to three dimensions."""
    for shape in ((9,), (7, 6), (6, 4, 5)):
        for boundary, width in itertools.product(BOUNDARIES, (0, 1, 2)):
            one_grid(shape, boundary=boundary, width=width, fields=2 if width == 1 else None)
            if width and len(shape) > 1:
                star = 1 if width == 1 else None
                one_grid(shape, boundary=boundary, width=width, stencil="star", fields=star)
    for first, second in itertools.permutations(BOUNDARIES, 2):
        one_grid((6, 7), boundary=(first, second), width=2, fields=3)
    one_grid((7, 6), boundary=("mirror", "replicate"), width=2, stencil="star", fields=2)
    one_grid((4, 5, 6), boundary=("mirror", "periodic", "replicate"), width=2, stencil="star")


@pytest.mark.mpi
def test_ghosts_of_graphs() -> None:
    """A random graph: ghosts repeated and in any order, own items among them, or none."""
    owned = [4, 2, 5][comm.rank % 3]
    counts = comm.allgather(owned)
    total = sum(counts)
    start = sum(counts[: comm.rank])
    generator = torch.Generator().manual_seed(5)
    for fields, number in itertools.product((None, 1, 3), (0, 7)):
        own = torch.Generator().manual_seed(comm.rank)
        ghosts = torch.randint(0, total, (number + 2 * comm.rank * bool(number),), generator=own)
        layout = GhostLayout(owned, ghosts, fields=fields, comm=comm)
        tail = () if fields is None else (fields,)
        whole = torch.randn(total, *tail, generator=generator, dtype=torch.float64)
        adjoint(layout, layout)
        wanted = torch.cat([whole[start : start + owned], whole[ghosts]])
        gathered = layout.gather(whole[start : start + owned])
        checks.true(torch.equal(gathered, wanted), "gather", layout)
        checks.true(torch.equal(layout.gather(wanted[:owned].float()), wanted.float()), layout)
        numbers = torch.arange(total * (fields or 1)).view(total, -1)
        wanted = torch.cat([numbers[start : start + owned], numbers[ghosts]]).reshape(-1)
        checks.true(torch.equal(layout.columns(), wanted), "columns", layout)
    layout = GhostLayout(
        owned, [0], fields=2, pattern=(torch.arange(owned), torch.full((owned,), owned)), comm=comm
    )
    rows, columns = layout.pattern()
    entries = set(zip(rows.tolist(), columns.tolist(), strict=True))
    wanted = {
        (2 * i + a, 2 * owned + b) for i, a, b in itertools.product(range(owned), (0, 1), (0, 1))
    }
    checks.true(entries == wanted, "pattern with fields")


def refused(name: str, *texts: str, **arguments: object) -> None:
    """Expect a layout to be refused on every rank, and with the same words."""
    kind = arguments.pop("kind", Grid)
    try:
        kind(**arguments, comm=comm)
    except ConfigurationError as error:
        message = str(error)
        checks.true(all(text in message for text in texts), name, message)
    else:
        message = None
        checks.true(False, name, "was accepted")
    checks.true(len(set(comm.allgather(message))) == 1, name, message)


@pytest.mark.mpi
def test_layouts_that_are_refused() -> None:
    """Arguments that no rank can use, or one rank alone cannot, or that differ between them."""
    refused("cells", "shape=0", shape=(0,))
    refused("dimensions", "1 to 3", shape=(2, 2, 2, 2))
    refused("boundary", "boundary='open'", shape=(8,), boundary="open")
    refused("stencil", "stencil='cross'", shape=(8,), stencil="cross")
    refused("fields", "fields=0", shape=(8,), fields=0)
    refused("width", "width=-1", shape=(8,), width=-1)
    refused("owned", "owned=0", kind=GhostLayout, owned=0)
    refused("floats", "ghosts", kind=GhostLayout, owned=2, ghosts=[0.5])
    last = comm.rank == comm.size - 1
    many = 2 * comm.size
    refused(
        "range on one rank", f"ghosts contains {many}", f"0 to {many - 1}",
        kind=GhostLayout, owned=2, ghosts=[many] if last else [0],
    )  # fmt: skip
    if comm.size == 1:
        return
    # 2 P + 1 cells: one rank has 3 of them and could go on, the others have 2.
    refused("cells per rank", "width=3", f"{comm.size} ranks", shape=(2 * comm.size + 1,), width=3)
    refused("fewer cells than ranks", "does not split", shape=(comm.size - 1,), width=0)
    refused("shapes differ", "shape differs", "(8,)", "(9,)", shape=(8 + last,))
    refused("fields differ", "fields differs", shape=(8,), fields=1 if last else None)
    refused("bad on one rank", f"[rank {comm.size - 1}]", shape=(8,), width=-1 if last else 1)


@pytest.mark.mpi(min_size=2)
def test_total_of_integers_has_all_digits() -> None:
    value = torch.tensor([2**60 + 1 if comm.rank == 0 else 2])
    checks.true(total(value, comm).item() == 2**60 + 1 + 2 * (comm.size - 1))

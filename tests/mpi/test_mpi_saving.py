"""Solutions that several ranks share, in one file."""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import pytest
import torch
from mpi4py import MPI
from ranks import checks, comm

import pnode
from pnode.parallel import Grid

pytest.importorskip("h5py")


@pytest.fixture
def folder():
    """A folder that all ranks see."""
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield path
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def diffusion(grid):
    def field(t, y):
        return y[:, 2:] - 2.0 * y[:, 1:-1] + y[:, :-2]

    solver = pnode.Solver(field, method="rk4", step_size=0.1, layout=grid)
    whole = torch.arange(22.0, dtype=torch.float64).reshape(2, 11).sin()
    return solver(grid.part(whole), [0.0, 0.3, 0.5])


@pytest.mark.mpi
def test_samples(folder):
    """Each rank gets its own part back."""
    y0 = torch.full((2, 3), 1.0 + comm.rank, dtype=torch.float64)
    solution = pnode.Solver(lambda t, y: -y, comm=comm)(y0, [0.0, 1.0])
    path = os.path.join(folder, "a.h5")
    solution.save(path, comm=comm)
    found = pnode.load(path, comm=comm)
    checks.true(torch.equal(found.ys, solution.ys), "own part")
    other = pnode.load(path, rank=comm.size - 1)
    checks.true(torch.equal(other.ys[0], torch.full((2, 3), 1.0 * comm.size).double()), "rank=")
    if comm.size > 1:
        with pytest.raises(pnode.ConfigurationError, match=f"parts of {comm.size} ranks"):
            pnode.load(path)


@pytest.mark.mpi
def test_grid_on_another_number_of_ranks(folder):
    path = os.path.join(folder, "a.h5")
    grid = Grid((11,), fields=2, comm=comm)
    solution = diffusion(grid)
    whole = grid.whole(solution.ys)
    solution.save(path, grid=grid)
    checks.true(torch.equal(pnode.load(path).ys, whole), "whole")
    checks.true(torch.equal(pnode.load(path, grid=grid).ys, solution.ys), "same ranks")
    checks.true(torch.equal(pnode.load(path, grid=Grid((11,), fields=2)).ys, whole), "alone")
    # Other parts than those that were written, in another order of the ranks.
    turned = comm.Split(0, -comm.rank)
    other = Grid((11,), fields=2, comm=turned)
    checks.true(torch.equal(pnode.load(path, grid=other).ys, other.part(whole)), "turned")
    turned.Free()
    alone = Grid((11,), fields=2)
    own = os.path.join(folder, f"{comm.rank}.h5")
    diffusion(alone).save(own, grid=alone)
    mine = comm.bcast(os.path.join(folder, "0.h5"))
    comm.barrier()
    parted = pnode.load(mine, grid=grid).ys
    checks.true(torch.equal(parted, grid.part(pnode.load(mine).ys)), "from one rank to several")


@pytest.mark.mpi
def test_xdmf(folder):
    """The same files as of one process."""
    meshio = pytest.importorskip("meshio")
    grid = Grid((11,), fields=2, comm=comm)
    solution = diffusion(grid)
    path = os.path.join(folder, "a.xdmf")
    solution.write_xdmf(path, grid)
    whole = grid.whole(solution.ys).numpy()
    comm.barrier()
    with meshio.xdmf.TimeSeriesReader(path) as reader:
        reader.read_points_cells()
        checks.true(reader.num_steps == 3)
        for number in range(3):
            _, _, values = reader.read_data(number)
            for field in range(2):
                checks.true(np.array_equal(values[f"y[{field}]"][0], whole[number, field]))


@pytest.mark.mpi(min_size=2)
def test_failures_are_everybodys(folder):
    """Rank 0 cannot write; another has something that cannot be written; nobody waits."""
    solution = diffusion(grid := Grid((11,), fields=2, comm=comm))
    with pytest.raises(pnode.PnodeError):
        solution.save(os.path.join(folder, "none", "a.h5"), grid=grid)
    odd = pnode.Solution(solution.ts, {1.5: solution.ys}, pnode.Stats())
    with pytest.raises(pnode.PnodeError, match="none that save"):
        (odd if comm.rank == 1 else solution).save(os.path.join(folder, "a.h5"), comm=comm)
    checks.true(not os.path.exists(os.path.join(folder, "a.h5")), "no file is left")
    with pytest.raises(pnode.PnodeError, match="no such file"):
        pnode.load(os.path.join(folder, "a.h5"), comm=comm)
    if comm.rank == 0:
        with pytest.raises(pnode.ConfigurationError, match="must be one tensor"):
            pnode.Solution(solution.ts, solution.ys[:, :1], pnode.Stats()).write_xdmf(
                os.path.join(folder, "a.xdmf"), Grid((11,), fields=2, comm=MPI.COMM_SELF)
            )

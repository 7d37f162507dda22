"""Run under mpiexec: one rank dies, by exit or by signal, in the middle of a sweep."""

from __future__ import annotations

import os
import sys

import torch
from mpi4py import MPI

import pnode
from pnode.parallel import Grid

torch.set_num_threads(1)
comm = MPI.COMM_WORLD


def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    if comm.rank == comm.size - 1 and float(t) > 0.1:
        if sys.argv[1] == "exit":
            os._exit(3)
        os.kill(os.getpid(), 9)
    return u[2:] - u[:-2]


grid = Grid((8,), comm=comm)
solver = pnode.Solver(field, method="dopri5", layout=grid)
print("alive", flush=True)
solver(torch.linspace(0.0, 1.0, *grid.shape), torch.tensor([0.0, 5.0]))
print("ranks", comm.size)

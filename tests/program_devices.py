"""Run under mpiexec: solves of several ranks on a simulated device give the numbers of the host."""

from __future__ import annotations

import torch
from mpi4py import MPI
from simulated_device import OnDevice, bare, module_on_device, on_device, simulated
from test_devices import TIMES, Field

import pnode
from pnode.parallel import Grid

COMM = MPI.COMM_WORLD


def part():
    torch.manual_seed(COMM.rank)
    return torch.randn(4, 3, dtype=torch.float64).requires_grad_()


def batch(field, y0, **keywords):
    """A batch, each rank with some samples."""
    solver = pnode.Solver(field, comm=COMM, **keywords)
    solution = solver(y0, TIMES)
    solution.ys.square().sum().backward()
    return [solution.ys.detach(), y0.grad, *(p.grad for p in field.parameters())]


def cells(y0, grid, **keywords):
    """A grid with ghost cells."""
    solver = pnode.Solver(
        lambda t, y: 3.0 * (y[2:] - 2.0 * y[1:-1] + y[:-2]), layout=grid, **keywords
    )
    solution = solver(y0, TIMES)
    solution.ys.square().sum().backward()
    return [solution.ys.detach(), y0.grad]


def agree(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        assert isinstance(one, OnDevice)
        torch.testing.assert_close(bare(one), two, rtol=1e-10, atol=1e-13)


def main() -> None:
    fixed = {"step_size": 0.1}
    for petsc in (True, False):
        state = {"device_state": "device" if petsc else "host"}
        for keywords in (
            {"method": "rk4", **fixed},
            {"method": "dopri5"},
            {"method": "cn", "jacobian": "block", **fixed},
            {"method": "cn", "jacobian": "matrix-free", **fixed},
            {"method": "bdf"},
        ):
            expected = batch(Field(), part(), **keywords)
            with simulated(petsc=petsc):
                y0, field = on_device(part()), module_on_device(Field())
                agree(batch(field, y0, **keywords, **state), expected)
        for keywords in ({"method": "rk4", **fixed}, {"method": "beuler", **fixed}):
            grid = Grid((12,), width=1, boundary="mirror", comm=COMM)
            y0 = grid.part(torch.linspace(0.0, 1.0, 12, dtype=torch.float64).sin())
            more = {"jacobian": "matrix-free"} if keywords["method"] == "beuler" else {}
            expected = cells(y0.clone().requires_grad_(), grid, **keywords, **more)
            with simulated(petsc=petsc):
                # A grid of its own: the vectors of the other are on the host.
                grid = Grid((12,), width=1, boundary="mirror", comm=COMM)
                found = cells(on_device(y0).requires_grad_(), grid, **keywords, **more, **state)
                agree(found, expected)
    if COMM.rank == 0:
        print("ranks", COMM.size)


if __name__ == "__main__":
    main()

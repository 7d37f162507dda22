"""Solves of several ranks on a simulated device give the numbers of the host."""

from __future__ import annotations

import pytest
import torch
from ranks import comm
from simulated_device import OnDevice, bare, module_on_device, on_device, simulated
from test_devices import TIMES, Field

import pnode
from pnode.parallel import Grid


def part():
    torch.manual_seed(comm.rank)
    return torch.randn(4, 3, dtype=torch.float64).requires_grad_()


def batch(field, y0, **keywords):
    """A batch, each rank with some samples."""
    solver = pnode.Solver(field, comm=comm, **keywords)
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


FIXED = {"step_size": 0.1}
pytestmark = pytest.mark.mpi(min_size=2, max_size=2)


@pytest.mark.parametrize("petsc", [True, False])
@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "rk4", **FIXED},
        {"method": "dopri5"},
        {"method": "cn", "jacobian": "block", **FIXED},
        {"method": "cn", "jacobian": "matrix-free", **FIXED},
        {"method": "bdf"},
    ],
)
def test_batches_on_simulated_devices(petsc, keywords):
    state = {"device_state": "device" if petsc else "host"}
    expected = batch(Field(), part(), **keywords)
    with simulated(petsc=petsc):
        y0, field = on_device(part()), module_on_device(Field())
        agree(batch(field, y0, **keywords, **state), expected)


@pytest.mark.parametrize("petsc", [True, False])
@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "rk4", **FIXED},
        {"method": "beuler", "jacobian": "matrix-free", **FIXED},
    ],
)
def test_grids_on_simulated_devices(petsc, keywords):
    state = {"device_state": "device" if petsc else "host"}
    grid = Grid((12,), width=1, boundary="mirror", comm=comm)
    y0 = grid.part(torch.linspace(0.0, 1.0, 12, dtype=torch.float64).sin())
    expected = cells(y0.clone().requires_grad_(), grid, **keywords)
    with simulated(petsc=petsc):
        # A grid of its own: the vectors of the other are on the host.
        grid = Grid((12,), width=1, boundary="mirror", comm=comm)
        found = cells(on_device(y0).requires_grad_(), grid, **keywords, **state)
        agree(found, expected)

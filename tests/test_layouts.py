"""Grids on one rank; those on several are in mpi/test_mpi_layouts.py."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

import pnode
from pnode.parallel import Grid, mean


def diffusion(t, u):
    return 10.0 * (u[:, :-2] - 2 * u[:, 1:-1] + u[:, 2:]) - u[:, 1:-1] ** 3


def coupled_diffusion(t, u):
    return diffusion(t, u) + u[:, 1:-1].flip(0)


def solve(function, **options):
    grid = Grid((12,), fields=3, **options)
    y0 = torch.linspace(0, 1, 36, dtype=torch.float64).view(3, 12).requires_grad_()
    solver = pnode.Solver(
        function, method="cn", step_size=0.05, layout=grid, jacobian="sparse", linear_solver={
            "ksp_rtol": 1e-13
        },
    )  # fmt: skip
    solution = solver(y0, torch.tensor([0.0, 0.2]))
    (gradient,) = torch.autograd.grad(solution.ys[-1].square().sum(), y0)
    return grid, solver, solution.ys[-1].detach(), gradient


def test_fields_that_are_not_coupled_need_fewer_products():
    grid, solver, end, gradient = solve(diffusion)
    other, cheap, same_end, same_gradient = solve(diffusion, coupled=False)
    torch.testing.assert_close(same_end, end, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-9, atol=1e-12)
    assert len(grid.pattern()[0]) == 3 * len(other.pattern()[0]) == 3 * 36 * 3
    assert 3 * cheap._engine.color_count <= solver._engine.color_count


def test_fields_that_are_coupled_after_all_are_found_out():
    with pytest.raises(pnode.ConfigurationError, match="misses entries"):
        solve(coupled_diffusion, coupled=False)


def test_where_entries_may_be_is_the_layout_s():
    solver = pnode.Solver(
        lambda t, y: y[:-2] - y[2:], method="cn", step_size=0.1, jacobian="sparse",
        layout=pnode.parallel.Grid((5,)), jacobian_pattern=torch.eye(5),
    )  # fmt: skip
    with pytest.raises(pnode.ConfigurationError, match="jacobian_pattern given with layout="):
        solver(torch.ones(5, dtype=torch.float64), [0.0, 0.1])


def test_consistent_start_is_refused_with_ghost_cells():
    with pytest.raises(pnode.ConfigurationError, match="consistent_start=True is not supported"):
        pnode.Solver(
            diffusion, mass=torch.ones(36), method="bdf", layout=Grid((12,), fields=3),
            consistent_start=True,
        )  # fmt: skip


def test_mean_and_its_gradient():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    result = mean(values, MPI.COMM_SELF)
    result.backward()
    assert result.item() == 3.0
    assert values.grad.tolist() == [1 / 3] * 3

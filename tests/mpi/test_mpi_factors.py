"""LU of a matrix on several ranks is refused on all, and the default works."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import Grid

grid = Grid((8,), comm=comm)
t = torch.tensor([0.0, 0.2], dtype=torch.float64)


def diffusion(t, y):
    return y[2:] - 2.0 * y[1:-1] + y[:-2]


def solve(method, **keywords):
    start = torch.linspace(0.0, 1.0, 8, dtype=torch.float64)
    y0 = grid.part(start).clone().requires_grad_()
    solver = pnode.Solver(diffusion, method=method, layout=grid, **keywords)
    y = solver(y0, t).ys[-1]
    y.sum().backward()
    return comm.allreduce(y.sum().item()), y0.grad


CASES = [
    {"jacobian": "sparse", "linear_solver": "lu"},
    {"jacobian": "sparse", "petsc_options": {"pc_type": "cholesky"}},
    {"linear_solver": "lu"},
    {"jacobian": "matrix-free", "preconditioner": "sparse", "petsc_options": {"pc_type": "lu"}},
]


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("method", ["rodaspr", "bdf", "es325"])
def test_factors_of_a_matrix_on_several_ranks(method):
    for case in CASES:
        try:
            solve(method, **case)
            checks.true(False, method, case, "was not refused")
        except pnode.ConfigurationError as error:
            alone = "needs a matrix to factor" if "jacobian" not in case else "drop it"
            checks.true(alone in str(error), method, case, error)
    total, gradient = solve(method, jacobian="sparse")
    checks.below(abs(total - 4.0), 1e-9, method, "what diffuses stays")
    checks.below(float((gradient - 1.0).abs().max()), 1e-8, method, "and so does its gradient")

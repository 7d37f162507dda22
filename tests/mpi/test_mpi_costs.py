"""Cost integrals of a state with ghost cells, against those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import Grid, total

D = torch.float64
T = torch.tensor([0.0, 0.12, 0.3], dtype=D)


class Ring(torch.nn.Module):
    """Diffusion and a reaction on a ring; ``grid`` None: of one process."""

    def __init__(self, grid: Grid | None) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.8, 1.5], dtype=D))
        self.grid = grid

    def around(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the cells to the left, the owned ones and those to the right."""
        if self.grid is None:
            u = torch.cat([u[-1:], u, u[:1]])
        return u[:-2], u[1:-1], u[2:]

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """dy/dt of the owned cells."""
        left, own, right = self.around(u)
        return self.rate[0] * (right - 2.0 * own + left) - (self.rate[1] * own * t).sin()

    def cost(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return two integrands, which look at ghost cells."""
        left, own, right = self.around(u)
        return torch.stack([(own**3).sum() * t, (self.rate[1] * (right - left)).square().sum()])


def measure(where: Any, **options: Any) -> list[torch.Tensor]:
    """Return integrals, gradients and a Hessian product, of the whole problem."""
    grid = None if where is None else Grid((7,), comm=where)
    f, whole = Ring(grid), torch.linspace(-0.4, 1.0, 7, dtype=D)
    y0 = (whole if grid is None else grid.part(whole)).clone().requires_grad_()
    if grid is not None:
        options["layout"] = grid
    solution = pnode.Solver(f, cost=f.cost, params=f.parameters(), **options)(y0, T)
    plain = pnode.Solver(f, **options)(y0, T)
    # Systems are solved to a tolerance, Krylov methods' norms are of other sums.
    by = 0.0 if options["method"] in ("rk4", "dopri5") else 1e-11
    checks.below(float((solution.ys - plain.ys).detach().abs().max()), by, "states", options)
    checks.true(solution.stats.steps == plain.stats.steps, options)

    def summed(value: torch.Tensor) -> torch.Tensor:
        return value if where is None else total(value, where)

    costs = summed(solution.costs)
    loss = costs[1].square().sum() + costs[-1].sin().sum() + summed((solution.ys[-1] ** 2).sum())
    by_y0, by_rate = torch.autograd.grad(loss, [y0, f.rate], create_graph=True)
    product = summed((by_y0 * torch.cos(y0.detach())).sum()) + by_rate.sum()
    again, more = torch.autograd.grad(product, [y0, f.rate])
    rows = [by_y0.detach(), again]
    if grid is not None:
        rows = [grid.whole(row) for row in rows]
    return [costs.detach(), *rows, by_rate.detach(), more]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rk4", {"step_size": 0.05}),
        ("dopri5", {"rtol": 1e-4, "dense": True}),
        ("cn", {"step_size": 0.15, "jacobian": "sparse"}),
        ("rodaspr", {"step_size": 0.3}),
    ],
)
def test_against_one_process(method: str, options: dict) -> None:
    """Adaptive steps are those without a cost, on any number of ranks."""
    ours, alone = measure(comm, method=method, **options), measure(None, method=method, **options)
    tolerance = 1e-11 if method in ("rk4", "dopri5") else 1e-7
    for index, (one, other) in enumerate(zip(ours, alone, strict=True)):
        checks.below(float((one - other).norm() / other.norm()), tolerance, method, index)


@pytest.mark.mpi(min_size=2)
def test_what_ranks_return_is_compared() -> None:
    """Integrals of other shapes on other ranks, and an f of the wrong shape, are refused."""
    grid = Grid((7,), comm=comm)
    f, y0 = Ring(grid), grid.part(torch.linspace(-0.4, 1.0, 7, dtype=D))
    for what, kind, cost, slope in (
        ("number of cost integrals", pnode.ConfigurationError,
         lambda t, u: u.new_ones(1 + comm.rank), f),
        ("returned shape", pnode.PnodeError, lambda t, u: u.sum(), lambda t, u: u),
    ):  # fmt: skip
        solver = pnode.Solver(slope, cost=cost, layout=grid, method="rk4", step_size=0.1)
        try:
            with torch.no_grad():
                solver(y0, T)
        except kind as error:
            checks.true(what in str(error), what, error)
        else:
            checks.true(False, what, "was not refused")

"""A solution as a function of time, of a state that ranks share, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import Grid

D = torch.float64
CELLS = 12
ENDS = torch.tensor([0.0, 1.0], dtype=D)
TIMES = torch.tensor([[0.7, 0.2], [0.45, 1.0]], dtype=D)


def whole(own: torch.Tensor) -> torch.Tensor:
    """Return the parts of all ranks in one row, cells last."""
    return torch.cat([*comm.allgather(own.detach())], -1)


def found(alone: bool, layout: bool, method: str) -> list[torch.Tensor]:
    """Return values, slopes and ends of steps, and the gradients of a loss of all of them."""
    full = torch.linspace(0.1, 1.0, CELLS, dtype=D)
    a = torch.tensor(1.3, dtype=D, requires_grad=True)
    shared: dict[str, Any] = {}
    part = full
    if not alone and layout:
        shared["layout"] = Grid((CELLS,), comm=comm)
        part = shared["layout"].part(full)
    elif not alone:
        shared["comm"] = comm
        part = full.chunk(comm.size)[comm.rank]

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not layout:
            return -a * y**3 + torch.cos(t)
        y = torch.cat([y[-1:], y, y[:1]]) if alone else y
        return y[2:] - 2.0 * y[1:-1] + y[:-2] - a * y[1:-1] ** 3

    solver = pnode.Solver(
        f, params=[a], method=method, rtol=1e-5, atol=1e-5, dense=True, compile=False, **shared
    )
    y0, t = part.clone().requires_grad_(), TIMES.clone().requires_grad_()
    solution = solver(y0, ENDS, at="steps")
    values, slopes = solution(t), solution.derivative(t)
    loss = values.square().sum() + slopes.square().sum() + solution.ys.square().sum()
    by_y0, by_t, by_a = torch.autograd.grad(loss, (y0, t, a))
    shown = [values, slopes, solution.ys, by_y0]
    return [*(shown if alone else map(whole, shown)), solution.ts.detach(), by_t, by_a]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("layout", [False, True], ids=["comm", "grid"])
@pytest.mark.parametrize("method", ["verner6", "esdirk3", "esdirk6"])
def test_same_as_on_one_rank(method: str, layout: bool) -> None:
    ours, theirs = found(False, layout, method), found(True, layout, method)
    for one, other in zip(ours, theirs, strict=True):
        checks.true(one.shape == other.shape)
        checks.below(float((one - other).detach().norm() / other.detach().norm()), 1e-9)


def algebraic(alone: bool, hides: bool = False) -> list[torch.Tensor]:
    """Return outputs inside of steps, and gradients by y0, t and a parameter: of index 1."""
    a = torch.tensor(1.5, dtype=D, requires_grad=True)
    full = torch.linspace(0.5, 1.5, CELLS, dtype=D)
    part = full if alone else full.chunk(comm.size)[comm.rank]
    y0 = torch.stack([part, part**2 + 0.1], dim=1).requires_grad_()
    t = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=D, requires_grad=True)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = t.detach() if hides else t
        return torch.stack([torch.sin(t) - a * y[:, 0], y[:, 1] - y[:, 0] ** 2 - 0.1 * t.cos()], 1)

    solver = pnode.Solver(
        f, params=[a], mass=torch.tensor([1.0, 0.0], dtype=D).expand_as(y0), method="es325",
        step_size=0.25, dense=True, compile=False, comm=None if alone else comm,
    )  # fmt: skip
    ys = solver(y0, t).ys
    by_y0, by_t, by_a = torch.autograd.grad((ys**2).sum(), (y0, t, a))
    shown = [ys.mT, by_y0.mT]
    return [*(shown if alone else map(whole, shown)), by_t, by_a]


@pytest.mark.mpi(min_size=2)
def test_rates_of_algebraic_unknowns_are_those_on_one_rank() -> None:
    ours, theirs = algebraic(False), algebraic(True)
    inside = theirs[0].mT[1:3]
    y, t = inside[..., 0], torch.tensor([[0.3], [0.8]], dtype=D)
    checks.below(float((inside[..., 1] - y**2 - 0.1 * torch.cos(t)).abs().max()), 1e-3)
    for one, other in zip(ours, theirs, strict=True):
        checks.below(float((one - other).norm() / other.norm()), 1e-12)
    with pytest.raises(pnode.ConfigurationError, match="depends on t through a number"):
        algebraic(False, hides=comm.rank == 0)  # one rank's failure is that of all


@pytest.mark.mpi(min_size=2)
def test_all_ranks_ask_for_the_same() -> None:
    solver = pnode.Solver(lambda t, y: -y, comm=comm, dense=True, compile=False)
    solution = solver(torch.ones(2, dtype=D), ENDS)
    for t in (0.1 * (1 + comm.rank), 0.5 + comm.rank):  # another time; one of them outside
        with pytest.raises(pnode.ConfigurationError):
            solution(t)
    checks.below(float((solution(0.5) - torch.exp(torch.tensor(-0.5))).abs().max()), 1e-5)

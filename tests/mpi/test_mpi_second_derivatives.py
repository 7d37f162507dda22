"""Second derivatives of a state that ranks share, against those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import CASES, D, difference
from ranks import checks, comm

import pnode
from pnode.parallel import Grid, replicate, total

T = torch.tensor([0.0, 0.12, 0.3], dtype=D)
# Newton's method stops at 1e-10, GMRES at 1e-12.
EXACT, SOLVED = 1e-12, 1e-8


def measure(name: str, where: Any, form: str = "rhs", **options: Any) -> dict[str, torch.Tensor]:
    """Return gradient, Hessian product, tangent and third derivatives, of the whole problem."""
    case = CASES[name](where)
    arguments = dict(case.arguments)
    if form == "imex":
        del arguments["rhs"]
        arguments["implicit"], arguments["explicit"] = case.split
    (y0,) = case.y0
    solver = pnode.Solver(**arguments, **options)
    inputs = [y0, *case.parameters]
    along = [torch.cos(y0.detach()), *(torch.sin(1.0 + p.detach()) for p in case.parameters)]

    def whole(value: torch.Tensor) -> torch.Tensor:
        return value if where is None else total(value, where)

    def product(found: Any) -> torch.Tensor:
        """Of a gradient with the direction: a sum over ranks for the state alone."""
        own, *rest = ((g * v).sum() for g, v in zip(found, along, strict=True))
        return whole(own) + sum(rest)

    def loss() -> torch.Tensor:  # not linear in what is summed up
        ys = solver(y0, T).ys
        return whole((ys[-1] ** 2).sum() + (ys[1] ** 4).sum()).sin()

    first = torch.autograd.grad(loss(), inputs, create_graph=True)
    second = torch.autograd.grad(product(first), inputs, create_graph=True)
    third = torch.autograd.grad(product(second), inputs) if form == "third" else ()
    numbers = {"y0": case.gather(second[0])}
    numbers |= {f"p{i}": p.detach().reshape(-1) for i, p in enumerate(second[1:])}
    numbers |= {f"third{i}": p.reshape(-1) for i, p in enumerate(third[1:])}
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda y: solver(y, T).ys[-1], (y0.detach(),), (along[0],))
    return numbers | {"tangent": case.gather(tangent)}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "form", "options", "tolerance"),
    [
        ("ring", "rhs", {"method": "rk4"}, EXACT),
        ("plane", "rhs", {"method": "bosh3", "dense": True}, EXACT),
        ("graph", "rhs", {"method": "rk4", "memory": 1500}, EXACT),
        ("graph", "third", {"method": "heun2", "step_size": 0.1}, EXACT),
        ("graph", "rhs", {"method": "cn", "step_size": 0.15}, SOLVED),
        ("ring", "rhs", {"method": "es325", "jacobian": "sparse", "step_size": 0.3}, SOLVED),
        ("ring", "imex", {"method": "ars443", "step_size": 0.3}, SOLVED),
        ("graph", "rhs", {"method": "rodaspr", "step_size": 0.3}, SOLVED),
        ("graph", "rhs", {"method": "bdf2", "step_size": 0.2}, SOLVED),
        ("batch", "rhs", {"method": "rk4"}, EXACT),
        ("batch", "rhs", {"method": "cn", "jacobian": "block", "step_size": 0.15}, SOLVED),
    ],
)
def test_against_one_process(name: str, form: str, options: dict, tolerance: float) -> None:
    """Loss functions that are not linear in what the ranks add up, too."""
    options = {"step_size": 0.05} | options
    if "memory" in options:
        options["checkpointing"] = pnode.Checkpointing(memory=options.pop("memory"))
    ours, alone = measure(name, comm, form, **options), measure(name, None, form, **options)
    value, what = difference(ours, alone)
    checks.below(value, tolerance, name, options, what)


class Ring(torch.nn.Module):
    """Diffusion and a reaction on a ring; ``grid`` None: of one process."""

    def __init__(self, grid: Grid | None) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.8, 1.5], dtype=D))
        self.grid = grid

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """dy/dt of the owned cells."""
        if self.grid is None:
            u = torch.cat([u[-1:], u, u[:1]])
        own = u[1:-1]
        return self.rate[0] * (u[2:] - 2.0 * own + u[:-2]) - (self.rate[1] * own * t).sin()


def by_times(where: Any) -> list[torch.Tensor]:
    """Return second derivatives along the slope of a loss with respect to the times."""
    grid = None if where is None else Grid((7,), comm=where)
    f, whole = Ring(grid), torch.linspace(-0.4, 1.0, 7, dtype=D)
    y0 = (whole if grid is None else grid.part(whole)).clone().requires_grad_()
    t = T.clone().requires_grad_()
    solver = pnode.Solver(
        f, method="rk4", step_size=0.05, **({} if grid is None else {"layout": grid})
    )
    loss = (solver(y0, t).ys[1:] ** 3).sum()
    loss = loss if where is None else total(loss, where)
    (slope,) = torch.autograd.grad(loss, t, create_graph=True)
    tangent = torch.func.jvp(lambda t: solver(y0, t).ys, (t,), (torch.cos(T),))[1]
    moved = (tangent**2).sum()
    moved = moved if where is None else total(moved, where)
    found = []
    for value in ((slope * torch.cos(T)).sum(), moved):
        own, *rest = torch.autograd.grad(value, [y0, t, f.rate])
        found += [own if grid is None else grid.whole(own), *rest]
    return found


@pytest.mark.mpi
def test_second_derivatives_by_times() -> None:
    """The slopes of the outputs add up over the ranks, and so do their derivatives."""
    for index, (ours, alone) in enumerate(zip(by_times(comm), by_times(None), strict=True)):
        checks.below(float((ours - alone).norm() / alone.norm()), EXACT, index)


@pytest.mark.mpi(min_size=2)
def test_second_derivatives_by_times_are_refused_without_a_module() -> None:
    """A function that holds its parameters itself cannot be lent others; first ones are right."""
    w = torch.tensor(0.7, dtype=D, requires_grad=True)
    y0, t = torch.ones(2, dtype=D, requires_grad=True), T.clone().requires_grad_()
    solver = pnode.Solver(
        lambda t, y: w * y.sin(), params=[w], method="rk4", step_size=0.1, comm=comm
    )
    loss = total((solver(y0, t).ys ** 2).sum(), comm)
    slope, by_y0 = torch.autograd.grad(loss, [t, y0], create_graph=True)
    with torch.no_grad():
        exact = 2.0 * comm.size * (solver(y0, T).ys[-1] * w * solver(y0, T).ys[-1].sin()).sum()
    checks.below(abs(float(slope[-1].detach() - exact)), EXACT, "first")
    (second,) = torch.autograd.grad(by_y0.sum(), w, retain_graph=True)
    checks.true(bool(second.isfinite()), "by what is no time")
    try:
        torch.autograd.grad(slope.sum(), w)
    except pnode.BackwardError as error:
        checks.true("torch.nn.Module" in str(error), error)
    else:
        checks.true(False, "was not refused")


@pytest.mark.mpi
def test_sums_over_ranks_have_second_derivatives() -> None:
    """The transpose of a sum is a copy, that of a copy a sum, as often as wanted."""
    own = torch.linspace(0.5, 1.0, 3, dtype=D) + comm.rank
    x, p = own.clone().requires_grad_(), torch.tensor(0.3, dtype=D, requires_grad=True)

    def value(x: torch.Tensor, p: torch.Tensor, where: Any) -> torch.Tensor:
        if where is None:
            return ((p * x).sin().sum() ** 2).exp()
        return (total((replicate(p, where) * x).sin().sum(), where) ** 2).exp()

    found = _twice(value(x, p, comm), x, p, comm)
    rows = torch.cat([torch.linspace(0.5, 1.0, 3, dtype=D) + r for r in range(comm.size)])
    alone = _twice(value(rows.requires_grad_(), p, None), rows, p, None)
    alone[0] = alone[0].view(-1, 3)[comm.rank]
    for index, (ours, expected) in enumerate(zip(found, alone, strict=True)):
        checks.below(float((ours - expected).norm() / expected.norm()), 1e-13, index)


def _twice(value: torch.Tensor, x: torch.Tensor, p: torch.Tensor, where: Any) -> list[torch.Tensor]:
    by_x, by_p = torch.autograd.grad(value, [x, p], create_graph=True)
    own = (by_x**2).sum()
    return list(
        torch.autograd.grad((own if where is None else total(own, where)) + by_p.sin(), [x, p])
    )

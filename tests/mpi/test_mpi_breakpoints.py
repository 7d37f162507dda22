"""Break points of a state that ranks share, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode import controls
from pnode.parallel import Grid

D = torch.float64
TIMES = torch.tensor([0.0, 0.5, 1.2], dtype=D)
BREAKS = torch.tensor([0.4, 0.8], dtype=D)
VALUES = torch.tensor([1.0, -2.0, 0.5], dtype=D)
CELLS = 12


def whole(own: torch.Tensor) -> torch.Tensor:
    """Return the parts of all ranks in one row."""
    return torch.cat([*comm.allgather(own.detach())])


def gradients(alone: bool, layout: bool, times: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Return the last states and the gradients by y0, the breaks, the times and a parameter."""
    grid = None if alone or not layout else Grid((CELLS,), comm=comm)
    full = torch.linspace(0.1, 1.0, CELLS, dtype=D)
    if alone:
        part = full
    elif grid is not None:
        part = grid.part(full)
    else:
        part = full.chunk(comm.size)[comm.rank]
    a = torch.tensor(1.3, dtype=D, requires_grad=True)
    breaks, moving = BREAKS.clone().requires_grad_(), times.clone().requires_grad_()
    u = controls.hold(torch.cat([BREAKS[:1] - 1.0, BREAKS]), VALUES)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not layout:
            return -a * y**3 + u(t)
        y = torch.cat([y[-1:], y, y[:1]]) if alone else y
        return y[2:] - 2.0 * y[1:-1] + y[:-2] - a * y[1:-1] ** 3 + u(t)

    shared: dict[str, Any] = {}
    if not alone:
        shared = {"layout": grid} if layout else {"comm": comm}
    solver = pnode.Solver(f, params=[a], compile=False, **shared, **options)
    y0 = part.clone().requires_grad_()
    ys = solver(y0, moving, breakpoints=breaks).ys
    state, *others = torch.autograd.grad((ys**2).sum(), (y0, breaks, moving, a))
    if alone:
        return [ys[-1].detach(), state, *others]
    return [whole(ys[-1]), whole(state), *others]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (False, {"method": "dopri5"}),
        (False, {"method": "es325", "checkpointing": "1kB"}),
        (True, {"method": "rk4", "step_size": 0.05}),
    ],
    ids=["batch, dopri5", "batch, es325", "grid, rk4"],
)
def test_the_same_as_on_one_rank(layout: bool, options: dict[str, Any]) -> None:
    ours, theirs = (gradients(alone, layout, TIMES, **options) for alone in (False, True))
    for found, expected in zip(ours, theirs, strict=True):
        checks.below(float((found - expected).norm() / expected.norm()), 1e-8)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_uneven_parts_of_a_state_with_a_limit_of_memory(method: str) -> None:
    """All ranks keep and repeat the same steps, though one has much more to keep."""
    y0 = torch.linspace(1.0, 2.0, 20 if comm.rank == 0 else 2, dtype=D).requires_grad_()
    rate = torch.tensor(0.3, dtype=D, requires_grad=True)
    gradients = []
    for memory in ("2KiB", "1MiB"):
        solver = pnode.Solver(
            lambda t, y: torch.sin(3.0 * t) - rate * y**2, params=[rate], method=method,
            step_size=0.1, comm=comm, checkpointing=pnode.Checkpointing(memory=memory),
            jacobian="matrix-free",
        )  # fmt: skip
        solution = solver(y0, TIMES, breakpoints=BREAKS)
        gradients.append(torch.autograd.grad(solution.ys[-1].square().sum(), (y0, rate)))
        repeated = comm.allgather(solution.stats.backward.recomputed)
        checks.true(len(set(repeated)) == 1)
    for a, b in zip(*gradients, strict=True):
        checks.below(float((a - b).norm() / b.norm()), 1e-9)


@pytest.mark.mpi(min_size=2)
def test_what_ranks_disagree_about_is_refused_on_all() -> None:
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1, comm=comm, compile=False)
    y0 = torch.ones(2, dtype=D)
    different = [0.4] if comm.rank else None
    for given in (different, [0.4 + 0.1 * comm.rank]):
        with pytest.raises(pnode.ConfigurationError) as caught:
            solver(y0, TIMES, breakpoints=given)
        checks.true("breakpoints" in str(caught.value), caught.value)
    bad = [float("nan")] if comm.rank else [0.4]
    with pytest.raises(pnode.ConfigurationError) as caught:
        solver(y0, TIMES, breakpoints=bad)
    checks.true("NaN" in str(caught.value), caught.value)
    moving = torch.tensor([0.5], dtype=D, requires_grad=True)
    with pytest.raises(pnode.ConfigurationError) as caught:
        solver(y0, TIMES, breakpoints=moving)
    checks.true("an output is at a break" in str(caught.value), caught.value)


@pytest.mark.mpi(min_size=2)
def test_a_field_that_fails_in_a_later_part_fails_on_all() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if comm.rank == 1 and float(t) > 0.6:
            raise KeyError("gone")
        return -y

    solver = pnode.Solver(field, method="dopri5", comm=comm, compile=False)
    with pytest.raises(pnode.PnodeError) as caught:
        solver(torch.ones(2, dtype=D), TIMES, breakpoints=[0.4])
    checks.true("gone" in str(caught.value), caught.value)

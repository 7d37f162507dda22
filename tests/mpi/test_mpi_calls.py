"""``args`` of one call, and states of any structure, of a batch that the ranks share."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import broadcast_parameters, total

pytestmark = pytest.mark.mpi(min_size=2)
D = torch.float64
t = torch.tensor([0.0, 0.5, 1.0], dtype=D)
numbers = torch.linspace(-1.0, 1.0, 10, dtype=D)
batch = torch.complex(numbers, numbers.cos())
own = slice(comm.rank, None, comm.size)


def solve(part: slice, method: str, **options: object) -> tuple[torch.Tensor, ...]:
    """End state of this part of the batch, and gradients by its start and a parameter."""
    w = torch.tensor(0.3 - 0.4j, dtype=torch.complex128, requires_grad=True)
    z = batch[part].clone().requires_grad_()
    solver = pnode.Solver(
        lambda t, y, args: {"z": w * y["z"] * args["x"] - y["z"].conj() * torch.cos(t)},
        params=[w], method=method, **options,
    )  # fmt: skip
    end = solver({"z": z}, t, args={"x": numbers[part], "unused": 1}).ys["z"][-1]
    loss = end.abs().square().sum()
    loss = total(loss, comm) if "comm" in options else loss
    return (end.detach(), *torch.autograd.grad(loss, [z, w]))


@pytest.mark.parametrize("method", ["dopri5", "es325"])
def test_ranks_against_one(method: str) -> None:
    end, by_z, by_w = solve(own, method, rtol=1e-5, comm=comm)
    other = solve(slice(None), method, rtol=1e-5)
    for found, expected in zip((end, by_z, by_w), (other[0][own], other[1][own], other[2]),
                               strict=True):  # fmt: skip
        checks.true(torch.allclose(found, expected, rtol=1e-9, atol=1e-11), method, found, expected)


def test_gradients_of_args_are_refused() -> None:
    k = torch.tensor(0.5, dtype=D, requires_grad=True)
    solver = pnode.Solver(lambda t, y, k: -k * y, method="rk4", step_size=0.5, comm=comm)
    message = ""
    try:
        solver(numbers[own], t, args=k)
    except pnode.ConfigurationError as error:
        message = str(error)
    checks.true("args requires grad" in message, message)


@pytest.mark.parametrize("samples", ["joint", "independent"])
def test_parameters_with_other_values_on_other_ranks_are_refused(samples: str) -> None:
    """Mirrored ones too, whose sums agree; not those of one rank that nobody differentiates by."""
    k = torch.tensor([1.0, 2.0, 4.0], dtype=D)
    k = torch.nn.Parameter(k.flip(0) if comm.rank else k)
    solver = pnode.Solver(lambda t, y: -k.sum() * y, params=[k], comm=comm, samples=samples)
    y0, message = numbers[own, None], ""
    with torch.no_grad():
        solver(y0, t)
    try:
        solver(y0, t)
    except pnode.ConfigurationError as error:
        message = str(error)
    checks.true("parameter 0, of shape (3,)" in message, message)
    checks.true("add up to 7 on rank 0, 7 on rank 1" in message, message)
    broadcast_parameters([k], comm)
    with torch.no_grad():
        k.mul_(1 + 1e-9 * comm.rank)  # processors of different kinds
    total(solver(y0, t).ys[-1].sum(), comm).backward()
    expected = -(numbers.sum() * torch.exp(-7 * t[-1])) * torch.ones(3, dtype=D)
    checks.true(torch.allclose(k.grad, expected, rtol=1e-4, atol=1e-8), k.grad, expected)

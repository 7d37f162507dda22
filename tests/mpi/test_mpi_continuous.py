"""The continuous adjoint of a state that ranks share."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)


class Field(torch.nn.Module):
    """Samples that do not know of one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(3, 3, dtype=D)
        self.fails = False

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.fails and float(t) < 0.3:
            raise ValueError("as planned")
        return torch.tanh(self.layer(y)) * torch.cos(t) - 0.3 * y


def gradients(alone: bool, **options: object) -> list[torch.Tensor]:
    """Return the gradients by y0 (of all ranks), t and the parameters."""
    f = Field()
    torch.manual_seed(2)
    rows = torch.randn(5, 3, dtype=D)
    y0 = (rows if alone else rows.tensor_split(comm.size)[comm.rank]).clone().requires_grad_()
    t = T.clone().requires_grad_()
    solver = pnode.Solver(f, comm=None if alone else comm, gradient="continuous", **options)
    (solver(y0, t).ys ** 3).sum().backward()
    by_y0 = y0.grad if alone else torch.cat(comm.allgather(y0.grad))
    return [by_y0, t.grad, *(p.grad for p in f.parameters())]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"method": "rk4", "step_size": 0.05}, 1e-13),
        ({"method": "cn", "step_size": 0.05}, 1e-8),  # by what Newton's method leaves
        ({"method": "dopri5", "rtol": 1e-9, "atol": 1e-10}, 1e-8),  # other steps
    ],
)
def test_continuous_gradients_are_those_of_one_rank(options: dict, bound: float) -> None:
    for one, other in zip(gradients(False, **options), gradients(True, **options), strict=True):
        checks.below(float((one - other).norm() / other.norm()), bound, options)


@pytest.mark.mpi(min_size=2)
def test_a_failure_backwards_on_one_rank_is_one_on_all() -> None:
    f = Field()
    y0 = torch.ones(2, 3, dtype=D, requires_grad=True)
    solver = pnode.Solver(f, method="rk4", step_size=0.05, comm=comm, gradient="continuous")
    ys = solver(y0, T).ys
    f.fails = comm.rank == 1
    try:
        ys.sum().backward()
        checks.true(False, "nothing was raised")
    except (pnode.PnodeError, ValueError) as error:
        checks.true("as planned" in str(error) + str(error.__cause__), error)


@pytest.mark.mpi(min_size=2)
def test_the_kind_of_gradient_has_to_agree() -> None:
    kind = "continuous" if comm.rank else "discrete"
    solver = pnode.Solver(Field(), method="rk4", step_size=0.05, comm=comm, gradient=kind)
    try:
        solver(torch.ones(2, 3, dtype=D), T)
        checks.true(False, "nothing was raised")
    except pnode.ConfigurationError as error:
        checks.true("gradient differs" in str(error), error)

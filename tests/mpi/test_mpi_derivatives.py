"""Second derivatives, tangents and cost integrals of a state that ranks share."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import total

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)


class Field(torch.nn.Module):
    """Samples that do not know of one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(3, 3, dtype=D)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * torch.cos(t) - 0.3 * y


def own(rows: torch.Tensor, alone: bool) -> torch.Tensor:
    """Return this rank's rows."""
    return rows if alone else rows.tensor_split(comm.size)[comm.rank]


def measure(method: str, alone: bool, **options: object) -> list[torch.Tensor]:
    """Return a Hessian product, a tangent and cost integrals, those of all samples together."""
    f = Field()
    torch.manual_seed(2)
    rows, direction = torch.randn(6, 3, dtype=D), torch.randn(6, 3, dtype=D)
    y0 = own(rows, alone).clone().requires_grad_()
    solver = pnode.Solver(
        f, cost=lambda t, y: (y**2).sum(), method=method, comm=None if alone else comm, **options
    )
    inputs = [y0, *f.parameters()]
    along = [own(direction, alone), *(torch.ones_like(p) for p in f.parameters())]

    def loss() -> torch.Tensor:
        solution = solver(y0, T)
        return (solution.ys**3).sum() + solution.costs[-1]

    first = torch.autograd.grad(loss(), inputs, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(first, along, strict=True))
    second = torch.autograd.grad(product, inputs)
    _, tangent = torch.func.jvp(lambda y: solver(y, T).ys[-1], (y0.detach(),), (along[0],))
    costs = solver(y0, T).costs.detach()
    found = [second[0], tangent.detach()]
    if not alone:
        found = [torch.cat(comm.allgather(part)) for part in found]
        costs = total(costs, comm)
    return [*found, *second[1:], costs]


@pytest.mark.mpi
@pytest.mark.parametrize("method", ["rk4", "cn", "rodaspr", "bdf2"])
def test_against_one_process(method: str) -> None:
    """Newton's method stops at 1e-10 of each rank's, or of all."""
    pairs = zip(
        measure(method, False, step_size=0.1), measure(method, True, step_size=0.1), strict=True
    )
    for index, (ours, whole) in enumerate(pairs):
        value = float((ours - whole).norm() / whole.norm())
        checks.below(value, 1e-12 if method == "rk4" else 1e-7, method, index)


@pytest.mark.mpi
def test_adaptive_steps_do_not_count_integrals() -> None:
    """The error norm over all ranks is that of the states."""
    pairs = zip(
        measure("dopri5", False, rtol=1e-6), measure("dopri5", True, rtol=1e-6), strict=True
    )
    for index, (ours, whole) in enumerate(pairs):
        checks.below(float((ours - whole).norm() / whole.norm()), 1e-9, index)

"""``solution.stages()`` of a state that ranks share."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
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

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * torch.cos(t) - 0.3 * y


def start() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 3, dtype=D).tensor_split(comm.size)[comm.rank].clone().requires_grad_()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rk4", "step_size": 0.05},
        {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8},
        {"method": "es325", "step_size": 0.05},
        {"method": "bdf2", "step_size": 0.05},
        {"method": "rk4", "step_size": 0.01, "checkpointing": 2000},
    ],
)
def test_sum_over_stages_of_all_ranks_is_the_parameter_gradient(options: dict) -> None:
    f = Field()
    parameters = list(f.parameters())
    solution = pnode.Solver(f, comm=comm, **options)(start(), T)
    seeds = solution.ys.detach() ** 2
    total = [torch.zeros_like(p) for p in parameters]

    def add(stage: pnode.Stage) -> None:
        value = f(torch.tensor(stage.t, dtype=D), stage.state)
        for one, own in zip(total, torch.autograd.grad(value, parameters, stage.adjoint),
                            strict=True):  # fmt: skip
            one += own

    solution.stages(seeds, add)
    for one, p in zip(total, torch.autograd.grad(solution.ys, parameters, seeds), strict=True):
        comm.Allreduce(MPI.IN_PLACE, one.numpy(), MPI.SUM)
        checks.below(float((one - p).norm() / p.norm()), 1e-11, options)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("where", ["cotangents", "callback"])
def test_a_failure_on_one_rank_is_one_on_all(where: str) -> None:
    solution = pnode.Solver(Field(), method="rk4", step_size=0.05, comm=comm)(start(), T)
    seeds = solution.ys.detach()
    own = comm.rank == 1

    def stop(stage: pnode.Stage) -> None:
        if own and where == "callback":
            raise ValueError("as planned")

    try:
        solution.stages(seeds[:1] if own and where == "cotangents" else seeds, stop)
        checks.true(False, "nothing was raised")
    except (pnode.PnodeError, ValueError) as error:
        text = "as planned" if where == "callback" else "cotangents have shapes"
        checks.true(text in str(error) + str(error.__cause__), error)
    seen: list[pnode.Stage] = []
    solution.stages(seeds, seen.append)  # and it works afterwards
    checks.true(len(seen) == 4 * solution.stats.steps, len(seen))

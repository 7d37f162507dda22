"""Methods of the user's own, of a state that ranks share."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode

D = torch.float64
GAMMA = 1 - 2**-0.5
T = torch.tensor([0.0, 0.3, 0.6], dtype=D)


def measure(method: str, alone: bool) -> list[torch.Tensor]:
    """Return the last state of all samples and the gradients."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(3, 3, dtype=D)
    torch.manual_seed(2)
    rows = torch.randn(6, 3, dtype=D)
    y0 = (rows if alone else rows.tensor_split(comm.size)[comm.rank]).clone().requires_grad_()
    solver = pnode.Solver(
        lambda t, y: torch.tanh(layer(y)) * torch.cos(t), params=list(layer.parameters()),
        method=method, rtol=1e-5, atol=1e-5, comm=None if alone else comm,
        petsc_options={"snes_rtol": 1e-14},
    )  # fmt: skip
    ys = solver(y0, T).ys
    state, *parameters = torch.autograd.grad((ys**3).sum(), [y0, *layer.parameters()])
    found = [ys[-1].detach(), state]
    if not alone:
        found = [torch.cat(comm.allgather(part)) for part in found]
    return [*found, *parameters]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["shared_heun", "shared_alexander", "tsit5"])
def test_the_same_as_on_one_rank(method: str) -> None:
    pnode.tableau("shared_heun", [[], [1]], [1 / 2, 1 / 2], [0, 1], [1, 0])
    pnode.tableau(
        "shared_alexander", [[GAMMA], [1 - GAMMA, GAMMA]], [1 - GAMMA, GAMMA], embedded=[0.5, 0.5]
    )
    for ours, theirs in zip(measure(method, False), measure(method, True), strict=True):
        checks.below(float((ours - theirs).norm() / theirs.norm()), 1e-9)


@pytest.mark.mpi(min_size=2)
def test_other_coefficients_on_one_rank_are_refused() -> None:
    b = [1 / 2, 1 / 2] if comm.rank else [1 / 4, 3 / 4]
    c = 1.0 if comm.rank else 2 / 3
    pnode.tableau("different", [[], [c]], b)
    solver = pnode.Solver(lambda t, y: -y, method="different", step_size=0.1, comm=comm)
    with pytest.raises(pnode.ConfigurationError) as caught:
        solver(torch.ones(2, dtype=D), T)
    checks.true("method differs between the ranks" in str(caught.value), caught.value)

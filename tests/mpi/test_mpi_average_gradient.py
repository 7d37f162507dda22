"""Every rank solves its share of a batch; the sum equals the whole batch."""

from __future__ import annotations

import pytest
import torch
from ranks import comm

import pnode

generator = torch.Generator().manual_seed(0)
weight = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
batch = torch.randn(6, 3, generator=generator, dtype=torch.float64)
t = torch.tensor([0.0, 1.0])


def gradient(states: torch.Tensor, method: str) -> torch.Tensor:
    """Gradient of the batch's loss with respect to the weight."""
    solver = pnode.Solver(
        lambda t, y: torch.tanh(y @ weight), params=[weight], method=method, step_size=0.1
    )
    return torch.autograd.grad(solver(states, t).ys[-1].square().sum(), weight)[0]


@pytest.mark.mpi
# Newton's tolerance is relative to the first residual, of the share and of the whole.
@pytest.mark.parametrize(("method", "bound"), [("dopri5", 1e-12), ("cn", 1e-8)])
def test_ranks_with_their_own_batches_average_to_one_gradient(method: str, bound: float) -> None:
    share = gradient(batch[comm.rank :: comm.size], method)
    total = torch.empty_like(share)
    comm.Allreduce(share.numpy(), total.numpy())
    whole = gradient(batch, method)
    assert float((total - whole).norm() / whole.norm()) < bound

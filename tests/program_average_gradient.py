"""Run under mpiexec: every rank solves its share of a batch; the sum equals the whole batch."""

from __future__ import annotations

import torch
from mpi4py import MPI

import pnode

torch.set_num_threads(1)
comm = MPI.COMM_WORLD
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


for method in ("dopri5", "cn"):
    share = gradient(batch[comm.rank :: comm.size], method)
    total = torch.empty_like(share)
    comm.Allreduce(share.numpy(), total.numpy())
    whole = gradient(batch, method)
    difference = float((total - whole).norm() / whole.norm())
    # Newton's tolerance, relative to the first residual of the share and of the whole.
    assert difference < (1e-12 if method == "dopri5" else 1e-8), (method, difference)

if comm.rank == 0:
    print(f"ranks {comm.size}")

"""Hundreds of solves do not grow, and pnode.parallel beside torch.distributed."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.errors import ConfigurationError
from pnode.parallel import (
    GhostLayout,
    Grid,
    broadcast_parameters,
    init_process_group,
    replicate,
    sum_gradients,
    total,
)

pytestmark = pytest.mark.mpi(min_size=2, max_size=2)
D = torch.float64
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Resident memory in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def test_solves_do_not_grow() -> None:
    """One solver hundreds of times, then new ones, with gradients; 2.6 or 10 KiB per solve.

    What a solve leaks, a vector or a communicator, is more: MPI has 2,000 of these at most.
    """
    grid = Grid((8,), comm=comm)
    w = torch.tensor(0.5, dtype=D, requires_grad=True)
    y0 = grid.part(torch.linspace(0.0, 1.0, 8, dtype=D))
    t = torch.tensor([0.0, 0.1])

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return w * (u[2:] - 2.0 * u[1:-1] + u[:-2])

    def solve(solver: pnode.Solver) -> None:
        total(solver(y0, t).ys[-1].sum(), comm).backward()

    for method in ("rk4", "dopri5"):
        step = 0.05 if method == "rk4" else None
        solver = pnode.Solver(field, params=[w], method=method, step_size=step, layout=grid)
        for _ in range(60):
            solve(solver)
        before = resident()
        for _ in range(200):
            solve(solver)
        checks.below(resident() - before, 0.5, "growth", method, "MiB")
    for rounds in (40, 100):  # the first of them to warm up
        before = resident()
        for index in range(rounds):
            method, jacobian = (("cn", "sparse"), ("rk4", "auto"))[index % 2]
            layout = Grid((8,), comm=comm) if index % 3 else grid
            solve(
                pnode.Solver(
                    field, params=[w], method=method, step_size=0.1, layout=layout,
                    jacobian=jacobian,
                )
            )  # fmt: skip
            GhostLayout(2, [0], comm=comm)
    checks.below(resident() - before, 1.0, "growth with new solvers", "MiB")


def test_sums_and_sums_of_gradients() -> None:
    """Sums that autograd knows of, and those of gradients."""
    rank, size = comm.rank, comm.size
    a = torch.tensor([1.0 + rank, 2.0], dtype=D, requires_grad=True)
    p = torch.tensor([3.0, 5.0], dtype=D, requires_grad=True)
    s = total(a * replicate(p, comm), comm)
    (s**2).sum().backward()
    whole = torch.stack([sum(1.0 + r for r in range(size)) * p[0], 2.0 * size * p[1]]).detach()
    checks.true(torch.equal(s.detach(), whole), "total", s)
    checks.below(float((a.grad - 2.0 * whole * p.detach()).abs().max()), 1e-12, "of total")
    # d/dp (c p)^2 = 2 c^2 p, c the sum of the ranks' a.
    expected = 2.0 * whole**2 / p.detach()
    checks.below(float((p.grad - expected).abs().max()), 1e-12, "of replicate")

    q = [torch.zeros(2, dtype=D), torch.zeros(3), torch.zeros(1, dtype=D)]
    for tensor in q:
        tensor.requires_grad_()
    q[0].grad = torch.full((2,), 1.0 + rank, dtype=D)
    if rank == 0:  # None on the others
        q[1].grad = torch.ones(3)
    sum_gradients(q, comm)
    checks.true(q[0].grad.tolist() == [size * (size + 1) / 2] * 2, "sum", q[0].grad)
    checks.true(q[1].grad.tolist() == [1.0] * 3 and q[1].grad.dtype is torch.float32, "None")
    checks.true(q[2].grad is None, "None on all")
    sum_gradients(q[:1], comm, average=True)
    checks.true(q[0].grad.tolist() == [size * (size + 1) / 2] * 2, "average", q[0].grad)

    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        module[0].weight.fill_(float(rank))
        module[1].running_mean.fill_(float(rank))
    broadcast_parameters(module, comm, root=size - 1)
    checks.true(bool((module[0].weight == size - 1).all()), "broadcast")
    checks.true(bool((module[1].running_mean == size - 1).all()), "broadcast of buffers")
    if size > 1:
        for function in (sum_gradients, broadcast_parameters):
            try:
                function(q if rank else q[:2], comm)
                checks.true(False, "different parameters were accepted")
            except ConfigurationError as error:
                checks.true("differ between the ranks" in str(error), error)


class Decay(torch.nn.Module):
    """A module that solves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(comm.rank)  # DistributedDataParallel takes those of rank 0
        self.field = torch.nn.Sequential(
            torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        ).double()
        self.solver = pnode.Solver(
            lambda t, y: self.field(y), params=self.field.parameters(), method="dopri5"
        )

    def forward(self, y0: torch.Tensor) -> torch.Tensor:
        return self.solver(y0, torch.tensor([0.0, 1.0])).ys[-1]


def test_distributed_data_parallel() -> None:
    """DistributedDataParallel around a solve: the average of the ranks' own gradients."""
    init_process_group(comm)
    try:
        init_process_group(comm)
        checks.true(False, "started twice")
    except ConfigurationError as error:
        checks.true("already" in str(error), error)
    own = Decay()
    wrapped = torch.nn.parallel.DistributedDataParallel(own)
    data = torch.randn(3, 2, generator=torch.Generator().manual_seed(9 + comm.rank), dtype=D)
    for _ in range(2):
        wrapped(data).square().mean().backward()
    averaged = [p.grad.clone() for p in own.parameters()]
    own.zero_grad()
    for _ in range(2):
        own(data).square().mean().backward()
    sum_gradients(own, comm, average=True)
    for ours, theirs in zip(own.parameters(), averaged, strict=True):
        error = float((ours.grad - theirs).norm() / ours.grad.norm())
        checks.below(error, 1e-12, "DistributedDataParallel")
    comm.Barrier()
    torch.distributed.destroy_process_group()

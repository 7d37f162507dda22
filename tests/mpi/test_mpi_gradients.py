"""Outputs and gradients over ranks against one rank, and without layouts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from distributed import CASES, SELF, WORLD, D, difference, results
from ranks import checks, comm

import pnode
from pnode.parallel import Grid, replicate, total
from pnode.testing import taylor_test


def compare(bound: float, name: str, serial: dict | None = None, **options: object) -> None:
    """Numbers over the ranks against those of one rank, and of one process without layout.

    ``serial`` are options of the latter that differ.
    """
    ours, stats = results(name, WORLD, **options)
    whole, whole_stats = results(name, None, **(options | (serial or {})))
    pairs = [("no layout", whole, whole_stats)]
    if comm.size > 1 and serial is None:
        pairs.append(("one rank", *results(name, SELF, **options)))
    for what, other, other_stats in pairs:
        value, worst = difference(ours, other)
        checks.below(value, bound, name, options, what, worst)
        checks.true(stats.steps == other_stats.steps, name, options, what, "steps")


@pytest.mark.mpi
def test_explicit_methods() -> None:
    """Sums over the ranks differ in their order alone: 1e-12."""
    for name in CASES:
        for method in ("rk4", "dopri5", "ssprk43"):
            compare(1e-12, name, method=method, step_size=0.05)
    for method in ("velocity_verlet", "forest_ruth"):
        compare(1e-12, "pair", method=method, step_size=0.05)
    for name in CASES:  # the error norm is rounded, and with it the lengths of the steps
        compare(1e-12, name, method="dopri5", rtol=1e-6)
    compare(1e-12, "ring", method="bosh3", rtol=1e-6, controller="pi")
    compare(1e-12, "batch", method="dopri5", rtol=1e-6, dense=True)
    for name in ("plane", "batch"):
        for step in (0.05, None):
            compare(1e-5, name, method="dopri5", dtype=torch.float32, step_size=step, rtol=1e-3)


@pytest.mark.mpi(min_size=2, max_size=2)
def test_implicit_methods() -> None:
    """Newton stops at 1e-11 of its first residual or at steps of 1e-10, adjoint solves at 1e-12.

    What the errors of up to 8 stages and 6 steps may come to: 1e-8. That of the references, whose
    Jacobian is dense, is far less.
    """
    bound = 1e-8
    dense = {"jacobian": "dense"}
    for name in ("ring", "batch"):
        for jacobian in ("auto", "sparse", "matrix-free"):
            for method in ("cn", "es325", "rodaspr", "bdf2"):
                if jacobian == "auto" and method != "cn":  # one of the two others, by the size
                    continue
                options = {"method": method, "jacobian": jacobian, "step_size": 0.1}
                compare(bound, name, dense, **options)
        compare(bound, name, dense, method="esdirk6", step_size=0.1)
        compare(bound, name, method="ark3", form="imex", step_size=0.1)
        compare(bound, name, dense, method="cn", form="mass", step_size=0.1)
        compare(bound, name, dense, method="bdf2", form="mass", step_size=0.1)
        compare(bound, name, dense, method="es325", form="mass", step_size=0.1, dense=True)
        compare(bound, name, dense, method="rodaspr", form="mass", step_size=0.1)
    for jacobian in ("auto", "sparse", "matrix-free"):
        compare(bound, "plane", dense, method="beuler", jacobian=jacobian, step_size=0.1)
    compare(bound, "graph", dense, method="cn", jacobian="sparse", step_size=0.1)
    compare(bound, "batch", dense, method="cn", jacobian="block", step_size=0.1)
    compare(bound, "pair", dense, method="implicit_midpoint", step_size=0.1)
    for name in ("ring", "batch"):  # adaptive
        compare(bound, name, dense, method="es325", rtol=1e-5)
        compare(bound, name, dense, method="rodaspr", rtol=1e-5)
        # Its Newton stops at a part of rtol: the same Jacobian on both sides.
        same = "matrix-free" if name == "ring" else "sparse"
        compare(bound, name, method="bdf", jacobian=same, rtol=1e-5)
        compare(bound, name, method="ark3", form="imex", rtol=1e-5)
    # Newton stops at 1e-6 and 1e-5, in single precision.
    compare(1e-4, "ring", dense, method="cn", dtype=torch.float32, step_size=0.05)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize(
    ("method", "jacobian"), [("dopri5", "auto"), ("cn", "sparse"), ("rodaspr", "auto")]
)
def test_taylor(method: str, jacobian: str) -> None:
    """Remainders of a loss over the ranks fall as h^2, along y0, the parameters and t."""
    grid = Grid((10,), boundary="mirror", comm=comm)
    w = torch.tensor([0.4, -0.3, 0.2], dtype=D, requires_grad=True)
    whole = torch.linspace(0.0, 1.0, 10, dtype=D).requires_grad_()
    t = torch.tensor([0.0, 0.2, 0.4], dtype=D, requires_grad=True)

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        windows = torch.stack([u[:-2], u[1:-1], u[2:]], -1)
        return torch.tanh(windows @ w) * torch.cos(t) - u[1:-1] ** 3

    solver = pnode.Solver(
        field, params=[w], method=method, step_size=0.1, layout=grid, jacobian=jacobian
    )

    def loss() -> torch.Tensor:
        # The whole state, the same on all ranks, of which each takes its part.
        ys = solver(grid.part(replicate(whole, comm)), t).ys
        own = (ys[1] ** 3).sum() + (ys[-1] * grid.part(replicate(whole, comm))).sum()
        return total(own, comm)

    for inputs in ([whole, w], [w]) if method == "dopri5" else ([whole, w],):
        result = taylor_test(loss, inputs, size=1e-2, halvings=3)
        checks.below(1.9, result.order, "Taylor", method, result)
        rates = comm.allgather(result.rates)
        checks.true(rates.count(rates[0]) == comm.size, "Taylor on all ranks", rates)
    # Times are moved along the exact flow, which the steps follow to their order.
    if method == "dopri5":
        result = taylor_test(loss, [t], size=4e-2, halvings=2)
        checks.below(1.8, result.order, "Taylor", method, "t", result)


@pytest.mark.mpi(min_size=2)
def test_checkpoints(shared_folder: Path) -> None:
    """Limits and disk: the same gradients, the same repeated steps on uneven shards, no files."""
    for name, method, size in (
        ("ring", "rk4", 8 * -(-13 // comm.size)), ("batch", "dopri5", 24 * -(-7 // comm.size)),
        ("batch", "cn", 24 * -(-7 // comm.size)), ("batch", "rodaspr", 24 * -(-7 // comm.size)),
    ):  # fmt: skip
        options = {"method": method, "step_size": 0.02}
        unlimited, _ = results(name, WORLD, **options)
        room = 9 * size  # one checkpoint of the stages fits
        for disk in (None, shared_folder):
            limits = pnode.Checkpointing(memory=room, disk=disk)
            ours, stats = results(name, WORLD, **options, checkpointing=limits)
            value, worst = difference(ours, unlimited)
            # Repeated steps start from a fresh f, or a Newton guess, of the same state.
            checks.below(value, 1e-12, "checkpoints", name, method, disk is None, worst)
            checks.true(stats.ram_bytes <= room, "limit", name, method, stats.ram_bytes)
            repeated = comm.allgather((stats.backward.recomputed, stats.steps))
            checks.true(len(set(repeated)) == 1, "the same schedule", name, method, repeated)
            used = stats.disk_bytes if disk else repeated[0][0]
            checks.true(used > 0, "the limit did not matter", name, method, disk is None)
            comm.Barrier()
            checks.true(not os.listdir(shared_folder), "files are left", os.listdir(shared_folder))
            comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["cn", "es325"])
@pytest.mark.parametrize("disk", [False, True])
def test_ranks_that_keep_checkpoints_in_different_ways(method, disk, shared_folder) -> None:
    """Some of one cell more, which is too much for a slab, and for the memory of a rank.

    Tensors that steps share on one rank are copies on another; they exchange ghost cells all the
    same.
    """
    grid = Grid((256 * comm.size + 1,), comm=comm)
    w = torch.tensor(0.7, dtype=D, requires_grad=True)

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 0.1 * w * (u[2:] - 2.0 * u[1:-1] + u[:-2]) - u[1:-1] ** 3

    y0 = torch.linspace(0.1, 1.0, *grid.shape, dtype=D)
    memory = 9 * 257 * y0.element_size()
    folder = str(shared_folder) if disk else None
    found = []
    for limit in (None, pnode.Checkpointing(memory, disk=folder)):
        solver = pnode.Solver(
            field, params=[w], layout=grid, method=method, step_size=0.1,
            jacobian="matrix-free", checkpointing=limit,
        )  # fmt: skip
        solution = solver(y0, torch.tensor([0.0, 1.0], dtype=D))
        loss = total(solution.ys[-1].square().sum(), comm)
        found.append(torch.autograd.grad(loss, w)[0])
    backward = solution.stats.backward
    checks.true(backward.recomputed > 0 or backward.disk_bytes > 0 or solution.stats.disk_bytes > 0)
    checks.below(float((found[1] - found[0]).abs() / found[0].abs()), 1e-12, method, disk)

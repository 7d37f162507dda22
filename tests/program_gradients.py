"""Run under mpiexec: outputs and gradients over ranks against one rank, and without layouts."""

from __future__ import annotations

import os
import sys
import tempfile

import torch
from distributed import CASES, SELF, WORLD, D, difference, results
from launch import Checks

import pnode
from pnode.parallel import Grid, replicate, total
from pnode.testing import taylor_test

torch.set_num_threads(1)
comm = WORLD
checks = Checks(comm)


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
        if VERBOSE and comm.rank == 0:
            print(f"{value:.1e} {worst:5s} {name} {options} {what} {stats.steps}", flush=True)


VERBOSE = "-v" in sys.argv


def explicit() -> None:
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


explicit()
checks.finish()

"""examples/training.py on several ranks: interrupted by a signal on one, and taken up again."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode import parallel

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "training.py"
TIMES = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)


def load():
    spec = importlib.util.spec_from_file_location("training_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.mpi(max_size=2)
def test_a_training_goes_on_bit_for_bit_after_a_signal():
    training = load()

    def train(folder, name, stop_at=0):
        """Learn a decay from starts that the ranks share out."""
        rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        generator = torch.Generator().manual_seed(1)  # the same on all ranks, as it is saved once
        solver = pnode.Solver(
            lambda t, y: -rate * y, params=[rate], method="cn", step_size=0.5, compile=False,
            comm=comm,
        )  # fmt: skip
        calls = []

        def loss():
            calls.append(comm.rank)
            if len(calls) == stop_at and comm.rank == comm.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            y0 = torch.rand(6, 1, generator=generator, dtype=torch.float64)[comm.rank :: comm.size]
            found = solver(y0, TIMES).ys - y0 * torch.exp(-TIMES[:, None, None])
            return parallel.mean(found.square(), comm)

        options = argparse.Namespace(
            name=name, output=folder, resume=True, tensorboard=False, iterations=6,
            settings={"name": name},
        )  # fmt: skip
        found = training.train([rate], loss, options, generator=generator, comm=comm)
        return found.losses, rate.detach().clone(), len(calls)

    with tempfile.TemporaryDirectory() as own:
        folder = Path(comm.bcast(own))
        expected = train(folder, "whole")
        with pytest.raises(training.Interrupted, match="SIGTERM after iteration 3"):
            train(folder, "parts", stop_at=3)
        comm.barrier()
        found = train(folder, "parts")
        comm.barrier()
    checks.true(found[2] == 3, "iterations that were left")
    checks.true(torch.equal(found[1], expected[1]), found[1], expected[1])
    checks.true(found[0] == expected[0], "losses")

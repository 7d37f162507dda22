"""examples/restart.py: interrupted by a signal on one rank, and taken up again."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import checks, comm

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "restart.py"


def load():
    spec = importlib.util.spec_from_file_location("restart_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.mpi(max_size=2)
def test_a_training_goes_on_bit_for_bit_after_a_signal(monkeypatch):
    restart = load()
    before, batch = signal.getsignal(signal.SIGTERM), restart.batch
    begun = []

    def interrupted(iteration, rank):
        begun.append(iteration)
        if len(begun) == 3 and rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(iteration, rank)

    with tempfile.TemporaryDirectory() as own:
        folder = Path(comm.bcast(own))
        try:
            whole = restart.train(folder / "whole.pt", 5)
            monkeypatch.setattr(restart, "batch", interrupted)
            parts = [restart.train(folder / "parts.pt", 5) for _ in range(2)]
        finally:
            signal.signal(signal.SIGTERM, before)
        comm.barrier()
        checks.true(whole and parts == [False, True] and begun == [0, 1, 2, 3, 4], begun)
        one, other = (torch.load(folder / name) for name in ("whole.pt", "parts.pt"))
        comm.barrier()
    for name, value in one["field"].items():
        checks.true(torch.equal(value, other["field"][name]), name)

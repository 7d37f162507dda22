"""A training that is interrupted on several ranks, each with generators of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import checks, comm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
training = importlib.import_module("training")


class Noisy:
    """A weight that follows what all ranks draw, each from torch's generator and its own."""

    def __init__(self, folder: Path, resume: bool, stop_at: int = -1) -> None:
        torch.manual_seed(5 + comm.rank)
        self.generator = torch.Generator().manual_seed(7 + comm.rank)
        self.weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.drawn: list[list[float]] = []
        self.stop_at = stop_at
        self.options = argparse.Namespace(
            output=folder, name="noisy", resume=resume, settings={}, iterations=8, tensorboard=False
        )

    def loss(self) -> torch.Tensor:
        if len(self.drawn) + 1 == self.stop_at and comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.drawn.append([float(torch.rand(())), float(torch.rand((), generator=self.generator))])
        target = sum(comm.allgather(torch.tensor(self.drawn[-1], dtype=torch.float64)))
        return (self.weight - target).square().sum()

    def train(self) -> training.Training:
        return training.train(
            [self.weight], self.loss, self.options, generator=self.generator, comm=comm
        )


@pytest.mark.mpi(min_size=2)
def test_each_rank_goes_on_with_its_own_generators(tmp_path: Path) -> None:
    folder = Path(comm.bcast(str(tmp_path)))
    whole = Noisy(folder, False)
    expected = whole.train()
    first = Noisy(folder, False, stop_at=3)
    with pytest.raises(training.Interrupted):
        first.train()
    comm.barrier()
    second = Noisy(folder, True)
    found = second.train()
    checks.true(first.drawn + second.drawn == whole.drawn, second.drawn, whole.drawn)
    checks.true(found.losses == expected.losses and torch.equal(second.weight, whole.weight))
    comm.barrier()
    alone = Noisy(folder, True)
    with pytest.raises(training.UsageError, match=f"saved by {comm.size} ranks") as caught:
        training.train([alone.weight], alone.loss, alone.options, comm=training.MPI.COMM_SELF)
    checks.true("as many" in str(caught.value))

"""A training on several ranks that ends at a SIGTERM and goes on where it was, bit for bit.

    mpiexec -n 2 python examples/restart.py --folder run     # the same command goes on
    kill -TERM PID_OF_ONE_RANK

A scheduler sends SIGTERM to the ranks some time before it ends a job (Slurm: ``--signal=TERM@120``).
Python's handler notes it between two instructions; after the iteration all ranks agree on whether
one of them has heard it, rank 0 writes parameters, optimizer and iteration into a new file that
takes the old one's place, and all end with exit code 75, which a job script may take for "again".
Each rank's data follow from its number and the iteration, so that nothing else has to be kept.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
from mpi4py import MPI

import pnode
from pnode import parallel

AGAIN = 75
TIMES = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


class Field(torch.nn.Module):
    """A small network as vector field."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ).double()

    def forward(self, t, y):
        return self.net(y)


def batch(iteration, rank):
    """Starts and ends of turns by one radian."""
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    start = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    angles = TIMES[:, None]
    x, y = start.T
    turned = (x * angles.cos() - y * angles.sin(), x * angles.sin() + y * angles.cos())
    return start, torch.stack(turned, -1)


def save(path, state):
    """Write a file that is there as a whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(path, iterations, comm=MPI.COMM_WORLD):
    """Go on until the last iteration, or a signal; return whether the last one is done."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    field = Field()
    solver = pnode.Solver(field, method="cn", step_size=0.25, jacobian="block", compile=False)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.01)
    first = 0
    if path.exists():
        state = torch.load(path)
        field.load_state_dict(state["field"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["iteration"]
    print(f"rank {comm.rank}, process {os.getpid()}: from iteration {first}", flush=True)
    for iteration in range(first, iterations):
        start, expected = batch(iteration, comm.rank)
        optimizer.zero_grad()
        loss = (solver(start, TIMES).ys - expected).square().mean()
        loss.backward()
        parallel.sum_gradients(field, comm, average=True)
        optimizer.step()
        done = iteration + 1
        stop = comm.allreduce(bool(heard), MPI.LOR)  # all at the same iteration
        if comm.rank == 0:
            print(f"iteration {done}: {loss.item():.6f}", flush=True)
            if stop or done == iterations:
                save(path, {"field": field.state_dict(), "optimizer": optimizer.state_dict(),
                            "iteration": done})  # fmt: skip
        if stop:
            return done == iterations
    return True


def main():
    """Run."""
    parser = argparse.ArgumentParser(description="A training that is interrupted and goes on.")
    parser.add_argument("--folder", type=Path, default=Path("restart"))
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return 0 if train(arguments.folder / "state.pt", arguments.iterations) else AGAIN


if __name__ == "__main__":
    sys.exit(main())

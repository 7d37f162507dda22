"""Van der Pol oscillators of mixed stiffness: steps of their own, one joint state, and a loop.

python benchmarks/samples.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

import pnode

PEERS = ("torchode", "diffrax")


def oscillators(rows: int) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Return f and y0 of oscillators whose damping grows from 0.1 to 20 with the row."""
    damping = torch.logspace(-1, 1.3, rows, dtype=torch.float64)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, v, mu = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x, torch.zeros_like(mu)], dim=-1)

    start = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(rows, 2)
    return f, torch.cat([start, damping[:, None]], dim=1)


def measure(rows: int, loop: bool) -> None:
    """Print the time of a solve with its gradient, and the evaluations and steps of each way."""
    f, start = oscillators(rows)
    times = torch.linspace(0.0, 20.0, 5, dtype=torch.float64)
    options = {"rtol": 1e-6, "atol": 1e-8, "compile": False}
    own, joint = pnode.Solver(f, samples="independent", **options), pnode.Solver(f, **options)
    ways = {"independent": lambda y: [own(y, times)], "joint": lambda y: [joint(y, times)]}
    if loop:
        ways["loop"] = lambda y: [joint(row, times) for row in y]
    for name, way in ways.items():
        y0 = start.clone().requires_grad_()
        began = time.perf_counter()
        solutions = way(y0)
        solved = time.perf_counter()
        sum(one.ys.sum() for one in solutions).backward()
        ended = time.perf_counter()
        counts = [sum(getattr(one.stats, key) for one in solutions) for key in ("rhs", "steps")]
        print(
            f"{rows:5d} {name:12s} {solved - began:8.3f} s {ended - solved:8.3f} s backward, "
            f"{counts[0]} calls of f, {counts[1]} steps",
            flush=True,
        )


def main() -> None:
    """Measure 64 and 1,000 oscillators; the loop only over 64."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 oscillators alone")
    quick = parser.parse_args().quick
    for peer in PEERS:
        found = "installed, but not compared here" if find_spec(peer) else "not installed"
        print(f"{peer}: {found}")
    for rows in (8,) if quick else (64, 1000):
        measure(rows, loop=rows < 1000)


if __name__ == "__main__":
    main()

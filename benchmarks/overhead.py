"""Wall time of a gradient against the bare torch calls it is made of.

A dopri5 gradient over N fixed steps evaluates f 6N + 1 times without a graph and takes 6N VJPs.
The floor is the time torch needs for exactly these calls and nothing else. Gradients and floor are
timed in turn, in one process, on one thread; the figures are medians.

    python benchmarks/overhead.py [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

import pnode

WORKLOADS = {"2-50-2": (2, 50, 20, 40), "64-256-64": (64, 256, 256, 20)}


class TanhNet(torch.nn.Module):
    """A tanh network with one hidden layer."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(size, width), torch.nn.Tanh(), torch.nn.Linear(width, size)
        ).double()

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dy/dt."""
        return self.layers(y)


def measure(size: int, width: int, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """Time one workload; microseconds per stage, and the median of the pairwise ratios."""
    torch.manual_seed(0)
    field = TanhNet(size, width)
    y0 = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    cotangent = torch.randn_like(y0)
    parameters = tuple(field.parameters())
    solver = pnode.Solver(field, method="dopri5", step_size=1.0 / steps, compile=False)

    def gradient() -> None:
        for parameter in parameters:
            parameter.grad = None
        solver(y0, t).ys[-1].square().sum().backward()

    def bare() -> None:
        with torch.no_grad():
            for _ in range(6 * steps + 1):
                field(zero, y0)
        for _ in range(6 * steps):
            u = y0.detach().clone().requires_grad_()
            torch.autograd.grad(field(zero, u), (u, *parameters), cotangent)

    def seconds(function: object) -> float:
        start = time.perf_counter()
        function()  # type: ignore[operator]
        return time.perf_counter() - start

    gradient(), bare()
    pairs = [(seconds(gradient), seconds(bare)) for _ in range(repeats)]
    ratios = [ours / floor for ours, floor in pairs]
    per_stage = 1e6 / (6 * steps)
    return {
        "gradient_us": statistics.median(ours for ours, _ in pairs) * per_stage,
        "bare_us": statistics.median(floor for _, floor in pairs) * per_stage,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    """Run all workloads and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'network':>12} {'gradient':>12} {'bare torch':>12} {'ratio':>7}  (min to max)")
    results = {}
    for name, (size, width, batch, steps) in WORKLOADS.items():
        result = measure(size, width, batch, steps, arguments.repeats)
        results[name] = result
        print(
            f"{name:>12} {result['gradient_us']:>9.1f} us {result['bare_us']:>9.1f} us "
            f"{result['ratio']:>7.2f}  ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})"
            "   per stage: one f and one VJP"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

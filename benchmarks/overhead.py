"""Time of a gradient against the bare torch calls it is made of.

A dopri5 gradient over N fixed steps evaluates f 6N + 1 times without a graph and takes 6N VJPs.
The floor is the time torch needs for exactly these calls and nothing else. Gradients and floor are
timed in turn, in one process, on one thread; the figures are medians.

Then what a solve costs once, on the smallest network: a few steps, and none (one output time), with
the least CPU time of all repetitions; and a gradient by five million parameters against
backpropagation through the same loop.

    python benchmarks/overhead.py [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
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


def processor(function: Callable[[], object]) -> float:
    """CPU time of a call, in seconds."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure_solve(method: str, stages: int, steps: int, repeats: int) -> dict[str, float]:
    """Time solves of ``steps`` steps: microseconds, and those of the bare calls."""
    torch.manual_seed(0)
    field = TanhNet(2, 50)
    y0 = torch.randn(20, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0] if steps else [0.0], dtype=torch.float64)
    zero, parameters = torch.zeros((), dtype=torch.float64), tuple(field.parameters())
    solver = pnode.Solver(field, method=method, step_size=1.0 / max(steps, 1), compile=False)

    def forward() -> None:
        with torch.no_grad():
            solver(y0, t)

    def gradient() -> None:
        for parameter in parameters:
            parameter.grad = None
        solver(y0, t).ys[-1].square().sum().backward()

    def bare() -> None:
        with torch.no_grad():
            for _ in range(stages * steps):
                field(zero, y0)

    def bare_gradient() -> None:
        for _ in range(stages * steps):
            u = y0.clone().requires_grad_()
            torch.autograd.grad(field(zero, u), (u, *parameters), y0)

    calls = {"forward": forward, "f": bare, "gradient": gradient, "f and VJP": bare_gradient}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(5, 20 * repeats // max(steps, 1))):
        for name, call in calls.items():
            found[name].append(processor(call))
    return {name: 1e6 * min(seconds) for name, seconds in found.items()}


def measure_parameters(dtype: torch.dtype, batch: int, repeats: int) -> dict[str, float]:
    """Return median ratios to backpropagation with five million parameters, five rk4 steps."""
    width, steps = 2236, 5
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, width).to(dtype)
    y0, t = torch.randn(batch, width, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(y))

    f, h = Field(), 1.0 / steps
    solvers = [pnode.Solver(f, method="rk4", step_size=h, compile=one) for one in (False, True)]

    def gradient(solver: pnode.Solver) -> None:
        f.zero_grad()
        solver(y0, t).ys[-1].square().sum().backward()

    def backpropagation() -> None:
        f.zero_grad()
        y = y0
        for _ in range(steps):
            k1 = f(t[0], y)
            k2 = f(t[0], y + h / 2 * k1)
            k3 = f(t[0], y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(t[0], y + h * k3))
        y.square().sum().backward()

    calls = [backpropagation, *(partial(gradient, solver) for solver in solvers)]
    for call in calls:
        call()
    rounds = [[processor(call) for call in calls] for _ in range(repeats)]
    ratios = [statistics.median(r[i] / r[0] for r in rounds) for i in (1, 2)]
    return dict(zip(("not compiled", "compiled"), ratios, strict=True))


def solves(repeats: int) -> dict[str, dict[str, float]]:
    """Time single solves and print a table."""
    print(f"\n{'us per solve':>16} {'forward':>9} {'f':>9} {'gradient':>9} {'f and VJP':>10}")
    results = {}
    for method, stages in (("euler", 1), ("rk4", 4), ("dopri5", 6)):
        for steps in (0, 1, 5, 20):
            name = f"{method}, {steps} steps"
            found = results[name] = measure_solve(method, stages, steps, repeats)
            ours, floor, gradient, both = found.values()
            print(f"{name:>16} {ours:>9.0f} {floor:>9.0f} {gradient:>9.0f} {both:>10.0f}")
    print("\ngradient by 5e6 parameters, against backpropagation")
    for dtype, batch in ((torch.float32, 8), (torch.float32, 64), (torch.float64, 64)):
        ratios = measure_parameters(dtype, batch, min(repeats, 5))
        results[f"5e6 parameters, {dtype}, batch {batch}"] = ratios
        text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        print(f"{dtype!s:>16}, batch {batch:>3}: {text}")
    return results


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
    results |= solves(arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Van der Pol oscillators of mixed stiffness: steps of their own, one joint state, a loop, peers.

python benchmarks/samples.py [--quick] [--damping 20] [--methods dopri5 rodaspr]

A gradient of the sum of the states at five times by y0, rtol 1e-6 and atol 1e-8, CPU time on one
thread, the median of rounds in which everybody is timed once. torchode takes dopri5 and
backpropagates, diffrax Dopri5 or Kvaerno5 under ``jax.vmap``; what is not installed is left out.
Steps are the mean over the rows, accepted ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import torch

import pnode

RTOL, ATOL, END = 1e-6, 1e-8, 20.0
COMPILED = ("bdf", "radau5")  # as independent samples only so
Way = Callable[[torch.Tensor], tuple[torch.Tensor, float]]


def oscillators(rows: int, damping: float) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Return f and y0 of oscillators whose damping grows from 0.1 with the row."""
    mu = 0.1 * (damping / 0.1) ** torch.linspace(0.0, 1.0, rows, dtype=torch.float64)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, v, mu = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x, torch.zeros_like(mu)], dim=-1)

    start = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(rows, 2)
    return f, torch.cat([start, mu[:, None]], dim=1)


def ours(f: Callable[..., torch.Tensor], method: str, **options: Any) -> Way:
    """Return a gradient by pnode."""
    options.setdefault("compile", False)
    rows = "samples" in options
    solver = pnode.Solver(f, method=method, rtol=RTOL, atol=ATOL, **options)
    times = torch.linspace(0.0, END, 5, dtype=torch.float64)

    def gradient(y0: torch.Tensor) -> tuple[torch.Tensor, float]:
        y0 = y0.clone().requires_grad_()
        solution = solver(y0, times)
        (found,) = torch.autograd.grad(solution.ys.sum(), y0)
        return found, solution.stats.steps / (len(y0) if rows else 1)

    return gradient


def loop(f: Callable[..., torch.Tensor], method: str) -> Way:
    """Return a gradient by a solve for each row."""
    one = ours(f, method)

    def gradient(y0: torch.Tensor) -> tuple[torch.Tensor, float]:
        found = [one(row) for row in y0]
        return torch.stack([row for row, _ in found]), sum(n for _, n in found) / len(found)

    return gradient


def torchode(f: Callable[..., torch.Tensor]) -> Way:
    """Return a gradient by torchode's dopri5 and backpropagation."""
    import torchode as to

    term = to.ODETerm(f)
    controller = to.IntegralController(atol=ATOL, rtol=RTOL, term=term)
    solver = to.AutoDiffAdjoint(to.Dopri5(term=term), controller)

    def gradient(y0: torch.Tensor) -> tuple[torch.Tensor, float]:
        y0 = y0.clone().requires_grad_()
        times = torch.linspace(0.0, END, 5, dtype=torch.float64).expand(len(y0), 5)
        solution = solver.solve(to.InitialValueProblem(y0=y0, t_eval=times))
        (found,) = torch.autograd.grad(solution.ys.sum(), y0)
        return found, float(solution.stats["n_accepted"].double().mean())

    return gradient


def diffrax(name: str) -> Way:
    """Return a gradient by one of diffrax's solvers under vmap."""
    import diffrax as dx
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_enable_x64", True)

    def field(t: Any, y: Any, _: Any) -> Any:
        x, v, mu = y
        return jnp.stack([v, mu * (1 - x * x) * v - x, jnp.zeros_like(mu)])

    def solve(y0: Any) -> tuple[Any, Any]:
        solution = dx.diffeqsolve(
            dx.ODETerm(field), getattr(dx, name)(), 0.0, END, None, y0,
            saveat=dx.SaveAt(ts=jnp.linspace(0.0, END, 5)),
            stepsize_controller=dx.PIDController(rtol=RTOL, atol=ATOL), max_steps=1 << 14,
        )  # fmt: skip
        return solution.ys, solution.stats["num_accepted_steps"]

    def total(y0: Any) -> tuple[Any, Any]:
        ys, steps = jax.vmap(solve)(y0)
        return ys.sum(), steps.mean()

    compiled = jax.jit(jax.grad(total, has_aux=True))

    def gradient(y0: torch.Tensor) -> tuple[torch.Tensor, float]:
        found, steps = compiled(jnp.asarray(y0.numpy()))
        return torch.from_numpy(np.array(found)), float(steps)

    return gradient


def measure(rows: int, damping: float, methods: list[str], rounds: int) -> None:
    """Print the time of a gradient, and the steps of each way."""
    f, start = oscillators(rows, damping)
    ways: dict[str, Way] = {}
    for method in methods:
        ways[f"{method}, compiled"] = ours(f, method, samples="independent", compile=True)
        if method in COMPILED:
            continue
        ways[f"{method}, independent"] = ours(f, method, samples="independent")
        ways[f"{method}, joint"] = ours(f, method)
        if rows <= 64:
            ways[f"{method}, loop"] = loop(f, method)
    if find_spec("torchode") is not None:
        ways["torchode dopri5"] = torchode(f)
    if find_spec("diffrax") is not None:
        ways |= {f"diffrax {name}": diffrax(name) for name in ("Dopri5", "Kvaerno5")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[torch.Tensor, float]] = {}
    for _ in range(rounds + 1):  # the first one to warm up
        for name, way in ways.items():
            began = time.process_time()
            found[name] = way(start)
            times[name].append(time.process_time() - began)
    reference, _ = next(iter(found.values()))
    print(f"{rows} oscillators, damping 0.1 to {damping:g}: s, over the first, steps, difference")
    for name, (gradient, steps) in found.items():
        ratios = [
            a / b for a, b in zip(times[name][1:], next(iter(times.values()))[1:], strict=True)
        ]
        off = float((gradient - reference)[:, :2].norm() / reference[:, :2].norm())
        print(
            f"{name:24s} {statistics.median(times[name][1:]):8.3f} "
            f"{statistics.median(ratios):7.2f} {steps:8.1f} {off:8.1e}",
            flush=True,
        )


def main() -> None:
    """Measure 64 and 1,000 oscillators; loops only over 64."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 oscillators alone, once")
    parser.add_argument("--damping", type=float, default=20.0, help="of the last oscillator")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["dopri5", "rodaspr", "bdf"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for rows in (8,) if options.quick else options.rows:
        measure(rows, options.damping, options.methods, 1 if options.quick else options.rounds)


if __name__ == "__main__":
    main()

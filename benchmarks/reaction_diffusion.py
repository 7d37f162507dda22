"""Stiff reactions with diffusion: pnode beside CVODE with GMRES, gradients, and IMEX by default.

python benchmarks/reaction_diffusion.py [--quick] [--sizes 32 64]

The Brusselator with diffusion, periodic, as in Hairer & Wanner, Solving Ordinary Differential
Equations II, section IV.10 (BRUSS-2D, without its source): n x n points, two species, with one
field in torch for all. A round solves once with each; a ratio is taken within a round, CPU time,
and what is printed is the median over rounds. The error is the largest of the end state, relative
to a solve a thousand times tighter. ``compiled`` is what compile="auto" comes to.

IMEX: ark4 in fixed steps with default options beside those that a user who knows the problem gives,
for the Brusselator and the equation of Kuramoto and Sivashinsky, diffusion implicit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import pnode

DIFFUSION, END = 0.1, 4.0
CVODE = "CVODE, GMRES"


class Brusselator(torch.nn.Module):
    """u_t = 1 + u^2 v - 4.4 u + d Lap u, v_t = 3.4 u - u^2 v + d Lap v; y has shape (2, n, n)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([3.4, DIFFUSION], dtype=torch.float64))
        self.scale = float(n * n)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return dy/dt."""
        b, d = self.rates
        laplacian = (
            y.roll(1, -1) + y.roll(-1, -1) + y.roll(1, -2) + y.roll(-1, -2) - 4.0 * y
        ) * self.scale  # fmt: skip
        u, v = y
        reaction = u * (u * v)
        return torch.stack([1.0 + reaction - (b + 1.0) * u, b * u - reaction]) + d * laplacian


def start(n: int) -> torch.Tensor:
    """Return y(0) of shape (2, n, n)."""
    x = torch.arange(n, dtype=torch.float64) / n
    hill = x * (1.0 - x) ** 1.5
    return torch.stack([22.0 * hill[:, None].expand(n, n), 27.0 * hill[None, :].expand(n, n)])


def cvode(field: Brusselator, y0: torch.Tensor, rtol: float) -> tuple[np.ndarray, int]:
    """Return the end state by CVODE's BDF with GMRES, and its evaluations of f."""
    from sksundae.cvode import CVODE as Cvode

    calls = [0]

    def rhs(t: float, y: np.ndarray, out: np.ndarray) -> None:
        calls[0] += 1
        with torch.no_grad():
            out[:] = field(torch.tensor(t), torch.from_numpy(y).view(y0.shape)).view(-1).numpy()

    solver = Cvode(
        rhs, method="BDF", linsolver="gmres", rtol=rtol, atol=1e-3 * rtol, max_num_steps=100_000
    )
    solved = solver.solve(np.array([0.0, END]), y0.numpy().reshape(-1))
    return solved.y[-1], calls[0]


class Ours:
    """A pnode solver of the problem."""

    def __init__(self, field: Brusselator, rtol: float, options: dict[str, Any]) -> None:
        self._solver = pnode.Solver(field, rtol=rtol, atol=1e-3 * rtol, **options)
        self._field = field
        self._times = torch.tensor([0.0, END], dtype=torch.float64)

    def forward(self, y0: torch.Tensor) -> pnode.Solution:
        """Solve."""
        with torch.no_grad():
            return self._solver(y0, self._times)

    def gradient(self, y0: torch.Tensor) -> pnode.Solution:
        """Solve, and differentiate the sum of the end state by y0 and the rates."""
        solution = self._solver(y0.clone().requires_grad_(), self._times)
        self._field.zero_grad()
        solution.ys[-1].sum().backward()
        return solution


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of CPU time that a piece of work takes, and its result."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def relative(ys: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest error, relative."""
    return float(np.abs(ys.reshape(-1) / reference.reshape(-1) - 1.0).max())


def measure(n: int, rtol: float, rounds: int, ways: dict[str, dict[str, Any]]) -> None:
    """Print a row for each way."""
    field, y0 = Brusselator(n), start(n)
    exact = Ours(field, 1e-3 * rtol, {"method": "bdf"}).forward(y0).ys[-1].numpy()
    works: dict[str, Callable[[], Any]] = {}
    if find_spec("sksundae") is not None:
        works[CVODE] = lambda: cvode(field, y0, rtol)
    for name, options in ways.items():
        ours = Ours(field, rtol, options)
        works[name] = lambda ours=ours: ours.forward(y0)
        works[f"{name}, gradient"] = lambda ours=ours: ours.gradient(y0)
    times: dict[str, list[float]] = {name: [] for name in works}
    found: dict[str, Any] = {}
    for _ in range(rounds + 1):  # the first one to warm up
        for name, work in works.items():
            seconds, found[name] = spent(work)
            times[name].append(seconds)
    print(f"\n{n} x {n}, {2 * n * n} states, rtol {rtol:.0e}")
    print(
        f"{'':28s} {'error':>8s} {'f':>6s} {'Jac.':>5s} {'steps':>6s} {'s':>8s} over CVODE, forward"
    )
    for name in works:
        row = [f"{name:28s}"]
        if name == CVODE:
            ys, calls = found[name]
            row.append(f"{relative(ys, exact):8.1e} {calls:6d} {'-':>5s} {'-':>6s}")
        else:
            stats = found[name].stats
            error = relative(found[name].ys[-1].detach().numpy(), exact)
            row.append(f"{error:8.1e} {stats.rhs:6d} {stats.jacobians:5d} {stats.steps:6d}")
        row.append(f"{statistics.median(times[name][1:]):8.3f}")
        for base in (CVODE, name.removesuffix(", gradient")):
            ratios = [a / b for a, b in zip(times[name][1:], times.get(base, [])[1:], strict=False)]
            row.append(f"{statistics.median(ratios):8.2f}" if ratios else f"{'-':>8s}")
        print(" ".join(row), flush=True)


def _second(u: torch.Tensor, h: float) -> torch.Tensor:
    return (u.roll(1, -1) + u.roll(-1, -1) - 2.0 * u) / h**2


def imex(n: int, cells: int, rounds: int) -> None:
    """Print what ark4 takes with default options, over that with the best ones known."""
    whole, h = Brusselator(n).requires_grad_(False), 22.0 / cells
    x = h * torch.arange(cells, dtype=torch.float64)
    problems = {
        f"Brusselator {n} x {n}": (
            lambda t, y: DIFFUSION * (_second(y, 1 / n) + _second(y.mT, 1 / n).mT),
            lambda t, y: whole(t, y) - DIFFUSION * (_second(y, 1 / n) + _second(y.mT, 1 / n).mT),
            start(n),
        ),
        f"Kuramoto-Sivashinsky {cells}": (
            lambda t, u: -_second(u + _second(u, h), h),
            lambda t, u: -(u.roll(-1, -1) ** 2 - u.roll(1, -1) ** 2) / (4 * h),
            torch.cos(2 * torch.pi * x / 22.0),
        ),
    }  # fmt: skip
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name, (implicit, explicit, y0) in problems.items():
        for compiled in (False, True):
            best = {"jacobian": "sparse"}
            if not compiled:  # a promise that machine code has no sweeps for
                best["jacobian_reuse"] = "constant"
            solvers = [
                pnode.Solver(
                    implicit=implicit, explicit=explicit, method="ark4", step_size=0.02,
                    compile=compiled, **options,
                )
                for options in ({}, best)
            ]  # fmt: skip

            def forward(solver: pnode.Solver, y0: torch.Tensor = y0) -> pnode.Solution:
                with torch.no_grad():
                    return solver(y0, times)

            def gradient(solver: pnode.Solver, y0: torch.Tensor = y0) -> None:
                solver(y0.clone().requires_grad_(), times).ys[-1].square().sum().backward()

            for what in (forward, gradient):
                ratios = []
                for _ in range(rounds + 1):  # the first one to warm up
                    own, other = (spent(lambda: what(solver))[0] for solver in solvers)  # noqa: B023
                    ratios.append(own / other)
                print(
                    f"{name:26s} {'compiled' if compiled else 'not compiled':12s} "
                    f"{what.__name__:8s} default over best {statistics.median(ratios[1:]):.2f}",
                    flush=True,
                )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 x 8 points, one round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rtol", type=float, default=1e-5)
    parser.add_argument("--methods", nargs="+", default=["bdf", "bdf:compiled"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, rounds = ([8], 1) if arguments.quick else (arguments.sizes, arguments.rounds)
    ways = {
        name: {"method": name.split(":")[0], "compile": "compiled" in name} | (
            {"jacobian": "sparse"} if "sparse" in name else {}
        )
        for name in arguments.methods
    }  # fmt: skip
    for n in sizes:
        measure(n, arguments.rtol, rounds, ways)
    imex(min(sizes), 32 if arguments.quick else 128, rounds)


if __name__ == "__main__":
    main()

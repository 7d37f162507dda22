"""Scaling over ranks: measured on 1 and 2, counted, and predicted up to 10,000.

A network on a two-dimensional grid (or on samples of a batch) is solved and differentiated. Per
mode and step three things are taken: seconds on one rank for two sizes, seconds on two ranks, and
messages, bytes and reductions on two ranks (``counting.py``). The prediction is a model of these:

    T(P, n) = a + b n + E (N(P) latency + bytes(n, P) / bandwidth)
              + (R + C / steps) log2(P) reduction

for n cells a rank. a and b are the line through the two sizes; E exchanges of ghost cells and R
reductions per step, and C reductions per gradient, are the counts. Efficiency is T(1, n) / T(P, n)
for n cells on every rank (weak) and T(1, N) / (P T(P, N / P)) for N cells in all (strong).

Assumptions: square parts with N(P) = min(P - 1, 8) neighbours, 4 sides of ghost cells and the
corners (2 sides for P < 4); messages to neighbours start after one another and share the
bandwidth; nothing overlaps; a reduction takes log2(P) stages, whatever is reduced; steps, Newton
and Krylov iterations do not depend on P (GMRES without a preconditioner); ranks are equally fast
and wait for no one: neither noise, nor imbalance, nor contention of the network, which at 10,000
ranks cost more than the model says. Two machines: this one, whose latency, bandwidth and reduction
are measured between two ranks that share memory, and an assumed cluster (--latency, --bandwidth,
--reduction). Cores shared with other work make the times on two ranks, ratios included, worth
little, and move a and b, on which strong scaling depends; counts are exact. Times are the least of
several, those that were disturbed least.

    python benchmarks/scaling.py [--quick] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from counting import Counter, beside_python, counting_environment

FIELDS = 2
_RK4, _DOPRI5 = {"method": "rk4"}, {"method": "dopri5", "rtol": 1e-6}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "grid, rk4 fixed": ("grid", {**_RK4, "compile": False}),
    "grid, rk4 compiled": ("grid", {**_RK4, "compile": True}),
    "grid, dopri5 adaptive": ("grid", {**_DOPRI5, "compile": False}),
    "grid, dopri5 adaptive, compiled": ("grid", {**_DOPRI5, "compile": True}),
    "grid, cn GMRES": ("grid", {"method": "cn", "jacobian": "matrix-free"}),
    "batch, rk4 fixed": ("batch", {**_RK4, "compile": False}),
    "batch, rk4 compiled": ("batch", {**_RK4, "compile": True}),
    "batch, dopri5 adaptive": ("batch", {**_DOPRI5, "compile": False}),
    "batch, dopri5 adaptive, compiled": ("batch", {**_DOPRI5, "compile": True}),
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 10000)


@dataclass(frozen=True)
class Machine:
    """Seconds per message, bytes per second, seconds per stage of a reduction."""

    latency: float
    bandwidth: float
    reduction: float


@dataclass(frozen=True)
class Model:
    """Time of a step with its adjoint.

    Attributes
    ----------
    base, per_cell : float
        Seconds on one rank: ``base + per_cell * cells``.
    exchanges : float
        Of ghost cells, per step.
    reductions, once : float
        Per step, and per gradient.
    steps : float
        Of a gradient.
    """

    base: float
    per_cell: float
    exchanges: float
    reductions: float
    once: float
    steps: float

    def seconds(self, machine: Machine, ranks: int, cells: float) -> float:
        """Predict the time of a step on so many ranks, each with so many cells."""
        compute = self.base + self.per_cell * cells
        if ranks == 1:
            return compute
        neighbours, sides = min(ranks - 1, 8), 2 if ranks < 4 else 4
        size = 8 * FIELDS * (sides * math.sqrt(cells) + 4)
        exchange = neighbours * machine.latency + size / machine.bandwidth
        reductions = self.reductions + self.once / self.steps
        return (
            compute + self.exchanges * exchange
            + reductions * math.log2(ranks) * machine.reduction
        )  # fmt: skip

    def weak(self, machine: Machine, ranks: int, cells: float) -> float:
        """Predict the efficiency with ``cells`` on every rank."""
        return self.seconds(machine, 1, cells) / self.seconds(machine, ranks, cells)

    def strong(self, machine: Machine, ranks: int, cells: float) -> float:
        """Predict the efficiency with ``cells`` in all."""
        alone = self.seconds(machine, 1, cells)
        return alone / (ranks * self.seconds(machine, ranks, cells / ranks))


# ------------------------------------------------------------------------------- on every rank


def work(modes: list[str], sides: list[tuple[int, int]], steps: int, repeats: int) -> None:
    """Measure on the ranks of this job; rank 0 prints JSON."""
    import torch
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    counter = Counter()
    rows = [
        {"mode": mode, "shape": shape, "ranks": comm.size}
        | measure(comm, counter, *MODES[mode], shape, steps, repeats)
        for mode in modes
        for shape in sides
    ]
    machine = measure_machine(comm, 20 * repeats) if comm.size == 2 else None
    if comm.rank == 0:
        print(json.dumps({"rows": rows, "machine": machine and asdict(machine)}), flush=True)


def measure(
    comm: Any, counter: Counter, kind: str, options: dict[str, Any], shape: tuple[int, int],
    steps: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and counts per step of a gradient, on a grid of this shape over all ranks."""
    import torch

    import pnode
    from pnode.parallel import Grid

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(FIELDS, 8, 3, padding=0 if kind == "grid" else 1), torch.nn.Tanh(),
        torch.nn.Conv2d(8, FIELDS, 1),
    ).double()  # fmt: skip

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return network(u[None] if kind == "grid" else u).reshape(local)

    if kind == "grid":
        grid = Grid(shape, fields=FIELDS, comm=comm)
        arguments, local = {"layout": grid}, grid.shape
    else:  # samples of 8 by 8 cells
        samples = shape[0] * shape[1] // 64
        own = samples * (comm.rank + 1) // comm.size - samples * comm.rank // comm.size
        arguments, local = {"comm": comm}, (own, FIELDS, 8, 8)
    adaptive = "rtol" in options
    solver = pnode.Solver(
        field, params=network.parameters(), step_size=None if adaptive else 0.05, **arguments,
        **options,
    )  # fmt: skip
    cells = torch.arange(math.prod(local), dtype=torch.float64).reshape(local)
    y0, t = torch.sin(0.1 * cells), torch.tensor([0.0, 0.05 * steps])

    def gradient() -> pnode.Solution:
        solution = solver(y0, t)
        solution.ys[-1].sum().backward()
        return solution

    gradient()
    solution, counts = counter.count(gradient)
    times = []
    for _ in range(repeats):
        comm.Barrier()
        start = time.perf_counter()
        gradient()
        comm.Barrier()
        times.append(time.perf_counter() - start)
    attempts = solution.stats.steps + solution.stats.rejected
    once = 5.0 * (comm.size > 1)  # see tests/mpi/test_mpi_counts.py
    once += 3.0 * (comm.size > 1 and adaptive)
    once += (2.0 + (kind == "grid")) * (comm.size > 1 and options.get("compile", False))
    return {
        "seconds": min(times) / attempts, "steps": attempts,
        "sends": counts.sends / attempts, "sent": counts.sent / attempts,
        "reductions": (counts.reductions - once) / attempts, "once": once,
    }  # fmt: skip


def measure_machine(comm: Any, repeats: int) -> Machine:
    """Latency and bandwidth of messages, and the time of a reduction, between two ranks."""
    import numpy as np
    from mpi4py import MPI

    def seconds(function: Any) -> float:
        function()
        times = []
        for _ in range(5):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append((time.perf_counter() - start) / repeats)
        return min(times)

    def exchange(size: int) -> Any:
        there, here = np.zeros(size), np.zeros(size)
        return lambda: comm.Sendrecv(there, 1 - comm.rank, recvbuf=here)

    value = np.zeros(1)
    small, large = seconds(exchange(1)), seconds(exchange(2**17))
    reduction = seconds(lambda: comm.Allreduce(MPI.IN_PLACE, value))
    return Machine(small, 8 * 2**17 / max(large - small, 1e-9), reduction)


# ---------------------------------------------------------------------------------- the driver


def launch(
    modes: list[str], ranks: int, shapes: list[tuple[int, int]], steps: int, repeats: int
) -> dict[str, Any]:
    """Run :func:`work` on some ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [
                beside_python("mpiexec"), "-n", str(ranks), sys.executable, "-m", "mpi4py",
                __file__, "--work", json.dumps([modes, shapes, steps, repeats]),
            ],
            env=counting_environment(Path(folder)), stdout=subprocess.PIPE, text=True, check=True,
            timeout=600,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def fit(mode: str, side: int, alone: list[Any], both: list[Any]) -> tuple[Model, dict[str, Any]]:
    """Return the model of a mode, and what was measured: rows of one rank and of two."""

    def row(rows: list[Any], *shape: int) -> Any:
        return next(r for r in rows if r["mode"] == mode and tuple(r["shape"]) == shape)

    quarter, one = row(alone, side // 4, side), row(alone, side, side)
    strong, weak = row(both, side, side), row(both, 2 * side, side)
    per_cell = max(0.0, (one["seconds"] - quarter["seconds"]) / (0.75 * side * side))
    model = Model(
        max(0.0, one["seconds"] - per_cell * side * side), per_cell, strong["sends"],
        strong["reductions"], strong["once"], strong["steps"],
    )  # fmt: skip
    return model, {
        "per_step": {key: strong[key] for key in ("sends", "sent", "reductions", "once", "steps")},
        "seconds_one_rank": one["seconds"],
        "strong_efficiency_2": one["seconds"] / (2 * strong["seconds"]),
        "weak_efficiency_2": one["seconds"] / weak["seconds"],
    }


def plot(path: Path, results: dict[str, Any], side: int) -> None:
    """Draw predicted efficiencies on the assumed cluster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    titles = (f"weak: {side}x{side} cells a rank", "strong: 2048x2048 cells in all")
    for axis, kind, title in zip(axes, ("weak", "strong"), titles, strict=True):
        for mode, result in results.items():
            axis.semilogx(RANKS, result["cluster"][kind], label=mode)
        axis.set(title=title, xlabel="ranks", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("predicted efficiency")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, fit, predict, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small grid, few steps, nothing compiled"
    )
    parser.add_argument("--side", type=int, default=64, help="cells of a rank's side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--latency", type=float, default=2e-6, help="cluster: seconds a message")
    parser.add_argument("--bandwidth", type=float, default=1e10, help="cluster: bytes a second")
    parser.add_argument("--reduction", type=float, default=3e-6, help="cluster: seconds a stage")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw the predictions")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        modes, shapes, steps, repeats = json.loads(arguments.work)
        work(modes, [tuple(shape) for shape in shapes], steps, repeats)
        return
    side, steps, repeats, modes = arguments.side, 20, arguments.repeats, list(MODES)
    if arguments.quick:
        side, steps, repeats = 16, 10, 2
        modes = [mode for mode in MODES if "compiled" not in mode]
    alone = launch(modes, 1, [(side // 4, side), (side, side)], steps, repeats)
    both = launch(modes, 2, [(side, side), (2 * side, side)], steps, repeats)
    here = Machine(**both["machine"])
    cluster = Machine(arguments.latency, arguments.bandwidth, arguments.reduction)
    print(f"this machine: {here}\ncluster, assumed: {cluster}\n")
    print("per step with its adjoint, on a rank of two; efficiency measured (and by the model)")
    print(
        f"{'mode':>32} {'messages':>9} {'bytes':>9} {'reductions':>11} {'ms':>8} "
        f"{'strong, 2 ranks':>16} {'weak, 2 ranks':>14}"
    )
    results: dict[str, Any] = {}
    total = 2048 * 2048
    for mode in modes:
        model, measured = fit(mode, side, alone["rows"], both["rows"])
        counts = measured["per_step"]
        predicted = (model.strong(here, 2, side * side), model.weak(here, 2, side * side))
        results[mode] = {
            "model": asdict(model), **measured,
            "predicted_efficiency_2": {"strong": predicted[0], "weak": predicted[1]},
            "cluster": {
                "ranks": RANKS,
                "weak": [model.weak(cluster, ranks, side * side) for ranks in RANKS],
                "strong": [model.strong(cluster, ranks, total) for ranks in RANKS],
            },
        }  # fmt: skip
        print(
            f"{mode:>32} {counts['sends']:>9.1f} {counts['sent']:>9.0f} "
            f"{counts['reductions']:>11.2f} {1e3 * measured['seconds_one_rank']:>8.2f} "
            f"{measured['strong_efficiency_2']:>7.2f} ({predicted[0]:.2f}) "
            f"{measured['weak_efficiency_2']:>8.2f} ({predicted[1]:.2f})"
        )
    print(f"\npredicted on the cluster: weak with {side}x{side} cells a rank / strong, 2048x2048")
    shown = [ranks for ranks in RANKS if ranks in (2, 16, 128, 1024, 10000)]
    print(f"{'mode':>32} " + " ".join(f"{ranks:>12}" for ranks in shown))
    for mode, result in results.items():
        found = dict(
            zip(RANKS, zip(*(result["cluster"][k] for k in ("weak", "strong")), strict=True),
                strict=True)
        )  # fmt: skip
        cells = (f"{found[ranks][0]:.2f} / {found[ranks][1]:.2f}" for ranks in shown)
        print(f"{mode:>32} " + " ".join(f"{cell:>12}" for cell in cells))
    if arguments.json:
        report = {
            "side": side, "machine": asdict(here), "assumed": asdict(cluster), "modes": results,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(arguments.plot, results, side)


if __name__ == "__main__":
    main()

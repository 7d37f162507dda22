"""Stiff solvers side by side: work and precision, and gradients.

Problems with published end values, from rtol 1e-3 down: pnode's adaptive implicit methods, diffrax
(Kvaerno5), SciPy (Radau, BDF) and CVODE (BDF). A solver goes on to the next tolerance as long as a
solve, counted or not, takes less than ``--limit`` seconds of CPU time. The error is the largest
relative one of a component at the end. What is counted, and how, is described in
``stiff_solvers.py``; peers that are not installed are left out (``benchmarks/README.md`` says how
to install them). Every solver runs once counted, then all are timed in turn without counters, warm,
on one thread; times are medians.

Then gradients of one component of an end state with respect to the problem's parameters: the
discrete adjoint of pnode against backpropagation through diffrax, with the error relative to the
reference, of the worst entry.

    python benchmarks/stiff.py [--quick] [--solvers es325 cvode-bdf] [--problems ROBER]
        [--repeats 3] [--limit 3] [--no-gradients] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from stiff_gradients import create_gradient
from stiff_problems import PROBLEMS, SENSITIVITIES, Problem, Sensitivity
from stiff_solvers import PEERS, StiffSolver, Unavailable, create_solver

SOLVERS = (
    "es325", "esdirk6", "bdf", "radau5", "ra34pw2", "bdf:compiled", "esdirk6:compiled", *PEERS
)  # fmt: skip
REFERENCE = "cvode-bdf"
TOLERANCES = tuple(10.0**-k for k in range(3, 11))
GRADIENT_TOLERANCES = (1e-4, 1e-6, 1e-8)
ERRORS = (1e-3, 1e-5, 1e-7)


@dataclass
class Row:
    """One solver at one tolerance."""

    solver: str
    rtol: float
    error: float | None = None
    rhs: int | None = None
    jvp: int | None = None
    columns: int | None = None
    evaluations: int | None = None
    steps: int | None = None
    rejected: int | None = None
    jacobians: int | None = None
    newton: int | None = None
    factored: int | None = None
    seconds: float | None = None
    failure: str | None = None


@dataclass
class GradientRow:
    """Value and gradient by one solver at one tolerance; counts are pnode's."""

    solver: str
    rtol: float
    error: float | None = None
    seconds: float | None = None
    steps: int | None = None
    rhs: int | None = None
    jacobians: int | None = None
    backward_rhs: int | None = None
    backward_jacobians: int | None = None
    vjp: int | None = None
    failure: str | None = None


def in_turn(
    tasks: dict[str, Callable[[], Any]], repeats: int, limit: float
) -> dict[str, tuple[float, float]]:
    """Return each task's median wall time and least CPU time; past ``limit`` it is not repeated."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            if sum(cpu for _, cpu in times[name]) < limit:
                wall, cpu = time.perf_counter(), time.process_time()
                task()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(wall for wall, _ in taken), min(cpu for _, cpu in taken))
        for name, taken in times.items()
    }


def measure(
    problem: Problem, solvers: dict[str, StiffSolver], tolerances: tuple[float, ...], repeats: int,
    limit: float,
) -> list[Row]:  # fmt: skip
    """Run all solvers on one problem."""

    def run_once(row: Row, task: Any) -> None:
        run = solvers[row.solver].count(row.rtol)
        row.error = relative_error(run.y, problem.reference)
        row.rhs, row.jvp, row.jacobians = run.rhs, run.jvp, run.jacobians
        row.columns = run.jacobians * len(problem.start)
        row.evaluations = run.rhs + run.jvp + row.columns
        row.steps, row.rejected, row.newton = run.steps, run.rejected, run.newton
        row.factored = run.factored
        if row.rtol == tolerances[0]:
            task()  # what is timed may have to be compiled

    tasks = {name: solver.solve for name, solver in solvers.items()}
    return climb(Row, tasks, run_once, tolerances, repeats, limit)


def measure_gradients(
    sensitivity: Sensitivity, names: list[str], tolerances: tuple[float, ...], repeats: int,
    limit: float,
) -> list[GradientRow]:  # fmt: skip
    """Take one gradient with every solver of ``names``."""

    def run_once(row: GradientRow, task: Any) -> None:
        gradient, stats = task()
        row.error = relative_error(gradient, sensitivity.gradient)
        if stats is not None:
            row.steps, row.rhs, row.jacobians = stats.steps, stats.rhs, stats.jacobians
            row.backward_rhs, row.vjp = stats.backward.rhs, stats.backward.vjp
            row.backward_jacobians = stats.backward.jacobians

    tasks = {name: create_gradient(name, sensitivity) for name in names}
    return climb(GradientRow, tasks, run_once, tolerances, repeats, limit)


def climb(
    kind: type, tasks: dict[str, Callable[[float], Any]],
    run_once: Callable[[Any, Callable[[], Any]], None], tolerances: tuple[float, ...],
    repeats: int, limit: float,
) -> list[Any]:  # fmt: skip
    """Go down the tolerances with all solvers side by side.

    ``run_once(row, task)`` fills the row, all but the seconds; then ``task`` is timed. A solver
    ends where either takes more than ``limit`` seconds of CPU time; ``run_once`` may compile at
    the first tolerance.
    """
    rows = []
    going = dict(tasks)
    for rtol in tolerances:
        new = {name: kind(name, rtol) for name in going}
        ready = {}
        for name, row in new.items():
            task = partial(going[name], rtol)
            start = time.process_time()
            try:
                run_once(row, task)
            except Exception as error:  # whatever a peer raises: the others go on
                row.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            else:
                ready[name] = task
            if time.process_time() - start > limit and rtol != tolerances[0]:
                del going[name]
        for name, (seconds, cpu) in in_turn(ready, repeats, limit).items():
            new[name].seconds = seconds
            if cpu > limit:
                going.pop(name, None)
        rows += new.values()
    return rows


def relative_error(values: np.ndarray, reference: tuple[float, ...]) -> float:
    """Return the largest relative error of an entry."""
    return float(np.abs(values / np.array(reference) - 1.0).max())


def cost_at(points: list[tuple[float, float]], error: float) -> tuple[float, str] | None:
    """Return the cost at ``error`` on the line through the points (error, cost), log by log.

    The points are in the order of tolerance. Of several crossings the last counts: from there
    on all tighter tolerances are more accurate. "<" marks the cost of the loosest tolerance if
    all are more accurate; None means that none is.
    """
    points = [(e, cost) for e, cost in points if e > 0.0 and math.isfinite(e)]
    if not points or points[-1][0] > error:
        return None
    for (above, less), (below, more) in reversed(list(pairwise(points))):
        if above > error >= below:
            weight = math.log(error / above) / math.log(below / above)
            return less * (more / less) ** weight, ""
    return points[0][1], "<"


def equal_error(rows: list[Row]) -> list[dict[str, Any]]:
    """Compare costs at equal errors, absolutely and relative to CVODE's."""
    table = []
    for error in ERRORS:
        found = {}
        for name in dict.fromkeys(row.solver for row in rows):
            done = [row for row in rows if row.solver == name and row.seconds is not None]
            found[name] = [
                cost_at([(row.error, getattr(row, cost)) for row in done], error)  # type: ignore[misc]
                for cost in ("evaluations", "seconds")
            ]
        base = found.get(REFERENCE, [None, None])
        for name, costs in found.items():
            entry: dict[str, Any] = {"error": error, "solver": name}
            for cost, own, other in zip(("evaluations", "seconds"), costs, base, strict=True):
                entry[cost] = None if own is None else own[0]
                entry[f"{cost}_bound"] = "" if own is None else own[1]
                ratio = None if own is None or other is None or other[1] else own[0] / other[0]
                entry[f"{cost}_ratio"] = ratio
            table.append(entry)
    return table


def text(value: Any, form: str, width: int) -> str:
    """Format a number, or a dash."""
    return format("-" if value is None else format(value, form), f">{width}")


def print_rows(rows: list[Row]) -> None:
    """Print the table of one problem."""
    print(
        f"{'solver':>17} {'rtol':>6} {'error':>8} {'rhs':>8} {'jvp':>5} {'columns':>8} {'sum':>8} "
        f"{'steps':>6} {'reject':>6} {'Jac.':>6} {'LU':>6} {'Newton':>7} {'seconds':>8}"
    )
    names = list(dict.fromkeys(row.solver for row in rows))
    for row in sorted(rows, key=lambda row: names.index(row.solver)):
        line = f"{row.solver:>17} {row.rtol:>6.0e} "
        if row.failure is not None:
            print(f"{line} failed: {row.failure}")
            continue
        print(
            line + text(row.error, ".1e", 8), text(row.rhs, "d", 8), text(row.jvp, "d", 5),
            text(row.columns, "d", 8), text(row.evaluations, "d", 8), text(row.steps, "d", 6),
            text(row.rejected, "d", 6), text(row.jacobians, "d", 6), text(row.factored, "d", 6),
            text(row.newton, "d", 7), text(row.seconds, ".4f", 8),
        )  # fmt: skip


def print_equal_error(table: list[dict[str, Any]]) -> None:
    """Print the comparison at equal errors, with ratios to CVODE's."""
    print(f"At equal error: evaluations and seconds, in brackets relative to {REFERENCE}.")
    print(" " * 17 + "".join(f"{f'at {error:.0e}':>38}" for error in ERRORS))
    for name in dict.fromkeys(entry["solver"] for entry in table):
        line = f"{name:>17}"
        for entry in (entry for entry in table if entry["solver"] == name):
            for cost, form in (("evaluations", ".0f"), ("seconds", ".4f")):
                own, ratio = entry[cost], entry[f"{cost}_ratio"]
                shown = "-" if own is None else entry[f"{cost}_bound"] + format(own, form)
                bracket = "" if ratio is None else f"({ratio:.3g})"
                line += f" {shown:>9} {bracket:<8}"
        print(line)


def print_gradients(rows: list[GradientRow]) -> None:
    """Print the table of one gradient."""
    print(
        f"{'solver':>17} {'rtol':>6} {'error':>8} {'seconds':>8}   forward: {'steps':>6} "
        f"{'rhs':>7} {'Jac.':>6}   backward: {'rhs':>7} {'Jac.':>6} {'vjp':>6}"
    )
    for row in rows:
        line = f"{row.solver:>17} {row.rtol:>6.0e} "
        if row.failure is not None:
            print(f"{line} failed: {row.failure}")
            continue
        print(
            line + text(row.error, ".1e", 8), text(row.seconds, ".4f", 8), " " * 10,
            text(row.steps, "d", 6), text(row.rhs, "d", 7), text(row.jacobians, "d", 6),
            " " * 11, text(row.backward_rhs, "d", 7), text(row.backward_jacobians, "d", 6),
            text(row.vjp, "d", 6),
        )  # fmt: skip


def plot(results: dict[str, list[Row]], path: Path) -> None:
    """Draw error against evaluations and against time, one row of panels per problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(10, 3.2 * len(results)), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row.solver for rows in results.values() for row in rows))
    for (problem, rows), panels in zip(results.items(), axes, strict=True):
        costs = (("evaluations", "rhs + JVPs + Jacobian columns"), ("seconds", "seconds"))
        for panel, (cost, label) in zip(panels, costs, strict=True):
            for index, name in enumerate(names):
                done = [row for row in rows if row.solver == name and row.seconds is not None]
                panel.loglog(
                    [getattr(row, cost) for row in done], [row.error for row in done],
                    marker="os^vD*Px"[index % 8], linestyle="--" if name in PEERS else "-",
                    color=f"C{index}", label=name, markersize=4,
                )  # fmt: skip
            panel.set(xlabel=label, ylabel="relative error", title=problem)
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def versions() -> dict[str, str]:
    """Return what was compared."""
    found = {"python": platform.python_version()}
    for package in (
        "pnode", "petsc4py", "torch", "numpy", "scipy", "diffrax", "jax", "scikit-sundae",
    ):  # fmt: skip
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def available(names: list[str]) -> list[str]:
    """Return the solvers that can run, and say which cannot."""
    chosen = []
    for name in names:
        try:
            create_solver(name, PROBLEMS["ROBER"])
        except Unavailable as reason:
            print(f"{name}: left out, {reason}")
        else:
            chosen.append(name)
    return chosen


def main() -> int:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tolerances, HIRES and ROBER")
    parser.add_argument(
        "--solvers", nargs="+", default=SOLVERS, help="pnode methods, and " + ", ".join(PEERS)
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=3.0, help="CPU seconds for one solve")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="write the work-precision plot here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    tolerances = (1e-3, 1e-5) if quick else TOLERANCES
    problems = arguments.problems or (["HIRES", "ROBER"] if quick else list(PROBLEMS))
    repeats = 1 if quick else arguments.repeats
    names = available(arguments.solvers)
    if not names:
        print("No solver is left.", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"versions": versions(), "problems": {}, "gradients": {}}
    results = {}
    for name in problems:
        solvers = {solver: create_solver(solver, PROBLEMS[name]) for solver in names}
        rows = measure(PROBLEMS[name], solvers, tolerances, repeats, arguments.limit)
        results[name] = rows
        print(f"\n{name}")
        print_rows(rows)
        table = equal_error(rows)
        print_equal_error(table)
        report["problems"][name] = {"rows": [asdict(row) for row in rows], "equal_error": table}
    ours = [name for name in names if name not in PEERS or name == "diffrax-kvaerno5"]
    for name, sensitivity in SENSITIVITIES.items():
        if arguments.no_gradients or not ours or name.split()[0] not in problems:
            continue
        if quick and report["gradients"]:
            break
        levels = GRADIENT_TOLERANCES[:1] if quick else GRADIENT_TOLERANCES
        gradients = measure_gradients(sensitivity, ours, levels, repeats, arguments.limit)
        entries = ", ".join(f"{entry:.6e}" for entry in sensitivity.gradient)
        print(f"\nGradient of {name}: {entries}")
        if sensitivity.published:
            print(f"published: {sensitivity.published}")
        print_gradients(gradients)
        report["gradients"][name] = [asdict(row) for row in gradients]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        if find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed")
        else:
            plot(results, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

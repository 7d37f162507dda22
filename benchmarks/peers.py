"""pnode beside its peers: what a value and its gradient cost, in one run.

Explicit solves (``peer_flows.py``): tanh networks and a convolutional block, dopri5 in fixed steps
and adaptively; pnode, torchdiffeq (backpropagation and adjoint), torchode, diffrax (all steps
stored, and solved backwards) and, as the floor, the bare torch calls that a gradient consists of.
Stiff ones (``peer_stiff.py``): Robertson's kinetics, alone and with a network, against diffrax's
Kvaerno3 and Kvaerno5 at equal errors of the gradient. And a training iteration of
``examples/robertson.py`` against the same program in JAX (``peer_training.py``).

All run in one process, in float64, on ``--threads`` threads, warm. They are timed in rounds: each
round times everybody once, beginning with another one each time, a fast one as the mean of several
calls. Ratios are taken within a round; shown are medians over the rounds, quartiles in brackets.

What is timed must first be right: in fixed steps all values and gradients must agree to 1e-8, or
their row is refused. Adjoint equations solved backwards give a gradient of their own, whose
difference is shown, as is the error of adaptive gradients; only their values must agree.

    python benchmarks/peers.py [--quick] [--threads 1] [--cpu-time] [--seconds 60]
        [--workloads 2-50-2 stiff] [--solvers torch diffrax] [--json FILE] [--plot FILE] [--profile]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peer_threads import thread_settings

os.environ.update(thread_settings(sys.argv[1:]))

import numpy as np
import torch
from peer_flows import FLOWS, PNODE, VARIANTS, Flow, Outcome, Task, create_flow_task
from peer_profile import print_profile
from peer_stiff import (
    METHODS,
    STIFF,
    STIFF_SOLVERS,
    Kinetics,
    create_stiff_task,
    gradient_error,
    reference,
)
from peer_training import TRAINING, create_training_task
from stiff import cost_at, versions
from stiff_solvers import Unavailable

AGREEMENT = 1e-8
TOLERANCES = tuple(10.0**-k for k in range(2, 8))
ERRORS = (1e-4, 1e-6)
SHORTEST = 0.01  # seconds of one measurement
LEAST, MOST = 3, 41  # rounds
LIMIT = 2.5  # seconds of a stiff solve, beyond which tolerances are not tightened
DOPRI5_STAGES = 6  # the seventh is the next step's first


@dataclass
class Row:
    """One solver on one workload; ``ratios`` to others are quartiles."""

    solver: str
    note: str = ""
    accepted: int | None = None
    rejected: int | None = None
    error: float | None = None
    seconds: float | None = None
    rounds: int = 0
    to_bare: tuple[float, float, float] | None = None
    #: Time of a variant of pnode over that of this row.
    of_pnode: dict[str, tuple[float, float, float]] | None = None
    refused: str | None = None


def rounds(
    tasks: dict[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    most: int = MOST,
) -> dict[str, list[float]]:
    """Time warm tasks in turn until ``seconds`` are over; return each one's time in each round."""
    calls = {}
    for name, task in tasks.items():
        start = clock()
        task()
        once = clock() - start
        calls[name] = max(1, math.ceil(SHORTEST / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    begin = time.perf_counter()
    for number in range(most):
        if number >= LEAST and time.perf_counter() - begin > seconds:
            break
        gc.collect()
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            task, count = tasks[name], calls[name]
            start = clock()
            for _ in range(count):
                task()
            times[name].append((clock() - start) / count)
    return times


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the median and the first and third quartile."""
    low, middle, high = np.quantile(np.array(list(values)), (0.25, 0.5, 0.75)).tolist()
    return middle, low, high


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios within rounds."""
    return quartiles(a / b for a, b in zip(above, below, strict=True))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference over the largest entry."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def check(row: Row, task: Task, steps: int | None, expected: Outcome | None) -> Outcome | None:
    """Run a task, fill its row and refuse it if it computes something else.

    ``steps`` are the steps it has to take; without them nothing has to agree.
    """
    raw = task.run()
    if task.read is None:
        return None
    outcome = task.read(raw)
    row.accepted, row.rejected = outcome.accepted, outcome.rejected
    if steps is not None and (outcome.accepted, outcome.rejected) != (steps, 0):
        row.refused = f"{outcome.accepted} steps and {outcome.rejected} rejected, not {steps}"
    if expected is None:
        return outcome
    row.error = relative(outcome.gradient, expected.gradient)
    value = abs(outcome.value - expected.value) / abs(expected.value)
    if not task.discrete:
        row.note = "its gradient is another"
    if steps is not None and not value <= AGREEMENT:
        row.refused = f"its value differs by {value:.1e}"
    elif steps is not None and task.discrete and not row.error <= AGREEMENT:
        row.refused = f"its gradient differs by {row.error:.1e}"
    return outcome


def fill(rows: list[Row], times: dict[str, list[float]]) -> None:
    """Fill in the times and their ratios."""
    for row in rows:
        if row.solver not in times:
            continue
        own = times[row.solver]
        row.seconds, row.rounds = statistics.median(own), len(own)
        if "bare torch" in times:
            row.to_bare = ratio(own, times["bare torch"])
        row.of_pnode = {name: ratio(times[name], own) for name in PNODE if name in times}


class Absent:
    """Says once of each solver that it is left out, and why."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def __call__(self, name: str, reason: Any) -> None:
        """Say it."""
        text = " ".join(str(reason).split())
        if (name, text) not in self._said:
            self._said.add((name, text))
            print(f"{name}: left out, {text}", flush=True)


def measure(
    names: Iterable[str], create: Callable[[str], Task], steps: int | None,
    expected: Outcome | None, seconds: float, clock: Callable[[], float], absent: Absent,
) -> list[Row]:  # fmt: skip
    """Check and time all solvers on one workload; the first one's result is the default to expect.

    Parameters
    ----------
    names : iterable of str
        The solvers.
    create : callable
        Returns a solver's task.
    steps : int, optional
        How many steps everybody must take.
    expected : Outcome, optional
        What adaptive solves are compared with.
    seconds : float
        How long to go on.
    clock : callable
        What tells the time.
    absent : callable
        Told who cannot take part.
    """
    rows, tasks = [], {}
    for name in names:
        row = Row(name)
        try:
            task = create(name)
            outcome = check(row, task, steps, expected)
        except Unavailable as reason:
            absent(name, reason)
            continue
        except Exception as error:  # whatever a peer raises: the others go on
            row.refused = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        else:
            expected = expected or outcome
        rows.append(row)
        if row.refused is None:
            tasks[name] = task.run
    fill(rows, rounds(tasks, seconds, clock))
    return rows


def measure_flow(
    flow: Flow, adaptive: bool, names: list[str], seconds: float, clock: Callable[[], float],
    absent: Absent,
) -> list[Row]:  # fmt: skip
    """Run everybody on one flow; adaptive gradients are compared with a much tighter one."""
    expected = None
    if adaptive:
        tight = create_flow_task("pnode", replace(flow, rtol=1e-3 * flow.rtol), True)
        assert tight.read is not None
        expected = tight.read(tight.run())

    def create(name: str) -> Task:
        return create_flow_task(name, flow, adaptive)

    steps = None if adaptive else flow.steps
    return measure(names, create, steps, expected, seconds, clock, absent)


@dataclass
class StiffRow:
    """One stiff solver at one tolerance."""

    solver: str
    rtol: float
    error: float | None = None
    accepted: int | None = None
    rejected: int | None = None
    seconds: float | None = None
    refused: str | None = None


def measure_stiff(
    kinetics: Kinetics, names: list[str], tolerances: tuple[float, ...], seconds: float,
    clock: Callable[[], float], absent: Absent,
) -> tuple[list[StiffRow], list[dict[str, Any]]]:  # fmt: skip
    """Run everybody at all tolerances, and compare at equal errors.

    A solver goes on to the next tolerance as long as a solve takes less than :data:`LIMIT`.
    """
    exact = reference(kinetics, print)
    rows, tasks = [], {}
    for name in names:
        for rtol in tolerances:
            row = StiffRow(name, rtol)
            try:
                task = create_stiff_task(name, kinetics, rtol)
                task.run()
                start = clock()
                raw = task.run()
                taken = clock() - start
                assert task.read is not None
                outcome = task.read(raw)
            except Unavailable as reason:
                absent(name.rsplit(" ", 1)[0], reason)
                break
            except Exception as error:  # whatever a peer raises: the others go on
                row.refused = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                rows.append(row)
                continue
            row.error = gradient_error(outcome.gradient, exact)
            row.accepted, row.rejected = outcome.accepted, outcome.rejected
            rows.append(row)
            tasks[f"{name} {rtol}"] = task.run
            if taken > LIMIT:
                break
    times = rounds(tasks, seconds, clock, most=15)
    for row in rows:
        if f"{row.solver} {row.rtol}" in times:
            row.seconds = statistics.median(times[f"{row.solver} {row.rtol}"])
    return rows, compare_at_equal_errors(rows, times)


def compare_at_equal_errors(
    rows: list[StiffRow], times: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Return the cost of each solver at each error, and pnode's best over it, round by round."""
    table = []
    number = min((len(taken) for taken in times.values()), default=0)
    for error in ERRORS:
        costs: dict[str, list[float]] = {}
        bounds = {}
        for name in dict.fromkeys(row.solver for row in rows):
            done = [row for row in rows if row.solver == name and row.seconds is not None]
            found = [
                cost_at([(row.error, times[f"{name} {row.rtol}"][index]) for row in done], error)  # type: ignore[misc]
                for index in range(number)
            ]
            if found and found[0] is not None:
                costs[name] = [cost for cost, _ in found]  # type: ignore[misc]
                bounds[name] = found[0][1]
        medians = {name: statistics.median(cost) for name, cost in costs.items()}
        best = {
            family: min(own, key=own.__getitem__)
            for family in (*PNODE, "diffrax")
            if (own := {n: c for n, c in medians.items() if n.rsplit(" ", 1)[0] == family})
        }
        for name, cost in costs.items():
            table.append({
                "error": error, "solver": name, "seconds": medians[name], "bound": bounds[name],
                "best": best[name.rsplit(" ", 1)[0]] == name,
                "of_pnode": {
                    best[family]: ratio(costs[best[family]], cost)
                    for family in PNODE if family in best
                },
            })  # fmt: skip
    return table


def memory_rows(flows: dict[str, Flow], variants: list[str]) -> list[dict[str, Any]]:
    """Compare the bytes that pnode keeps per step with stages times the state's size.

    Graphs come on top of the stages: apart, but for compiled steps without a limit.
    """
    rows = []
    for name, flow in flows.items():
        for variant in variants:
            try:
                task = create_flow_task(variant, flow, adaptive=False)
            except Unavailable:
                continue
            *_, stats = task.run()
            state = 8 * math.prod(flow.shape)
            rows.append({
                "workload": name, "solver": variant, "bytes_per_step": stats.ram_bytes / flow.steps,
                "tape_bytes_per_step": stats.tape_bytes / flow.steps,
                "stages_times_state": DOPRI5_STAGES * state, "stages": DOPRI5_STAGES,
                "state_bytes": state,
            })  # fmt: skip
    return rows


def shown(quartile: tuple[float, float, float] | None) -> str:
    """Format a ratio and its spread."""
    if quartile is None:
        return "-"
    return "{:.3g} [{:.3g}, {:.3g}]".format(*quartile)


def print_rows(title: str, rows: list[Row]) -> None:
    """Print the table of one workload."""
    ours = [row.solver for row in rows if row.solver in PNODE and row.seconds is not None]
    print(f"\n{title}")
    print(
        f"{'solver':>21} {'steps':>7} {'gradient':>8} {'ms':>9} {'rounds':>6} "
        f"{'over bare torch':>22}" + "".join(f"{f'{name} over it':>24}" for name in ours)
    )
    for row in rows:
        steps = "-" if row.accepted is None else f"{row.accepted}+{row.rejected or 0}"
        error = "-" if row.error is None else f"{row.error:.0e}"
        line = f"{row.solver:>21} {steps:>7} {error:>8} "
        if row.refused is not None or row.seconds is None:
            print(f"{line} refused: {row.refused}")
            continue
        line += f"{1e3 * row.seconds:>9.3f} {row.rounds:>6} {shown(row.to_bare):>22}"
        line += "".join(f"{shown((row.of_pnode or {}).get(name)):>24}" for name in ours)
        print(line)
    sys.stdout.flush()


def print_stiff(title: str, rows: list[StiffRow], table: list[dict[str, Any]]) -> None:
    """Print what was measured at each tolerance and the comparison at equal errors."""
    print(f"\n{title}")
    print(f"{'solver':>24} {'rtol':>6} {'error':>8} {'steps':>8} {'ms':>9}")
    for row in rows:
        line = f"{row.solver:>24} {row.rtol:>6.0e} "
        if row.refused is not None:
            print(f"{line} refused: {row.refused}")
            continue
        steps = f"{row.accepted}+{row.rejected}"
        print(f"{line}{row.error:>8.1e} {steps:>8} {1e3 * (row.seconds or math.nan):>9.3f}")
    print("At equal errors of the gradient (* the best of its family, < an upper bound):")
    for entry in table:
        ratios = ", ".join(f"{name} over it {shown(r)}" for name, r in entry["of_pnode"].items())
        print(
            f"{entry['error']:>8.0e} {entry['solver']:>22}{'*' if entry['best'] else ' '} "
            f"{entry['bound'] or ' '}{1e3 * entry['seconds']:>9.3f} ms   {ratios}"
        )
    sys.stdout.flush()


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw every workload's times relative to pnode's, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}
    for title, rows in report["workloads"].items():
        panels[title] = [
            (row["solver"], row["of_pnode"]["pnode"])
            for row in rows
            if row["of_pnode"] and "pnode" in row["of_pnode"]
        ]
    for title, entry in report["stiff"].items():
        for error in ERRORS:
            table = [row for row in entry["equal_error"] if row["error"] == error]
            bars = []
            for row in table:
                ours = [r for name, r in row["of_pnode"].items() if name in _named("pnode")]
                bars += [(row["solver"], ours[0])] if ours else []
            panels[f"{title}, error {error:.0e}"] = bars
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return
    columns = 2
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(12, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for axis, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        names = [name for name, _ in bars]
        # The ratios are pnode's over theirs: the other way round the quartiles change places.
        middle, low, high = (np.array([1.0 / r[i] for _, r in bars]) for i in (0, 2, 1))
        axis.errorbar(middle, names, xerr=(middle - low, high - middle), fmt="o", capsize=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=title, xscale="log", xlabel="time / pnode's time")
        axis.invert_yaxis()
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _named(family: str) -> list[str]:
    return [f"{family} {method}" for method in METHODS]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds for each workload")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="for the rounds of each workload (60)")
    parser.add_argument(
        "--workloads", nargs="+", choices=(*FLOWS, "stiff", "training"),
        default=(*FLOWS, "stiff", "training"),
    )  # fmt: skip
    parser.add_argument("--solvers", nargs="+", help="pnode, and those whose names begin so")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time: for a machine that others use as well"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="write the figure here")
    parser.add_argument("--profile", action="store_true", help="show where pnode's time goes")
    arguments = parser.parse_args(argv)
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time adds up the time of all threads: it goes with --threads 1 only")
    if arguments.seconds is None:
        arguments.seconds = 3.0 if arguments.quick else 60.0
    return arguments


def chosen(names: Iterable[str], wanted: list[str] | None) -> list[str]:
    """Return the names that begin as one that is wanted, and pnode itself."""
    own = ("pnode", *(f"pnode {method}" for method in METHODS))
    return [n for n in names if wanted is None or n in own or n.startswith(tuple(wanted))]


def main(argv: list[str] | None = None) -> int:
    """Run everything and print the tables."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    absent = Absent()
    flows = {name: flow for name, flow in FLOWS.items() if name in arguments.workloads}
    seconds, wanted = arguments.seconds, arguments.solvers
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    report: dict[str, Any] = {
        "versions": versions(), "threads": arguments.threads,
        "clock": "CPU time" if arguments.cpu_time else "wall time", "workloads": {}, "stiff": {},
        "memory": [],
    }  # fmt: skip
    for name, flow in flows.items():
        for adaptive in (False, True):
            how = f"dopri5, rtol {flow.rtol:.0e}" if adaptive else f"dopri5, {flow.steps} steps"
            title = f"{name}, batch {flow.shape[0]}, {how}"
            rows = measure_flow(flow, adaptive, chosen(VARIANTS, wanted), seconds, clock, absent)
            print_rows(title, rows)
            report["workloads"][title] = [asdict(row) for row in rows]
    if "training" in arguments.workloads:
        title = "training iteration of examples/robertson.py"
        rows = measure(
            chosen(TRAINING, wanted), create_training_task, 40, None, seconds, clock, absent
        )
        print_rows(title, rows)
        report["workloads"][title] = [asdict(row) for row in rows]
    if "stiff" in arguments.workloads:
        for name, kinetics in STIFF.items():
            tolerances = TOLERANCES[1:3] if arguments.quick else TOLERANCES
            stiff_rows, table = measure_stiff(
                kinetics, chosen(STIFF_SOLVERS, wanted), tolerances, seconds, clock, absent
            )
            print_stiff(name, stiff_rows, table)
            report["stiff"][name] = {
                "rows": [asdict(row) for row in stiff_rows], "equal_error": table,
            }  # fmt: skip
    report["memory"] = memory_rows(flows, chosen(PNODE, wanted))
    if flows:
        print("\nBytes kept per step, stages times the state's bytes, and graphs of f:")
    for entry in report["memory"]:
        share = entry["bytes_per_step"] / entry["stages_times_state"]
        print(
            f"{entry['workload']:>15} {entry['solver']:>15} {entry['bytes_per_step']:>12,.0f}   "
            f"{entry['stages']} x {entry['state_bytes']:,} = {entry['stages_times_state']:,} "
            f"({share:.3f} of it), graphs {entry['tape_bytes_per_step']:,.0f}"
        )
    if arguments.profile:
        profiled = {name: create_flow_task("pnode", flow, False) for name, flow in flows.items()}
        if "training" in arguments.workloads:
            profiled["training iteration"] = create_training_task("pnode")
        if "stiff" in arguments.workloads:
            for name, kinetics in STIFF.items():
                profiled[f"{name}, bdf"] = create_stiff_task("pnode bdf", kinetics, 1e-6)
        for name, task in profiled.items():
            print_profile(name, task.run, arguments.seconds / 10.0)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        if find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed")
        else:
            plot(report, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

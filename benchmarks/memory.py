"""Peak memory and time of a gradient against the number of steps.

pnode's classical RK4 without a limit and with budgets for its checkpoints, torchdiffeq's rk4 by
backpropagation and by its continuous adjoint, diffrax with RecursiveCheckpointAdjoint: methods of
four stages, fixed steps, one thread. ``memory_measure.py`` says what is measured and how; each
measurement has a process of its own.

Peaks are taken twice. glibc's malloc puts blocks of up to 32 MB side by side on its heap, so what
is kept lies between temporaries whose room is then lost: peaks with its defaults are what a user
sees, but change from run to run with the layout of the heap. With MALLOC_MMAP_THRESHOLD_=65536 it
maps every larger block on its own: these peaks are what is in use. Times are those with the
defaults.

A series ends at the first measurement beyond ``--limit`` of memory or ``--seconds``. What is not
installed is left out.

    python benchmarks/memory.py [--steps 10 30 100] [--long] [--series pnode diffrax]
        [--limit 4GB] [--seconds 300] [--repeats 3] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memory_measure import OVER_LIMIT, SERIES, Series

from pnode.problems.checkpointing import parse_bytes

STEPS = (10, 30, 100, 300, 1000)
LONG = (3000, 10000)  # for what is bounded
SCRIPT = Path(__file__).with_name("memory_measure.py")
# UCX, which some MPIs bring, would note every block that is unmapped: 144 bytes each, for ever.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "UCX_MEM_EVENTS": "n"}


class Ended(Exception):
    """A measurement that did not come to an end within the limits, or failed."""


def run_measurement(
    series: Series, steps: int, limit: str, seconds: float, repeats: int,
    environment: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Measure in a process of its own.

    Raises
    ------
    Ended
        With the reason.
    """
    command = [
        sys.executable, str(SCRIPT), series.name, str(steps),
        "--limit", str(parse_bytes("limit", limit)), "--repeats", str(repeats),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False,
            env=os.environ | environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Ended(f"over {seconds:g} s") from None
    if done.returncode == OVER_LIMIT:
        raise Ended(f"over {limit}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Ended(f"failed: {lines[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    series: Series, steps: int, limit: str, seconds: float, repeats: int = 3
) -> dict[str, Any]:
    """Return the row of one series and number of steps; ``failure`` is why there are no figures."""
    row: dict[str, Any] = {"series": series.name, "steps": steps, "failure": None}
    try:
        row |= run_measurement(series, steps, limit, seconds, repeats, {})
        mapped = run_measurement(series, steps, limit, seconds, 1, MAPPED)
    except Ended as reason:
        return {"series": series.name, "steps": steps, "failure": str(reason)}
    row["in_use_bytes"] = mapped["peak_bytes"]
    if row.get("as_planned") is False or row["peak_bytes"] > parse_bytes("limit", limit):
        row["failure"] = "not as planned" if row.get("as_planned") is False else f"over {limit}"
    return row


def megabytes(row: dict[str, Any], name: str) -> str:
    """Format a size in MB, or a dash."""
    return f"{row[name] / 1e6:.1f}" if name in row else "-"


def print_row(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    series = SERIES[row["series"]]
    line = f"{series.label:>21} {series.method:>14} {row['steps']:>6} "
    if "seconds" not in row:
        print(line + row["failure"], flush=True)
        return
    print(
        line + f"{megabytes(row, 'peak_bytes'):>9} {megabytes(row, 'in_use_bytes'):>9} "
        f"{row['seconds']:>8.3f} {row['cpu_seconds']:>8.3f} {row.get('evaluations', '-'):>7} "
        f"{row.get('recomputed', '-'):>10} "
        f"{megabytes(row, 'ram_bytes'):>8} {megabytes(row, 'disk_bytes'):>8} "
        f"{ {True: 'equal', False: 'DIFFERS'}.get(row.get('as_planned'), '-'):>7}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory and time against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, series in enumerate(SERIES.values()):
        done = [row for row in rows if row["series"] == series.name and "seconds" in row]
        if not done:
            continue
        steps = [row["steps"] for row in done]
        style = {"color": f"C{index}", "marker": "os^vD*P"[index], "markersize": 4}
        line = "-" if series.package == "pnode" else "--"
        memory.loglog(
            steps, [row["in_use_bytes"] / 1e6 for row in done], line, label=series.label, **style
        )
        memory.loglog(steps, [row["peak_bytes"] / 1e6 for row in done], ":", alpha=0.6, **style)
        seconds.loglog(steps, [row["cpu_seconds"] for row in done], line, **style)
    memory.set(xlabel="steps", ylabel="MB", title="peak memory in use (dotted: with lost room)")
    seconds.set(xlabel="steps", ylabel="seconds", title="CPU time of a gradient")
    for panel in (memory, seconds):
        panel.grid(alpha=0.3)
    memory.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--long", action="store_true", help=f"{LONG} steps too, where bounded")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--limit", default="4GB", help="memory of one measurement")
    parser.add_argument("--seconds", type=float, default=300.0, help="time of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="gradients whose times are taken")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw memory and time here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    chosen = []
    for name in arguments.series:
        if find_spec(SERIES[name].package) is None:
            print(f"{name}: left out, {SERIES[name].package} is not installed")
        else:
            chosen.append(SERIES[name])
    print(
        "64-256-64 tanh network, batch 256, float64, four stages a step; MB of 10^6 bytes\n"
        f"{'':>21} {'method':>14} {'steps':>6} {'peak':>9} {'in use':>9} {'seconds':>8} "
        f"{'CPU':>8} {'f':>7} {'recomputed':>10} {'RAM':>8} {'disk':>8} {'plan':>7}"
    )
    for series in chosen:
        for steps in (*arguments.steps, *(LONG if arguments.long and series.bounded else ())):
            row = measure(series, steps, arguments.limit, arguments.seconds, arguments.repeats)
            rows.append(row)
            print_row(row)
            if row["failure"] is not None:
                break
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if arguments.plot:
        if find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed")
        else:
            plot(rows, arguments.plot)
    return 1 if any(row.get("as_planned") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

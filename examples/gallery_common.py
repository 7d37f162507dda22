"""What the examples of the gallery share: options, tables, figures, measurements, and training."""

from __future__ import annotations

import argparse
import ast
import csv
import ctypes
import gc
import hashlib
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from common import at_least, hindrance, parser, pyplot, say
from mpi4py import MPI
from peak_memory import PeakMemory
from torch.utils._python_dispatch import TorchDispatchMode
from training import Interrupted, Training, UsageError, train

import pnode

M_MMAP_THRESHOLD = -3  # of malloc.h
TRUTH: dict[str, Any] = {"color": "0.75", "lw": 5, "label": "truth"}
DATA: dict[str, Any] = {
    "ls": "none", "marker": "o", "ms": 4.5, "mfc": "white", "mec": "black", "label": "data",
}  # fmt: skip
LEARNED: dict[str, Any] = {"color": "C3", "lw": 1.6, "label": "learned"}
WHERE = ("name", "output", "no_plot", "resume", "tensorboard", "settings")  # not what is computed
__all__ = [
    "DATA", "LEARNED", "TRUTH", "Measured", "Outcome", "Training", "UsageError", "arguments",
    "at_least", "counts", "figure", "launch", "measure", "mlp", "peer", "pyplot", "say", "train",
]  # fmt: skip


# ------------------------------------------------------------------------------------ the program


@dataclass
class Outcome:
    """What an example found.

    Attributes
    ----------
    numbers : dict
        Whatever stands in the JSON file, by name.
    rows : list of dict
        The table: one row per model, method or peer.
    figure : callable, optional
        Draws and returns matplotlib's figure.
    """

    numbers: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    figure: Callable[[], Any] | None = None


def arguments(
    name: str,
    doc: str | None,
    argv: Sequence[str] | None,
    *,
    iterations: int,
    quick: Mapping[str, Any] | None = None,
    add: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> argparse.Namespace:
    """Read the command line.

    Parameters
    ----------
    name, doc
        Of the example: its file's name, and docstring, of which ``--help`` shows the first line.
    iterations
        Default of ``--iterations``.
    quick
        Defaults with ``--quick``; options that are given win.
    add
        Adds the example's own options to the parser.
    """
    result = parser(name, (doc or "").strip().splitlines()[0], iterations)
    result.add_argument("--quick", action="store_true", help="a small version, in seconds")
    result.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    result.add_argument(
        "--tensorboard", action="store_true", help="log the training in FOLDER/tensorboard"
    )
    if add is not None:
        add(result)
    if result.parse_args(argv).quick:
        result.set_defaults(**(quick or {}))
    options = result.parse_args(argv)
    if options.tensorboard and find_spec("tensorboard") is None:
        result.error("--tensorboard needs tensorboard: install it, or leave the option out")
    options.name, options.settings = name, settings(options)
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what is computed."""
    return {name: value for name, value in sorted(vars(options).items()) if name not in WHERE}


def fingerprint(name: str) -> str:
    """Return a hash of the code of an example and of this file, without docstring and comments."""
    trees = []
    for path in (Path(__file__).with_name(f"{name}.py"), Path(__file__)):
        tree = ast.parse(path.read_text("utf-8"))
        trees.append(ast.dump(ast.Module(tree.body[1:], [])))
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


def launch(
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], Outcome],
    comm: MPI.Intracomm = MPI.COMM_WORLD,
) -> int:
    """Run an example and write its table, figure and numbers; return the exit code. Collective.

    0 is done, 1 a solve that failed, 2 an option or a file that is unusable, 128 + n a signal n.
    Rank 0 prints and writes.
    """
    folder, name = options.output, options.name
    problem, code = comm.bcast(hindrance(folder, not options.no_plot) if not comm.rank else None), 2
    begin, cpu = time.perf_counter(), time.process_time()
    if problem is None:
        torch.set_num_threads(1)
        torch.manual_seed(options.seed)
        try:
            outcome = run(options)
        except Interrupted as error:
            problem, code = f"{error}; it is saved, go on with --resume", error.code
        except KeyboardInterrupt:  # between trainings
            problem, code = "interrupted; trainings that are saved go on with --resume", 130
        except UsageError as error:
            problem = str(error)
        except pnode.PnodeError as error:  # the same on all ranks
            problem, code = str(error), 2 if isinstance(error, pnode.ConfigurationError) else 1
    if problem is not None:
        if comm.rank == 0:
            print(f"{name}.py: error: {problem}", file=sys.stderr)
        return code
    if comm.rank == 0:
        facts = {
            "example": name,
            "version": pnode.__version__,
            "source": fingerprint(name),
            "options": options.settings,
            "ranks": comm.size,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
        }
        write(outcome, facts, folder, name, not options.no_plot)
    return 0


def write(outcome: Outcome, facts: dict[str, Any], folder: Path, name: str, figure: bool) -> None:
    """Print the table, write all files, and remove what ``--resume`` would have used."""
    show(outcome.rows)
    written = [folder / f"{name}.json"]
    if outcome.rows:
        written.append(folder / f"{name}.csv")
        write_csv(outcome.rows, written[-1])
    if figure and outcome.figure is not None:
        written.append(folder / f"{name}.png")
        drawn = outcome.figure()
        drawn.savefig(written[-1], dpi=130)
        pyplot().close(drawn)
    content = plain({**facts, **outcome.numbers, "rows": outcome.rows})
    written[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in folder.glob(f"{name}-*.pt"):
        path.unlink()
    seconds, cpu = facts["seconds"], facts["cpu_seconds"]
    print(f"{seconds:.0f} s ({cpu:.0f} s of CPU); wrote {', '.join(map(str, written))}")


def plain(value: Any) -> Any:
    """Return numbers, texts, lists and dicts for JSON; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------- the tables and figures


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order they come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: Any) -> str:
    """Return the text of a table's cell."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, by rich if it is installed."""
    if not rows:
        return
    names = columns(rows)
    texts = [[cell(row.get(name)) for name in names] for row in rows]
    if find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for index, name in enumerate(names):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for line in texts:
            table.add_row(*line)
        wide = None if sys.stdout.isatty() else 200
        Console(width=wide, markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    for line in [names, *texts]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the table with all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def figure(rows: int, columns: int, title: str, **keywords: Any) -> tuple[Any, Any]:
    """Return a figure in the gallery's style and the array of its axes, always two-dimensional."""
    keywords = {"figsize": (4.6 * columns, 3.6 * rows + 0.4), "squeeze": False, **keywords}
    drawn, axes = pyplot().subplots(rows, columns, layout="constrained", **keywords)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    drawn.suptitle(title)
    return drawn, axes


# ------------------------------------------------------------------------------- the measurements


@dataclass
class Measured:
    """What a call returned and took; times are medians, the peak is the first call's."""

    value: Any
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def peak_mib(self) -> float:
        """The peak of resident memory above what was resident before, in MiB."""
        return self.peak_bytes / 2**20


class MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


class MemoryInUse(TorchDispatchMode):
    """The peak of what malloc (glibc 2.33 or later) has handed out, above what it had before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._base = 0

    def __enter__(self) -> Any:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = MallInfo
        gc.collect()
        self._libc.mallopt(M_MMAP_THRESHOLD, 65536)  # larger ones are counted at once
        self.peak, self._base = 0, self._in_use()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # where glibc's own adaptation ends
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _in_use(self) -> int:
        info = self._libc.mallinfo2()
        return int(info.hblkhd + info.uordblks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self._in_use() - self._base)
        return result


def measure(
    call: Callable[[], Any], repeats: int = 1, warm_up: bool = False, in_use: bool = False
) -> Measured:
    """Call and measure, after a call that is not measured if ``warm_up``.

    With ``in_use`` the peak is that of one more call: of what malloc has handed out, looked at
    after every operation of torch's. Resident memory has what malloc keeps for later besides, which
    for some tens of MiB is as much again, and never the same.
    """
    if warm_up:
        call()
    peak = None
    if in_use:
        with MemoryInUse() as seen:
            call()
        peak = seen.peak
    memory = PeakMemory()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        begin, cpu = time.perf_counter(), time.process_time()
        value = call()
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        if peak is None:
            peak = memory.above_base()
    assert peak is not None
    return Measured(value, statistics.median(seconds), statistics.median(cpu_seconds), peak)


def counts(solution: pnode.Solution) -> dict[str, int]:
    """Return what a solve and its backward sweeps took, for a row of the table."""
    stats = solution.stats
    names = ("steps", "rejected", "rhs", "jvp", "vjp", "jacobians")
    forward = {name: getattr(stats, name) for name in names}
    backward = {f"{name} back": getattr(stats.backward, name) for name in names[2:]}
    return {**forward, **backward}


def peer(name: str) -> ModuleType | None:
    """Import a package to compare with; say so and return None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        say(MPI.COMM_WORLD, f"{name} is not installed: its rows are left out")
        return None


def mlp(
    *sizes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    activation: type[torch.nn.Module] = torch.nn.Tanh,
) -> torch.nn.Sequential:
    """Return linear layers of the given sizes, Xavier weights and zero biases, from a seed."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = torch.nn.Linear(inputs, outputs, dtype=dtype)
        torch.nn.init.xavier_normal_(linear.weight, generator=generator)
        torch.nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return torch.nn.Sequential(*layers[:-1])

"""What the parallel examples share: training on all ranks alike, and what rank 0 does alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import pnode

FINAL_RATE = 0.01  # share of the first learning rate


def at_least(kind: type, least: float) -> Callable[[str], float]:
    """Return a type for argparse: numbers of a kind that are not below ``least``."""

    def convert(text: str) -> float:
        value: float = kind(text)
        if not least <= value < 2**63:
            bound = "not negative" if least == 0 else "positive" if least <= 1 else None
            bound = bound or f"at least {least}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}")
        return value

    convert.__name__ = kind.__name__
    return convert


def parser(program: str, description: str, iterations: int) -> argparse.ArgumentParser:
    """Return a parser with the options that the parallel examples have in common."""
    result = argparse.ArgumentParser(prog=f"{program}.py", description=description)
    add = result.add_argument
    add("--seed", type=at_least(int, 0), default=0, help="seed of data and weights (0)")
    add(
        "--iterations",
        type=at_least(int, 1),
        default=iterations,
        help=f"updates of the parameters ({iterations})",
    )
    add(
        "--output",
        type=Path,
        default=Path(program),
        metavar="FOLDER",
        help=f"write {program}.png and {program}.json there ({program})",
    )
    add("--no-plot", action="store_true", help="write no figure")
    return result


def network(inputs: int, width: int, generator: torch.Generator) -> torch.nn.Sequential:
    """Return a float64 network of two hidden layers whose output is zero to begin with.

    Its output has no bias. The seed makes the weights the same on all ranks.
    """
    first, second = torch.nn.Linear(inputs, width), torch.nn.Linear(width, width)
    last = torch.nn.Linear(width, 1, bias=False)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), last).double()
    with torch.no_grad():
        for layer in (first, second):
            torch.nn.init.xavier_normal_(layer.weight, generator=generator)
            layer.bias.normal_(0.0, 0.1, generator=generator)
        last.weight.zero_()
    return net


def train(
    parameters: Iterable[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    iterations: int,
    rate: float,
    comm: MPI.Intracomm,
) -> list[float]:
    """Minimise a loss by Adam, with a learning rate that falls along half a cosine.

    Every rank makes the same updates: parameters, loss and, after ``backward``, gradients are the
    same on all of them.

    Returns
    -------
    list of float
        The losses, one before each update and one after the last.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, iterations, eta_min=FINAL_RATE * rate
    )
    losses = []
    for iteration in range(iterations):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        if iteration % max(iterations // 10, 1) == 0:
            say(comm, f"  iteration {iteration:4d}: loss {losses[-1]:.3e}")
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses.append(loss().item())
    say(comm, f"  iteration {iterations:4d}: loss {losses[-1]:.3e}")
    return losses


def say(comm: MPI.Intracomm, text: str) -> None:
    """Print on rank 0."""
    if comm.rank == 0:
        print(text, flush=True)


def launch(
    program: str, folder: Path, figure: bool, run: Callable[[], None], comm: MPI.Intracomm
) -> int:
    """Make sure that the results can be written, and run; return the exit code. Collective.

    0 is done, 1 a solve that failed, 2 an option that is unusable. Rank 0 tells why.
    """
    problem, code = comm.bcast(hindrance(folder, figure) if comm.rank == 0 else None), 2
    if problem is None:
        begin = time.perf_counter()
        try:
            run()
        except pnode.PnodeError as error:  # the same on all ranks
            problem, code = str(error), 2 if isinstance(error, pnode.ConfigurationError) else 1
    if problem is not None:
        if comm.rank == 0:
            print(f"{program}.py: error: {problem}", file=sys.stderr)
        return code
    say(comm, f"{time.perf_counter() - begin:.0f} s on {comm.size} ranks")
    return 0


def hindrance(folder: Path, figure: bool) -> str | None:
    """Make the folder of the results; return why they cannot be written, if they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    if not os.access(folder, os.W_OK):
        return f"the folder {folder} cannot be written to"
    if figure and find_spec("matplotlib") is None:
        return "the figure needs matplotlib: install it, or give --no-plot"
    return None


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write the numbers with all their digits."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pyplot() -> Any:
    """Return matplotlib's pyplot, for files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

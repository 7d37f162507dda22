"""What the examples share that is small: options, a network, what rank 0 does alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI


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
    """Return a parser with the options that the examples have in common."""
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


def say(comm: MPI.Intracomm, text: str) -> None:
    """Print on rank 0."""
    if comm.rank == 0:
        print(text, flush=True)


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


def pyplot() -> Any:
    """Return matplotlib's pyplot, for files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

"""The parallel examples: on two ranks the numbers are those of one."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpi4py import MPI
from ranks import checks, comm

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs an example

pytestmark = pytest.mark.mpi(min_size=2, max_size=2)


def alone(monkeypatch: pytest.MonkeyPatch, example: Any) -> None:
    """Let an example take this rank for all there is."""
    names = {"COMM_WORLD": MPI.COMM_SELF, "COMM_SELF": MPI.COMM_SELF, "MAX": MPI.MAX}
    monkeypatch.setattr(example, "MPI", SimpleNamespace(**names))


@pytest.mark.parametrize(("name", "cells"), [("burgers", "16"), ("lorenz96", "8")])
def test_a_program_gives_the_numbers_of_one_rank(
    name: str, cells: str, shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = importlib.import_module(name)
    monkeypatch.setattr(example, "beside", lambda *_: [])  # times, and on one rank alone
    argv = ["--cells", cells, "--iterations", "2", "--no-plot", "--output"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = example.main([*argv, str(shared_folder)])
    checks.true(code == 0, code)
    checks.true(printed.getvalue().count("wrote ") == (comm.rank == 0), printed.getvalue())
    alone(monkeypatch, example)
    monkeypatch.setattr(example, "launch", partial(example.launch, comm=MPI.COMM_SELF))
    checks.true(example.main([*argv, str(tmp_path)]) == 0)
    checks.true(not [*shared_folder.glob("*.png")])
    comm.barrier()
    shared, expected = (
        json.loads((folder / f"{name}.json").read_text()) for folder in (shared_folder, tmp_path)
    )
    checks.true((shared.pop("ranks"), expected.pop("ranks")) == (2, 1))
    for content in (shared, expected):
        checks.true(content.pop("seconds") > 0 and content.pop("cpu_seconds") > 0)
        for number, row in enumerate(content.pop("rows")):
            content |= {f"{number}, {column}": value for column, value in row.items()}
    checks.true(shared.keys() == expected.keys())
    for key, value in expected.items():
        close = isinstance(value, (float, list))
        wanted = pytest.approx(value, rel=1e-10, abs=0) if close else value
        checks.true(shared[key] == wanted, key, shared[key], value)


def test_kuramoto_sivashinsky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    example = importlib.import_module("kuramoto_sivashinsky")
    argv = ["--quick", "--no-plot", "--iterations", "2", "--output", str(tmp_path)]
    made: list[torch.Tensor] = []
    make = example.trajectories

    def trajectories(*arguments: Any) -> torch.Tensor:
        if not made:
            made.append(make(*arguments))
        return made[0]

    monkeypatch.setattr(example, "trajectories", trajectories)
    shared = example.run(example.parse(argv))
    alone(monkeypatch, example)
    monkeypatch.setattr(example, "cost", lambda *arguments: [])
    expected = example.run(example.parse(argv)).numbers["losses"]
    losses = shared.numbers["losses"]
    checks.true(losses == pytest.approx(expected, rel=1e-10), losses, expected)
    checks.true(losses[-1] < losses[0], losses)
    for row in shared.rows:  # one in each direction
        checks.true(row["Jacobians"] == row["factorizations"] == 2, row)
    third, fourth = (row["error"] for row in shared.rows)
    checks.below(fourth, third / 10)


def test_reactors() -> None:
    """Loss, gradient and steps, which all reactors share; the data are made on all ranks too."""
    example = importlib.import_module("reactors")
    guess = [
        energy * factor for energy, factor in zip(example.ENERGIES, example.WRONG, strict=True)
    ]
    found = []
    for where in (comm, MPI.COMM_SELF):
        data = example.Measured.random(4, torch.Generator().manual_seed(0), where)
        kinetics = example.Kinetics(data.temperatures, example.GUESS, guess)
        loss, slope, solution = example.gradient(example.loss_of(kinetics, data, where), kinetics)
        found.append((loss, slope, solution.stats.steps))
        checks.true(len(data.temperatures) == 4 // where.size)
    (loss, slope, steps), (expected, slopes, count) = found
    checks.true(loss == pytest.approx(expected, rel=1e-10), loss, expected)
    checks.below(((slope - slopes).norm() / slopes.norm()).item(), 1e-9, "gradient")
    checks.true(steps == count, steps, count)

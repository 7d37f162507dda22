"""The benchmark of stiff solvers: its counts, its problems, its comparison at equal errors."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pnode

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where Python looks when it runs a script of it

import scaling  # noqa: E402
import stiff  # noqa: E402
import stiff_gradients  # noqa: E402
from stiff_problems import PROBLEMS, SENSITIVITIES  # noqa: E402

D = torch.float64
EVERY = {**PROBLEMS, **{name: item.problem for name, item in SENSITIVITIES.items()}}


def test_counts_are_those_of_the_ledger(tmp_path):
    path = tmp_path / "stiff.json"
    command = [
        sys.executable, str(FOLDER / "stiff.py"), "--quick", "--problems", "ROBER",
        "--solvers", "es325", "no_such_method", "rk4", "--json", str(path),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("no_such_method", "rk4"):
        assert f"{name}: left out, pnode has no adaptive method of this name\n" in run.stdout
    report = json.loads(path.read_text())
    assert list(report["problems"]) == ["ROBER"]
    rows = report["problems"]["ROBER"]["rows"]
    assert [(row["solver"], row["rtol"]) for row in rows] == [("es325", 1e-3), ("es325", 1e-5)]
    problem = PROBLEMS["ROBER"]
    y0, times = (torch.tensor(entries, dtype=D) for entries in (problem.start, (0.0, problem.end)))
    for row in rows:
        calls = 0

        def field(t, y):
            nonlocal calls
            calls += 1
            return torch.stack(problem.field(y.unbind(), problem.parameters))

        solver = pnode.Solver(
            field, method="es325", rtol=row["rtol"], atol=problem.ratio * row["rtol"]
        )
        with torch.no_grad():
            solution = solver(y0, times)
        ledger = solution.stats
        assert row["rhs"] == ledger.rhs == calls
        assert row["jvp"] == ledger.jvp
        for name in ("steps", "rejected", "newton", "jacobians"):
            assert row[name] == getattr(ledger, name)
        assert row["columns"] == 3 * ledger.jacobians > 0
        assert row["evaluations"] == row["rhs"] + row["jvp"] + row["columns"]
        errors = (solution.ys[-1] / torch.tensor(problem.reference, dtype=D) - 1).abs()
        assert row["error"] == pytest.approx(errors.max().item(), rel=1e-12)
        assert row["failure"] is None
    (name, (gradient,)), *others = report["gradients"].items()
    assert name == "ROBER A(40)" and not others
    _, ledger = stiff_gradients.pnode_gradient("es325", SENSITIVITIES[name])(gradient["rtol"])
    assert gradient["rhs"] == ledger.rhs
    assert gradient["backward_rhs"] == ledger.backward.rhs
    assert gradient["vjp"] == ledger.backward.vjp > 0
    assert gradient["error"] < 1e-3


@pytest.mark.parametrize("name", list(EVERY))
def test_hand_written_derivatives(name):
    problem = EVERY[name]
    y = torch.rand(len(problem.start), dtype=D, generator=torch.Generator().manual_seed(0)) + 0.5
    p = torch.tensor(problem.parameters, dtype=D)

    def field(y, p):
        return torch.stack(problem.field(y.unbind(), p.unbind()))

    by_state, by_parameter = torch.func.jacrev(field, argnums=(0, 1))(y, p)
    expected = torch.tensor(problem.jacobian(y.tolist(), p.tolist()), dtype=D)
    torch.testing.assert_close(by_state, expected, rtol=1e-14, atol=0.0)
    if name in SENSITIVITIES:
        rows = SENSITIVITIES[name].by_parameter(y.tolist(), p.tolist())
        torch.testing.assert_close(by_parameter, torch.tensor(rows, dtype=D), rtol=1e-14, atol=0.0)


def test_reference_gradient_by_two_methods():
    sensitivity = SENSITIVITIES["ROBER A(40)"]
    forward = stiff_gradients.forward_sensitivities(sensitivity, rtol=1e-9)
    # Differences: the end value's error of about 1e-10 over a step of 1e-2, relative to 0.02.
    differences = stiff_gradients.central_differences(sensitivity, relative_step=1e-2, rtol=1e-10)
    assert np.abs(forward / np.array(sensitivity.gradient) - 1).max() < 1e-7
    assert np.abs(differences / np.array(sensitivity.gradient) - 1).max() < 1e-6


def test_cost_at_equal_error():
    line = [(1e-2, 10.0), (1e-4, 1000.0), (1e-6, 1e5)]  # cost = 0.1 / error
    assert stiff.cost_at(line, 1e-3) == (pytest.approx(100.0), "")
    assert stiff.cost_at(line, 1e-6) == (pytest.approx(1e5), "")
    assert stiff.cost_at(line, 1e-1) == (10.0, "<")
    assert stiff.cost_at(line, 1e-7) is None
    assert stiff.cost_at([], 1e-3) is None
    # A lucky second point does not count, the last crossing does.
    assert stiff.cost_at([(1e-2, 1.0), (1e-6, 2.0), (1e-4, 4.0), (1e-6, 16.0)], 1e-5) == (
        pytest.approx(8.0), "",
    )  # fmt: skip


def test_failures_are_rows():
    def run_once(row, task):
        if row.solver == "bad":
            raise ZeroDivisionError("no\nend")

    tasks = {"good": lambda rtol: None, "bad": lambda rtol: None}
    rows = stiff.climb(stiff.Row, tasks, run_once, (1e-3, 1e-4), 1, 10.0)
    assert [(row.solver, row.rtol, row.failure) for row in rows] == [
        ("good", 1e-3, None), ("bad", 1e-3, "ZeroDivisionError: no end"),
        ("good", 1e-4, None), ("bad", 1e-4, "ZeroDivisionError: no end"),
    ]  # fmt: skip
    assert all((row.seconds is None) == (row.solver == "bad") for row in rows)


@pytest.mark.mpi
def test_scaling(tmp_path):
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = [
        sys.executable, str(FOLDER / "scaling.py"), "--quick", "--json", str(path),
        "--plot", str(picture),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(path.read_text())
    assert picture.stat().st_size > 10_000
    for mode, result in report["modes"].items():
        counts = result["per_step"]
        if "GMRES" in mode:
            assert counts["reductions"] > 10.0
        else:
            assert counts["reductions"] == float("adaptive" in mode)
        if "rk4" in mode:  # a message per stage forward, two backward: for f, and for its product
            assert counts["sends"] == (0.0 if "batch" in mode else 12.0)
            # Two rows of 16 cells and two corners each, of two fields.
            assert counts["sent"] == counts["sends"] * 8 * 2 * 2 * (16 + 2)
        for kind in ("weak", "strong"):
            efficiencies = result["cluster"][kind]
            assert efficiencies[0] == pytest.approx(1.0, rel=1e-12)
            assert all(0.0 < b <= a * (1 + 1e-12) for a, b in itertools.pairwise(efficiencies))


def test_communication_model():
    machine = scaling.Machine(latency=2.0, bandwidth=8.0, reduction=3.0)
    model = scaling.Model(
        base=5.0, per_cell=0.5, exchanges=2.0, reductions=1.0, once=4.0, steps=8.0
    )
    # 100 cells: 55 alone; with 15 others, 8 neighbours, 4 sides of 10 cells and 4 corners of two
    # fields, and four stages of 1.5 reductions.
    assert model.seconds(machine, 1, 100) == 55.0
    assert model.seconds(machine, 16, 100) == 55.0 + 2 * (8 * 2.0 + 704 / 8.0) + 1.5 * 4 * 3.0
    assert model.weak(machine, 16, 100) == 55.0 / model.seconds(machine, 16, 100)
    assert model.strong(machine, 16, 1600) == 805.0 / (16 * model.seconds(machine, 16, 100))

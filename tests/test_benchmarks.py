"""The benchmarks of stiff solvers and of memory: counts, problems, comparison, curves."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pnode

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where Python looks when it runs a script of it

import gpu  # noqa: E402
import stiff  # noqa: E402
import stiff_gradients  # noqa: E402
from stiff_problems import PROBLEMS, SENSITIVITIES  # noqa: E402
from stiff_solvers import create_solver  # noqa: E402

D = torch.float64
EVERY = {**PROBLEMS, **{name: item.problem for name, item in SENSITIVITIES.items()}}


@pytest.fixture
def run(monkeypatch):
    """Run a script of the benchmarks in this process."""
    # What memory_measure.py would set.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return importlib.import_module(name).main()

    return run


def test_counts_are_those_of_the_ledger(tmp_path, run, capsys):
    path = tmp_path / "stiff.json"
    solvers = ("es325", "no_such_method", "rk4")
    assert (
        run("stiff", "--quick", "--problems", "ROBER", "--json", path, "--solvers", *solvers) == 0
    )
    printed = capsys.readouterr().out
    for name in ("no_such_method", "rk4"):
        assert f"{name}: left out, pnode has no adaptive method of this name\n" in printed
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


def test_radau5_takes_no_more_than_scipy_s():
    """Evaluations and columns, where Newton's method is often at its limit of iterations."""
    sums = []
    for solver in ("radau5", "scipy-radau"):
        runs = [create_solver(solver, PROBLEMS["HIRES"]).count(rtol) for rtol in (1e-5, 1e-6)]
        sums.append(sum(run.rhs + 8 * run.jacobians for run in runs))
    assert sums[0] < 1.02 * sums[1]


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


def test_memory_stays_within_the_budget(tmp_path, run, monkeypatch, capsys):
    path = tmp_path / "memory.json"
    memory = importlib.import_module("memory")
    monkeypatch.setattr(memory, "find_spec", lambda name: None if name == "torchdiffeq" else name)
    series = ("torchdiffeq", "pnode", "pnode-16MB", "pnode-16MB-disk")
    assert run("memory", "--steps", 60, "--repeats", 1, "--json", path, "--series", *series) == 0
    assert "torchdiffeq: left out, torchdiffeq is not installed\n" in capsys.readouterr().out
    rows = {row["series"]: row for row in json.loads(path.read_text())["rows"]}
    free, steps = rows["pnode"], 60
    assert free["ram_bytes"] == steps * 4 * 64 * 256 * 8
    assert free["in_use_bytes"] > free["ram_bytes"]
    fixed = 12e6  # outputs, gradients, the graph of f at one stage: 3.4e6 bytes with 10 steps
    for row in (rows["pnode-16MB"], rows["pnode-16MB-disk"]):
        assert row["failure"] is None
        assert row["as_planned"]
        assert row["taken"] == steps
        assert row["ram_bytes"] <= 16e6
        assert row["evaluations"] == 8 * steps + 4 * row["recomputed"]
        assert row["gradient_norm"] == free["gradient_norm"]
        assert row["in_use_bytes"] < 16e6 + fixed < free["in_use_bytes"]
    assert rows["pnode-16MB"]["recomputed"] > 0 == rows["pnode-16MB-disk"]["recomputed"]
    assert rows["pnode-16MB-disk"]["disk_bytes"] > 0 == rows["pnode-16MB"]["disk_bytes"]


def test_memory_series_end_at_the_limits(run, capsys):
    for limit, reason in ((("--limit", "40MB"), "over 40MB"), (("--seconds", 1), "over 1 s")):
        assert run("memory", "--steps", 150, 200, "--repeats", 1, "--series", "pnode", *limit) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split(maxsplit=5)[-1] == f"150 {reason}"


def test_gpu_table_without_a_gpu(monkeypatch, capsys):
    """On the CPU the table can be tried: both places of the state are the same there."""
    tiny = {
        "explicit": ((4, 3), 5, {"method": "rk4", "step_size": 0.5}),
        "blocks": ((4, 3), 5, {"method": "cn", "step_size": 0.5, "jacobian": "block"}),
        "wrong": ((4, 3), 5, {"method": "cn", "step_size": 0.5, "jacobian": "none"}),
    }
    monkeypatch.setattr(gpu, "PROBLEMS", tiny)
    rows = gpu.table("cpu", gpu.time.perf_counter() + 60.0)
    found = {(row["problem"], row["way"]): row for row in rows}
    for name in ("explicit", "blocks"):
        for way in ("device", "host"):
            row = found[name, way]
            assert row["steps"] == 2
            assert row["forward"] > 0.0 and row["backward"] > 0.0
    assert "jacobian='none' is unknown" in found["wrong", "host"]["error"]
    assert "failed, ConfigurationError" in capsys.readouterr().out
    assert gpu.table("cpu", gpu.time.perf_counter()) == []
    assert "the time is up" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_battery_says_that_there_is_no_gpu(tmp_path, run, capsys):
    path = tmp_path / "gpu.json"
    assert run("gpu", "--json", path) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not path.exists()
    # Its tests are skipped, for the same reason.
    result = gpu.run_tests(120.0)
    assert result["finished"]
    assert result["counts"].keys() == {"skipped"}
    assert result["skipped"] == ["torch sees no CUDA or HIP device"]


def test_kept_jacobians_lead_to_no_other_root_of_a_fixed_step():
    """The equations of such a long step of POLLU have roots with concentrations below zero, too."""
    problem = PROBLEMS["POLLU"]

    def field(t, y):
        return torch.stack(problem.field(y, problem.parameters))

    y0 = torch.tensor(problem.start, dtype=torch.float64)
    found = {}
    for reuse in ("auto", "step", "iteration"):
        solver = pnode.Solver(
            field, method="beuler", step_size=1.0, jacobian="dense", jacobian_reuse=reuse
        )
        found[reuse] = solver(y0, torch.tensor([0.0, 3.0], dtype=torch.float64))
    newton = found.pop("iteration")
    for solution in found.values():
        # Each step is solved to 1e-12 of the state.
        assert float((solution.ys[-1] - newton.ys[-1]).abs().max()) < 1e-10
        assert solution.stats.jacobians < 2 * newton.stats.jacobians

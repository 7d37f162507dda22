"""The benchmark beside other solvers: what it checks, how it times, what it compares."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from replica import petsc_tableau, rk_step

from pnode.solvers.methods import find_method

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where Python looks when it runs a script of it

import peers  # noqa: E402
import run  # noqa: E402
from peer_flows import FLOWS, Flow, Outcome, Task, TorchFlow, create_flow_task, joined  # noqa: E402
from peer_stiff import Kinetics, create_stiff_task, gradient_error, reference  # noqa: E402
from peer_threads import thread_settings  # noqa: E402
from peer_training import create_training_task  # noqa: E402


def test_quick_run_without_peers(tmp_path, capsys):
    report, figure = tmp_path / "peers.json", tmp_path / "peers.png"
    arguments = [
        "--quick", "--seconds", "0.1", "--workloads", "2-50-2", "training", "--solvers", "bare",
        "--json", str(report), "--plot", str(figure), "--profile", "--cpu-time",
    ]  # fmt: skip
    assert peers.main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads(report.read_text())
    fixed, adaptive, training = figures["workloads"].values()
    assert [row["solver"] for row in fixed] == ["pnode", "bare torch", "bare torch, tape"]
    assert [row["solver"] for row in adaptive] == [row["solver"] for row in training] == ["pnode"]
    flow = FLOWS["2-50-2"]
    assert (fixed[0]["accepted"], fixed[0]["rejected"]) == (flow.steps, 0)
    assert 0 < adaptive[0]["error"] < 1e-6
    for row in (*fixed, *adaptive, *training):
        assert row["refused"] is None and row["seconds"] > 0 and row["rounds"] >= peers.LEAST
    middle, low, high = fixed[0]["to_bare"]
    assert 0 < low <= middle <= high
    assert fixed[1]["of_pnode"]["pnode"][0] == pytest.approx(middle)
    (memory,) = figures["memory"]
    assert memory["bytes_per_step"] == memory["stages_times_state"] == 6 * 8 * math.prod(flow.shape)
    assert figure.stat().st_size > 0
    assert "Profile of 2-50-2" in printed and "Profile of training iteration" in printed
    assert "left out, the number of steps is everybody's own choice" in printed


def outcome(value=1.0, entries=(1.0, 2.0), accepted=4, rejected=0):
    return Outcome(value, np.array(entries), accepted, rejected)


@pytest.mark.parametrize(
    "result, discrete, steps, refused",
    [
        (outcome(), True, 4, None),
        (outcome(entries=(1.0, 2.0 + 1e-8)), True, 4, None),
        (outcome(entries=(1.0, 2.0 + 3e-8)), True, 4, "its gradient differs by 1.5e-08"),
        (outcome(entries=(1.0, 2.0 + 3e-8)), False, 4, None),
        (outcome(value=1.0 + 2e-8), False, 4, "its value differs by 2.0e-08"),
        (outcome(value=math.nan), True, 4, "its value differs by nan"),
        (outcome(accepted=5), True, 4, "5 steps and 0 rejected, not 4"),
        (outcome(value=1.1, entries=(1.0, 2.1), rejected=3), True, None, None),
    ],
)
def test_wrong_results_are_refused(result, discrete, steps, refused):
    row = peers.Row("peer")
    task = Task(lambda: result, lambda raw: raw, discrete)
    assert peers.check(row, task, steps, outcome()) is result
    assert row.refused == refused


def test_refused_solvers_are_not_timed():
    calls = []

    def create(name):
        if name == "broken":
            raise ZeroDivisionError("no\nend")
        entries = (1.0, 3.0) if name == "wrong" else (1.0, 2.0)
        return Task(lambda: calls.append(name) or outcome(entries=entries), lambda raw: raw)

    rows = peers.measure(
        ["pnode", "wrong", "broken"], create, 4, None, 0.0, time.perf_counter, peers.Absent()
    )
    assert [row.refused for row in rows] == [
        None, "its gradient differs by 5.0e-01", "ZeroDivisionError: no end",
    ]  # fmt: skip
    assert calls.count("wrong") == 1 < calls.count("pnode")
    assert rows[0].of_pnode == {"pnode": (1.0, 1.0, 1.0)} and rows[1].seconds is None


def test_rounds_begin_with_another_one_each_time(monkeypatch):
    monkeypatch.setattr(peers, "SHORTEST", 0.0)
    calls = []
    tasks = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = peers.rounds(tasks, 0.0)
    assert "".join(calls) == "abc" + "abcbcacab"
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_taken_within_rounds():
    assert peers.ratio([2.0, 4.0, 60.0], [1.0, 4.0, 20.0]) == (2.0, 1.5, 2.5)


def test_comparison_at_equal_errors():
    rows, times = [], {}
    for solver, factor in (("pnode bdf", 6.0), ("pnode es325", 9.0), ("diffrax Kvaerno5", 2.0)):
        for rtol, error, cost in ((1e-3, 1e-3, 1.0), (1e-7, 1e-7, 1e4)):
            rows.append(peers.StiffRow(solver, rtol, error, 10, 0, cost))
            times[f"{solver} {rtol}"] = [factor * cost, 2 * factor * cost]
    table = {
        entry["solver"]: entry
        for entry in peers.compare_at_equal_errors(rows, times)
        if entry["error"] == 1e-4
    }
    # A tenth of the error at ten times the cost, in both rounds.
    assert table["pnode bdf"]["seconds"] == pytest.approx(1.5 * 60.0)
    assert table["pnode bdf"]["best"] and not table["pnode es325"]["best"]
    assert table["diffrax Kvaerno5"]["of_pnode"]["pnode bdf"] == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 4, 4)])
def test_gradient_of_a_flow(shape):
    flow = Flow(shape, 5, 3, 1e-6)
    task = create_flow_task("pnode", flow, adaptive=False)
    found = task.read(task.run())
    net, tableau = TorchFlow(flow), petsc_tableau(find_method("dopri5"))
    y = net.start
    for step in range(flow.steps):
        y = rk_step(net, tableau, step / flow.steps, 1 / flow.steps, y)
    value = y.square().sum()
    gradients = torch.autograd.grad(value, (net.start, *net.parameters()))
    assert found.value == pytest.approx(value.item(), rel=1e-12)
    assert found.gradient == pytest.approx(joined(gradients), rel=1e-9, abs=1e-12)
    assert (found.accepted, found.rejected) == (flow.steps, 0)


def test_stiff_gradients():
    task = create_stiff_task("pnode bdf", Kinetics(0), 1e-5)
    exact = reference(Kinetics(0), print)
    assert gradient_error(task.read(task.run()).gradient, exact) < 1e-3
    results = []
    for solver, rtol in (("pnode bdf", 1e-5), ("pnode es325", 1e-4)):
        task = create_stiff_task(solver, Kinetics(4), rtol)
        results.append(task.read(task.run()).gradient)
    assert results[0].shape == (3 + 4 * 3 + 4 + 4 + 1,)
    assert 0 < gradient_error(*results) < 1e-3  # by two methods that share no coefficients


def test_training_iterations_do_not_train():
    task = create_training_task("pnode")
    first, second = task.read(task.run()), task.read(task.run())
    assert first.value == pytest.approx(second.value, rel=1e-12)
    assert first.gradient == pytest.approx(second.gradient, rel=1e-9, abs=1e-12)


def test_threads():
    assert thread_settings(["--quick"])["OMP_NUM_THREADS"] == "1"
    assert "eigen=false" in thread_settings([])["XLA_FLAGS"]
    assert thread_settings(["--threads", "2"])["NPROC"] == "2"
    assert "eigen=true" in thread_settings(["--threads", "2"])["XLA_FLAGS"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_script_is_run(quick):
    scripts = {Path(line[1]).name for line in run.commands(quick)}
    # gpu.py is the command for a machine with a GPU, and does all that is to be done there.
    others = ("stiff_", "peer_", "memory_", "counting.py", "run.py", "gpu.py")
    assert scripts == {p.name for p in FOLDER.glob("*.py") if not p.name.startswith(others)}

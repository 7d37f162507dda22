"""The examples: their numbers, their messages, their files."""

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from children import run_program

import pnode

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "robertson.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("robertson_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(SCRIPT.parent))  # where Python looks when it runs the script
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


robertson = load()


@pytest.fixture(scope="module")
def observations():
    return robertson.robertson_observations()


def learn(folder, *argv, observations=None):
    """Train in a folder, with options as on the command line."""
    options = robertson.parse(["--output", str(folder), *map(str, argv)])
    return robertson.learn(options, observations or robertson.robertson_observations())


@pytest.fixture(scope="module")
def trained(observations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return learn(folder, "--iterations", 40, observations=observations)


# ------------------------------------------------------------------------------------- the data


def test_reference_data(observations):
    # Values that CVODE's documentation prints for this problem.
    times, states = observations.curve
    for time, expected in ((0.4, (9.8517e-01, 3.3864e-05, 1.4794e-02)),
                           (40.0, (7.1583e-01, 9.1850e-06, 2.8416e-01))):  # fmt: skip
        found = [np.interp(np.log(time), np.log(times), column) for column in states.T]
        assert found == pytest.approx(expected, rel=2e-3)
    assert observations.states.sum(1).sub(1).abs().max() < 1e-9
    assert observations.times.shape == (41,)
    assert observations.times[:2].tolist() == pytest.approx([0.0, 1e-5], rel=1e-12)
    assert observations.scaled.amin(0).tolist() == [0, 0, 0]
    assert observations.scaled.amax(0).tolist() == [1, 1, 1]
    # B moves ten thousand times as fast as the others.
    assert observations.rates.tolist() == pytest.approx([0.1045, 1094, 0.1043], rel=0.01)


def test_output_times_of_the_finer_grid_contain_the_given_ones(observations):
    fine = robertson.refine(observations.times, 8)
    assert len(fine) == 8 * 40 + 1
    assert torch.equal(fine[::8], observations.times)
    assert bool((fine.diff() > 0).all())


@pytest.mark.parametrize("header", ["", "time,prey,predator\n", "\ufefftime , prey, predator\n\n"])
def test_csv_is_read(tmp_path, header):
    path = tmp_path / "data.csv"
    path.write_text(header + "0.5,1,-2\n1, 2.5 ,4\n\n2,3,1e1\n", encoding="utf-8")
    data = robertson.read_csv(path)
    assert data.times.tolist() == [0.5, 1, 2]
    assert data.states.tolist() == [[1, -2], [2.5, 4], [3, 10]]
    assert data.names == (("prey", "predator") if header else ("y1", "y2"))
    assert data.scaled.tolist() == [[0, 0], [0.75, 0.5], [1, 1]]
    assert data.rates.tolist() == [1.5, 1.0]


def test_constant_column_does_not_divide_by_zero(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("0,1,5\n1,2,5\n4,3,5\n")
    data = robertson.read_csv(path)
    assert data.scaled[:, 1].tolist() == [0, 0, 0]
    assert data.rates.tolist() == [0.5, 0.25]


BAD_FILES = {
    "not a number": ("t,a,b\n0,1,2\n1,2,x1\n2,3,4\n", "line 3, column 3 (b): 'x1' is not a number"),
    "in row one": ("0,1,2\n1,O,3\n2,3,4\n", "line 2, column 2: 'O' is not a number"),
    "half a header": ("t,1,b\n1,2,3\n2,3,4\n3,4,5\n", "line 1, column 1: 't' is not a number"),
    "empty cell": ("0,1,2\n1,,3\n2,3,4\n", "line 2, column 2: the cell is empty"),
    "NaN": ("t,a\n0,1\n1,nan\n2,3\n", "line 3, column 2 (a): 'nan' is not finite"),
    "infinity": ("0,1\n-inf,3\n2,3\n", "line 2, column 1: '-inf' is not finite"),
    "short row": ("0,1,2\n1,2\n2,3,4\n", "line 2, column 3: the row has 2 columns, but"),
    "long row": ("0,1\n\n1,2,9\n2,3\n", "line 3, column 3: the row has 3 columns, but"),
    "time repeats": (
        "t,a\n0,1\n1,2\n1,3\n",
        "line 4, column 1 (t): the time 1 does not come after",
    ),
    "time falls": ("0,1\n2,2\n1,3\n", "line 3, column 1: the time 1 does not come after 2"),
    "too few rows": ("t,a\n0,1\n1,2\n", "line 3: the file ends after 2 rows of numbers"),
    "only a header": ("t,a\n", "line 1: the file ends after 0 rows of numbers"),
    "one column": ("0\n1\n2\n", "line 1, column 1: the row has one column"),
    "semicolons": ("t;a\n0;1\n", "line 1, column 1: the row has one column"),
    "empty": ("", "the file is empty"),
    "blank": ("\n \n", "the file is empty"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_csv_is_refused_with_file_line_and_column(tmp_path, capsys, case):
    text, message = BAD_FILES[case]
    path = tmp_path / "data.csv"
    path.write_text(text)
    assert robertson.main(["--data", str(path), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"robertson.py: error: {path}")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_files_are_refused(tmp_path, capsys):
    binary = tmp_path / "data.csv"
    binary.write_bytes(b"0,1\n1,\xff\n")
    for path, message in (
        (tmp_path / "missing.csv", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "byte 7 is not UTF-8 text"),
    ):
        assert robertson.main(["--data", str(path)]) == 2
        assert f"{path}: {message}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("seed", range(5))
def test_the_untrained_field_relaxes(observations, seed):
    rest = observations.scaled[1:].mean(0)
    kinetics = robertson.Kinetics(observations.rates, rest, seed)
    assert sum(p.numel() for p in kinetics.parameters()) == 20 + 5 * 30 + 18
    for state in observations.scaled[::8]:
        expected = observations.rates * (rest - state)
        found = kinetics(torch.zeros(()), state)
        assert ((found - expected) / observations.rates).abs().max() < 0.25
        jacobian = torch.autograd.functional.jacobian(lambda y: kinetics(None, y), state)
        assert torch.linalg.eigvals(jacobian).real.max() < 0


def test_more_quantities_than_neurons():
    rates, rest = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    kinetics = robertson.Kinetics(rates, rest, seed=0)
    state = torch.full((9,), 0.5, dtype=torch.float64)
    assert (kinetics(torch.zeros(()), state) + state).abs().max() < 0.25


def test_gradient_against_differences(observations):
    """The norm that training reports is that of the exact gradient of the loss."""
    kinetics = robertson.Kinetics(observations.rates, observations.scaled[1:].mean(0), seed=3)
    solver = robertson.make_solver(kinetics, observations, "cn", 2000)
    data = observations.scaled

    def loss():
        return (solver(data[0], observations.times).ys[1:] - data[1:]).abs().mean()

    loss().backward()
    weight = kinetics.output.weight
    direction = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).reshape(weight.shape)
    slope = float((weight.grad * direction).sum())
    with torch.no_grad():
        weight += 1e-6 * direction
        above = loss()
        weight -= 2e-6 * direction
        below = loss()
    assert slope == pytest.approx(float(above - below) / 2e-6, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    rates = [robertson.learning_rate(i, 400, 0.02) for i in range(400)]
    assert rates[0] == pytest.approx(0.02 / 21)
    assert rates[20] == max(rates) == 0.02
    assert rates[210] == pytest.approx(0.02 * (1 + 0.01) / 2)
    assert rates[-1] == pytest.approx(0.02 / 100, rel=0.01)
    assert [robertson.learning_rate(i, 2, 1.0) for i in range(2)] == [0.5, 1.0]
    assert robertson.learning_rate(0, 1, 1.0) > 0


# --------------------------------------------------------------------------------- the training


def test_the_loss_falls(trained):
    losses, norms = trained.training.losses, trained.training.norms
    assert losses[0] == pytest.approx(0.165, abs=0.01)
    assert len(losses) == 40
    assert trained.mae == min(losses)
    assert trained.mae < losses[0] / 4
    # What was learned is an equation, not the error of long steps.
    assert trained.fine_mae == pytest.approx(trained.mae, rel=0.1)
    assert 0.1 < norms[0] < 2
    assert max(norms) < 100
    assert (trained.training.recoveries, trained.explanation) == (0, None)


def test_counts(trained):
    forward, backward = trained.counts(backward=False), trained.counts(backward=True)
    sweeps, steps = 40, 40 * 40
    assert (forward["steps"], backward["steps"]) == (steps, steps)
    assert forward["rejected"] == 0
    # One evaluation per Newton iteration, one at the start of each step, one to begin with, and one
    # where a Jacobian is evaluated anew at an iterate whose graph was not recorded.
    renewed = forward["jacobians"] - steps
    # A step whose residual grows is taken again, with the graphs of all iterates: rarely at all.
    expected = forward["newton"] + steps + sweeps + renewed
    assert 0 <= expected - forward["rhs"] <= steps / 100
    assert 0 <= renewed <= steps and forward["newton"] == forward["krylov"]
    assert 2 * steps <= forward["newton"] <= 6 * steps
    # Backward: one transposed solve a step, and a VJP at each of its ends.
    assert backward["jacobians"] == backward["krylov"] == steps
    assert backward["vjp"] == 2 * steps
    assert backward["rhs"] == steps + sweeps
    assert (backward["newton"], backward["jvp"]) == (0, 0)


def test_same_seed_same_numbers_other_seed_other_numbers(observations, trained, tmp_path):
    again, other = (
        learn(tmp_path, "--iterations", 2, "--seed", seed, observations=observations).training
        for seed in (0, 1)
    )
    # LAPACK's least squares, which fits the output layer, depends on how memory is aligned.
    assert again.losses[0] == pytest.approx(trained.training.losses[0], rel=1e-12)
    assert other.losses[0] != trained.training.losses[0]


def test_a_failed_solve_goes_back_to_the_best_weights(observations, monkeypatch, tmp_path):
    original, make, rates, calls, fields = robertson.scaled_mae, robertson.make_solver, [], [], []

    def making(kinetics, *rest):
        fields.append(kinetics)
        return make(kinetics, *rest)

    def failing(*arguments):
        calls.append([p.detach().clone() for p in fields[0].parameters()])
        if len(calls) == 4:
            raise pnode.NonlinearSolveFailed("no convergence")
        return original(*arguments)

    class Recording(torch.optim.AdamW):
        def step(self, closure):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(robertson, "make_solver", making)
    monkeypatch.setattr(robertson, "scaled_mae", failing)
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    # Small enough for a loss that falls at every iteration.
    monkeypatch.setattr(robertson, "learning_rate", lambda *_, **__: 0.05)
    result = learn(tmp_path, "--iterations", 6, observations=observations)
    losses, norms = result.training.losses, result.training.norms
    assert result.training.recoveries == 1
    assert result.iterations == 5
    assert result.explanation is None
    assert rates == [1e-3] * 4 + [5e-4] * 2
    assert math.isnan(losses[3]) and math.isnan(norms[3])
    assert losses[2] == min(losses[:3])
    assert all(map(torch.equal, calls[4], calls[2]))
    assert losses[4] == losses[2]
    assert result.mae == pytest.approx(np.nanmin(losses), rel=1e-12)


def test_training_gives_up_when_nothing_helps(observations, monkeypatch, tmp_path):
    def failing(*_):
        raise pnode.NonlinearSolveFailed("no convergence", time=3.0, step=7, method="cn")

    monkeypatch.setattr(robertson, "scaled_mae", failing)
    result = learn(tmp_path, "--iterations", 50, observations=observations)
    assert result.training.recoveries == len(result.training.losses) == 1
    assert math.isnan(result.mae) and result.learned is None
    assert "no convergence [t = 3.0, step 7, method 'cn']" in result.explanation


# ---------------------------------------------------------------------------------- the program


def test_program_writes_table_figure_and_json(tmp_path, capsys):
    folder = tmp_path / "new" / "r.1"
    argv = ["--iterations", "3", "--seed", "2", "--output", str(folder)]
    assert robertson.main(argv) == 0
    out = capsys.readouterr().out
    png, report = folder / "robertson.png", folder / "robertson.json"
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    content = json.loads(report.read_text())
    assert (content["method"], content["seed"], content["iterations"]) == ("cn", 2, 3)
    assert content["forward"]["steps"] == content["backward"]["steps"] == 120
    assert len(content["losses"]) == 3
    assert re.search(rf"final scaled MAE +{content['mae']:.4g}\s", out)
    assert "Newton iterations" in out and "Krylov iterations" in out
    assert f"wrote {report}, {folder / 'robertson.csv'}, {png}" in out


def test_program_learns_from_a_csv(tmp_path, capsys):
    path = tmp_path / "decay.csv"
    times = np.linspace(0, 4, 9)
    np.savetxt(path, np.c_[times, np.exp(-times)], delimiter=",", header="t,x", comments="")
    argv = ["--data", str(path), "--iterations", "60", "--output", str(tmp_path)]
    assert robertson.main(argv) == 0
    content = json.loads((tmp_path / "robertson.json").read_text())
    assert content["title"] == "decay.csv"
    assert content["forward"]["steps"] == 60 * 8
    assert content["mae"] < content["losses"][0] / 4
    assert (tmp_path / "robertson.png").exists()
    assert "decay.csv: method cn" in capsys.readouterr().out


def test_an_explicit_method_needs_too_many_steps(tmp_path, capsys):
    argv = ["--method", "dopri5", "--max-steps", "300", "--output", str(tmp_path)]
    assert robertson.main(argv) == 0
    printed = capsys.readouterr()
    assert "dopri5 is explicit, so stability keeps its steps near" in printed.out
    assert "300 steps (" in printed.out
    assert "(--method cn) takes one step per interval, 40 in all." in printed.out
    assert "Traceback" not in printed.out + printed.err
    content = json.loads((tmp_path / "robertson.json").read_text())
    assert (content["mae"], content["iterations"], content["recoveries"]) == (None, 0, 1)
    estimate = int(content["explanation"].split("would take about ")[1].split()[0].replace(",", ""))
    assert 10_000 < estimate < 100_000
    assert not (tmp_path / "robertson.png").exists()


def test_an_explicit_method_with_long_steps_blows_up(observations, tmp_path):
    argv = ["--method", "rk4", "--iterations", 3]
    result = learn(tmp_path, *argv, observations=observations)
    assert result.training.losses[0] > 1000
    assert result.training.norms[0] > 1000
    assert result.explanation.startswith("rk4 is explicit, and steps as long as the intervals")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "kvaerno5"], "nearest here is method='esdirk6'"),
        (["--method", "nonsense"], "method='nonsense' is unknown"),
    ],
)
def test_unknown_methods_are_refused(tmp_path, capsys, argv, message):
    assert robertson.main([*argv, "--output", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--iterations", "0"], ["--lr", "nan"], ["--lr", "-1"], ["--seed", "x"]]
)
def test_unusable_options_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        robertson.main(argv)
    assert stop.value.code == 2
    assert f"argument {argv[0]}" in capsys.readouterr().err


# ------------------------------------------------- the parallel ones; tests/mpi has several ranks


@pytest.mark.parametrize(
    ("example", "argv"),
    [
        ("burgers", ["--cells", "32", "--iterations", "12"]),
        ("lorenz96", ["--cells", "8", "--iterations", "20"]),
    ],
)
def test_training_learns(tmp_path, capsys, example, argv):
    assert importlib.import_module(example).main([*argv, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("wrote ") == 1
    alone = json.loads((tmp_path / f"{example}.json").read_text())
    png = tmp_path / f"{example}.png"
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    if example == "burgers":
        assert alone["viscosity_losses"][-1] < alone["viscosity_losses"][0] / 50
        assert alone["viscosity"] == pytest.approx(0.02, rel=0.1)
        assert len(alone["closure_losses"]) == 13
        assert alone["closure_losses"][-1] < alone["closure_losses"][0] / 2
        assert alone["with_closure"] < alone["without"] / 1.5
    else:
        assert len(alone["losses"]) == 21
        assert alone["losses"][-1] < alone["losses"][0] / 4
        assert alone["with_closure"][2] < alone["without"][2] / 2
        assert 0.5 < alone["explained"] < alone["explainable"] < 1


@pytest.mark.parametrize(
    ("example", "argv", "code", "message"),
    [
        ("burgers", ["--method", "rk4"], 2, "argument --method"),
        ("burgers", ["--cells", "4"], 2, "it must be at least 8"),
        ("burgers", ["--output", str(SCRIPT)], 2, "burgers.py: error: [Errno"),
        ("lorenz96", ["--iterations", "0"], 2, "it must be positive"),
    ],
)
def test_the_other_examples_refuse_unusable_options(capsys, example, argv, code, message):
    try:
        found = importlib.import_module(example).main(argv)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_exit_code_of_a_program():
    run = run_program(SCRIPT.with_name("burgers.py"), ["--cells", "4"], env=os.environ | THREADS)
    assert run.returncode == 2
    assert "it must be at least 8" in run.stderr and "Traceback" not in run.stderr


def test_compiled_training_is_the_same(tmp_path):
    """Newton's tolerance apart, see tests/test_compiled_stiff.py."""
    argv = ["--iterations", 6]
    eager, compiled = (learn(tmp_path, *argv, *more).training for more in ((), ("--compile",)))
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-8, nan_ok=True)
    assert compiled.norms == pytest.approx(eager.norms, rel=1e-7, nan_ok=True)

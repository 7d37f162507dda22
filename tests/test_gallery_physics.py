"""The gallery's examples of physics: their numbers, each beside its baseline."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import pnode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs an example
physics = importlib.import_module("gallery_physics")


def quick(name: str, folder: Path, *more: str) -> dict:
    """Run an example and return its numbers."""
    example = importlib.import_module(name)
    assert example.main(["--quick", "--no-plot", "--output", str(folder), *more]) == 0
    return json.loads((folder / f"{name}.json").read_text())


def test_levenberg_marquardt_finds_what_the_data_were_made_with():
    class Decay(torch.nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64))

        def forward(self, t, y):
            return -self.rate * y * y

    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    data = 2.0 / (1.0 + 2.0 * 0.7 * t[:, None])
    model = Decay(0.1)
    solver = pnode.Solver(model, method="verner8", rtol=1e-11, atol=1e-12, compile=False)
    start = torch.tensor([1.5], dtype=torch.float64)
    found, cost = physics.fit(
        solver, ["rate"], start, t, lambda ys: (ys - data).reshape(-1), fit_start=True
    )
    assert cost < 1e-16
    assert model.rate.item() == pytest.approx(0.7, abs=1e-8)
    assert found.item() == pytest.approx(2.0, abs=1e-8)


def test_a_first_trial_that_cannot_be_solved_costs_infinity():
    model = torch.nn.Module()
    model.rate = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
    model.forward = lambda t, y: model.rate * y * y  # blows up at t = 0.2
    t, y0 = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    solver = pnode.Solver(model, max_steps=500, compile=False)
    assert physics.fit(solver, ["rate"], y0, t, lambda ys: ys[1])[1] == float("inf")


def test_lotka_volterra_recovers_the_product(tmp_path):
    found = quick("lotka_volterra", tmp_path)
    assert found["product_only"]
    # 62 observations with 3 % noise: 2 % is three standard deviations of the coefficients.
    assert found["coefficients"] == pytest.approx(found["true_coefficients"], rel=0.02)
    assert found["extrapolation_errors"]["formula"] < found["extrapolation_errors"]["plain net"]


def test_port_hamiltonian_parts_lose_energy_together(tmp_path):
    found = quick("port_hamiltonian", tmp_path)
    assert found["hung_error"] < found["plain_error"]
    assert found["hung_rise"] < 1e-7 < found["plain_rise"]  # the solver's rtol is 1e-8
    assert found["bolted_rise"] < 1e-5 and found["bolted_drift"] < 1e-4  # rtol 1e-6
    assert found["bolted_error"] < 0.1


def test_pendulum_dae_learns_the_drag(tmp_path):
    found = quick("pendulum_dae", tmp_path)
    assert found["path_errors"]["learned"] < 0.3 * found["path_errors"]["untrained"]
    assert found["drag_error"] < 0.2
    loose, tight = (row["drift"] for row in found["drifts"][:2])
    assert tight < 0.1 * loose  # of a hundredth of the tolerance


def test_modified_equation_has_the_slopes_of_theory(tmp_path):
    found = quick("modified_equation", tmp_path)
    for method, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        assert found["slopes"][method] == pytest.approx([order, order + 1], abs=0.15), method
    paths = found["path_errors"]
    assert paths["steps as in training"] < paths["solved accurately"]


def test_lorenz63_hybrid_lasts_longest(tmp_path):
    found = quick("lorenz63", tmp_path)
    valid = found["valid_times"]
    assert valid["hybrid"] > 1.5 * max(valid["equations"], valid["network"])
    errors = [row["error"] for row in found["rows"] if "error" in row]
    assert len(errors) >= 2 and max(errors) < 1e-5  # of gradients at rtol 1e-6, by each way


def test_side_information_helps(tmp_path):
    found = quick("side_information", tmp_path)
    errors, drifts = found["errors_1s"], found["energy_1s"]
    assert errors["structure"] < errors["plain net"]
    assert drifts["conservation"] < 0.7 * drifts["structure"]
    assert found["violations"][-1] < found["violations"][0]


def test_robertson_unknown_finds_the_order(tmp_path):
    found = quick("robertson_unknown", tmp_path)
    assert found["rounded"] == [0, 2, 0]
    assert found["constant"] == pytest.approx(3e7, rel=0.1)
    assert found["explicit_steps"] > 100 * found["steps"]


def test_bad_options_are_told(tmp_path, capsys):
    example = importlib.import_module("lorenz63")
    with pytest.raises(SystemExit) as caught:
        example.main(["--observations", "10", "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert "10 is out of range: it must be at least 1300" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert example.main(["--quick", "--output", str(file)]) == 2
    assert "file" in capsys.readouterr().err

"""The gallery: latent ODE, tubes, samplers, graphs, reactors, climate, observer, derivatives.

Each ``--quick`` is run once, and its numbers are held to what they must show.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # where Python looks when it runs an example


def quick(name: str, folder: Path, *more: str) -> dict:
    """Run an example and return its numbers."""
    example = importlib.import_module(name)
    assert example.main(["--quick", "--no-plot", "--output", str(folder), *more]) == 0
    return json.loads((folder / f"{name}.json").read_text())


def test_latent_ode_learns_series_with_times_of_their_own(tmp_path):
    found = quick("latent_ode", tmp_path, "--iterations", "15")
    # 15 updates: hardly better than the mean, but the solves agree at the same tolerances.
    assert found["beyond"] < 1.5 * found["spread"]
    assert max(found["errors"]) < 0.05
    own = next(row for row in found["rows"] if row["name"] == "pnode, own times")
    assert own["CPU s of a gradient"] > 0.0


def test_reach_tube_holds_fresh_trajectories(tmp_path):
    rows = quick("reach_tube", tmp_path)["systems"]["Brusselator"]
    assert rows["tube"]["covered"] == 1.0
    assert rows["linearised"]["covered"] < 0.5
    assert rows["tube"]["mean volume"] <= rows["stretching alone"]["mean volume"]
    if "torchdiffeq, variational" in rows:
        assert rows["torchdiffeq, variational"]["difference"] < 1e-6


def test_samplers_converge_and_the_data_form_beats_dpm_solver_2(tmp_path):
    found = quick("diffusion_sampling", tmp_path)
    errors, budgets = found["errors"], found["budgets"]
    assert budgets == [8, 16, 32, 64]
    for name, least in (("DPM-Solver-2", 3.0), ("explicit, rk4", 5.0), ("IMEX, ark3", 6.0)):
        assert errors[name][-2] / errors[name][-1] > least, name  # a step half as long
    ours, theirs = errors["exponential by data, midpoint"], errors["DPM-Solver-2"]
    assert all(mine < other for mine, other in zip(ours, theirs, strict=True))
    assert errors["Poisson, z, rk4"][-1] < 0.01
    assert found["rows"][0]["evaluations"] == 8


def test_graph_diffusion_beats_the_network_without_it(tmp_path):
    found = quick("graph_diffusion", tmp_path)
    assert found["accuracy"] > found["accuracy_without"] + 0.1
    assert max(found["losses"]) - min(found["losses"]) < 1e-3
    for row in found["stiffness"]:
        assert row["error"] < 5e-3, row["run"]
    slow, fast = (row["steps"] for row in found["stiffness"][::2])  # of the explicit method
    assert fast > 3 * slow


def test_reactors_find_their_energies(tmp_path):
    found = quick("reactors", tmp_path)
    assert found["final_loss"] < 0.05 * found["first_loss"]
    assert found["rows"][0]["error"] < 1e-3


def test_energy_balance_knows_its_uncertainty(tmp_path):
    found = quick("energy_balance", tmp_path)
    assert max(map(abs, found["errors_in_deviations"])) < 3.5
    # 40 records: 0.9 is one and a half deviations below 95 %; the ellipsoids are known to be off.
    assert found["region by misfit"] >= 0.9 and found["ellipsoid"] >= 0.5
    assert found["curvatures_differ"] < 1e-10  # all records' tangents at once, and sensitivities
    at_kinks, unknown = found["kinks"]
    assert at_kinks["rejected"] < unknown["rejected"]
    assert at_kinks["rhs"] < unknown["rhs"]


def test_observer_beats_the_slope_of_noisy_samples(tmp_path):
    found = quick("observer", tmp_path)
    assert found["learned"][2] < found["slopes"][2]  # noise 0.1
    assert found["there_and_back"] < 0.5


def test_derivatives_tell_the_fast_rate_and_a_learned_step_is_better(tmp_path):
    found = quick("derivative_supervision", tmp_path)
    assert found["fast_derivatives"] == pytest.approx(-200.0, rel=0.05)
    assert abs(found["fast_states"] + 200.0) > 4 * abs(found["fast_derivatives"] + 200.0)
    errors = found["errors"]
    assert errors["learned2"] < errors["heun2"] < errors["midpoint"]
    assert abs(found["two_a_b"] - 1.0) < 0.1


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [("latent_ode", "--series", "3", "must be at least 64"),
     ("reach_tube", "--systems", "4", "invalid choice"),
     ("graph_diffusion", "--factors", "0", "must be positive")],
)  # fmt: skip
def test_options_out_of_range(capsys, name, option, value, message):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main([option, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""The gallery: flows and second-order training, whose numbers are held to other ways to them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import pnode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs an example


def quick(name: str, folder: Path) -> dict:
    """Run an example and return its numbers."""
    example = importlib.import_module(name)
    assert example.main(["--quick", "--no-plot", "--output", str(folder)]) == 0
    return json.loads((folder / f"{name}.json").read_text())


def test_flows_are_densities(tmp_path):
    found = quick("flow", tmp_path)
    assert found["mass"] == pytest.approx(1.0, abs=2e-3)  # a density's integral
    mean, deviation = found["hutchinson"]
    assert abs(mean) < 4.0 * deviation  # unbiased
    for name, losses in found["losses"].items():
        assert losses[-1] < losses[0] - 0.3, name
    rows = {row["density"]: row for row in found["rows"]}
    for name in ("ring", "mixture in 16"):
        assert rows[name]["NLL"] > rows[name]["least"]
    for row in found["rows"]:
        if "off by" in row:
            assert row["off by"] < 1e-4 and row["gradient off by"] < 1e-3  # at rtol 1e-6


def test_log_density_of_a_linear_flow_is_that_of_its_normal():
    """y' = A y: log p(x) = log N(exp(A) x) + tr A, and both regularisers in closed form."""
    flow = importlib.import_module("flow")
    a = torch.tensor([[-0.4, 0.9], [-0.7, 0.2]], dtype=torch.float64)
    model = flow.Flow(2, 3, torch.Generator().manual_seed(0))

    class Linear(torch.nn.Module):
        def forward(self, t, y, probes=None):
            return y @ a.T

    model.field = Linear()
    model.integrands = flow.Integrands(model.field)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = model.solver(method="dopri8", rtol=1e-11, atol=1e-12)
    logs, regular, _ = model.log_density(solver, x)
    z = x @ torch.linalg.matrix_exp(a).T
    assert torch.allclose(logs, flow.normal(z) + a.trace(), rtol=0, atol=1e-9)
    assert torch.allclose(regular[:, 0], a.square().sum().expand(5), rtol=0, atol=1e-9)
    times = torch.linspace(0, 1, 2001, dtype=torch.float64)
    speeds = torch.stack(
        [((x @ torch.linalg.matrix_exp(t * a).T) @ a.T).square().sum(1) for t in times]
    )
    assert torch.allclose(regular[:, 1], torch.trapezoid(speeds, times, dim=0), atol=1e-6)


def test_second_order_training_uses_the_solves_own_derivatives(tmp_path):
    found = quick("second_order_training", tmp_path)
    # Kronecker factors are made of what sums up to backward's gradient, G v is 2 J^T J v.
    assert found["stages_off_by"] < 1e-13 and found["product_off_by"] < 1e-13
    best = {name: min(losses) for name, losses in found["losses"].items()}
    assert len(found["losses"]["Kronecker factors"]) == 10 and len(found["losses"]["Adam"]) == 100
    assert best["Kronecker factors"] < best["Adam"]
    for name in ("Gauss-Newton", "Kronecker factors"):
        losses = found["losses"][name]
        assert losses == sorted(losses, reverse=True), name  # a step that is no better is undone


@pytest.mark.parametrize("kind", ["cosine", "one cycle", "sequence", "plateau", "steps", "chain"])
def test_recoveries_halve_the_rate_of_every_schedule(kind, tmp_path):
    """The rates are those of a training without failures, by a power of two."""
    training = importlib.import_module("training")
    schedules = torch.optim.lr_scheduler

    def schedule(updates):
        steps = schedules.StepLR(updates, 2, 0.7)
        return {
            "cosine": lambda: schedules.CosineAnnealingLR(updates, 12, eta_min=1e-3),
            "one cycle": lambda: schedules.OneCycleLR(updates, 0.1, total_steps=13),
            "sequence": lambda: schedules.SequentialLR(
                updates, [schedules.LinearLR(updates, 0.5), steps], [3]
            ),
            "plateau": lambda: schedules.ReduceLROnPlateau(updates, patience=0, threshold=0.5),
            "steps": lambda: steps,
            "chain": lambda: schedules.ChainedScheduler(
                [steps, schedules.ExponentialLR(updates, 0.9)], optimizer=updates
            ),
        }[kind]()  # fmt: skip

    def rates(failures):
        weight, calls, found = torch.nn.Parameter(torch.ones(2)), [], []

        def loss():
            calls.append(None)
            found.append(made[0].param_groups[0]["lr"])
            if len(calls) in failures:
                raise pnode.errors.SolveError("no convergence")
            return (weight * 0.0).sum() + 1.0

        def optimizer(tensors):
            made[:] = [torch.optim.SGD(tensors, lr=0.1)]
            return made[0]

        made: list[torch.optim.Optimizer] = []
        options = argparse.Namespace(
            name="toy", output=tmp_path, resume=False, tensorboard=False, iterations=10, settings={}
        )
        found_training = training.train(
            [weight], loss, options, schedule=schedule, optimizer=optimizer, recover=5
        )
        assert found_training.recoveries == len(failures)
        return found

    expected, found = rates(()), rates((4, 7))
    factors = [1.0] * 4 + [0.5] * 3 + [0.25] * 3
    # A loss that is not there is a bad one to ReduceLROnPlateau, as each after the first is here.
    assert found == [factor * rate for factor, rate in zip(factors, expected, strict=True)]

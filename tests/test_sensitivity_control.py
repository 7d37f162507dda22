"""Steps chosen by tangents, too: derivatives to tolerance where the state itself has no error."""

from __future__ import annotations

import math

import pytest
import torch

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=D)
REST = torch.ones(1, dtype=D)


def relaxation(t, y):
    """y' = 3 (1 - y), at rest at 1: dy(t)/dy0 = exp(-3 t)."""
    return 3.0 * (1.0 - y)


def error(solver: pnode.Solver, y0: torch.Tensor = REST) -> float:
    """Return the relative error of dy(1)/dy0 of the last entry."""
    y0 = y0.clone().requires_grad_()
    ys = solver(y0, T).ys
    (found,) = torch.autograd.grad(ys[-1, -1], y0)
    return abs(float(found[-1]) / math.exp(-3.0) - 1.0)


@pytest.mark.parametrize("control", ["random", torch.ones(1, 1, dtype=D)])
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("dopri5", 1e-5), ("bosh3", 1e-4), ("trbdf2", 1e-3), ("es325", 1e-5), ("rodaspr", 1e-5),
     ("bdf", 1e-4)],
)  # fmt: skip
def test_derivatives_at_rest(method, tolerance, control):
    plain = pnode.Solver(relaxation, method=method)
    assert error(plain) > 0.01
    assert error(pnode.Solver(relaxation, method=method, sensitivity_control=control)) < tolerance


def test_it_gets_better_with_the_tolerance():
    errors = [
        error(pnode.Solver(relaxation, rtol=rtol, atol=rtol, sensitivity_control="random"))
        for rtol in (1e-4, 1e-7, 1e-10)
    ]
    assert errors[0] > 30.0 * errors[1] > 900.0 * errors[2]


def test_entries_at_rest_beside_others_that_move():
    """The second entry rests while the first one, which is slow, moves."""
    rate = torch.tensor([0.1, 3.0], dtype=D)
    y0 = torch.tensor([0.0, 1.0], dtype=D)

    def f(t, y):
        return rate * (1.0 - y)

    assert error(pnode.Solver(f, rtol=1e-4, atol=1e-4), y0) > 1e-2
    for control in ("random", torch.eye(2, dtype=D)):
        solver = pnode.Solver(f, rtol=1e-4, atol=1e-4, sensitivity_control=control)
        assert error(solver, y0) < 1e-3


@pytest.mark.parametrize("options", [
    {"implicit": relaxation, "explicit": lambda t, y: 0.0 * y, "method": "ark3"},
    {"rhs": lambda t, y: 2.0 * relaxation(t, y), "mass": torch.tensor([2.0], dtype=D),
     "method": "bdf"},
    {"rhs": relaxation, "dense": True},
    {"rhs": relaxation, "cost": lambda t, y: y.sum(), "method": "es325"},
    {"rhs": relaxation, "checkpointing": pnode.Checkpointing(memory=400)},
])  # fmt: skip
def test_forms_and_options(options):
    assert error(pnode.Solver(**options, sensitivity_control="random")) < 1e-4


def test_the_solve_takes_the_steps_of_the_first_one():
    """States, derivatives of every order, and what is counted."""
    solver = pnode.Solver(relaxation, sensitivity_control="random")
    y0 = REST.clone().requires_grad_()
    solution = solver(y0, T)
    stats = solution.stats
    assert stats.steps == stats.tangents.steps > 8
    assert (stats.rejected, stats.rhs) == (0, 6 * stats.steps + 1)
    with torch.no_grad():
        assert torch.equal(solver(REST, T).ys, solution.ys)
    slope = torch.func.jacfwd(lambda y: solver(y, T).ys[-1])(REST)
    (expected,) = torch.autograd.grad(solution.ys[-1], y0)
    assert torch.allclose(slope[0], expected, rtol=1e-13, atol=0.0)


def test_such_solves_are_not_compiled_and_say_so():
    solver = pnode.Solver(relaxation, sensitivity_control="random", compile=True)
    assert error(solver) < 1e-5
    assert "sensitivity_control= is given" in repr(solver)


def test_tuples_and_backward_in_time():
    solver = pnode.Solver(
        lambda t, y: (3.0 * (y[0] - 1.0), -y[1]), sensitivity_control="random", rtol=1e-8
    )
    y0 = (REST.clone().requires_grad_(), torch.zeros(2, 2, dtype=D))
    ys = solver(y0, T.flip(0)).ys
    (found,) = torch.autograd.grad(ys[0][-1], y0[0])
    assert abs(float(found) / math.exp(-3.0) - 1.0) < 1e-6


@pytest.mark.parametrize(("options", "message"), [
    ({"sensitivity_control": "all"}, "sensitivity_control='all'"),
    ({"sensitivity_control": torch.zeros(1, 1)}, "not all zero"),
    ({"sensitivity_control": torch.ones(1)}, "shape"),
    ({"sensitivity_control": True}, "sensitivity_control=True"),
    ({"sensitivity_control": "random", "step_size": 0.1}, r"of 0\.1 \(step_size="),
    ({"sensitivity_control": "random", "event_fn": lambda t, y: y[0]}, "event_fn"),
    ({"sensitivity_control": "random", "gradient": "continuous"}, "continuous"),
])  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(relaxation, **options)


def test_tangents_of_another_shape():
    solver = pnode.Solver(relaxation, sensitivity_control=torch.ones(2, 3, dtype=D))
    with pytest.raises(pnode.ConfigurationError, match=r"\(2, 3\).*\(m, 1\)"):
        solver(REST, T)

"""Features together that are each tested alone elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

import pnode
from pnode.errors import ConfigurationError
from pnode.solvers.methods import METHODS

D = torch.float64
DECAY = torch.tensor([[-3.0, 1.0], [0.5, -1.0]], dtype=D)


def times(*values):
    return torch.tensor(values, dtype=D)


@pytest.mark.parametrize(
    ("name", "form"),
    [(m.name, form) for m in METHODS for form in m.forms
     if form in ("mass", "residual") and m.name in ("beuler", "cn", "implicit_midpoint", "bdf")],
)  # fmt: skip
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_event_without_end_where_the_slope_is_not_at_hand(name, form, direction):
    """The first step cannot be a part of an infinite interval."""
    problem = {
        "mass": {"rhs": lambda t, y: -2.0 * direction * y, "mass": times(2.0, 2.0)},
        "residual": {"residual": lambda t, y, yp: yp + direction * y},
    }[form]
    with torch.no_grad():
        event_time, ys = pnode.odeint_event(
            problem.pop("rhs", None), times(1.0, 2.0), 0.0, event_fn=lambda t, y: y[0] - 0.5,
            reverse_time=direction < 0.0, method=name, rtol=1e-5, atol=1e-5, max_steps=2000,
            **problem,
        )  # fmt: skip
    # The global error of the first-order method grows like the root of the tolerance.
    tolerance = 1e-2 if name == "beuler" else 1e-3
    assert abs(event_time - direction * math.log(2.0)) < tolerance
    assert abs(ys[-1] - times(0.5, 1.0)).max() < 1e-9


@pytest.mark.parametrize(
    "name", [m.name for m in METHODS if m.adaptive and m.order > 1 and m.ts_type != "python"]
)
def test_errors_of_linear_problems_are_seen(name):
    """An embedded method with the stability function of its method would see none at all."""
    y0, t = times(1.0, 2.0), times(0.0, 2.0)
    problem = {"rhs": lambda t, y: DECAY @ y}
    if name in [m.name for m in METHODS if m.kind == "imex"]:
        problem = {"implicit": problem["rhs"], "explicit": lambda t, y: torch.zeros_like(y)}
    ys = pnode.Solver(**problem, method=name, rtol=1e-5, atol=1e-5)(y0, t).ys
    # fehlberg2 estimates the loerror of its first-order companion, a hundredth of the truth.
    assert (ys[-1] - torch.matrix_exp(2.0 * DECAY) @ y0).abs().max() < 1.5e-3


@pytest.mark.parametrize("name", ["ra3pw", "lassp3p4s2c"])
def test_methods_with_a_blind_error_estimate_want_fixed_steps(name):
    with pytest.raises(ConfigurationError, match=f"{name}.*no error estimate.*step_size"):
        pnode.Solver(lambda t, y: DECAY @ y, method=name)


@pytest.mark.parametrize("form", ["mass", "sparse mass", "residual"])
@pytest.mark.parametrize("consistent_start", [True, False])
def test_algebraic_equations_in_inference_mode(form, consistent_start):
    """Null spaces and Newton's corrections want derivatives, a sparse matrix its transpose."""
    mass = times(1.0, 0.0)

    def rhs(t, y):
        return torch.stack([-y[0], y[1] - y[0] ** 2])

    problem = {
        "mass": {"rhs": rhs, "mass": mass},
        "sparse mass": {"rhs": rhs, "mass": torch.diag(mass).to_sparse()},
        "residual": {"residual": lambda t, y, yp: mass * yp - rhs(t, y)},
    }[form]
    solver = pnode.Solver(
        **problem, consistent_start=consistent_start, method="bdf2", step_size=0.1
    )
    y0, t = times(1.0, 5.0 if consistent_start else 1.0), times(0.0, 1.0)
    with torch.no_grad():
        expected = solver(y0, t).ys
    with torch.inference_mode():
        assert torch.equal(solver(y0, t).ys, expected)
        assert torch.equal(solver(y0.clone(), t.clone()).ys, expected)
    assert abs(expected[0, 1] - 1.0) < 1e-12

"""Features together that are each tested alone elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

import pnode
from pnode.errors import ConfigurationError, VectorFieldError
from pnode.solvers.methods import METHODS, find_method

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


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ("bdf", "bdf3", "cn") for form in find_method(name).forms],
)
@pytest.mark.parametrize("jacobian", ["dense", "sparse", "matrix-free"])
@pytest.mark.parametrize("first_step", [None, 1e-12])
def test_broken_promise_is_seen_from_short_first_steps(name, form, jacobian, first_step):
    """Near the start nothing differs; and BDF converges with any Jacobian, its adjoint does not."""

    def rhs(t, y):
        return -(y**2)

    problem = {
        "rhs": {"rhs": rhs},
        "mass": {"rhs": lambda t, y: 2.0 * rhs(t, y), "mass": times(2.0, 2.0)},
        "residual": {"residual": lambda t, y, yp: yp - rhs(t, y)},
    }[form]
    solver = pnode.Solver(
        **problem, method=name, jacobian=jacobian, jacobian_reuse="constant", first_step=first_step,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    y0 = times(1.0, 2.0).requires_grad_()
    with pytest.raises(ConfigurationError, match="jacobian_reuse='constant' promises"):
        solver(y0, times(0.0, 1.0)).ys[-1].sum().backward()


def test_broken_promise_in_time_alone():
    """The state rests, and so does the Jacobian at first."""
    solver = pnode.Solver(
        lambda t, y: -y * (1.0 + torch.relu(t - 0.25)), method="cn", step_size=0.1,
        jacobian_reuse="constant",
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="jacobian_reuse='constant' promises"):
        solver(times(0.0, 0.0), times(0.0, 2.0))


@pytest.mark.parametrize("jacobian", ["dense", "sparse", "matrix-free"])
@pytest.mark.parametrize("name", ["bdf", "bdf3", "bdf2-fixed", "rodas3", "cn-fixed", "es325-fixed"])
def test_kept_promise(name, jacobian):
    name, _, fixed = name.partition("-")
    steps = {"step_size": 0.05} if fixed else {"rtol": 1e-6, "atol": 1e-8}
    A = DECAY.clone().requires_grad_()

    def gradients(**keywords):
        y0 = times(1.0, 2.0).requires_grad_()
        solver = pnode.Solver(lambda t, y: A @ y, params=[A], method=name, **steps, **keywords)
        return torch.autograd.grad(solver(y0, times(0.0, 0.7, 2.0)).ys.square().sum(), [y0, A])

    ours = gradients(jacobian=jacobian, jacobian_reuse="constant")
    tight = {} if name == "rodas3" else {"petsc_options": {"snes_rtol": 1e-14, "snes_stol": 1e-14}}
    # The adaptive BDFs iterate to a part of the tolerance, and steps follow what they leave.
    for one, two in zip(ours, gradients(**tight), strict=True):
        assert (one - two).norm() < (1e-4 if "bdf" in name and not fixed else 1e-9) * two.norm()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "name", ["dopri5", "cn", "implicit_midpoint", "rodas3", "es325", "ark4", "bdf", "bdf2-fixed"]
)
@pytest.mark.parametrize("after", [1e-300, 1e-14, 1e-8])
def test_event_at_the_start_of_a_step(name, dense, after):
    """Within round-off it is the one that the solve starts on. Methods divide by the length."""
    name, _, fixed = name.partition("-")
    problem = {"rhs": lambda t, y: -y}
    if name == "ark4":
        problem = {"implicit": problem["rhs"], "explicit": lambda t, y: torch.zeros_like(y)}
    solver = pnode.Solver(
        **problem, method=name, dense=dense, step_size=0.1 if fixed else None,
        event_fn=lambda t, y: t - after,
    )  # fmt: skip
    y0 = times(1.0, 2.0).requires_grad_()
    solution = solver(y0, times(0.0, 0.02, 0.5))
    if after < 1e-8:
        assert solution.reason == "t_end"
        return
    assert solution.reason == "event" and solution.stats.steps == 1
    assert abs(solution.event_time - after) < 1e-12 and len(solution.ts) == 2
    assert (solution.ys[1] - y0 * (1.0 - after)).abs().max() < 1e-11
    solution.ys[1].sum().backward()
    assert (y0.grad - (1.0 - after)).abs().max() < 1e-11


@pytest.mark.parametrize("event_tol", [1e-300, 1e-12])
def test_event_just_after_an_output_time(event_tol):
    """A sign by round-off where a step has been told to end."""
    solver = pnode.Solver(
        lambda t, y: -y, method="cn", step_size=0.1, event_tol=event_tol,
        event_fn=lambda t, y: t - 0.3 - 1e-16 * (1.0 if t <= 0.3 else -1.0),
    )  # fmt: skip
    y0 = times(1.0, 2.0).requires_grad_()
    solution = solver(y0, times(0.0, 0.3, 0.5))
    assert abs(solution.event_time - 0.3) < 1e-12 and len(solution.ts) == 3
    solution.ys[-1].sum().backward()
    assert (y0.grad - solution.ys[-1] / y0).abs().max() < 1e-11


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["cn", "bdf", "rodas3"])
def test_preconditioner_that_is_not_finite(name, sparse):
    def preconditioner(t, y):
        matrix = torch.diag(-math.nan * y)
        return matrix.to_sparse() if sparse else matrix

    solver = pnode.Solver(
        lambda t, y: -y, method=name, jacobian="matrix-free", preconditioner=preconditioner
    )
    with pytest.raises(VectorFieldError, match="preconditioner contains NaN"):
        solver(times(1.0, 2.0), times(0.0, 1.0))

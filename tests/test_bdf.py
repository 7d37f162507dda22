"""BDF: its formulas, its start, its choice of step and order, and its adjoint."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from replica import recorded_orders, replica
from test_gradients import TIGHT, Field, gradients, initial, relative_difference, weights_like
from test_stiff import PROBLEMS, RATES, robertson

import pnode
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions, next_prefix
from pnode.errors import (
    ConfigurationError,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    StepSizeUnderflow,
)
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers import bdf
from pnode.solvers.create import create_integrator
from pnode.solvers.methods import find_method
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.testing import taylor_test

D = torch.float64
# Distances of earlier nodes behind the new one, steps changing up to fivefold.
DISTANCES = [0.3, 0.4, 0.9, 1.0, 1.5, 1.7, 2.0]


@pytest.mark.parametrize("k", range(1, 7))
def test_weights_are_exact_for_polynomials(k):
    nodes = np.array([0.0, *(-x for x in DISTANCES)])
    for power in range(k + 1):
        values = nodes**power
        slope = np.dot(bdf.derivative_weights(DISTANCES[:k]), values[: k + 1])
        assert slope == pytest.approx(float(power == 1), abs=1e-11)
        here = np.dot(bdf.extrapolation_weights(DISTANCES[: k + 1]), values[1 : k + 2])
        assert here == pytest.approx(float(power == 0), abs=1e-11)
        difference = np.dot(bdf.difference_weights(DISTANCES[:k]), values[: k + 1])
        assert difference == pytest.approx(DISTANCES[0] ** k * (power == k), abs=1e-11)


@pytest.mark.parametrize("k", range(1, 7))
def test_error_constant_is_that_of_one_step(k):
    """y' = (k + 1) t^k from exact history: the error of a step, with h^{k+1} y^{(k+1)}/(k+1)!."""
    times = 5.0 - np.array([0.0, *DISTANCES[:k]])
    d = bdf.derivative_weights(DISTANCES[:k])
    new = ((k + 1) * times[0] ** k - np.dot(d[1:], times[1:] ** (k + 1))) / d[0]
    error = times[0] ** (k + 1) - new
    h = DISTANCES[0]
    # times^(k+1) up to 8e4 cancel: 1e-16 of that.
    assert abs(error) == pytest.approx(
        bdf.error_constant(DISTANCES[:k]) * h ** (k + 1), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("order", range(1, 6))
def test_start_weights_remove_powers_of_the_substep(order):
    weights = bdf.start_weights(order)
    for power in range(order):
        total = sum(w / j**power for j, w in enumerate(weights, start=1))
        assert total == pytest.approx(float(power == 0), abs=1e-10)


def stiff_problem():
    log_rates = RATES.log().requires_grad_()
    y0 = torch.tensor([1.0, 1e-5, 0.1], dtype=D, requires_grad=True)
    return lambda t, y: robertson(t, y, log_rates.exp()), y0, log_rates


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_variable_order_gradient_on_a_stiff_problem(jacobian):
    """Equal to autograd through the replica with the recorded times and orders."""
    f, y0, log_rates = stiff_problem()
    grid = [0.0]
    solver = pnode.Solver(
        f, params=[log_rates], method="bdf", rtol=1e-5, atol=1e-10, jacobian=jacobian,
        monitor=lambda step, t, y: grid.append(t),
        petsc_options=TIGHT | ({"ksp_rtol": 1e-14} if jacobian == "matrix-free" else {}),
    )  # fmt: skip
    t = torch.tensor([0.0, 0.3, 0.31, 40.0], dtype=D)
    ys = solver(y0, t).ys
    orders = recorded_orders(ys)
    assert orders[0] == 1 and max(orders) == 5
    assert any(b < a for a, b in itertools.pairwise(orders))
    states = replica(f, "bdf", y0, grid, orders)[[grid.index(x) for x in t.tolist()]]
    scale = torch.tensor([1.0, 1e5, 1.0], dtype=D)
    weights = weights_like(states) * scale
    assert relative_difference([ys.detach() * scale], [states.detach() * scale]) < 1e-9
    ours = torch.autograd.grad((ys * weights).sum(), [y0, log_rates])
    theirs = torch.autograd.grad((states * weights).sum(), [y0, log_rates])
    assert relative_difference(ours, theirs) < 1e-9


@pytest.mark.parametrize("name", ["bdf2", "bdf5"])
def test_fixed_steps_of_unequal_intervals(name):
    """Variable coefficients: the history of one output interval serves the next."""
    field, y0 = Field(), initial()
    times = [0.0, 0.3, 0.37, 1.0]
    grid = [0.0]
    solver = pnode.Solver(
        field, method=name, step_size=0.1, petsc_options=TIGHT,
        monitor=lambda step, t, y: grid.append(t),
    )  # fmt: skip
    ys = solver(y0, torch.tensor(times, dtype=D)).ys
    orders = recorded_orders(ys)
    k = find_method(name).order
    assert orders == [1 - k] * (k - 1) + [k] * (len(grid) - k)
    states = replica(field, name, y0, grid)[[grid.index(x) for x in times]]
    weights = weights_like(states)
    ours = gradients((ys * weights).sum(), field, y0)
    theirs = gradients((states * weights).sum(), field, y0)
    assert relative_difference(ours, theirs) < 1e-9


def test_taylor_remainder_over_recorded_steps():
    """Unequal fixed steps make the loss smooth."""
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 0.1, 0.5, 0.52, 1.0], dtype=D)
    solver = pnode.Solver(field, method="bdf4", step_size=0.05, petsc_options=TIGHT)
    inputs = [y0, field.inner, field.outer, field.bias]
    result = taylor_test(lambda: solver(y0, t).ys[1:].square().sum(), inputs, size=1e-2)
    assert result.order > 1.95, result


@pytest.mark.parametrize("name", ["bdf", "bdf3"])
def test_second_backward_repeats_steps_and_orders(name):
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method=name, rtol=1e-5, atol=1e-7, petsc_options=TIGHT)
    solution = solver(y0, torch.tensor([0.0, 0.5, 2.0], dtype=D))
    loss = solution.ys[1:].square().sum()
    tensors = [y0, field.inner, field.outer, field.bias]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert solution.stats.backward.recomputed == 0
    second = torch.autograd.grad(loss, tensors)
    assert solution.stats.backward.recomputed == solution.stats.steps
    assert relative_difference(second, first) < 1e-11


@pytest.mark.parametrize("name", ["bdf", "bdf2", "bdf3"])
def test_default_newton_tolerance_hardly_changes_the_gradient(name):
    """Newton's error shows in the gradient, but far less than the discretisation does.

    Against the replica, which solves the same steps' equations to round-off, and against a solve
    at a tolerance 1e5 times smaller.
    """
    f, y0, log_rates = stiff_problem()

    def solve(rtol, name, grid):
        solver = pnode.Solver(
            f, params=[log_rates], method=name, rtol=rtol, atol=1e-5 * rtol,
            monitor=lambda step, t, y: grid.append(t),
        )  # fmt: skip
        ys = solver(y0, torch.tensor([0.0, 40.0], dtype=D)).ys
        return ys, torch.autograd.grad(ys[-1, 0], log_rates, retain_graph=True)[0]

    grid = [0.0]
    ys, ours = solve(1e-4, name, grid)
    states = replica(f, name, y0, grid, recorded_orders(ys))
    (discrete,) = torch.autograd.grad(states[-1, 0], log_rates)
    _, exact = solve(1e-9, "bdf", [])
    newton = relative_difference([ours], [discrete])
    discretisation = relative_difference([discrete], [exact])
    assert newton < 0.1 * discretisation, (newton, discretisation)


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_published_end_values(problem):
    """Errors follow the tolerance; Newton takes one to two evaluations, Jacobians are rare."""
    field, start, end, expected, ratio = PROBLEMS[problem]
    y0, exact = torch.tensor(start, dtype=D), torch.tensor(expected, dtype=D)
    errors = []
    for rtol in (1e-4, 1e-6, 1e-8):
        solver = pnode.Solver(field, method="bdf", rtol=rtol, atol=ratio * rtol, max_steps=5000)
        with torch.no_grad():
            solution = solver(y0, torch.tensor([0.0, end], dtype=D))
        errors.append(float(((solution.ys[-1] - exact) / exact).abs().max()))
        stats = solution.stats
        assert stats.rhs < 2.5 * (stats.steps + stats.rejected)
        assert stats.jacobians < 0.15 * stats.steps
        assert stats.rejected < 0.1 * stats.steps
    # Local errors h^{k+1} at the tolerance leave a global error of tol^{k/(k+1)}: slopes from 2/3
    # (k = 2) to 5/6, give or take what three end values scatter.
    slope = np.polyfit(np.log([1e-4, 1e-6, 1e-8]), np.log(errors), 1)[0]
    assert 0.6 < slope < 1.2, errors
    assert errors[-1] < 1e-5, errors


def test_frequent_outputs_cost_little():
    """Landing on output times neither shrinks later steps nor lowers the order."""
    field, start, end, *_ = PROBLEMS["ROBER"]
    y0 = torch.tensor(start, dtype=D)
    solver = pnode.Solver(field, method="bdf", rtol=1e-6, atol=1e-12)
    end = 1e6
    with torch.no_grad():
        alone = solver(y0, torch.tensor([0.0, end], dtype=D)).stats
        outputs = 60
        times = torch.cat([torch.zeros(1, dtype=D), torch.logspace(-2, 6, outputs, dtype=D)])
        dense = solver(y0, times).stats
    # At most one shortened and one split step for each output, and some steps after them.
    assert dense.steps < alone.steps + 3 * outputs
    assert dense.rejected <= alone.rejected + 5


def test_nan_shrinks_the_step():
    """One evaluation fails: that step is tried again at a quarter of its length."""
    times, accepted = [], []

    def f(t, y):
        times.append(float(t))
        return -y + torch.cos(t) + (torch.nan if len(times) == 40 else 0.0)

    y0 = torch.tensor([1.0], dtype=D)
    solver = pnode.Solver(
        f, method="bdf", rtol=1e-5, atol=1e-5, monitor=lambda step, t, y: accepted.append(t)
    )
    with torch.no_grad():
        solution = solver(y0, torch.tensor([0.0, 6.0], dtype=D))
    assert solution.stats.rejected > 0
    start = max(t for t in accepted if t < times[40])
    assert times[40] - start == pytest.approx(0.25 * (times[39] - start), rel=1e-9)
    exact = 0.5 * (math.cos(6.0) + math.sin(6.0) + math.exp(-6.0))
    assert float(solution.ys[-1]) == pytest.approx(exact, abs=2e-4)


def test_nan_everywhere_is_an_error():
    solver = pnode.Solver(lambda t, y: y * float("nan"), method="bdf", rtol=1e-4)
    with pytest.raises(NonFiniteVectorField):
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["bdf1", "bdf3"])
def test_a_fixed_step_without_solution_is_an_error(name):
    """x = y + h (x^2 + 1) has no real root for h = 1."""
    solver = pnode.Solver(lambda t, y: y * y + 1.0, method=name, step_size=1.0)
    with pytest.raises(NonlinearSolveFailed, match="step 0"):
        solver(torch.zeros(1, dtype=D), torch.tensor([0.0, 3.0]))


def test_a_fixed_step_that_needs_full_newton():
    """arctan far from its root: Newton's full steps diverge, backtracking finds it."""

    def f(t, y):
        return -1e3 * torch.atan(y - 20.0)

    solver = pnode.Solver(f, method="bdf1", step_size=1.0)
    y = solver(torch.zeros(1, dtype=D), torch.tensor([0.0, 1.0])).ys[-1]
    # y = -1000 arctan(y - 20): the root of the step's equation.
    assert abs(float(y - f(0.0, y))) < 1e-6


def test_an_exception_of_the_field_comes_through():
    class Mine(Exception):
        pass

    def f(t, y):
        if t > 0.5:
            raise Mine
        return -y

    for keywords in ({"step_size": 0.1}, {"rtol": 1e-4}):
        solver = pnode.Solver(f, method="bdf", **keywords)
        with pytest.raises(Mine):
            solver(torch.ones(1, dtype=D), torch.tensor([0.0, 1.0]))


def test_decreasing_times():
    field, y0 = Field(), initial()
    there = pnode.Solver(field, method="bdf", rtol=1e-9, atol=1e-11)
    y1 = there(y0, torch.tensor([0.0, 1.0])).ys[-1]
    back = there(y1, torch.tensor([1.0, 0.0])).ys[-1]
    assert relative_difference([back.detach()], [y0.detach()]) < 1e-6
    # The derivative of the flow there and back is the identity.
    (gradient,) = torch.autograd.grad(back[0, 0], y0)
    expected = torch.zeros_like(y0)
    expected[0, 0] = 1.0
    assert float((gradient - expected).norm()) < 1e-6


def test_float32():
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 1.0])
    exact = gradients(
        pnode.Solver(field, method="bdf", rtol=1e-8)(y0, t).ys[-1].square().sum(), field, y0
    )
    single = Field().float()
    y0_single = y0.detach().float().requires_grad_()
    solution = pnode.Solver(single, method="bdf", rtol=1e-4, atol=1e-5)(y0_single, t)
    assert solution.ys.dtype is torch.float32
    assert solution.stats.rejected <= 2
    ours = gradients(solution.ys[-1].square().sum(), single, y0_single)
    # The tolerance 1e-4, some 30 steps of it.
    assert relative_difference([g.double() for g in ours], exact) < 1e-3


def test_options_of_snes_are_honoured():
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 1.0])
    counts = {}
    for stol in (1e-3, 1e-6, 1e-12):
        solver = pnode.Solver(field, method="bdf", rtol=1e-3, petsc_options={"snes_stol": stol})
        stats = solver(y0, t).stats
        counts[stol] = stats.newton / (stats.steps + stats.rejected)
    assert counts[1e-3] < counts[1e-6] < counts[1e-12]
    solver = pnode.Solver(
        field, method="bdf3", step_size=0.5, petsc_options={"snes_max_it": 1, "snes_stol": 1e-14}
    )
    with pytest.raises(NonlinearSolveFailed, match="MAX_IT"):
        solver(y0, t)


@pytest.mark.parametrize("option", ["ts_adapt_type", "ts_bdf_order", "ts_python_type"])
def test_options_without_effect_are_refused(option):
    solver = pnode.Solver(Field(), method="bdf", petsc_options={option: "none"})
    with pytest.raises(ConfigurationError, match=option):
        solver(initial(), torch.tensor([0.0, 1.0]))


def test_a_sweep_goes_on_from_its_history():
    """History and orders are all a later step needs."""
    field, y0 = Field(), initial().detach().reshape(-1)
    method = find_method("bdf")
    problem = InitialValueProblem.create(
        lambda t, y: field(t, y.view(2, 3)).reshape(-1), y0, torch.zeros(1), ()
    )

    def integrator(adaptive):
        settings = IntegratorSettings(method, 6, D, adaptive=adaptive, rtol=1e-5, atol=1e-7)
        options = SolverOptions(next_prefix(), TIGHT, default_options(method, adaptive, "dense", D))
        made = create_integrator(settings, options)
        made.begin(VectorField(problem, Ledger()), y0, 0.0)
        return made

    first, taken, s, step = integrator(True), [], 0.0, 1e-3
    histories, states = [], []
    with torch.no_grad():
        while len(taken) < 40:
            history = first.history
            outcome = first.attempt(s, step, len(taken))
            if outcome.accepted:
                histories.append(history)
                taken.append((s, step, outcome.order))
                states.append(first.history[0][0])
                s += step
            step = outcome.next_step
        second = integrator(False)
        second.restore(histories[25])
        for index in range(25, 40):
            start, length, order = taken[index]
            assert second.attempt(start, length, index, order).accepted
            difference = second.history[0][0] - states[index]
            assert float(difference.norm() / states[index].norm()) < 1e-12
    for made in (first, second):
        made.end()
        made.destroy()


def test_automatic_first_step_is_that_of_order_one():
    """y' = -y: local error h^2 / 2 within the tolerance, and not far below it."""
    steps = []
    solver = pnode.Solver(
        lambda t, y: -y, method="bdf", rtol=1e-6, atol=1e-6,
        monitor=lambda step, t, y: steps.append(t),
    )  # fmt: skip
    with torch.no_grad():
        solution = solver(torch.ones(1, dtype=D), torch.tensor([0.0, 1.0]))
    assert solution.stats.rejected == 0
    assert 1e-5 < steps[0] < math.sqrt(2 * 2e-6)


@pytest.mark.parametrize("rest", [(0, 1), (0,)], ids=["all", "one"])
@pytest.mark.parametrize("name", [f"bdf{k}" for k in range(1, 7)])
def test_a_state_at_rest(name, rest):
    """Newton's method takes the prediction itself: dy/dy0 is 1 there."""
    moving = torch.tensor([float(i not in rest) for i in range(2)], dtype=D)
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: -rate * moving * y, params=[rate], method=name, step_size=0.1
    )
    y0 = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    y = solver(y0, torch.tensor([0.0, 1.0], dtype=D)).ys[-1]
    y.sum().backward()
    for i in rest:
        assert float(y[i].detach()) == pytest.approx(float(y0[i].detach()), rel=1e-12)
        assert float(y0.grad[i]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", ["bdf", "bdf3"])
@pytest.mark.parametrize(
    ("start", "field", "end"),
    [
        ([0.0, 2.0], lambda t, y: -y, [0.0, 2.0 * math.exp(-1.0)]),
        ([0.0, 0.0], lambda t, y: 1.0 - y, [1.0 - math.exp(-1.0)] * 2),
        ([0.0, 1.0], lambda t, y: torch.stack([y[1], 0.0 * y[1]]), [1.0, 1.0]),
        ([0.0, 0.0], lambda t, y: 0.0 * y, [0.0, 0.0]),
    ],
)
def test_relative_tolerance_alone(name, start, field, end):
    """atol = 0, for one entry or all, where entries are zero."""
    y0 = torch.tensor(start, dtype=D, requires_grad=True)
    for atol in (0.0, torch.tensor([0.0, 1e-9], dtype=D)):
        solver = pnode.Solver(field, method=name, rtol=1e-6, atol=atol, max_steps=5000)
        y = solver(y0, torch.tensor([0.0, 1.0], dtype=D)).ys[-1]
        assert y.tolist() == pytest.approx(end, rel=1e-4)
        assert bool(torch.isfinite(torch.autograd.grad(y.sum(), y0)[0]).all())


def test_relative_tolerance_that_no_step_meets():
    """y = t^3: the first step of order one is wrong by twice y, however short it is."""
    for atol, fails in ((0.0, True), (1e-9, False)):
        solver = pnode.Solver(lambda t, y: 3.0 * t * t + 0.0 * y, method="bdf", atol=atol)
        y0, t = torch.zeros(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
        if fails:
            with pytest.raises(StepSizeUnderflow, match="loosen rtol and atol"):
                solver(y0, t)
        else:
            assert float(solver(y0, t).ys[-1]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "form", "sign"),
    [
        ("bdf", "rhs", 1.0), ("bdf", "mass", -1.0), ("bdf", "residual", 1.0),
        ("bdf", "tuple", -1.0), ("bdf", "event", 1.0), ("bdf2", "rhs", -1.0),
        ("bdf3", "event", -1.0),
    ],
)  # fmt: skip
def test_repeated_backwards_have_the_same_bits(name, form, sign):
    """Newton's tolerances, and attempts that failed on the way, are those of the forward sweep.

    A slope that changes within a hundredth makes steps fail.
    """
    rate = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)

    def field(t, y):
        jump = torch.tanh(300.0 * (sign * t - 0.5))
        return sign * torch.stack(
            [-rate[0] * y[0] ** 3 + jump, rate[1] * (y[0] - y[1]) + y[2] * 0.1]
        )

    def full(t, y):
        return torch.cat([field(t, y), (y[2] + y[2] ** 3 - rate.sum() * y[0])[None]])

    keywords = {
        "rhs": {"rhs": lambda t, y: torch.cat([field(t, y), -sign * y[2:]])},
        "mass": {"rhs": full, "mass": torch.tensor([1.0, 1.0, 0.0], dtype=D)},
        "residual": {
            "residual": lambda t, y, yp: torch.cat([yp[:2] + 0.1 * yp[:2] ** 3, yp[2:] * 0.0])
            - full(t, y)
        },
        "tuple": {"rhs": lambda t, y: (field(t, torch.cat(y)), -sign * y[1])},
        "event": {
            "rhs": lambda t, y: torch.cat([field(t, y), -sign * y[2:]]),
            "event_fn": lambda t, y: y[2] - 0.28,
        },
    }[form]  # fmt: skip
    if form in ("mass", "residual"):
        keywords["consistent_start"] = True
    solver = pnode.Solver(**keywords, params=[rate], method=name, rtol=1e-4, atol=1e-6)
    y0 = torch.tensor([1.0, 0.5, 0.7], dtype=D, requires_grad=True)
    start = (y0[:2], y0[2:]) if form == "tuple" else y0
    solution = solver(start, sign * torch.tensor([0.0, 0.3, 1.0], dtype=D))
    loss = (torch.cat(solution.ys, -1) if form == "tuple" else solution.ys).square().sum()
    first, *others = (
        torch.autograd.grad(loss, [y0, rate], retain_graph=True) for _ in range(3)
    )  # fmt: skip
    assert solution.stats.rejected > 0
    assert solution.stats.backward.recomputed == 2 * solution.stats.steps
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.mark.parametrize("compile", [False, True])
def test_snes_stol_can_but_ask_for_more(compile):
    """Small entries far below the norm of y are solved for as their atol wants it, whatever stol.

    Else the error estimate is noise, and steps get smaller and smaller.
    """
    y0, t = torch.tensor([1.0, 0.0, 0.0], dtype=D), torch.tensor([0.0, 40.0], dtype=D)
    steps = []
    for options in ({}, {"snes_stol": 1e-4}):
        solver = pnode.Solver(
            lambda t, y: robertson(t, y, RATES), method="bdf", rtol=1e-6, compile=compile,
            atol=torch.tensor([1e-8, 1e-12, 1e-8], dtype=D), jacobian="dense", max_steps=1000,
            petsc_options=options,
        )  # fmt: skip
        steps.append(solver(y0, t).stats.steps)
    assert abs(steps[1] - steps[0]) < 20

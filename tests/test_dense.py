"""Dense output: interpolated states, their order, and their gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from replica import arkimex_step, arkimex_tableau, petsc_tableau, recorded_orders, replica
from test_forms import Reaction, Transport
from test_gradients import TIGHT, Field, initial, relative_difference, weights_like

import pnode
from pnode.base.interpolation import hermite, hermite_rate, polynomial, polynomial_rate
from pnode.solvers.methods import METHODS, find_method

D = torch.float64
OUTPUTS = torch.tensor([0.0, 0.03, 0.17, 0.31, 0.31 + 1e-9, 0.4, 0.62, 0.77, 1.0], dtype=D)
HERMITE = [
    "euler",
    "rk4",
    "bosh3",
    "verner8",
    "beuler",
    "cn",
    "trbdf2",
    "verner6",
]
#: Through states that partial steps lead to.
PARTIAL = ["implicit_midpoint", "sdirk2", "es325", "esdirk6", "rodaspr", "radau5", "gauss4"]


def interpolated(f, name, y0, grid, t, orders=None):
    """States at t (differentiable in it) from a replica of the steps; the ends are exact."""
    method = find_method(name)
    if method.multistep:
        k = method.order
        orders = orders or [1 - k if step < k - 1 else k for step in range(len(grid) - 1)]
    states = replica(f, name, y0, grid, orders)
    if method.multistep and len(grid) > max(map(abs, orders)):
        inside = polynomial_of_steps(states, grid, orders)
        return torch.stack([at(states, grid, time, inside) for time in t])
    if not method.implicit and method.order > 4 and name != "dopri5":
        return torch.stack([at(states, grid, time, bootstrapped(f, states, grid, method.order))
                            for time in t])  # fmt: skip
    if name in PARTIAL:
        inside = partial_steps(f, name, states, grid)
        return torch.stack([at(states, grid, time, inside) for time in t])
    if name != "dopri5":
        return hermite_in_torch(f, states, grid, t)
    tableau = petsc_tableau(find_method(name))

    def inside(n, start, h, theta):
        return own_interpolant(f, tableau, start, h, states[n], theta)

    return torch.stack([at(states, grid, time, inside) for time in t])


def at(states, grid, time, inside):
    """State at one time: a state of the grid, or what ``inside`` makes of (n, t_n, h, theta)."""
    direction = 1.0 if grid[-1] > grid[0] else -1.0
    now = float(time.detach())
    if now in grid:
        return states[grid.index(now)]
    n = max(k for k, node in enumerate(grid[:-1]) if direction * node <= direction * now)
    h = grid[n + 1] - grid[n]
    return inside(n, grid[n], h, (time - grid[n]) / h)


def partial_steps(f, name, states, grid):
    """The polynomial through the states that steps to Lobatto's points end at."""
    order = find_method(name).order
    number = max(2, min(3, order), order - 2)
    roots = np.polynomial.Legendre.basis(number + 1).deriv().roots().real
    points = [0.0, *(0.5 + 0.5 * roots), 1.0]

    def step(start, h, y):
        if find_method(name).kind == "imex":
            return arkimex_step(*f, arkimex_tableau(find_method(name)), start, h, y)
        return replica(f, name, y, [start, start + h])[1]

    def inside(n, start, h, theta):
        found = [step(start, c * h, states[n]) for c in points[1:-1]]
        return through_states(points, torch.stack([states[n], *found, states[n + 1]]), theta)

    return inside


def polynomial_of_steps(states, grid, orders):
    """The one through the states of a step by BDF, or of the first behind those that start."""

    def inside(n, start, h, theta):
        k = orders[n] if orders[n] > 0 else 1 - orders[n]
        first = n + 1 - k if orders[n] > 0 else 0
        points = [(time - start) / h for time in grid[first : first + k + 1]]
        return through_states(points, states[first : first + k + 1], theta)

    return inside


def through_states(points, values, theta):
    """The polynomial through values, at theta."""
    k = torch.arange(len(points), dtype=D)
    powers = torch.tensor(points, dtype=D)[:, None] ** k
    solved = torch.linalg.solve(powers, values.reshape(len(points), -1))
    return (theta**k @ solved).reshape(values.shape[1:])


def hermite_in_torch(f, states, grid, t):
    """The polynomial through values and slopes at the ends of a step."""

    def inside(n, start, h, theta):
        nodes, chosen = 2, (n, n + 1)
        where = torch.tensor([0.0, 1.0], dtype=D)
        k = torch.arange(2 * nodes, dtype=D)
        values = where[:, None] ** k
        slopes = torch.cat([torch.zeros(nodes, 1, dtype=D), k[1:] * where[:, None] ** k[:-1]], 1)
        u = torch.stack([states[i] for i in chosen])
        du = h * torch.stack([f(torch.tensor(grid[i], dtype=D), states[i]) for i in chosen])
        known = torch.cat([u, du]).reshape(2 * nodes, -1)
        solved = torch.linalg.solve(torch.cat([values, slopes]), known)
        return (theta**k @ solved).reshape(u.shape[1:])

    return torch.stack([at(states, grid, time, inside) for time in t])


def bootstrapped(f, states, grid, order):
    """The polynomial through slopes at Lobatto's points, taken on one through fewer of them.

    Its coefficients are solved for, and those of the cubic that leads it to the end of the step.
    """

    def through(points, slopes, u, v, h):
        k = torch.arange(len(points), dtype=D)
        solved = torch.linalg.solve(points[:, None] ** k, h * slopes.reshape(len(points), -1))

        def value(theta):
            whole = (theta ** (k + 1) / (k + 1) @ solved).reshape(u.shape)
            missing = v - u - (solved / (k + 1)[:, None]).sum(0).reshape(u.shape)
            return u + whole + theta**2 * (3 - 2 * theta) * missing

        return value

    def inside(n, start, h, theta):
        u, v = states[n], states[n + 1]
        ends = [f(torch.tensor(grid[i], dtype=D), states[i]) for i in (n, n + 1)]
        value = through(torch.tensor([0.0, 1.0], dtype=D), torch.stack(ends), u, v, h)
        for number in range(2, {5: 3, 6: 4, 7: 4, 8: 5}[order] + 1):
            derivative = np.polynomial.Legendre.basis(number + 1).deriv()
            points = torch.tensor(0.5 + 0.5 * derivative.roots().real, dtype=D)
            slopes = [f(start + c * h, value(c)) for c in points]
            both = torch.cat([torch.tensor([0.0, 1.0], dtype=D), points])
            value = through(both, torch.stack([*ends, *slopes]), u, v, h)
        return value(theta)

    return inside


def own_interpolant(f, tableau, start, h, y, theta):
    """y + h sum_i b_i(theta) k_i with the polynomials b_i of the tableau."""
    slopes = []
    for row, c in zip(tableau["A"], tableau["c"], strict=True):
        stage = y + sum(h * a * k for a, k in zip(row, slopes, strict=False))
        slopes.append(f(torch.tensor(start + c * h, dtype=D), stage))
    powers = torch.stack([theta ** (j + 1) for j in range(tableau["interpolation"].shape[1])])
    weights = torch.as_tensor(tableau["interpolation"]) @ powers
    return y + h * sum(b * k for b, k in zip(weights, slopes, strict=True))


def gradients_of(ys, field, y0, t):
    tensors = [y0, field.inner, field.outer, field.bias, t]
    return torch.autograd.grad((ys * weights_like(ys)).sum(), tensors)


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", [*HERMITE, *PARTIAL, "dopri5", "bdf1", "bdf4", "bdf"])
def test_equals_autograd_through_a_replica(name, direction):
    """States and gradients, those of the interpolated times included."""
    implicit = find_method(name).implicit
    field, y0 = Field(), initial()
    t = (direction * OUTPUTS).requires_grad_()
    solver = pnode.Solver(
        field, method=name, step_size=0.1, dense=True, petsc_options=TIGHT if implicit else None
    )
    solution = solver(y0, t)
    assert solution.stats.steps == 10
    grid = [direction * k / 10 for k in range(11)]
    reference = interpolated(field, name, y0, grid, t)
    tolerance = 1e-9 if implicit else 1e-12
    assert relative_difference([solution.ys.detach()], [reference.detach()]) < tolerance
    ours = gradients_of(solution.ys, field, y0, t)
    theirs = gradients_of(reference, field, y0, t)
    assert relative_difference(ours[:4], theirs[:4]) < tolerance
    # The first and last time, and one that a step hits, move along the exact flow (see Solver).
    inside = [index for index, time in enumerate(OUTPUTS.tolist()) if time not in (0.0, 0.4, 1.0)]
    assert relative_difference([ours[4][inside]], [theirs[4][inside]]) < 100 * tolerance
    hit = OUTPUTS.tolist().index(0.4)
    slope = field(t[hit], solution.ys[hit])
    expected = (weights_like(reference)[hit] * slope).sum()
    assert float(ours[4][hit]) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("name", ["dopri5", "bosh3", "cn", "trbdf2", "esdirk6", "bdf"])
def test_adaptive_gradient_is_that_of_the_accepted_steps(name):
    implicit = find_method(name).implicit
    field, y0 = Field(), initial()
    grid = [0.0]
    tolerance = 1e-4 if name == "cn" else 1e-6
    solver = pnode.Solver(
        field, method=name, rtol=tolerance, atol=tolerance, first_step=0.8, dense=True,
        monitor=lambda step, t, y: grid.append(t), petsc_options=TIGHT if implicit else None,
    )  # fmt: skip
    t = (2.0 * OUTPUTS).requires_grad_()
    solution = solver(y0, t)
    if not implicit:
        assert solution.stats.rejected > 0
    orders = recorded_orders(solution.ys) if name == "bdf" else None
    reference = interpolated(field, name, y0, grid, t, orders)
    assert relative_difference([solution.ys.detach()], [reference.detach()]) < 1e-9
    ours = gradients_of(solution.ys, field, y0, t)
    theirs = gradients_of(reference, field, y0, t)
    assert relative_difference(ours[:4], theirs[:4]) < 1e-9
    assert relative_difference([ours[4][1:-1]], [theirs[4][1:-1]]) < 1e-9


@pytest.mark.parametrize("name", ["arkimex2c", "arkimex3"])
def test_imex_takes_partial_steps_with_both_parts(name):
    implicit, explicit, y0 = Reaction(), Transport(), torch.tensor([1.0, 0.5], dtype=D)
    y0.requires_grad_()
    solver = pnode.Solver(
        implicit=implicit, explicit=explicit, method=name, step_size=0.1, dense=True,
        petsc_options=TIGHT,
    )  # fmt: skip
    t = torch.tensor([0.0, 0.13, 0.18, 0.31, 0.5], dtype=D, requires_grad=True)
    tableau, states = arkimex_tableau(find_method(name)), [y0]
    for k in range(5):
        states.append(arkimex_step(implicit, explicit, tableau, k / 10, 0.1, states[-1]))
    grid = [k / 10 for k in range(6)]
    inside = partial_steps((implicit, explicit), name, states, grid)
    reference = torch.stack([at(states, grid, time, inside) for time in t[1:4]])
    ys = solver(y0, t).ys[1:4]
    assert relative_difference([ys.detach()], [reference.detach()]) < 1e-9
    tensors = [y0, implicit.rates, explicit.speed, t]
    ours, theirs = (
        torch.autograd.grad((x * weights_like(x)).sum(), tensors) for x in (ys, reference)
    )
    assert relative_difference([*ours[:3], ours[3][1:4]], [*theirs[:3], theirs[3][1:4]]) < 1e-9


@pytest.mark.parametrize("form", ["mass", "residual"])
def test_forms_whose_rate_is_solved_for(form):
    """Of M y' = f and of 2 y' + 0.1 y'^3 = ...: equal to the same as a right-hand side."""
    field, y0 = Field(), initial()
    keywords = (
        {"rhs": lambda t, y: 2.0 * field(t, y), "mass": torch.full(y0.shape, 2.0)}
        if form == "mass"
        else {"residual": lambda t, y, v: 2.0 * (v - field(t, y)) + 0.1 * (v - field(t, y)) ** 3}
    )
    tensors = [y0, field.inner, field.outer, field.bias]
    found = []
    for problem in ({"rhs": field}, keywords):
        solver = pnode.Solver(
            **problem, params=field.parameters(), method="beuler", step_size=0.1, dense=True,
            petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14},
        )  # fmt: skip
        ys = solver(y0, OUTPUTS).ys
        found.append([ys, *torch.autograd.grad((ys * weights_like(ys)).sum(), tensors)])
    assert relative_difference(*found) < 1e-11


@pytest.mark.parametrize("name", ["dopri5", "rk4", "cn"])
def test_second_backward_and_a_single_output(name):
    """Only the steps up to the interpolated output are taken back; twice gives the same bits."""
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method=name, step_size=0.1, dense=True)(y0, OUTPUTS)
    loss = solution.ys[3].square().sum()  # t = 0.31, inside the fourth step
    tensors = [y0, field.inner, field.outer, field.bias]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    # dopri5's own interpolant starts at the step's beginning; the cubic needs its end too.
    assert solution.stats.backward.steps == (3 if name == "dopri5" else 4)
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fewer_fixed_steps_than_the_order_of_multistep_methods():
    """Do not make up its polynomial: the cubic, with slopes."""
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 0.2, 0.8, 1.0], dtype=D, requires_grad=True)
    solver = pnode.Solver(field, method="bdf4", step_size=0.5, dense=True, petsc_options=TIGHT)
    solution, grid = solver(y0, t), [0.0, 0.5, 1.0]
    reference = hermite_in_torch(field, replica(field, "bdf4", y0, grid), grid, t)
    assert relative_difference([solution(t[1:-1]).detach()], [reference[1:-1].detach()]) < 1e-9
    ours, theirs = (gradients_of(ys, field, y0, t) for ys in (solution.ys, reference))
    assert relative_difference(ours[:4], theirs[:4]) < 1e-9
    assert relative_difference([ours[4][1:-1]], [theirs[4][1:-1]]) < 1e-9


def decay_with_drive(t, y):
    return -y + torch.cos(3.0 * t) * torch.exp(-y / 4)


@pytest.mark.parametrize(
    "name", ["dopri5", *HERMITE, *PARTIAL[:-1], "fehlberg5", "esdirk3", "bdf1", "bdf3", "bdf6"]
)
def test_order_of_the_interpolated_values(name):
    """That of the method: errors of the polynomials are of order h^4, h^6 and h^8."""
    expected = find_method(name).order
    y0 = torch.tensor([1.0, -0.5], dtype=D)
    # With 64 steps verner8 has errors of 1e-15, which are round-off.
    errors, numbers = [], (4, 8, 16, 32) if name == "verner8" else (8, 16, 32, 64)
    for number in numbers:
        # The same place in every step, so that the errors are comparable.
        inside = (torch.arange(number, dtype=D) + 0.37) * (2.0 / number)
        t = torch.cat([torch.zeros(1, dtype=D), inside, torch.tensor([2.0], dtype=D)])
        # Steps that short leave round-off alone; what tolerances of 1e-13 leave is more.
        exact = pnode.odeint(decay_with_drive, y0, t, method="verner8", step_size=1 / 256)
        solver = pnode.Solver(
            decay_with_drive, method=name, step_size=2.0 / number, dense=True,
            petsc_options=TIGHT if find_method(name).implicit else None,
        )  # fmt: skip
        solution = solver(y0, t)
        assert solution.stats.steps == number
        errors.append(float((solution.ys - exact)[1:-1].abs().max()))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(expected, abs=0.25), rates


@pytest.mark.parametrize("name", ["trbdf2", "esdirk3", "es325", "rodaspr"])
def test_stiff_steps_are_as_accurate_inside_as_at_their_ends(name):
    """P. Kaps' problem, y = (exp(-2 t), exp(-t)), whose cubics are off 250 times as much."""

    def kaps(t, y):
        first, second = y.unbind()
        stiff = 1e6 * (second.square() - first)
        return torch.stack([stiff - 2.0 * first, first - second - second.square()])

    solver = pnode.Solver(kaps, method=name, rtol=1e-4, atol=1e-6, dense=True)
    solution = solver(torch.ones(2, dtype=D), [0.0, 1.0], at="steps")
    ends = torch.as_tensor(solution.ts, dtype=D)
    inside = torch.cat([torch.lerp(ends[:-1], ends[1:], x) for x in (0.15, 0.37, 0.63, 0.85)])
    at_ends, within = (
        float((ys - torch.stack([(-2.0 * t).exp(), (-t).exp()], 1)).abs().max())
        for t, ys in ((ends, solution.ys), (inside, solution(inside)))
    )
    assert len(ends) > 5 and within < 4.0 * at_ends


@pytest.mark.parametrize("name", ["dopri5", "bosh3", "cn", "trbdf2"])
def test_steps_do_not_depend_on_the_outputs(name):
    field, y0 = Field(), initial().detach()

    def solve(number, **keywords):
        t = torch.linspace(0.0, 2.0, number, dtype=D)
        solver = pnode.Solver(field, method=name, rtol=1e-4, atol=1e-4, **keywords)
        return solver(y0, t)

    few, many = solve(2, dense=True), solve(300, dense=True)
    assert many.stats.steps == few.stats.steps < 100
    assert solve(300).stats.steps >= 299
    assert torch.equal(few.ys[-1], many.ys[-1])
    assert torch.equal(few.ys[-1], solve(2).ys[-1])
    # One slope at either end of every step for the cubic, shared; none for dopri5's own.
    extra = 0 if name == "dopri5" else few.stats.steps + 1
    assert many.stats.rhs - few.stats.rhs == extra


@pytest.mark.parametrize(("name", "inner", "last"), [("bosh5", 5, 3), ("dopri8", 14, 5)])
def test_slopes_inside_are_taken_in_steps_with_outputs_alone(name, inner, last):
    """A step with outputs: f at its ends and inside; a graph of each for the gradient."""
    solver = pnode.Solver(decay_with_drive, method=name, step_size=0.25, dense=True, compile=False)
    y0 = torch.tensor([1.0, -0.5], dtype=D, requires_grad=True)
    plain = solver(y0, torch.tensor([0.0, 1.0], dtype=D))
    inside = solver(y0, torch.tensor([0.0, 0.55, 0.6, 0.7, 1.0], dtype=D))
    assert inside.stats.rhs - plain.stats.rhs == inner + 2
    plain.ys[-1].sum().backward()
    inside.ys.sum().backward()
    before, after = plain.stats.backward, inside.stats.backward
    assert after.vjp - before.vjp == inner + 2
    # Those of all interpolants but the last are evaluated before they are differentiated.
    assert after.rhs - before.rhs == inner - last + inner + 2


def test_steps_without_outputs_cost_nothing():
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method="rk4", step_size=0.1, dense=True)
    plain = solver(y0, torch.tensor([0.0, 1.0], dtype=D))
    inside = solver(y0, torch.tensor([0.0, 0.52, 0.57, 1.0], dtype=D))
    assert plain.stats.rhs == 40
    assert inside.stats.rhs == 42
    inside.ys[1:3].sum().backward()
    # Six steps, and one product at either end of the sixth.
    assert inside.stats.backward.steps == 6
    assert inside.stats.backward.vjp == 4 * 6 + 2
    # A step that ends at an output time is not interpolated.
    assert solver(y0, torch.tensor([0.0, 0.5, 1.0], dtype=D)).stats.rhs == 40


@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_tuples_and_single_precision(name):
    def field(t, y):
        return -y[1], y[0] * torch.cos(t)

    y0 = (torch.ones(2, dtype=D, requires_grad=True), torch.zeros(2, dtype=D))
    keywords = {"method": name, "step_size": 0.1, "dense": True}
    ys = pnode.Solver(field, **keywords)(y0, OUTPUTS).ys
    (gradient,) = torch.autograd.grad(ys[1][2:5].sum(), y0[0])
    flat = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=D, requires_grad=True)
    one = pnode.Solver(
        lambda t, y: torch.cat([-y[2:], y[:2] * torch.cos(t)]), **keywords
    )(flat, OUTPUTS).ys  # fmt: skip
    assert torch.equal(torch.cat(ys, dim=1), one)
    (expected,) = torch.autograd.grad(one[2:5, 2:].sum(), flat)
    assert torch.equal(gradient, expected[:2])
    single = tuple(part.detach().float().requires_grad_() for part in y0)
    ys32 = pnode.Solver(field, **keywords)(single, OUTPUTS).ys
    assert ys32[0].dtype is torch.float32
    (gradient32,) = torch.autograd.grad(ys32[1][2:5].sum(), single[0])
    # f rounds to 6e-8, and so do the products; a handful of terms of order one.
    assert torch.allclose(gradient32.double(), gradient, rtol=1e-5)


def test_few_outputs():
    field, y0 = Field(), initial().detach()
    solver = pnode.Solver(field, method="dopri5", dense=True)
    assert torch.equal(solver(y0, torch.tensor([0.5])).ys, y0[None])
    with torch.no_grad():
        assert not solver(y0, OUTPUTS).ys.requires_grad


def test_monitor_sees_steps_not_outputs():
    seen = []
    solver = pnode.Solver(
        decay_with_drive, dense=True, monitor=lambda step, t, y: seen.append((step, t, y))
    )
    solution = solver(torch.ones(1, dtype=D), torch.linspace(0, 1, 50, dtype=D))
    assert [step for step, _, _ in seen] == list(range(1, solution.stats.steps + 1))
    assert len(seen) < 49
    assert seen[-1][1] == 1.0 and torch.equal(seen[-1][2], solution.ys[-1])


def test_failures_inside_the_interpolation():
    """An exception of f at a slope for the interpolant comes through; the solver lives on."""
    calls = []

    def field(t, y):
        calls.append(float(t))
        if len(calls) == 5:
            raise KeyError("mine")
        return -y

    solver = pnode.Solver(field, method="rk4", step_size=1.0, dense=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=D)
    y0 = torch.ones(1, dtype=D)
    with pytest.raises(KeyError, match="mine"):
        solver(y0, t)
    solution = solver(y0, t)
    assert float(solution.ys[1, 0]) == pytest.approx(math.exp(-0.5), abs=1e-2)
    with pytest.raises(pnode.ConfigurationError, match="step_size=h"):
        pnode.odeint(field, y0, t, method="rk4", dense=True)


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
def test_weights(theta):
    """Cubics are reproduced; rates are derivatives; dopri5's own ends in its step."""
    weights, rates = hermite(theta), hermite_rate(theta)

    def combine(w, k):  # of y = x^k on [0, 1]
        derivative = (1.0 if k == 1 else 0.0, float(k))
        ends = (1.0, 1.0) if k == 0 else (0.0, 1.0)
        return float(np.dot(w.state, ends) + np.dot(w.slope, derivative))

    for k in range(4):
        assert combine(weights, k) == pytest.approx(theta**k, abs=1e-15)
        slope = k * theta ** (k - 1) if k else 0.0
        assert combine(rates, k) == pytest.approx(slope, abs=1e-14)
    tableau = petsc_tableau(find_method("dopri5"))
    B, h = tableau["interpolation"], 1e-5
    assert polynomial(B, 1.0) == pytest.approx(tableau["b"], abs=1e-12)
    differences = np.subtract(polynomial(B, theta + h), polynomial(B, theta - h)) / (2 * h)
    assert polynomial_rate(B, theta) == pytest.approx(differences, abs=1e-8)


def test_which_methods_have_an_interpolant_of_their_own():
    degrees = {
        method.name: petsc_tableau(method)["interpolation"].shape[1]
        for method in METHODS
        if method.ts_type == "rk"
    }
    assert (degrees.pop("dopri5"), degrees.pop("tsit5")) == (5, 4)
    assert max(degrees.values()) < 4


@pytest.mark.parametrize("step_size", [0.1, None])
def test_own_interpolants_evaluate_nothing_again(step_size):
    """Of FSAL methods the last slope is evaluated in the step, and its graph is kept."""
    t = torch.tensor([0.0, 0.13, 0.52, 0.57, 0.97, 1.0], dtype=D)
    gradients = []
    for store in ("auto", "stages"):
        field, y0 = Field(), initial().detach().requires_grad_()
        solver = pnode.Solver(
            field, method="dopri5", step_size=step_size, dense=True,
            checkpointing=pnode.Checkpointing(store=store),
        )  # fmt: skip
        solution = solver(y0, t)
        inputs = (y0, *field.parameters())
        found = torch.autograd.grad(solution.ys.square().sum(), inputs, allow_unused=True)
        gradients.append([gradient for gradient in found if gradient is not None])
        assert (solution.stats.backward.rhs == 0) == (store == "auto")
    assert len(gradients[0]) > 1 and all(map(torch.equal, *gradients))

"""IMEX, mass matrices and residuals: orders, gradients, differential-algebraic equations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from replica import arkimex_step, arkimex_tableau, solve_implicit

import pnode
from pnode.solvers.methods import METHODS, find_method
from pnode.testing import taylor_test

D = torch.float64
TIGHT = {"snes_rtol": 1e-15, "snes_stol": 1e-15}
IMEX = [method.name for method in METHODS if method.kind == "imex"]


class Reaction(torch.nn.Module):
    """A nonlinear implicit part, non-autonomous."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([[-4.0, 1.0], [0.5, -3.0]], dtype=D))

    def forward(self, t, y):
        return y @ self.rates.T * (1.0 + 0.1 * torch.sin(t)) - 0.3 * torch.sin(y)


class Transport(torch.nn.Module):
    """An explicit part, which shares the implicit part's parameter when it is given one."""

    def __init__(self, shared=None):
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=D))
        self.shared = shared

    def forward(self, t, y):
        slope = self.speed * torch.sin(y.flip(-1) + t)
        return slope if self.shared is None else slope + 0.1 * torch.tanh(y @ self.shared)


def start():
    return torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)


def relative_difference(a, b):
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", IMEX)
def test_measured_arkimex_tableau_has_the_order(name):
    """Order conditions of both parts up to order 3, coupling included."""
    method, tableau = find_method(name), arkimex_tableau(find_method(name))
    order = method.order
    weights = [tableau["bt"], tableau["b"]]
    matrices = [tableau["At"], tableau["A"]]
    # PETSc's ars122 and others pass these times; they are the row sums.
    times = [matrix.sum(axis=1) for matrix in matrices]
    assert np.allclose(tableau["ct"], times[0], atol=1e-14)
    assert np.allclose(tableau["c"], times[1], atol=1e-14)
    for b in weights:
        assert b.sum() == pytest.approx(1.0, abs=1e-13)
        for c, other in itertools.product(times, times):
            if order >= 2:
                assert b @ c == pytest.approx(1 / 2, abs=1e-13)
            if order >= 3:
                assert b @ (c * other) == pytest.approx(1 / 3, abs=1e-13)
                for matrix in matrices:
                    assert b @ matrix @ c == pytest.approx(1 / 6, abs=1e-13)


@pytest.mark.parametrize("name", IMEX)
def test_order_of_convergence_of_imex(name):
    order = find_method(name).order
    fi, fe, y0 = Reaction(), Transport(), start().detach()
    t = torch.tensor([0.0, 1.0], dtype=D)
    with torch.no_grad():
        exact = pnode.odeint(
            lambda t, y: fi(t, y) + fe(t, y), y0, t, method="verner8", rtol=1e-13, atol=1e-13
        )[-1]
        counts = (8, 12, 16) if order > 3 else (32, 64, 128)
        errors = []
        for count in counts:
            solver = pnode.Solver(
                implicit=fi, explicit=fe, method=name, step_size=1.0 / count, petsc_options=TIGHT
            )
            errors.append(float((solver(y0, t).ys[-1] - exact).norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 1.2, (slope, errors)


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", IMEX)
def test_imex_equals_autograd_through_a_replica(name, direction):
    fi, y0 = Reaction(), start()
    fe = Transport(shared=fi.rates)
    t = direction * torch.tensor([0.0, 0.2, 0.5], dtype=D)
    solver = pnode.Solver(implicit=fi, explicit=fe, method=name, step_size=0.1, petsc_options=TIGHT)
    ys = solver(y0, t).ys
    tableau, y, states = arkimex_tableau(find_method(name)), y0, []
    for k in range(5):
        y = arkimex_step(fi, fe, tableau, direction * k / 10, direction * 0.1, y)
        states.append(y)
    chosen = torch.stack([states[1], states[4]])
    weights = torch.tensor([[0.3, -1.0], [0.8, 0.5]], dtype=D)
    tensors = [y0, fi.rates, fe.speed]
    ours = torch.autograd.grad((ys[1:] * weights).sum(), tensors)
    theirs = torch.autograd.grad((chosen * weights).sum(), tensors)
    assert relative_difference([ys[1:].detach()], [chosen.detach()]) < 1e-12
    assert relative_difference(ours, theirs) < 1e-9


@pytest.mark.parametrize("name", [n for n in IMEX if find_method(n).adaptive])
def test_adaptive_imex(name):
    """The error falls with the tolerance, and the gradient passes a Taylor test."""
    fi, fe, y0 = Reaction(), Transport(), start()
    t = torch.tensor([0.0, 1.5], dtype=D)
    with torch.no_grad():
        exact = pnode.odeint(
            lambda t, y: fi(t, y) + fe(t, y), y0, t, method="verner8", rtol=1e-13, atol=1e-13
        )[-1]
    errors = []
    for tolerance in (1e-3, 1e-5):
        solver = pnode.Solver(implicit=fi, explicit=fe, method=name, rtol=tolerance, atol=tolerance)
        errors.append(float((solver(y0, t).ys[-1] - exact).detach().norm()))
    # As in test_methods: tol^(p/(p+1)) and a factor 2; order one is 1/10 for a factor 100.
    assert errors[1] < 0.2 * errors[0] < 0.02, errors


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_imex_time_gradient_is_the_whole_slope(jacobian):
    fi, fe, y0 = Reaction(), Transport(), start().detach()
    t = torch.tensor([0.0, 0.5], dtype=D, requires_grad=True)
    solver = pnode.Solver(implicit=fi, explicit=fe, method="ark4", step_size=0.1, jacobian=jacobian)
    ys = solver(y0, t).ys
    ys[1].sum().backward()
    slope = fi(t[1].detach(), ys[1]) + fe(t[1].detach(), ys[1])
    assert float(t.grad[1]) == pytest.approx(float(slope.detach().sum()), rel=1e-13)


# Differential-algebraic equations.


class Kinetics(torch.nn.Module):
    """Robertson's kinetics, mild rates, with conservation of mass as an algebraic equation."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor([0.4, 3.0, 1.0], dtype=D))

    def forward(self, t, y):
        a, b, c = y
        k = self.k
        return torch.stack([
            -k[0] * a + k[2] * b * c, k[0] * a - k[2] * b * c - k[1] * b * b, a + b + c - 1.0
        ])  # fmt: skip


class KineticsResidual(Kinetics):
    """The same as F(t, y, y'), nonlinear in y'."""

    def forward(self, t, y, yp):
        f = super().forward(t, y)
        rate = torch.stack([yp[0] - f[0], yp[1] - f[1]])
        return torch.cat([rate + 0.1 * rate**3, f[2:]])


MASS = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=D))
MIXED = torch.tensor([[1.0, 0.5, 0.0], [0.2, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)


def theta_dae_step(name, mass, f, t, h, y):
    """One step of M (y1 - y0) / h = f by backward Euler, Crank-Nicolson or the midpoint rule."""

    def at(offset):
        return torch.as_tensor(t + offset, dtype=y.dtype)

    if name == "beuler":
        return solve_implicit(lambda x: mass @ (x - y) - h * f(at(h), x), y)
    if name == "cn":
        return solve_implicit(lambda x: mass @ (x - y) - 0.5 * h * (f(at(0.0), y) + f(at(h), x)), y)
    stage = solve_implicit(lambda x: mass @ (x - y) - 0.5 * h * f(at(0.5 * h), x), y)
    return 2.0 * stage - y


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
@pytest.mark.parametrize("mass", ["diagonal", "dense", "sparse", "mixed"])
@pytest.mark.parametrize("name", ["beuler", "cn", "implicit_midpoint"])
def test_mass_matrix_equals_a_replica(name, mass, jacobian):
    field = Kinetics()
    matrix = MIXED if mass == "mixed" else MASS
    given = {"diagonal": MASS.diagonal(), "sparse": MASS.to_sparse()}.get(mass, matrix)
    y0 = torch.tensor([0.9, 0.03, 0.07], dtype=D, requires_grad=True)
    solver = pnode.Solver(
        field, mass=given, method=name, step_size=0.1, jacobian=jacobian,
        petsc_options=TIGHT | ({"ksp_rtol": 1e-13} if jacobian == "matrix-free" else {}),
    )  # fmt: skip
    ys = solver(y0, torch.tensor([0.0, 0.2, 0.5], dtype=D)).ys
    y, states = y0, []
    for k in range(5):
        y = theta_dae_step(name, matrix, field, k / 10, 0.1, y)
        states.append(y)
    chosen = torch.stack([states[1], states[4]])
    weights = torch.tensor([[0.3, -1.0, 2.0], [0.8, 0.5, -0.7]], dtype=D)
    ours = torch.autograd.grad((ys[1:] * weights).sum(), [y0, field.k])
    theirs = torch.autograd.grad((chosen * weights).sum(), [y0, field.k])
    assert relative_difference([ys[1:].detach()], [chosen.detach()]) < 1e-11
    assert relative_difference(ours, theirs) < 1e-9


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_residual_equals_a_replica(jacobian, direction):
    field = KineticsResidual()
    y0 = torch.tensor([0.9, 0.03, 0.07], dtype=D, requires_grad=True)
    h = direction * 0.1
    solver = pnode.Solver(
        residual=field, method="beuler", step_size=0.1, jacobian=jacobian,
        petsc_options=TIGHT | ({"ksp_rtol": 1e-13} if jacobian == "matrix-free" else {}),
    )  # fmt: skip
    ys = solver(y0, torch.tensor([0.0, 2 * h, 5 * h], dtype=D)).ys
    y, states = y0, []
    for k in range(5):
        time = torch.as_tensor((k + 1) * h, dtype=D)
        y = solve_implicit(lambda x, z=y, s=time: field(s, x, (x - z) / h), y)
        states.append(y)
    chosen = torch.stack([states[1], states[4]])
    weights = torch.tensor([[0.3, -1.0, 2.0], [0.8, 0.5, -0.7]], dtype=D)
    ours = torch.autograd.grad((ys[1:] * weights).sum(), [y0, field.k])
    theirs = torch.autograd.grad((chosen * weights).sum(), [y0, field.k])
    assert relative_difference([ys[1:].detach()], [chosen.detach()]) < 1e-11
    assert relative_difference(ours, theirs) < 1e-9


def test_tuple_state_with_a_diagonal_mass_in_its_shape():
    """y = (x, z), x' = -z, 0 = x - z / 2: x = exp(-2 t)."""
    solver = pnode.Solver(
        lambda t, y: (-y[1], y[0] - 0.5 * y[1]),
        mass=(torch.ones(2, dtype=D), torch.zeros(2, dtype=D)),
        method="cn", step_size=0.01,
    )  # fmt: skip
    x0 = torch.tensor([1.0, 3.0], dtype=D)
    x, z = solver((x0, 2.0 * x0), torch.tensor([0.0, 1.0], dtype=D)).ys
    assert torch.allclose(x[-1], math.exp(-2.0) * x0, rtol=1e-4)
    assert torch.allclose(z[-1], 2.0 * x[-1], rtol=1e-10)


class Pendulum(torch.nn.Module):
    """A pendulum in Cartesian coordinates, differentiated to index 1.

    x' = u, y' = v, u' = -s x, v' = -s y - g, 0 = u^2 + v^2 - g y - s L^2, with the rod's tension s
    (Hairer & Wanner II, section VII.1).
    """

    def __init__(self):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(9.81, dtype=D))

    def forward(self, t, state):
        x, y, u, v, s = state
        g = self.gravity
        return torch.stack([u, v, -s * x, -s * y - g, u * u + v * v - g * y - s * (x * x + y * y)])


def test_pendulum_of_index_one():
    """Against the equation of the angle: states, and the gradient with respect to gravity."""
    field, angle = Pendulum(), 1.0
    mass = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=D)
    guess = torch.tensor([math.sin(angle), -math.cos(angle), 0.0, 0.0, 0.0], dtype=D)
    t = torch.tensor([0.0, 1.0], dtype=D)
    gravity = torch.tensor(9.81, dtype=D, requires_grad=True)
    swing = pnode.odeint(
        lambda t, y: torch.stack([y[1], -gravity * torch.sin(y[0])]),
        torch.tensor([angle, 0.0], dtype=D), t, params=[gravity], rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    expected = torch.sin(swing[-1, 0])
    (slope,) = torch.autograd.grad(expected, gravity)
    errors, slopes = [], []
    for h in (4e-3, 2e-3):
        solver = pnode.Solver(field, mass=mass, method="cn", step_size=h, consistent_start=True)
        ys = solver(guess, t).ys
        errors.append(abs(float((ys[-1, 0] - expected).detach())))
        (ours,) = torch.autograd.grad(ys[-1, 0], field.gravity)
        slopes.append(abs(float(ours - slope)))
        tension = 9.81 * math.cos(angle)
        assert float(ys[0, 4].detach()) == pytest.approx(tension, rel=1e-12)
        # On the constraint, which Crank-Nicolson keeps to its own order.
        assert float((ys[-1, :2] ** 2).sum().detach()) == pytest.approx(1.0, abs=1e-4)
    assert errors[1] < 1e-5 and 3.6 < errors[0] / errors[1] < 4.4, errors
    assert slopes[1] < 1e-5 and 3.6 < slopes[0] / slopes[1] < 4.4, slopes


def test_inconsistent_start_is_refused():
    field, guess = Pendulum(), torch.tensor([0.8, -0.6, 0.0, 0.0, 1.0], dtype=D)
    solver = pnode.Solver(
        field, mass=torch.tensor([1.0, 1, 1, 1, 0], dtype=D), method="cn", step_size=0.1
    )
    with pytest.raises(pnode.ConfigurationError, match=r"entry 4 .* 4\.89e\+00.*consistent_start"):
        solver(guess, torch.tensor([0.0, 0.1]))


def test_index_above_one_is_refused():
    """Position constraint: the tension is in no algebraic equation."""

    def f(t, state):
        x, y, u, v, s = state
        return torch.stack([u, v, -s * x, -s * y - 9.81, x * x + y * y - 1.0])

    solver = pnode.Solver(
        f, mass=torch.tensor([1.0, 1, 1, 1, 0], dtype=D), method="beuler", step_size=0.1
    )
    with pytest.raises(pnode.ConfigurationError, match="index above 1"):
        solver(torch.tensor([0.8, -0.6, 0, 0, 0], dtype=D), torch.tensor([0.0, 0.1]))


@pytest.mark.parametrize("form", ["mass", "residual"])
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
def test_consistent_start_is_differentiable(form, direction):
    field = Kinetics() if form == "mass" else KineticsResidual()
    form = {"rhs": field, "mass": MIXED} if form == "mass" else {"residual": field}
    solver = pnode.Solver(
        **form, method="beuler", step_size=0.05, consistent_start=True, petsc_options=TIGHT
    )
    y0 = torch.tensor([0.9, 0.3, 0.5], dtype=D, requires_grad=True)
    t = direction * torch.tensor([0.0, 0.1], dtype=D)
    ys = solver(y0, t).ys
    assert float(ys[0].detach().sum()) == pytest.approx(1.0, abs=1e-14)
    result = taylor_test(lambda: solver(y0, t).ys.square().sum(), [y0, field.k], size=1e-3)
    assert result.order > 1.98, result


def test_consistent_start_of_rotated_equations():
    """M = P diag(1, 1, 0) Q: neither the equation nor the unknown is an entry."""
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=D))[0] for _ in range(2))
    field = Kinetics()
    solver = pnode.Solver(
        lambda t, z: p @ field(t, q @ z), mass=p @ MASS @ q, params=[field.k],
        method="cn", step_size=0.05, consistent_start=True, petsc_options=TIGHT,
    )  # fmt: skip
    plain = pnode.Solver(
        field, mass=MASS, method="cn", step_size=0.05, consistent_start=True, petsc_options=TIGHT
    )
    y0 = torch.tensor([0.9, 0.3, 0.5], dtype=D)
    t = torch.tensor([0.0, 0.5], dtype=D)
    rotated, expected = solver(q.T @ y0, t).ys, plain(y0, t).ys
    assert torch.allclose(rotated @ q.T, expected, atol=1e-12)
    (ours,) = torch.autograd.grad((rotated[-1] @ q.T)[0], field.k)
    (theirs,) = torch.autograd.grad(expected[-1, 0], field.k)
    assert torch.allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize(
    ("mass", "message"),
    [
        (torch.ones(4, dtype=D), r"\(4,\).*state of 3"),
        (torch.eye(2, dtype=D), r"\(2, 2\)"),
        (torch.eye(3), None),
        (torch.eye(3, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=D), "zero"),
        (torch.full((3,), math.nan, dtype=D), "finite"),
        (torch.ones(3, dtype=D, requires_grad=True), "requires grad"),
        ("identity", "'identity'"),
    ],
)
def test_unusable_mass(mass, message):
    solver = pnode.Solver(lambda t, y: -y, mass=mass, method="cn", step_size=0.1)
    y0, t = torch.ones(3, dtype=D), torch.tensor([0.0, 1.0])
    if message is None:  # any real precision will do
        assert float(solver(y0, t).ys[-1, 0]) == pytest.approx(math.exp(-1), abs=1e-3)
        return
    with pytest.raises(pnode.ConfigurationError, match=f"(?s)mass.*{message}"):
        solver(y0, t)


def test_second_time_derivatives_of_a_dae_are_refused():
    field, t = Kinetics(), torch.tensor([0.0, 0.1], dtype=D, requires_grad=True)
    solver = pnode.Solver(field, mass=MASS, method="cn", step_size=0.1)
    ys = solver(torch.tensor([1.0, 0.0, 0.0], dtype=D), t).ys
    (first,) = torch.autograd.grad(ys[-1, 0], t, create_graph=True)
    a, b, c = ys[-1].detach()
    rate = -field.k[0] * a + field.k[2] * b * c
    assert float(first[1]) == pytest.approx(float(rate), rel=1e-12)
    with pytest.raises(pnode.BackwardError, match="y' is known as a number only"):
        torch.autograd.grad(first.sum(), t)


@pytest.mark.parametrize("part", ["implicit", "explicit", "residual"])
def test_failures_in_each_function_come_through(part):
    class Stop(Exception):
        pass

    def broken(t, *state):
        if float(t) > 0.25:
            raise Stop
        return -state[0]

    def fine(t, y):
        return -y

    if part == "residual":
        solver = pnode.Solver(
            residual=lambda t, y, yp: yp - broken(t, y), method="beuler", step_size=0.1
        )
    else:
        parts = {"implicit": fine, "explicit": fine} | {part: broken}
        solver = pnode.Solver(**parts, method="ark3", step_size=0.1)
    with pytest.raises(Stop):
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0]))
    good = solver(torch.ones(2, dtype=D), torch.tensor([0.0, 0.1])).ys
    assert bool(torch.isfinite(good).all())


@pytest.mark.parametrize("part", ["implicit", "explicit", "residual"])
def test_undeclared_tensor_in_each_function(part):
    hidden = torch.ones(2, dtype=D, requires_grad=True)

    def field(t, y, *rate):
        return -hidden * y + (rate[0] if rate else 0.0)

    if part == "residual":
        solver = pnode.Solver(residual=field, method="beuler", step_size=0.1)
    else:
        parts = {"implicit": lambda t, y: -y, "explicit": lambda t, y: -y} | {part: field}
        solver = pnode.Solver(**parts, method="ark3", step_size=0.1)
    with pytest.raises(pnode.ConfigurationError, match="not declared"):
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0]))

"""Mass matrices with DIRK, Rosenbrock and IMEX methods, regular and singular, and rates y'."""

from __future__ import annotations

import math

import pytest
import torch
from replica import solve_implicit
from test_gradients import relative_difference, weights_like

import pnode
from pnode.solvers.methods import find_method

D = torch.float64
TIGHT = {"snes_rtol": 1e-14, "snes_stol": 1e-14}
REGULAR = torch.tensor([[2.0, 0.5, 0.0], [0.3, 1.0, 0.2], [0.0, 0.1, 1.5]], dtype=D)
P = torch.tensor([[1.0, 0.5, 0.2], [0.3, 1.0, -0.4], [0.1, 0.2, 1.5]], dtype=D)
Q = torch.tensor([[1.0, 0.2, -0.3], [0.4, 1.0, 0.1], [0.0, 0.3, 0.8]], dtype=D)
SINGULAR = P @ torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=D)) @ Q


def solver(method, **keywords):
    if not find_method(method).linearly_implicit:
        keywords.setdefault("petsc_options", TIGHT)
    return pnode.Solver(method=method, compile=False, **keywords)


def loss(ys):
    return (ys * weights_like(ys)).sum()


class Smooth(torch.nn.Module):
    """A right-hand side in two parts."""

    def __init__(self):
        super().__init__()
        weight = torch.tensor([[-1.0, 0.4, 0.2], [0.1, -2.0, 0.3], [0.5, 0.0, -1.0]], dtype=D)
        self.weight = torch.nn.Parameter(weight)

    def implicit(self, t, y):
        return self.weight @ y - 0.3 * y**3

    def explicit(self, t, y):
        return torch.sin(2.0 * t + self.weight[0] * y)

    def forward(self, t, y):
        return self.implicit(t, y) + self.explicit(t, y)


class Circle(torch.nn.Module):
    """x' = v z, v' = -x z and an equation for z, in mixed unknowns and equations; x^2 + v^2 = 1.

    z = k + cos(3 t) / 3, and x and v turn by its integral.
    """

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(1.0, dtype=D))

    def equation(self, t, z, square):
        return z * (2.0 + square) - (3.0 * self.k + torch.cos(3.0 * t))

    def implicit(self, t, y):
        x, v, z = Q @ y
        r = self.equation(t, z, x * x + v * v)
        return P @ torch.stack([0.3 * r, -2.0 * x * z - r, r])

    def explicit(self, t, y):
        _, v, z = Q @ y
        return P @ torch.stack([v * z, 0.0 * z, 0.0 * z])

    def forward(self, t, y):
        return self.implicit(t, y) + self.explicit(t, y)

    @staticmethod
    def exact(t):
        angle = t + math.sin(3.0 * t) / 9.0
        z = 1.0 + math.cos(3.0 * t) / 3.0
        return torch.linalg.solve(Q, torch.tensor([math.sin(angle), math.cos(angle), z], dtype=D))


def given(field, method, mass):
    """The problem as arguments, in two parts for an IMEX method."""
    if find_method(method).kind == "imex":
        parts = {"implicit": field.implicit, "explicit": field.explicit}
        return {**parts, "mass": mass, "params": field.parameters()}
    return {"rhs": field, "mass": mass}


def times_inverse(problem):
    """The same with M^-1 f as right-hand side."""
    inverse = torch.linalg.inv(REGULAR)

    def part(f):
        return lambda t, y: inverse @ f(t, y)

    named = {name: part(problem[name]) for name in problem if name not in ("mass", "params")}
    return named


def start(*values):
    return torch.tensor(values or (1.0, 0.5, -0.3), dtype=D, requires_grad=True)


@pytest.mark.parametrize(("method", "kind"), [
    ("trbdf2", "sparse"), ("sdirk2", "dense"), ("ros2m", "sparse"),
    ("ra34pw2", "dense"), ("ark3", "sparse"), ("imexssp2", "dense"),
])  # fmt: skip
def test_a_regular_mass_is_the_field_times_its_inverse(method, kind):
    """States, gradients and second derivatives, also by output times; half of them backwards."""
    field, y0 = Smooth(), start()
    direction = 1.0 if kind == "sparse" else -1.0
    t = (direction * torch.tensor([0.0, 0.2, 0.5], dtype=D)).requires_grad_()
    problem = given(field, method, REGULAR.to_sparse() if kind == "sparse" else REGULAR)
    tensors, found = [y0, *field.parameters(), t], []
    for one in (problem, {**times_inverse(problem), "params": field.parameters()}):
        ys = solver(method, **one, step_size=0.1)(y0, t).ys
        first = torch.autograd.grad(loss(ys), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        found.append([ys, *first, *second])
    assert relative_difference(*found) < 1e-10


@pytest.mark.parametrize("method", ["trbdf2", "es325", "esdirk6", "r34prw", "rodaspr", "bpr3"])
def test_order_on_an_index_one_problem(method):
    """By the closed form; steps of the first three end on the constraint."""
    field, row = Circle(), find_method(method)
    n, errors = 6 if row.order > 4 else 12, []
    for number in (n, 2 * n):
        with torch.no_grad():
            y = solver(method, **given(field, method, SINGULAR), step_size=1.0 / number)(
                field.exact(0.0), [0.0, 1.0]
            ).ys[-1]
        errors.append(float((y - field.exact(1.0)).abs().max()))
    assert math.log2(errors[0] / errors[1]) > row.order - 0.25
    x, v, z = Q @ y
    off = float(field.equation(torch.tensor(1.0, dtype=D), z, x * x + v * v).abs())
    assert off < (1e-12 if not row.linearly_implicit else errors[1])


def dirk_step(f, M, scheme, t, h, y):
    """One step written for M K_i = f(Y_i), which a singular M leaves determined.

    The first slope is that of the part of f that M can reach: all of it, at a consistent y.
    """
    slopes, left = [], torch.linalg.svd(M)[0][:, -1]
    for i, row in enumerate(scheme.A):
        right = M @ y + h * sum((a * k for a, k in zip(row, slopes, strict=False)), 0.0 * y)
        s = torch.as_tensor(t + scheme.c[i] * h, dtype=D)
        Y = y
        if row[i]:
            Y = solve_implicit(lambda x, b=right, a=row[i], s=s: M @ x - b - h * a * f(s, x), y)
        slope = f(s, Y)
        slopes.append(slope if row[i] else slope - left * (left @ slope))
    return Y


def rosenbrock_step(f, M, scheme, t, h, y):
    """One step in the variables of the textbook: (M - h gamma J) k_i = ..."""
    s = torch.as_tensor(t, dtype=D)
    J = torch.autograd.functional.jacobian(lambda x: f(s, x), y, create_graph=True)
    by_t = torch.autograd.functional.jacobian(lambda s: f(s, y), s, create_graph=True)
    ks = []
    for row, gamma in zip(scheme.A, scheme.Gamma, strict=True):
        Z = y + sum((a * k for a, k in zip(row, ks, strict=False)), 0.0 * y)
        before = sum((g * k for g, k in zip(gamma, ks, strict=False)), 0.0 * y)
        at = torch.as_tensor(t + sum(row) * h, dtype=D)
        right = h * f(at, Z) + h * J @ before + h * h * sum(gamma) * by_t
        ks.append(torch.linalg.solve(M - h * gamma[len(ks)] * J, right))
    return y + sum(b * k for b, k in zip(scheme.b, ks, strict=True))


@pytest.mark.parametrize("method", ["es325", "rodas3", "ra34pw2"])
def test_a_singular_mass_equals_a_replica(method):
    """States and gradients, with memory for few steps, too, and their tangents."""
    field, y0 = Circle(), Circle.exact(0.0).requires_grad_()
    scheme, step = find_method(method).scheme, dirk_step if method == "es325" else rosenbrock_step
    y = y0
    for n in range(4):
        y = step(field, SINGULAR, scheme, 0.1 * n, 0.1, y)
    expected = torch.autograd.grad(loss(y), [y0, field.k])
    for checkpointing in (None, pnode.Checkpointing(memory="500B")):
        one = solver(
            method, **given(field, method, SINGULAR), step_size=0.1, checkpointing=checkpointing
        )
        end = one(y0, [0.0, 0.4]).ys[-1]
        found = torch.autograd.grad(loss(end), [y0, field.k])
        assert relative_difference([end], [y]) < 1e-11
        assert relative_difference(found, expected) < 1e-9
    direction = torch.linalg.solve(Q, torch.tensor([0.3, -0.2, 0.1], dtype=D))
    _, along = torch.func.jvp(
        lambda u: loss(one(u, [0.0, 0.4]).ys[-1]), (y0.detach(),), (direction,)
    )
    assert float(along) == pytest.approx(float(expected[0] @ direction), rel=1e-9)


@pytest.mark.parametrize("method", ["es325", "rodaspr", "bpr3"])
def test_cost_integrals_and_second_derivatives_of_a_singular_mass(method):
    """Of x + z^2 along the path, whose Hessian by k is that of differences of its gradient."""
    field = Circle()
    one = solver(
        method, **given(field, method, SINGULAR), step_size=0.1, consistent_start=True,
        cost=lambda t, y: (Q @ y)[0] + (Q @ y)[2] ** 2,
    )  # fmt: skip

    def gradient():
        costs = one(field.exact(0.0), [0.0, 0.4]).costs
        return torch.autograd.grad(costs[-1].sum(), field.k, create_graph=True)[0]

    (second,) = torch.autograd.grad(gradient(), field.k)
    sides = []
    for shift in (1e-4, -1e-4):
        with torch.no_grad():
            field.k.add_(shift)
        sides.append(float(gradient()))
        with torch.no_grad():
            field.k.sub_(shift)
    assert float(second) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("method", ["es325", "rodaspr"])
def test_adaptive_steps_on_an_index_one_problem(method):
    field = Circle()
    with torch.no_grad():
        solution = solver(
            method, **given(field, method, SINGULAR), rtol=1e-6, atol=1e-8, petsc_options={}
        )(field.exact(0.0), [0.0, 1.0])
    assert float((solution.ys[-1] - field.exact(1.0)).abs().max()) < 2e-5
    assert solution.stats.rejected < 10 and solution.stats.steps < 120


# ------------------------------------------------------------------------------------- the rate y'


def moved(method, form, field, **keywords):
    """A solve that starts on the circle, moved along it, with the outputs it gives."""
    problem = {"rhs": field, "mass": SINGULAR}
    if form == "residual":
        problem = {"residual": lambda t, y, v: SINGULAR @ v - field(t, y)}
        problem["params"] = field.parameters()
    return solver(method, **problem, step_size=0.1, consistent_start=True, **keywords)


@pytest.mark.parametrize(("method", "form"), [("es325", "mass"), ("bdf2", "residual")])
def test_interpolated_outputs_of_an_index_one_problem(method, form):
    """The gradient is that of the interpolated numbers; these are of the order of the method."""
    field, shift = Circle(), torch.tensor([0.05, -0.1, 0.0], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.33, 0.52, 0.8], dtype=D)
    one = moved(method, form, field, dense=True)
    tensors = [field.k, shift]

    def value():
        return loss(one(field.exact(0.0) + shift, t).ys[1:])

    found = torch.autograd.grad(value(), tensors)
    for gradient, x in zip(found, tensors, strict=True):
        direction = torch.ones_like(x)
        sides = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                x.add_(size * direction)
                sides.append(float(value()))
                x.sub_(size * direction)
        expected = (sides[0] - sides[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)
    if form == "mass":
        with torch.no_grad():
            ys = one(field.exact(0.0), t).ys
        exact = torch.stack([field.exact(float(s)) for s in t])
        assert float((ys - exact).abs().max()) < 5e-4


@pytest.mark.parametrize(("method", "form"), [("rodaspr", "mass"), ("bdf6", "residual")])
def test_events_and_times_of_an_index_one_problem(method, form):
    """z = k + cos(3 t) / 3 reaches 3/4 where cos(3 t) = -3/4, later by 1 / sin(3 t) per k."""
    field = Circle()
    t = torch.tensor([0.0, 2.0], dtype=D, requires_grad=True)
    one = moved(method, form, field, event_fn=lambda t, y: (Q @ y)[2] - 0.75)
    solution = one(field.exact(0.0), t)
    time = math.acos(-0.75) / 3.0
    small = 1e-5 if form == "mass" else 2e-3
    assert float(solution.event_time) == pytest.approx(time, rel=small)
    (by_k,) = torch.autograd.grad(solution.event_time, field.k, retain_graph=True)
    assert float(by_k) == pytest.approx(1.0 / math.sin(3.0 * time), rel=10 * small)

    t = torch.tensor([0.1, 0.6], dtype=D, requires_grad=True)
    ys = moved(method, form, field)(field.exact(0.1), t).ys
    (z_by_t,) = torch.autograd.grad((Q @ ys[-1])[2], t)
    assert float(z_by_t[1]) == pytest.approx(-math.sin(1.8), rel=10 * small)
    assert abs(float(z_by_t[0])) < 100 * small  # z does not depend on where the solve begins


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["sdirk2", "dirk657a", "grk4t", "ros2m", "ark3", "ars443"])
def test_a_singular_mass_wants_a_method_that_ends_at_a_stage(method):
    field = Circle()
    with pytest.raises(pnode.ConfigurationError, match=f"mass is singular.*{method!r}.*choose"):
        solver(method, **given(field, method, SINGULAR), step_size=0.1)(
            field.exact(0.0), [0.0, 0.2]
        )


def test_explicit_stages_of_rosenbrock_methods_take_no_mass():
    with pytest.raises(pnode.ConfigurationError, match=r"'rosw_ark3' does not solve.*mass="):
        pnode.Solver(lambda t, y: -y, mass=torch.ones(1, dtype=D), method="rosw_ark3")


def test_algebraic_equations_belong_into_the_implicit_part():
    def explicit(t, y):
        return P @ torch.stack([y[0], y[1], y[2]])

    field = Circle()
    one = solver(
        "bpr3", implicit=field.implicit, explicit=explicit, mass=SINGULAR, step_size=0.1,
        params=field.parameters(),
    )  # fmt: skip
    with pytest.raises(pnode.ConfigurationError, match="algebraic equations belong into implicit="):
        one(field.exact(0.0), [0.0, 0.2])


def test_a_hidden_time_in_a_constraint_is_refused():
    def f(t, y):
        return torch.stack([-y[0], y[1] - math.sin(float(t))])

    one = solver("trbdf2", rhs=f, mass=torch.tensor([1.0, 0.0], dtype=D), step_size=0.1, dense=True)
    with pytest.raises(pnode.ConfigurationError, match="compute with the tensor t"):
        one(torch.tensor([1.0, 0.0], dtype=D), [0.0, 0.15, 0.3])


def test_a_null_space_that_moves_has_no_interpolated_gradient():
    """Two equations with the rate of y0^2 + y1^2, and the third one with that of y2."""

    def residual(t, y, v):
        rate = y[0] * v[0] + y[1] * v[1]
        return torch.stack([rate + y[2], rate + y[2] + y[0] - y[1] ** 3, v[2] + y[2]])

    y0 = torch.tensor([0.512, 0.8, 0.1], dtype=D, requires_grad=True)
    ys = solver("beuler", residual=residual, step_size=0.05, dense=True)(y0, [0.0, 0.07, 0.1]).ys
    found = torch.autograd.grad(ys.sum(), y0)  # combined equations are algebraic all the same
    assert torch.isfinite(found[0]).all()

    def moving(t, y, v):
        rate = v[0] + v[1]
        return torch.stack([rate + y[2], y[2] * rate + y[2] ** 2 + y[0] - y[1], v[2] + y[2]])

    y0 = torch.tensor([0.5, 0.5, 0.1], dtype=D, requires_grad=True)
    one = solver("beuler", residual=moving, step_size=0.05, dense=True)
    with pytest.raises(pnode.ConfigurationError, match="null space of dF/dy' depends on y"):
        torch.autograd.grad(one(y0, [0.0, 0.07, 0.1]).ys.sum(), y0)

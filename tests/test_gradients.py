"""Gradients: equal to autograd through replicas, Taylor remainders, dot products, counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from replica import recorded_orders, replica
from representatives import representatives

import pnode
from pnode.solvers.methods import METHODS, find_method
from pnode.testing import dot_product_test, taylor_test

# Symplectic methods take pairs of positions and momenta: tests/test_stage_adjoints.py.
NAMES = [method.name for method in METHODS if "rhs" in method.forms]
SOME = [method.name for method in representatives() if "rhs" in method.forms]

TIGHT = {"snes_rtol": 1e-15, "snes_stol": 1e-15}


class Field(torch.nn.Module):
    """A small non-autonomous nonlinear field with an unused parameter."""

    def __init__(self, width=3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape):
            return torch.nn.Parameter(
                torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6
            )

        self.inner, self.outer, self.bias = weight(width, 5), weight(5, width), weight(width)
        self.unused = weight(2)

    def forward(self, t, y):
        return (
            torch.tanh(y @ self.inner) @ self.outer * torch.cos(t) + self.bias - 0.3 * torch.sin(y)
        )


def initial(batch=2, width=3):
    generator = torch.Generator().manual_seed(5)
    y0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return y0.requires_grad_()


def gradients(loss, field, y0):
    tensors = [y0, field.inner, field.outer, field.bias]
    return torch.autograd.grad(loss, tensors)


def relative_difference(a, b):
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


def weights_like(states):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(states.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "direction"),
    [pytest.param(name, 1.0, id=name) for name in NAMES]
    + [pytest.param(name, -1.0, id=f"{name}-backwards") for name in SOME],
)
def test_equals_autograd_through_a_replica(name, direction):
    """States and gradients at fixed steps, with cotangents at every output time."""
    method = find_method(name)
    field, y0 = Field(), initial()
    t = direction * torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    solver = pnode.Solver(
        field, method=name, step_size=0.1, petsc_options=TIGHT if method.implicit else None
    )
    ys = solver(y0, t).ys
    grid = [direction * k / 10 for k in range(11)]
    states = replica(field, name, y0, grid)[[0, 3, 7, 10]]
    tolerance = 1e-9 if method.implicit else 1e-12
    assert relative_difference([ys.detach()], [states.detach()]) < tolerance
    weights = weights_like(states)
    ours = gradients((ys * weights).sum(), field, y0)
    theirs = gradients((states * weights).sum(), field, y0)
    assert relative_difference(ours, theirs) < tolerance


@pytest.mark.parametrize("name", [n for n in SOME if find_method(n).adaptive])
def test_adaptive_gradient_is_that_of_the_accepted_steps(name):
    """Equal to autograd through the replica on the recorded grid, rejections included."""
    method = find_method(name)
    field, y0 = Field(), initial()
    grid = [0.0]
    tolerance = {1: 1e-4, 2: 1e-4, 3: 1e-6, 4: 1e-6}.get(method.order, 1e-9)
    if name == "fehlberg2":  # its error estimate is 1/512 of a difference of two slopes
        tolerance = 1e-7
    solver = pnode.Solver(
        field, method=name, rtol=tolerance, atol=tolerance, first_step=0.8,
        monitor=lambda step, t, y: grid.append(t),
        petsc_options=TIGHT if method.implicit else None,
    )  # fmt: skip
    t = torch.tensor([0.0, 0.9, 2.0], dtype=torch.float64)
    solution = solver(y0, t)
    assert solution.stats.steps == len(grid) - 1
    if not method.implicit:  # implicit methods begin with a cautious step of ours
        assert solution.stats.rejected > 0
    states = replica(field, name, y0, grid, recorded_orders(solution.ys))
    chosen = states[[grid.index(0.9), -1]]
    weights = weights_like(chosen)
    ours = gradients((solution.ys[1:] * weights).sum(), field, y0)
    theirs = gradients((chosen * weights).sum(), field, y0)
    # Step lengths come from differences of recorded times here: a few units of round-off more.
    assert relative_difference(ours, theirs) < (1e-9 if method.implicit else 1e-11)


@pytest.mark.parametrize("name", ["esdirk3", "dirk8616sal"])
def test_equals_differences_of_fourth_order(name):
    """(8 (L(h) - L(-h)) - (L(2h) - L(-2h))) / 12h, error of order h^4 and round-off / h."""
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    solver = pnode.Solver(field, method=name, step_size=0.1, petsc_options=TIGHT)
    tensors = [y0, field.inner, field.outer, field.bias]
    generator = torch.Generator().manual_seed(11)
    direction = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors]

    def loss(size):
        with torch.no_grad():
            for x, d in zip(tensors, direction, strict=True):
                x.add_(d, alpha=size)
            value = solver(y0, t).ys[1:].square().sum()
            for x, d in zip(tensors, direction, strict=True):
                x.add_(d, alpha=-size)
        return float(value)

    h = 2e-3
    expected = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    ours = gradients(solver(y0, t).ys[1:].square().sum(), field, y0)
    slope = sum(float((g * d).sum()) for g, d in zip(ours, direction, strict=True))
    assert slope == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
@pytest.mark.parametrize(
    "name", ["beuler", "cn", "implicit_midpoint", "trbdf2", "dirk657a", "bdf3"]
)
def test_matrix_free_and_dense_agree(name, jacobian):
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"snes_rtol": 1e-14, "snes_stol": 1e-14, "ksp_rtol": 1e-13}
    if jacobian == "dense":
        del options["ksp_rtol"]
    solver = pnode.Solver(
        field, method=name, step_size=0.1, jacobian=jacobian, petsc_options=options
    )
    solution = solver(y0, t)
    loss = solution.ys[-1].square().sum()
    ours = gradients(loss, field, y0)
    states = replica(field, name, y0, [k / 10 for k in range(11)])
    theirs = gradients(states[-1].square().sum(), field, y0)
    assert relative_difference(ours, theirs) < 1e-9
    if jacobian == "dense":
        assert solution.stats.jacobians > 0 and solution.stats.jvp == 0
    else:
        assert solution.stats.jacobians == 0 and solution.stats.jvp > 0
        assert solution.stats.krylov > solution.stats.newton > 0
        assert solution.stats.backward.krylov > 0


@pytest.mark.parametrize("name", SOME)
def test_taylor_remainder(name):
    method = find_method(name)
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    solver = pnode.Solver(
        field, method=name, step_size=0.2,
        petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14} if method.implicit else None,
    )  # fmt: skip
    inputs = [y0, field.inner, field.outer, field.bias]
    result = taylor_test(lambda: solver(y0, t).ys[1:].square().sum(), inputs, size=1e-2)
    assert result.order > 1.95, result


def test_taylor_test_sees_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 2.001 * g * x

    x = torch.linspace(1, 2, 5, dtype=torch.float64).requires_grad_()
    before = x.detach().clone()
    wrong = taylor_test(lambda: Wrong.apply(x), [x], size=1e-4)
    right = taylor_test(lambda: x.square().sum(), [x], size=1e-2)
    assert wrong.order < 1.1
    assert right.order > 1.99
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "constant"])
def test_dot_product(kind):
    field = Field()
    if kind == "tensor":
        assert dot_product_test(field, 0.3, initial()) < 1e-14
    elif kind == "tuple":
        state = (initial(), torch.tensor(0.4, dtype=torch.float64))
        pair = dot_product_test(
            lambda t, y: (field(t, y[0]) * y[1], y[0].sum() * t), 0.3, state,
            params=field.parameters(),
        )  # fmt: skip
        assert pair < 1e-14
    else:
        assert dot_product_test(lambda t, y: torch.ones_like(y), 0.3, initial()) == 0.0


LAW = {"euler": (1, 0), "rk4": (4, 0), "bosh3": (3, 1), "dopri5": (6, 1), "verner8": (13, 0)}


@pytest.mark.parametrize(("name", "steps"), list(itertools.product(LAW, [1, 7, 20])))
def test_evaluation_counts(name, steps):
    """dopri5: 6N + 1 evaluations forward, 6N and 6N products backward; and so on."""
    per_step, extra = LAW[name]
    field, y0 = Field(), initial()
    solver = pnode.Solver(
        field, method=name, step_size=1.0 / steps, checkpointing=pnode.Checkpointing(store="stages")
    )
    solution = solver(y0, torch.tensor([0.0, 1.0]))
    assert solution.stats.steps == steps
    assert solution.stats.rhs == per_step * steps + extra
    assert (solution.stats.vjp, solution.stats.jvp, solution.stats.rejected) == (0, 0, 0)
    solution.ys[-1].sum().backward()
    backward = solution.stats.backward
    # One stage of verner8 is for the error estimate alone.
    per_step -= name == "verner8"
    assert (backward.rhs, backward.vjp) == (per_step * steps, per_step * steps)
    assert (backward.steps, backward.recomputed) == (steps, 0)


def test_evaluation_counts_of_crank_nicolson():
    """One evaluation per Newton iterate and none for the start, which is the last step's end.

    Backward, a step needs the graph at both ends; its end is the next one's start.
    """
    steps, field, y0 = 8, Field(), initial()
    solver = pnode.Solver(field, method="cn", step_size=1.0 / steps)
    solution = solver(y0, torch.tensor([0.0, 1.0]))
    stats = solution.stats
    assert stats.rhs == 1 + steps + stats.newton
    assert stats.jacobians == steps
    solution.ys[-1].sum().backward()
    assert stats.backward.rhs == steps + 1
    assert stats.backward.vjp == 2 * steps
    assert stats.backward.jacobians == steps


def test_steps_without_cotangent_are_not_taken():
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method="rk4", step_size=0.1)(y0, torch.tensor([0.0, 0.5, 1.0]))
    solution.ys[1].sum().backward()
    assert solution.stats.backward.steps == 5


@pytest.mark.parametrize("name", ["dopri5", "cn"])
def test_float32_gradients_match_float64(name):
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 1.0])
    exact = gradients(
        pnode.Solver(field, method=name, step_size=0.1)(y0, t).ys[-1].square().sum(), field, y0
    )
    single = Field().float()
    y0_single = y0.detach().float().requires_grad_()
    ys = pnode.Solver(single, method=name, step_size=0.1)(y0_single, t).ys
    assert ys.dtype is torch.float32
    ours = gradients(ys[-1].square().sum(), single, y0_single)
    assert all(gradient.dtype is torch.float32 for gradient in ours)
    # f rounds to 6e-8; a few dozen evaluations and a conditioning of order one.
    assert relative_difference([g.double() for g in ours], exact) < 1e-5


def test_unused_parameter_has_no_gradient_as_in_autograd():
    field, y0 = Field(), initial()
    pnode.odeint(field, y0, torch.tensor([0.0, 1.0]))[-1].sum().backward()
    assert field.unused.grad is None
    assert field.inner.grad is not None


def test_time_gradients_of_a_linear_problem():
    """y = y0 exp(a (t - t0)): dy/dt_i = a y_i, dy/dt_0 = -a y_i."""
    a = 0.7
    y0 = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64, requires_grad=True)
    ys = pnode.odeint(lambda t, y: a * y, y0, t, rtol=1e-12, atol=1e-12)
    (2.0 * ys[1] + 3.0 * ys[2]).sum().backward()
    slopes = a * ys.detach().flatten()
    expected = torch.stack([-(2 * slopes[1] + 3 * slopes[2]), 2 * slopes[1], 3 * slopes[2]])
    assert torch.allclose(t.grad, expected, rtol=1e-10)


def test_second_backward_repeats_the_forward_sweep():
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method="dopri5", step_size=0.1)(y0, torch.tensor([0.0, 1.0]))
    loss = solution.ys[-1].square().sum()
    tensors = [y0, field.inner, field.outer, field.bias]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert solution.stats.backward.recomputed == 0
    second = torch.autograd.grad(loss, tensors)
    assert solution.stats.backward.recomputed == solution.stats.steps == 10
    # The same steps in the same order from the same state: the same bits.
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""``args`` of one call: who gets it, its gradients, and what is refused."""

import collections
import math
import warnings

import numpy as np
import pytest
import torch
from test_compiled import interpreted

import pnode

__all__ = ["interpreted"]  # a fixture

D = torch.float64
T = torch.linspace(0.0, 1.0, 4, dtype=D)
Context = collections.namedtuple("Context", "rate shift")
EVERY = {
    "rk4": {"method": "rk4", "step_size": 0.2},
    "rk4, limit": {"method": "rk4", "step_size": 0.1, "checkpointing": 1000},
    "es325": {"method": "es325", "rtol": 1e-4},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-4},
    "bdf": {"method": "bdf", "rtol": 1e-4},
    "dense": {"method": "dopri5", "rtol": 1e-4, "dense": True},
}


def start():
    return torch.tensor([0.4, -0.7, 1.1], dtype=D)


def number(value=0.8):
    return torch.tensor(value, dtype=D, requires_grad=True)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_declared_parameters(name):
    y0 = start().requires_grad_()
    rate, shift, weight = number(), start().cos().requires_grad_(), number(0.3)

    def field(t, y, args):
        assert isinstance(args, dict) and isinstance(args["context"], Context)
        context = args["context"]
        own = torch.tanh(context.rate * y) * weight + torch.cos(t) * context.shift
        return own * args["list"][1] + args["list"][0][: len(y)]

    args = {"context": Context(rate, shift), "list": [torch.ones(5, dtype=D), -2.0]}
    loss = pnode.Solver(field, params=[weight], **EVERY[name])(y0, T, args=args).ys.square().sum()
    found = torch.autograd.grad(loss, [y0, rate, shift, weight])

    def plain(t, y):
        return field(t, y, args)

    solver = pnode.Solver(plain, params=[weight, rate, shift], **EVERY[name])
    expected_loss = solver(y0, T).ys.square().sum()
    expected = torch.autograd.grad(expected_loss, [y0, rate, shift, weight])
    assert torch.equal(loss, expected_loss) and all(g.any() for g in found)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_each_call_has_its_own():
    solver = pnode.Solver(lambda t, y, k: -k * y, method="es325", step_size=0.1)
    first, second = number(1.0), number(2.0)
    loss = solver(start(), T, first).ys[-1].sum() + solver(start(), T, args=second).ys[-1].sum()
    loss.backward()
    for k in (first, second):
        expected = -float(start().sum()) * math.exp(-k.item())
        assert float(k.grad) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_second_derivatives_and_forward_mode(method):
    tight = {"petsc_options": {"snes_rtol": 1e-13}} if method == "cn" else {}
    solver = pnode.Solver(
        lambda t, y, a: torch.sin(a[0]["k"] * y) + a[1], method=method, step_size=0.25, **tight
    )

    def loss(y0, k, shift):
        return solver(y0, T[:2], args=({"k": k}, shift)).ys[-1]

    inputs = (start().requires_grad_(), number(), number(0.1))
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_torch_func():
    solver = pnode.Solver(lambda t, y, a: -a["k"] * y * y, method="rk4", step_size=0.1)

    def end(k):
        return solver(start(), T, args={"k": k}).ys[-1].sum()

    k = torch.tensor(0.7, dtype=D)
    leaf = k.clone().requires_grad_()
    (expected,) = torch.autograd.grad(end(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(end)(k), expected, rtol=1e-13, atol=0.0)
    tangent = torch.func.jvp(end, (k,), (torch.ones_like(k),))[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-13, atol=0.0)
    curvature = torch.func.grad(torch.func.grad(end))(k)
    h = 1e-5
    difference = (torch.func.grad(end)(k + h) - torch.func.grad(end)(k - h)) / (2 * h)
    torch.testing.assert_close(curvature, difference, rtol=1e-7, atol=0.0)


def test_all_functions_of_the_problem_get_it():
    k, level = number(0.5), number(0.25)
    args = {"k": k, "level": level}
    solver = pnode.Solver(
        lambda t, y, args: -args["k"] * y, method="dopri5", rtol=1e-10, atol=1e-12,
        cost=lambda t, y, args: args["k"] * y[0], event_fn=lambda t, y, args: y[0] - args["level"],
    )  # fmt: skip
    y0 = torch.ones(1, dtype=D)
    solution = solver(y0, torch.tensor([0.0, 10.0], dtype=D), args=args)
    when = math.log(4.0) / 0.5
    assert float(solution.event_time) == pytest.approx(when, rel=1e-9)
    by_k, by_level = torch.autograd.grad(solution.event_time, [k, level], retain_graph=True)
    assert float(by_k) == pytest.approx(-when / 0.5, rel=1e-8)
    assert float(by_level) == pytest.approx(-1.0 / (0.5 * 0.25), rel=1e-8)

    own = pnode.Solver(
        lambda t, y, args: -args["k"] * y, method="rk4", step_size=0.05,
        cost=lambda t, y, args: args["k"] * y[0],
    )  # fmt: skip
    costs = own(y0, T, args=args).costs  # 1 - exp(-k)
    (by_k,) = torch.autograd.grad(costs[-1], k)
    assert float(costs[-1]) == pytest.approx(1.0 - math.exp(-0.5), rel=1e-6)
    assert float(by_k) == pytest.approx(math.exp(-0.5), rel=1e-6)


def test_split_and_residual_problems():
    k = number(0.5)
    split = pnode.Solver(
        implicit=lambda t, y, k: -k * y, explicit=lambda t, y, k: k * torch.ones_like(y),
        method="ark4", step_size=0.1,
    )  # fmt: skip
    residual = pnode.Solver(
        residual=lambda t, y, yp, k: yp + k * (y - 1.0), method="bdf3", step_size=0.01
    )
    for solver, precision in ((split, 1e-5), (residual, 1e-4)):
        y = solver(torch.zeros(1, dtype=D), T, args=k).ys[-1]
        (gradient,) = torch.autograd.grad(y.sum(), k)
        assert float(y) == pytest.approx(1.0 - math.exp(-0.5), rel=precision)
        assert float(gradient) == pytest.approx(math.exp(-0.5), rel=precision)


class Affine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=D))

    def forward(self, t, y, args):
        return self.weight * y + args

    def method(self, t, y, args):
        return self(t, y, args)


@pytest.mark.parametrize("bound", [False, True])
def test_modules(bound):
    module, shift = Affine(), start().requires_grad_()
    field = module.method if bound else module
    solver = pnode.Solver(
        field, params=list(module.parameters()) if bound else None, method="cn", step_size=0.1
    )
    solver(start(), T, args=shift).ys[-1].sum().backward()
    other = pnode.Solver(
        lambda t, y: module.weight * y + shift, params=[module.weight, shift], method="cn",
        step_size=0.1,
    )  # fmt: skip
    expected = torch.autograd.grad(other(start(), T).ys[-1].sum(), [module.weight, shift])
    assert torch.equal(module.weight.grad, expected[0]) and torch.equal(shift.grad, expected[1])


def test_odeint():
    k = number(0.5)
    ys = pnode.odeint(lambda t, y, args: -args[0] * y * args[1], start(), T, args=(k, 2))
    torch.testing.assert_close(ys[-1], start() * math.exp(-1.0), rtol=1e-6, atol=0.0)
    pnode.odeint_adjoint(lambda t, y, a: -a * y, start(), T, args=k)[-1].sum().backward()
    assert float(k.grad) == pytest.approx(-float(start().sum()) * math.exp(-0.5), rel=1e-5)


@pytest.mark.parametrize("method", ["rk4", "es325"])
def test_compiled_solves_take_new_values(method, interpreted):
    """Tensors and numbers, trainable and not: no value of an earlier call is a constant."""
    solver = pnode.Solver(
        lambda t, y, args: -args["k"] * y * args["n"] + args["c"], method=method, step_size=0.1,
        compile=True,
    )  # fmt: skip
    plain = pnode.Solver(solver.rhs, method=method, step_size=0.1, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value, n in ((0.5, 1.0), (0.9, 1.0), (0.9, 2.0)):
            found = []
            for each in (solver, plain):
                k = number(value)
                args = {"k": k, "n": n, "c": torch.full((3,), 2.0 * value, dtype=D)}
                ys = each(start(), T, args=args).ys
                (gradient,) = torch.autograd.grad(ys.square().sum(), k)
                found.append((ys.detach(), gradient))
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_containers_may_change_after_the_solve():
    k = number(0.5)
    args = {"k": k, "n": [1.0]}
    solver = pnode.Solver(lambda t, y, a: -a["k"] * y * a["n"][0], method="cn", step_size=0.1)
    ys = solver(start(), T, args=args).ys
    args["n"][0] = args["k"] = 7.0
    ys[-1].sum().backward()
    assert float(k.grad) == pytest.approx(-float(start().sum()) * math.exp(-0.5), rel=1e-3)


def test_tensors_may_not():
    factor = torch.ones(3, dtype=D)
    solver = pnode.Solver(lambda t, y, a: -a * y, method="cn", step_size=0.1)
    ys = solver(start().requires_grad_(), T, args=factor).ys
    factor.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


@pytest.mark.parametrize("value", [np.ones(3), object(), {1.0}], ids=["array", "object", "set"])
def test_what_args_may_not_have(value):
    solver = pnode.Solver(lambda t, y, a: -y, method="rk4", step_size=0.1)
    with pytest.raises(pnode.ConfigurationError, match=r"args\['x'\]\[1\] is a .*tensors"):
        solver(start(), T, args={"x": (1.0, value)})


def test_automatic_compilation_leaves_tensors_of_calls_alone():
    """Each new one would be traced, which takes longer than a short solve."""
    solver = pnode.Solver(lambda t, y, k: -k * y, method="es325", step_size=0.1)
    solver(start(), T, args=number())
    assert "args= has tensors" in repr(solver)

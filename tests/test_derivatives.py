"""Derivatives beyond the first gradient: second and third ones, tangents, torch.func."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from replica import replica
from small_net import SmallNet
from test_compiled import interpreted
from torch.autograd import forward_ad, grad, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pnode

__all__ = ["interpreted"]  # a fixture

D = torch.float64
T = torch.tensor([0.0, 0.3, 0.6], dtype=D)
GRID = [0.1 * step for step in range(7)]
#: One of each family, with the accuracy that the solution of its equations allows.
FAMILIES = {
    "rk4": 1e-12, "dopri5": 1e-12, "ssprk43": 1e-12, "beuler": 1e-9, "cn": 1e-9,
    "implicit_midpoint": 1e-9, "es325": 1e-9, "sdirk2": 1e-9, "rodaspr": 1e-10, "ra34pw2": 1e-10,
    "bdf1": 1e-8, "bdf3": 1e-8,
}  # fmt: skip
families = pytest.mark.parametrize(("method", "tolerance"), FAMILIES.items())


@pytest.fixture(autouse=True)
def exact_replicas(monkeypatch):
    monkeypatch.setattr("replica.DERIVATIVES", 3)


class Field(SmallNet):
    """A small network, with time and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=D))

    def forward(self, t, y):
        return self.net(y) * torch.cos(t) - self.rate * y


def state():
    torch.manual_seed(2)
    return torch.randn(3, dtype=D)


def loss_of(ys):
    return (ys**3).sum() + (ys[-1] * ys[0]).sum()


def along(tensors, seed=3):
    torch.manual_seed(seed)
    return [torch.randn_like(tensor) for tensor in tensors]


def hvp(loss, inputs, directions):
    """Return the Hessian of a loss times directions, by two gradients."""
    first = grad(loss(), inputs, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    return grad(product, inputs)


def difference(found, expected):
    """Return the norm of a difference, relative."""
    found, expected = (torch.cat([one.reshape(-1) for one in all_]) for all_ in (found, expected))
    return float((found - expected).detach().norm() / expected.norm())


def central(loss, inputs, directions, epsilon=1e-5):
    """Return the Hessian times directions by a difference of gradients."""

    def at(factor):
        with torch.no_grad():
            for tensor, v in zip(inputs, directions, strict=True):
                tensor.add_(factor * v)
        found = grad(loss(), inputs)
        with torch.no_grad():
            for tensor, v in zip(inputs, directions, strict=True):
                tensor.sub_(factor * v)
        return found

    pairs = zip(at(epsilon), at(-epsilon), strict=True)
    return [(after - before) / (2.0 * epsilon) for after, before in pairs]


# Second and third derivatives by reverse mode.


@families
def test_second_derivatives_are_those_of_a_replica(method, tolerance):
    f, y0 = Field(), state().requires_grad_()
    inputs = [y0, *f.parameters()]
    v = along(inputs)
    solver = pnode.Solver(f, method=method, step_size=0.1)
    found = hvp(lambda: loss_of(solver(y0, T).ys), inputs, v)
    expected = hvp(lambda: loss_of(replica(f, method, y0, GRID)[[0, 3, 6]]), inputs, v)
    assert difference(found, expected) < tolerance
    w = along(inputs, 4)
    other = hvp(lambda: loss_of(solver(y0, T).ys), inputs, w)
    forth = sum(float((a * b).sum()) for a, b in zip(found, w, strict=True))
    back = sum(float((a * b).sum()) for a, b in zip(other, v, strict=True))
    assert math.isclose(forth, back, rel_tol=100.0 * tolerance)


@pytest.mark.parametrize("method", ["rk4", "es325", "rodaspr", "bdf2"])
def test_third_derivatives_are_those_of_a_replica(method):
    f, y0 = Field(), state().requires_grad_()

    def third(loss):
        (first,) = grad(loss(), y0, create_graph=True)
        (second,) = grad((first**2).sum(), y0, create_graph=True)
        return grad((second**2).sum(), [y0, *f.parameters()])

    solver = pnode.Solver(f, method=method, step_size=0.1)
    found = third(lambda: loss_of(solver(y0, T).ys))
    expected = third(lambda: loss_of(replica(f, method, y0, GRID)[[0, 3, 6]]))
    assert difference(found, expected) < (1e-11 if method == "rk4" else 1e-7)


@pytest.mark.parametrize("module", [True, False])
def test_third_derivatives_by_an_output_time_are_those_of_the_flow(module):
    """By the chain rule: g, g' g and g'' g^2 + g'^2 g, of y' = g(y) at the state found."""

    class Cubic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(1.3, dtype=D))

        def forward(self, t, y):
            return 1.0 - self.rate * y**3

    f = Cubic()
    solver = pnode.Solver(
        f if module else lambda t, y: f(t, y), params=list(f.parameters()), method="rk4",
        step_size=0.1,
    )  # fmt: skip
    t = torch.tensor([0.0, 0.3, 0.8], dtype=D, requires_grad=True)
    found = solver(torch.tensor([0.5], dtype=D), t).ys[2].sum()
    y, rate = found.item(), f.rate.item()
    g, slope, bend = 1.0 - rate * y**3, -3.0 * rate * y**2, -6.0 * rate * y
    for expected in (g, slope * g, bend * g**2 + slope**2 * g):
        found = grad(found, t, create_graph=True)[0][2]
        assert found.item() == pytest.approx(expected, rel=1e-12)


FULL = torch.tensor([[3.0, 1.0, 0.0], [0.2, 2.0, -0.5], [0.0, 0.4, 1.5]], dtype=D)
FORMS = {
    "imex": ("ark3", lambda f: {
        "implicit": Part(f, lambda f, t, y: -f.rate * y**3),
        "explicit": Part(f, lambda f, t, y: f.net(y) * torch.cos(t)),
    }),
    "mass": ("cn", lambda f: {"rhs": f, "mass": torch.tensor([1.0, 2.0, 3.0], dtype=D)}),
    "full mass": ("bdf3", lambda f: {"rhs": f, "mass": FULL}),
    "sparse mass": ("beuler", lambda f: {"rhs": f, "mass": FULL.to_sparse()}),
    "residual": ("beuler", lambda f: {
        "residual": Part(f, lambda f, t, y, rate: rate * (1.0 + y**2) - Field.forward(f, t, y))
    }),
    "residual bdf": ("bdf2", lambda f: {
        "residual": Part(f, lambda f, t, y, rate: rate * (1.0 + y**2) - Field.forward(f, t, y))
    }),
}  # fmt: skip


class Part(torch.nn.Module):
    """A function of the parts of a field."""

    def __init__(self, field, function):
        super().__init__()
        self.field, self.function = field, function

    def forward(self, *arguments):
        return self.function(self.field, *arguments)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_every_form(form):
    method, functions = FORMS[form]
    f, y0 = Field(), state().requires_grad_()
    solver = pnode.Solver(**functions(f), method=method, step_size=0.1)
    inputs = [y0, *f.parameters()]

    def loss():
        return loss_of(solver(y0, T).ys)

    v = along(inputs)
    # Differences leave epsilon^2, and round-off and Newton's 1e-11 over epsilon.
    assert difference(hvp(loss, inputs, v), central(loss, inputs, v)) < 1e-6


def test_second_derivatives_of_a_symplectic_method():
    k = torch.tensor(1.3, dtype=D, requires_grad=True)
    q, p = (part.clone().requires_grad_() for part in state().split([1, 2]))
    p = p[:1].detach().clone().requires_grad_()

    def field(t, y):
        return (k * y[1] + y[1] ** 3, -torch.sin(y[0]) + k * y[0] ** 2)

    solver = pnode.Solver(field, params=[k], method="forest_ruth", step_size=0.1)

    def loss(solve):
        ys = solve()
        return loss_of(ys[0]) + (ys[1] ** 2).sum()

    inputs, v = [q, p, k], along([q, p, k])
    found = hvp(lambda: loss(lambda: solver((q, p), T).ys), inputs, v)
    expected = hvp(
        lambda: loss(lambda: [x[[0, 3, 6]] for x in replica(field, "forest_ruth", (q, p), GRID)]),
        inputs, v,
    )  # fmt: skip
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("method", ["dopri5", "es325", "rodaspr", "bdf"])
def test_second_derivatives_of_adaptive_solves(method):
    f, y0 = Field(), state().requires_grad_()
    solver = pnode.Solver(f, method=method, rtol=1e-9, atol=1e-9, max_steps=10_000)
    inputs = [y0, *f.parameters()]

    def loss():
        return loss_of(solver(y0, T).ys)

    v = along(inputs)
    # Steps are constants, and those of the differences are others: of the order of rtol / epsilon.
    assert difference(hvp(loss, inputs, v), central(loss, inputs, v, 1e-4)) < 1e-5


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2"])
def test_budgets_and_disks_do_not_change_second_derivatives(method, tmp_path):
    f, y0 = Field(), state().requires_grad_()
    inputs = [y0, *f.parameters()]
    found, stats = [], []

    def loss(limit):
        solution = pnode.Solver(f, method=method, step_size=0.02, checkpointing=limit)(y0, T)
        stats.append(solution.stats)
        return loss_of(solution.ys)

    def take(limit):
        found.append(hvp(partial(loss, limit), inputs, along(inputs)))

    take(None)
    # Half of what the pair of state and tangent keeps: the limit is for each of the sweeps.
    memory = stats[0].tangents.ram_bytes // 2
    take(pnode.Checkpointing(memory=memory, disk=tmp_path))
    if method != "bdf2":  # whose steps cannot be repeated from the middle
        take(pnode.Checkpointing(memory=memory))
    for each in stats[1:]:
        assert 0 < each.ram_bytes <= memory
        assert 0 < each.tangents.ram_bytes <= memory
    assert stats[1].tangents.disk_bytes > 0
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "es325", "esdirk6", "rodaspr", "radau5"])
def test_second_derivatives_of_dense_output(method):
    f, y0 = Field(), state().requires_grad_()
    solver = pnode.Solver(f, method=method, step_size=0.2, dense=True)
    inputs = [y0, *f.parameters()]

    def loss():
        return loss_of(solver(y0, T).ys)

    v = along(inputs)
    assert difference(hvp(loss, inputs, v), central(loss, inputs, v)) < 1e-7
    t = T.clone().requires_grad_()
    with pytest.raises(pnode.BackwardError, match="interpolated"):
        grad(loss_of(solver(y0, t).ys), t, create_graph=True)


@pytest.mark.parametrize("jacobian", ["dense", "block", "sparse", "matrix-free"])
@pytest.mark.parametrize("method", ["cn", "es325", "rodaspr", "bdf2"])
def test_second_derivatives_with_every_jacobian(method, jacobian):
    torch.manual_seed(5)
    k = torch.randn(3, dtype=D, requires_grad=True)
    y0 = torch.randn(4, 3, dtype=D, requires_grad=True)

    def f(t, y):
        return torch.tanh(y @ torch.diag(k)) - y * y.roll(1, dims=1)

    solver = pnode.Solver(f, params=[k], method=method, step_size=0.1, jacobian=jacobian)
    v = along([y0, k])
    found = hvp(lambda: loss_of(solver(y0, T).ys), [y0, k], v)

    def rows(t, y):
        return f(t, y.view(4, 3)).reshape(-1)

    expected = hvp(
        lambda: loss_of(replica(rows, method, y0.reshape(-1), GRID)[[0, 3, 6]].view(3, 4, 3)),
        [y0, k], v,
    )  # fmt: skip
    assert difference(found, expected) < 1e-8


def test_second_derivatives_by_output_times():
    """Of accurate solves: for coarse ones the derivative by time is that of the exact flow."""
    f, y0, t = Field(), state().requires_grad_(), T.clone().requires_grad_()
    solver = pnode.Solver(f, method="verner8", step_size=0.05)
    inputs = [y0, t, *f.parameters()]

    def loss():
        return loss_of(solver(y0, t).ys)

    v = along(inputs)
    assert difference(hvp(loss, inputs, v), central(loss, inputs, v)) < 1e-8


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_gradgradcheck(method):
    k = torch.tensor([0.4, -0.3], dtype=D, requires_grad=True)
    y0 = torch.tensor([0.5, -0.2], dtype=D, requires_grad=True)
    held = [k]
    solver = pnode.Solver(
        lambda t, y: torch.sin(held[0] * y) - y.flip(0) ** 2, params=[k], method=method,
        step_size=0.25,
    )  # fmt: skip

    def solve(y0, parameter):
        assert parameter is k
        return solver(y0, torch.tensor([0.0, 0.5], dtype=D)).ys

    # Newton's method leaves 1e-11, which the differences of 1e-6 make 1e-5.
    assert gradgradcheck(solve, (y0, k), atol=1e-4)


def test_gradient_penalty_trains_parameters():
    """backward() through a gradient adds up in .grad what torch has through the replica."""
    found = []
    for solve in (
        lambda f, y0: pnode.Solver(f, method="rk4", step_size=0.1)(y0, T).ys,
        lambda f, y0: replica(f, "rk4", y0, GRID)[[0, 3, 6]],
    ):
        f, y0 = Field(), state().requires_grad_()
        total = loss_of(solve(f, y0))
        (slope,) = grad(total, y0, create_graph=True)
        (total + slope.square().sum()).backward()
        found.append([tensor.grad for tensor in (y0, *f.parameters())])
    assert difference(*found) < 1e-12


def test_hooks_act_on_second_derivatives_as_elsewhere():
    found = []
    for solve in (
        lambda f, y0: pnode.Solver(f, method="rk4", step_size=0.1)(y0, T).ys,
        lambda f, y0: replica(f, "rk4", y0, GRID)[[0, 3, 6]],
    ):
        f, y0 = Field(), state().requires_grad_()
        f.rate.register_hook(lambda g: 2.0 * g)
        (slope,) = grad(loss_of(solve(f, y0)), f.rate, create_graph=True)
        found.append(grad(slope.sin(), [y0, f.rate]))
    assert difference(*found) < 1e-12


@pytest.mark.parametrize("method", ["dopri5", "cn"])
def test_second_derivatives_of_compiled_solves(method, interpreted):
    f, y0 = Field(), state().requires_grad_()
    inputs = [y0, *f.parameters()]
    v = along(inputs)
    found = [
        hvp(
            lambda: loss_of(
                pnode.Solver(f, method=method, rtol=1e-5, atol=1e-6, compile=compiled)(y0, T).ys  # noqa: B023
            ),
            inputs, v,
        )
        for compiled in (True, False)
    ]  # fmt: skip
    assert difference(*found) < 1e-8


# Tangents.


@families
def test_tangents_and_adjoints_agree(method, tolerance):
    """<J v, w> = <v, J^T w>, in forward mode of both kinds."""
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method=method, step_size=0.1)

    def solve(y):
        return solver(y, T).ys

    (v,), w = along([y0]), torch.randn(3, 3, dtype=D)
    ys, tangent = jvp(solve, (y0,), (v,))
    assert torch.equal(ys.detach(), solve(y0).detach())
    leaf = y0.clone().requires_grad_()
    (adjoint,) = grad(solve(leaf), leaf, w)
    expected = float((v * adjoint).sum())
    assert math.isclose(float((tangent * w).sum().detach()), expected, rel_tol=tolerance)
    with forward_ad.dual_level():
        dual = solve(forward_ad.make_dual(y0, v))
        other = forward_ad.unpack_dual(dual).tangent
    if method.startswith("bdf"):  # where f is differentiated at all points at once, sums are others
        torch.testing.assert_close(other, tangent, rtol=1e-13, atol=1e-14)
    else:
        assert torch.equal(other, tangent)


def test_tangents_under_no_grad():
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method="es325", step_size=0.1)
    (v,) = along([y0])
    _, expected = jvp(lambda y: solver(y, T).ys, (y0,), (v,))
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(solver(forward_ad.make_dual(y0, v), T).ys).tangent
    assert torch.equal(found, expected.detach())


def parameters_of(solver):
    return {name: tensor.detach().clone() for name, tensor in solver.named_parameters()}


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2", "rodaspr"])
def test_functional_parameters(method):
    """Of torch.func.functional_call: gradient, tangent and Hessian times a vector."""
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method=method, step_size=0.1)
    p = parameters_of(solver)
    v = dict(zip(p, along(p.values()), strict=True))

    def loss(p):
        return loss_of(functional_call(solver, p, (y0, T)).ys)

    own = list(solver.parameters())

    def total():
        return loss_of(solver(y0, T).ys)

    expected = grad(total(), own)
    assert difference(torch.func.grad(loss)(p).values(), expected) < 1e-14
    product = sum(float((g * d).sum()) for g, d in zip(expected, v.values(), strict=True))
    assert math.isclose(float(jvp(loss, (p,), (v,))[1]), product, rel_tol=1e-8)
    with forward_ad.dual_level():
        dual = loss({name: forward_ad.make_dual(p[name], v[name]) for name in p})
        assert math.isclose(float(forward_ad.unpack_dual(dual).tangent), product, rel_tol=1e-8)
    second = hvp(total, own, list(v.values()))
    mixed = jvp(torch.func.grad(loss), (p,), (v,))[1]
    assert difference(mixed.values(), second) < 1e-8
    assert all(map(torch.equal, solver.state_dict().values(), p.values()))


def test_other_parameters_give_other_numbers():
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method="rk4", step_size=0.1)
    p = {name: 1.5 * tensor for name, tensor in parameters_of(solver).items()}
    found = torch.func.grad(lambda p: loss_of(functional_call(solver, p, (y0, T)).ys))(p)
    with torch.no_grad():
        for name, tensor in solver.named_parameters():
            tensor.copy_(p[name])
    expected = grad(loss_of(solver(y0, T).ys), list(solver.parameters()))
    assert difference(found.values(), expected) < 1e-14


@pytest.mark.parametrize("method", ["rk4", "cn", "rodaspr"])
def test_jacobians_and_hessians_of_torch_func(method):
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method=method, step_size=0.1)

    def solve(y):
        return solver(y, T).ys

    J = torch.autograd.functional.jacobian(solve, y0)
    for found in (
        jacrev(solve)(y0), jacfwd(solve)(y0),
        torch.autograd.functional.jacobian(solve, y0, vectorize=True),
        torch.autograd.functional.jacobian(
            solve, y0, vectorize=True, strategy="forward-mode"
        ),
    ):  # fmt: skip
        assert difference([found], [J]) < 1e-10

    def scalar(y):
        return loss_of(solve(y))

    H = torch.autograd.functional.hessian(scalar, y0)
    for found in (
        hessian(scalar)(y0), jacrev(jacrev(scalar))(y0), jacrev(jacfwd(scalar))(y0),
        jacfwd(jacfwd(scalar))(y0), jacfwd(jacrev(scalar))(y0),
    ):  # fmt: skip
        assert difference([found], [H]) < 1e-9
    weights = torch.randn(4, 3, 3, dtype=D)
    _, pull_back = vjp(solve, y0)
    found = vmap(pull_back)(weights)[0]
    assert difference([found], [torch.einsum("bij,ijk->bk", weights, J)]) < 1e-10
    gauss_newton = vjp(solve, y0)[1](jvp(solve, (y0,), (y0,))[1])[0]
    flat = J.reshape(-1, 3)
    assert difference([gauss_newton], [flat.T @ flat @ y0]) < 1e-10


@pytest.mark.parametrize("method", ["rk4", "es325", "bdf2"])
def test_tangents_of_a_batch_are_one_solve(method):
    """jacfwd evaluates f as often for 3 directions as for one, and Jacobians agree."""
    field, evaluations = Field(), 0

    def counted(module, arguments):
        nonlocal evaluations
        evaluations += 1

    field.register_forward_pre_hook(counted)
    solver = pnode.Solver(field, method=method, step_size=0.1)
    tensors = {name: tensor.detach() for name, tensor in solver.named_parameters()}

    def outputs(y):
        return functional_call(solver, tensors, (y, T)).ys

    y0 = state()
    jvp(outputs, (y0,), (torch.ones_like(y0),))
    single, evaluations = evaluations, 0
    found = jacfwd(outputs)(y0)
    # Explicit methods differentiate f at all stages by one evaluation more, which they compare with
    # one of the last stage alone.
    assert evaluations == single + 2 * (method == "rk4")
    assert difference([found], [jacrev(outputs)(y0)]) < FAMILIES.get(method, 1e-8)


def test_tangents_of_a_batch_by_y0_and_parameters_at_once():
    solver = pnode.Solver(Field(), method="rk4", step_size=0.1)
    tensors = {name: tensor.detach() for name, tensor in solver.named_parameters()}

    def outputs(y, tensors):
        return functional_call(solver, tensors, (y, T)).ys

    inputs = (state(), tensors)
    found, expected = (way(outputs, argnums=(0, 1))(*inputs) for way in (jacfwd, jacrev))
    assert difference([found[0]], [expected[0]]) < 1e-13
    for name in tensors:
        assert difference([found[1][name]], [expected[1][name]]) < 1e-13


def test_tangents_of_output_times():
    f, y0 = Field(), state()
    solver = pnode.Solver(f, method="dopri5", step_size=0.1)

    def solve(t):
        return solver(y0, t).ys

    J = torch.autograd.functional.jacobian(solve, T)
    (v,) = along([T])
    assert difference([jvp(solve, (T,), (v,))[1]], [J @ v]) < 1e-13
    dense = pnode.Solver(f, method="dopri5", step_size=0.25, dense=True)
    with pytest.raises(pnode.BackwardError, match="interpolated"):
        jvp(lambda t: dense(y0, t).ys, (T,), (v,))


def test_batches_of_gradients():
    y0 = state().requires_grad_()
    solver = pnode.Solver(Field(), method="es325", step_size=0.1)
    ys = solver(y0, T).ys
    weights = torch.randn(5, 3, 3, dtype=D)
    (found,) = grad(ys, y0, weights, is_grads_batched=True, retain_graph=True)
    expected = [grad(ys, y0, weight, retain_graph=True)[0] for weight in weights]
    assert torch.equal(found, torch.stack(expected))


# What is refused.


def test_transforms_of_closures_are_refused():
    k = torch.tensor(0.3, dtype=D)

    def loss(k):
        def f(t, y):
            return -k * y

        return pnode.Solver(f, params=[k], method="rk4", step_size=0.1)(state(), T).ys.sum()

    with pytest.raises(pnode.ConfigurationError, match="functional_call"):
        torch.func.grad(loss)(k)

    def undeclared(k):
        return pnode.Solver(lambda t, y: -k * y, method="rk4", step_size=0.1)(state(), T).ys.sum()

    for call in (lambda: torch.func.grad(undeclared)(k), lambda: jvp(undeclared, (k,), (k,))):
        with pytest.raises(pnode.ConfigurationError, match="declared"):
            call()


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("method", ["rk4", "cn", "rodaspr", "bdf2"])
def test_fields_that_are_differentiable_once_are_refused(method):
    """torch would take what their products depend on for nothing; gradients need no more."""
    y0, options = state().requires_grad_(), {"method": method, "step_size": 0.1, "compile": False}
    one, other = (
        pnode.Solver(lambda t, y, f=f: f(y) - 0.3 * y, **options) for f in (Sine.apply, torch.sin)
    )
    of_cost = pnode.Solver(lambda t, y: -y, cost=lambda t, y: Sine.apply(y).sum(), **options)
    if method == "rodaspr":
        with pytest.raises(pnode.BackwardError, match="once_differentiable"):
            grad(one(y0, T).ys.sum(), y0)
    else:
        assert torch.equal(*(grad(solve(y0, T).ys.sum(), y0)[0] for solve in (one, other)))
        for loss in (one(y0, T).ys.sum(), of_cost(y0, T).costs.sum()):
            with pytest.raises(pnode.BackwardError, match="once_differentiable"):
                grad(grad(loss, y0, create_graph=True)[0].sum(), y0)
    if method != "bdf2":  # which takes the tangents of matrices
        with pytest.raises(pnode.BackwardError, match="once_differentiable"):
            jvp(lambda y: one(y, T).ys, (state(),), (state(),))


def test_tangents_of_undeclared_tensors_are_refused():
    k, rate = (torch.tensor(x, dtype=D, requires_grad=True) for x in (0.3, 0.2))
    one = torch.ones((), dtype=D)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(k, one)
        hidden = forward_ad.make_dual(rate.detach(), one)
        right = pnode.Solver(
            lambda t, y: -dual * y, params=[dual], method="rk4", step_size=0.1
        )(state(), T).ys  # fmt: skip
        tangent = forward_ad.unpack_dual(right).tangent
        wrong = pnode.Solver(
            lambda t, y: -dual * y * hidden, params=[dual], method="rk4", step_size=0.1
        )  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match="tangent"):
            wrong(state(), T)
    solver = pnode.Solver(lambda t, y: -k * y, params=[k], method="rk4", step_size=0.1)
    expected = torch.autograd.functional.jacobian(lambda y: solver(y, T).ys, state())
    assert expected.shape == (3, 3, 3)
    J = [grad(row, k, retain_graph=True)[0] for row in solver(state(), T).ys.reshape(-1)]
    assert difference([tangent], [torch.stack(J)]) < 1e-13

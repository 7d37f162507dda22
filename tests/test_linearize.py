"""``torch.func.linearize`` of a solve, and vmap of nested forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import pnode
from pnode.errors import FieldChanged

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)
Y0 = torch.tensor([0.4, 1.0], dtype=D)
V = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-0.7, 0.1]], dtype=D)


class Pull(torch.nn.Module):
    """A field with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.7, 0.3], dtype=D))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -self.rate * torch.sin(y * y.flip(0)) * torch.cos(t)


@pytest.mark.parametrize("method", ["rk4", "es325", "rodaspr", "bdf2"])
def test_linearized_solves_are_their_tangents(method):
    """Of y0 and parameters at once, one by one, in a batch, and transposed; one solve for all."""
    # Beside tangents the integrals are part of the state, and Newton's method ends elsewhere.
    tight = {"snes_rtol": 1e-15, "snes_stol": 1e-15} if method == "bdf2" else {}
    solver = pnode.Solver(
        Pull(), method=method, step_size=0.1, cost=lambda t, y: y.square(), compile=False,
        petsc_options=tight,
    )  # fmt: skip

    def outputs(y0, rate):
        solution = functional_call(solver, {"rhs.rate": rate}, (y0.sin(), T))
        return solution.ys.exp(), solution.costs

    rate = torch.tensor([0.9, 0.4], dtype=D)
    values, linear = linearize(outputs, Y0, rate)
    calls = []
    solver.rhs.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, along = jvp(outputs, (Y0, rate), (V[0], V[1]))
    once = len(calls)
    found = linear(V[0], V[1])
    for one, other in zip((*found, *values), (*along, *expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
    if method in ("rk4", "es325"):
        assert len(calls) - once < once  # not solved again
    many = vmap(linear, (0, None))(V, V[1])
    table = vmap(lambda v: vmap(lambda w: linear(v, w)[0])(V))(V)
    assert torch.allclose(table[:, 1], many[0], rtol=1e-12, atol=1e-13)
    for k, row in enumerate(V):
        for one, other in zip(many, linear(row, V[1]), strict=True):
            assert torch.allclose(one[k], other, rtol=1e-12, atol=1e-13)
    v, w = V[0].clone().requires_grad_(), V[1].clone().requires_grad_()
    ys, costs = linear(v, w)
    back = torch.autograd.grad(ys.sum() + costs[-1].sum(), [v, w])
    y0, p = Y0.clone().requires_grad_(), rate.clone().requires_grad_()
    ys, costs = outputs(y0, p)
    gradients = torch.autograd.grad(ys.sum() + costs[-1].sum(), [y0, p])
    for one, other in zip(back, gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["rk4", "rodaspr"])
def test_transforms_of_what_linearize_returned(method):
    """Its derivatives are itself, its transpose and that one's: by torch.func and by autograd."""
    solver = pnode.Solver(Pull(), method=method, step_size=0.1, compile=False)

    def outputs(y0, rate):
        return functional_call(solver, {"rhs.rate": rate}, (y0, T)).ys.sin()

    rate = torch.tensor([0.9, 0.4], dtype=D)
    values, both = linearize(outputs, Y0, rate)
    (J,) = jacfwd(outputs, (0,))(Y0, rate)
    (K,) = jacfwd(outputs, (1,))(Y0, rate)

    def same(one, other):
        return torch.allclose(one, other, rtol=1e-9, atol=1e-12)

    zero = torch.zeros_like(rate)
    for of in (jacrev, jacfwd):
        by_y0, by_rate = of(both, (0, 1))(V[0], V[1])
        assert same(by_y0, J) and same(by_rate, K)
    out, pull_back = vjp(both, V[0], V[1])
    w = torch.cos(values + torch.arange(6, dtype=D).reshape(3, 2))
    found = pull_back(w)
    assert same(found[0], torch.einsum("tij,ti->j", J, w))
    assert same(found[1], torch.einsum("tij,ti->j", K, w))
    assert same(out, J @ V[0] + K @ V[1])
    assert same(jvp(both, (V[0], zero), (V[1], V[2]))[1], J @ V[1] + K @ V[2])
    H = hessian(lambda v: both(v, zero).square().sum())(V[0])
    assert same(H, 2.0 * torch.einsum("tij,tik->jk", J, J))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(V[0], V[1])
        assert same(torch.autograd.forward_ad.unpack_dual(both(dual, zero)).tangent, J @ V[1])
    v = V[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(both(v, zero).square().sum(), v, create_graph=True)
    (again,) = torch.autograd.grad(slope[0], v)
    assert same(again, H[0])
    assert torch.autograd.gradcheck(lambda v: both(v, zero), v, check_forward_ad=True)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn", "rodaspr", "bdf2"])
def test_a_parameter_written_in_place_after_linearize(method, trains):
    """Is refused, forwards and transposed; what was written into y0 and t does not matter."""
    field, y0, t = Pull(), Y0.clone(), T.clone()
    field.rate.requires_grad_(trains)
    solver = pnode.Solver(field, method=method, step_size=0.1, compile=False)
    linear = linearize(lambda y: solver(y, t).ys, y0)[1]
    before, back = linear(V[0]), vjp(linear, V[0])[1]
    y0.zero_(), t.zero_()
    assert torch.equal(linear(V[0]), before)
    with torch.no_grad():
        field.rate.mul_(1.5)
    for call in (lambda: linear(V[0]), lambda: vmap(linear)(V), lambda: back(before)):
        with pytest.raises(FieldChanged, match=r"rate.*linearize anew"):
            call()


def test_linearize_of_structures():
    """A pair of tensors, of which one has a tangent that is computed from the inputs'."""
    solver = pnode.Solver(
        lambda t, y: {"a": -y["b"].sum() * y["a"], "b": y["a"][:1] - y["b"]}, method="bosh3",
        step_size=0.1, compile=False,
    )  # fmt: skip

    def last(a):
        ys = solver({"a": 2.0 * a, "b": a[:1] * 0.5}, T).ys
        return ys["a"][-1] * ys["b"][-1]

    linear = linearize(last, Y0)[1]
    assert torch.allclose(torch.stack([linear(v) for v in V]), V @ jacfwd(last)(Y0).T)


def test_what_linearize_refuses():
    """Typed errors; elsewhere a trace is refused as before, also where forward mode is in it."""
    y = torch.ones(2, dtype=D)
    field = Pull()
    with pytest.raises(pnode.ConfigurationError, match="t has a tangent"):
        linearize(lambda t: pnode.Solver(field, method="rk4", step_size=0.1)(y, t).ys, T)
    stop = pnode.Solver(field, method="rk4", step_size=0.1, event_fn=lambda t, y: y[0] - 9.0)
    with pytest.raises(pnode.ConfigurationError, match="event_fn"):
        linearize(lambda y: stop(y, T).ys, y)
    solver = pnode.Solver(field, method="rk4", step_size=0.1)
    with pytest.raises(pnode.ConfigurationError, match="breakpoints"):
        linearize(lambda y: solver(y, T, breakpoints=[0.55]).ys, y)

    def inside(y):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
            return torch.autograd.forward_ad.unpack_dual(solver(dual, T).ys).tangent

    with pytest.raises(pnode.ConfigurationError, match="traced"):
        torch.fx.experimental.proxy_tensor.make_fx(inside)(y)


@pytest.mark.parametrize("method", ["rk4", "es325"])
def test_batches_of_nested_forward_mode(method):
    """Second derivatives along several directions; two batches in one another are refused."""
    solver = pnode.Solver(Pull(), method=method, step_size=0.1, compile=False)

    def second(d, e):
        def first(y):
            return jvp(lambda y: solver(y, T).ys[-1], (y,), (d,))[1]

        return jvp(first, (Y0,), (e,))[1]

    with torch.no_grad():
        found = vmap(lambda d: second(d, d))(V)
        H = jacfwd(jacfwd(lambda y: solver(y, T).ys[-1]))(Y0)
        assert torch.allclose(found, torch.einsum("kij,ni,nj->nk", H, V, V), rtol=1e-9)
        with pytest.raises(pnode.BackwardError, match="vmap"):
            vmap(lambda d: vmap(lambda e: second(d, e))(V))(V)

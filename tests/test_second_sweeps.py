"""Hessian products take the pair's adjoint and the solve's own in one sweep."""

from __future__ import annotations

import pytest
import torch
from test_tangent_sweeps import Y0, T, solver_of
from torch.autograd import grad

import pnode
from pnode.derivatives import autograd

D = torch.float64
CASES = [
    ("rhs", "rk4"), ("rhs", "es325"), ("rhs", "rodaspr"), ("rhs", "bdf2"), ("imex", "ark3"),
    ("mass", "cn"), ("cost", "radau5"),
]  # fmt: skip


def loss_of(solution) -> torch.Tensor:
    """Return a loss of all outputs, the first one too."""
    loss = solution.ys.sin().pow(3).sum() + (solution.ys[0] * solution.ys[2]).sum()
    return loss if solution.costs is None else loss + solution.costs.square().sum()


def product(solver, y0, solution, retain=False) -> list[torch.Tensor]:
    """Return the Hessian of a loss times a vector, by y0 and parameters."""
    inputs = [y0, *solver.parameters()]
    torch.manual_seed(1)
    v = [torch.randn_like(one) for one in inputs]
    first = grad(loss_of(solution), inputs, create_graph=True)
    along = sum((a * b).sum() for a, b in zip(first, v, strict=True))
    return list(grad(along, inputs, retain_graph=retain))


def same(one, other, tolerance=1e-12) -> bool:
    """Whether tensors are the same but for round-off."""
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_products_are_those_of_separate_sweeps(kind, method, monkeypatch):
    """And no step is repeated: two sweeps forwards, the solve's and the pair's, and two back."""
    solver, y0 = solver_of(kind, method=method), Y0.clone().requires_grad_()
    solution = solver(y0, T)
    found = product(solver, y0, solution)
    stats = solution.stats
    steps = stats.steps
    assert (stats.tangents.steps, stats.backward.steps, stats.backward.recomputed) == (
        steps, 2 * steps, 0,
    )  # fmt: skip
    monkeypatch.setattr(autograd, "may_wait", lambda *_: False)
    solution = solver(y0, T)
    expected = product(solver, y0, solution)
    assert solution.stats.backward.recomputed == steps
    assert same(found, expected, 1e-12 if method in ("rk4", "rodaspr") else 1e-9)


@pytest.mark.parametrize("method", ["dopri5", "es325"])
def test_under_a_budget_and_on_a_disk(method, tmp_path):
    options = {"method": method, "step_size": None, "rtol": 1e-6, "atol": 1e-6}
    found, on_disk = [], pnode.Checkpointing(memory=2000, disk=str(tmp_path))
    for checkpointing in (None, 2000, on_disk):
        solver = solver_of("rhs", **options, checkpointing=checkpointing)
        y0 = Y0.clone().requires_grad_()
        found.append(product(solver, y0, solver(y0, T)))
    assert same(found[1], found[0], 1e-9)
    assert same(found[2], found[0], 1e-9)


def test_two_gradients_of_one_solve_and_what_is_kept():
    """Each leaves a sweep; a pass repeated; a loss that is linear in the outputs."""
    solver, y0 = solver_of("rhs", method="rk4"), Y0.clone().requires_grad_()
    rate = next(solver.parameters())

    def penalty(solution):
        (one,) = grad(solution.ys.square().sum(), y0, create_graph=True)
        (other,) = grad(solution.ys[1].sum(), y0, create_graph=True)
        return one.square().sum() + (one * other).sin().sum() + solution.ys[1].exp().sum()

    value = penalty(solver(y0, T))
    found = [grad(value, [y0, rate], retain_graph=True) for _ in range(2)]
    assert same(*found)
    epsilon, differences = 1e-5, []
    along = torch.linspace(-1.0, 1.0, y0.numel(), dtype=D).view_as(y0)
    start = y0
    for sign in (1.0, -1.0):
        y0 = (start + sign * epsilon * along).detach().requires_grad_()
        differences.append(penalty(solver(y0, T)).item())
    expected = (differences[0] - differences[1]) / (2.0 * epsilon)
    assert abs(float((found[0][0] * along).sum()) / expected - 1.0) < 1e-8


def test_after_the_graph_of_the_loss_is_gone():
    """The solve's own graph may be gone if nothing comes to its outputs."""
    solver, y0 = solver_of("rhs", method="rk4"), Y0.clone().requires_grad_()
    expected = grad(solver(y0, T).ys.sum(), y0, create_graph=True)[0].square().sum()
    expected = grad(expected, y0)
    ys = solver(y0, T).ys
    (slope,) = grad(ys.sum(), y0, create_graph=True)
    grad(ys.square().sum(), y0)
    assert same(grad(slope.square().sum(), y0), expected)
    ys = solver(y0, T).ys
    loss = ys.square().sum()
    (slope,) = grad(loss, y0, create_graph=True)
    grad(ys.sum(), y0)
    with pytest.raises(RuntimeError, match="second time"):
        grad(slope.square().sum(), y0)


def test_a_pass_that_failed_leaves_nothing():
    """What waits is of the pass that has left it."""
    solver, y0 = solver_of("rhs", method="rk4"), Y0.clone().requires_grad_()
    solution = solver(y0, T)
    fails = [True]

    def hook(cotangent):
        if fails[0]:
            raise KeyError("on the way")

    (slope,) = grad(loss_of(solution), y0, create_graph=True)
    expected = grad(slope.square().sum(), y0, retain_graph=True)
    solution.ys.register_hook(hook)
    with pytest.raises(KeyError):
        grad(slope.square().sum(), y0, retain_graph=True)
    fails[0] = False
    (first,) = grad(solution.ys.sum(), y0, retain_graph=True)
    y1 = Y0.clone().requires_grad_()
    assert same([first], grad(solver(y1, T).ys.sum(), y1))
    assert same(grad(slope.square().sum(), y0), expected)


def test_parts_of_a_product():
    """By cotangents alone, and by the outputs; rows of Hessians in a batch."""
    solver, y0 = solver_of("rhs", method="rk4"), Y0.clone().requires_grad_()
    ys = solver(y0, T).ys
    c = torch.ones_like(ys).requires_grad_()
    (slope,) = grad(ys, y0, c, create_graph=True)
    J = torch.autograd.functional.jacobian(lambda y: solver(y, T).ys, Y0)
    v = torch.linspace(0.0, 1.0, 6, dtype=D).view_as(Y0)
    (by_c,) = grad(slope, c, v, retain_graph=True)
    assert same([by_c], [torch.einsum("tijkl,kl->tij", J, v)])
    (by_ys,) = grad((slope * v).sum() + ys.square().sum(), ys, retain_graph=True)
    assert same([by_ys], [2.0 * ys])
    (slope,) = grad(ys.pow(3).sum(), y0, create_graph=True)
    eye = torch.eye(6, dtype=D).view(6, *Y0.shape)
    (rows,) = grad(slope, y0, eye, is_grads_batched=True, retain_graph=True)
    each = torch.stack([grad(slope, y0, one, retain_graph=True)[0] for one in eye])
    assert same([rows], [each])
    H = torch.autograd.functional.hessian(lambda y: solver(y, T).ys.pow(3).sum(), Y0)
    assert same([rows.reshape(6, 6)], [H.reshape(6, 6)])


@pytest.mark.parametrize("method", ["cn", "rodaspr", "bdf2", "radau5"])
def test_singular_masses(method):
    """With a consistent start, against differences of gradients, whose error is of fourth order."""
    mass, t = torch.diag(torch.tensor([1.0, 0.0], dtype=D)), torch.tensor([0.0, 0.5], dtype=D)
    at = [torch.tensor([1.0, 0.7], dtype=D), torch.tensor([0.5, 1.3], dtype=D)]
    v = [torch.tensor([0.3, 0.3], dtype=D), torch.tensor([0.2, -0.4], dtype=D)]
    exact = {"snes_rtol": 1e-14, "snes_atol": 1e-15, "snes_stol": 1e-15}

    def slopes(step, create_graph=False):
        y0, k = ((x + step * d).requires_grad_() for x, d in zip(at, v, strict=True))
        solver = pnode.Solver(
            lambda t, y: torch.stack([-k[0] * y[0] * y[1], k[1] * y[0] - y[1] - y[1] ** 3]),
            mass=mass, params=[k], method=method, step_size=0.1, consistent_start=True,
            compile=False, petsc_options={} if method == "rodaspr" else exact,
        )  # fmt: skip
        return (y0, k), grad(solver(y0, t).ys[-1].pow(3).sum(), (y0, k), create_graph=create_graph)

    near, back, far, behind = (slopes(1e-3 * n)[1] for n in (1, -1, 2, -2))
    expected = [(8 * (a - b) - (c - d)) / 12e-3 for a, b, c, d in zip(near, back, far, behind,
                                                                   strict=True)]  # fmt: skip
    inputs, first = slopes(0.0, True)
    found = grad(sum((g * d).sum() for g, d in zip(first, v, strict=True)), inputs)
    assert same(found, expected, 1e-9)


def normalized(kind: str, y: torch.Tensor) -> torch.Tensor:
    functional, scale = torch.nn.functional, torch.tensor([1.1, 0.7, -0.4], dtype=D)
    if kind == "layer_norm":
        return functional.layer_norm(y, (3,), scale)
    if kind == "layer_norm, torch's own":
        return torch.layer_norm(y, (3,), scale)
    return functional.batch_norm(y[None], -0.3 * scale, scale.square(), bias=scale)[0]


@pytest.mark.parametrize("method", ["rk4", "es325", "rodaspr"])
@pytest.mark.parametrize("kind", ["layer_norm", "batch_norm", "layer_norm, torch's own"])
def test_normalizations(method, kind):
    """torch's third derivatives are wrong: written out, or refused where that is not to be had."""
    weight = torch.linspace(-1.0, 1.3, 9, dtype=D).reshape(3, 3)
    solver = pnode.Solver(
        lambda t, y: normalized(kind, y @ weight) * torch.sin(y),
        method=method, step_size=0.1, compile=False,
    )  # fmt: skip
    t, epsilon, v = torch.tensor([0.0, 0.5], dtype=D), 1e-5, torch.tensor([1.0, -0.5, 0.3], dtype=D)

    def last(y):
        return solver(y, t).ys[-1]

    def slope(y, **keywords):
        y = y.clone().requires_grad_()
        return y, grad(last(y).pow(3).sum(), y, **keywords)[0]

    differences = (last(Y0[0] + epsilon * v) - last(Y0[0] - epsilon * v)) / (2.0 * epsilon)
    assert same([torch.func.jvp(last, (Y0[0],), (v,))[1]], [differences], 1e-8)
    y0 = Y0[0].clone().requires_grad_()
    rows = torch.stack([grad(one, y0, retain_graph=True)[0] for one in last(y0)])
    assert same([rows @ v], [differences], 1e-8)
    y0, first = slope(Y0[0], create_graph=True)
    if "own" in kind:
        with pytest.raises(pnode.PnodeError, match="layer_norm: write"):
            first.sum().backward()
        return
    ahead, back = (slope(Y0[0] + sign * epsilon * v)[1] for sign in (1.0, -1.0))
    (along,) = grad((first * v).sum(), y0)
    assert same([along], [(ahead - back) / (2.0 * epsilon)], 1e-7)
    H = torch.func.hessian(lambda y: last(y).pow(3).sum())(Y0[0])
    assert same([H @ v], [along], 1e-9)
    assert same([H], [H.T], 1e-9)


def test_normalizations_on_one_way_of_f_alone():
    """What f does not do in its first evaluation, it may do in a later one."""
    weight = torch.linspace(-1.0, 1.3, 9, dtype=D).reshape(3, 3)

    def field(t, y):
        inner = y @ weight
        return torch.sin(y) * (normalized("layer_norm", inner) if float(t) > 0.2 else inner)

    solver = pnode.Solver(field, method="rk4", step_size=0.1, compile=False)
    epsilon, v = 1e-5, torch.tensor([1.0, -0.5, 0.3], dtype=D)

    def slope(y, **keywords):
        y = y.clone().requires_grad_()
        return y, grad(solver(y, [0.0, 0.5]).ys[-1].pow(3).sum(), y, **keywords)[0]

    y0, first = slope(Y0[0], create_graph=True)
    (along,) = grad((first * v).sum(), y0)
    ahead, back = (slope(Y0[0] + sign * epsilon * v)[1] for sign in (1.0, -1.0))
    assert same([along], [(ahead - back) / (2.0 * epsilon)], 1e-7)

"""Backward sweeps with several cotangents in one: the numbers of one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tangent_sweeps import CASES, Y0, NotBatched, T, function, solver_of
from torch.func import hessian, jacfwd, jacrev

import pnode
from pnode.derivatives import autograd

D = torch.float64


@pytest.fixture
def one_by_one(monkeypatch):
    """Return a function that switches batches off."""
    return lambda: monkeypatch.setattr(autograd, "takes_batches", lambda runs: False)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_rows_are_those_of_single_sweeps(kind, method, one_by_one):
    solver = solver_of(kind, method=method, step_size=0.25)
    solve, parameters = function(solver)
    together = jacrev(solve, (0, 1))(Y0, parameters)
    one_by_one()
    each = jacrev(solve, (0, 1))(Y0, parameters)
    # A product with a matrix and one with a vector differ by round-off: a mass matrix has one.
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if kind == "mass" else {"rtol": 0.0, "atol": 0.0}
    assert torch.allclose(together[0], each[0], **tolerance)
    for name in parameters:
        assert torch.allclose(together[1][name], each[1][name], **tolerance)


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf"])
def test_adaptive_steps_budgets_and_disks(method, one_by_one, tmp_path):
    options = {"method": method, "step_size": None, "rtol": 1e-5, "atol": 1e-5}
    plain, parameters = function(solver_of("rhs", **options))
    expected = jacrev(plain)(Y0, parameters)
    budget = pnode.Checkpointing(memory=4096, disk=str(tmp_path))
    limited, _ = function(solver_of("rhs", **options, checkpointing=budget))
    assert torch.equal(jacrev(limited)(Y0, parameters), expected)
    one_by_one()
    assert torch.equal(jacrev(plain)(Y0, parameters), expected)


@pytest.mark.parametrize("method", ["rk4", "es325", "bdf2"])
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_one_sweep_counts_once(method, way):
    """Steps, evaluations and matrices are those of one cotangent, back-substitutions of all."""
    counts = []
    for number in (1, 6):
        solver = solver_of("rhs", method=method)
        y0 = Y0.clone().requires_grad_()
        solution = solver(y0, T)
        torch.manual_seed(0)
        seeds = torch.randn(number, *solution.ys.shape, dtype=D)
        inputs = [y0, *solver.parameters()]

        def pull(seed, solution=solution, inputs=inputs):
            return torch.autograd.grad(solution.ys, inputs, seed, retain_graph=True)

        if way == "vmap":
            found = torch.func.vmap(pull)(seeds)
        else:
            found = torch.autograd.grad(
                solution.ys, inputs, seeds, is_grads_batched=True, retain_graph=True
            )
        counts.append(replace(solution.stats.backward))
        each = [pull(seed) for seed in seeds]
        for index, part in enumerate(found):
            assert torch.equal(part, torch.stack([one[index] for one in each]))
    one, six = counts
    assert (one.steps, one.recomputed, one.rhs) == (six.steps, 0, six.rhs)
    assert (six.vjp, six.krylov) == (6 * one.vjp, 6 * one.krylov)
    assert six.jacobians == one.jacobians


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_derivatives_of_batches(method):
    """Hessians by each order of modes, and third derivatives."""
    solver, start = solver_of("rhs", method=method, step_size=0.5), Y0[:1]
    two_steps = torch.tensor([0.0, 1.0], dtype=Y0.dtype)

    def loss(y0):
        return solver(y0, two_steps).ys[-1].sin().sum()

    expected = hessian(loss)(start)
    tolerance = {"rtol": 1e-9, "atol": 1e-10}
    assert torch.allclose(jacrev(jacrev(loss))(start), expected, **tolerance)
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(loss, start, vectorize=vectorize)
        assert torch.allclose(found, expected, **tolerance)
    third = jacrev(jacrev(jacrev(loss)))(start)
    assert torch.allclose(jacfwd(jacrev(jacrev(loss)))(start), third, **tolerance)
    symmetric = third.flatten(0, 1).flatten(1, 2).flatten(2)
    assert torch.allclose(symmetric, symmetric.transpose(0, 2), **tolerance)


def test_gradients_through_a_batch():
    """The sum of squares of a Jacobian, differentiated, against autograd through a replica."""
    net = torch.nn.Linear(3, 3, dtype=D)

    def f(t, y):
        return torch.tanh(net(y))

    def replica(y):
        for _ in range(4):
            k = f(None, y)
            y = y + 0.25 * f(None, y + 0.125 * k)
        return y

    solver = pnode.Solver(f, params=net.parameters(), method="midpoint", step_size=0.25)
    t, row = torch.tensor([0.0, 1.0], dtype=D), Y0[0]
    found = []
    for solve in (lambda y: solver(y, t).ys[-1], replica):
        penalty = jacrev(solve)(row).square().sum()
        found.append(torch.autograd.grad(penalty, list(net.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", ["rk4", "es325", "rodaspr"])
def test_fields_that_torch_cannot_batch(method):
    rate = torch.tensor(0.1, dtype=D, requires_grad=True)
    fields = (lambda t, y: -rate * NotBatched.apply(y), lambda t, y: -rate * y**3)
    found = []
    for f in fields:
        solver = pnode.Solver(f, params=[rate], method=method, step_size=0.25, compile=False)
        y0 = Y0.clone().requires_grad_()
        ys = solver(y0, T).ys
        seeds = torch.eye(ys.numel(), dtype=D).reshape(-1, *ys.shape)
        found.append(torch.autograd.grad(ys, [y0, rate], seeds, is_grads_batched=True))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


def test_other_sweeps_are_taken_one_by_one(one_by_one):
    """Dense output, ghost cells, and Rosenbrock methods in one: the same, whoever takes them."""
    cells = pnode.parallel.Grid(Y0.shape, width=0)
    for options in (
        {"method": "rodaspr"}, {"method": "es325", "dense": True},
        {"method": "rk4", "layout": cells}, {"method": "cn", "layout": cells},
    ):  # fmt: skip
        solver = solver_of("rhs", **options)
        found = jacrev(lambda y0, solver=solver: solver(y0, T).ys)(Y0)
        rows = []
        y0 = Y0.clone().requires_grad_()
        ys = solver(y0, T).ys
        for seed in torch.eye(ys.numel(), dtype=D).reshape(-1, *ys.shape):
            rows.append(torch.autograd.grad(ys, y0, seed, retain_graph=True)[0])
        assert torch.equal(found.reshape(-1, *Y0.shape), torch.stack(rows))


def test_single_precision_and_parameters_used_in_vain():
    unused = torch.nn.Parameter(torch.ones(2))
    net = torch.nn.Linear(3, 3)
    solver = pnode.Solver(
        lambda t, y: torch.tanh(net(y)), params=[*net.parameters(), unused], method="rk4",
        step_size=0.25, compile=False,
    )  # fmt: skip
    y0 = Y0.float().requires_grad_()
    ys = solver(y0, T.float()).ys
    seeds = torch.eye(ys.numel()).reshape(-1, *ys.shape)
    inputs = [y0, *net.parameters()]
    found = torch.autograd.grad(ys, inputs, seeds, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(found):
        assert one.dtype is torch.float32
        single = torch.autograd.grad(ys, inputs, seeds[7], retain_graph=True)[index]
        assert torch.equal(one[7], single)
    (nothing,) = torch.autograd.grad(ys, [unused], seeds, is_grads_batched=True, allow_unused=True)
    assert nothing is None


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2"])
def test_ghost_cells_of_one_process(method):
    grid = pnode.parallel.Grid((4,), boundary="mirror")
    solver = pnode.Solver(
        lambda t, u: u[2:] * u[:-2] - u[1:-1], method=method, step_size=0.25, layout=grid,
        compile=False,
    )  # fmt: skip
    y0 = torch.linspace(0.5, 1.0, 4, dtype=D, requires_grad=True)
    end = solver(y0, T).ys[-1]
    rows = [torch.autograd.grad(end, y0, unit, retain_graph=True)[0] for unit in torch.eye(4)]
    found = torch.autograd.grad(end, y0, torch.eye(4, dtype=D), is_grads_batched=True)[0]
    assert torch.equal(found, torch.stack(rows))
    assert torch.allclose(jacfwd(lambda y: solver(y, T).ys[-1])(y0.detach()), found, rtol=1e-9)

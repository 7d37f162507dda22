"""Whole compiled sweeps of IMEX methods: the eager ones' numbers, of scalars and of graphs."""

from __future__ import annotations

import warnings

import pytest
import torch
from replica import arkimex_step, arkimex_tableau
from representatives import representatives
from test_compiled import interpreted

import pnode
from pnode.solvers.compiled.graph_programs import GraphProgram
from pnode.solvers.compiled.programs import Program
from pnode.solvers.methods import find_method

__all__ = ["interpreted"]  # a fixture

D = torch.float64
METHODS = [m for m in representatives() if m.kind == "imex"]
NAMES = [m.name for m in METHODS]
ADAPTIVE = [*(m.name for m in METHODS if m.adaptive and m.name != "imexbe"), "ark4"]


class Decay(torch.nn.Module):
    """Stiff, and driven; linear, or with a quadratic term."""

    def __init__(self, size, linear):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.logspace(0, 2, size, dtype=D))
        self.share = torch.nn.Parameter(torch.tensor(0.3, dtype=D))
        self.linear = linear

    def forward(self, t, y):
        flow = self.rates[0] * (y.roll(1) - y) - self.rates * y
        driven = self.share * torch.sin(3.0 * t)
        return flow + driven * (1.0 if self.linear else y.roll(1) ** 2)


class Net(torch.nn.Module):
    """The other part, which shares a parameter; one more stays unused."""

    def __init__(self, size, decay):
        super().__init__()
        torch.manual_seed(size)
        self.layer = torch.nn.Linear(size, size).to(D)
        self.share = decay.share
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) * (1.0 + t) + self.share * torch.cos(y)


class Ahead(Decay):
    def forward(self, t, y):
        return super().forward(t, y) + y.roll(-1)


def solve(parts, compile, times=(0.0, 0.3, 1.0), jacobian="dense", **keywords):
    """Return the statistics, the solver, and the solution with the gradients."""
    implicit, explicit = parts
    solver = pnode.Solver(
        implicit=implicit, explicit=explicit, jacobian=jacobian, compile=compile, **keywords
    )
    y0 = torch.linspace(-1.0, 1.5, len(implicit.rates), dtype=D, requires_grad=True)
    times = torch.tensor(times, dtype=D, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    weights = torch.linspace(-1.0, 2.0, solution.ys.numel(), dtype=D).view(solution.ys.shape)
    leaves = [y0, times, *dict.fromkeys((*implicit.parameters(), *explicit.parameters()))]
    found = torch.autograd.grad((solution.ys * weights).sum(), leaves, allow_unused=True)
    return solution.stats, solver, [solution.ys.detach(), *found]


def compare(parts, within, **keywords):
    (eager, _, expected), (stats, solver, found) = (
        solve(parts, compile, **keywords) for compile in (False, True)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm() / b.norm()) < within
    for name in ("steps", "rejected", "ram_bytes"):
        assert getattr(stats, name) == getattr(eager, name), name
    assert stats.backward.steps == eager.backward.steps and eager.steps > 3
    return stats, solver


def both(size, linear):
    decay = Decay(size, linear)
    return decay, Net(size, decay)


def programs(solver):
    traces = solver._engine.compiler._traces.values()
    return [type(code) for trace in traces for code in trace.codes.values()]


@pytest.mark.parametrize("name", NAMES)
def test_fixed_steps_are_the_eager_ones(name):
    """Newton's method of the eager sweep too with a new Jacobian at each iterate."""
    keywords = {"method": name, "step_size": 0.05, "jacobian_reuse": "iteration"}
    compare(both(4, False), 2e-12, **keywords)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_steps_are_the_eager_ones(name):
    """They vary with what Newton's method leaves, 1e-10 of the state."""
    _, solver = compare(both(4, False), 1e-9, method=name, rtol=1e-4, atol=1e-6)
    assert programs(solver).count(Program) == 2


@pytest.mark.parametrize("keywords", [
    {"step_size": 0.05}, {"rtol": 1e-5, "atol": 1e-7},
    {"step_size": 0.01, "times": (1.0, 0.99, 0.96)},
])  # fmt: skip
def test_the_jacobian_of_a_linear_part_is_evaluated_once(keywords):
    """It is proven constant, where the eager sweep looks; the last: backwards in time."""
    stats, _ = compare(both(4, True), 2e-12, method="ark4", jacobian_reuse="iteration", **keywords)
    assert stats.jacobians == stats.backward.jacobians == 1
    if "step_size" in keywords:
        assert stats.factorizations <= 2  # lengths of steps of two intervals


def test_against_autograd_through_a_replica():
    decay, net = both(4, False)
    tableau = arkimex_tableau(find_method("ark3"))
    y0 = y = torch.linspace(-1.0, 1.5, 4, dtype=D, requires_grad=True)
    for k in range(10):
        y = arkimex_step(decay, net, tableau, k / 10, 0.1, y)
    weights = torch.linspace(-1.0, 2.0, 8, dtype=D).view(2, 4)
    leaves = [y0, decay.rates, decay.share, net.layer.weight]
    expected = torch.autograd.grad((torch.stack([y0, y]) * weights).sum(), leaves)
    keywords = {"times": (0.0, 1.0), "method": "ark3", "step_size": 0.1}
    _, _, (ys, own, _, rates, share, _, weight, _) = solve((decay, net), True, **keywords)
    for a, b in zip((ys[-1], own, rates, share, weight), (y, *expected), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-10


@pytest.mark.parametrize("keywords", [
    {"step_size": 0.1}, {"rtol": 1e-4, "atol": 1e-6, "times": (1.0, 0.97, 0.94)}
])  # fmt: skip
def test_parts_that_are_graphs(keywords):
    """Beyond 32 entries, with LAPACK's factors."""
    _, solver = compare(both(34, False), 1e-9, method="ark4", **keywords)
    assert programs(solver).count(GraphProgram) == 2


def test_a_part_of_scalars_and_one_of_graphs():
    decay, rows = Decay(4, True), torch.linspace(0.0, 1.0, 6000, dtype=D)

    def many(t, y):
        return torch.tanh(torch.outer(y, rows)).mean(1) + decay.share * t

    found = []
    for compile in (False, True):
        solver = pnode.Solver(
            implicit=decay, explicit=many, method="ark3", step_size=0.1, compile=compile,
            params=decay.parameters(),
        )  # fmt: skip
        y0 = torch.linspace(0.5, 1.0, 4, dtype=D, requires_grad=True)
        ys = solver(y0, torch.tensor([0.0, 1.0])).ys
        leaves = (y0, *decay.parameters())
        found.append((ys.detach(), *torch.autograd.grad(ys.square().sum(), leaves)))
    assert {*programs(solver)} >= {Program, GraphProgram}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_a_structure_that_was_found(monkeypatch):
    """Beside a Jacobian that proves constant; that entries are missing, later, is noticed."""
    monkeypatch.setattr("pnode.sweeping.engine.DENSE_LIMIT", 8)
    decay = Ahead(34, True)
    net = Net(34, decay)
    options = {"method": "ark4", "step_size": 0.1}
    auto, dense = (
        pnode.Solver(implicit=decay, explicit=net, jacobian=kind, compile=kind == "auto", **options)
        for kind in ("auto", "dense")
    )
    y0 = torch.linspace(-1.0, 1.5, 34, dtype=D, requires_grad=True)
    for rate in (0.0, 1.0):  # of entries on one side of the diagonal
        decay.rates.data[0] = rate
        found = []
        for solver in (auto, dense):
            solution = solver(y0, [0.0, 1.0])
            loss = solution.ys[-1].square().sum()
            found.append((solution.ys.detach(), *torch.autograd.grad(loss, [y0, decay.rates])))
            if rate == 0.0 and solver is auto:
                assert "colors=2, compiled='whole sweeps'" in repr(solver)
                assert solution.stats.jacobians == solution.stats.backward.jacobians == 1
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_structure_that_was_found_where_it_may_change(monkeypatch, interpreted):
    monkeypatch.setattr("pnode.sweeping.engine.DENSE_LIMIT", 8)
    decay, net = both(34, True)
    solver = pnode.Solver(
        implicit=lambda t, y: decay(t, y) + torch.relu(y - 9.0) ** 2, explicit=net, method="ark4",
        step_size=0.5, compile=True, params=decay.parameters(),
    )  # fmt: skip
    with torch.no_grad():
        solver(torch.linspace(-1.0, 1.5, 34, dtype=D), [0.0, 1.0])
    assert "colors=" in repr(solver) and "compiled='the vector field'" in repr(solver)


def test_parameters_may_change_between_the_solves():
    """And in the same solver: what was factored is not kept."""
    decay, net = parts = both(4, True)
    solvers = [
        pnode.Solver(implicit=decay, explicit=net, method="ark3", step_size=0.1, compile=compile)
        for compile in (False, True)
    ]
    for factor in (1.0, 0.1):
        decay.rates.data *= factor
        ys = [solver(torch.ones(4, dtype=D), [0.0, 1.0]).ys for solver in solvers]
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-11, atol=1e-13)
    assert "compiled='whole sweeps'" in repr(solvers[1]) and len(parts) == 2


def test_second_derivatives_and_tangents():
    """They take the recorded steps one by one."""
    decay, net = both(3, False)
    y0, times, found = torch.linspace(-1.0, 1.5, 3, dtype=D), torch.tensor([0.0, 0.5]), []
    for compile in (False, True):
        solver = pnode.Solver(
            implicit=decay, explicit=net, method="ark3", rtol=1e-3, atol=1e-5, compile=compile
        )

        def loss(y0, solver=solver):
            return (solver(y0, times).ys ** 2).sum()

        _, tangent = torch.func.jvp(loss, (y0,), (torch.ones_like(y0),))
        found.append((torch.autograd.functional.hessian(loss, y0), tangent))
    for eager, compiled in zip(*found, strict=True):
        assert float((compiled - eager).norm() / eager.norm()) < 1e-7


def test_what_ends_early_is_told_as_without():
    errors = []
    for compile in (False, True):
        with pytest.raises(pnode.StepLimitReached) as raised:
            solve(both(4, False), compile, method="ark4", rtol=1e-8, max_steps=3)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_imexbe_is_compiled_in_fixed_steps_alone(interpreted):
    """PETSc's controller takes it for a method of another order."""
    decay, net = both(4, False)
    solver = pnode.Solver(implicit=decay, explicit=net, method="imexbe", rtol=1e-2, compile=True)
    solver(torch.ones(4, dtype=D), [0.0, 0.2])
    assert "compiled='the vector field'" in repr(solver)


def test_with_a_mass_matrix_the_parts_alone_are_compiled(interpreted):
    decay, net = both(4, False)
    solver = pnode.Solver(
        implicit=decay, explicit=net, mass=2.0 * torch.eye(4, dtype=D), method="ark3",
        step_size=0.1, compile=True,
    )  # fmt: skip
    solver(torch.ones(4, dtype=D), [0.0, 0.2])
    assert "compiled='the vector field'" in repr(solver)

"""Whole compiled sweeps of implicit methods on fields that are graphs: the eager ones' numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

import pnode
from pnode.derivatives import stage_tangents
from pnode.solvers.compiled import graph_programs, inductor
from pnode.solvers.compiled.graph_programs import GraphProgram

D = torch.float64


class Reaction(torch.nn.Module):
    """Two species in 17 cells, with diffusion and a small network: 34 entries, LAPACK's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layer = torch.nn.Linear(17, 17).to(D)
        self.rates = torch.nn.Parameter(torch.tensor([1.0, 3.0, 8.0], dtype=D))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, t, y, yp=None):
        a, b, d = self.rates
        u, v = y
        fed = a + 0.3 * torch.sin(3.0 * t) + 0.1 * torch.tanh(self.layer(v))
        laplacian = y.roll(1, -1) - 2.0 * y + y.roll(-1, -1)
        slope = torch.stack([fed + u * u * v - (b + 1.0) * u, b * u - u * u * v]) + d * laplacian
        return slope if yp is None else (1.0 + 0.1 * torch.sin(y)) * yp - slope


def solve(field, compile, times=(0.0, 0.3, 1.0), **keywords):
    """Return the statistics, and the solution with the gradients."""
    form = "residual" if keywords.pop("residual", False) else "rhs"
    solver = pnode.Solver(**{form: field}, jacobian="dense", compile=compile, **keywords)
    field.zero_grad()
    y0 = torch.linspace(0.5, 3.0, 34, dtype=D).view(2, 17).requires_grad_()
    times = torch.tensor(times, dtype=D, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    weights = torch.linspace(-1.0, 2.0, solution.ys.numel(), dtype=D).view(solution.ys.shape)
    (solution.ys * weights).sum().backward()
    found = [solution.ys.detach(), y0.grad, times.grad, *(p.grad for p in field.parameters())]
    return solution.stats, found


def compare(keywords, within, counts):
    field = Reaction()
    (eager, expected), (stats, found) = (solve(field, c, **keywords) for c in (False, True))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm() / b.norm()) < within
    assert eager.steps > 3 and stats.backward.steps == eager.backward.steps
    for name in ("steps", "rejected", *counts):
        assert getattr(stats, name) == getattr(eager, name), name


# With a mass matrix, and where a guess was right, the eager sweep evaluates f once more for J.
COUNTS = ("rhs", "jacobians", "newton", "ram_bytes")
MASS = torch.eye(34, dtype=D) + 0.1 * torch.ones(34, 34, dtype=D).tril(-1)


@pytest.mark.parametrize(("keywords", "within", "counts"), [
    ({"method": "cn", "step_size": 0.1}, 1e-10, COUNTS[1:]),
    ({"method": "cn", "step_size": 0.1, "jacobian_reuse": "iteration"}, 1e-10, ("newton",)),
    ({"method": "es325", "rtol": 1e-4, "atol": 1e-6}, 1e-8, ("jacobians", "ram_bytes")),
    ({"method": "bdf", "rtol": 1e-5, "atol": 1e-8}, 1e-10, COUNTS),
    ({"method": "bdf3", "step_size": 0.01, "times": (1.0, 0.97, 0.94)}, 1e-10, COUNTS),
    ({"method": "bdf", "rtol": 1e-5, "atol": 1e-8, "mass": MASS}, 1e-10, COUNTS[1:]),
    ({"method": "es325", "rtol": 1e-4, "atol": 1e-6, "mass": MASS}, 1e-8, ("ram_bytes",)),
    ({"method": "cn", "step_size": 0.1, "mass": MASS}, 1e-10, ("newton", "ram_bytes")),
    ({"method": "rodaspr", "rtol": 1e-4, "atol": 1e-6, "mass": MASS}, 2e-12, COUNTS),
    ({"method": "bdf", "rtol": 1e-5, "atol": 1e-8, "residual": True}, 1e-10, COUNTS[:3]),
    ({"method": "beuler", "step_size": 0.1, "residual": True}, 1e-10, COUNTS[:3]),
    ({"method": "radau5", "rtol": 1e-5, "atol": 1e-8}, 1e-10, COUNTS),
    # With df/dt and error estimates; two matrices a step; an explicit stage.
    ({"method": "rodaspr", "rtol": 1e-4, "atol": 1e-6}, 2e-12, COUNTS),
    ({"method": "lassp3p4s2c", "step_size": 0.1}, 2e-12, COUNTS),
    ({"method": "assp3p3s1c", "step_size": 0.01, "times": (1.0, 0.97, 0.94)}, 2e-12, COUNTS),
])  # fmt: skip
def test_sweeps_are_the_eager_ones(keywords, within, counts):
    """Steps, orders and iterations alike; a DIRK's vary with what Newton's method leaves."""
    compare(keywords, within, counts)


@pytest.mark.parametrize("keywords", [
    {"method": "cn", "step_size": 0.1}, {"method": "bdf", "rtol": 1e-5, "atol": 1e-8, "mass": MASS},
    {"method": "radau5", "rtol": 1e-5, "atol": 1e-8},
    {"method": "implicit_midpoint", "step_size": 0.1, "mass": MASS},
])  # fmt: skip
def test_tangents_are_transposes_of_the_adjoint(keywords, monkeypatch):
    """Of y0 and of the parameters together; beyond a size those of y0 alone."""
    field = Reaction()
    solver = pnode.Solver(field, jacobian="dense", compile=True, **keywords)
    y0 = torch.linspace(0.5, 3.0, 34, dtype=D).view(2, 17)
    parameters = {f"rhs.{name}": p.detach() for name, p in field.named_parameters()}

    def outputs(y0, parameters):
        return torch.func.functional_call(solver, parameters, (y0, [0.0, 0.3, 1.0])).ys

    again = []
    uncompiled = stage_tangents.uncompiled
    monkeypatch.setattr(
        stage_tangents, "uncompiled", lambda *given: again.append(1) or uncompiled(*given)
    )
    along = torch.randn_like(y0), {n: torch.randn_like(p) for n, p in parameters.items()}
    with torch.no_grad():
        ys, Z = torch.func.jvp(outputs, (y0, parameters), along)
        _, from_y0 = torch.func.jvp(lambda y0: outputs(y0, parameters), (y0,), along[:1])
    assert not again
    w = torch.randn_like(ys)
    _, pulled = torch.func.vjp(outputs, y0, parameters)
    by_y0, by_parameters = pulled(w)
    part = float((by_y0 * along[0]).sum())
    total = part + sum(float((by_parameters[n] * v).sum()) for n, v in along[1].items())
    scale = float(w.norm() * Z.norm())
    assert abs(float((w * Z).sum()) - total) < 1e-12 * scale
    assert abs(float((w * from_y0).sum()) - part) < 1e-12 * scale
    monkeypatch.setattr(graph_programs, "_MOST_PRODUCTS", 33)
    with torch.no_grad():
        _, other = torch.func.jvp(outputs, (y0, parameters), along)
        torch.func.jvp(lambda y0: outputs(y0, parameters), (y0,), along[:1])
    assert len(again) == 1
    # The steps that were taken again end Newton's method elsewhere.
    assert float((other - Z).norm() / Z.norm()) < 1e-4


def test_more_operations_than_a_program_of_scalars_takes():
    """A small state's field is a graph then."""
    weights, found = torch.linspace(0.0, 1.0, 6000, dtype=D), []

    def field(t, y):
        return torch.tanh(torch.outer(y, weights)).mean(1) - 5.0 * y

    for compile in (False, True):
        solver = pnode.Solver(field, method="cn", step_size=0.1, compile=compile)
        y0 = torch.linspace(0.5, 1.0, 4, dtype=D, requires_grad=True)
        ys = solver(y0, torch.tensor([0.0, 1.0])).ys
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
        if compile:
            (trace,) = solver._engine.compiler._traces.values()
            assert any(isinstance(code, GraphProgram) for code in trace.codes.values())
        found.append((ys.detach(), torch.autograd.grad(ys.square().sum(), y0)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_step_that_fails_is_told_as_without():
    """1 / h - J = 0; LAPACK says so, and single steps tell it."""
    errors = []
    for compile in (False, True):
        solver = pnode.Solver(
            lambda t, y: y, method="beuler", step_size=1.0, jacobian="dense", compile=compile
        )
        with pytest.raises(pnode.LinearSolveFailed) as raised:
            solver(torch.ones(34, dtype=D), torch.tensor([0.0, 1.0]))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(("method", "size"), [("bdf", 257), ("radau5", 257), ("rodaspr", 257)])
def test_larger_states_say_why_not(method, size, monkeypatch):
    def fail(name, function, examples):
        raise inductor.CompilationFailed("no compiler today")

    monkeypatch.setattr(inductor, "compile_graph", fail)
    solver = pnode.Solver(
        lambda t, y: -y, method=method, step_size=0.5, jacobian="dense", compile=True
    )
    with pytest.warns(UserWarning, match=f"up to {size - 1} state entries"):
        solver(torch.ones(size, dtype=D), torch.tensor([0.0, 1.0]))


class Odd(torch.nn.Module):
    """What a graph of products does not tell of their derivatives, or torch has wrong."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(34, dtype=D)
        self.gain = torch.nn.Parameter(torch.linspace(-0.3, 0.7, 34, dtype=D))

    def forward(self, t, y):
        out = torch.exp(-y.detach()) * torch.tanh(self.gain * y) * torch.tensor(0.7, dtype=D)
        out[..., 3:5] += torch.sin(t * y[..., 3:5])
        return out - y + 0.1 * self.norm(y) * torch.where(y > 1.0, y.square(), 1.0)


def test_second_derivatives_are_those_of_f():
    """A Rosenbrock step differentiates its Jacobian."""
    field, found = Odd(), []
    for compile in (False, True):
        solver = pnode.Solver(field, method="rodas3", step_size=0.1, compile=compile)
        y0 = torch.linspace(-0.9, 1.4, 34, dtype=D, requires_grad=True)
        ys = solver(y0, torch.tensor([0.0, 0.4])).ys
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
        leaves = (y0, *field.parameters())
        found.append([ys.detach(), *torch.autograd.grad(ys[-1].square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-12


def test_parameters_of_another_precision_are_the_field_s_alone():
    """The sums of a sweep are float64."""
    k = torch.nn.Parameter(torch.linspace(0.5, 1.5, 34, dtype=torch.float32))
    found = []
    for compile in (False, True):
        solver = pnode.Solver(
            lambda t, y: -k.double() * y, method="cn", step_size=0.25, compile=compile,
            jacobian="dense", params=[k],
        )  # fmt: skip
        ys = solver(torch.ones(34, dtype=D), [0.0, 1.0]).ys
        found += torch.autograd.grad(ys[-1].sum(), [k])
    torch.testing.assert_close(found[1], found[0])

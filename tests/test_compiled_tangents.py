"""Tangents of whole compiled sweeps: those of the steps taken one by one, and the adjoint's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_compiled_stiff import (
    ADAPTIVE,
    FIXED,
    START,
    THETA,
    TIMES,
    Constrained,
    Kinetics,
    difference,
)
from torch.func import functional_call, jacfwd, jacrev, jvp

import pnode
from pnode.derivatives import stage_tangents
from pnode.errors import FieldChanged
from pnode.solvers.compiled import account
from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.methods import METHODS

# What Newton's method leaves is in the stages, not in the tangents of these.
CONVERGED = {"snes_rtol": 1e-13, "snes_stol": 1e-14}
OWN_CONVERGED = {"snes_stol": 1e-14}
D = torch.float64


@pytest.fixture
def compiled_alone(monkeypatch):
    """Refuse to take the steps of compiled solves again, one by one."""

    def refuse(*_):
        raise AssertionError("the steps of a compiled solve were taken again")

    monkeypatch.setattr(stage_tangents, "uncompiled", refuse)


@pytest.fixture
def traces(monkeypatch):
    """Count how often fields are traced."""
    found, trace = [], Compiler._trace

    def noted(self, *arguments):
        found.append(trace(self, *arguments))
        return found[-1]

    monkeypatch.setattr(Compiler, "_trace", noted)
    return found


def newton(method):
    """Return options with which Newton's method goes on to the end."""
    found = next(one for one in METHODS if one.name == method)
    if found.linearly_implicit:
        return {}
    return {"petsc_options": CONVERGED if found.scheme and not found.coupled else OWN_CONVERGED}


def function(kinetics, compile, times=TIMES, **keywords):
    """Return the outputs as a function of y0 and of all parameters by name."""
    solver = pnode.Solver(kinetics, jacobian="dense", compile=compile, **keywords)
    parameters = {f"rhs.{name}": p.detach() for name, p in kinetics.named_parameters()}

    def outputs(y0, parameters):
        return functional_call(solver, parameters, (y0, times)).ys

    return solver, outputs, parameters


def compare(times=TIMES, tolerance=1e-10, start=START, **keywords):
    """Compare all tangents with those of uncompiled steps, and with the compiled adjoint."""
    kinetics, found = Kinetics(), []
    for compile in (False, True):
        solver, outputs, parameters = function(kinetics, compile, times, **keywords)
        with torch.no_grad():
            found.append(jacfwd(outputs, (0, 1))(start, parameters))
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
    (eager_y0, eager), (by_y0, by_parameters) = found
    assert difference(by_y0, eager_y0) < tolerance
    transposed = jacrev(outputs, (0, 1))(start, parameters)
    assert difference(by_y0, transposed[0]) < 1e-12
    for name, one in by_parameters.items():
        if name == "rhs.unused":
            assert not one.any()
        else:
            assert difference(one, eager[name]) < tolerance
            assert difference(one, transposed[1][name]) < 1e-12


@pytest.mark.parametrize("method", [*THETA, *FIXED])
def test_fixed_steps(method, compiled_alone):
    compare(method=method, step_size=0.1, **newton(method))


@pytest.mark.parametrize("method", [*ADAPTIVE, "bdf", "radau5"])
def test_adaptive_steps(method, compiled_alone):
    compare(method=method, rtol=1e-5, atol=1e-7, **newton(method))


@pytest.mark.parametrize("method", ["cn", "es325", "rodaspr", "bdf3", "radau5"])
def test_decreasing_times(method, compiled_alone):
    start, times = 0.1 * START, -0.1 * TIMES
    compare(times, start=start, method=method, step_size=0.01, **newton(method))


@pytest.mark.parametrize("method", [
    "bdf3", "bdf", "radau5", "gauss6", "beuler", "cn", "implicit_midpoint", "es325", "dirk657a",
    "rodaspr", "sandu3",
])  # fmt: skip
def test_mass_matrices(method, compiled_alone):
    mass = torch.tensor([[2.0, 0.5, 0.0], [0.3, 1.0, 0.0], [0.0, 0.2, 1.5]], dtype=D)
    steps = {"step_size": 0.1} if method != "bdf" else {"rtol": 1e-5, "atol": 1e-7}
    compare(method=method, mass=mass, **steps, **newton(method))


@pytest.mark.parametrize("method", ["cn", "es325", "rodaspr", "bdf3"])
def test_a_singular_mass_matrix(method, compiled_alone):
    """Along starts that keep the algebraic equation; the transpose is the adjoint's, along any."""
    mass = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    keywords = {"method": method, "step_size": 0.05, "mass": mass, **newton(method)}
    start, along = torch.tensor([1.0, 0.0, 0.0], dtype=D), torch.tensor([0.3, 0.5, -0.8], dtype=D)
    found = []
    for compile in (False, True):
        _, outputs, parameters = function(Constrained(), compile, **keywords)
        directions = {name: torch.ones_like(p) for name, p in parameters.items()}
        with torch.no_grad():
            found.append(jvp(outputs, (start, parameters), (along, directions))[1])
    assert difference(found[1], found[0]) < 1e-9
    by_y0, by_parameters = jacrev(outputs, (0, 1))(start, parameters)
    total = by_y0 @ along + by_parameters["rhs.rates"].sum(-1)
    assert difference(found[1], total) < 1e-11


@pytest.mark.parametrize("method", ["es325", "rodaspr", "bdf", "radau5"])
def test_one_tangent_of_both_is_their_sum_and_repeats_nothing(method, compiled_alone):
    """Also after a backward sweep, and through several at once."""
    solver, outputs, parameters = function(Kinetics(), True, method=method, rtol=1e-5, atol=1e-7)
    torch.manual_seed(0)
    along = torch.randn(3, dtype=D), {n: torch.randn_like(p) for n, p in parameters.items()}
    with torch.no_grad():
        by_y0, by_parameters = jacfwd(outputs, (0, 1))(START, parameters)
        ys, one = jvp(outputs, (START, parameters), along)
        assert torch.equal(ys, solver(START, TIMES).ys)
    total = by_y0 @ along[0]
    for name, tangent in along[1].items():
        total = total + (by_parameters[name] * tangent).flatten(2).sum(2)
    assert difference(one, total) < 1e-13
    solution = solver(START.clone().requires_grad_(), TIMES)
    solution.ys.sum().backward()
    known = solution.stats
    assert known.tangents.steps == 0
    _, of_y0 = torch.func.linearize(lambda y0: solver(y0, TIMES).ys, START)
    assert difference(of_y0(along[0]), by_y0 @ along[0]) < 1e-13


def test_counts(compiled_alone):
    """A step takes one factorization and one solve a tangent, an explicit stage none."""
    solver = pnode.Solver(Kinetics(), jacobian="dense", compile=True, method="es325", step_size=0.1)
    stats = []

    def outputs(y0):
        solution = solver(y0, TIMES)
        stats.append(solution.stats)
        return solution.ys

    with torch.no_grad():
        jacfwd(outputs)(START)
    (found,) = stats
    stages = found.tangents.factorizations // found.steps
    assert found.tangents.steps == found.steps == 10
    assert found.tangents.factorizations == stages * found.steps
    assert found.tangents.krylov == 3 * found.tangents.factorizations


def test_lent_parameters_take_the_code_that_there_is(traces, compiled_alone):
    """``functional_call`` with other numbers: neither traced nor solved step by step again."""
    kinetics = Kinetics()
    solver, outputs, parameters = function(kinetics, True, method="bdf", rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        jacfwd(outputs, (0, 1))(START, parameters)
    assert len(traces) == 1
    for factor in (1.1, 0.7):
        other = {name: factor * p for name, p in parameters.items()}
        with torch.no_grad():
            found = jacfwd(outputs, (0, 1))(START, other)
        gradients = jacrev(outputs, (0, 1))(START, other)
        changed = Kinetics()
        with torch.no_grad():
            for name, p in changed.named_parameters():
                p.copy_(other[f"rhs.{name}"])
            expected = function(changed, False, method="bdf", rtol=1e-6, atol=1e-8)[1]
            eager = jacfwd(expected, (0, 1))(START, other)
        # Newton's method aims at the tolerances here.
        assert difference(found[0], eager[0]) < 1e-6
        for name in ("rhs.weight", "rhs.bias"):
            assert difference(found[1][name], eager[1][name]) < 1e-6
            assert difference(found[1][name], gradients[1][name]) < 1e-11
    assert len(traces) == 1
    assert torch.equal(outputs(START, parameters), solver(START, TIMES).ys)


class Switched(Kinetics):
    """Kinetics with a number that is part of its graphs."""

    factor = 1.0

    def forward(self, t, y):
        return super().forward(t, self.factor * y)


def test_lent_parameters_of_a_field_that_has_changed(traces):
    """The code is not what f is now: it is left alone, and so is the trace."""
    kinetics = Switched()
    _, outputs, parameters = function(kinetics, True, method="cn", step_size=0.1)
    with torch.no_grad():
        before = jacfwd(outputs)(START, parameters)
        kinetics.factor = 0.5
        with pytest.warns(UserWarning, match="other tensors from torch.func"):
            found = jacfwd(outputs)(START, parameters)
        eager = jacfwd(function(kinetics, False, method="cn", step_size=0.1)[1])(START, parameters)
    assert difference(found, eager) < 1e-12
    assert difference(found, before) > 1e-3
    assert len(traces) == 1


def test_parameters_of_one_shape_are_told_apart():
    """The names that are lent decide, not the order in which they were traced."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(1.0, dtype=D))
            self.b = torch.nn.Parameter(torch.tensor(0.5, dtype=D))

        def forward(self, t, y):
            return -self.a * y + self.b * y.roll(1) ** 2

    solver = pnode.Solver(Two(), jacobian="dense", compile=True, method="cn", step_size=0.1)
    eager = pnode.Solver(Two(), jacobian="dense", compile=False, method="cn", step_size=0.1)
    for names in (("a",), ("b",), ("a", "b"), ("b", "a"), ("b",)):
        given = {f"rhs.{name}": torch.tensor(0.3 + i, dtype=D) for i, name in enumerate(names)}
        one, other = (
            jacfwd(lambda p, s=s: functional_call(s, p, (START, TIMES)).ys)(given)
            for s in (solver, eager)
        )
        for name in given:
            assert difference(one[name], other[name]) < 1e-8


def test_a_parameter_written_into_after_linearize():
    kinetics = Kinetics()
    solver = pnode.Solver(kinetics, jacobian="dense", compile=True, method="cn", step_size=0.1)
    _, tangent = torch.func.linearize(lambda y0: solver(y0, TIMES).ys, START)
    tangent(START)
    with torch.no_grad():
        kinetics.bias.mul_(1.5)
    with pytest.raises(FieldChanged):
        tangent(START)


def test_sensitivities_of_some_parameters(compiled_alone, traces):
    """Forward ones are traced once, whatever is left out."""
    solver = pnode.Solver(
        Kinetics(), jacobian="dense", compile=True, method="rodaspr", rtol=1e-6, atol=1e-8
    )
    found = [
        pnode.sensitivities(solver, START, TIMES, wrt=["y0", "weight"], mode=mode)
        for mode in ("forward", "forward", "adjoint")
        if mode == "forward" or len(traces) == 1
    ]
    assert torch.equal(found[0]["weight"], found[1]["weight"])
    for name in ("y0", "weight"):
        assert difference(found[0][name], found[2][name]) < 1e-12


@pytest.fixture
def cheap(monkeypatch):
    """Compilations that are paid for by a few solves; f is looked at after one."""
    monkeypatch.setattr(account, "_PRICE", 1500)
    monkeypatch.setattr(account, "_LOOK", 10)


class Counting(Kinetics):
    """Kinetics that count their evaluations."""

    calls = 0

    def forward(self, t, y):
        self.calls += 1
        return super().forward(t, y)


@pytest.mark.parametrize("kind", [Kinetics, Counting])
def test_auto_counts_solves_with_lent_parameters(kind, cheap, traces):
    """They pay for machine code, unless f would do something else besides."""
    solver, outputs, parameters = function(kind(), "auto", method="cn", step_size=0.1)
    with torch.no_grad():
        found = [jacfwd(outputs)(START, parameters) for _ in range(6)]
    compiled = kind is Kinetics
    assert ("compiled='whole sweeps'" in repr(solver)) == compiled
    assert len(traces) == compiled
    assert ("changes" in repr(solver)) != compiled
    # Newton's method ends at 1e-8 of the first residual.
    assert max(difference(one, found[0]) for one in found) < 1e-7


def test_auto_compiles_others_after_lent_parameters_that_do_not_fit(cheap):
    kinetics = Switched()
    solver, outputs, parameters = function(kinetics, "auto", method="cn", step_size=0.1)
    y0 = START.clone().requires_grad_()
    for _ in range(8):
        solver(y0, TIMES)
    assert "compiled='whole sweeps'" in repr(solver)
    kinetics.factor = 0.5
    lent = jacfwd(outputs)(START, parameters)
    expected = jacfwd(function(kinetics, False, method="cn", step_size=0.1)[1])(START, parameters)
    assert difference(lent, expected) < 1e-12
    kinetics.factor = 1.0
    again = solver(y0, TIMES)
    assert type(again.stage_sweep.solved()[1].sweep).__name__ == "WholeSweep"


@pytest.mark.parametrize("method", ["cn", "rodaspr", "bdf3"])
def test_parameters_lent_without_a_transform_use_the_code_that_there_is(method, traces):
    """As networks that other networks make; nothing keeps the tensors afterwards."""
    kinetics = Kinetics()
    keywords = {"method": method, "step_size": 0.1, "jacobian": "dense"}
    compiled, eager = (pnode.Solver(kinetics, compile=c, **keywords) for c in (True, False))
    compiled(START, TIMES).ys.sum().backward()
    alive = []
    for factor in (1.1, 0.9, 1.3):
        lent = {
            name: (factor * p.detach()).requires_grad_() for name, p in eager.named_parameters()
        }
        found = []
        for solver in (compiled, eager):
            ys = functional_call(solver, lent, (START, TIMES)).ys
            slopes = torch.autograd.grad(ys.sum(), list(lent.values()), allow_unused=True)
            found.append((ys, *(slope for slope in slopes if slope is not None)))
        for one, other in zip(*found, strict=True):
            assert difference(one, other) < 1e-9
        alive += [weakref.ref(tensor) for tensor in lent.values()]
        del lent, ys, slopes, found, one, other
    gc.collect()
    assert len(traces) == 1 and not any(one() is not None for one in alive)

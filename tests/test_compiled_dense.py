"""Outputs inside the steps of whole compiled sweeps: those of the steps taken one by one."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_compiled_stiff import START, Constrained, Kinetics, difference
from test_forms import Reaction, Transport
from torch.func import jvp

import pnode
from pnode.errors import FieldChanged
from pnode.path_parts import PathPart
from pnode.solvers.compiled.partial_steps import CompiledParts
from pnode.sweeping.partial_steps import PartialSteps

D = torch.float64
# In one step, at the end of one, and elsewhere.
TIMES = torch.tensor([0.0, 0.011, 0.012, 0.2, 0.47, 0.5, 1.0], dtype=D)
CONVERGED = {"petsc_options": {"snes_rtol": 1e-13, "snes_stol": 1e-14}}
OWN_CONVERGED = {"petsc_options": {"snes_stol": 1e-14}}


def solve(compile, field=Kinetics, y0=START, times=TIMES, **keywords):
    """Return the solver's run, and outputs with gradients by y0, times and parameters."""
    own = field()
    solver = pnode.Solver(own, jacobian="dense", dense=True, compile=compile, **keywords)
    y0, times = y0.clone().requires_grad_(), times.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    weights = torch.linspace(-1.0, 2.0, solution.ys.numel(), dtype=D).view(solution.ys.shape)
    parameters = [p for name, p in own.named_parameters() if name != "unused"]
    loss, tensors = (solution.ys * weights).sum(), [y0, times, *parameters]
    found = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors, retain_graph=True)
    if (
        compile or keywords["method"] != "dopri5"
    ):  # a repeated step of which may differ by round-off
        assert all(map(torch.equal, found, again))
    return solution, [solution.ys.detach(), *found]


def compare(within, **keywords):
    (eager, expected), (compiled, found) = (solve(c, **keywords) for c in (False, True))
    assert eager.stats.steps == compiled.stats.steps > 3
    assert eager.stats.rejected == compiled.stats.rejected
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < within
    # A solution that is called takes the steps again, one by one.
    at = torch.tensor([0.013, 0.2, 0.4567], dtype=D) * keywords.get("times", TIMES)[-1]
    assert difference(compiled(at), eager(at)) < within


@pytest.mark.parametrize("keywords", [
    {"method": "cn", "step_size": 0.1, **CONVERGED},
    {"method": "es325", "rtol": 1e-5, "atol": 1e-7, **CONVERGED},
    {"method": "rodaspr", "rtol": 1e-5, "atol": 1e-7},
    {"method": "bdf", "rtol": 1e-5, "atol": 1e-7, **OWN_CONVERGED},
    {"method": "bdf3", "step_size": 0.02, **OWN_CONVERGED},
    {"method": "radau5", "rtol": 1e-5, "atol": 1e-7, **OWN_CONVERGED},
    {"method": "gauss6", "step_size": 0.1, **OWN_CONVERGED},
    {"method": "rodaspr", "step_size": 0.1, "event_fn": lambda t, y: t - 0.73},
    {"method": "sdirk2", "step_size": 0.1, "cost": lambda t, y: y.square().sum(), **CONVERGED},
    {"method": "rodaspr", "step_size": 0.01, "times": -0.1 * TIMES, "y0": 0.1 * START},
])  # fmt: skip
def test_outputs_inside_steps(keywords):
    compare(1e-9, **keywords)


class Predators(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([1.5, 1.0, 1.0, 3.0], dtype=D))

    def forward(self, t, y):
        a, b, c, d = self.rates
        return torch.stack([a * y[0] - b * y[0] * y[1], c * y[0] * y[1] - (d + t) * y[1]])


@pytest.mark.parametrize("keywords", [
    {"method": "heun2", "step_size": 0.05},
    {"method": "heun2", "step_size": 0.05, "times": -TIMES, "checkpointing": {"memory": 100}},
    {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7, "times": 3.0 * TIMES**4},
    {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7, "event_fn": [
        pnode.Event(lambda t, y: y[0] - 1.2, terminal=False),
        pnode.Event(lambda t, y: t + 0.01 * y[1] - 0.73),
    ]},
    {"method": "bosh5", "step_size": 0.25},
])  # fmt: skip
def test_outputs_inside_explicit_steps(keywords):
    """Sums of slopes with their cotangents in the driver, which knows the last one as the first."""
    y0 = torch.tensor([1.0, 1.5], dtype=D)
    if "checkpointing" in keywords:
        keywords = {**keywords, "checkpointing": pnode.Checkpointing(**keywords["checkpointing"])}
    # Adaptive steps are chosen by differences, of which less than all digits are left.
    within = 1e-9 if "rtol" in keywords else 1e-13
    compare(within, field=Predators, y0=y0, **keywords)


def test_a_call_is_the_solve_once_more(monkeypatch):
    """In machine code, with its steps; where it takes other ones they are taken again."""
    options = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7, "dense": True}
    y0, at = torch.tensor([1.0, 1.5], dtype=D, requires_grad=True), 3.0 * TIMES[[3, 0, 5, 6, 3]]
    at[0] += 0.01
    own, scale = Predators(), [1.0]

    def field(t, y):
        return scale[0] * own(t, y)

    found, params = [], [*own.parameters()]
    for compile in (False, True):
        solution = pnode.Solver(field, params=params, compile=compile, **options)(
            y0, TIMES[[0, 6]] * 3.0
        )
        if compile:
            monkeypatch.setattr(PathPart, "again", None)
        ys = solution(at)
        found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, *params])])
        with torch.no_grad():
            assert torch.equal(solution(at), ys)
            assert torch.equal(solution(at[0]), ys[0])
    assert all(difference(a, b) < 1e-9 for a, b in zip(*found, strict=True))
    monkeypatch.undo()
    moving, slopes, rejected = (TIMES[[0, 6]] * 3.0).requires_grad_(), [], []
    for compile in (False, True):  # y(t) at the first time, which is not t[0]
        other = pnode.Solver(field, params=params, compile=compile, first_step=3.0, **options)(
            y0, moving
        )
        slopes += torch.autograd.grad(other(at).sum(), moving)
        rejected.append(other.stats.rejected)
    assert difference(*slopes) < 1e-9
    assert rejected[0] == rejected[1] > 0
    scale[0] = 1.5
    with pytest.raises(FieldChanged):
        solution(at)


def test_a_slope_at_the_end_that_is_not_finite():
    """An output inside of the last step is refused, compiled or not, and no other."""

    def field(t, y):
        return torch.where(t < 1.0, -y, torch.nan * y)

    times, y0 = torch.tensor([0.0, 0.6, 0.9, 1.0], dtype=D), torch.ones(2, dtype=D)
    for compile in (False, True):
        solver = pnode.Solver(field, method="euler", step_size=0.25, dense=True, compile=compile)
        with pytest.raises(pnode.NonFiniteVectorField, match="an output lies in"):
            solver(y0, times)
        assert not solver(y0, times[[0, 1, 3]]).ys.isnan().any()


def test_partial_steps_are_machine_code(monkeypatch):
    """Of both parts of a field; where it fails at a step Python takes them, and their adjoints."""
    implicit, explicit, found = Reaction(), Transport(), []
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    tensors = [y0, TIMES.clone().requires_grad_(), implicit.rates, explicit.speed]

    def solve(compile):
        solver = pnode.Solver(
            implicit=implicit, explicit=explicit, method="arkimex3", step_size=0.1, dense=True,
            jacobian="dense", compile=compile, **CONVERGED,
        )  # fmt: skip
        ys = solver(y0, tensors[1]).ys
        loss = (ys * torch.linspace(-1.0, 2.0, ys.numel(), dtype=D).view(ys.shape)).sum()
        found.append([ys.detach(), *torch.autograd.grad(loss, tensors)])
        assert ("compiled='whole sweeps'" in repr(solver)) == compile

    solve(False)
    with monkeypatch.context() as patch:
        patch.setattr(PartialSteps, "taken", None)
        solve(True)
    whole, failed = CompiledParts.take, []

    def take(self, step, *given, **more):
        if step.index:
            return whole(self, step, *given, **more)
        return failed.append(step.index)

    monkeypatch.setattr(CompiledParts, "take", take)
    solve(True)
    assert set(failed) == {0}
    for expected, *others in zip(*found, strict=True):
        assert all(difference(a, expected) < 1e-9 for a in others)


@pytest.mark.parametrize("method", ["es325", "bdf", "rodaspr"])
def test_a_singular_mass_matrix(method):
    """Whose slopes between the steps are those that solve the algebraic equations' derivative."""
    mass = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    options = {"es325": CONVERGED, "bdf": OWN_CONVERGED, "rodaspr": {}}[method]
    compare(
        1e-8, field=Constrained, y0=torch.tensor([1.0, 0.0, 0.0], dtype=D), mass=mass,
        method=method, rtol=1e-5, atol=1e-8, **options,
    )  # fmt: skip


@pytest.mark.parametrize("keywords", [
    {"method": "es325", "step_size": 0.02}, {"method": "rodaspr", "rtol": 1e-6, "atol": 1e-8},
])  # fmt: skip
def test_within_a_budget_the_bits_are_the_same(keywords):
    (_, expected), (solution, found) = (
        solve(True, checkpointing=pnode.Checkpointing(memory, reproducible=True), **keywords)
        for memory in (None, 24 * 9)
    )
    assert solution.stats.backward.recomputed > 50
    assert all(map(torch.equal, found, expected))


def test_tangents_and_no_gradients():
    along, found = torch.tensor([0.3, -1.0, 2.0], dtype=D), []
    for compile in (False, True):
        solver = pnode.Solver(
            Kinetics(), method="rodaspr", rtol=1e-5, atol=1e-7, jacobian="dense", dense=True,
            compile=compile,
        )  # fmt: skip
        with torch.no_grad():
            ys, Z = jvp(lambda y0, s=solver: s(y0, TIMES).ys, (START,), (along,))
            assert torch.equal(solver(START, TIMES).ys, ys)
        found.append(torch.stack([ys, Z]))
    assert difference(found[1], found[0]) < 1e-10

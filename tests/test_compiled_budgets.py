"""Whole compiled sweeps within a budget: the numbers of those without one."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_compiled_stiff import START, TIMES, Kinetics
from torch.autograd import forward_ad
from torch.func import jvp

import pnode
from pnode.derivatives import stage_tangents
from pnode.solvers.compiled import driver
from pnode.solvers.methods import find_method

D = torch.float64
STATE = 24  # bytes


def solve(limits, compile=True, backward=1, parts=None, **keywords):
    """Return the statistics, and solution and gradients; of all backward sweeps the same ones."""
    field = Kinetics()
    own = {"rhs": field} if parts is None else parts(field)
    if find_method(keywords["method"]).implicit:
        own["jacobian"] = "dense"
    solver = pnode.Solver(
        compile=compile, checkpointing=pnode.Checkpointing(**limits), **own, **keywords
    )
    y0, times = START.clone().requires_grad_(), TIMES.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    weights = torch.linspace(-1.0, 2.0, solution.ys.numel(), dtype=D).view(solution.ys.shape)
    loss, tensors = (solution.ys * weights).sum(), [y0, times, field.weight, field.bias]
    found = [torch.autograd.grad(loss, tensors, retain_graph=True) for _ in range(backward)]
    assert all(map(torch.equal, sum(found, ()), found[0] * backward))
    return solution.stats, [solution.ys.detach(), *found[0]]


FIXED, ADAPTIVE = {"step_size": 0.02}, {"rtol": 1e-6, "atol": 1e-8}


@pytest.mark.parametrize("keywords", [
    {"method": "cn", **FIXED}, {"method": "implicit_midpoint", **FIXED},
    {"method": "es325", **FIXED}, {"method": "es325", **ADAPTIVE},
    {"method": "sdirk2", "rtol": 1e-4, "atol": 1e-6}, {"method": "rodas3", **FIXED},
    {"method": "rodaspr", **ADAPTIVE}, {"method": "gauss4", **FIXED},
    {"method": "radau5", **ADAPTIVE}, {"method": "heun2", **FIXED},
    {"method": "bosh3", **FIXED}, {"method": "bosh3", **ADAPTIVE},
])  # fmt: skip
def test_gradients_are_those_without_a_limit(keywords):
    """In every bit if steps begin afresh; as many steps are repeated as without machine code."""
    _, expected = solve({"reproducible": True, "store": "stages"}, **keywords)
    for units in (7, 13, 40):
        limits = {"memory": STATE * units, "reproducible": True}
        stats, found = solve(limits, backward=2, **keywords)
        assert all(map(torch.equal, found, expected)), units
        assert 0 < stats.ram_bytes <= limits["memory"]
        eager, gradients = solve(limits, compile=False, **keywords)
        repeated = eager.backward.recomputed
        assert (stats.steps, stats.rejected) == (eager.steps, eager.rejected)
        assert stats.backward.recomputed == 2 * repeated + stats.steps
        for a, b in zip(found, gradients, strict=True):
            # What Newton's method leaves.
            assert float((a - b).norm() / b.norm()) < 1e-9, units


@pytest.mark.parametrize("method", ["beuler", "es325", "dirk657a", "radau3", "bosh3"])
def test_what_a_plan_says_is_repeated(method):
    """Also if only starts of steps are kept, or only stages."""
    for store in ("auto", "solutions", "stages"):
        limits = {"memory": STATE * 60, "store": store}
        planned = pnode.plan(method, 50, STATE, limits["memory"], store=store)
        (stats, found), (_, expected) = (
            solve(chosen, method=method, **FIXED) for chosen in (limits, {})
        )
        assert stats.backward.recomputed == planned.recomputed
        assert stats.ram_bytes <= limits["memory"]
        for a, b in zip(found, expected, strict=True):
            # A DIRK's first slope is evaluated where a step is repeated from.
            assert float((a - b).norm() / b.norm()) < 1e-13


def test_both_parts_of_an_imex_method():
    def parts(field):
        return {
            "implicit": lambda t, y: -field.rate * (y - y.roll(1) ** 2),
            "explicit": lambda t, y: torch.tanh(y @ field.weight + field.bias) * (1.0 + t),
            "params": (field.weight, field.bias),
        }

    keywords = {"method": "ark3", "parts": parts, **FIXED}
    stats, found = solve({"memory": STATE * 9}, backward=2, **keywords)
    assert stats.backward.recomputed > 50
    assert all(map(torch.equal, found, solve({}, **keywords)[1]))


@pytest.mark.parametrize("size", [3, 34])
@pytest.mark.parametrize("method", ["cn", "es325"])
def test_a_constant_jacobian_serves_steps_and_adjoints(method, size):
    """Of few entries, which are scalars, and of more, which are a graph."""
    torch.manual_seed(1)
    matrix = torch.nn.Parameter(torch.randn(size, size, dtype=D) - 8.0 * torch.eye(size, dtype=D))
    found = []
    for limits in ({"reproducible": True}, {"memory": 8 * size * 9, "reproducible": True}):
        solver = pnode.Solver(
            lambda t, y: y @ matrix + torch.sin(t), params=[matrix], method=method, step_size=0.05,
            compile=True, checkpointing=pnode.Checkpointing(**limits),
        )  # fmt: skip
        y0 = torch.linspace(0.5, 1.0, size, dtype=D, requires_grad=True)
        solution = solver(y0, TIMES)
        assert "compiled='whole sweeps'" in repr(solver)
        found.append(torch.autograd.grad(solution.ys.square().sum(), [y0, matrix]))
    assert solution.stats.backward.recomputed > 10
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("keywords", [
    {"method": "cn", **FIXED}, {"method": "rodaspr", **ADAPTIVE}, {"method": "bdf", **ADAPTIVE},
    {"method": "heun2", **FIXED},
])  # fmt: skip
def test_tangents_are_those_without_a_limit(keywords, monkeypatch):
    """The steps are taken once more beside them; the adjoint is there afterwards."""
    monkeypatch.setattr(stage_tangents, "uncompiled", None)
    found, along = [], torch.tensor([0.3, -1.0, 2.0], dtype=D)
    own = {"jacobian": "dense"} if find_method(keywords["method"]).implicit else {}
    memory = 10**6 if keywords["method"] == "bdf" else STATE * 9
    for limits in ({"store": "stages"}, {"memory": memory}):
        solver = pnode.Solver(
            Kinetics(), compile=True, **keywords, **own,
            checkpointing=pnode.Checkpointing(**limits),
        )  # fmt: skip
        with torch.no_grad():
            found.append(jvp(lambda y0, s=solver: s(y0, TIMES).ys, (START,), (along,)))
        assert "compiled='whole sweeps'" in repr(solver)
    assert all(map(torch.equal, *found))
    y0 = START.clone().requires_grad_()
    with forward_ad.dual_level():
        ys = forward_ad.unpack_dual(solver(forward_ad.make_dual(y0, along), TIMES).ys)
    assert torch.equal(ys.tangent, found[0][1])
    seeds = torch.ones_like(ys.primal)
    (gradient,) = torch.autograd.grad(ys.primal, y0, seeds)
    torch.testing.assert_close((seeds * found[0][1]).sum(), gradient @ along, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("dtype", "rows"), [(D, 16), (torch.float32, 1)])
def test_explicit_steps_of_large_and_small_states(dtype, rows, monkeypatch):
    """Checkpoints take the bytes that they do without machine code; Ctrl-C loses nothing.

    Stages of 16 rows begin where torch's own would, those of one are copied there.
    """
    calls, found, goes_on = [], [], driver.CompiledSweep._goes_on

    def interrupted(self, status):
        calls.append(status)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return goes_on(self, status)

    weight = torch.linspace(-0.5, 0.5, 9, dtype=dtype).view(3, 3).requires_grad_()
    y0 = torch.linspace(-1.0, 1.0, 3 * rows, dtype=dtype).view(rows, 3).requires_grad_()
    for compile in (True, False):
        solver = pnode.Solver(
            lambda t, y: torch.tanh(y @ weight), params=[weight], method="heun2", step_size=0.02,
            compile=compile, checkpointing=pnode.Checkpointing(memory=STATE * rows * 9),
        )  # fmt: skip
        solution = solver(y0, TIMES)
        loss = solution.ys.square().sum()
        if compile:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(driver, "PATIENCE", 0.0)  # a call is a step
                patched.setattr(driver.CompiledSweep, "_goes_on", interrupted)
                torch.autograd.grad(loss, [y0, weight], retain_graph=True)
        gradients = torch.autograd.grad(loss, [y0, weight], retain_graph=True)
        assert all(map(torch.equal, gradients, torch.autograd.grad(loss, [y0, weight])))
        repeated = solution.stats.backward.recomputed
        found.append(([loss.detach(), *gradients], solution.stats.ram_bytes, repeated))
    assert len(calls) == 40
    assert found[0][1] == found[1][1] <= STATE * rows * 9
    # What was interrupted counts nothing, but all steps are repeated after it.
    assert found[0][2] == found[1][2] + solution.stats.steps
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if dtype is D else 1e-5, atol=0.0)


def test_bdf_keeps_every_step_or_says_how_much_that_takes():
    keywords = {"method": "bdf", **ADAPTIVE}
    stats, expected = solve({}, **keywords)
    within, found = solve({"memory": stats.ram_bytes}, **keywords)
    assert within.ram_bytes == stats.ram_bytes
    assert all(map(torch.equal, found, expected))
    with pytest.raises(pnode.CheckpointError, match="raise it to"):
        solve({"memory": stats.ram_bytes - 1}, **keywords)


@pytest.mark.parametrize(("limits", "message"), [
    ({"memory": STATE}, "memory=24 is too little"),
    ({"store": "tape"}, "store='tape' keeps the graphs"),
    ({"store": "solutions"}, "needs memory="),
])  # fmt: skip
def test_what_no_schedule_does_is_told_as_ever(limits, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        solve(limits, method="es325", **FIXED)

"""Whole compiled sweeps that events and monitors look at: as without ``compile``."""

from __future__ import annotations

import logging
import signal
import warnings

import pytest
import torch
from test_compiled_stiff import START, Constrained, Kinetics, difference

import pnode
from pnode.sweeping import sweeps

D = torch.float64
TIMES = torch.tensor([0.0, 0.011, 0.2, 0.5, 1.0], dtype=D)
CONVERGED = {"petsc_options": {"snes_rtol": 1e-13, "snes_stol": 1e-14}}
OWN_CONVERGED = {"petsc_options": {"snes_stol": 1e-14}}


class Heights(torch.nn.Module):
    """Events that cut a step, two at a time in one direction alone, and one that may end it."""

    def __init__(self, end, levels):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(levels, dtype=D))
        last = [pnode.Event(lambda t, y: y[0] - self.level[1] * (1.0 + 1e-3 * t))] if end else []
        self.events = [
            pnode.Event(lambda t, y: torch.stack([y[0], y[2]]) - self.level[::2], terminal=False),
            pnode.Event(lambda t, y: y[1] - 1.0, direction=1, terminal=False), *last,
        ]  # fmt: skip


def solve(
    compile, end, field=Kinetics, y0=START, times=TIMES, levels=(1.01, 1.03, -0.35), **keywords
):
    """Return the solution, what the monitor saw, and outputs and events with their gradients."""
    own, heights, seen = field(), Heights(end, levels), []
    solver = pnode.Solver(
        own, jacobian="dense", compile=compile, event_fn=heights.events,
        monitor=lambda step, t, y: seen.append(torch.cat([torch.tensor([step, t]), y])),
        **keywords,
    )  # fmt: skip
    y0 = y0.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    parts = [solution.ys, *(part for e in solution.events for part in (e.times, e.states))]
    values = torch.cat([part.reshape(-1) for part in parts])
    parameters = [p for name, p in own.named_parameters() if name != "unused"]
    tensors = [y0, heights.level, *parameters]
    loss = values @ torch.linspace(-1.0, 2.0, len(values), dtype=D)
    found, again = (torch.autograd.grad(loss, tensors, retain_graph=True) for _ in range(2))
    assert not compile or all(map(torch.equal, found, again))
    assert sum(len(e.times) for e in solution.events) > 1
    return solution, torch.stack(seen), [values.detach(), *found]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("keywords", [
    {"method": "cn", "step_size": 0.1, **CONVERGED},
    {"method": "es325", "rtol": 1e-5, "atol": 1e-7, "dense": True, **CONVERGED},
    {"method": "rodaspr", "rtol": 1e-5, "atol": 1e-7},
    {"method": "bdf", "rtol": 1e-5, "atol": 1e-7, **OWN_CONVERGED},
    {"method": "bdf3", "step_size": 0.02, "dense": True, **OWN_CONVERGED},
    {"method": "radau5", "rtol": 1e-5, "atol": 1e-7, **OWN_CONVERGED},
    {
        "method": "rodaspr", "step_size": 0.01, "times": -0.1 * TIMES, "y0": 0.1 * START,
        "levels": (0.095, 0.085, -0.05),
    },
])  # fmt: skip
def test_events_and_monitors(keywords, end):
    """Steps, times of events, and all derivatives are those of steps taken one by one."""
    (eager, shown, expected), (compiled, told, found) = (
        solve(c, end, **keywords) for c in (False, True)
    )
    assert eager.stats.steps == compiled.stats.steps > 3
    assert eager.stats.rejected == compiled.stats.rejected
    assert eager.reason == compiled.reason
    assert difference(told, shown) < 1e-9
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-8


@pytest.mark.parametrize("keywords", [
    {"method": "es325", "step_size": 0.02}, {"method": "rodaspr", "rtol": 1e-6, "atol": 1e-8},
])  # fmt: skip
def test_within_a_budget_the_bits_are_the_same(keywords):
    (_, _, expected), (solution, _, found) = (
        solve(True, True, checkpointing=pnode.Checkpointing(memory, reproducible=True), **keywords)
        for memory in (None, 24 * 9)
    )
    assert solution.stats.backward.recomputed > 10
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("method", ["es325", "bdf"])
def test_a_singular_mass_matrix(method):
    mass = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    options = {"es325": CONVERGED, "bdf": OWN_CONVERGED}[method]
    (eager, _, expected), (compiled, _, found) = (
        solve(
            c, True, field=Constrained, y0=torch.tensor([1.0, 0.0, 0.0], dtype=D), mass=mass,
            method=method, rtol=1e-5, atol=1e-8, levels=(0.99, 0.983, 0.005), **options,
        )
        for c in (False, True)
    )  # fmt: skip
    assert eager.stats.steps == compiled.stats.steps
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-7


@pytest.mark.parametrize("method", ["cn", "bdf3"])
def test_a_jacobian_said_to_be_constant(method):
    """Whole sweeps where its graph shows it; else the promise is tested as ever."""
    matrix = torch.nn.Parameter(
        torch.tensor([[-9.0, 1.0, 0.0], [0.5, -2.0, 1.0], [0.0, 3.0, -4.0]], dtype=D)
    )
    wanted = {"method": method, "step_size": 0.02, "jacobian_reuse": "constant"}
    found = []
    for compile in (False, True):
        solver = pnode.Solver(
            lambda t, y: matrix @ y + torch.sin(t), params=[matrix], compile=compile, **wanted
        )
        ys = solver(START, TIMES).ys
        found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), matrix)])
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
    for a, b in zip(*found, strict=True):
        assert difference(a, b) < 1e-9
    if method == "bdf3":  # which may converge without a look at it
        return
    with pytest.raises(pnode.ConfigurationError, match="promises"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pnode.Solver(Kinetics(10.0), compile=True, **wanted)(START, TIMES)


@pytest.mark.parametrize("where", ["monitor", "event_fn"])
def test_what_is_raised_comes_through_and_nothing_is_lost(where):
    """Ctrl-C too, and the next solve is the one that it would have been."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    limit, calls = [7], []

    def look(*given):
        calls.append(given)
        if len(calls) == limit[0]:
            raise KeyError("seven")
        if len(calls) == -limit[0]:
            signal.raise_signal(signal.SIGINT)
        return given[-1][0] + 9.0

    solver = pnode.Solver(Kinetics(), method="es325", step_size=0.02, compile=True, **{where: look})
    for number, error in ((7, KeyError), (-7, KeyboardInterrupt)):
        limit[0] = number
        calls.clear()
        with pytest.raises(error):
            solver(START, TIMES)
        assert len(calls) == 7
    limit[0] = 0
    found = solver(START, TIMES).ys
    expected = pnode.Solver(Kinetics(), method="es325", step_size=0.02, compile=True)(START, TIMES)
    assert torch.equal(found, expected.ys)


@pytest.mark.parametrize("method", ["dopri5", "rodaspr"])
def test_progress_bars_forwards_and_backwards(method, capsys):
    found, seen = [], []
    for compile in (False, True):
        field, shown = Kinetics(), []
        solver = pnode.Solver(
            field, method=method, rtol=1e-6, compile=compile, progress=True,
            monitor=lambda n, t, y, to=shown: to.append(torch.cat([torch.tensor([n, t]), y])),
        )  # fmt: skip
        solution = solver(START, TIMES)
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
        capsys.readouterr()
        solution.ys.square().sum().backward()
        number = solution.stats.steps
        assert f"{number}/{number}" in capsys.readouterr().err
        found.append(torch.cat([solution.ys.detach().reshape(-1), field.weight.grad.reshape(-1)]))
        seen.append(torch.stack(shown))
    assert difference(found[1], found[0]) < 1e-9
    assert difference(seen[1], seen[0]) < 1e-9


def test_a_sweep_that_gives_up_is_told_of_and_not_tried_for_ever(caplog, monkeypatch):
    """Each step is shown once all the same."""
    monkeypatch.setattr(logging.getLogger("pnode"), "propagate", True)
    caplog.set_level(logging.INFO, "pnode")
    seen, wanted = [], {"method": "cn", "step_size": 0.02}
    solver = pnode.Solver(
        Kinetics(), compile=True, monitor=lambda step, t, y: seen.append(step), **wanted
    )
    made = []

    class Failing(sweeps.WholeSweep):
        def __init__(self, compiled, engine):
            super().__init__(compiled, engine)
            made.append(compiled)

        def forward(self, *given):
            whole = super().forward(*given)
            if len(made) == 2:
                return whole
            made[-1].status = 2
            return None

    monkeypatch.setattr(sweeps, "WholeSweep", Failing)
    expected = pnode.Solver(Kinetics(), compile=False, **wanted)(START, TIMES).ys
    for number in range(1, 8):
        seen.clear()
        ys = solver(START, TIMES).ys
        assert difference(ys, expected) < 1e-7 if number == 2 else torch.equal(ys, expected)
        assert seen == list(range(1, len(seen) + 1))
    told = [r.getMessage() for r in caplog.records if "gave up" in r.getMessage()]
    assert (len(told), len(made)) == (4, 5)  # three in a row
    assert "values are not finite" in told[0]
    assert "compiled sweeps gave up 3 times" in repr(solver)

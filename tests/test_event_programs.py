"""Steps in which an event function may have a zero, chosen by machine code: as if all were seen."""

from __future__ import annotations

import pytest
import torch

import pnode
from pnode.solvers.compiled.event_programs import EventPrograms
from pnode.solvers.compiled.shown_steps import ShownSteps
from pnode.sweeping.event_locator import EventLocator

D = torch.float64
TIMES = torch.tensor([0.0, 1.0, 6.0], dtype=D)


@pytest.fixture
def shown(monkeypatch):
    """Return a list of the numbers of the steps that Python gets to see."""
    seen, show = [], ShownSteps.show

    def showing(self):
        show(self)
        seen.append(self.number)

    monkeypatch.setattr(ShownSteps, "show", showing)
    return seen


class Turning(torch.nn.Module):
    """An oscillator, stiff in a third direction."""

    def __init__(self):
        super().__init__()
        self.square = torch.nn.Parameter(torch.tensor(9.0, dtype=D))

    def forward(self, t, y):
        return torch.stack([y[1], -self.square * y[0], 50.0 * (torch.cos(t) - y[2])])


def exact(t):
    stiff = (2500.0 * torch.cos(t) + 50.0 * torch.sin(t)) / 2501.0
    stiff = stiff + (0.5 - 2500.0 / 2501.0) * torch.exp(-50.0 * t)
    return torch.stack([torch.cos(3.0 * t), -3.0 * torch.sin(3.0 * t), stiff], -1)


def solved(solver, level):
    """Return all numbers of a solve, those of its gradients and counts too."""
    y0 = torch.tensor([1.0, 0.0, 0.5], dtype=D, requires_grad=True)
    solution = solver(y0, TIMES)
    assert "compiled='whole sweeps'" in repr(solver)
    parts = [solution.ts, solution.ys, *(x for e in solution.events for x in (e.times, e.states))]
    values = torch.cat([part.reshape(-1) for part in parts])
    loss = values @ torch.linspace(-1.0, 2.0, len(values), dtype=D)
    tensors = [y0, level, *solver.rhs.parameters()]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    found = [x for x in found if x is not None]
    kinds = [len(e.times) for e in solution.events]
    return [values.detach(), *found], (kinds, solution.event, solution.stats.rhs), solution


def in_python(monkeypatch, *given):
    """Solve with all steps shown."""
    with monkeypatch.context() as patch:
        patch.setattr(EventLocator, "sieve", lambda self, programs: None)
        return solved(*given)


def crossing(level):
    return [
        pnode.Event(lambda t, y: y[0] - level, terminal=False),
        pnode.Event(lambda t, y: torch.stack([y[1] - 0.1, y[2] + level]), -1, terminal=False),
        pnode.Event(lambda t, y: t - 5.0 + y[0] * 1e-3),
    ]


def grazing(level):
    """Roots next to lowest points, some of them two in a step, and lowest points without any."""
    return [
        pnode.Event(lambda t, y: 1.0001 - y[0] * y[0] - y[1] * y[1] / 9.0 + 0 * level),
        pnode.Event(lambda t, y: (y[0] - level) ** 2 - 1e-6, terminal=False),
        pnode.Event(lambda t, y: torch.stack([y[0].abs(), y[2] + 9.0]), terminal=False),
    ]


def solver_of(events, method="bdf"):
    return pnode.Solver(
        Turning(), method=method, rtol=1e-5, atol=1e-8, jacobian="dense", compile=True,
        event_fn=events,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("events", "method"),
    [(crossing, "bdf"), (crossing, "rodaspr"), (grazing, "bdf"), (crossing, "bosh3")],
)
def test_the_bits_are_the_same(events, method, shown, monkeypatch):
    level = torch.nn.Parameter(torch.tensor(0.3, dtype=D))
    solver = solver_of(events(level), method)
    expected, others, solution = in_python(monkeypatch, solver, level)
    assert len(shown) == solution.stats.steps
    shown.clear()
    found, own, _ = solved(solver, level)
    assert own == others
    assert sum(own[0]) > 3
    assert all(map(torch.equal, found, expected))
    assert len(shown) < solution.stats.steps / (2 if events is crossing else 1)


@pytest.mark.parametrize("others", [[], [pnode.Event(lambda t, y: t - 5.0, terminal=False)]])
def test_an_event_that_was_passed_over(others, shown, monkeypatch, caplog):
    """By a wrong program: the next step that is shown tells, or the end; all steps are then."""
    events = [pnode.Event(lambda t, y: t - 3.0 + 1e-3 * y[0], terminal=False), *others]
    find = EventPrograms.find

    def wrong(self, key, function, facts, time, state):
        def blind(t, y):
            values = function(t, y)
            return torch.cat([0.0 * values[:1] - 3.0, values[1:]])

        return find(self, key, blind, facts, time, state)

    y0 = torch.tensor([1.0, 0.0, 0.5], dtype=D)
    expected = solver_of(events)(y0, TIMES)
    monkeypatch.setattr(EventPrograms, "find", wrong)
    solver = solver_of(events)
    with caplog.at_level("INFO", logger="pnode"):
        found = solver(y0, TIMES)
    assert "passed over an event" in caplog.text
    assert len(found.events) == len(events)
    for own, other in zip(found.events, expected.events, strict=True):
        assert len(own.times) == 1
        assert torch.allclose(own.times, other.times, rtol=1e-9)
    # What single steps leave to Newton's method decides the lengths of the next.
    errors = [float((solution.ys - exact(TIMES)).abs().max()) for solution in (found, expected)]
    assert errors[0] < 2.0 * errors[1] < 1e-2


def test_what_changes_between_solves_takes_effect(shown, monkeypatch):
    """A number of a closure, and the values, the type and the place of a tensor."""
    level, more = torch.nn.Parameter(torch.tensor(0.3, dtype=D)), [0.0, torch.zeros((), dtype=D)]
    events = [pnode.Event(lambda t, y: y[0] - level - more[0] - more[1], terminal=False)]
    solver, seen = solver_of(events), []

    def change(step):
        if step == 1:
            more[0] = 0.2
        elif step == 2:
            level.data.add_(0.1)
        elif step == 3:
            more[1] = torch.tensor(-0.25, dtype=D)
        elif step == 4:
            more[1] = torch.tensor([2], dtype=torch.int64)
        elif step == 5:
            more[1].sub_(3)

    for step in range(6):
        change(step)
        expected, others, solution = in_python(monkeypatch, solver, level)
        shown.clear()
        found, own, _ = solved(solver, level)
        assert own == others
        assert all(map(torch.equal, found, expected))
        assert len(shown) < solution.stats.steps / 2
        seen.append(tuple(found[0].tolist()))
    assert len(set(seen)) == 6


@pytest.mark.parametrize("kind", ["branches", "counts", "float32", "bfloat16", "complex64"])
def test_what_stays_in_python(kind, shown):
    """As ever, without a word."""
    calls, level = [], torch.nn.Parameter(torch.tensor(0.3, dtype=D))
    given = level.detach().to(getattr(torch, kind, D))  # no number of the program's text

    def event(t, y):
        if kind == "counts":
            calls.append(t)
        if kind == "branches" and float(t.detach()) > 3.0:
            return y[0] + 1e-9 - level
        return y[0] - level - given.real

    _, own, solution = solved(solver_of([pnode.Event(event, terminal=False)]), level)
    assert own[0][0] > 3
    assert len(shown) == solution.stats.steps

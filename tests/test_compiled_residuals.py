"""Compiled sweeps of F(t, y, y') = 0: the eager ones' solutions, gradients, steps and events."""

from __future__ import annotations

import warnings

import pytest
import torch

import pnode

D = torch.float64
START, TIMES = torch.tensor([0.6, 0.3, 0.1], dtype=D), torch.tensor([0.0, 0.5, 2.0], dtype=D)
# Newton's methods down to round-off: they end where that of the eager sweeps does, but for SNES.
CONVERGED = {"snes_rtol": 1e-13, "snes_stol": 1e-14}
METHODS = {
    "beuler": {"method": "beuler", "step_size": 0.1, "petsc_options": CONVERGED},
    "bdf": {"method": "bdf", "rtol": 1e-5, "atol": 1e-7, "petsc_options": {"snes_stol": 1e-13}},
    "bdf3": {"method": "bdf3", "step_size": 0.1, "petsc_options": {"snes_stol": 1e-13}},
}


class Constrained(torch.nn.Module):
    """Nonlinear in y', with an algebraic equation; the last parameter stays unused."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.4, 3.0, 1.0], dtype=D))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, t, y, yp):
        a, b, c = y.unbind(-1)
        first = self.rates[0] * a * (1.0 + 0.3 * torch.sin(t)) - self.rates[1] * b * c
        second = self.rates[2] * b * b
        inertia = 2.0 + 0.1 * yp[1] * y[0]
        return torch.stack(
            [inertia * yp[0] + first, yp[1] - first + second, a + b + c - 1.0]
        )  # fmt: skip


class Odd(Constrained):
    """Columns of a product, views written into, y' written into, a buffer, a gradient inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 0.5], dtype=D))

    def forward(self, t, y, yp):
        yp.mul_(0.5)
        products = torch.outer(y, yp + 1.0) * self.weights
        with torch.enable_grad():
            own = y if y.requires_grad else y.clone().requires_grad_(True)
            energy = (self.rates * own**2).sum() + 0.1 * own[0] * own[1]
            (slope,) = torch.autograd.grad(energy, own, create_graph=True)
        out = torch.zeros_like(y)
        out[0] = yp[0] * (1.0 + y[0] ** 2)
        out[1:].add_(yp[1:].view(2))
        out += slope
        out[2] += 0.01 * products[:, 0].sum()
        out[:2].add_(0.02 * products[1][:2])
        out.view(3, 1)[0] += 0.1 * yp.sum()
        return out


class Parts(Constrained):
    """A vector and a matrix."""

    def forward(self, t, y, yp):
        (a, b), (ap, bp) = y, yp
        flow = b.sum(0)[:1] - self.rates[0] * torch.tanh(a)
        return ap - flow, (1.0 + a**2) * bp + b * t + 0.1 * ap


PARTS = START[:1], START.view(3, 1).expand(3, 2)


def solve(compile, field, keywords, y0, times, levels=None, **more):
    """Return the solution, and what it consists of with all gradients."""
    own = field()
    height = torch.nn.Parameter(torch.tensor(0.0 if levels is None else levels, dtype=D))
    if levels is not None:
        own.height = height
        more["event_fn"] = pnode.Event(lambda t, y: y[0] - own.height, terminal=False)
    solver = pnode.Solver(residual=own, jacobian="dense", compile=compile, **keywords, **more)
    start = [part.clone().requires_grad_() for part in (y0 if isinstance(y0, tuple) else (y0,))]
    times = times.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(tuple(start) if isinstance(y0, tuple) else start[0], times)
    assert ("compiled='whole sweeps'" in repr(solver)) == compile
    ys = solution.ys if isinstance(y0, tuple) else (solution.ys,)
    parts = [*ys, *(part for e in solution.events or () for part in (e.times, e.states))]
    values = torch.cat([part.reshape(-1) for part in parts])
    loss = values @ torch.linspace(-1.0, 2.0, len(values), dtype=D)
    if solution.costs is not None:
        loss = loss + solution.costs.sum()
    found = torch.autograd.grad(loss, [*start, times, *own.parameters()], allow_unused=True)
    return solution, [values.detach(), *found]


@pytest.mark.parametrize(("name", "field", "y0", "times", "more"), [
    ("beuler", Odd, START, TIMES, {}),
    ("bdf", Odd, START, TIMES, {}),
    ("beuler", Constrained, START, -0.2 * TIMES, {"cost": lambda t, y: y.square().sum() * t}),
    ("beuler", Constrained, START, TIMES, {"levels": 0.5, "dense": True}),
    ("bdf", Constrained, START, TIMES, {"levels": 0.5, "dense": True}),
    ("bdf3", Constrained, START, TIMES, {"cost": lambda t, y: y.square().sum() * t}),
    ("bdf3", Parts, PARTS, -0.2 * TIMES, {}),
])  # fmt: skip
def test_sweeps_are_the_eager_ones(name, field, y0, times, more):
    (eager, expected), (compiled, found) = (
        solve(c, field, METHODS[name], y0, times, **more) for c in (False, True)
    )
    assert eager.stats.steps == compiled.stats.steps > 3
    assert eager.stats.rejected == compiled.stats.rejected
    assert sum(len(e.times) for e in compiled.events or ()) == ("levels" in more)
    # Jacobians of one-step methods cost little in machine code; parts of steps begin with new ones.
    if name != "beuler" and "levels" not in more:
        assert eager.stats.newton == compiled.stats.newton
        assert eager.stats.jacobians == compiled.stats.jacobians
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm()) <= 1e-10 * float(b.norm())


def test_within_a_budget_the_gradients_are_the_same():
    """Checkpoints hold y' beside the end of the step that is gone on from."""
    limits = None, 24 * 9
    (_, expected), (solution, found) = (
        solve(True, Constrained, METHODS["beuler"], START, TIMES, checkpointing=pnode.Checkpointing(
            memory
        )) for memory in limits
    )  # fmt: skip
    assert solution.stats.backward.recomputed > 10 and solution.stats.ram_bytes <= limits[1]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_number_that_changes_is_noticed():
    """Where y' = 0, at which F is looked at, it shows in the operations alone."""
    factor = [1.0]
    eager, solver = (
        pnode.Solver(
            residual=lambda t, y, yp: factor[0] * yp + y, compile=c, **METHODS["beuler"]
        ) for c in (False, True)
    )  # fmt: skip
    for factor[0] in (1.0, 2.0):
        found, expected = (one(START, TIMES).ys for one in (solver, eager))
        assert float((found - expected).abs().max()) < 1e-12
    assert "compiled='whole sweeps'" in repr(solver)

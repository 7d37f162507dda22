"""Solves with break points in machine code: one compilation for all parts, which have own ends."""

import pytest
import torch

import pnode
from pnode import controls
from pnode.solvers.compiled.trace import trace_field

D = torch.float64
TIMES = [0.0, 0.3, 0.8, 1.2]
BREAKS = torch.tensor([0.4, 0.8], dtype=D)


def vector(*numbers):
    return torch.tensor(numbers, dtype=D)


class Field(torch.nn.Module):
    """Smooth in t between the jumps of u, nowhere autonomous: Rosenbrock methods want df/dt."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(1.3, dtype=D))
        self.u = controls.hold(vector(0.0, 0.4, 0.8), torch.nn.Parameter(vector(1.0, -2.0, 0.5)))
        self.number = 9.0

    def forward(self, t, y):
        return -self.a * torch.sin(y) + self.u(t.abs()) * torch.cos(self.number * t)


def solution(field, compile, y0, breaks, sign=1.0, times=TIMES, **options):
    own = pnode.Solver(field, compile=compile, **options)
    return own, own(y0, sign * vector(*times), breakpoints=sign * breaks)


def gradients(solved, *wanted):
    weights = torch.linspace(1.0, 2.0, solved.ys.numel(), dtype=D).view(solved.ys.shape)
    loss = (weights * solved.ys).sum()
    return torch.autograd.grad(loss if solved.costs is None else loss + solved.costs[-1], wanted)


@pytest.mark.parametrize(
    ("size", "sign", "options"),
    [
        (2, 1.0, {"method": "es325", "rtol": 1e-7, "cost": lambda t, y: (t * y).square().sum()}),
        (2, -1.0, {"method": "rodaspr", "rtol": 1e-7}),
        (40, 1.0, {"method": "rodaspr", "step_size": 0.05}),
        (2, 1.0, {"method": "bdf", "rtol": 1e-5}),
        (2, 1.0, {"method": "radau5", "step_size": 0.1, "mass": vector(2.0, 1.0)}),
        (3, -1.0, {"method": "bosh3", "rtol": 1e-6}),
        (2, 1.0, {"method": "es325", "rtol": 1e-6, "checkpointing": pnode.Checkpointing(2000)}),
    ],
)  # fmt: skip
def test_same_numbers_as_without(size, sign, options):
    """Scalars and graphs, either direction of time: states, steps, derivatives by all there is."""
    found = []
    for compile in (True, False):
        field, breaks = Field(), BREAKS.clone().requires_grad_()
        y0 = torch.linspace(0.3, 0.7, size, dtype=D).requires_grad_()
        own, solved = solution(field, compile, y0, breaks, sign, **options)
        assert ("compiled='whole sweeps'" in repr(own)) is compile
        by = gradients(solved, y0, breaks, field.a, field.u.values)
        found.append((solved.stats, solved.ys.detach(), *by))
    (stats, *one), (expected, *other) = found
    assert (stats.steps, stats.rejected) == (expected.steps, expected.rejected)
    assert "checkpointing" not in options or stats.backward.recomputed > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_one_compilation_that_notices_what_changes():
    """It serves other breaks and other values; another number of f's is traced anew."""
    traced = []
    field, y0 = Field(), vector(0.5, 0.2).requires_grad_()
    own = pnode.Solver(field, method="rodaspr", step_size=0.02, compile=True)
    own._engine.compiler._trace_field = lambda one: traced.append(one) or trace_field(one)

    def check(breaks, traces):
        solved = own(y0, TIMES, breakpoints=breaks)
        plain = pnode.Solver(field, method="rodaspr", step_size=0.02, compile=False)
        expected = plain(y0, TIMES, breakpoints=breaks)
        pairs = [
            (one.ys, *gradients(one, y0, field.a, field.u.values)) for one in (solved, expected)
        ]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert len(traced) == traces

    check(BREAKS, 1)
    with torch.no_grad():
        field.u.values.copy_(vector(0.2, 3.0, -1.0))
    check(vector(0.1, 0.4, 0.8, 1.1), 1)
    check(field.u, 1)
    field.number = 7.0
    check(BREAKS, 2)

    def total(y):  # torch.func's transforms are over when machine code reads the ends of parts
        return own(y, TIMES, breakpoints=BREAKS).ys.sum()

    by = torch.autograd.grad(total(y0), y0)[0]
    torch.testing.assert_close(torch.func.grad(total)(y0.detach()), by, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(controls.hold, "rk4"), (controls.cubic, "rk4"), (controls.linear, "rodaspr")],
)
def test_controls_with_their_breaks_keep_the_order(kind, method):
    """y' = (u(t) - 1) y, against the integral of u by Gauss's rule, exact for cubic pieces."""
    knots = torch.linspace(0.0, 1.0, 6, dtype=D)
    u = kind(knots, vector(1.0, -2.0, 0.5, 3.0, -1.0, 0.7))
    nodes = ((knots[1:] + knots[:-1]) / 2.0)[:, None] + vector(-0.1, 0.1) / 3.0**0.5
    exact = torch.exp(sum(0.1 * u(t) for t in nodes.flatten()) - 1.0)
    errors = []
    for number in (3, 6):
        own = pnode.Solver(
            lambda t, y: (u(t) - 1.0) * y, method=method, step_size=0.2 / number, compile=True
        )
        with torch.no_grad():
            errors.append(float((own(vector(1.0), [0.0, 1.0], breakpoints=u).ys[-1] - exact).abs()))
        assert "compiled='whole sweeps'" in repr(own)
    assert errors[0] > 12.0 * errors[1] > 1e-12


def test_limits_of_steps_and_monitors_go_through_all_parts():
    seen = []
    own = pnode.Solver(
        Field(), method="es325", step_size=0.05, max_steps=23, compile=True,
        monitor=lambda step, t, y: seen.append((step, t)),
    )  # fmt: skip
    with torch.no_grad(), pytest.raises(pnode.StepLimitReached, match=r"max_steps=23.*step 23"):
        own(vector(0.5), TIMES, breakpoints=BREAKS)
    assert [step for step, _ in seen] == list(range(1, 24))
    assert "compiled='whole sweeps'" in repr(own)


def test_steps_are_asked_for():
    """Of a solver that compiles, as of one that does not."""
    found = [
        pnode.Solver(Field(), method="rodaspr", compile=compile)(
            vector(0.5), TIMES, breakpoints=BREAKS, at="steps"
        )
        for compile in (True, False)
    ]
    assert len(found[0].ts) == 1 + found[0].stats.steps
    torch.testing.assert_close(found[0].ys, found[1].ys)


@pytest.mark.parametrize("method", ["bdf", "radau5"])
def test_repeated_steps_are_those_that_were_taken(method):
    """Of rejected attempts, which change the order of BDF, there is none; Newton's ends differ."""
    rate, y0 = vector(20.0).requires_grad_(), vector(2.0, 0.0).requires_grad_()

    def jumping(t, y):
        push = torch.where(torch.sin(t) > 0.9, 0.3, 0.0) * rate
        follow = y[1:] - 0.1 * rate * (y[:1] - torch.sin(t))
        return torch.cat([follow, y[:1].sin() + push - 0.3 * rate * y[1:]])

    own = pnode.Solver(jumping, method=method, params=[rate], rtol=1e-5, atol=1e-5, compile=True)(
        y0, vector(0.0, 4.0, 5.0)
    )
    assert own.stats.rejected > 10
    node = own.ys.grad_fn
    while not hasattr(node, "runs"):
        node = node.next_functions[0][0]
    found = torch.autograd.grad(own.ys.sum(), [y0, rate], retain_graph=True)
    node.runs.only().sweep.let_checkpoints_go()
    again = torch.autograd.grad(own.ys.sum(), [y0, rate])
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0.0)


def test_multistep_methods_that_may_have_to_repeat_are_not_compiled():
    """Their repeated steps go on from states of the part before that Newton ended elsewhere."""
    own = pnode.Solver(
        Field(), method="bdf", compile=True, checkpointing=pnode.Checkpointing(memory=10**6)
    )
    with pytest.warns(UserWarning, match=r"breakpoints= and memory= are given, and method='bdf'"):
        own(vector(0.5), TIMES, breakpoints=BREAKS)

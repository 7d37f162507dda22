"""A solution as a function of time, and the ends of all steps as outputs."""

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from replica import replica
from test_compiled import interpreted as interpreted_graphs
from test_dense import D, interpolated
from test_forms import Reaction, Transport
from test_gradients import TIGHT, Field, initial, relative_difference, weights_like

import pnode
from pnode.solvers.methods import METHODS, find_method

ENDS = torch.tensor([0.0, 1.0], dtype=D)
OUTPUTS = torch.tensor([0.0, 0.13, 0.4, 0.77, 1.0], dtype=D)
TIMES = torch.tensor([[0.05, 0.31, 0.62], [0.97, 0.31, 0.23]], dtype=D)


def circle(t, y):
    """A nonlinear field whose solution from (1, 0) is (cos t, -sin t)."""
    g = (y * y).sum()
    return torch.stack([y[1] * g, -y[0] * g])


def exact(t):
    return torch.stack([torch.cos(t), -torch.sin(t)], -1)


START = torch.tensor([1.0, 0.0], dtype=D)


def grad(of, *tensors, **keywords):
    return torch.autograd.grad(of, tensors, **keywords)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "name", [m.name for m in METHODS if m.adaptive and m.order >= 5] + ["rodaspr", "bosh3", "ark4"]
)
def test_as_accurate_inside_steps_as_at_their_ends(name):
    """Of every adaptive method of high order, and of one of each other family."""
    method = find_method(name)
    parts = {"rhs": circle}
    if method.kind == "imex":
        parts = {"implicit": lambda t, y: 0.3 * circle(t, y),
                 "explicit": lambda t, y: 0.7 * circle(t, y)}  # fmt: skip
    solver = pnode.Solver(**parts, method=name, rtol=1e-6, atol=1e-6, dense=True, compile=False)
    with torch.no_grad():
        solution = solver(START, [0.0, 6.0], at="steps")
    ts = solution.ts
    at_ends = (solution.ys - exact(ts)).abs().max()
    theta = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=D)
    inside = ts[:-1, None] + theta * ts.diff()[:, None]
    found = solution(inside)
    assert found.shape == (*inside.shape, 2)
    assert (found - exact(inside)).abs().max() < 4.0 * at_ends
    # The derivative loses one order.
    slope = torch.stack([-torch.sin(inside), -torch.cos(inside)], -1)
    of_slope = (solution.derivative(inside) - slope).abs().amax(-1) * ts.diff()[:, None]
    assert of_slope.max() < 40.0 * at_ends


def pendulum(t, y):
    return torch.stack([y[1], -torch.sin(y[0]) * (1.0 + 0.1 * torch.cos(t))])


def van_der_pol(t, y):
    return torch.stack([y[1], 5.0 * (1.0 - y[0] ** 2) * y[1] - y[0]])


@pytest.mark.parametrize("name", ["fehlberg5", "bosh5", "verner6", "verner7", "verner8", "dopri8"])
@pytest.mark.parametrize(
    ("field", "y0", "end", "tolerance"),
    [(pendulum, [1.0, 0.3], 6.0, 1e-6), (van_der_pol, [2.0, 0.0], 3.0, 1e-5)],
)
def test_long_steps_of_explicit_methods_of_high_order(name, field, y0, end, tolerance):
    """Nonlinear problems, whose higher derivatives grow: slopes inside of steps follow them."""
    options = {"rtol": tolerance, "atol": tolerance, "compile": False}
    y0 = torch.tensor(y0, dtype=D)
    with torch.no_grad():
        solution = pnode.Solver(field, method=name, dense=True, **options)(
            y0, [0.0, end], at="steps"
        )
        ts = solution.ts
        inside = ts[:-1, None] + torch.tensor([0.2, 0.5, 0.8], dtype=D) * ts.diff()[:, None]
        times = torch.cat([ts, inside.reshape(-1)]).sort().values
        options |= {"rtol": 1e-11, "atol": 1e-11}
        exact = pnode.Solver(field, method="dopri8", **options)(y0, times).ys
        error = (solution(times) - exact).abs().amax(1)
    at_ends = torch.isin(times, ts)
    assert error[~at_ends].max() < 4.0 * error[at_ends].max()


@pytest.mark.parametrize(
    "name", ["grk4t", "rodaspr", "radau5", "dirk657a", "esdirk7", "esdirk8", "bdf", "ark3"]
)
def test_long_and_stiff_steps_of_implicit_methods(name):
    """No slope that the field magnifies: mu = 1000, and the pendulum of those above."""
    for field, y0, end, atol in (
        (pendulum, [1.0, 0.3], 6.0, 1e-6),
        (lambda t, y: torch.stack([y[1], 1000.0 * (1.0 - y[0] ** 2) * y[1] - y[0]]),
         [2.0, 0.0], 100.0, 1e-8),
    ):  # fmt: skip
        y0, options = torch.tensor(y0, dtype=D), {"rtol": 1e-6, "atol": atol, "compile": False}
        parts = {"rhs": field}
        if find_method(name).kind == "imex":
            first = torch.tensor([1.0, 0.0], dtype=D)
            parts = {"implicit": lambda t, y, f=field, own=1.0 - first: own * f(t, y),
                     "explicit": lambda t, y, f=field, own=first: own * f(t, y)}  # fmt: skip
        with torch.no_grad():
            solver = pnode.Solver(**parts, method=name, dense=True, **options)
            ts = solver(y0, [0.0, end], at="steps").ts
            ts = ts[:: max(1, len(ts) // 16)]
            inside = ts[:-1, None] + torch.tensor([0.2, 0.5, 0.8], dtype=D) * ts.diff()[:, None]
            times = torch.cat([ts, inside.reshape(-1)]).sort().values
            options |= {"rtol": 1e-11, "atol": 1e-13}
            exact = pnode.Solver(field, method="radau5", **options)(y0, times).ys
            found = solver(y0, [0.0, end])(times)
        error = ((found - exact).abs() / (atol + 1e-6 * exact.abs())).amax(1)
        at_ends = torch.isin(times, ts)
        assert error[~at_ends].max() < 4.0 * error[at_ends].max()


@pytest.mark.parametrize("name", ["verner7", "dopri8"])
def test_tangents_of_slopes_inside_of_steps(name):
    """Along y0 and the times a solution is called at: central differences, and the gradient."""
    solver = pnode.Solver(pendulum, method=name, step_size=0.5, dense=True, compile=False)
    y0, t = torch.tensor([1.0, 0.3], dtype=D), torch.tensor([0.4, 0.8], dtype=D)
    along = torch.tensor([0.4, -0.7], dtype=D), torch.tensor([0.5, -0.3], dtype=D)

    def values(y0, t):
        solution = solver(y0, [0.0, 0.3, 0.9, 1.5])
        return torch.cat([solution.ys, solution(t), solution.derivative(t)])

    _, found = torch.func.jvp(values, (y0, t), along)
    h = 1e-4
    later, before = (values(y0 + e * along[0], t + e * along[1]) for e in (h, -h))
    assert torch.allclose(found, (later - before) / (2 * h), rtol=0.0, atol=1e-7)
    y, times = y0.clone().requires_grad_(), t.clone().requires_grad_()
    weights = weights_like(found)
    by_y, by_t = grad((values(y, times) * weights).sum(), y, times)
    dot = (by_y * along[0]).sum() + (by_t * along[1]).sum()
    assert torch.allclose(dot, (found * weights).sum(), rtol=1e-10)


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    "name", ["dopri5", "bosh3", "verner8", "esdirk6", "bdf", "rodaspr", "radau5"]
)
def test_outputs_to_the_last_bit_and_the_field_at_steps(name, direction):
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method=name, dense=True, compile=False)
    solution = solver(y0, direction * OUTPUTS)
    assert torch.equal(solution(direction * OUTPUTS), solution.ys)
    assert torch.equal(solution(direction), solution.ys[-1])
    ends = solver(y0.detach(), direction * ENDS, at="steps")
    assert torch.equal(ends.ts[[0, -1]], direction * ENDS) and len(ends.ts) == ends.stats.steps + 1
    # At the ends of steps the interpolant's slope is f, tsit5's and dopri5's too; that of a
    # polynomial through states alone to what the tolerance of 1e-6 is over the length of a step.
    found = solution.derivative(ends.ts)
    expected = torch.stack([field(t, y) for t, y in zip(ends.ts, ends.ys, strict=True)])
    through_states = name in ("esdirk6", "rodaspr", "radau5", "bdf")
    h = ends.ts.diff().abs().min() if through_states else math.inf
    assert torch.allclose(found, expected, rtol=1e-10, atol=max(1e-12, 1e-6 / float(h)))
    h = 1e-5
    away = solution(direction * TIMES + h) - solution(direction * TIMES - h)
    assert torch.allclose(away / (2 * h), solution.derivative(direction * TIMES), atol=1e-7)


@pytest.mark.parametrize("name", ["fehlberg5", "verner7", "bdf5"])
def test_a_short_step_next_to_a_long_one(name):
    """Interpolants of several steps leave neighbours out that are much shorter."""
    solver = pnode.Solver(
        circle, method=name, rtol=1e-8, atol=1e-8, first_step=1e-7, dense=True, compile=False,
        event_fn=[pnode.Event(lambda t, y: t - 1.0000001 * 0.5, terminal=False),
                  pnode.Event(lambda t, y: t - 0.5, terminal=False)],
    ) if name != "bdf5" else pnode.Solver(
        circle, method=name, step_size=0.02, dense=True, compile=False,
        event_fn=[pnode.Event(lambda t, y: t - 1.0000001 * 0.5, terminal=False)],
    )  # fmt: skip
    with torch.no_grad():
        solution = solver(START, [0.0, 3.0], at="steps")
    assert solution.ts.diff().min() < 1e-6
    inside = torch.linspace(0.0, 3.0, 301, dtype=D)
    at_ends = (solution.ys - exact(solution.ts)).abs().max()
    assert (solution(inside) - exact(inside)).abs().max() < 4.0 * at_ends


def test_stiff_layers():
    """Van der Pol's equation: interpolants of several steps follow the layers, too."""

    def field(t, y):
        return torch.stack([y[1], 10.0 * ((1.0 - y[0] ** 2) * y[1]) - y[0]])

    y0 = torch.tensor([2.0, 0.0], dtype=D)
    with torch.no_grad():
        for method in ("esdirk6", "bdf"):
            solver = pnode.Solver(
                field, method=method, rtol=1e-4, atol=1e-4, dense=True, compile=False
            )
            solution = solver(y0, [0.0, 12.0], at="steps")
            ts = solution.ts
            inside = ts[:-1] + 0.5 * ts.diff()
            accurate = pnode.Solver(field, method="verner8", rtol=1e-9, atol=1e-9, compile=False)
            both = torch.cat([ts, inside]).sort()
            reference = accurate(y0, both.values).ys[both.indices.argsort()]
            at_ends = (solution.ys - reference[: len(ts)]).abs().amax(0)
            error = (solution(inside) - reference[len(ts) :]).abs().amax(0)
            assert bool((error < 4.0 * at_ends).all()), method


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["rk4", "dopri5", "verner6", "cn"])
def test_derivatives_are_those_of_a_replica(name, monkeypatch):
    """With respect to y0, parameters and t, of the solution and of its derivative; Hessians."""
    monkeypatch.setattr("replica.DERIVATIVES", 2)
    implicit = find_method(name).implicit
    field, y0 = Field(), initial()
    solver = pnode.Solver(
        field, method=name, step_size=0.1, dense=True, compile=False,
        petsc_options=TIGHT if implicit else None,
    )  # fmt: skip
    t = TIMES.flatten().clone().requires_grad_()
    solution = solver(y0, ENDS)
    grid = [k / 10 for k in range(11)]
    reference = interpolated(field, name, y0, grid, t)
    tolerance = 1e-8 if implicit else 1e-11
    tensors = [y0, field.inner, field.outer, field.bias, t]

    def derivatives(values, slopes):
        first = grad((values * weights_like(values)).sum(), *tensors, create_graph=True)
        other = grad((slopes * weights_like(slopes)).sum(), *tensors, retain_graph=True)
        dot = sum((g * weights_like(g)).sum() for g in first)
        second = grad(dot, *tensors, retain_graph=True)
        return first, other, second

    ones = torch.eye(y0.numel(), dtype=D).reshape(-1, *y0.shape)
    rates = [grad((reference * one).sum(), t, create_graph=True)[0] for one in ones]
    slopes = torch.stack(rates, -1).reshape(reference.shape)
    ours = derivatives(solution(t), solution.derivative(t))
    theirs = derivatives(reference, slopes)
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_difference(found, expected) < tolerance


@pytest.mark.parametrize(("name", "memory"), [("bosh3", 800), ("verner6", 1200)])
def test_gradient_of_adaptive_steps_under_budgets(name, memory, tmp_path):
    field, y0 = Field(), initial()
    found = []
    for limits in (
        None,
        pnode.Checkpointing(memory=memory),
        pnode.Checkpointing(memory=memory, disk=tmp_path),
    ):
        solver = pnode.Solver(
            field, method=name, rtol=1e-4, atol=1e-4, dense=True, compile=False,
            checkpointing=limits,
        )  # fmt: skip
        solution = solver(y0, OUTPUTS)
        values = solution(TIMES)
        grid = solver(y0.detach(), ENDS, at="steps").ts.tolist()
        found.append(grad(values.square().sum(), y0, field.inner, field.outer, field.bias))
        assert solution.stats.backward.steps > 0 and solution.stats.recomputed > 0
        if limits is not None and limits.bytes is not None:
            assert solution.stats.ram_bytes <= memory
    reference = interpolated(field, name, y0, grid, TIMES.flatten())
    expected = grad(reference.square().sum(), y0, field.inner, field.outer, field.bias)
    assert all(relative_difference(one, expected) < 1e-11 for one in found)


def test_transforms_of_torch_func():
    field = Field()
    y0, t = initial().detach(), torch.tensor([0.31, 0.83], dtype=D)
    solver = pnode.Solver(field, method="bosh3", step_size=0.1, dense=True, compile=False)
    names = {name: getattr(field, name) for name in ("inner", "outer", "bias")}

    def values(y0, t, p):
        moved = {f"rhs.{name}": one for name, one in p.items()}
        return torch.func.functional_call(solver, moved, (y0, ENDS))(t).flatten()

    p = {name: one.detach() for name, one in names.items()}
    found = torch.func.jacrev(values, (0, 1))(y0, t, p)
    forward = torch.func.jacfwd(values, (0, 1))(y0, t, p)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, forward, strict=True))
    y, moving = y0.clone().requires_grad_(), t.clone().requires_grad_()
    grid = [k / 10 for k in range(11)]
    reference = interpolated(field, "bosh3", y, grid, moving).flatten()
    expected = [grad(one, y, moving, *names.values(), retain_graph=True) for one in reference]
    assert torch.allclose(found[0], torch.stack([row[0] for row in expected]), atol=1e-12)
    assert torch.allclose(found[1], torch.stack([row[1] for row in expected]), atol=1e-12)
    by_p = torch.func.grad(lambda p: values(y0, t, p)[0])(p)
    assert relative_difference(list(by_p.values()), expected[0][2:]) < 1e-11
    hessian = torch.func.hessian(lambda t: values(y0, t, p).square().sum())(t)
    assert torch.allclose(hessian, hessian.T) and float(hessian[0, 0].abs()) > 0.0
    other = p | {"bias": p["bias"] + 0.3}
    ours = torch.func.functional_call(solver, {f"rhs.{k}": v for k, v in other.items()}, (y0, ENDS))
    assert torch.equal(ours(1.0), ours.ys[-1]) and not torch.equal(ours(0.5), solver(y0, ENDS)(0.5))
    with pytest.raises(pnode.ConfigurationError, match="vmap"):
        torch.func.vmap(ours)(t)


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "cn"])
def test_ends_of_steps_and_their_gradients(name):
    field, y0, t = Field(), initial(), torch.tensor([0.0, 0.6, 1.5], dtype=D, requires_grad=True)
    seen = [0.0]
    solver = pnode.Solver(
        field, method=name, rtol=1e-4, atol=1e-4, compile=False,
        monitor=lambda step, t, y: seen.append(t),
        petsc_options=TIGHT if name == "cn" else None,
    )  # fmt: skip
    solution = solver(y0, t, at="steps")
    assert solution.ts.tolist() == seen and {0.6, 1.5} < set(seen)
    assert solution.stats.steps == len(seen) - 1 == solution.stats.recomputed
    reference = replica(field, name, y0, seen)
    tolerance = 1e-8 if name == "cn" else 1e-11
    assert relative_difference([solution.ys.detach()], [reference.detach()]) < tolerance
    weights = weights_like(reference)
    tensors = [y0, field.inner, field.outer, field.bias]
    *ours, by_t = grad((solution.ys * weights).sum(), *tensors, t)
    theirs = grad((reference * weights).sum(), *tensors)
    assert relative_difference(ours, theirs) < tolerance
    # Those of the output times: along the exact flow, as ever.
    plain = solver(y0, t).ys
    places = [seen.index(float(one)) for one in t]
    (expected,) = grad((plain * weights[places]).sum(), t)
    assert torch.allclose(by_t[1:], expected[1:], rtol=1e-9)
    (by_ts,) = grad(solution.ts[-1] * 2.0, t)
    assert by_ts.tolist() == [0.0, 0.0, 2.0]


def test_ends_of_steps_with_costs_stages_and_fixed_steps():
    solver = pnode.Solver(
        Field(), method="rk4", step_size=0.25, cost=lambda t, y: y.square().sum(), compile=False
    )
    y0 = initial()
    solution = solver(y0, ENDS, at="steps")
    plain = solver(y0, torch.linspace(0.0, 1.0, 5, dtype=D))
    assert torch.equal(solution.ys, plain.ys) and torch.equal(solution.costs, plain.costs)
    stages = []
    solution.stages(torch.ones_like(solution.ys), stages.append)
    assert len(stages) == 16
    alone = solver(y0, ENDS[:1], at="steps")
    assert alone.ts.tolist() == [0.0] and torch.equal(alone.ys[0], y0)


# -------------------------------------------------------------------------------- events and breaks


class Ball(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(9.81, dtype=D))

    def forward(self, t, y):
        return torch.stack([y[1], -self.gravity])


def test_up_to_an_event():
    ball = Ball()
    solver = pnode.Solver(
        ball, dense=True, compile=False,
        event_fn=[lambda t, y: y[0], pnode.Event(lambda t, y: y[0] - 5.0, terminal=False)],
    )  # fmt: skip
    y0 = torch.tensor([10.0, 0.0], dtype=D, requires_grad=True)
    solution = solver(y0, [0.0, 0.5, math.inf])
    end = solution.event_time
    assert torch.equal(solution(end), solution.ys[-1])
    half = solution(0.5 * end)
    expected = 10.0 - 0.5 * ball.gravity * (0.5 * end) ** 2
    assert torch.allclose(half[0], expected, rtol=1e-10)
    ours, theirs = (grad(one, y0, ball.gravity, retain_graph=True) for one in (half[0], expected))
    # The time of the event is 2 sqrt(H / (2 g)): half of the way down is H 3/4 whatever g is.
    assert torch.allclose(ours[0][0], torch.tensor(0.75, dtype=D), rtol=1e-9)
    assert abs(float(ours[1])) < 1e-9 and theirs[1] is not None
    with pytest.raises(
        pnode.ConfigurationError, match=r"interval of this solution, from 0\.0 to 1\.4"
    ):
        solution(1.5)
    steps = solver(y0, [0.0, 0.5, math.inf], at="steps")
    assert torch.equal(steps.ts[-1], steps.event_time) and steps.reason == "event"
    assert (
        torch.equal(steps.ys[-1], solution.ys[-1].detach())
        and len(steps.ts) == steps.stats.steps + 1
    )
    assert float(steps.events[1].times[0].detach()) in steps.ts.tolist()
    (by_g,) = grad(steps.ts[-1], ball.gravity)
    assert float(by_g) == pytest.approx(-float(end.detach()) / (2 * 9.81), rel=1e-9)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_sides_of_a_break(direction):
    k = torch.tensor(2.0, dtype=D, requires_grad=True)
    at = torch.tensor([0.5 * direction], dtype=D, requires_grad=True)

    def field(t, y):
        return torch.where(direction * t < 0.5, -y, k * torch.ones_like(y))

    solver = pnode.Solver(
        field, params=[k], method="bosh3", step_size=0.1, dense=True, compile=False
    )
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    solution = solver(y0, direction * ENDS, breakpoints=at)
    before, after = (
        solution.derivative(0.5 * direction, "before"),
        solution.derivative(0.5 * direction),
    )
    y = solution(0.5 * direction)
    assert torch.allclose(before, -y, rtol=1e-12) and torch.allclose(after, k, rtol=1e-12)
    value = solution(0.75 * direction)
    assert torch.allclose(value, y + 0.25 * direction * k, rtol=1e-12)
    by_k, by_y0, by_at = grad(value.sum(), k, y0, at)
    assert float(by_k) == pytest.approx(0.25 * direction, rel=1e-12)
    assert float(by_y0) == pytest.approx(float(y), rel=1e-12)
    assert float(by_at) == pytest.approx(-float(y) - 2.0, rel=1e-12)
    steps = solver(y0, direction * ENDS, breakpoints=at, at="steps")
    assert len(steps.ts) == 11 and steps.ts[5] == 0.5 * direction
    assert torch.equal(steps(steps.ts), steps.ys)
    assert float(grad(steps.ys[-1].sum(), at)[0]) == pytest.approx(-float(y) - 2.0, rel=1e-12)


# ------------------------------------------------------------------------------------------ states


class Pair(NamedTuple):
    x: torch.Tensor
    v: torch.Tensor


def test_structures_complex_and_scalar_states_and_arguments():
    t = torch.tensor([[0.1, 0.9]], dtype=D, requires_grad=True)
    turn = torch.tensor(1.5, dtype=D, requires_grad=True)
    options = {"method": "rk4", "step_size": 0.05, "dense": True, "compile": False}
    z0 = torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True)
    solution = pnode.Solver(lambda t, y, w: 1j * w * y, **options)(z0, ENDS, args=turn)
    assert solution(t).shape == (1, 2, 1) and solution(t).is_complex()
    expected = z0 * torch.exp(1j * turn * t)[..., None]
    assert torch.allclose(solution(t), expected, atol=1e-5)
    ours, theirs = (
        grad(one.real.sum(), z0, turn, t) for one in (solution(t), expected)
    )  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    pair = Pair(torch.ones((), dtype=D), torch.zeros(2, dtype=D))
    solution = pnode.Solver(lambda t, y: Pair(y.v.sum(), -y.x.expand(2)), **options)(pair, ENDS)
    found = solution(t)
    assert isinstance(found, Pair) and found.x.shape == (1, 2) and found.v.shape == (1, 2, 2)
    assert torch.allclose(found.x, torch.cos(math.sqrt(2.0) * t), atol=1e-6)
    scalar = pnode.Solver(lambda t, y: -y, **options)(torch.tensor(1.0, dtype=D), ENDS)
    assert scalar(0.5).shape == () and scalar([0.1, 0.2]).shape == (2,)
    assert scalar(torch.tensor(1)).item() == scalar.ys[-1].item()
    assert scalar(torch.zeros(0, 3)).shape == (0, 3)


def test_single_precision():
    field = Field().float()
    y0 = initial().detach().float().requires_grad_()
    t = torch.tensor([0.0, 0.3, 1.0])
    solution = pnode.Solver(field, method="bosh3", step_size=0.01, dense=True, compile=False)(y0, t)
    assert torch.equal(solution(t), solution.ys) and solution(t).dtype is torch.float32
    inside = torch.tensor([0.123, 0.777])
    slopes = torch.stack([field(s, y) for s, y in zip(inside, solution(inside), strict=True)])
    # Relative to f, and not to the state over the length of a step.
    assert torch.allclose(solution.derivative(inside), slopes, rtol=1e-4, atol=2e-6)


def test_imex_symplectic_and_costs():
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    split = pnode.Solver(
        implicit=Reaction(), explicit=Transport(), method="ark4", step_size=0.1, dense=True,
        compile=False, cost=lambda t, y: y.sum(),
    )  # fmt: skip
    solution = split(y0, ENDS)
    assert solution(TIMES).shape == (2, 3, 2)
    f = split.implicit(TIMES[0, 0], solution(TIMES)[0, 0]) + split.explicit(
        TIMES[0, 0], solution(TIMES)[0, 0]
    )
    assert torch.allclose(solution.derivative(TIMES)[0, 0], f, rtol=1e-3)
    swing = pnode.Solver(
        lambda t, y: (y[1], -y[0]), method="velocity_verlet", step_size=0.01,
        dense=True, compile=False,
    )  # fmt: skip
    solution = swing(tuple(START.clone().requires_grad_().split(1)), ENDS)
    assert torch.allclose(torch.cat(solution(TIMES), -1), exact(TIMES), atol=1e-4)


def test_without_gradients_and_in_inference_mode():
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method="dopri5", dense=True, compile=False)
    differentiable = solver(y0, ENDS)
    with torch.no_grad():
        constant = solver(y0, ENDS)
        assert not differentiable(TIMES).requires_grad
    assert not constant(TIMES).requires_grad and differentiable(TIMES).requires_grad
    t = TIMES.clone().requires_grad_()
    (by_t,) = grad(constant(t).sum(), t)
    assert torch.allclose(by_t, constant.derivative(TIMES).sum((-1, -2)), rtol=1e-12)
    with torch.inference_mode():
        assert torch.equal(solver(y0.detach(), ENDS)(TIMES), constant(TIMES))


interpreted = interpreted_graphs


def test_compiled_solves(interpreted):
    field, y0 = Field(), initial()
    options = {"method": "heun2", "step_size": 0.1, "dense": True}
    compiled = pnode.Solver(field, compile=True, **options)(y0, OUTPUTS)
    plain = pnode.Solver(field, compile=False, **options)(y0, OUTPUTS)
    assert interpreted
    assert torch.equal(compiled(TIMES), plain(TIMES))
    ours, theirs = (grad(one(TIMES).sum(), y0)[0] for one in (compiled, plain))
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------- refusals


def test_refusals(tmp_path):
    solver = pnode.Solver(lambda t, y: -y, dense=True, compile=False)
    solution = solver(torch.ones(1, dtype=D), [1.0, 3.0])
    for t in (0.9, 3.1, math.nan, math.inf, [2.0, -math.inf]):
        with pytest.raises(pnode.ConfigurationError, match=r"from 1\.0 to 3\.0"):
            solution(t)
    assert torch.equal(solution(torch.tensor(3.0000002)), solution.ys[-1])  # 3 in float32
    for t in (1j, "now", None, torch.tensor(True), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(pnode.ConfigurationError, match=r"t(=| has)"):
            solution(t)
    with pytest.raises(pnode.ConfigurationError, match="side='left'"):
        solution.derivative(2.0, "left")
    plain = pnode.Solver(lambda t, y: -y, compile=False)(torch.ones(1, dtype=D), [1.0, 3.0])
    others = [plain, pickle.loads(pickle.dumps(solution)), copy.deepcopy(solution)]
    pytest.importorskip("h5py")
    solution.save(tmp_path / "a.h5")
    for one in (*others, pnode.load(tmp_path / "a.h5")):
        with pytest.raises(pnode.ConfigurationError, match="dense=True"):
            one(2.0)
        with pytest.raises(pnode.ConfigurationError, match="dense=True"):
            one.derivative(2.0)
    alone = solver(torch.ones(1, dtype=D), [1.0])
    assert torch.equal(alone(1.0), alone.ys[0])
    with pytest.raises(pnode.ConfigurationError, match="no step"):
        alone.derivative(1.0)


def test_what_the_ends_of_steps_do_not_go_with(tmp_path):
    y0 = torch.ones(1, dtype=D)
    for options, text in (
        ({"gradient": "continuous"}, "gradient='continuous'"),
        (
            {"checkpointing": pnode.Checkpointing(memory="1MiB", disk=tmp_path, resume="a")},
            "resume='a'",
        ),
    ):
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.Solver(lambda t, y: -y, compile=False, **options)(y0, ENDS, at="steps")
    with pytest.raises(pnode.ConfigurationError, match="at='ends'"):
        pnode.Solver(lambda t, y: -y)(y0, ENDS, at="ends")


def test_a_field_that_has_changed():
    class Changing(torch.nn.Module):
        rate = 1.0

        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.ones((), dtype=D))

        def forward(self, t, y):
            return -self.rate * self.k * y

    field, y0 = Changing(), torch.ones(1, dtype=D)
    solver = pnode.Solver(field, method="bosh3", dense=True, compile=False)
    solution = solver(y0, ENDS)
    field.rate = 1.01
    with pytest.raises(pnode.errors.FieldChanged, match="lead elsewhere"):
        solution(0.9)
    field.rate = 1.0
    solution(0.9)
    with torch.no_grad():
        field.k.mul_(2.0)
    with pytest.raises(pnode.errors.FieldChanged, match="written into"):
        solution(0.9)
    with torch.no_grad():
        field.k.mul_(0.5)
    solution = solver(y0, ENDS)
    y0.mul_(2.0)
    with pytest.raises(pnode.errors.FieldChanged, match="written into"):
        solution(0.9)

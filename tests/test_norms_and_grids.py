"""Own error norms, PID controllers, prescribed steps, callbacks, hints."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from replica import replica

import pnode

D = torch.float64
SPAN = torch.tensor([0.0, 2.0], dtype=D)
START = torch.tensor([1.0, 0.0, 0.1, 0.0], dtype=D)
ONE_OF_EACH = ["dopri5", "bosh3", "cn", "es325", "rodaspr", "ark3", "radau5", "bdf"]


def two_scales(t, y):
    a, b, c, d = y.unbind(-1)
    return torch.stack([b, -a, 10.0 * d, -10.0 * c], dim=-1)


def half(t, y):
    return 0.5 * two_scales(t, y)


def ends_of(y0=START, rhs=two_scales, t=SPAN, method="dopri5", **keywords):
    """Accepted step ends, and the solution."""
    ends = []
    keywords = {"rtol": 1e-4, "atol": 1e-4, "compile": False} | keywords
    form = {"implicit": half, "explicit": half} if method == "ark3" else {"rhs": rhs}
    monitor = lambda step, t, y: ends.append(t)  # noqa: E731
    solver = pnode.Solver(**form, method=method, monitor=monitor, **keywords)
    return ends, solver(y0, t)


def rms(e):
    return e.square().mean().sqrt()


# ------------------------------------------------------------------------------------- own norms


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_the_usual_norms_written_out_take_the_same_steps(method):
    """By PETSc's estimate and formula: also those of theta methods, by round-off."""
    default, _ = ends_of(method=method)
    written, _ = ends_of(method=method, norm=rms)
    assert written == pytest.approx(default, rel=1e-11)
    largest, _ = ends_of(method=method, norm="max")
    written, _ = ends_of(method=method, norm=lambda e: e.abs().max())
    assert written == pytest.approx(largest, rel=1e-11)
    assert len(largest) > len(default)


def test_a_seminorm_looks_at_a_part():
    """The slow pair alone: the steps of the slow pair by itself."""
    part, _ = ends_of(norm=lambda e: rms(e[:2]), rtol=1e-6, atol=1e-6)
    alone, _ = ends_of(START[:2], lambda t, y: torch.stack([y[1], -y[0]]), rtol=1e-6, atol=1e-6)
    assert part == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("kind", ["tuple", "dict", "complex", "float32", "scalar", "cost"])
def test_norms_get_the_structure_of_the_state(kind):
    seen = []

    def norm(e):
        seen.append(e)
        if isinstance(e, dict):
            e = tuple(e.values())
        return max(rms(part.abs()) for part in (e if isinstance(e, tuple) else (e,)))

    y0, rhs, more = START, two_scales, {}
    if kind == "tuple":
        y0, rhs = (START[:2], START[2:]), lambda t, y: (half(t, torch.cat(y))[:2], -y[1])
    elif kind == "dict":
        y0, rhs = {"q": START}, lambda t, y: {"q": two_scales(t, y["q"])}
    elif kind == "complex":
        y0, rhs = torch.tensor([1.0 + 0.5j], dtype=torch.complex128), lambda t, y: 1j * y
    elif kind == "float32":
        y0 = START.float()
    elif kind == "scalar":
        y0, rhs = torch.tensor(1.0, dtype=D), lambda t, y: -y
    else:
        more = {"cost": lambda t, y: y.square().sum()}
    ends, _ = ends_of(y0, rhs, norm=norm, t=SPAN.flip(0), **more)
    first = seen[0]
    for own, given in zip(
        torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(y0), strict=True
    ):
        assert own.shape == given.shape and own.dtype == given.dtype
    assert type(first) is type(y0) and not any(
        leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(first)
    )
    if kind == "cost":
        assert ends == ends_of(y0, rhs, norm=norm, t=SPAN.flip(0))[0]


def test_infinite_tolerances_count_in_no_maximum():
    """The factor that keeps a mean over other entries right is not that of a maximum."""
    atol = torch.tensor([1e-4, 1e-4, math.inf, math.inf], dtype=D)
    part, _ = ends_of(norm="max", atol=atol)
    alone, _ = ends_of(START[:2], lambda t, y: torch.stack([y[1], -y[0]]), norm="max")
    assert part == pytest.approx(alone, rel=1e-12)


def test_gradients_are_those_of_the_steps():
    y0 = START.clone().requires_grad_()
    ends, solution = ends_of(y0, method="bosh3", norm=lambda e: e.abs().max(),
                             controller=pnode.PID(0.3, 0.3))  # fmt: skip
    (ours,) = torch.autograd.grad(solution.ys[-1].square().sum(), y0)
    states = replica(two_scales, "bosh3", y0, [0.0, *ends])
    (theirs,) = torch.autograd.grad(states[-1].square().sum(), y0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-11


def test_norms_that_are_no_norms():
    for norm, text in (
        (lambda e: e, r"norm returned \(4,\)"),
        (lambda e: -1.0, "norm returned -1.0"),
        (lambda e: math.nan, "norm returned nan"),
        (lambda e: None, "norm returned None"),
        (lambda e: True, "norm returned True"),
        (lambda e: e.sum() * 1j, "norm returned"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=text):
            ends_of(norm=norm)
    with pytest.raises(ZeroDivisionError):
        ends_of(norm=lambda e: 1 / 0)


def test_what_norms_do_not_go_with():
    for keywords, text in (
        ({"norm": rms, "step_size": 0.1}, "fixed"),
        ({"norm": "max", "method": "rk4", "steps": [0.0, 1.0]}, "fixed"),
        ({"norm": rms, "controller": "pi"}, r"controller='pi'.*pnode\.PID"),
        ({"norm": rms, "gradient": "continuous"}, "norm= is given"),
        ({"norm": rms, "sensitivity_control": "random"}, "norm="),
        ({"norm": "max", "samples": "independent"}, "norm='max'"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.Solver(two_scales, **keywords)
    solver = pnode.Solver(two_scales, norm=rms, petsc_options={"ts_adapt_safety": 0.8})
    with pytest.raises(pnode.ConfigurationError, match=r"ts_adapt_safety.*factormin"):
        solver(START, SPAN)


def test_failing_steps_are_shortened():
    """f is NaN beyond y = 1.25: the steps feel their way, and the solve goes through."""

    def rhs(t, y):
        return torch.where(y > 1.25, math.nan, torch.cos(3.0 * t))

    _, solution = ends_of(
        torch.tensor([0.9], dtype=D), rhs, norm=rms, first_step=0.6, rtol=1e-7, atol=1e-7,
        controller=pnode.PID(0.4, 0.3), t=torch.tensor([0.0, 1.0], dtype=D),
    )  # fmt: skip
    assert solution.stats.rejected
    assert float(solution.ys[-1, 0]) == pytest.approx(0.9 + math.sin(3.0) / 3.0, abs=1e-5)
    with pytest.raises(pnode.NonFiniteVectorField):
        ends_of(rhs=lambda t, y: y * math.nan, norm=rms)


def test_events_and_dense_output():
    """Steps end early at an event, and norms see those that follow."""
    event = pnode.Event(lambda t, y: y[0], terminal=False)
    for method in ("dopri5", "cn"):
        found = ends_of(method=method, norm=rms, event_fn=event)[1]
        expected = ends_of(method=method, event_fn=event)[1]
        torch.testing.assert_close(found.ys, expected.ys, rtol=1e-9, atol=1e-9)
        assert float(found.events[0].times[0]) == pytest.approx(math.pi / 2, abs=1e-2)
    inside = torch.linspace(0.0, 2.0, 11, dtype=D)
    _, dense = ends_of(norm=rms, dense=True, t=inside)
    assert torch.equal(dense.ys, ends_of(dense=True, t=inside)[1].ys)


# ------------------------------------------------------------------------------------------- PID


def predicted(slope, rule, atol, h, end):
    """Steps of heun2 for y' = slope(t): error h/2 (k_2 - k_1), of order 2; diffrax's recursion."""
    b = (rule.pcoeff + rule.icoeff + rule.dcoeff, -(rule.pcoeff + 2 * rule.dcoeff), rule.dcoeff)
    before, t, ends, rejected = [1.0, 1.0], 0.0, [], 0
    while t + h < end:
        inverse = atol / abs(h / 2 * (slope(t + h) - slope(t)))
        keep = inverse >= 1.0
        factor = rule.safety
        for value, exponent in zip((inverse, *before), b, strict=True):
            factor *= value ** (exponent / 2)
        low, high = (1.0, rule.factormax) if keep else (rule.factormin, rule.safety)
        if keep:
            t += h
            ends.append(t)
            before = [inverse, before[0]]
        rejected += not keep
        h *= min(max(factor, low), high)
    return ends, rejected


@pytest.mark.parametrize(
    "rule",
    [pnode.PID(), pnode.PID(0.4, 0.3), pnode.PID(0.2, 0.3, 0.05, 0.3, 4.0, 0.8)],
)
def test_steps_are_those_of_the_recursion(rule):
    def slope(t):
        return math.cos(3.0 * t) + 4.0 / (1.0 + 400.0 * (t - 1.0) ** 2)

    expected, rejected = predicted(slope, rule, 1e-3, 0.05, 2.0)
    ends, solution = ends_of(
        torch.zeros(1, dtype=D), lambda t, y: torch.full_like(y, slope(float(t))), method="heun2",
        rtol=0.0, atol=1e-3, first_step=0.05, controller=rule,
    )  # fmt: skip
    assert rejected > 0 and len(expected) > 20
    assert solution.stats.rejected >= rejected
    assert ends[: len(expected) - 2] == pytest.approx(expected[:-2], rel=1e-9)


@pytest.mark.parametrize("method", ONE_OF_EACH[:-1])
def test_errors_follow_the_tolerance(method):
    """And a solve is the same each time: nothing is remembered from one to the next."""
    end = torch.tensor(
        [math.cos(2.0), -math.sin(2.0), 0.1 * math.cos(20.0), -0.1 * math.sin(20.0)], dtype=D
    )
    errors = []
    for tolerance in (1e-3, 1e-5):
        form = {"implicit": half, "explicit": half} if method == "ark3" else {"rhs": two_scales}
        solver = pnode.Solver(**form, method=method, rtol=tolerance, atol=tolerance,
                              controller=pnode.PID(0.4, 0.3), compile=False)  # fmt: skip
        first = solver(START, SPAN).ys
        assert torch.equal(solver(START, SPAN).ys, first)
        errors.append(float((first[-1] - end).norm()))
    # Two decades of tolerance; the estimate of theta methods is of order 2, as their error is.
    assert 10.0 < errors[0] / errors[1] < 2000.0


def test_limits_and_longest_steps():
    ends, _ = ends_of(controller=pnode.PID(), max_step=0.03)
    assert np.diff([0.0, *ends]).max() <= 0.03 * (1.0 + 1e-12)
    with pytest.raises(pnode.StepSizeUnderflow, match="min_step"):
        ends_of(controller=pnode.PID(), min_step=0.5, rtol=1e-9, atol=1e-9)


def test_unusable_controllers():
    nan = math.nan
    for keywords in (
        {"safety": 1.0}, {"safety": 0.0}, {"factormin": 0.0}, {"factormin": 0.95},
        {"factormax": 0.5}, {"icoeff": 0.0}, {"pcoeff": "a"}, {"dcoeff": nan}, {"icoeff": True},
    ):  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match=next(iter(keywords))):
            pnode.PID(**keywords)
    for keywords, text in (
        ({"method": "bdf"}, "'bdf'.*itself"),
        ({"step_size": 0.1}, "no controller"),
        ({"samples": "independent"}, "controller=PID"),
        ({"petsc_options": {"ts_adapt_clip": "0.1,5"}}, "ts_adapt_clip.*factormax"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.Solver(two_scales, controller=pnode.PID(), **keywords)(START, SPAN)


def test_machine_code_follows_neither_own_norms_nor_petscs_filters():
    for keywords, text in (
        ({"norm": "max"}, "norm='max'"), ({"controller": "pi"}, "'PI42'"),
        ({"norm": lambda error: error.abs().max()}, "norm=<function"),
    ):  # fmt: skip
        solver = pnode.Solver(two_scales, compile=True, **keywords)
        found, plain = solver(START, SPAN), pnode.Solver(two_scales, compile=False, **keywords)
        assert found.stats.steps == plain(START, SPAN).stats.steps
        torch.testing.assert_close(found.ys, plain(START, SPAN).ys, rtol=1e-12, atol=1e-15)
        assert text in repr(solver) and "compiled='the vector field'" in repr(solver)


class Pulse(torch.nn.Module):
    """Steps are rejected here."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, t, y):
        return 4.0 / (1.0 + 400.0 * (t - 1.0) ** 2) - self.rate * y * torch.cos(t)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "es325", "rodaspr"])
def test_machine_code_follows_a_pid(method, direction):
    """The same steps, rejected ones too; what was remembered is forgotten at a break point."""
    field, t = Pulse(), torch.tensor([0.0, 1.3, 2.0], dtype=D)
    t, breaks = (t, [0.3]) if direction > 0 else (2.0 - t, [1.7])
    tolerance = 1e-6 if method == "dopri5" else 1e-4
    keywords = {"method": method, "controller": pnode.PID(0.4, 0.3, 0.05), "rtol": tolerance}
    for extra in ({}, {"checkpointing": 900}, {"dense": True}):
        found = []
        for compiled in (True, False):
            y0 = torch.tensor([1.0, -0.5], dtype=D, requires_grad=True)
            solver = pnode.Solver(field, compile=compiled, **keywords, **extra)
            solution = solver(y0, t, breakpoints=None if extra else breaks)
            grads = torch.autograd.grad(solution.ys.square().sum(), (y0, field.rate))
            found.append((solution.ys.detach(), *grads))
            counts = solution.stats.steps, solution.stats.rejected
            assert not compiled or "compiled=" in repr(solver)
            if compiled:
                expected = counts
        assert counts == expected and counts[1] > 0 and counts[0] < 200
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------- grids


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, t, y):
        return -self.rate * y * torch.cos(t)


GRID = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=D)


@pytest.mark.parametrize(
    "method", ["rk4", "dopri5", "ssprk43", "cn", "es325", "rodaspr", "radau5", "bdf3"]
)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_steps_of_a_grid_are_those_from_output_to_output(method, direction):
    field, grid = Field(), direction * GRID
    found = {}
    for name, keywords, t in (("grid", {"steps": grid}, grid[[0, 3, 5]]),
                              ("outputs", {"step_size": 9.0}, grid)):  # fmt: skip
        y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        solution = pnode.Solver(field, method=method, compile=False, **keywords)(y0, t)
        assert solution.stats.steps == 5
        ys = solution.ys if len(t) == 3 else solution.ys[[0, 3, 5]]
        loss = ys.square().sum()
        found[name] = [ys.detach(), *torch.autograd.grad(loss, (y0, field.rate))]
    for ours, theirs in zip(found["grid"], found["outputs"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf3"])
def test_machine_code_follows_grids(method):
    """To a few units in the last place, and of what is solved for, to its tolerance."""
    field, start = Field(), torch.tensor([1.0, 0.5], dtype=D)
    for grid, extra in ((GRID, {}), (-GRID, {"checkpointing": 400}), (GRID, {"dense": True})):
        found, t = [], grid[[0, 3, 5]]
        for compiled in (True, False):
            y0 = start.clone().requires_grad_()
            solver = pnode.Solver(field, method=method, steps=grid, compile=compiled, **extra)
            solution = solver(y0, t, breakpoints=None if extra else [0.25])
            grads = torch.autograd.grad(solution.ys.square().sum(), (y0, field.rate))
            found.append((solution.ys.detach(), *grads))
            assert solution.stats.steps == 5
            assert not compiled or "compiled=" in repr(solver)
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_grids_with_all_that_goes_with_them():
    field, y0 = Field(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    exact = lambda t: y0.detach() * torch.exp(-2.0 * torch.sin(t))  # noqa: E731
    times = torch.linspace(0.0, 1.0, 5, dtype=D)
    fine = torch.linspace(0.0, 1.0, 33, dtype=D) ** 2
    dense = pnode.Solver(field, method="rk4", steps=fine, dense=True)(y0, times)
    assert dense.stats.steps == 32
    torch.testing.assert_close(dense.ys[2].detach(), exact(times[2]), rtol=1e-5, atol=0.0)
    few = pnode.Solver(field, method="rk4", steps=fine, checkpointing=200)(y0, fine[[0, -1]])
    many = pnode.Solver(field, method="rk4", steps=fine)(y0, fine[[0, -1]])
    ours, theirs = (torch.autograd.grad(s.ys[-1].sum(), y0)[0] for s in (few, many))
    assert torch.equal(ours, theirs) and few.stats.backward.recomputed
    parts = pnode.Solver(field, method="rk4", steps=fine)(y0, fine[[0, -1]], breakpoints=fine[[7]])
    torch.testing.assert_close(parts.ys, many.ys, rtol=1e-13, atol=0.0)
    event = pnode.Solver(field, method="rk4", steps=fine, event_fn=lambda t, y: y[0] - 0.5)
    found = event(y0, fine[[0, -1]]).event_time
    assert float(found.detach()) == pytest.approx(math.asin(0.5 * math.log(2.0)), abs=1e-6)
    cost = pnode.Solver(field, method="rk4", steps=fine, cost=lambda t, y: y[0] ** 0)
    assert float(cost(y0, fine[[0, -1]]).costs[-1]) == pytest.approx(1.0, rel=1e-13)
    second = torch.func.hessian(lambda y: many_of(field, fine, y))(y0.detach())
    torch.testing.assert_close(second, torch.eye(2, dtype=D) * 2 * math.exp(-4 * math.sin(1.0)),
                               rtol=1e-5, atol=1e-12)  # fmt: skip
    one = pnode.odeint(field, y0, fine[[0, -1]], method="rk4", steps=fine)
    assert torch.equal(one, many.ys)


def many_of(field, grid, y):
    return pnode.Solver(field, method="rk4", steps=grid)(y, grid[[0, -1]]).ys[-1].square().sum()


def inside(y, by=1.0):
    """A grid that is made where the solve is, and may depend on something."""
    return many_of(Field(), torch.linspace(0.0, 1.0, 5, dtype=D) * by, y)


def of_itself(y):
    return inside(y, y.sum() / y.sum().detach())


def test_a_grid_made_inside_of_a_transform_is_a_constant():
    grad, jvp, y = torch.func.grad, torch.func.jvp, torch.tensor([1.0, 0.5], dtype=D)
    slope, hessian = grad(inside)(y), torch.func.hessian(inside)(y)
    fixed = torch.linspace(0.0, 1.0, 5, dtype=D)
    assert torch.equal(slope, grad(lambda y: many_of(Field(), fixed, y))(y))
    assert torch.equal(hessian, torch.func.hessian(lambda y: many_of(Field(), fixed, y))(y))
    for refused in (
        lambda: grad(of_itself)(y),
        lambda: jvp(of_itself, (y,), (y,)),
        lambda: grad(lambda y: grad(lambda z: inside(z, y.sum()))(y).sum())(y),
        lambda: jvp(lambda y: grad(lambda z: inside(z, y.sum()))(y).sum(), (y,), (y,)),
        lambda: grad(lambda y: jvp(lambda z: inside(z, y.sum()), (y,), (y,))[1])(y),
        lambda: jvp(lambda y: jvp(lambda z: inside(z, y.sum()), (y,), (y,))[1], (y,), (y,)),
        lambda: torch.func.vmap(lambda by: inside(y, by))(y),
    ):
        with pytest.raises(pnode.ConfigurationError, match="steps requires grad"):
            refused()


def test_unusable_grids():
    for grid, text in (
        ([0.0, 0.0], r"steps\[1\]"), ([0.0, 1.0, 0.5], r"steps\[2\] = 0.5"), ([0.0], "two or more"),
        ([0.0, math.nan], "NaN"), ([0.0, math.inf], "infinity"), (torch.ones(2, 2), "1-D"),
        ([True, False], r"steps\[0\]=True"), (torch.tensor([0j, 1.0]), "real"),
        (["a", "b"], "grid of times"),
        (GRID.clone().requires_grad_(), r"requires grad.*steps\.detach"),
    ):  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.Solver(Field(), steps=grid)
    for keywords in (
        {"step_size": 0.1}, {"samples": "independent"}, {"gradient": "continuous"},
        {"sensitivity_control": "random"}, {"controller": "pi"}, {"controller": pnode.PID()},
    ):  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match="grid"):
            pnode.Solver(Field(), steps=GRID, **keywords)
    y0 = torch.ones(1, dtype=D)
    for t, text in (
        ([0.0, 0.2, 1.0], "t has 0.2.*nearest there is 0.25.*dense=True"),
        ([0.0, 2.0], "from 0.0 to 1.0, and t is from 0.0 to 2.0"),
        ([1.0, 0.0], "t is from 1.0 to 0.0"), (torch.tensor([0.0, 0.1, 1.0]), "precision"),
    ):  # fmt: skip
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.Solver(Field(), steps=GRID)(y0, t)
    with pytest.raises(pnode.ConfigurationError, match=r"breakpoints has 0\.5"):
        pnode.Solver(Field(), steps=GRID)(y0, [0.0, 1.0], breakpoints=[0.5])


# ------------------------------------------------------------------------- torchdiffeq, and hints


class Told(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, t, y):
        return -50.0 * (y - torch.cos(t))

    def callback_step(self, t0, y0, dt):
        self.seen.append(("try", float(t0), y0.clone(), float(dt)))

    def callback_accept_step(self, t0, y0, dt):
        self.seen.append(("accept", float(t0), y0.clone(), float(dt)))

    def callback_reject_step(self, t0, y0, dt):
        self.seen.append(("reject", float(t0), y0.clone(), float(dt)))


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_callbacks_are_called(direction):
    """Each attempt is announced, and then accepted or rejected; dt is positive, as there."""
    told, y0 = Told(), torch.ones(2, dtype=D)
    span = direction * torch.tensor([0.0, 0.4], dtype=D)
    options = {"first_step": 0.3, "norm": lambda e: e.abs().max(), "ifactor": 5.0}
    ys = pnode.odeint(told, y0, span, rtol=1e-4, atol=1e-4, options=options)
    tries, verdicts = told.seen[::2], told.seen[1::2]
    assert [kind for kind, *_ in tries] == ["try"] * len(verdicts)
    kinds = [kind for kind, *_ in verdicts]
    assert set(kinds) == {"accept", "reject"}
    for one, other in zip(tries, verdicts, strict=True):
        assert one[1] == other[1] and one[3] == other[3] > 0.0 and torch.equal(one[2], other[2])
    steps = sum(dt for kind, _, _, dt in verdicts if kind == "accept")
    assert steps == pytest.approx(0.4)
    assert torch.equal(told.seen[0][2], y0) and ys.shape == (2, 2)


def test_torchdiffeqs_factors_are_those_of_a_pid():
    options = {"safety": 0.8, "ifactor": 4.0, "dfactor": 0.3}
    y0 = torch.ones(2, dtype=D)
    found = pnode.odeint(lambda t, y: -y, y0, SPAN, options=options)
    rule = pnode.PID(safety=0.8, factormax=4.0, factormin=0.3)
    assert torch.equal(found, pnode.odeint(lambda t, y: -y, y0, SPAN, controller=rule))
    with pytest.raises(pnode.ConfigurationError, match="both given"):
        pnode.odeint(lambda t, y: -y, y0, SPAN, options=options, controller="pi")


def test_hints_are_given_once(caplog):
    caplog.set_level(logging.WARNING, "pnode")
    stiff = pnode.Solver(lambda t, y: -1000.0 * (y - torch.cos(t)), compile=False)
    for _ in range(2):
        stiff(torch.ones(1, dtype=D), [0.0, 8.0])
    saw = pnode.Solver(lambda t, y: torch.sign(torch.sin(40.0 * t)) + 0.0 * y, compile=False)
    saw(torch.ones(1, dtype=D), [0.0, 5.0])
    zero = torch.zeros(1, dtype=D)

    def heat(t, y):
        return 1e6 * torch.cat([zero, y, zero]).diff().diff()

    krylov = pnode.Solver(heat, method="cn", step_size=0.01, jacobian="matrix-free", compile=False)
    krylov(torch.rand(80, dtype=D, generator=torch.Generator().manual_seed(0)), [0.0, 1.0])
    pnode.Solver(two_scales, compile=False)(START, [0.0, 20.0])
    texts = [record.getMessage() for record in caplog.records]
    assert ["stiff" in texts[0], "rejected" in texts[1], "Krylov" in texts[2]] == [True] * 3
    assert len(texts) == 3


def test_what_was_public_of_controllers():
    with pytest.warns(DeprecationWarning, match=r"pnode\.controllers\.DEADBEAT is pnode's own"):
        from pnode.controllers import DEADBEAT
    assert DEADBEAT.exponents == (1.0, 0.0, 0.0)
    with pytest.raises(ImportError, match="nothing"):
        from pnode.controllers import nothing  # noqa: F401

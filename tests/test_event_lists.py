"""Several events, directions, and events that do not end a solve."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings

import pytest
import torch
from replica import rk_step
from test_compiled import interpreted

import pnode
from pnode import Event
from pnode.solvers.methods import find_method

__all__ = ["interpreted"]  # a fixture

D = torch.float64
METHODS = {
    "dopri5": {"rtol": 1e-9, "atol": 1e-9}, "tsit5": {"rtol": 1e-9, "atol": 1e-9},
    "rk4": {"step_size": 0.03}, "ssprk104": {"step_size": 0.05}, "cn": {"step_size": 0.02},
    "es325": {"rtol": 1e-6, "atol": 1e-6}, "rodaspr": {"rtol": 1e-8, "atol": 1e-8},
    "bdf": {"rtol": 1e-9, "atol": 1e-9}, "bdf2": {"step_size": 0.02},
}  # fmt: skip
# What the method's error makes of the time: h^2 t / 12, h^2 t / 3, and some tolerances.
EXACT = {"cn": 4e-4, "bdf2": 1.6e-3, "es325": 1e-4}


def turn(t, y):
    """Of which y[0] = cos t from (1, 0)."""
    return torch.stack([y[1], -y[0]])


def start():
    return torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)


def times(*values):
    return torch.tensor(values, dtype=D)


def events():
    """Return cos t falling, sin t in both directions, and the end."""
    return [
        Event(lambda t, y: y[0], direction=-1, terminal=False),
        Event(lambda t, y: y[1], terminal=False),
        lambda t, y: t - 9.0,
    ]


class Level(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, t, y):
        return y[0] - self.at


def solve(method, event_fn, t, y0=None, f=turn, **keywords):
    options = METHODS.get(method, {}) | keywords
    return pnode.Solver(f, method=method, event_fn=event_fn, **options)(
        start() if y0 is None else y0, t
    )


# ----------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_times_states_and_derivatives(method, dense):
    """Against the solution r cos(t + a) of (1, 0) moved: r = 1 + da, a = -db."""
    y0 = start()
    solution = solve(method, events(), times(0.0, 1.0, 5.0, 20.0), y0, dense=dense)
    accuracy = EXACT.get(method, 1e-7)
    assert (solution.reason, solution.event) == ("event", 2)
    assert solution.ts.tolist()[:3] == [0.0, 1.0, 5.0]
    assert float(solution.event_time) == pytest.approx(9.0, abs=1e-11)
    exact = [math.cos(t) for t in (0.0, 1.0, 5.0, 9.0)]
    if not dense:
        assert solution.ys[:, 0].tolist() == pytest.approx(exact, abs=10 * accuracy)
    falling, turning, end = solution.events
    assert falling.times.tolist() == pytest.approx([math.pi / 2, 5 * math.pi / 2], abs=accuracy)
    # The start is on this event, which is not found before it is crossed anew.
    assert turning.times.tolist() == pytest.approx([math.pi, 2 * math.pi], abs=accuracy)
    assert end.times.tolist() == [float(solution.event_time)]
    assert torch.equal(end.states[-1], solution.ys[-1])
    assert falling.states[:, 1].tolist() == pytest.approx([-1.0, -1.0], abs=accuracy)
    assert abs(falling.states[:, 0]).max() < 1e-9
    # t* moves by -da, at -r sin(t* + a) by r; the states by f dt* more.
    (slope,) = torch.autograd.grad(falling.times[1], y0, retain_graph=True)
    assert slope.tolist() == pytest.approx([0.0, 1.0], abs=10 * accuracy)
    (slope,) = torch.autograd.grad(falling.states[1, 1], y0, retain_graph=True)
    assert slope.tolist() == pytest.approx([-1.0, 0.0], abs=10 * accuracy)
    (slope,) = torch.autograd.grad(turning.states[0, 0], y0, retain_graph=True)
    assert slope.tolist() == pytest.approx([-1.0, 0.0], abs=10 * accuracy)
    (slope,) = torch.autograd.grad(solution.ys[-1, 0], y0)
    assert slope.tolist() == pytest.approx([math.cos(9.0), math.sin(9.0)], abs=30 * accuracy)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "es325", "bdf"])
def test_the_first_event_is_that_which_ends_a_solve(method):
    """Up to there both take the same steps: same bits."""

    def found(terminal):
        y0 = start()
        event = Event(lambda t, y: y[0] - 0.3 * y[1], terminal=terminal)
        solution = solve(method, event, times(0.0, 0.5, 4.0), y0)
        (one,) = solution.events
        loss = one.times[0] ** 2 + (one.states[0] * times(1.0, 3.0)).sum() + solution.ys[1, 0]
        return one.times[0].item(), one.states[0].tolist(), torch.autograd.grad(loss, y0)[0]

    (time, state, slope), (other, others, slopes) = found(True), found(False)
    if method == "es325":  # whose steps start afresh where events may cut them
        assert [time, *state] == pytest.approx([other, *others], rel=1e-12)
        torch.testing.assert_close(slope, slopes, rtol=1e-9, atol=0)
    else:
        assert (time, state) == (other, others)
        torch.testing.assert_close(slope, slopes, rtol=1e-13, atol=0)


def test_gradients_are_those_of_the_steps_taken():
    """Of times, states and outputs together, against autograd through rk4 steps on the same grid.

    At the event t* = T - g(y_T) / (g_t + g_y f) and y* = y_T + f (t* - T), to first order.
    """
    rate = torch.tensor(0.4, dtype=D, requires_grad=True)
    level = torch.tensor(0.2, dtype=D, requires_grad=True)

    def f(t, y):
        return torch.stack([y[1] * (2.0 + torch.cos(t)), -torch.sin(y[0]) - 0.2 * rate * y[1]])

    def g(t, y):
        return y[0] - level * torch.exp(-0.1 * t)

    grid, y0 = [0.0], start()
    solver = pnode.Solver(
        f, method="rk4", step_size=0.1, params=[rate],
        event_fn=[Event(g, terminal=False)], monitor=lambda step, t, y: grid.append(t),
    )  # fmt: skip
    solution = solver(y0, times(0.0, 1.0, 4.0))
    (found,) = solution.events
    assert len(found.times) >= 2
    assert solution.stats.steps == len(grid) - 1 == 40 + len(found.times)

    def loss(whens, states, ys):
        parts = (whens * torch.arange(1.0, len(whens) + 1, dtype=D)).sum(), (states**3).sum()
        return parts[0] + parts[1] + (ys * torch.cos(torch.arange(6.0, dtype=D)).view(3, 2)).sum()

    inputs = [y0, rate, level]
    ours = torch.autograd.grad(loss(found.times, found.states, solution.ys), inputs)

    tableau = {
        "A": [[0] * 4, [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0]],
        "b": [1 / 6, 1 / 3, 1 / 3, 1 / 6], "c": [0, 0.5, 0.5, 1],
    }  # fmt: skip
    nodes = {0.0: y0}
    for a, b in itertools.pairwise(grid):
        nodes[b] = rk_step(f, tableau, a, b - a, nodes[a])
    whens, states = [], []
    for when in found.times.tolist():
        time, y = torch.tensor(when, dtype=D, requires_grad=True), nodes[when]
        value, slope = g(time, y), f(time, y).detach()
        by_time, by_state = torch.autograd.grad(value, (time, y), retain_graph=True)
        shift = -(value - value.detach()) / (by_time + by_state @ slope).detach()
        whens.append(when + shift)
        states.append(y + slope * shift)
        torch.testing.assert_close(found.states[len(states) - 1], y, rtol=1e-13, atol=1e-13)
    ys = torch.stack([nodes[0.0], nodes[1.0], nodes[4.0]])
    theirs = torch.autograd.grad(loss(torch.stack(whens), torch.stack(states), ys), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step_size", [2.0, 0.25, 0.01])
@pytest.mark.parametrize(("direction", "expected"), [
    (0, [0.21, 0.52, 0.73, 1.4]), (1, [0.21, 0.73]), (-1, [0.52, 1.4]),
])  # fmt: skip
def test_directions_within_one_step_and_over_many(step_size, direction, expected):
    """A polynomial of time with these roots, on y = t."""
    event = Event(
        lambda t, y: (y - 0.21) * (y - 0.52) * (y - 0.73) * (1.4 - y), direction, terminal=False
    )
    solution = pnode.Solver(
        lambda t, y: torch.ones_like(y), method="rk4", step_size=step_size, event_fn=event
    )(torch.zeros(1, dtype=D), times(0.0, 2.0))
    assert solution.events[0].times.tolist() == pytest.approx(expected, abs=1e-10)
    assert solution.events[0].states[:, 0].tolist() == pytest.approx(expected, abs=1e-10)
    assert (solution.reason, solution.event, solution.event_time) == ("t_end", None, None)
    assert solution.ys.tolist() == [[0.0], [pytest.approx(2.0)]]


def test_direction_is_along_the_solve():
    """Backwards in time a rising function falls."""

    def found(direction):
        event = Event(lambda t, y: t - 0.5, direction)
        solution = solve("rk4", event, times(1.0, 0.0))
        return solution.reason, [each.times.tolist() for each in solution.events]

    assert found(-1) == ("event", [[pytest.approx(0.5)]])
    assert found(1) == ("t_end", [[]])


def test_the_first_of_several_roots_in_a_step():
    """Whatever their order in the list; what comes after a terminal one is not there."""
    order = [0.7, 0.3, 0.5]
    listed = [
        Event(lambda t, y, at=at: y - at, terminal=at == 0.5) for at in order
    ]  # fmt: skip
    solution = pnode.Solver(
        lambda t, y: torch.ones_like(y), method="rk4", step_size=2.0, event_fn=listed
    )(torch.zeros(1, dtype=D), times(0.0, 2.0))
    found = [each.times.tolist() for each in solution.events]
    assert found == [[], [pytest.approx(0.3)], [pytest.approx(0.5)]]
    assert (solution.reason, solution.event) == ("event", 2)
    assert solution.ts.tolist() == [0.0, pytest.approx(0.5)]
    assert solution.stats.steps == 2


def test_events_at_the_same_time():
    listed = [
        Event(lambda t, y: y - 0.5, terminal=False), Event(lambda t, y: 2.0 * y - 1.0),
        Event(lambda t, y: 1.0 - 2.0 * y, direction=1), Event(lambda t, y: 4.0 * y - 2.0),
    ]  # fmt: skip
    solution = pnode.Solver(
        lambda t, y: torch.ones_like(y), method="rk4", step_size=2.0, event_fn=listed
    )(torch.zeros(1, dtype=D), times(0.0, 2.0))
    assert [len(each.times) for each in solution.events] == [1, 1, 0, 1]
    assert solution.event == 1  # the first that ends it


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf"])
def test_a_solve_goes_on_from_an_event(method):
    """Its state is on the event, which is not found again: as one solve, event by event."""
    whole = solve(method, Event(lambda t, y: y[0], terminal=False), times(0.0, 10.0))
    t, y, found = 0.0, start().detach(), []
    while True:
        solution = solve(method, lambda t, y: y[0], times(t, 10.0), y)
        if solution.reason == "t_end":
            break
        t, y = float(solution.event_time), solution.ys[-1].detach()
        found.append(t)
    assert found == pytest.approx(whole.events[0].times.tolist(), abs=1e-6)
    assert len(found) == 3


def test_a_bounce_below_and_back_is_two_events_and_a_touch_is_one_or_none():
    """y = (t - 1)^2 - d, from above."""

    def found(depth):
        event = Event(lambda t, y: y[0] + 1.0 - depth, terminal=False)
        solution = pnode.Solver(
            lambda t, y: torch.stack([2.0 * (t - 1.0)]), method="rk4", step_size=2.0, event_fn=event
        )(torch.zeros(1, dtype=D), times(0.0, 2.0))
        return solution.events[0].times.tolist()

    assert found(0.09) == pytest.approx([0.7, 1.3], abs=1e-10)
    assert found(-0.01) == []


@pytest.mark.parametrize("gap", [1e-10, 1e-13, 1e-15])
@pytest.mark.parametrize("method", ["rk4", "es325", "trbdf2", "cn", "bdf2"])
def test_an_event_just_before_the_end_of_a_step_costs_no_accuracy(method, gap):
    """The rest of the step is a sliver; differences divided by it would be round-off."""
    event = Event(lambda t, y: t - (0.5 - gap), terminal=False)
    with torch.no_grad():
        cut = solve(method, event, times(0.0, 1.0), step_size=0.05, rtol=1e-6)
        plain = solve(method, None, times(0.0, 1.0), step_size=0.05, rtol=1e-6)
    assert len(cut.events[0].times) == 1
    assert cut.stats.steps in (20, 21)
    # BDF's coefficients are those of the steps taken.
    accuracy = 1e-3 if method == "bdf2" else 1e-8
    torch.testing.assert_close(cut.ys, plain.ys, rtol=0, atol=accuracy)


# ------------------------------------------------------------------------------------ all together


@pytest.mark.parametrize("method", ["dopri5", "rk4", "es325", "rodaspr", "bdf"])
def test_budgets_disks_and_second_backwards(method, tmp_path):
    def gradient(limit, twice=False):
        y0, loose = start(), {"rtol": 1e-4, "atol": 1e-4}
        if method == "rk4":
            loose = {"step_size": 0.1}
        solution = solve(
            method, events(), times(0.0, 1.0, 20.0), y0, checkpointing=limit, **loose
        )  # fmt: skip
        found = solution.events
        loss = (found[0].times ** 2).sum() + (found[1].states[:, 0] ** 3).sum() + solution.ys[1, 0]
        if twice:
            torch.autograd.grad(loss, y0, retain_graph=True)
        (slope,) = torch.autograd.grad(loss, y0)
        return slope, solution.stats.backward.recomputed

    expected, _ = gradient(None)
    again, repeated = gradient(None, twice=True)
    assert repeated > 0
    accuracy = {"es325": 1e-9, "bdf": 1e-10}.get(method, 1e-12)
    torch.testing.assert_close(again, expected, rtol=accuracy, atol=0)
    for limit in ("2KiB", pnode.Checkpointing(memory="2KiB", disk=tmp_path)):
        if method == "bdf" and limit == "2KiB":
            continue  # its history is not to be had again
        found, _ = gradient(limit)
        torch.testing.assert_close(found, expected, rtol=accuracy, atol=0)


@pytest.mark.parametrize(("method", "options"), [
    ("bosh3", {"rtol": 1e-6, "atol": 1e-6}), ("bosh3", {"step_size": 0.02}),
    ("cn", {"step_size": 0.02}), ("bdf", {}),
])  # fmt: skip
def test_compiled_solves(method, options, interpreted):
    def found(compile):
        y0 = start()
        t = times(0.0, 1.0, 20.0)
        solution = pnode.Solver(
            turn, method=method, event_fn=events(), compile=compile, **options
        )(y0, t)  # fmt: skip
        first = solution.events[0]
        (slope,) = torch.autograd.grad(first.times.sum() + first.states[1, 1], y0)
        return [first.times.detach(), first.states.detach(), slope]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        ours = found(True)
    for mine, other in zip(ours, found(False), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_tuples_float32_costs_modules_and_parameters():
    level = Level()
    y0 = torch.ones(1), torch.zeros(2, 1)
    solver = pnode.Solver(
        lambda t, y: (-y[0], torch.ones_like(y[1])), rtol=1e-5, atol=1e-6,
        event_fn=[Event(level, terminal=False), Event(lambda t, y: y[1].max() - 1.5)],
        cost=lambda t, y: y[0].sum(),
    )  # fmt: skip
    assert [p is level.at for p in solver.parameters()] == [True]
    solution = solver(y0, torch.tensor([0.0, 1.0, 9.0]))
    first, last = solution.events
    assert [part.shape for part in first.states] == [(1, 1), (1, 2, 1)]
    assert first.times.dtype is torch.float32
    assert first.times.tolist() == pytest.approx([math.log(2.0)], rel=1e-4)
    assert last.times.tolist() == pytest.approx([1.5], rel=1e-5)
    assert solution.costs.tolist() == pytest.approx(
        [0.0, 1.0 - math.exp(-1.0), 1.0 - math.exp(-1.5)], rel=1e-4
    )
    first.times[0].backward()
    assert float(level.at.grad) == pytest.approx(-2.0, rel=1e-4)  # of -log(at)
    copy = pickle.loads(pickle.dumps(pnode.Solver(turn, event_fn=Event(level))))
    assert len(list(copy.parameters())) == 1


def test_mass_matrices_and_residuals():
    """Of a rotation: events are those of the right-hand side, with their gradients."""
    t, listed = times(0.0, 5.0), [Event(lambda t, y: y[0], terminal=False)]
    with torch.no_grad():
        mass = pnode.Solver(
            lambda t, y: 2.0 * turn(t, y), mass=2.0 * torch.ones(2, dtype=D), method="bdf",
            event_fn=listed, rtol=1e-8, atol=1e-8,
        )(start(), t)  # fmt: skip
        residual = pnode.Solver(
            residual=lambda t, y, v: v - turn(t, y), method="bdf", event_fn=listed, rtol=1e-8,
            atol=1e-8,
        )(start(), t)  # fmt: skip
    for solution in (mass, residual):
        found = solution.events[0].times.tolist()
        assert found == pytest.approx([math.pi / 2, 3 * math.pi / 2], abs=1e-6)
    gradients = []
    for problem in ({"rhs": turn}, {"residual": lambda t, y, v: v - turn(t, y)}):
        y0 = start()
        solution = pnode.Solver(
            **problem, method="bdf2", step_size=0.05, event_fn=listed, compile=False,
            petsc_options={"snes_rtol": 1e-13, "snes_stol": 1e-13},
        )(y0, t)  # fmt: skip
        gradients += torch.autograd.grad(solution.events[0].times.square().sum(), y0)
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-9


def test_two_orders_of_torchdiffeqs_calls():
    y0 = start()
    time, ys = pnode.odeint(turn, y0, times(0.0, 9.0), event_fn=events()[:2])
    assert time is None and ys.shape == (2, 2)
    time, ys = pnode.odeint_event(
        turn, y0, 0.0, event_fn=[Event(lambda t, y: y[1], terminal=False), lambda t, y: y[0]]
    )
    assert float(time.detach()) == pytest.approx(math.pi / 2, abs=1e-6)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Event(3), "fn is 3: give a callable"),
    (lambda: Event(turn, direction=2), "direction=2: give 0, 1"),
    (lambda: Event(turn, direction="up"), "direction='up'"),
    (lambda: Event(turn, direction=True), "direction=True"),
    (lambda: Event(turn, terminal=1), "terminal=1: give True or False"),
    (lambda: pnode.Solver(turn, event_fn=[]), "event_fn is empty"),
    (lambda: pnode.Solver(turn, event_fn=3), "event_fn is 3: give a callable"),
    (lambda: pnode.Solver(turn, event_fn=[turn, None]), r"event_fn\[1\] is None: give a callable"),
])  # fmt: skip
def test_bad_events(make, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(("function", "message"), [
    (lambda t, y: None, r"event_fn\[1\] returned a NoneType"),
    (lambda t, y: y > 0, r"event_fn\[1\] returned a tensor of dtype torch.bool"),
    (lambda t, y: y[: 1 + int(t > 0)], r"event_fn\[1\] returned 2 numbers after 1"),
])  # fmt: skip
def test_bad_results_name_the_function(function, message):
    with pytest.raises(pnode.EventError, match=message):
        solve("dopri5", [lambda t, y: y[0], function], times(0.0, 1.0))


def test_what_has_no_end():
    with pytest.raises(pnode.ConfigurationError, match="infinity"):
        solve("dopri5", Event(lambda t, y: y[0], terminal=False), times(0.0, math.inf))
    assert solve("dopri5", events(), times(0.0, math.inf)).event == 2


def test_second_derivatives_and_stages_are_refused():
    y0 = start()
    solution = solve("rk4", events()[:2], times(0.0, 1.0, 5.0), y0)
    (slope,) = torch.autograd.grad(solution.ys[-1, 0], y0, create_graph=True)
    with pytest.raises(pnode.BackwardError, match="events that do not end it"):
        torch.autograd.grad(slope.sum(), y0)
    (slope,) = torch.autograd.grad(solution.events[0].times[0], y0, create_graph=True)
    with pytest.raises(pnode.BackwardError, match="events that do not end it"):
        torch.autograd.grad(slope.sum(), y0)
    with pytest.raises(pnode.BackwardError, match="an event, whose time depends on the state"):
        solution.stages(torch.ones_like(solution.ys), lambda stage: None)
    # Without an event on the way there is nothing to refuse.
    solution = solve("rk4", events()[:2], times(0.0, 0.5, 1.0), y0)
    (slope,) = torch.autograd.grad((solution.ys**2).sum(), y0, create_graph=True)
    torch.autograd.grad(slope.sum(), y0)
    assert find_method("rk4").order == 4


def test_a_jump_has_no_derivative():
    step = Event(lambda t, y: torch.where(t < 0.5, -1.0, 1.0) + 0.0 * y[0], terminal=False)
    with pytest.raises(pnode.EventError, match="event_fn jumps across zero"):
        solve("rk4", step, times(0.0, 1.0))
    with torch.no_grad():
        found = solve("rk4", step, times(0.0, 1.0)).events[0].times
    assert found.tolist() == pytest.approx([0.5], abs=1e-10)

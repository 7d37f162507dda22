"""Terminal events: known times and gradients, edge cases, failures."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import pnode

D = torch.float64
G = 9.81
SOLVERS = {
    "dopri5": {"method": "dopri5", "rtol": 1e-11, "atol": 1e-11},
    "dopri5-dense": {"method": "dopri5", "rtol": 1e-11, "atol": 1e-11, "dense": True},
    "verner8": {"method": "verner8", "rtol": 1e-11, "atol": 1e-11},
    "rk4": {"method": "rk4", "step_size": 0.01},
    "rk4-dense": {"method": "rk4", "step_size": 0.01, "dense": True},
    "esdirk6": {"method": "esdirk6", "rtol": 1e-10, "atol": 1e-10,
                "petsc_options": {"snes_rtol": 1e-14, "snes_stol": 1e-14}},
    "sdirk6-fixed": {"method": "sdirk6", "step_size": 0.1,
                     "petsc_options": {"snes_rtol": 1e-14, "snes_stol": 1e-14}},
}  # fmt: skip
every_solver = pytest.mark.parametrize("name", list(SOLVERS))


def times(*values):
    return torch.tensor(values, dtype=D)


def state(*values, grad=True):
    return torch.tensor(values, dtype=D, requires_grad=grad)


class Fall(torch.nn.Module):
    """Free fall of (height, speed)."""

    def __init__(self):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(G, dtype=D))

    def forward(self, t, y):
        return torch.stack([y[1], -self.g * torch.ones_like(y[1])])


class Floor(torch.nn.Module):
    """The event of reaching a height."""

    def __init__(self, height=0.0):
        super().__init__()
        self.height = torch.nn.Parameter(torch.tensor(height, dtype=D))

    def forward(self, t, y):
        return y[0] - self.height


def height(t, y):
    return y[0]


@every_solver
def test_free_fall(name):
    """t* = sqrt(2 H / g) from height H over the floor; speed -sqrt(2 g H)."""
    fall, floor = Fall(), Floor(2.0)
    solver = pnode.Solver(fall, event_fn=floor, **SOLVERS[name])
    assert floor.height in set(solver.parameters())
    y0 = state(12.0, 0.0)
    t = times(0.0, 0.5, 1.0, 1.5, 2.0)
    solution = solver(y0, t)
    expected = math.sqrt(20.0 / G)
    assert solution.reason == "event"
    assert solution.event_time.shape == () and solution.event_time.dtype is D
    assert float(solution.event_time.detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(solution.ts[:-1], t[:3]) and solution.ts[-1] == solution.event_time
    ys = solution.ys.detach()
    assert ys.shape == (4, 2)
    assert torch.allclose(ys[:3, 0], 12.0 - G / 2 * t[:3] ** 2, rtol=1e-12)
    assert torch.allclose(ys[-1], times(2.0, -math.sqrt(20.0 * G)), rtol=1e-11)
    inputs = [y0, fall.g, floor.height]
    by_state, by_g, by_floor = torch.autograd.grad(solution.event_time, inputs, retain_graph=True)
    speed = math.sqrt(20.0 * G)
    assert torch.allclose(by_state, times(1.0 / speed, 1.0 / G), rtol=1e-9)
    assert float(by_g) == pytest.approx(-expected / (2.0 * G), rel=1e-9)
    assert float(by_floor) == pytest.approx(-1.0 / speed, rel=1e-9)
    # The height at the event is the floor's: it moves with the floor alone.
    zero, also_zero, one = torch.autograd.grad(solution.ys[-1, 0], inputs, retain_graph=True)
    assert torch.allclose(zero, torch.zeros(2, dtype=D), atol=1e-9)
    assert abs(float(also_zero)) < 1e-9 and float(one) == pytest.approx(1.0, rel=1e-9)
    by_state, by_g, by_floor = torch.autograd.grad(solution.ys[-1, 1], inputs)
    assert torch.allclose(by_state, times(-G / speed, 0.0), rtol=1e-9, atol=1e-9)
    assert float(by_g) == pytest.approx(-10.0 / speed, rel=1e-9)
    assert float(by_floor) == pytest.approx(G / speed, rel=1e-9)


@every_solver
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
def test_oscillator(name, direction):
    """y'' = -w^2 y: from phase phi the zero is at (pi/2 - phi) / w, either way in time."""
    w = torch.tensor(1.3, dtype=D, requires_grad=True)
    phi = torch.tensor(direction * 0.4, dtype=D, requires_grad=True)
    y0 = torch.stack([phi.cos(), -w * phi.sin()])
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1], -(w**2) * y[0]]), params=[w], event_fn=height,
        **SOLVERS[name],
    )  # fmt: skip
    t0 = torch.tensor(0.2, dtype=D, requires_grad=True)
    t = torch.cat([t0.reshape(1), t0.detach() + direction * times(0.5, 3.0)])
    solution = solver(y0, t)
    duration = (direction * math.pi / 2 - float(phi.detach())) / 1.3
    assert float(solution.event_time.detach()) == pytest.approx(0.2 + duration, abs=1e-9)
    assert solution.ys.shape == (3, 2)
    by_w, by_phi, by_start = torch.autograd.grad(
        solution.event_time, [w, phi, t0], retain_graph=True
    )
    assert float(by_w) == pytest.approx(-duration / 1.3, rel=1e-8)
    assert float(by_phi) == pytest.approx(-1.0 / 1.3, rel=1e-8)
    assert float(by_start) == pytest.approx(1.0, rel=1e-8)
    # The speed at the zero is -/+ w, whatever the phase and the start.
    by_w, by_phi, by_start = torch.autograd.grad(solution.ys[-1, 1], [w, phi, t0])
    assert float(by_w) == pytest.approx(-direction, rel=1e-8)
    assert abs(float(by_phi)) < 1e-8 and abs(float(by_start)) < 1e-8


@every_solver
def test_gradient_equals_finite_differences(name):
    """Of a loss of everything that comes back, for a field without closed form."""
    inputs = [state(1.0, 0.2), state(0.7), state(0.1)]

    def field(t, y):
        return torch.stack([y[1], -torch.sin(y[0]) - 0.2 * y[1] + inputs[1][0] * torch.cos(t)])

    def crossing(t, y):
        return y[0] - 0.3 * torch.sin(t) - inputs[2][0]

    solver = pnode.Solver(field, params=[inputs[1]], event_fn=crossing, **SOLVERS[name])

    def loss():
        solution = solver(inputs[0], times(0.0, 0.3, 0.9, 8.0))
        assert solution.reason == "event" and len(solution.ys) == 4
        return solution.event_time**2 + (solution.ys * times(0.5, -1.2)).sum().sin()

    gradients = torch.autograd.grad(loss(), inputs)
    directions = [times(0.8, -0.5), times(0.6), times(-0.7)]
    slope = sum(float(g @ d) for g, d in zip(gradients, directions, strict=True))

    def loss_at(size):
        with torch.no_grad():
            for x, d in zip(inputs, directions, strict=True):
                x.add_(d, alpha=size)
            value = float(loss())
            for x, d in zip(inputs, directions, strict=True):
                x.add_(d, alpha=-size)
        return value

    # Error h^4 / 30 times a fifth derivative, and the solver's tolerance / h.
    h = 2e-3
    difference = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    assert slope == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize(
    "keywords",
    [{"method": "bdf4", "step_size": 0.02}, {"method": "bdf", "rtol": 1e-8, "atol": 1e-8}],
)
def test_multistep_methods(keywords):
    """The step is taken again from the history before it, and the adjoint knows."""
    w, y0 = torch.tensor(1.3, dtype=D, requires_grad=True), state(1.0, 0.0)
    grid = []
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1], -(w**2) * y[0]]), params=[w], event_fn=height,
        monitor=lambda step, t, y: grid.append(t), **keywords,
    )  # fmt: skip
    solution = solver(y0, times(0.0, 0.5, 3.0))
    expected = math.pi / 2.6
    # What BDF's error leaves; and of the root, what Newton's tolerance does.
    assert float(solution.event_time.detach()) == pytest.approx(expected, rel=3e-6)
    assert abs(float(solution.ys[-1, 0].detach())) < 1e-9
    assert grid[-1] == float(solution.event_time.detach())
    assert len(grid) == solution.stats.steps
    inputs = [w, y0]
    by_w, by_state = torch.autograd.grad(solution.event_time, inputs, retain_graph=True)
    assert float(by_w) == pytest.approx(-expected / 1.3, rel=1e-5)
    assert torch.allclose(by_state, times(0.0, 1.0 / 1.3**2), atol=1e-5)
    again = torch.autograd.grad(solution.event_time, inputs)
    # The recorded steps are repeated from the start, the shortened one included.
    assert solution.stats.backward.recomputed == solution.stats.steps
    assert torch.allclose(again[1], by_state, rtol=1e-7, atol=1e-9)


def test_bouncing_ball():
    """Fifteen bounces that lose a fifth of the speed each: a geometric series."""
    loss = torch.tensor(0.8, dtype=D, requires_grad=True)
    fall = Fall()
    t, y = torch.zeros(1, dtype=D), state(5.0, 0.0)
    start = y
    for _ in range(15):
        t, solution = pnode.odeint_event(fall, y, t.reshape(1), event_fn=height, method="rk4",
                                         step_size=0.05)  # fmt: skip
        speed = solution[-1][1]
        y = torch.stack([torch.zeros_like(speed), -loss * speed])
    first, k = math.sqrt(10.0 / G), 0.8

    def total(k):
        return first * (1.0 + 2.0 * sum(k**n for n in range(1, 15)))

    assert float(t.detach()) == pytest.approx(total(k), rel=1e-9)
    by_loss, by_state, by_g = torch.autograd.grad(t, [loss, start, fall.g])
    slope = first * 2.0 * sum(n * k ** (n - 1) for n in range(1, 15))
    assert float(by_loss) == pytest.approx(slope, rel=1e-9)
    assert float(by_state[0]) == pytest.approx(total(k) / 10.0, rel=1e-9)
    assert float(by_g) == pytest.approx(-total(k) / (2.0 * G), rel=1e-9)


@pytest.mark.parametrize("name", ["dopri5", "rk4", "esdirk6"])
def test_end_state_lies_on_the_discrete_solution(name):
    """It is that of a step from the last step's start, not of an interpolant."""
    keywords = SOLVERS[name] | ({"rtol": 1e-4, "atol": 1e-4} if "rtol" in SOLVERS[name] else {})
    if "step_size" in keywords:
        keywords["step_size"] = 0.3
    seen = [(0.0, times(0.0, 1.0))]

    def field(t, y):
        return torch.stack([y[1], -torch.sin(y[0])]) + 0.1 * torch.cos(t)

    solver = pnode.Solver(
        field, event_fn=lambda t, y: y[0] - 1.05, monitor=lambda step, t, y: seen.append((t, y)),
        **keywords,
    )  # fmt: skip
    solution = solver(seen[0][1], times(0.0, 4.0))
    (before, start), (end, last) = seen[-2:]
    assert end == float(solution.event_time) and torch.equal(last, solution.ys[-1])
    assert abs(float(last[0]) - 1.05) < 1e-10
    assert len(seen) - 1 == solution.stats.steps
    step = {"step_size": 10.0, "petsc_options": keywords.get("petsc_options")}
    again = pnode.Solver(field, method=keywords["method"], **step)(start, times(before, end))
    assert again.stats.steps == 1
    assert torch.allclose(again.ys[-1], last, rtol=1e-13, atol=1e-14)


def test_tolerance_of_the_root():
    """A loose event_tol is as good as it says, and costs fewer trial steps."""
    results = {}
    for tolerance in (1e-3, 1e-12):
        solver = pnode.Solver(
            lambda t, y: y.cos(), method="rk4", step_size=0.5, event_fn=lambda t, y: y[0] - 0.6,
            event_tol=tolerance,
        )  # fmt: skip
        solution = solver(state(0.0, grad=False), times(0.0, 3.0))
        results[tolerance] = float(solution.event_time), solution.stats.rhs
    assert 0.0 < abs(results[1e-3][0] - results[1e-12][0]) < 0.5e-3
    assert results[1e-3][1] < results[1e-12][1]


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
def test_ledger_counts_the_trials(jacobian):
    """Newton and Krylov iterations of the trial steps, too."""

    def solve(event_fn, t):
        solver = pnode.Solver(
            lambda t, y: -(y**3), method="trbdf2", rtol=1e-5, atol=1e-5, event_fn=event_fn,
            jacobian=jacobian,
        )  # fmt: skip
        return solver(state(1.0, 2.0, grad=False), times(0.0, t))

    with_event = solve(lambda t, y: y[0] - 0.5, 3.0)
    without = solve(None, float(with_event.event_time))
    assert with_event.stats.steps == without.stats.steps
    for name in ("rhs", "newton", "krylov" if jacobian == "matrix-free" else "jacobians"):
        assert getattr(with_event.stats, name) > getattr(without.stats, name)


def test_no_event():
    solver = pnode.Solver(Fall(), event_fn=height, method="rk4", step_size=0.1)
    t = times(0.0, 0.5, 1.0)
    solution = solver(state(12.0, 0.0), t)
    assert solution.reason == "t_end" and solution.event_time is None
    assert solution.ts is t and solution.ys.shape == (3, 2)
    plain = pnode.Solver(Fall(), method="rk4", step_size=0.1)(state(12.0, 0.0), t)
    assert torch.equal(solution.ys, plain.ys)
    # The slopes at the ends of the steps, for the interpolant.
    assert solution.stats.rhs == plain.stats.rhs + 11
    single = solver(state(12.0, 0.0), times(0.3))
    assert single.reason == "t_end" and single.ys.shape == (1, 2)


def test_event_at_the_start_is_ignored():
    """A ball thrown up from the floor: the zero at the start does not count, the landing does."""
    solver = pnode.Solver(Fall(), event_fn=height, method="rk4", step_size=0.1)
    solution = solver(state(0.0, 5.0), times(0.0, 3.0))
    assert float(solution.event_time.detach()) == pytest.approx(10.0 / G, rel=1e-12)
    staying = pnode.Solver(lambda t, y: 0.0 * y, event_fn=height, method="rk4", step_size=0.1)
    assert staying(state(0.0), times(0.0, 1.0)).reason == "t_end"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("keywords", [{"method": "rk4", "step_size": 0.25}, {"method": "dopri5"}])
def test_event_at_an_output_time(keywords, dense):
    """t - 0.5 vanishes exactly where an output lies: that output is the event."""
    solver = pnode.Solver(
        lambda t, y: -y, event_fn=lambda t, y: t - 0.5, dense=dense, **keywords
    )  # fmt: skip
    solution = solver(state(1.0), times(0.0, 0.25, 0.5, 0.75, 1.0))
    assert solution.reason == "event"
    assert solution.ts.tolist() == pytest.approx([0.0, 0.25, 0.5], abs=1e-13)
    assert float(solution.ys[-1].detach()) == pytest.approx(math.exp(-0.5), rel=1e-4)


def test_event_at_the_end_of_a_step_and_of_the_solve():
    """Zero at the last time: an event."""
    solver = pnode.Solver(
        lambda t, y: torch.ones_like(y), event_fn=lambda t, y: y[0] - 1.0, method="euler",
        step_size=0.25,
    )  # fmt: skip
    solution = solver(state(0.0, grad=False), times(0.0, 1.0))
    assert solution.reason == "event" and solution.ts.tolist() == [0.0, 1.0]
    inside = solver(state(0.0, grad=False), times(0.0, 2.0))  # at the end of the fourth step
    assert inside.reason == "event" and inside.ts.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_first_of_several_entries(name):
    """Two entries change sign within a step: the earlier one ends the solve."""
    floors = state(0.5, 0.4, -3.0)
    y0 = state(0.0)
    keywords = SOLVERS[name] | ({"step_size": 1.0} if name == "rk4" else {"first_step": 1.0})
    solver = pnode.Solver(
        lambda t, y: torch.ones_like(y), event_fn=lambda t, y: (y - floors).reshape(3, 1),
        **keywords,
    )  # fmt: skip
    solution = solver(y0, times(0.0, 2.0))
    assert float(solution.event_time.detach()) == pytest.approx(0.4, abs=1e-12)
    by_floors, by_state = torch.autograd.grad(solution.event_time, [floors, y0])
    assert torch.allclose(by_floors, times(0.0, 1.0, 0.0), atol=1e-12)
    assert float(by_state) == pytest.approx(-1.0, rel=1e-12)


def test_only_the_event_is_trainable():
    """Neither y0 nor the field requires grad; t* = 1 / r does, of y = t reaching 1 / r."""
    r = torch.tensor(2.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: torch.ones_like(y), event_fn=lambda t, y: r * y[0] - 1.0, method="rk4",
        step_size=0.3,
    )  # fmt: skip
    solution = solver(state(0.0, grad=False), times(0.0, 2.0))
    (gradient,) = torch.autograd.grad(solution.event_time + 3.0 * solution.ys[-1, 0], r)
    assert float(gradient) == pytest.approx(-4.0 / 4.0, rel=1e-12)
    with torch.no_grad():
        assert not solver(state(0.0, grad=False), times(0.0, 2.0)).event_time.requires_grad


@pytest.mark.parametrize("dense", [False, True])
def test_outputs_before_the_event_have_their_gradients(dense):
    """Equal to those of a solve without event over the same steps, and twice the same bits."""
    w = torch.tensor(0.9, dtype=D, requires_grad=True)
    y0 = state(1.0, 0.0)
    t = times(0.0, 0.35, 0.7, 1.2, 9.0).requires_grad_()

    def field(t, y):
        return torch.stack([y[1], -(w**2) * y[0]])

    keywords = {"params": [w], "method": "rk4", "step_size": 0.35, "dense": dense}
    solution = pnode.Solver(field, event_fn=height, **keywords)(y0, t)
    assert len(solution.ts) == 5 and float(solution.event_time.detach()) < 9.0
    loss = (solution.ys[1:4] * times(1.0, -0.5)).sum()
    ours = torch.autograd.grad(loss, [w, y0, t], retain_graph=True)
    again = torch.autograd.grad(loss, [w, y0, t])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    other = pnode.Solver(field, **keywords)(y0, t)
    if not dense:  # the same steps up to 1.2
        loss = (other.ys[1:4] * times(1.0, -0.5)).sum()
        theirs = torch.autograd.grad(loss, [w, y0, t])
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    # To the accuracy of the steps: the exact flow.
    exact = torch.stack([torch.cos(w * t), -w * torch.sin(w * t)], dim=1)[1:4]
    theirs = torch.autograd.grad((exact * times(1.0, -0.5)).sum(), [w, t])
    assert torch.allclose(ours[0], theirs[0], atol=2e-3)
    assert torch.allclose(ours[2][1:], theirs[1][1:], atol=2e-3)


def test_tuple_and_float32():
    y0 = (torch.tensor([10.0], requires_grad=True), torch.zeros(1))
    solver = pnode.Solver(
        lambda t, y: (y[1], torch.full_like(y[1], -G)), event_fn=lambda t, y: y[0], method="rk4",
        step_size=0.2,
    )  # fmt: skip
    t = torch.tensor([0.0, 1.0, 2.0])
    solution = solver(y0, t)
    assert isinstance(solution.ys, tuple) and solution.ys[0].shape == (3, 1)
    assert solution.ys[0].dtype is solution.event_time.dtype is torch.float32
    # event_fn sees heights rounded to float32.
    assert float(solution.event_time.detach()) == pytest.approx(math.sqrt(20.0 / G), rel=1e-6)
    (gradient,) = torch.autograd.grad(solution.event_time, y0[0])
    assert float(gradient) == pytest.approx(1.0 / math.sqrt(20.0 * G), rel=1e-5)
    whole = solver(y0, torch.tensor([0, 2]))  # times as whole numbers
    assert whole.event_time.dtype is D and whole.ts.dtype is D


def test_without_end():
    """An infinite last time: until the event, or max_steps."""
    solver = pnode.Solver(Fall(), event_fn=height, max_steps=50)
    y0 = state(1000.0, 0.0)
    solution = solver(y0, times(0.0, 1.0, math.inf))
    assert solution.ts.shape == (3,)
    assert float(solution.event_time.detach()) == pytest.approx(math.sqrt(2000.0 / G), rel=1e-9)
    for keywords in ({}, {"method": "rk4", "step_size": 1.0}, {"method": "cn", "step_size": 1.0}):
        up = pnode.Solver(
            lambda t, y: torch.ones_like(y), event_fn=height, max_steps=50, **keywords
        )
        with pytest.raises(pnode.StepLimitReached):
            up(state(1.0), times(0.0, math.inf))
    for bad in (times(0.0, math.inf, 3.0), times(math.inf, 0.0), times(0.0, math.nan)):
        with pytest.raises(pnode.ConfigurationError, match="NaN or infinity"):
            solver(y0, bad)
    with pytest.raises(pnode.ConfigurationError, match="with event_fn"):
        pnode.Solver(Fall())(y0, times(0.0, math.inf))


@pytest.mark.parametrize("interface", [pnode.odeint, pnode.odeint_adjoint])
def test_odeint_event(interface):
    y0 = state(10.0, 0.0)
    fall = Fall()
    time, solution = pnode.odeint_event(
        fall, y0, torch.tensor(0.5, dtype=D, requires_grad=True), event_fn=height,
        odeint_interface=interface, rtol=1e-10, atol=1e-10,
    )  # fmt: skip
    assert float(time.detach()) == pytest.approx(0.5 + math.sqrt(20.0 / G), rel=1e-12)
    assert solution.shape == (2, 2) and torch.equal(solution[0], y0)
    (gradient,) = torch.autograd.grad(time, fall.g)
    assert float(gradient) == pytest.approx(-math.sqrt(20.0 / G) / (2.0 * G), rel=1e-9)
    back, _ = pnode.odeint_event(
        fall, y0, 0.5, event_fn=height, reverse_time=True, method="rk4", step_size=0.1
    )
    assert float(back.detach()) == pytest.approx(0.5 - math.sqrt(20.0 / G), rel=1e-12)


def test_odeint_with_an_event():
    """As in torchdiffeq a pair; the last of more than two times is the end here."""
    y0 = state(10.0, 0.0)
    time, ys = pnode.odeint(Fall(), y0, times(0.0, 1.0, 2.0), event_fn=height)
    assert float(time.detach()) == pytest.approx(math.sqrt(20.0 / G), rel=1e-9)
    assert ys.shape == (3, 2)
    for last in (times(0.0, 0.5, 1.0), [0.0, 1.0]):
        keywords = {} if len(last) == 3 else {"steps": last}
        time, ys = pnode.odeint(Fall(), y0, last, event_fn=height, **keywords)
        assert time is None and ys.shape == (len(last), 2)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "radau5", "cn"])
def test_the_second_of_two_times_is_a_direction(method):
    """As in torchdiffeq: the solve goes on beyond it until the event."""
    fall, accurate = Fall(), {"rk4": {}, "cn": {"step_size": 0.1}}.get(method, {"rtol": 1e-9})
    y0, exact = state(10.0, 0.0), math.sqrt(20.0 / G)
    for sign in (1.0, -1.0):
        t = times(0.5, 0.5 + 0.7 * sign).requires_grad_()
        time, ys = pnode.odeint(fall, y0, t, event_fn=height, method=method, **accurate)
        assert time.dtype is D and ys.shape == (2, 2) and torch.equal(ys[0], y0)
        assert float(time.detach()) == pytest.approx(0.5 + sign * exact, rel=1e-7)
        found = torch.autograd.grad(time, (fall.g, t))
        assert float(found[0]) == pytest.approx(-sign * exact / (2.0 * G), rel=1e-6)
        assert found[1].tolist() == pytest.approx([1.0, 0.0], abs=1e-9)


def test_an_event_that_does_not_come():
    """A limit, and how far the solve went."""
    up = lambda t, y: y[0] + 1.0  # noqa: E731
    with pytest.raises(pnode.StepLimitReached, match=r"max_steps=40 .*event.*t = ") as caught:
        pnode.odeint(lambda t, y: -y, state(1.0), times(0.0, 1.0), event_fn=up, max_steps=40)
    assert caught.value.time > 1.0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["pnode.odeint"], "_ENDLESS_STEPS", 7)
        for call in (
            lambda y0: pnode.odeint(lambda t, y: -y, y0, times(0.0, 1.0), event_fn=up),
            lambda y0: pnode.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=up),
        ):
            with pytest.raises(pnode.StepLimitReached, match="max_steps=7 "):
                call(state(1.0))


WRONG = {
    "a float": (lambda t, y: float(y[0]), "a float, not a tensor"),
    "none": (lambda t, y: None, "a NoneType"),
    "a flag": (lambda t, y: y[0] < 0.0, r"dtype torch\.bool"),
    "nothing": (lambda t, y: y[:0], "an empty tensor"),
    "nan": (lambda t, y: y[0] * math.nan, "NaN or infinity"),
    "infinity": (lambda t, y: y[0] / 0.0, "NaN or infinity"),
    "nan later": (lambda t, y: (y[0] - 5.0).sqrt() + 1.0, "NaN or infinity"),
    "another shape later": (lambda t, y: y[: 1 + int(t > 0)], "2 numbers after 1"),
}


@pytest.mark.parametrize("name", ["dopri5", "rk4", "esdirk6"])
@pytest.mark.parametrize("case", list(WRONG))
def test_unusable_event_functions(name, case):
    event_fn, message = WRONG[case]
    solver = pnode.Solver(Fall(), event_fn=event_fn, **SOLVERS[name])
    with pytest.raises(pnode.EventError, match=message) as info:
        solver(state(10.0, 0.0), times(0.0, 2.0))
    assert info.value.method == solver.method
    assert info.value.step is not None and info.value.time is not None
    assert isinstance(info.value, RuntimeError)
    solver.event_fn = height
    assert solver(state(10.0, 0.0), times(0.0, 2.0)).reason == "event"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["dopri5", "rk4", "esdirk6"])
def test_exceptions_of_the_event_function(name, error):
    """At the start, after a step, and while the root is located: they come through as they are."""
    problem = Fall(), state(10.0, 0.0), times(0.0, 2.0)
    calls = [0]

    def count(t, y):
        calls[0] += 1
        return y[0]

    solver = pnode.Solver(problem[0], event_fn=count, **SOLVERS[name])
    expected = solver(*problem[1:])
    total = calls[0]
    for when in (1, 3, total - 5, total - 3, total - 1, total):
        calls[0] = 0

        def fails(t, y, when=when):
            if count(t, y) is not None and calls[0] == when:
                raise error("mine")
            return y[0]

        solver.event_fn = fails
        with pytest.raises(error, match="mine"):
            solver(*problem[1:])
    solver.event_fn = height
    after = solver(*problem[1:])
    assert torch.equal(after.ys, expected.ys) and after.stats == expected.stats


def test_exception_of_the_field_in_a_trial_step():
    field, seen = Fall(), []

    def event(t, y):
        seen.append(1)
        return y[0]

    solver = pnode.Solver(lambda t, y: field(t, y), params=[field.g], event_fn=event, method="rk4",
                          step_size=0.5)  # fmt: skip
    solver(state(10.0, 0.0), times(0.0, 2.0))
    steps = 4  # event_fn: once at the start, after each of three steps, then in trials

    def fails(t, y):
        if len(seen) > steps:
            raise ZeroDivisionError("mine")
        return field(t, y)

    seen.clear()
    solver.rhs = fails
    with pytest.raises(ZeroDivisionError, match="mine"):
        solver(state(10.0, 0.0), times(0.0, 2.0))


def test_event_without_derivative():
    """An event that stands still along the solution has no derivative, but a time."""
    jump = pnode.Solver(
        lambda t, y: torch.ones_like(y), method="euler", step_size=0.3,
        event_fn=lambda t, y: torch.sign(y[0] - 0.5) + 0.5,
    )  # fmt: skip
    with pytest.raises(pnode.EventError, match="no derivative"):
        jump(state(0.0), times(0.0, 1.0))
    with torch.no_grad():
        solution = jump(state(0.0), times(0.0, 1.0))
    assert float(solution.event_time) == pytest.approx(0.5, abs=1e-11)


@pytest.mark.parametrize("form", ["imex", "mass", "residual"])
def test_problem_forms(form):
    """Of y' = 2, y(0) = 0 in each form, reaching 1, with gradients."""
    keywords = {
        "imex": {"implicit": lambda t, y: 0.5 * torch.ones_like(y), "method": "arkimex3",
                 "explicit": lambda t, y: 1.5 * torch.ones_like(y)},
        "mass": {"rhs": lambda t, y: torch.ones_like(y), "method": "cn",
                 "mass": torch.tensor([0.5], dtype=D)},
        "residual": {"residual": lambda t, y, yp: yp - 2.0, "method": "beuler"},
    }[form]  # fmt: skip
    r = torch.tensor(1.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(event_fn=lambda t, y: y[0] - r, step_size=0.3, **keywords)
    t = times(0.0, 2.0)
    with torch.no_grad():
        solution = solver(state(0.0), t)
    assert float(solution.event_time) == pytest.approx(0.5, rel=1e-12)
    assert float(solution.ys[-1]) == pytest.approx(1.0, rel=1e-12)
    y0 = state(0.0)
    gradients = torch.autograd.grad(solver(y0, t).event_time, [y0, r])
    assert [float(g) for g in gradients] == pytest.approx([-0.5, 0.5], rel=1e-9)
    (gradient,) = torch.autograd.grad(solver(y0.detach(), t).event_time, [r])
    assert float(gradient) == pytest.approx(0.5, rel=1e-9)  # r alone requires grad


def test_progress_bar_is_closed(capsys):
    solver = pnode.Solver(Fall(), event_fn=height, method="rk4", step_size=0.2, progress=True)
    seen = []
    solution = solver(state(10.0, 0.0), times(0.0, 2.0))
    again = pnode.Solver(
        Fall(), event_fn=height, method="rk4", step_size=0.2,
        monitor=lambda step, t, y: seen.append(t),
    )(state(10.0, 0.0), times(0.0, 2.0))  # fmt: skip
    assert torch.equal(solution.ys, again.ys)
    assert capsys.readouterr().err.endswith("\n")
    assert seen[-1] == float(again.event_time.detach()) and len(seen) == again.stats.steps


def test_second_backward_through_the_event():
    fall, y0 = Fall(), state(10.0, 0.0)
    solution = pnode.Solver(fall, event_fn=height, rtol=1e-8)(y0, times(0.0, 2.0))
    inputs = [y0, fall.g]
    first = torch.autograd.grad(solution.event_time, inputs, retain_graph=True)
    second = torch.autograd.grad(solution.event_time, inputs)
    assert solution.stats.backward.recomputed == solution.stats.steps
    for a, b in zip(first, second, strict=True):
        # The event's step began without what the step before carries over (FSAL).
        assert torch.allclose(a, b, rtol=1e-13)


def test_two_solves_with_one_solver():
    """Both alive at once; the trial steps' integrator is reused."""
    fall = Fall()
    solver = pnode.Solver(fall, event_fn=height)
    first, second = (solver(state(h, 0.0), times(0.0, 5.0)) for h in (10.0, 20.0))
    idle = len(solver._engine._pool._idle)
    third = solver(state(10.0, 0.0), times(0.0, 5.0))
    assert len(solver._engine._pool._idle) == idle == 2
    assert torch.equal(third.ys, first.ys)
    (first.event_time + second.event_time).backward()
    expected = -sum(math.sqrt(2.0 * h / G) for h in (10.0, 20.0)) / (2.0 * G)
    assert float(fall.g.grad) == pytest.approx(expected, rel=1e-6)

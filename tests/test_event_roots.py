"""Which root is an event: the first of a step, and not the one that a solve starts on."""

from __future__ import annotations

import math

import pytest
import torch

import pnode

D = torch.float64
G = 9.81
TIGHT = {"snes_rtol": 1e-14, "snes_stol": 1e-14}
SOLVERS = {
    "dopri5": {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9},
    "dopri5-dense": {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "dense": True},
    "rk4": {"method": "rk4", "step_size": 0.05},
    "rk4-budget": {"method": "rk4", "step_size": 0.05, "checkpointing": 4000},
    "esdirk6": {"method": "esdirk6", "rtol": 1e-9, "atol": 1e-9, "petsc_options": TIGHT},
    "sdirk6": {"method": "sdirk6", "step_size": 0.1, "petsc_options": TIGHT},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-9, "atol": 1e-9},
    "bdf4": {"method": "bdf4", "step_size": 0.02},
    "bdf": {"method": "bdf", "rtol": 1e-9, "atol": 1e-9},
}
every_solver = pytest.mark.parametrize("name", list(SOLVERS))
ONE_STEP = {"method": "rk4", "step_size": 1.0}


def times(*values):
    return torch.tensor(values, dtype=D)


def state(*values, grad=True):
    return torch.tensor(values, dtype=D, requires_grad=grad)


def constant(t, y):
    return torch.ones_like(y)


def fall(t, y):
    return torch.stack([y[1], torch.full_like(y[1], -G)])


def height(t, y):
    return y[0]


def event_time(event_fn, *, field=constant, y0=(0.0,), end=1.0, **keywords):
    """Solve y' = 1 in one step, unless told otherwise; the event's time or None."""
    solver = pnode.Solver(field, event_fn=event_fn, **(keywords or ONE_STEP))
    with torch.no_grad():
        solution = solver(state(*y0), times(0.0, end))
    return None if solution.event_time is None else float(solution.event_time)


# ------------------------------------------------------------------------------- roots of one step

ROOTS = {
    "three": (0.2, 0.5, 0.9),
    "two": (0.2, 0.5),
    "two near each other": (0.6, 0.61),
    "two at the start": (0.02, 0.05),
    "two before the first sample": (0.001, 0.002),
    "two at the end": (0.97, 0.99),
    "three, two of them at the start": (0.02, 0.03, 0.9),
    "four": (0.1, 0.2, 0.6, 0.9),
    "five": (0.1, 0.3, 0.5, 0.7, 0.95),
    "two and the end of the step": (0.4, 0.6, 1.0),
}


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("case", list(ROOTS))
def test_first_of_several_roots(case, direction):
    def event(t, y):
        return math.prod((y[0] - root for root in ROOTS[case]), start=direction)

    assert event_time(event) == pytest.approx(ROOTS[case][0], abs=1e-11)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn", "bdf4", "rodaspr", "mass"])
def test_ball_through_a_ceiling_and_back_within_a_step(name):
    """The state turns within the step; both its ends are below the ceiling."""
    v, part = 3.0, {"mass": 0.97, "bdf4": 0.9999}.get(name, 0.6)
    keywords = {"rhs": fall, "method": name, "step_size": 0.7}
    if name in ("dopri5", "rodaspr"):
        keywords |= {"step_size": None, "first_step": 0.7}
    elif name == "bdf4":
        keywords |= {"step_size": 0.02}
    elif name == "mass":  # without slopes: by the states before
        keywords |= {"step_size": 0.2, "method": "cn", "mass": times(1.0, 1.0)}
    ceiling = part * v**2 / (2 * G)
    solver = pnode.Solver(event_fn=lambda t, y: y[0] - ceiling, **keywords)
    with torch.no_grad():
        solution = solver(state(0.0, v), times(0.0, 1.4))
    expected = (v - math.sqrt(v**2 - 2 * G * ceiling)) / G
    assert float(solution.event_time) == pytest.approx(expected, rel=1e-5)
    assert abs(float(solution.ys[-1, 0]) - ceiling) < 1e-10
    assert float(solution.ys[-1, 1]) > 0.0  # on the way up


def test_first_of_two_entries_whose_signs_are_those_of_the_start_again():
    def event(t, y):
        return torch.stack([(y[0] - 0.5) * (y[0] - 0.8), (y[0] - 0.55) * (y[0] - 0.3)])

    assert event_time(event) == pytest.approx(0.3, abs=1e-11)


def test_touching_and_missing():
    """A minimum above zero is no event, however near."""
    assert event_time(lambda t, y: (y[0] - 0.31) ** 2 + 1e-9) is None
    assert event_time(lambda t, y: (y[0] - 0.31) ** 2 - 1e-9) == pytest.approx(
        0.31 - math.sqrt(1e-9), abs=1e-10
    )


@every_solver
def test_steps_are_those_of_a_solve_without_event(name):
    """A near miss takes trial steps, after which the sweep goes on where it was: the same bits."""
    w = torch.tensor(1.3, dtype=D, requires_grad=True)
    keywords = {"params": [w], **SOLVERS[name]}

    def field(t, y):
        return torch.stack([y[1], -(w**2) * y[0]])

    y0 = state(1.0, 0.0)
    t = times(0.0, 1.0, 3.0, 6.0)
    with_event = pnode.Solver(field, event_fn=lambda t, y: y[0] + 1.001, **keywords)(y0, t)
    plain = pnode.Solver(field, **keywords)(y0, t)
    assert with_event.reason == "t_end" and with_event.stats.steps == plain.stats.steps
    assert torch.equal(with_event.ys, plain.ys)
    ours = torch.autograd.grad(with_event.ys.sum(), [y0, w])
    theirs = torch.autograd.grad(plain.ys.sum(), [y0, w])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ exact zeros, plateaus and jumps


@pytest.mark.parametrize("name", ["rk4", "dopri5", "esdirk6", "bdf"])
def test_zero_at_the_end_of_a_step_does_not_hide_a_crossing_before(name):
    """y = exp(-t) passes 0.1 at ln 10 = 2.30; the step that ends at 2.5 ends on the plateau."""
    keywords = SOLVERS[name] | ({"step_size": 0.5} if name == "rk4" else {})
    y0 = state(1.0)
    for when in (2.0, 2.4):
        solver = pnode.Solver(
            lambda t, y: -y, **keywords,
            event_fn=lambda t, y, when=when: torch.zeros_like(t) if t > when else y[0] - 0.1,
        )  # fmt: skip
        with torch.no_grad():
            solution = solver(y0, times(0.0, 3.0))
        time = float(solution.event_time)
        if when == 2.0:  # the plateau begins first
            assert time == pytest.approx(2.0, abs=1e-11)
            with pytest.raises(pnode.EventError, match="jumps across zero"):
                solver(y0, times(0.0, 3.0))
            continue
        assert float(solution.ys[-1]) == pytest.approx(0.1, abs=1e-9)
        assert time < 2.4
        exact = solver(y0, times(0.0, 3.0))
        (gradient,) = torch.autograd.grad(exact.event_time, y0)
        assert time == pytest.approx(math.log(10.0), abs=5e-3)
        assert float(gradient) == pytest.approx(1.0, abs=5e-3)


def test_plateaus():
    """An event is the first point at which the sign is not what it was: where a plateau begins."""
    relu = torch.nn.functional.relu
    assert event_time(lambda t, y: relu(0.3 - y[0])) == pytest.approx(0.3, abs=1e-11)
    assert event_time(lambda t, y: relu(y[0] - 0.3)) is None  # zero from the start on

    # Zero from the start, positive, and zero again.
    def hill(t, y):
        return relu(y[0] - 0.2) * relu(0.7 - y[0])

    assert event_time(hill) == pytest.approx(0.7, abs=1e-11)
    for step_size in (1.0, 0.25, 0.1, 0.03):
        found = event_time(hill, method="rk4", step_size=step_size)
        assert found == pytest.approx(0.7, abs=1e-11)

    # From one side of zero to the other over a plateau: where it begins, either way.
    def ramp(t, y):
        return relu(y[0] - 0.6) - relu(0.4 - y[0])

    assert event_time(ramp) == pytest.approx(0.4, abs=1e-11)
    assert event_time(lambda t, y: -ramp(t, y)) == pytest.approx(0.4, abs=1e-11)
    assert event_time(lambda t, y: 0.0 * y) is None


def test_a_solve_from_a_plateau_leaves_it():
    """Restarted where the plateau begins, no event until the other side is left again."""

    def event(t, y):
        return torch.where((y > 0.4) & (y < 0.6), 0.0, (y - 0.4) * (y - 0.6) * (y - 0.9))[0]

    solver = pnode.Solver(constant, event_fn=event, **ONE_STEP)
    with torch.no_grad():
        first = solver(state(0.0), times(0.0, 1.0))
        second = solver(first.ys[-1], torch.stack([first.event_time, times(1.0)[0]]))
    assert float(first.event_time) == pytest.approx(0.4, abs=1e-11)
    assert float(second.event_time) == pytest.approx(0.9, abs=1e-11)


JUMPS = {
    "in the state, with a graph": lambda t, y: torch.where(y[0] > 0.3, y[0] + 1.0, y[0] - 1.0),
    "in time, with a graph": lambda t, y: torch.where(t > 0.3, y[0] + 1.0, y[0] - 1.0),
    "without a graph": lambda t, y: (y[0] > 0.3).to(D) - 0.5,
    "to zero": lambda t, y: (y[0] < 0.3).to(D),
    "a pole": lambda t, y: 1.0 / (y[0] - 0.31),
}


@pytest.mark.parametrize("name", ["rk4", "dopri5", "esdirk6"])
@pytest.mark.parametrize("case", list(JUMPS))
def test_jumps_have_a_time_and_no_derivative(case, name):
    """Never the derivative of whatever the function does beside its jump."""
    solver = pnode.Solver(constant, event_fn=JUMPS[case], **SOLVERS[name])
    y0 = state(0.0)
    with torch.no_grad():
        solution = solver(y0, times(0.0, 1.0))
    assert float(solution.event_time) == pytest.approx(0.31 if "pole" in case else 0.3, abs=1e-10)
    with pytest.raises(pnode.EventError, match=r"no derivative.*no_grad") as info:
        solver(y0, times(0.0, 1.0))
    assert info.value.time == float(solution.event_time)


def test_steep_is_not_a_jump():
    y0 = state(0.0)
    solver = pnode.Solver(
        constant, event_fn=lambda t, y: torch.tanh(1e4 * (y[0] - 0.3)), **ONE_STEP
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(solver(y0, times(0.0, 1.0)).event_time, y0)
    assert float(gradient) == pytest.approx(-1.0, rel=1e-6)


BAD = {
    "nan beyond": lambda t, y: (0.3 - y[0]).sqrt() - 0.1,
    "infinite beyond": lambda t, y: torch.where(y[0] > 0.3, -math.inf, 0.29 - y[0]),
    "nan at the end of the step": lambda t, y: torch.where(t > 0.99, math.nan, 0.29 - y[0]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_crossing_before_event_fn_ends(case):
    """What event_fn is beyond its root does not matter, if the scan has a point between them."""
    event_fn = BAD[case]
    if case == "nan beyond":  # root at 0.29, and the scan's last points at 0.2904 and 0.295
        assert event_time(event_fn, end=0.295) == pytest.approx(0.29, abs=1e-11)
        with pytest.raises(pnode.EventError, match="NaN or infinity"):
            event_time(event_fn, method="rk4", step_size=0.5)
    elif case == "infinite beyond":
        with pytest.raises(pnode.EventError, match="NaN or infinity"):
            event_time(event_fn)
    else:
        assert event_time(event_fn) == pytest.approx(0.29, abs=1e-11)


@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_field_that_ends_at_the_event(fails):
    """Euler's last step ends beyond it, where only the interpolant would want f."""

    def field(t, y):
        if bool(y < 0.0):
            if fails == "nan":
                return y * math.nan
            raise ValueError("not there")
        return -torch.ones_like(y)

    keywords = {"method": "euler", "step_size": 0.1}
    found = event_time(height, field=field, y0=(0.25,), **keywords)
    assert found == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(ValueError if fails == "raises" else pnode.NonFiniteVectorField):
        event_time(lambda t, y: y[0] + 5.0, field=field, y0=(0.25,), **keywords)


def test_nan_before_the_crossing_is_named():
    def event(t, y):
        return torch.where((t > 0.4) & (t < 0.6), math.nan, 0.9 - y[0])

    solver = pnode.Solver(constant, event_fn=event, **ONE_STEP)
    with pytest.raises(pnode.EventError, match="NaN or infinity") as info:
        solver(state(0.0), times(0.0, 1.0))
    assert info.value.time == pytest.approx(0.5)
    solver.event_fn = lambda t, y: 0.9 - y[0]
    assert solver(state(0.0), times(0.0, 1.0)).reason == "event"


# -------------------------------------------------------------------------------- solves in a row


@every_solver
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
def test_going_on_from_an_event(name, direction):
    """cos t passes 0.3 at +-acos 0.3 + 2 pi k: each once, whatever is left of its last root."""
    target = math.acos(0.3)
    expected = [target, 2 * math.pi - target, 2 * math.pi + target, 4 * math.pi - target]
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1], -y[0]]), event_fn=lambda t, y: y[0] - 0.3, **SOLVERS[name]
    )  # fmt: skip
    y, t, found = state(1.0, 0.0), torch.zeros((), dtype=D), []
    with torch.no_grad():
        for _ in expected:
            solution = solver(y, torch.stack([t, t + direction * 10.0]))
            y, t = solution.ys[-1], solution.event_time
            found.append(direction * float(t))
            # The state returned has reached the other side, so what follows starts there.
            assert (float(y[0]) - 0.3) * (-1.0) ** len(found) >= 0.0
    assert found == pytest.approx(expected, abs=1e-3 if name == "rk4" else 2e-5)


@every_solver
@pytest.mark.parametrize("reset", [True, False], ids=["from the floor", "from the root as found"])
def test_twenty_bounces(name, reset):
    """From height H, a fifth of the speed lost each time; gradients too."""
    loss, y0 = torch.tensor(0.8, dtype=D, requires_grad=True), state(5.0, 0.0)
    solver = pnode.Solver(fall, event_fn=height, **SOLVERS[name])
    y, t, gradient = y0, torch.zeros((), dtype=D), not name.startswith("bdf")
    first, found, expected = math.sqrt(10.0 / G), [], []
    with torch.set_grad_enabled(gradient):
        for bounce in range(20):
            solution = solver(y, torch.stack([t, t.detach() + 10.0]))
            t, (position, speed) = solution.event_time, solution.ys[-1]
            y = torch.stack([torch.zeros_like(position) if reset else position, -loss * speed])
            found.append(float(t.detach()))
            expected.append(first * (1.0 + 2.0 * sum(0.8**n for n in range(1, bounce + 1))))
    rel = 1e-4 if name == "bdf" else 1e-9
    assert found == pytest.approx(expected, rel=rel)
    assert float(speed.detach()) == pytest.approx(-first * G * 0.8**19, rel=100 * rel)
    if not gradient:
        return
    by_loss, by_start = torch.autograd.grad(t, [loss, y0], retain_graph=True)
    slope = first * 2.0 * sum(n * 0.8 ** (n - 1) for n in range(1, 20))
    assert float(by_loss) == pytest.approx(slope, rel=1e-7)
    assert float(by_start[0]) == pytest.approx(expected[-1] / 10.0, rel=1e-7)
    by_loss, by_start = torch.autograd.grad(speed, [loss, y0])
    assert float(by_loss) == pytest.approx(-first * G * 19 * 0.8**18, rel=1e-6)
    assert float(by_start[0]) == pytest.approx(-first * G * 0.8**19 / 10.0, rel=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [0.0, 1e-17, 1e-15, 1e-13])
def test_round_off_at_the_start(size, sign):
    """A start as near to the surface as round-off is on it, on either side; one farther is not."""
    rk4 = {"method": "rk4", "step_size": 0.3}
    up = event_time(height, field=fall, y0=(sign * size, 5.0), end=3.0, **rk4)
    assert up == pytest.approx(10.0 / G, rel=1e-11)  # thrown up: the landing
    down = event_time(height, field=fall, y0=(sign * size, -5.0), end=3.0, **rk4)
    assert down is None  # through the floor
    near = event_time(height, field=fall, y0=(1e-9, -5.0), end=3.0, **rk4)
    assert near == pytest.approx(2e-10, rel=1e-3)
    below = event_time(height, field=fall, y0=(-1e-9, 5.0), end=3.0, **rk4)
    assert below == pytest.approx(2e-10, rel=1e-3)


def test_flight_much_shorter_than_a_step():
    """Up and down again within a ten-thousandth of the first step."""
    v = 1e-4 * G / 2.0
    found = event_time(height, field=fall, y0=(0.0, v), end=3.0, method="rk4", step_size=1.0)
    assert found == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn"])
def test_chattering_makes_progress(name):
    """y' = -sign(y): what a method makes of it crosses zero again and again, each time later."""
    keywords = {"method": name, "step_size": 0.1} if name != "dopri5" else {
        "method": name, "min_step": 1e-6, "first_step": 0.1, "rtol": 1e3}  # fmt: skip
    solver = pnode.Solver(
        lambda t, y: -torch.tanh(1e3 * y) + 0.3 * torch.sin(20 * t), event_fn=height, max_steps=999,
        **keywords,
    )  # fmt: skip
    y, t = state(0.05, grad=False), torch.zeros((), dtype=D)
    with torch.no_grad():
        for _ in range(12):
            solution = solver(y, torch.stack([t, t + 2.0]))
            if solution.event_time is None:
                break
            assert solution.event_time > t + 1e-12
            y, t = solution.ys[-1], solution.event_time


def test_events_at_the_first_and_last_times():
    rk4 = {"method": "rk4", "step_size": 0.25}
    assert event_time(lambda t, y: t, **rk4) is None  # at the start
    assert event_time(lambda t, y: t - 1.0, **rk4) == 1.0
    assert event_time(lambda t, y: t - 1.0 - 1e-9, **rk4) is None
    # At the end of the first step, and restarted from there.
    assert event_time(lambda t, y: (t - 0.25) * (t - 0.6), **rk4) == pytest.approx(0.25, abs=1e-12)
    solver = pnode.Solver(constant, event_fn=lambda t, y: (t - 0.25) * (t - 0.6), **rk4)
    assert float(solver(state(0.25), times(0.25, 1.0)).event_time) == pytest.approx(0.6, abs=1e-11)


def test_single_precision_goes_on_too():
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1], -y[0]]), event_fn=lambda t, y: y[0] - 0.3, method="rk4",
        step_size=0.1,
    )  # fmt: skip
    y, t, found = torch.tensor([1.0, 0.0]), 0.0, []
    for _ in range(4):
        solution = solver(y, times(t, t + 10.0))
        y, t = solution.ys[-1], float(solution.event_time)
        found.append(t)
    target = math.acos(0.3)
    expected = [target, 2 * math.pi - target, 2 * math.pi + target, 4 * math.pi - target]
    assert found == pytest.approx(expected, abs=1e-4)


def test_late_times():
    """Far from t = 0 a root is as exact as time is."""
    start = 1.7e9
    solver = pnode.Solver(constant, event_fn=lambda t, y: y[0] - 0.3, method="rk4", step_size=0.25)
    with torch.no_grad():
        solution = solver(state(0.0), times(start, start + 1.0))
        assert float(solution.event_time) == pytest.approx(start + 0.3, abs=1e-6)
        again = solver(solution.ys[-1], times(float(solution.event_time), start + 1.0))
    assert again.reason == "t_end"


def test_lagrange_weights():
    from pnode.base.interpolation import lagrange

    nodes = [0.3, 1.0, 1.2, 2.0]
    for degree in range(4):
        value = sum(w * s**degree for w, s in zip(lagrange(nodes, 1.7), nodes, strict=True))
        assert value == pytest.approx(1.7**degree, rel=1e-12)

"""Steps where time is resolved badly, and how many fixed steps there are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pnode
from pnode.solvers.clock import FixedGrid, least_step, move

D = torch.float64
EPS = float(np.finfo(float).eps)
FAR = 1.7e9  # seconds since 1970


def tensor(x):
    return torch.tensor(x, dtype=D)


# Adaptive steps near the resolution of t.

RATE, START = 5e3, 0.01
# Adaptive methods, and whether they are compiled: one graph of logistic() serves all tests.
WAYS = [("dopri5", False), ("bosh3", True), ("es325", False), ("es325", True), ("rodaspr", False)]


def logistic(rate=RATE):
    rate = tensor(rate)
    return lambda t, y: rate * y * (1.0 - y)


def exact(span):
    """The solution at, and its derivative with respect to START."""
    grown = math.exp(RATE * span)
    y = START * grown / (1.0 - START + START * grown)
    return y, grown / (1.0 - START + START * grown) ** 2


@pytest.mark.parametrize("method, compiled", WAYS)
def test_clock_and_state_move_by_the_same(method, compiled):
    """A step of some spacings of t: the error is the one near t = 0, forwards and backwards."""
    tolerances = {"rtol": 1e-8, "atol": 1e-10}
    solver = pnode.Solver(logistic(), method=method, compile=compiled, **tolerances)
    for times in ([FAR, FAR + 1e-3], [-FAR, 1e-3 - FAR]):
        y0 = tensor([START]).requires_grad_()
        solution = solver(y0, tensor(times))
        y, slope = exact(times[1] - times[0])
        assert abs(solution.ys[-1].item() - y) < 1e-7
        (gradient,) = torch.autograd.grad(solution.ys[-1].sum(), y0)
        assert gradient.item() == pytest.approx(slope, rel=1e-5)


def test_decreasing_times_far_from_zero():
    y, _ = exact(tensor([FAR, FAR + 1e-3]).diff().item())
    back = pnode.odeint(logistic(), tensor([y]), tensor([FAR + 1e-3, FAR]), rtol=1e-9)
    assert abs(back[-1].item() - START) < 1e-6


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf"])
def test_steps_are_the_differences_of_the_times(method):
    """The recorded length is what the clock moved by, exactly."""
    ends, states = [FAR], [tensor([0.0])]

    def note(step, t, y):
        ends.append(t)
        states.append(y)

    # y' = 1 is integrated exactly: y is the time since the start, as the steps count it.
    solver = pnode.Solver(lambda t, y: 1.0 + 0.0 * y, method=method, max_step=1e-5, monitor=note)
    solver(states[0], tensor([FAR, FAR + 2e-4]))
    moved = np.array(ends) - FAR
    assert np.abs(torch.stack(states)[:, 0].numpy() - moved).max() < 1e-14
    assert np.diff(ends).max() <= 1e-5


@pytest.mark.parametrize("method, compiled", [*WAYS, ("bdf", False), ("cn", False)])
def test_steps_of_few_spacings_are_refused(method, compiled):
    """The error control wants shorter steps than there are."""
    solver = pnode.Solver(logistic(1e6), method=method, compile=compiled)
    with pytest.raises(pnode.StepSizeUnderflow, match=r"float64.*measure t from nearby") as caught:
        solver(tensor([START]).requires_grad_(), tensor([FAR, FAR + 1e-3]))
    assert caught.value.time >= FAR
    # And afterwards it works.
    assert solver(tensor([START]).requires_grad_(), tensor([0.0, 1e-10])).ys[-1].item() > START


def test_a_first_step_below_the_resolution_does_not_stand_still():
    solver = pnode.Solver(lambda t, y: -y, first_step=1e-12)
    y = solver(tensor([1.0]), tensor([FAR, FAR + 1.0])).ys[-1].item()
    assert y == pytest.approx(math.exp(-1.0), rel=1e-6)


@pytest.mark.parametrize("method, compiled", WAYS)
def test_a_longest_step_below_the_resolution_is_refused(method, compiled):
    solver = pnode.Solver(logistic(), method=method, max_step=1e-7, compile=compiled)
    with pytest.raises(pnode.StepSizeUnderflow, match=r"max_step=1e-07.*2\.38e-07 apart"):
        solver(tensor([1.0]).requires_grad_(), tensor([FAR, FAR + 1e-3]))


def test_output_times_next_to_each_other_are_hit():
    times = [1.0, 1.0 + EPS, 1.0 + 3 * EPS, 1.0 + 8 * EPS, 2.0]
    for method in ("dopri5", "es325", "bdf"):
        ys = pnode.odeint(lambda t, y: -y, tensor([1.0]), tensor(times), method=method)
        assert ys[-1].item() == pytest.approx(math.exp(-1.0), rel=1e-5)
        # The step that ends at t is as long as the clock says, so rounding is all there is.
        assert abs(ys[1].item() - (1.0 - EPS)) <= EPS


def test_move_never_moves_further():
    generator = np.random.default_rng(0)
    for s in (*generator.uniform(-1e9, 1e9, 200), 0.0, -0.0, FAR):
        for wanted in (least_step(s, 1.0), 7.3 * math.ulp(s), 0.1, 1e9):
            after = move(s, wanted)
            assert s < after
            assert after - s <= wanted


# A clock in float64 under float32 times.


def test_times_of_single_precision():
    """Steps far below the spacing of float32 times; f gets the clock's time, rounded once."""
    seen = []

    def f(t, y):
        seen.append(t)
        return -y

    ends = []
    solver = pnode.Solver(
        f, method="rk4", step_size=1e-3, monitor=lambda step, t, y: ends.append(t)
    )
    start = 65536.0  # float32 times are 2^-7 apart there
    t = torch.tensor([start, start + 0.25], dtype=torch.float32)
    y = solver(torch.ones(1), t).ys[-1]
    assert len(ends) == 250
    assert np.diff(ends) == pytest.approx(1e-3, rel=1e-6)
    assert y.item() == pytest.approx(math.exp(-0.25), rel=1e-5)
    stages = [start + k * 1e-3 + c for k in range(250) for c in (0.0, 5e-4, 5e-4, 1e-3)]
    assert all(t.dtype is torch.float32 for t in seen)
    exactly = torch.tensor(stages, dtype=D)
    assert (torch.stack(seen).double() - exactly).abs().max() <= 2.0**-8 + 1e-9


def test_adaptive_steps_between_times_of_single_precision():
    t = torch.tensor([65536.0, 65536.0 + 2.0**-7])
    y = pnode.odeint(lambda t, y: 300.0 * y, torch.ones(1), t, rtol=1e-5, atol=1e-7)[-1]
    assert y.item() == pytest.approx(math.exp(300.0 * 2.0**-7), rel=1e-4)


# How many fixed steps there are.

GRIDS = {
    "400": (torch.linspace(0, 20, 401, dtype=D), 0.05, 400),
    "single": (torch.linspace(0, 1, 11), 0.1, 10),
    "half as long": (torch.linspace(0, 1, 11), 0.05, 20),
    "decreasing": (torch.linspace(20, 0, 401, dtype=D), 0.05, 400),
    "single, decreasing": (torch.linspace(1, 0, 11), 0.1, 10),
    "far": (1e6 + torch.linspace(0, 1, 11, dtype=D), 0.1, 10),
    "far below": (torch.linspace(0, 1, 11, dtype=D) - 1e6, 0.1, 10),
    "single, far": (1000.0 + torch.linspace(0, 1, 11), 0.1, 10),
    "across zero": (torch.linspace(-10, 10, 201), 0.1, 200),
    "summed up": (torch.full((300,), 0.1, dtype=D).cumsum(0), 0.1, 299),
    "numpy": (torch.from_numpy(np.arange(0.0, 10.0, 0.1)), 0.1, 99),
    "bfloat16": (torch.linspace(0, 1, 11).bfloat16(), 0.1, 10),
    "whole numbers": (torch.arange(5), 0.25, 16),
    "a little longer": (tensor([0.0, 1.0 + 1e-9]), 0.1, 11),
    "really longer": (torch.tensor([0.0, 1.00001]), 0.1, 11),
}


@pytest.mark.parametrize("case", list(GRIDS))
def test_number_of_fixed_steps(case):
    t, step_size, number = GRIDS[case]
    f = lambda t, y: -y  # noqa: E731
    for method in ("euler", "bdf2"):
        solver = pnode.Solver(f, method=method, step_size=step_size)
        y0 = tensor([1.0]).requires_grad_()
        solution = solver(y0, t)
        assert solution.stats.steps == number
        solution.ys.sum().backward()
        assert solution.stats.backward.steps == number


@pytest.mark.parametrize("case", ["400", "single", "decreasing", "single, far"])
def test_all_ways_take_the_same_number(case):
    """From Python, compiled, as dense output, under a limit, as planned; the same numbers."""
    t, step_size, number = GRIDS[case]
    ways = [
        {},
        {"compile": True},
        {"compile": True, "monitor": lambda step, t, y: None},
        {"checkpointing": "1kB"},
    ]
    # Compiled steps take the Jacobian at every iterate; so do these, for the same numbers.
    for method, reuse in (("euler", {}), ("beuler", {"jacobian_reuse": "iteration"})):
        ends = []
        for way in ways:
            options = {"method": method, "step_size": step_size, **reuse, **way}
            solver = pnode.Solver(logistic(1.0), **options)
            y0 = tensor([START]).requires_grad_()
            solution = solver(y0, t)
            assert solution.stats.steps == number
            ends.append(solution.ys[-1].detach())
            if "checkpointing" in way:
                solution.ys[-1].backward()
                plan = pnode.plan(method, steps=number, state_bytes=8, memory="1kB")
                assert solution.stats.backward.recomputed == plan.recomputed
        assert (torch.stack(ends) - ends[0]).abs().max() < 1e-14
    dense = pnode.Solver(lambda t, y: -y, method="rk4", step_size=step_size, dense=True)
    assert dense(tensor([1.0]), t).stats.steps == number


def test_steps_are_no_longer_than_the_times_leave_open():
    """Counts against rational arithmetic: never one too many, nor one too few by more."""
    generator = np.random.default_rng(1)
    for _ in range(500):
        number = int(generator.integers(1, 2000))
        step, start = generator.uniform(1e-3, 10.0), generator.uniform(-1e5, 1e5)
        exactly = FixedGrid((start, start + number * step), step)
        assert exactly.total == number
        more = FixedGrid((start, start + (number + 0.01) * step), step)
        assert more.total == number + 1
        fewer = FixedGrid((start, start + (number - 0.01) * step), step)
        assert fewer.total == number


# Solves that would not come to an end.


@pytest.mark.parametrize("method", ["rk4", "beuler", "bdf2"])
def test_counts_beyond_reason(method):
    def solver(**keywords):
        keywords = {"method": method, "step_size": 0.1} | keywords
        return pnode.Solver(lambda t, y: -y, **keywords)

    y0 = tensor([1.0])
    for times in ([0.0, 1e12], [1e12, 0.0], [1e300, 1e300 * (1.0 + EPS)]):
        with pytest.raises(pnode.ConfigurationError, match=r"step_size=0\.1 makes .* steps"):
            solver()(y0, tensor(times))
    with pytest.raises(pnode.ConfigurationError, match="step_size=1e-320 makes"):
        solver(step_size=1e-320)(y0, tensor([0.0, 1.0]))
    with pytest.raises(pnode.ConfigurationError, match="max_step=1e-12 makes"):
        pnode.Solver(lambda t, y: -y, max_step=1e-12)(y0, tensor([0.0, 1.0]))
    # Whoever says how many may have them, and is held to it.
    with pytest.raises(pnode.StepLimitReached):
        solver(max_steps=3)(y0, tensor([0.0, 1e12]))
    # An event may end it at any time.
    event = solver(event_fn=lambda t, y: y - 0.5)(y0, tensor([0.0, 1e12]))
    assert event.event_time.item() == pytest.approx(math.log(2.0), rel=0.1)


@pytest.mark.parametrize("method", ["rk4", "beuler", "bdf2"])
def test_fixed_steps_that_time_does_not_resolve(method):
    solver = pnode.Solver(lambda t, y: -y, method=method, step_size=1e-7)
    for times in ([FAR, FAR + 1e-3], [FAR, FAR - 1e-3], [FAR - 2e-3, FAR - 1e-3, FAR]):
        with pytest.raises(pnode.StepSizeUnderflow, match=r"step_size=1e-07.*2\.38e-07 apart"):
            solver(tensor([1.0]), tensor(times))
    # One step between output times is what the user asked for.
    one = pnode.Solver(lambda t, y: -y, method=method, step_size=1.0)
    spacing = math.ulp(FAR)
    y = one(tensor([1.0]), tensor([FAR, FAR + spacing])).ys[-1].item()
    assert y == pytest.approx(1.0 - spacing, abs=1e-12)


def test_steps_that_stand_still_before_an_event():
    solver = pnode.Solver(
        lambda t, y: -y, method="rk4", step_size=1e-9, event_fn=lambda t, y: y - 0.5
    )
    with pytest.raises(pnode.StepSizeUnderflow, match="step_size=1e-09"):
        solver(tensor([1.0]), tensor([FAR, math.inf]))


@pytest.mark.parametrize("method", ["dopri5", "bdf", "es325", "rodaspr", "cn"])
def test_intervals_that_steps_cannot_divide_by(method):
    solver = pnode.Solver(lambda t, y: -y, method=method)
    with pytest.raises(pnode.ConfigurationError, match=r"t\[1\] - t\[0\] is 4\.94e-324"):
        solver(tensor([1.0]), tensor([0.0, 5e-324]))
    with pytest.raises(pnode.ConfigurationError, match=r"t\[2\] - t\[1\] is -1\.00e-310"):
        solver(tensor([1.0]), tensor([1.0, 1e-310, 0.0]))
    with pytest.raises(pnode.ConfigurationError, match=r"t\[1\] - t\[0\] is inf"):
        solver(tensor([1.0]), tensor([-1.5e308, 1.5e308]))
    assert solver(tensor([1.0]), tensor([0.0, 1e-150])).ys[-1].item() == 1.0


# Who stopped a step that failed.


def test_min_step_says_so():
    stiff = lambda t, y: torch.stack([y[1], -1e4 * y[0]])  # noqa: E731
    y0 = tensor([1.0, 0.0])
    solver = pnode.Solver(stiff, min_step=0.5, first_step=0.5)
    with pytest.raises(pnode.StepSizeUnderflow, match=r"\(min_step=0\.5\): lower min_step"):
        solver(y0, [0.0, 10.0])
    broken = lambda t, y: -y + torch.where(t > 0.2, math.nan, 0.0)  # noqa: E731
    solver = pnode.Solver(broken, min_step=0.05, first_step=0.1)
    with pytest.raises(pnode.NonFiniteVectorField, match=r"min_step=0\.05 allows none"):
        solver(y0, [0.0, 10.0])
    with pytest.raises(pnode.NonFiniteVectorField) as caught:
        pnode.Solver(broken)(y0, [0.0, 10.0])
    assert "min_step" not in str(caught.value)


# Sensitivities at rest: docs/problems.md.


def sensitivity(solver, y0):
    """Derivative of the last state with respect to y0, of y' = 3 (1 - y) over [0, 10]."""
    y0 = tensor([y0]).requires_grad_()
    solution = solver(y0, tensor([0.0, 10.0]))
    (gradient,) = torch.autograd.grad(solution.ys[-1].sum(), y0)
    return gradient.item(), solution.stats.steps


def test_sensitivities_at_rest():
    """Steps that the state does not bound leave its derivative unresolved; max_step bounds them."""
    rest = lambda t, y: 3.0 * (1.0 - y)  # noqa: E731
    true = math.exp(-30.0)
    wrong, few = sensitivity(pnode.Solver(rest, rtol=1e-6), 1.0)
    assert abs(wrong) > 1e6 * true
    # It is the derivative of the steps taken: linear in y0, so any difference quotient is exact.
    bounded = pnode.Solver(rest, rtol=1e-6, max_step=0.2)
    right, more = sensitivity(bounded, 1.0)
    assert right == pytest.approx(true, rel=1e-2)
    assert few < more <= 60
    fixed, _ = sensitivity(pnode.Solver(rest, method="dopri5", step_size=0.1), 1.0)
    assert fixed == pytest.approx(true, rel=1e-3)

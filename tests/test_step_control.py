"""Tolerances per entry, controllers, and the limits of adaptive steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from replica import replica

import pnode

D = torch.float64
SPAN = torch.tensor([0.0, 2.0], dtype=D)


def two_scales(t, y):
    """A slow oscillator of size 1 and a fast one of size 0.1, uncoupled."""
    a, b, c, d = y.unbind(-1)
    return torch.stack([b, -a, 10.0 * d, -10.0 * c], dim=-1)


START = torch.tensor([1.0, 0.0, 0.1, 0.0], dtype=D)


def grid(**keywords):
    """Accepted step ends of a solve of ``two_scales``."""
    ends = []
    keywords = {"method": "dopri5", "rtol": 0.0} | keywords
    y0 = keywords.pop("y0", START)
    rhs = keywords.pop("rhs", two_scales)
    solver = pnode.Solver(rhs, monitor=lambda step, t, y: ends.append(t), **keywords)
    return ends, solver(y0, SPAN)


@pytest.mark.parametrize("method", ["dopri5", "cn", "es325"])
def test_equal_entries_are_the_number(method):
    number, _ = grid(method=method, rtol=1e-5, atol=1e-7)
    entries, _ = grid(
        method=method, rtol=torch.full((4,), 1e-5), atol=np.full(4, 1e-7),
    )  # fmt: skip
    # float32 1e-5 is 1e-5 to 1e-8 only: the grids agree nearly.
    assert len(entries) == len(number)
    assert entries == pytest.approx(number, rel=1e-6)
    exact, _ = grid(
        method=method,
        rtol=torch.full((4,), 1e-5, dtype=D),
        atol=torch.tensor([1e-7], dtype=D),
    )
    assert exact == number


@pytest.mark.parametrize("method", ["dopri5", "cn", "es325"])
def test_a_loose_entry_is_not_resolved(method):
    """With the fast pair's tolerance far above its size, the slow pair chooses the steps."""
    tight = torch.full((4,), 1e-6, dtype=D)
    loose = torch.tensor([1e-6, 1e-6, 1e3, 1e3], dtype=D)
    many, _ = grid(method=method, atol=tight)
    few, solution = grid(method=method, atol=loose)
    slow_alone, _ = grid(
        method=method, rhs=lambda t, y: torch.stack([y[1], -y[0]]), y0=START[:2],
        atol=1e-6 * math.sqrt(2.0),
    )  # fmt: skip
    assert len(few) < 0.5 * len(many)
    # The mean over four entries of which two count nothing: sqrt(2) times the tolerance.
    assert abs(len(few) - len(slow_alone)) <= 2
    exact = torch.tensor([math.cos(2.0), -math.sin(2.0)], dtype=D)
    assert (solution.ys[-1][:2] - exact).abs().max() < (1e-3 if method == "cn" else 1e-4)


def test_relative_tolerance_per_entry_is_relative():
    """rtol_i |y_i| = the absolute tolerance for an entry that stays where it is."""

    def rotation(t, y):
        return torch.stack([torch.zeros_like(y[0]), 5.0 * y[2], -5.0 * y[1]])

    y0 = torch.tensor([4.0, 1.0, 0.0], dtype=D)
    absolute, _ = grid(rhs=rotation, y0=y0, atol=torch.tensor([4e-3, 1e-8, 1e-8], dtype=D))
    relative, _ = grid(
        rhs=rotation, y0=y0, rtol=torch.tensor([1e-3, 0.0, 0.0], dtype=D),
        atol=torch.tensor([0.0, 1e-8, 1e-8], dtype=D),
    )  # fmt: skip
    assert relative == pytest.approx(absolute, rel=1e-12)


def test_automatic_first_step_uses_the_entries():
    """The formula of Hairer, Norsett & Wanner in units of atol_i + rtol_i |y_i|."""
    atol = torch.tensor([1e-3, 1e-5, 1e-6, 1e-4], dtype=D)
    rtol = torch.tensor([0.0, 1e-3, 1e-4, 0.0], dtype=D)
    ends, _ = grid(atol=atol, rtol=rtol)
    scale = atol + rtol * START.abs()

    def norm(x):
        return float((x / scale).square().mean().sqrt())

    slope = two_scales(0.0, START)
    guess = 0.01 * norm(START) / norm(slope)
    curvature = norm(two_scales(0.0, START + guess * slope) - slope) / guess
    expected = min(100 * guess, (0.01 / max(norm(slope), curvature)) ** (1 / 6))
    assert ends[0] == pytest.approx(expected, rel=1e-12)


def test_tuple_state_takes_a_tuple():
    def field(t, y):
        return y[1], -y[0].clone()

    y0 = (torch.tensor([[1.0, 2.0]], dtype=D), torch.tensor([[0.5, 0.0]], dtype=D))
    parts, _ = grid(rhs=field, y0=y0, atol=(torch.tensor([1e-8, 1e-6], dtype=D), 1e-5), rtol=0.0)
    flat = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=D)
    one, _ = grid(
        rhs=lambda t, y: torch.cat([y[2:], -y[:2]]), y0=flat,
        atol=torch.tensor([1e-8, 1e-6, 1e-5, 1e-5], dtype=D),
    )  # fmt: skip
    assert parts == one


def test_float32_state():
    atol = torch.tensor([1e-3, 1e-3, 1.0, 1.0])
    _, solution = grid(y0=START.float(), atol=atol)
    assert solution.ys.dtype is torch.float32
    assert abs(float(solution.ys[-1, 0]) - math.cos(2.0)) < 1e-2


def test_gradients_with_entrywise_tolerances_are_those_of_the_steps():
    """The same grid as fixed numbers give, so the same gradient."""
    results = []
    for atol in (1e-6, torch.full((4,), 1e-6, dtype=D)):
        y0 = START.clone().requires_grad_()
        ys = pnode.odeint(two_scales, y0, SPAN, rtol=0.0, atol=atol)
        results.append(torch.autograd.grad(ys[-1].square().sum(), y0)[0])
    assert torch.equal(*results)


def test_solvers_are_reused_and_copied():
    """One PETSc object serves every solve with the same entries; copies keep them."""
    atol = torch.tensor([1e-6, 1e-6, 1e-3, 1e-3], dtype=D)
    solver = pnode.Solver(two_scales, rtol=1e-6, atol=atol)
    first = solver(START, SPAN).ys
    assert torch.equal(solver(START, SPAN).ys, first)
    assert len(solver._engine._pool._idle) == 1
    atol.fill_(1.0)  # the solver has its own
    assert torch.equal(copy.deepcopy(solver)(START, SPAN).ys, first)
    assert "1e-06..0.001" in repr(solver)
    solver(START.expand(3, 4).contiguous(), SPAN)  # broadcast to another state
    assert len(solver._engine._pool._idle) == 2


CONSTRUCTOR_ERRORS = {
    "negative": (torch.tensor([1e-3, -1e-3]), r"atol\[1\]=-0.001"),
    "nan": (torch.tensor([[1e-3], [math.nan]]), r"atol\[1, 0\]=nan"),
    "infinite": (math.inf, "atol=inf"),
    "complex": (torch.ones(2, dtype=torch.complex128), "complex128"),
    "requires grad": (torch.ones(2, requires_grad=True), "atol.detach()"),
    "empty tuple": ((), "atol is empty"),
    "text in a tuple": ((1e-3, "tight"), r"atol\[1\]='tight'"),
    "negative in a tuple": ((1e-3, torch.tensor([1.0, -2.0])), r"atol\[1\]\[1\]=-2.0"),
}


@pytest.mark.parametrize("case", list(CONSTRUCTOR_ERRORS))
def test_unusable_tolerances(case):
    value, message = CONSTRUCTOR_ERRORS[case]
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(two_scales, atol=value)


SOLVE_ERRORS = {
    "shape": ({"atol": torch.ones(3)}, START, r"atol has shape \(3,\).*\(4,\)"),
    "more dimensions": ({"rtol": torch.ones(2, 4)}, START, r"rtol has shape \(2, 4\)"),
    "tuple for a tensor": ({"rtol": (1e-3,) * 4}, START, "rtol has 4 parts and y0 is one tensor"),
    "tensor for a tuple": ({"rtol": torch.ones(4)}, (START,), "rtol is one tensor and y0 is a"),
    "too few": ({"atol": (1e-3,)}, (START, START), "atol has 1 parts and y0 is a tuple of 2"),
    "shape of a part": ({"atol": (1e-3, torch.ones(3))}, (START, START), r"atol\[1\] has shape"),
    "both zero": (
        {"rtol": 0.0, "atol": torch.tensor([1e-3, 0.0, 0.0, 1e-3])}, START,
        "both 0 for 2 entries",
    ),
    "all zero": ({"rtol": 0.0, "atol": torch.zeros(4)}, START, "both 0 for 4 entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SOLVE_ERRORS))
def test_tolerances_that_do_not_fit_the_state(case):
    keywords, y0, message = SOLVE_ERRORS[case]
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(two_scales, **keywords)(y0, SPAN)


# Controllers.

FILTER_COEFFICIENTS = {  # Söderlind & Wang (2006), Table 1: kbeta_1..3, alpha_2..3
    "PI42": ((3 / 5, -1 / 5, 0), (0, 0)),
    "PI34": ((7 / 10, -4 / 10, 0), (0, 0)),
    "PC11": ((2, -1, 0), (-1, 0)),
    "H211b": ((1 / 4, 1 / 4, 0), (1 / 4, 0)),
    "H312PID": ((1 / 18, 2 / 18, 1 / 18), (0, 0)),
    "H321": ((6 / 18, 1 / 18, -5 / 18), (-15 / 18, -3 / 18)),
}


def predicted_steps(slope, name, atol, h, end):
    """Ends of heun2's accepted steps for y' = slope(t), from the filter's recursion.

    The error of heun2 (PETSc's 2a) against Euler is h/2 (k_2 - k_1), of order k = 2. A step is
    accepted where the proposed ratio is at least 0.81. A rejection takes the last accepted step
    out of the filter's memory, once: PETSc sees it as a rollback.
    """
    (b1, b2, b3), (a2, a3) = FILTER_COEFFICIENTS[name]
    errors, ratios = [1.0] * 3, [1.0] * 3
    t, ends, forgotten, rejected, first = 0.0, [], False, 0, True
    while t + h < end:
        control = (atol / abs(h / 2 * (slope(t + h) - slope(t)))) ** 0.5
        ratio = control**b1 * errors[0] ** b2 * errors[1] ** b3
        ratio *= ratios[0] ** -a2 * ratios[1] ** -a3
        ratio = 1.0 + math.atan(ratio - 1.0)
        if ratio >= 0.81:
            errors, ratios = [control, *errors[:2]], [ratio, *ratios[:2]]
            t += h
            ends.append(t)
            forgotten = first = False
        else:
            rejected += 1
            if not forgotten and not first:
                errors, ratios = [*errors[1:], 1.0], [*ratios[1:], 1.0]
                forgotten = True
        h *= min(max(ratio, 0.1), 10.0)
    return ends, rejected


@pytest.mark.parametrize("name", list(FILTER_COEFFICIENTS))
def test_steps_are_those_of_the_filter(name):
    """The filter remembers from step to step, although each is a call of its own."""

    def slope(t):
        return math.cos(3.0 * t) + 4.0 / (1.0 + 400.0 * (t - 1.0) ** 2)

    atol = 1e-3
    expected, rejected = predicted_steps(slope, name, atol, 0.05, 2.0)
    ends, solution = grid(
        rhs=lambda t, y: torch.full_like(y, slope(float(t))), y0=torch.zeros(1, dtype=D),
        method="heun2", atol=atol, first_step=0.05, controller=name,
    )  # fmt: skip
    assert rejected > 0 and len(expected) > 30
    assert solution.stats.rejected >= rejected
    # The last two steps are fitted to the end.
    assert ends[: len(expected) - 2] == pytest.approx(expected[:-2], rel=1e-9)


def test_filters_start_afresh_in_every_solve():
    solver = pnode.Solver(two_scales, controller="H312PID", rtol=1e-7, atol=1e-7)
    first = solver(START, SPAN)
    second = solver(START, SPAN)
    assert torch.equal(first.ys, second.ys)
    assert first.stats == second.stats


@pytest.mark.parametrize("controller", ["basic", "pi", "pid", "H211b"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "es325"])
def test_errors_are_proportional_to_the_tolerance(method, controller):
    """The error falls by about as much as the tolerance; the slope of the fit is near one."""
    tolerances = [1e-4, 1e-5, 1e-6, 1e-7]
    end = torch.tensor(
        [math.cos(2.0), -math.sin(2.0), 0.1 * math.cos(20.0), -0.1 * math.sin(20.0)], dtype=D
    )
    errors = []
    for tolerance in tolerances:
        _, solution = grid(method=method, atol=tolerance, controller=controller)
        errors.append(float((solution.ys[-1] - end).norm()))
    slope = np.polyfit(np.log10(tolerances), np.log10(errors), 1)[0]
    # Error per step is controlled: a method of order p with an error estimate of order q has a
    # global error tol^(p / q), from 3/3 to 5/5 here, and 3/2 where p exceeds q - 1.
    assert 0.75 < slope < 1.35, errors


def test_controllers_take_different_steps():
    counts = {}
    for controller in ("basic", "pi", "pid", "PI33", "H0321"):
        ends, solution = grid(atol=1e-8, controller=controller)
        counts[controller] = (len(ends), solution.stats.rejected, ends[5])
    assert len(set(counts.values())) == len(counts)


def test_names_of_controllers():
    by_alias, _ = grid(atol=1e-6, controller="pid")
    by_name, _ = grid(atol=1e-6, controller="h312pid")
    assert by_alias == by_name
    assert grid(atol=1e-6, controller="dsp")[0] == grid(atol=1e-6, controller="PI42")[0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"controller": "PIX"}, "'PIX' is unknown.*'basic'.*'H211PI'"),
        ({"controller": None}, "None is unknown"),
        ({"controller": "none"}, "step_size=h"),
        ({"controller": "glee"}, "global error"),
        ({"controller": "cfl"}, "CFL number"),
        ({"controller": "history"}, "recorded steps"),
        ({"controller": "pi", "method": "bdf"}, "'bdf'.*itself"),
        ({"controller": "pi", "step_size": 0.1}, "step_size.*no controller"),
    ],
)
def test_unusable_controller(keywords, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(two_scales, **keywords)


@pytest.mark.parametrize("controller", ["basic", "pi", "pid"])
def test_limits_of_the_step(controller):
    """max_step bounds every step; steps at min_step that fail are an error."""
    ends, _ = grid(atol=1e-3, controller=controller, max_step=0.03)
    steps = np.diff([0.0, *ends])
    assert steps.max() <= 0.03 * (1.0 + 1e-12)
    assert (np.abs(steps - 0.03) < 1e-12).sum() > 40
    free, _ = grid(atol=1e-7, controller=controller)
    smallest = np.diff([0.0, *free])[:-2].min()
    ends, _ = grid(atol=1e-7, controller=controller, min_step=0.9 * smallest)
    assert np.diff([0.0, *ends])[:-2].min() >= 0.9 * smallest * (1.0 - 1e-12)
    with pytest.raises(pnode.StepSizeUnderflow, match=r"smallest one is 2\.00e-01"):
        grid(atol=1e-9, controller=controller, min_step=0.2)


def test_controller_through_odeint_and_gradients():
    """The gradient is that of the accepted steps, whoever chose them."""
    y0 = START.clone().requires_grad_()
    ends = []
    ys = pnode.odeint(
        two_scales, y0, SPAN, rtol=1e-6, atol=1e-6, method="bosh3", controller="pid",
        monitor=lambda step, t, y: ends.append(t),
    )  # fmt: skip
    (ours,) = torch.autograd.grad(ys[-1].square().sum(), y0)
    states = replica(two_scales, "bosh3", y0, [0.0, *ends])
    (theirs,) = torch.autograd.grad(states[-1].square().sum(), y0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-11

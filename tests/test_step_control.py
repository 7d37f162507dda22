"""Tolerances per entry, controllers, and the limits of adaptive steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

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
    "infinite": (torch.tensor([math.inf, 1e-3]), r"atol\[0\]=inf"),
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

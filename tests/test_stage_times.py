"""Every stage has one time, the same forwards and backwards, and at a step's end the end's."""

from __future__ import annotations

import pytest
import torch
from representatives import representatives

import pnode
from pnode.solvers.methods import METHODS

D = torch.float64
CASES = [(m.name, form, 1.0) for m in METHODS for form in m.forms if form != "separable"]
CASES += [
    (m.name, form, -1.0) for m in representatives() for form in m.forms if form != "separable"
]


def solve(name, form, field, params, times, **keywords):
    keywords = {"method": name, "params": params} | keywords
    y0 = torch.zeros(1, dtype=D)
    if form == "imex":
        solver = pnode.Solver(implicit=field, explicit=field, **keywords)
    elif form == "imex_mass":
        mass = torch.tensor([2.0], dtype=D)
        solver = pnode.Solver(implicit=field, explicit=field, mass=mass, **keywords)
    elif form == "mass":
        solver = pnode.Solver(field, mass=torch.tensor([2.0], dtype=D), **keywords)
    elif form == "residual":
        solver = pnode.Solver(residual=lambda t, y, rate: 3 * rate - field(t, y), **keywords)
    else:
        solver = pnode.Solver(field, **keywords)
    return solver(y0, times)


@pytest.mark.parametrize(("name", "form", "sign"), CASES)
def test_a_switch_at_the_end_of_a_step(name, form, sign):
    """y is linear in a, whichever steps see the switch: its derivative is y / a."""
    a = torch.tensor(3.0, dtype=D, requires_grad=True)

    def field(t, y):
        return a * torch.where(sign * t >= 0.7, 1.0, 0.0) + 0.0 * y

    times = sign * torch.tensor([0.0, 0.7, 1.0], dtype=D)
    y = solve(name, form, field, [a], times, step_size=0.07).ys[-1]
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert torch.isclose(gradient * 3.0, y.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["dopri5", "bosh3", "es325", "esdirk6", "rodaspr", "bdf"])
def test_a_switch_that_adaptive_steps_find(name):
    a = torch.tensor(3.0, dtype=D, requires_grad=True)

    def field(t, y):
        return a * torch.where(t >= 0.7, 1.0, 0.0) + 0.0 * y

    times = torch.tensor([0.0, 0.7, 2.0], dtype=D)
    y = solve(name, "rhs", field, [a], times, rtol=1e-6, max_step=0.1).ys[-1]
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert torch.isclose(gradient * 3.0, y.sum(), rtol=1e-9)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "ssprk43", "cn", "beuler", "es325", "bdf2"])
def test_a_stage_at_the_end_stands_at_the_end(name):
    """0.1 + 0.1 + 0.1 is not 0.3: the outputs' times are seen as they were given."""
    seen = set()
    a = torch.tensor(3.0, dtype=D, requires_grad=True)

    def field(t, y):
        seen.add(float(t))
        return -a * y

    times = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=D)
    loss = solve(name, "rhs", field, [a], times, step_size=0.1).ys.sum()
    forwards = set(seen)
    assert {0.3, 0.7} <= forwards
    seen.clear()
    torch.autograd.grad(loss, a)
    assert seen <= forwards


@pytest.mark.parametrize("name", ["rk4", "cn", "es325", "ark3"])
def test_a_budget_sees_the_same_times(name):
    form = "imex" if name == "ark3" else "rhs"
    a = torch.tensor(3.0, dtype=D, requires_grad=True)

    def field(t, y):
        return a * torch.where(t >= 0.35, 1.0, 0.0) - y

    times = torch.tensor([0.0, 0.35, 1.0], dtype=D)
    found = [
        torch.autograd.grad(
            solve(name, form, field, [a], times, step_size=0.07, **keywords).ys.sum(), a
        )[0]
        for keywords in ({}, {"checkpointing": 100})
    ]
    assert torch.isclose(*found, rtol=1e-12)


@pytest.mark.parametrize("name", ["rodas3", "ra34pw2", "rodaspr", "es325", "dopri5"])
def test_a_switch_at_a_step_of_a_grid(name):
    """1/12 six times is a little less than 0.5, where a step of the grid ends."""
    a = torch.tensor(3.0, dtype=D, requires_grad=True)

    def field(t, y):
        return a * torch.where(t < 0.5, 0.5 * t, 2.0 * t) + 0.0 * y

    steps = torch.linspace(0.0, 1.0, 13, dtype=D)
    y = solve(name, "rhs", field, [a], steps[[0, -1]], steps=steps).ys[-1]
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert torch.isclose(gradient * 3.0, y.sum(), rtol=1e-12)

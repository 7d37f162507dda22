"""Cost integrals of symplectic methods: order, replica, and no influence on the solve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import grad
from torch.func import functional_call, jvp

import pnode
from pnode.solvers.methods import METHODS

D = torch.float64
T = torch.tensor([0.0, 0.3, 1.0], dtype=D)
ORDERS = {"symplectic_euler": 1, "velocity_verlet": 2, "ruth3": 3, "forest_ruth": 4}
methods = pytest.mark.parametrize("method", ORDERS)


class Pendulum(torch.nn.Module):
    """Separable, neither linear nor autonomous."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(1.3, dtype=D))

    def forward(self, t, y):
        q, p = y
        return (
            torch.sin(0.7 * p) * (1.0 + 0.2 * t) + 0.1 * p,
            -self.k * torch.sin(q) * (1.0 + 0.5 * torch.cos(t)),
        )


class Cost(torch.nn.Module):
    """Two numbers of positions, momenta, time and a parameter."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.4, dtype=D))

    def forward(self, t, y):
        q, p = y
        first = self.w * (q * p**3).sum() + t * p.square().sum()
        return torch.stack([first, torch.exp(-q.square()).sum() * torch.cos(p).sum()])


def start():
    return (
        torch.tensor([0.6, -0.4], dtype=D, requires_grad=True),
        torch.tensor([0.2, 1.1], dtype=D, requires_grad=True),
    )


def replica(f, r, method, y, times, h):
    """The steps and their averages of r written out."""
    (method,) = [one for one in METHODS if one.name == method]
    nodes, weights = np.polynomial.legendre.leggauss(1 if method.order < 3 else 2)
    (q, p), total = y, torch.zeros(2, dtype=D)
    ys, costs, t = [(q, p)], [total], float(times[0])
    for end in times[1:].tolist():
        number = math.ceil(abs(end - t) / h - 1e-9)
        length = (end - t) / number
        for n in range(number):
            now = t + n * length
            for update in method.half_updates:
                at = torch.tensor(now + update.offset * length, dtype=D)
                rate = f(at, (q, p))[update.part]
                reach = update.weight * length
                if update.part == 0:
                    q = q + reach * rate
                    continue
                for x, w in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
                    total = total + reach * w * r(at, (q, p + x * reach * rate))
                p = p + reach * rate
        t = end
        ys.append((q, p))
        costs.append(total)
    return tuple(torch.stack(part) for part in zip(*ys, strict=True)), torch.stack(costs)


def loss_of(ys, costs):
    return sum((part**3).sum() for part in ys) + (costs**2).sum() + costs[1, 0]


def off_by(found, expected):
    return max(
        float((a - b).detach().norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )


@methods
@pytest.mark.parametrize("times", [T, T.flip(0)], ids=["forth", "back"])
def test_integrals_and_gradients_are_those_of_a_replica(method, times):
    f, r, y0 = Pendulum(), Cost(), start()
    inputs = [*y0, f.k, r.w]
    options = {"method": method, "step_size": 0.1, "compile": False}
    solution = pnode.Solver(f, cost=r, **options)(y0, times)
    ys, costs = replica(f, r, method, y0, times, 0.1)
    assert off_by([solution.costs[1:]], [costs[1:]]) < 1e-13
    assert all(map(torch.equal, solution.ys, pnode.Solver(f, **options)(y0, times).ys))
    first = grad(loss_of(solution.ys, solution.costs), inputs, create_graph=True)
    expected = grad(loss_of(ys, costs), inputs, create_graph=True)
    assert off_by(first, expected) < 1e-12
    torch.manual_seed(0)
    v = [torch.randn_like(one) for one in inputs]
    second, other = (
        grad(sum((g * d).sum() for g, d in zip(one, v, strict=True)), inputs)
        for one in (first, expected)
    )
    assert off_by(second, other) < 1e-11


@methods
def test_order_of_convergence(method):
    """Also for an integrand of momenta, along which an update moves."""
    f, r = Pendulum(), Cost()

    def costs(**options):
        with torch.no_grad():
            return pnode.Solver(f, cost=r, compile=False, **options)(start(), T).costs[-1]

    exact = costs(method="dopri8", rtol=1e-12, atol=1e-13)
    coarse, fine = ((costs(method=method, step_size=h) - exact).abs().max() for h in (0.05, 0.025))
    assert math.log2(coarse / fine) > ORDERS[method] - 0.1


@methods
def test_tangents_are_those_of_the_adjoint(method):
    f, r, y0 = Pendulum(), Cost(), tuple(part.detach() for part in start())
    solver = pnode.Solver(f, cost=r, method=method, step_size=0.1, compile=False)
    parameters = {name: one.detach() for name, one in solver.named_parameters()}

    def costs(y, own):
        return functional_call(solver, own, (y, T)).costs

    ones = {name: torch.ones_like(one) for name, one in parameters.items()}
    _, tangent = jvp(costs, (y0, parameters), (tuple(map(torch.ones_like, y0)), ones))
    y = start()
    value = solver(y, T).costs
    inputs = [*y, *solver.parameters()]
    for index in ((1, 0), (2, 1)):
        slopes = grad(value[index], inputs, retain_graph=True)
        found = sum(float(slope.sum()) for slope in slopes)
        assert float(tangent[index]) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("store", ["stages", "solutions"])
def test_under_a_budget(store):
    f, r, found = Pendulum(), Cost(), []
    for limit in (None, pnode.Checkpointing(memory=400, store=store)):
        y0 = start()
        solution = pnode.Solver(
            f, cost=r, method="ruth3", step_size=0.05, checkpointing=limit, compile=False
        )(y0, T)
        found.append(grad(loss_of(solution.ys, solution.costs), [*y0, f.k, r.w]))
    assert solution.stats.backward.recomputed > 0
    assert all(map(torch.equal, *found))


def test_a_pair_that_is_not_separable_is_still_refused():
    """The integrand may depend on both parts, the field may not."""

    class Coupled(torch.nn.Module):
        def forward(self, t, y):
            return y[1], -y[0] - 0.1 * y[1]

    solver = pnode.Solver(
        Coupled(), cost=Cost(), method="velocity_verlet", step_size=0.1, compile=False
    )
    with pytest.raises(pnode.ConfigurationError, match="dp/dt depends on p"):
        solver(start(), T)


def test_times_interpolation_and_events():
    """Between steps the slope of the integral is r; the time's derivative is that of the flow."""
    f, r = Pendulum(), Cost()
    options = {"cost": r, "method": "forest_ruth", "compile": False}
    t = torch.tensor([0.0, 0.3, 0.95], dtype=D, requires_grad=True)
    solution = pnode.Solver(f, step_size=0.1, **options)(start(), t)
    (slope,) = grad(solution.costs[-1, 0], t)
    last = tuple(part[-1] for part in solution.ys)
    assert torch.allclose(slope[-1], r(t[-1], last)[0], rtol=1e-12)
    fine = pnode.Solver(f, step_size=0.002, **options)(start(), t.detach())
    dense = pnode.Solver(f, step_size=0.01, dense=True, **options)(start(), t.detach())
    assert torch.allclose(dense.costs, fine.costs, rtol=0, atol=1e-8)
    event = pnode.Solver(f, step_size=0.01, event_fn=lambda t, y: t - 0.95, **options)
    ended = event(start(), [0.0, 0.3, 2.0])
    assert ended.reason == "event"
    assert torch.allclose(ended.costs[-1], fine.costs[-1], rtol=0, atol=1e-8)

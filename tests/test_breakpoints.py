"""Break points: right order, counts and derivatives where f jumps in t, and what is refused."""

import math

import pytest
import torch

import pnode
from pnode import controls

D = torch.float64
TIMES = torch.tensor([0.0, 0.25, 0.5, 1.2], dtype=D)
BREAKS = torch.tensor([0.37, 0.8], dtype=D)
VALUES = torch.tensor([1.0, -2.0, 0.5], dtype=D)


def vector(*numbers, dtype=D):
    return torch.tensor(numbers, dtype=dtype)


class Driven(torch.nn.Module):
    """A nonlinear field driven by a hold that switches at times."""

    def __init__(self, times=BREAKS, values=VALUES, reflected=False):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(1.3, dtype=D))
        times = torch.cat([times.detach()[:1] - 1.0, times.detach()])
        self.u = controls.hold(times, torch.nn.Parameter(values.clone()))

    def forward(self, t, y):
        return -self.a * y + self.u(t).to(y) * torch.cos(y)


def gradients(of, *tensors):
    return torch.autograd.grad(of, tensors)


def chained(make, field, y0, times, breaks):
    """Solve from break to break by solves of their own; each sees one value of the hold."""
    rows, y, start, position = [y0], y0, times[0], 1
    for k, end in enumerate([*breaks, times[-1]]):
        value = field.u.values[k]
        solver = make(
            lambda t, y, u=value: -field.a * y + u * torch.cos(y), [field.a, field.u.values]
        )
        inside = []
        while position < len(times) and times[position] < end:
            inside.append(times[position])
            position += 1
        ys = solver(y, torch.stack([start, *inside, end])).ys
        rows += list(ys[1:-1])
        y, start = ys[-1], end
    return torch.stack([*rows, y])


LOOSE = {"rtol": 1e-4, "atol": 1e-6}
STEPS = {
    "rk4": {"step_size": 0.1}, "dopri5": LOOSE, "cn": {"step_size": 0.2}, "es325": LOOSE,
    "rodaspr": LOOSE, "bdf": LOOSE, "radau5": LOOSE,
}  # fmt: skip


@pytest.mark.parametrize("method", STEPS)
def test_parts_are_solves_of_their_own(method):
    """Bit for bit, with all first derivatives and those by times and breaks."""
    field, y0 = Driven(), vector(0.5, -0.2).requires_grad_()
    times, breaks = TIMES.clone().requires_grad_(), BREAKS.clone().requires_grad_()
    solution = pnode.Solver(field, method=method, **STEPS[method])(y0, times, breakpoints=breaks)

    def make(f, params):
        return pnode.Solver(f, params=params, method=method, **STEPS[method])

    expected = chained(make, field, y0, times, breaks)
    assert torch.equal(solution.ys, expected)
    assert torch.equal(solution.ts, times)
    weights = torch.linspace(1.0, 2.0, expected.numel(), dtype=D).view_as(expected)
    wanted = (y0, times, breaks, field.a, field.u.values)
    found = gradients((weights * solution.ys).sum(), *wanted)
    for one, other in zip(found, gradients((weights * expected).sum(), *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert bool(found[2].abs().gt(1e-2).all())


@pytest.mark.parametrize("backwards", [False, True])
def test_derivative_by_a_break_is_that_of_central_differences(backwards):
    """f depends on t smoothly as well; time may decrease, and the breaks may come in any order."""

    def loss(breaks, y0):  # steps so accurate that their number does not matter
        first = torch.cat([breaks.detach()[:1] - 5.0, breaks.detach()])
        u = controls.hold(first, VALUES)
        solver = pnode.Solver(
            lambda t, y: u(t) * torch.cos(y) + torch.sin(3 * t) * y,
            method="verner8",
            step_size=0.1,
        )
        times = TIMES.flip(0) if backwards else TIMES
        return solver(y0, times, breakpoints=breaks).ys[1:].square().sum()

    breaks, y0 = BREAKS.clone().requires_grad_(), vector(0.5).requires_grad_()
    found = gradients(loss(breaks, y0), breaks, y0)
    for tensor, gradient in zip((breaks, y0), found, strict=True):
        for i in range(len(tensor)):
            move = torch.zeros_like(tensor).detach()
            move[i] = 1e-5
            with torch.no_grad():
                given = [(breaks, y0), (breaks, y0)]
                ahead, behind = (
                    loss(*(x + sign * move if x is tensor else x for x in pair))
                    for sign, pair in zip((1.0, -1.0), given, strict=True)
                )
            torch.testing.assert_close(gradient[i], (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def switching(t, y):
    u = controls.hold(vector(0.0, 0.4, 0.8), VALUES)
    return u(t) * torch.cos(y) + torch.sin(3 * t) * y


@pytest.fixture(scope="module")
def exact():
    """At 0.2, 0.4, 0.8, 1.2, by solves that do not know of each other."""
    y, rows = vector(0.5), []
    for value, times in zip(VALUES, ([0.0, 0.2, 0.4], [0.4, 0.8], [0.8, 1.2]), strict=True):
        solver = pnode.Solver(
            lambda t, y, u=value: u * torch.cos(y) + torch.sin(3 * t) * y, method="verner8",
            step_size=0.02,
        )  # fmt: skip
        rows += list(solver(y, torch.tensor(times, dtype=D)).ys[1:])
        y = rows[-1]
    return torch.cat(rows)


BETWEEN, AT_BREAKS = vector(0.0, 0.2, 1.2), vector(0.0, 0.4, 0.8, 1.2)


@pytest.mark.parametrize(
    ("method", "order", "h", "times"),
    [("rk4", 4, 0.1, BETWEEN), ("rk4", 4, 0.1, AT_BREAKS), ("cn", 2, 0.1, BETWEEN),
     ("es325", 3, 0.1, AT_BREAKS), ("rodaspr", 4, 0.05, BETWEEN), ("bdf2", 2, 0.02, AT_BREAKS),
     ("verner6", 6, 0.2, AT_BREAKS), ("radau5", 5, 0.2, BETWEEN)],
)  # fmt: skip
def test_methods_keep_their_order_at_jumps(exact, method, order, h, times):
    """A hold that switches between outputs, or at them."""
    rows = {0.2: 0, 0.4: 1, 0.8: 2, 1.2: 3}
    right = exact[[rows[t] for t in times.tolist()[1:]]]

    def error(step_size):
        solver = pnode.Solver(switching, method=method, step_size=step_size, compile=False)
        ys = solver(vector(0.5), times, breakpoints=[0.4, 0.8]).ys
        return float((ys[1:, 0] - right).abs().max())

    first, second = error(h), error(h / 2)
    assert order - 0.4 < math.log2(first / second) < order + 1.1
    assert first < 1e-2


def test_hidden_switch_is_met_from_its_own_side():
    """f works out the switch in its own way, off by round-off, also in single precision."""
    for dtype in (torch.float64, torch.float32):
        rate = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-6}

        def f(t, y):
            return torch.remainder(torch.floor(t / 0.1), 2.0) + 0.0 * y

        breaks = [k * 0.1 for k in range(1, 10)]
        times = torch.linspace(0.0, 0.95, 4, dtype=dtype)
        solution = pnode.Solver(f, method="dopri5", **rate)(
            torch.zeros(1, dtype=dtype), times, breakpoints=breaks
        )
        assert solution.stats.rejected == 0
        torch.testing.assert_close(
            solution.ys[-1], torch.full((1,), 0.45, dtype=dtype), rtol=0.0,
            atol=1e-14 if dtype is torch.float64 else 2e-7,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["dopri5", "bdf", "radau5"])
def test_adaptive_steps_cost_what_separate_solves_do(method):
    """No rejection at a jump, and no more evaluations than of solves from break to break."""
    field, counts = Driven(), []

    def make(f, params):
        solver = pnode.Solver(f, params=params, method=method, rtol=1e-6, atol=1e-8)

        def solve(y, t):
            solution = solver(y, t)
            counts.append((solution.stats.rhs, solution.stats.rejected))
            return solution

        return solve

    with torch.no_grad():
        y0 = vector(0.5, -0.2)
        chained(make, field, y0, TIMES, BREAKS)
        solver = pnode.Solver(field, method=method, rtol=1e-6, atol=1e-8)
        parts = solver(y0, TIMES, breakpoints=BREAKS).stats
        across = solver(y0, TIMES).stats
    assert parts.rhs == sum(rhs for rhs, _ in counts)
    assert parts.rejected == sum(rejected for _, rejected in counts)
    assert across.rejected > parts.rejected
    assert across.rhs > parts.rhs

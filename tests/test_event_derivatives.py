"""Derivatives of every order and mode of the times and states of events."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad, grad
from torch.autograd.functional import hessian as functional_hessian
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

import pnode

D = torch.float64
END = torch.tensor([0.0, math.inf], dtype=D)
# Of height, speed, gravity, and the height where the fall ends.
FALL = torch.tensor([1.0, 2.0, 9.81, 0.3], dtype=D)

WAYS = {
    "rk4": {"method": "rk4", "step_size": 0.1},
    "dopri5": {"method": "dopri5"},
    "cn": {"method": "cn", "step_size": 0.1},
    "es325": {"method": "es325"},
    "rodaspr": {"method": "rodaspr"},
}
ways = pytest.mark.parametrize("way", list(WAYS))


def difference(found, exact):
    """Return how far tensors, or sequences of them, are apart, relative to the largest entry."""
    if isinstance(found, torch.Tensor):
        found, exact = [found], [exact]
    found, exact = (
        torch.cat([one.detach().reshape(-1) for one in all_]) for all_ in (found, exact)
    )
    return float((found - exact).abs().max() / exact.abs().max())


def fall(p, end=END, terminal=True, **options):
    """Return time and state where a ball that falls meets the ground: exact for order 2."""
    height, speed, gravity, ground = p

    def f(t, y):
        return torch.stack([y[1], -gravity + 0.0 * y[0]])

    solver = pnode.Solver(
        f, params=[gravity] if gravity.requires_grad else [], **options,
        event_fn=pnode.Event(lambda t, y: y[0] - ground, terminal=terminal),
    )  # fmt: skip
    solution = solver(torch.stack([height, speed]), end)
    found = solution.events[0]
    return torch.cat([found.times, found.states.reshape(-1)])


def known(p):
    height, speed, gravity, ground = p
    root = (speed**2 + 2.0 * gravity * (height - ground)).sqrt()
    return torch.stack([(speed + root) / gravity, ground, -root])


def at(base, moving, function):
    """Return a function of the entries of p that move, the ground being a constant of the event."""
    constants = base[moving:].unbind()
    return lambda q: function([*q, *constants])


@ways
def test_hessians_by_double_backward(way):
    """Of the time and the state, with respect to states, a parameter of f and one of the event."""
    for i in range(3):
        exact = functional_hessian(lambda p, i=i: known(p)[i], FALL)
        found = functional_hessian(lambda p, i=i: fall(p, **WAYS[way])[i], FALL)
        assert float((found - exact).abs().max()) < 1e-7


@ways
def test_forward_mode(way):
    base, moving = FALL, 2
    v = torch.tensor([0.3, -1.0], dtype=D)
    ours, theirs = at(base, moving, lambda p: fall(p, **WAYS[way])), at(base, moving, known)
    value, tangent = jvp(ours, (base[:moving],), (v,))
    exact = jvp(theirs, (base[:moving],), (v,))
    assert difference([value, tangent], exact) < 1e-8
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(base[:moving].clone(), v)
        assert difference(forward_ad.unpack_dual(ours(dual)).tangent, exact[1]) < 1e-8
    assert difference(jacfwd(ours)(base[:moving]), jacfwd(theirs)(base[:moving])) < 1e-8


class Fall(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gravity = torch.nn.Parameter(FALL[2].clone())

    def forward(self, t, y):
        return torch.stack([y[1], -self.gravity + 0.0 * y[0]])


def test_parameters_of_a_transform():
    f = Fall()
    solver = pnode.Solver(f, event_fn=lambda t, y: y[0] - FALL[3], **WAYS["dopri5"])

    def ours(gravity):
        return functional_call(solver, {"rhs.gravity": gravity}, (FALL[:2], END)).event_time

    def theirs(gravity):
        return known(torch.stack([FALL[0], FALL[1], gravity, FALL[3]]))[0]

    assert difference(jacfwd(ours)(FALL[2]), jacfwd(theirs)(FALL[2])) < 1e-8
    assert difference(hessian(ours)(FALL[2]), hessian(theirs)(FALL[2])) < 1e-7


@pytest.mark.parametrize("way", ["rk4", "es325"])
def test_second_derivatives_by_torch_func(way):
    base, moving = FALL, 2
    ours, theirs = at(base, moving, lambda p: fall(p, **WAYS[way])), at(base, moving, known)
    q, exact = base[:moving], hessian(theirs)(base[:moving])
    assert difference(hessian(ours)(q), exact) < 1e-7
    assert difference(jacrev(jacrev(ours))(q), exact) < 1e-7
    assert difference(jacrev(jacfwd(ours))(q), exact) < 1e-7
    products = vmap(lambda v: jvp(ours, (q,), (v,))[1])(torch.eye(moving, dtype=D))
    assert difference(products.mT, jacfwd(theirs)(q)) < 1e-8


def test_flow_that_bends():
    """The event's time moves along the flow, whose slope changes along it."""

    def ours(p):
        rate = p[1]
        solver = pnode.Solver(
            lambda t, y: rate * t * y, params=[rate], method="dopri5", rtol=1e-11, atol=1e-12,
            event_fn=lambda t, y: y * (1.0 + t) - 3.0,
        )  # fmt: skip
        solution = solver(p[:1], END)
        return torch.cat([solution.event_time.reshape(1), solution.ys[-1]])

    p = torch.tensor([1.2, 0.7], dtype=D)

    def residual(t, p):
        return p[0] * torch.exp(p[1] * t**2 / 2.0) * (1.0 + t) - 3.0

    def theirs(p):  # Newton's method doubles the number of right derivatives
        t = ours(p.detach())[0].detach()
        for _ in range(4):
            slope = torch.func.grad(residual)(t, p)
            t = t - residual(t, p) / slope
        return torch.stack([t, p[0] * torch.exp(p[1] * t**2 / 2.0)])

    for i in range(2):
        exact = functional_hessian(lambda p, i=i: theirs(p)[i], p)
        assert difference(functional_hessian(lambda p, i=i: ours(p)[i], p), exact) < 1e-7


def test_backward_time():
    base, moving = FALL, 2
    # A ball thrown back in time: height(t) = h + v t - g t^2 / 2 meets the ground at a t < 0.
    end = torch.tensor([0.0, -math.inf], dtype=D)

    def theirs(p):
        height, speed, gravity, ground = p
        root = (speed**2 + 2.0 * gravity * (height - ground)).sqrt()
        return torch.stack([(speed - root) / gravity, ground, root])

    ours = at(base, moving, lambda p: fall(p, end, method="rk4", step_size=0.1))
    exact = at(base, moving, theirs)
    q = base[:moving]
    assert difference(jacfwd(ours)(q), jacrev(exact)(q)) < 1e-9
    assert difference(hessian(ours)(q), hessian(exact)(q)) < 1e-7


@pytest.mark.parametrize("way", ["dopri5", "es325"])
def test_events_that_do_not_end_a_solve(way):
    """Tangents go on over the cut step; what would take the cut steps again is refused."""
    base, moving = FALL, 2
    end = torch.tensor([0.0, 1.0], dtype=D)
    ours = at(base, moving, lambda p: fall(p, end, terminal=False, **WAYS[way]))
    theirs = at(base, moving, known)
    q = base[:moving]
    assert difference(jacfwd(ours)(q), jacfwd(theirs)(q)) < 1e-8
    with pytest.raises(pnode.BackwardError, match="do not end it"):
        functional_hessian(lambda q: ours(q)[0], q)


def test_the_tangent_of_a_state_after_an_event():
    def f(t, y):
        return torch.stack([y[1], -y[0]])

    def last(y0, events):
        solver = pnode.Solver(f, method="rk4", step_size=0.01, event_fn=events)
        return solver(y0, torch.tensor([0.0, 3.0], dtype=D)).ys[-1]

    y0 = torch.tensor([0.4, 1.0], dtype=D)
    cut = jacfwd(lambda y: last(y, pnode.Event(lambda t, y: y[0], terminal=False)))(y0)
    assert difference(cut, jacfwd(lambda y: last(y, None))(y0)) < 1e-8
    exact = [[math.cos(3.0), math.sin(3.0)], [-math.sin(3.0), math.cos(3.0)]]
    assert difference(cut, torch.tensor(exact, dtype=D)) < 1e-8


def test_third_derivatives_are_refused():
    p = FALL.clone().requires_grad_()
    (slope,) = grad(fall(p, **WAYS["rk4"])[0], p, create_graph=True)
    (second,) = grad(slope.sum(), p, create_graph=True)
    with pytest.raises(pnode.BackwardError, match="third derivatives through an event"):
        grad(second.sum(), p)


def test_parameters_of_the_event_itself():
    """Nobody declares them, to transforms neither."""
    *others, ground = FALL.unbind()
    v = torch.ones((), dtype=D)

    def ours(ground):
        return fall([*others, ground], **WAYS["dopri5"])

    def theirs(ground):
        return known([*others, ground])

    assert difference(jacfwd(ours)(ground), jacrev(theirs)(ground)) < 1e-8
    assert difference(jacrev(ours)(ground), jacrev(theirs)(ground)) < 1e-8
    assert difference(hessian(ours)(ground), hessian(theirs)(ground)) < 1e-7
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(ground, v))).tangent
        assert difference(tangent, jacrev(theirs)(ground)) < 1e-8


def test_evaluations():
    counts = []
    for p in (FALL, FALL.clone().requires_grad_()):
        solver = pnode.Solver(
            lambda t, y: torch.stack([y[1], -9.81 + 0.0 * y[0]]), method="rk4", step_size=0.1,
            event_fn=lambda t, y: y[0],
        )  # fmt: skip
        counts.append(solver(p[:2], END).stats.rhs)
    assert counts[1] - counts[0] == 2


def test_gradcheck_with_outputs_that_nobody_looks_at():
    solver = pnode.Solver(lambda t, y: -y * y, method="rk4", step_size=0.5)
    y0 = torch.tensor([0.5, 1.0], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: solver(y, torch.tensor([0.0, 1.0])).ys, y0)

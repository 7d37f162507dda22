"""Hooks on what a solve is differentiated by act once, on the whole gradient."""

from __future__ import annotations

import functools
import threading
import unittest.mock

import pytest
import torch
from test_compiled import interpreted, no_warnings

import pnode
from pnode.base.hooks import hooks_of

__all__ = ["interpreted", "no_warnings"]  # fixtures

D = torch.float64
T = torch.linspace(0.0, 1.0, 3, dtype=D)
WAYS = {
    "rk4": {"method": "rk4", "step_size": 0.1},
    "rk4, limit": {"method": "rk4", "step_size": 0.05, "checkpointing": 300},
    "dopri5, dense": {"method": "dopri5", "dense": True, "rtol": 1e-3},
    "cn": {"method": "cn", "step_size": 0.1},
    "cn, matrix-free": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
    "es325, sparse": {"method": "es325", "jacobian": "sparse", "rtol": 1e-3},
    "bdf, blocks": {"method": "bdf", "jacobian": "block", "rtol": 1e-3},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-3},
    "velocity_verlet": {"method": "velocity_verlet", "step_size": 0.1},
    "compiled rk4": {"method": "rk4", "step_size": 0.1, "compile": True},
    "compiled cn": {"method": "cn", "step_size": 0.1, "jacobian": "block", "compile": True},
    "compiled dopri5": {"method": "dopri5", "dense": True, "rtol": 1e-3, "compile": True},
}


def start():
    return torch.tensor([[0.5, 0.3], [0.2, -0.4]], dtype=D, requires_grad=True)


def trainable(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=D).requires_grad_()


def field(w, b=0.0):
    """Rows apart, as jacobian="block" wants it; (q, p) apart, as velocity_verlet does."""
    return lambda t, y: torch.stack([w[0] * torch.sin(y[:, 1]), -w[1] * y[:, 0]], 1) + b


def loss(way, function, params, y0, t=T):
    if way == "velocity_verlet":  # a pair
        whole = function

        def function(t, y):
            return whole(t, torch.stack(y, 1)).unbind(1)

        y0 = y0.unbind(1)
    ys = pnode.Solver(function, params=params, **WAYS[way])(y0, t).ys
    return sum(part.square().sum() for part in (ys if isinstance(ys, tuple) else (ys,)))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("way", WAYS)
def test_hooks_act_once_and_in_order(way):
    """On leaves, and on parameters and initial states that are not."""
    k, u = trainable(2), start()
    w, y0 = k * k, 1.5 * u
    plain = torch.autograd.grad(loss(way, field(w, k), [w, k], y0), (k, u, w, y0))
    k, u = trainable(2), start()
    w, y0 = k * k, 1.5 * u
    calls = []
    for tensor in (k, u, w, y0):
        tensor.register_hook(lambda g: calls.append(1) or 2.0 * g)
        tensor.register_hook(lambda g: g + 1.0)
        tensor.register_hook(lambda g: None)
    loss(way, field(w, k), [w, k], y0).backward()
    assert len(calls) == 4
    # dL/dk without its way through w, which is dL/dw after the hooks.
    direct = plain[0] - 2.0 * k.detach() * plain[2]
    whole = direct + 2.0 * k.detach() * (2.0 * plain[2] + 1.0)
    torch.testing.assert_close(k.grad, 2.0 * whole + 1.0, rtol=1e-12, atol=1e-12)
    expected = 2.0 * (1.5 * (2.0 * plain[3] + 1.0)) + 1.0
    torch.testing.assert_close(u.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_made_of_another_counts_once(way):
    """Against two independent leaves and the chain rule."""
    k = trainable(2)
    w = torch.exp(k)
    found = loss(way, field(w, k), [k, w], start())
    (found,) = torch.autograd.grad(found, k)
    own, other = k.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    separate = loss(way, field(other, own), [other, own], start())
    by_own, by_other = torch.autograd.grad(separate, (own, other))
    torch.testing.assert_close(found, by_own + by_other * w.detach(), rtol=1e-11, atol=1e-11)


def test_chains_of_parameters_and_views_count_once():
    k = trainable(4)
    w = torch.tanh(k)
    first, second = w.chunk(2)
    view = k[2:]

    def function(t, y):
        return field(first * second + w[:2] + view)(t, y) + k[0] * k[1]

    def value(*params):
        return loss("rk4", function, params, start())

    (found,) = torch.autograd.grad(value(k, w, first, second, view), k, retain_graph=True)
    (expected,) = torch.autograd.grad(value(k), k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Owner(torch.nn.Module):
    """Uses what was made of its parameter before the solve."""

    def __init__(self):
        super().__init__()
        self.raw = torch.nn.Parameter(trainable(2).detach())
        self.weight = None

    def forward(self, t, y):
        return field(self.weight)(t, y)


def test_a_module_that_uses_what_was_made_of_its_parameter():
    module = Owner()
    module.weight = torch.exp(module.raw)
    (found,) = torch.autograd.grad(loss("rk4", module, [module.weight], start()), module.raw)
    (expected,) = torch.autograd.grad(
        loss("rk4", lambda t, y: field(torch.exp(module.raw))(t, y), [module.raw], start()),
        module.raw,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_a_parameter_was_made_of_may_be_declared_in_one_solve_and_not_in_another():
    k = trainable(2)
    w = torch.exp(k)
    expected = torch.autograd.grad(loss("rk4", field(w), [w], start()), k, retain_graph=True)[0]
    for params in ([k, w], [w], [w, k], [w]):
        value = loss("rk4", field(w), params, start())
        (found,) = torch.autograd.grad(value, k, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("way", ["rk4", "cn", "rodaspr"])
def test_retained_gradients_are_the_whole_ones(way):
    k = trainable(2)
    w = k * 3.0
    w.retain_grad()
    loss(way, field(w), [w], start()).backward(retain_graph=True)
    torch.testing.assert_close(w.grad, k.grad / 3.0, rtol=1e-13, atol=0.0)
    loss(way, field(w), [w], start()).backward(inputs=[w])  # adds up, as outside of solves
    torch.testing.assert_close(w.grad, 2.0 * k.grad / 3.0, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("way", ["rk4", "cn", "bdf, blocks"])
def test_hooks_of_other_kinds(way):
    """On several tensors, after accumulation, and on the node that accumulates."""
    k, b = trainable(2), trainable(1, seed=1)
    calls = []

    def note(name, change=None):
        def hook(*arguments):
            calls.append(name)
            return change

        return hook

    torch.autograd.graph.register_multi_grad_hook((k, b), note("all"))
    torch.autograd.graph.register_multi_grad_hook((k, b), note("any"), mode="any")
    k.register_post_accumulate_grad_hook(note("post"))
    accumulator = torch.autograd.graph.get_gradient_edge(k).node
    accumulator.register_prehook(note("before"))
    accumulator.register_hook(note("after"))
    loss(way, field(k, b), [k, b], start()).backward()
    assert sorted(calls) == ["after", "all", "any", "before", "post"]


def test_a_module_hook_acts_at_each_evaluation():
    layer, calls = torch.nn.Linear(2, 2).double(), []
    layer.register_full_backward_hook(lambda *arguments: calls.append(1))
    solver = pnode.Solver(lambda t, y: layer(y), params=layer.parameters(), **WAYS["rk4"])
    solver(start(), T).ys.sum().backward()
    assert len(calls) == 40


def test_hooks_registered_or_removed_between_the_sweeps_count():
    k = trainable(2)
    kept = k.register_hook(lambda g: 3.0 * g)
    value = loss("rk4", field(k), [k], start())
    kept.remove()
    (plain,) = torch.autograd.grad(value, k, retain_graph=True)
    k.register_hook(lambda g: 2.0 * g)
    (doubled,) = torch.autograd.grad(value, k, retain_graph=True)
    torch.testing.assert_close(doubled, 2.0 * plain, rtol=1e-12, atol=0.0)


def test_hooks_of_an_event_function_and_of_a_consistent_start():
    k = trainable(1)

    def times():
        solver = pnode.Solver(
            lambda t, y: -y,
            params=[k],
            event_fn=lambda t, y: y[0] - 0.3 - 0.01 * k.sum(),
            rtol=1e-9,
        )
        return solver(torch.ones(1, dtype=D), torch.tensor([0.0, 9.0], dtype=D)).event_time

    def states():
        mass = torch.tensor([1.0, 0.0], dtype=D)
        solver = pnode.Solver(
            lambda t, y: torch.stack([-y[0] * y[1], y[1] - k[0] * y[0]]), params=[k], mass=mass,
            consistent_start=True, method="beuler", step_size=0.1,
        )  # fmt: skip
        return solver(torch.tensor([1.0, 0.0], dtype=D), T).ys.sum()

    plain = [torch.autograd.grad(value(), k)[0] for value in (times, states)]
    k.register_hook(lambda g: 2.0 * g)
    for value, expected in zip((times, states), plain, strict=True):
        (found,) = torch.autograd.grad(value(), k)
        torch.testing.assert_close(found, 2.0 * expected, rtol=1e-12, atol=0.0)


def test_hooks_of_a_field_that_differentiates_itself_are_its_own():
    """f = dV/dk, whose hook is part of f: the same states with and without gradients."""
    k = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    k.register_hook(lambda g: 0.5 * g)

    def function(t, y):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((torch.sin(k) * y).sum(), k, create_graph=True)
        return slope - y

    solver = pnode.Solver(function, params=[k], **WAYS["rk4"])
    y0 = torch.ones(2, dtype=D)
    ys = solver(y0, T).ys
    with torch.no_grad():
        assert torch.equal(solver(y0, T).ys, ys)
    half = pnode.Solver(lambda t, y: 0.5 * torch.cos(k) * y - y, params=[k], **WAYS["rk4"])
    torch.testing.assert_close(half(y0, T).ys, ys, rtol=1e-14, atol=0.0)


def test_hooks_act_after_a_failure():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2.0 * x

        @staticmethod
        def backward(ctx, g):
            if fails:
                raise ZeroDivisionError("in f")
            return 2.0 * g

    k, w = trainable(2), trainable(2) * 1.0
    w.retain_grad()
    w.grad = torch.ones(2, dtype=D)
    function = field(k)
    solver = pnode.Solver(
        lambda t, y: Fails.apply(function(t, y) * w), params=[k, w], **WAYS["rk4"]
    )
    fails = False
    (plain,) = torch.autograd.grad(solver(start(), T).ys.sum(), k)
    handle = k.register_hook(lambda g: 2.0 * g)
    fails = True
    with pytest.raises(ZeroDivisionError):
        solver(start(), T).ys.sum().backward()
    assert w.grad.tolist() == [1.0, 1.0]
    fails = False
    (found,) = torch.autograd.grad(solver(start(), T).ys.sum(), k)
    torch.testing.assert_close(found, 2.0 * plain, rtol=1e-13, atol=0.0)
    broken = k.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        solver(start(), T).ys.sum().backward()
    handle.remove()
    broken.remove()
    (found,) = torch.autograd.grad(solver(start(), T).ys.sum(), k)
    assert torch.equal(found, plain)


def test_hooks_of_nested_solves():
    k, seen = trainable(2), []
    k.register_hook(lambda g: seen.append(1) or 2.0 * g)
    inner = pnode.Solver(field(k), params=[k], method="euler", step_size=0.5)
    outer = pnode.Solver(lambda t, y: inner(y, T[:2]).ys[-1] - y, params=[k], **WAYS["rk4"])
    outer(start(), T).ys.sum().backward()
    assert seen == [1]


def test_hooks_that_are_not_functions():
    k, mock = trainable(2), unittest.mock.Mock(return_value=None)
    k.register_hook(mock)
    k.register_hook(functools.partial(torch.mul, other=2.0))
    loss("rk4", field(k), [k], start()).backward()
    mock.assert_called_once()


def test_hooks_of_solves_in_several_threads():
    k, seen = trainable(2), []
    k.register_hook(lambda g: seen.append(1) or 2.0 * g)
    (expected,) = torch.autograd.grad(loss("rk4, limit", field(k), [k], start()), k)
    found = {}

    def work(number):
        value = loss("rk4, limit", field(k), [k], start())
        (found[number],) = torch.autograd.grad(value, k)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 5
    assert all(torch.equal(found[number], expected) for number in range(4))


def test_no_hooks_cost_nothing():
    assert hooks_of([trainable(2), trainable(3)]) is None
    handle = (k := trainable(2)).register_hook(lambda g: g)
    handle.remove()
    assert hooks_of([k]) is None
    assert hooks_of([2.0 * k]) is None

"""Modules whose code tells that they have not changed; every change of what it reads is noticed."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from test_compiled import interpreted
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity

import pnode
from pnode.solvers.compiled.unchanged import Unchanged

__all__ = ["interpreted"]  # a fixture

FACTOR = 2.0
SHARED: list[float] = []


class Net(nn.Module):
    """Layers, attributes, globals, functions of torch's, a loop."""

    scale = 0.5

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(2, 3), nn.ModuleList([nn.Tanh(), nn.Linear(3, 2)])
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("shift", torch.ones(2))
        self.rate, self.unused, self.bent = 1.5, [1], True

    def forward(self, t, y):
        h = self.first(y)
        for layer in self.rest:
            h = layer(h)
        if not self.bent:
            return h
        h = torch.cat([h[..., 1:], h[..., :1]], dim=-1) * self.scale + self.shift
        return -torch.sin(h) * self.rate @ self.weight.T + FACTOR * y - t * y


def of(net):
    net = net.double()
    return Unchanged.of(net, [*net.parameters(), *net.buffers()])


def forward(self, t, y):
    return -y


def patched(place, name, value):
    return lambda net, monkeypatch: monkeypatch.setattr(place, name, value)


HOOK = {0: print}
CHANGES = {
    "attribute": lambda net, _: setattr(net, "rate", 2.5),
    "flag": lambda net, _: setattr(net, "bent", False),
    "attribute of the class": patched(Net, "scale", 0.25),
    "attribute that hides that of the class": lambda net, _: setattr(net, "scale", 0.5 * FACTOR),
    "global": lambda net, m: m.setitem(Net.forward.__globals__, "FACTOR", 3.0),
    "function of torch": patched(torch, "sin", torch.cos),
    "function of a layer": patched(nn.functional, "linear", lambda x, w, b: x),
    "method of tensors": patched(torch.Tensor, "__mul__", torch.Tensor.__add__),
    "parameter": lambda net, _: setattr(net, "weight", nn.Parameter(torch.randn(2, 2))),
    "buffer": lambda net, _: setattr(net, "shift", torch.zeros(2)),
    "bias taken away": lambda net, _: setattr(net.first, "bias", None),
    "layer": lambda net, _: setattr(net, "first", nn.Linear(2, 3)),
    "layer of a list": lambda net, _: net.rest.append(nn.Tanh()),
    "order of layers": lambda net, _: net.rest.insert(0, net.rest.pop(1)),
    "forward of the class": patched(Net, "forward", forward),
    "forward of a layer": patched(nn.Tanh, "forward", lambda self, x: x),
    "forward of the instance": lambda net, _: setattr(net, "forward", lambda t, y: y),
    "operator of the class": lambda net, m: m.setattr(Net, "__iter__", iter, raising=False),
    "calls": patched(nn.Module, "__call__", lambda self, *given: given[-1]),
    "class of a parameter": lambda net, m: m.setattr(
        net.weight, "__class__", type("Other", (nn.Parameter,), {})
    ),
    "class": lambda net, _: setattr(net, "__class__", type("Other", (Net,), {})),
    "hook": lambda net, _: net.rest[0].register_forward_hook(lambda *given: None),
    "global hook": patched(nn.modules.module, "_global_forward_hooks", HOOK),
    "default dtype": lambda net, m: torch.set_default_dtype(torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_noticed(name, monkeypatch):
    net = Net()
    known = of(net)
    assert known.holds(net)
    with torch.no_grad():
        net.weight += 1.0  # graphs read numbers anew
    net.unused.append(2)
    assert known.holds(net)
    try:
        CHANGES[name](net, monkeypatch)
        assert not known.holds(net)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_decides_besides():
    net, other = Net(), Net()
    known = of(net)
    assert not known.holds(other)
    for context in (torch.autocast("cpu"), torch.device("cpu"), forward_ad.dual_level()):
        with context:
            assert not known.holds(net)
        assert known.holds(net)


def code(forward, **attributes):
    net = type("Code", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def branches(self, t, y):
    return -y if t > 0.5 else y


def branches_by_parameter(self, t, y):
    return -y if self.scale else y


def branches_by_another(self, t, y):
    self = y
    return -y if self.requires_grad else y


def branches_by_either(self, t, y):
    if y.sum() if self.flag else self.training:
        return -y
    return y


def closes_over(values):
    return lambda self, t, y: values[0] * y


def writes(self, t, y):
    self.calls = 1
    return -y


def with_default(self, t, y, factor=SHARED):
    return -y


class Mixin:
    def __getitem__(self, index):
        return SHARED


OPAQUE = {
    "branch": code(branches), "closure": code(closes_over([1.0])), "writes": code(writes),
    "branch by a parameter": code(branches_by_parameter, scale=nn.Parameter(torch.ones(()))),
    "branch by a part": code(branches_by_parameter, scale=nn.Sequential()),
    "branch by another": code(branches_by_another, requires_grad=True),
    "branch by either": code(branches_by_either, flag=True),
    "default": code(with_default), "global": code(lambda self, t, y: y * len(SHARED)),
    "number": code(lambda self, t, y: y * y.sum().item()),
    "function": code(lambda self, t, y: y * math.sin(t)),
    "float": code(lambda self, t, y: y * float(t)),
    "random": code(lambda self, t, y: y + torch.randn_like(y)),
    "list": code(lambda self, t, y: y * self.numbers[0], numbers=[1.0]),
    "method": Net().train, "dropout": nn.Dropout(), "hook": nn.Tanh(), "object": print,
    "own attributes": type("Own", (Net,), {"__getattr__": nn.Module.__getattr__})(),
    "no gradient": code(lambda self, t, y: y.detach() * y),
    "tensor that is no buffer": code(lambda self, t, y: y * self.own[0], own=(torch.ones(2),)),
    "flag": code(lambda self, t, y: y * self.training and y),
    "written": code(lambda self, t, y: torch.sin(y, out=y)),
    "operator of a class behind": type("Mixed", (nn.Module, Mixin), {"forward": forward})(),
    "name of torch's, too": code(lambda self, t, y: y * self.b.tolist()[0], tolist=1, b=1.0),
    "property": type("Given", (Net,), {"scale": property(lambda self: 0.5)})(),
}  # fmt: skip
OPAQUE["hook"].register_forward_pre_hook(lambda *given: None)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_looked_through(name):
    assert Unchanged.of(OPAQUE[name], ()) is None


PLACES = (
    (torch, "sin"),
    (torch.Tensor, "__mul__"),
    (nn.Linear, "forward"),
    (nn.Module, "__call__"),
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_what_others_have_put_into_torch_is_not_looked_through(place, monkeypatch):
    net, original = Net(), getattr(*place)
    assert of(net) is not None
    monkeypatch.setattr(*place, functools.wraps(original)(lambda *given: original(*given)))
    assert of(net) is None


def test_numbers_made_of_tensors_are_followed(interpreted):
    """Nor is memory read of tensors that have become views with a pending minus."""

    def forward(self, t, y):
        return torch.add(-y, torch.sin(y) * self.b, alpha=self.a) * self.a

    net = type("Alpha", (nn.Module,), {"forward": forward})()
    net.register_buffer("a", torch.tensor(0.5, dtype=torch.float64))
    net.register_buffer("b", torch.ones(2, dtype=torch.float64))
    eager, solver = (pnode.Solver(net, method="bosh3", compile=c) for c in (False, True))
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 0.5])
    solver(y0, t), solver(y0, t)
    net.a.fill_(1.5)
    torch.testing.assert_close(solver(y0, t).ys, eager(y0, t).ys, rtol=1e-9, atol=1e-11)
    net.b.data = torch._neg_view(net.b.clone())
    with pytest.warns(UserWarning, match="pending minus"):
        solver(y0, t)


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_solves_do_not_evaluate_what_has_not_changed(grad, request):
    """Results are those without, after each kind of change too; f runs in Python only then."""
    if not grad:
        request.getfixturevalue("interpreted")
    torch.manual_seed(0)
    net = Net().double()
    eager, solver = (
        pnode.Solver(net, method="bosh3", rtol=1e-5, atol=1e-7, compile=c) for c in (False, True)
    )
    y0, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.0, 0.5])
    seen = []

    def solved(one):
        net.zero_grad()
        with torch.set_grad_enabled(grad):
            found = one(y0, t)
        if grad:
            found.ys.square().sum().backward()
            return found.ys.detach(), net.weight.grad.clone(), found.stats.steps
        return found.ys, found.stats.steps

    def numbers(_):
        with torch.no_grad():
            net.weight.mul_(1.5)

    for change in (None, None, numbers, lambda n: setattr(n, "rate", 0.75), None):
        if change is not None:
            change(net)
        expected = solved(eager)
        if grad:
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
                found = solved(solver)
            seen.append(any("aten::linear" in event.name for event in profile.events()))
        else:  # torch's own operations stand for machine code
            found = solved(solver)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    if grad:
        assert seen == [True, False, False, True, False]


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.extent = nn.Linear(2, 2, bias=False), (2,)
        self.register_buffer("shift", torch.ones(2))
        self.unused = [torch.ones(1)]

    def forward(self, t, y):
        z = torch.tanh(self.linear(y).reshape(self.extent)) + self.shift * t
        return z if self.training else 2.0 * z


def replaced(net):
    net.shift = 3.0 * net.shift
    net.linear.weight = nn.Parameter(2.0 * net.linear.weight.detach())


AFTERWARDS = {
    "nothing": lambda nets: None,
    "eval": lambda nets: nets[0].eval(),
    "replaced": lambda nets: replaced(nets[0]),
    "gone": lambda nets: nets.clear(),
}


@pytest.mark.parametrize("method", ["cn", "rk4"])
def test_backward_sweeps_of_what_has_not_changed(method, request):
    """The derivative by a time is a value of f, as that was in the forward sweep of each solve."""
    if method == "rk4":
        request.getfixturevalue("interpreted")

    def gradients(afterwards, compile=True, training=True):
        nets = [Switched().double()]
        solver = pnode.Solver(nets[0], method=method, step_size=0.1, compile=compile)
        for flag in (True, True, training, training):  # f is known from the second one on
            nets[0].train(flag)
            y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
            t = torch.tensor([0.0, 0.3], dtype=torch.float64, requires_grad=True)
            wanted = y0, t, nets[0].linear.weight
            solution = solver(y0, t)
        del solver
        AFTERWARDS[afterwards](nets)
        return torch.autograd.grad(solution.ys[-1].square().sum(), wanted)

    for training in (True, False):
        expected = gradients("nothing", False, training)
        for afterwards in AFTERWARDS:
            found = gradients(afterwards, training=training)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)

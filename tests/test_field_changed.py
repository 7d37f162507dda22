"""A backward sweep evaluates the f of the forward sweep, or says that it is another."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from representatives import representatives
from test_compiled import interpreted

import pnode
from pnode.base.evidence import Evidence, Reads, differs, project
from pnode.errors import FieldChanged
from pnode.solvers.methods import find_method

__all__ = ["interpreted"]  # a fixture

D = torch.float64
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=D)
# Mass matrices: with those that step in ways of their own with one.
MASSES = ("theta", "cn", "beuler", "python")
CASES = [
    (method.name, form) for method in representatives() for form in method.forms
    if "mass" not in form or method.ts_type in MASSES
] + [(name, "mass") for name in ("es325", "rodaspr")] + [("ark3", "imex_mass")]  # fmt: skip
FAMILIES = ["euler", "bosh3", "ssprk43", "ruth3", "beuler", "cn", "implicit_midpoint", "trbdf2",
            "sdirk2", "rodas3", "ark3"]  # fmt: skip
# What makes the backward sweep evaluate f again: no graphs, few checkpoints.
STORES = {
    "stages": pnode.Checkpointing(store="stages"),
    "budget": pnode.Checkpointing(memory=400),
    "solutions": pnode.Checkpointing(memory="1MB", store="solutions"),
}


def value_of(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def solve(name, form, field, parameter, **keywords):
    """Solve a problem of a form whose function is ``field(t, y)``, of two entries."""
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    keywords = {"method": name, "params": [parameter], "step_size": 0.2} | keywords
    if form == "imex":
        solver = pnode.Solver(implicit=field, explicit=lambda t, y: field(t, y).sin(), **keywords)
    elif form == "imex_mass":
        parts = {"implicit": field, "explicit": lambda t, y: field(t, y).sin()}
        solver = pnode.Solver(**parts, mass=torch.tensor([2.0, 3.0], dtype=D), **keywords)
    elif form == "mass":
        mass = torch.tensor([2.0, 3.0], dtype=D)
        solver = pnode.Solver(field, mass=mass, **keywords)
    elif form == "residual":
        solver = pnode.Solver(residual=lambda t, y, rate: 3 * rate - field(t, y), **keywords)
    elif form == "separable":
        solver = pnode.Solver(lambda t, y: (field(t, y[1]), -field(t, y[0])), **keywords)
        return solver((y0[:1], y0[1:]), TIMES)
    else:
        solver = pnode.Solver(field, **keywords)
    return solver(y0, TIMES)


def parameter():
    return torch.tensor(1.0, dtype=D, requires_grad=True)


@pytest.mark.parametrize(("name", "form", "store"), [
    *((name, form, "stages") for name, form in CASES),
    *((name, form, store) for name in FAMILIES for form in find_method(name).forms
      for store in ("budget", "solutions")),
])  # fmt: skip
def test_a_number_that_f_looks_at(name, form, store):
    """The gradient of the forward sweep's f, or an error; without a change never an error."""

    def run(change, **keywords):
        seen, a = {"u": 2.0}, parameter()
        solution = solve(name, form, lambda t, y: -a * seen["u"] * y * (1 + 0.1 * t), a, **keywords)
        seen["u"] += change
        value_of(solution.ys)[-1].sum().backward()
        return a.grad

    keywords = {"checkpointing": STORES[store]}
    assert torch.isclose(run(0.0, **keywords), run(0.0), rtol=1e-10)
    with pytest.raises(FieldChanged, match=r"not the one of the forward sweep: .* t = "):
        run(0.01, **keywords)


@pytest.mark.parametrize("name", ["cn", "es325", "bdf", "bdf3", "rodaspr", "dopri5", "ark3"])
def test_adaptive_steps_and_a_solver_that_works_afterwards(name):
    form = "imex" if name == "ark3" else "rhs"
    seen, a = {"u": 2.0}, parameter()
    keywords = {"step_size": None, "rtol": 1e-5}
    if name == "dopri5":
        keywords["checkpointing"] = STORES["stages"]
    if name == "bdf3":
        keywords["step_size"] = 0.05
    y = solve(name, form, lambda t, y: -a * seen["u"] * y, a, **keywords).ys[-1].sum()
    seen["u"] = 3.0
    with pytest.raises(FieldChanged) as caught:
        y.backward(retain_graph=True)
    assert caught.value.method == name and caught.value.step is not None
    assert a.grad is None
    seen["u"] = 2.0
    y.backward()
    assert a.grad is not None and bool(a.grad.isfinite())


class Net(torch.nn.Module):
    """Depends on all that a Module can have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(2, 2).to(D)
        self.register_buffer("scale", torch.ones(2, dtype=D))
        self.factor = 1.0

    def forward(self, t, y):
        z = self.linear(y) * self.scale * self.factor
        # The default dtype is that of numbers made here.
        return (z if self.training else 2 * z).tanh() * torch.tensor(0.3).to(y)


METHODS_AGAIN = ["cn", "es325", "bdf", "rodaspr", "rk4"]


def gradient(name, between, net=None):
    net = Net() if net is None else net
    keywords = {"checkpointing": 1000} if name == "rk4" else {}
    solver = pnode.Solver(net, method=name, step_size=0.1, **keywords)
    weight = net.linear.weight
    loss = solver(torch.ones(2, dtype=D), TIMES).ys[-1].sum()
    between(net)
    return torch.autograd.grad(loss, weight)[0]


def test_what_newtons_method_leaves_is_no_change():
    """Van der Pol's slow part: with an old Jacobian Newton's last update makes a residual grow."""

    def van_der_pol(t, y):
        return torch.stack([y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]])

    def solve(y0):
        solver = pnode.Solver(van_der_pol, method="bdf", rtol=3e-5, atol=3e-7, compile=False)
        return solver(y0, [0.0, 300.0]).ys[-1]

    y0, along = torch.tensor([2.0, 0.0], dtype=D), torch.tensor([1.0, 0.0], dtype=D)
    _, tangent = torch.func.jvp(solve, (y0,), (along,))
    (gradient,) = torch.autograd.grad(solve(y0.requires_grad_())[0], y0)
    assert gradient[0].isclose(tangent[0], rtol=1e-8)


@pytest.mark.parametrize("name", METHODS_AGAIN)
def test_surroundings_are_those_of_the_forward_sweep(name):
    expected = gradient(name, lambda net: None)
    flags = []

    def evaluate(net):
        net.eval()
        flags.append(net)

    assert torch.equal(gradient(name, evaluate), expected)
    assert not flags[0].training  # as the user left it
    try:
        assert torch.equal(
            gradient(name, lambda net: torch.set_default_dtype(torch.float16)), expected
        )
        assert torch.get_default_dtype() is torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", METHODS_AGAIN)
def test_autocast_of_the_forward_sweep(name):
    """Matrix products in bfloat16 forwards and backwards, though backward is called outside."""
    weight = torch.eye(2, dtype=torch.float32).mul(1.001).requires_grad_()

    def field(t, y):
        return -(y @ weight).to(y.dtype)

    keywords = {"checkpointing": 1000} if name == "rk4" else {}
    solver = pnode.Solver(field, params=[weight], method=name, step_size=0.1, **keywords)
    y0 = torch.tensor([[1.001, 0.5]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum()
        (inside,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (outside,) = torch.autograd.grad(loss, weight)
    assert torch.equal(inside, outside)
    plain = solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (within,) = torch.autograd.grad(plain, weight)
    assert not torch.equal(within, outside)
    assert torch.equal(within, torch.autograd.grad(
        solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum(), weight)[0])  # fmt: skip


@pytest.mark.parametrize("name", METHODS_AGAIN)
@pytest.mark.parametrize(("change", "says"), [
    (lambda net: net.scale.mul_(1.5), "buffer 'scale' of Net was written into"),
    (lambda net: setattr(net, "factor", 2.0), "its value|from its value|state"),
])  # fmt: skip
def test_modules_that_change_are_named(name, change, says):
    with pytest.raises(FieldChanged, match=says):
        gradient(name, change)


@pytest.mark.parametrize("name", METHODS_AGAIN)
@pytest.mark.parametrize("change", [
    lambda net: setattr(net, "scale", net.scale * 1.5),
    lambda net: setattr(net.linear, "weight", torch.nn.Parameter(net.linear.weight * 1.1)),
])  # fmt: skip
def test_tensors_that_were_replaced_are_those_of_the_forward_sweep(name, change):
    """As for torch, whose graphs have the tensors that they were made with."""
    nets = []

    def replace(net):
        change(net)
        nets.append((net, net.scale, net.linear.weight))

    assert torch.equal(gradient(name, replace), gradient(name, lambda net: None))
    net, scale, weight = nets[0]
    assert net.scale is scale and net.linear.weight is weight  # as the user left them


@pytest.mark.parametrize("name", METHODS_AGAIN)
def test_gradients_after_functional_call(name):
    """The Module has its own parameters again when backward is called."""
    net = Net()
    expected = gradient(name, lambda net: None)
    weight = net.linear.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        net.linear.weight.mul_(0.5)
    keywords = {"checkpointing": 1000} if name == "rk4" else {}
    solver = pnode.Solver(net, method=name, step_size=0.1, **keywords)
    y0 = torch.ones(2, dtype=D)
    ys = torch.func.functional_call(solver, {"rhs.linear.weight": weight}, (y0, TIMES)).ys
    found, unused = torch.autograd.grad(
        ys[-1].sum(), (weight, net.linear.weight), allow_unused=True
    )
    assert torch.equal(found, expected) and unused is None


GENERATOR, COUNTER = torch.Generator().manual_seed(1), itertools.count()


def numpy_numbers():
    return float(np.random.default_rng(random.randrange(2**30)).normal())


def torch_numbers():
    return float(torch.rand((), generator=GENERATOR))


def numbers_of_a_counter():
    return float(next(COUNTER))


@pytest.mark.parametrize("name", METHODS_AGAIN)
@pytest.mark.parametrize(
    "draw", [numpy_numbers, random.random, torch_numbers, numbers_of_a_counter]
)
def test_numbers_drawn_in_f(name, draw):
    """Drawn anew in each evaluation: too small for Newton's method to mind."""
    random.seed(1)  # of two draws in a thousand bdf cannot tell: Newton's method leaves more
    a = parameter()
    loose = name in ("cn", "es325", "bdf")
    noisy = {"snes_rtol": 1e-3, "snes_stol": 1e-3} if loose else {}
    keywords = {"checkpointing": STORES["stages"], "petsc_options": noisy}
    solution = solve(name, "rhs", lambda t, y: -a * y * (1 + 1e-4 * draw()), a, **keywords)
    with pytest.raises(FieldChanged):
        solution.ys[-1].sum().backward()


# Weights are at least 1/2; those of many numbers are products of two, and 3/8 behind the last row.
@pytest.mark.parametrize(("size", "least"), [(1000, 0.4), (5 * 4096, 0.2), (5 * 4096 + 17, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_differences_beyond_round_off_are_told(dtype, size, least):
    torch.manual_seed(0)
    value = torch.randn(size, dtype=dtype)
    expected = project(value)
    assert differs(value, expected) == 0.0
    eps = torch.finfo(dtype).eps
    assert differs(value * (1 + 4 * eps), expected) == 0.0
    small = 1e-4 if dtype is torch.float64 else 0.3
    for entry in (0, 17, size - 1):
        other = value.clone()
        other[entry] += small * value.norm()
        assert differs(other, expected) > least * small
    # What sums and norms do not see: conservation, signs, permutations.
    for other in (value + torch.randn_like(value), -value, value.flip(0), value.roll(4096)):
        assert differs(other, expected) > 1e-3
    opposite = value.clone()
    opposite[3] += 1.0
    opposite[4] -= 1.0
    assert differs(opposite, expected) > 0.0


def test_evidence_by_step():
    evidence = Evidence()
    for numbers in ((1.0, 2.0), (), (3.0,)):
        evidence.append(numbers)
    assert [list(evidence[step]) for step in (0, 1, 2, 3)] == [[1.0, 2.0], [], [3.0], []]


def test_no_evaluation_is_spent(monkeypatch):
    """dopri5 takes 6 N + 1 evaluations forwards and 6 N back, as without the comparison."""
    calls = [0]
    a = parameter()

    def field(t, y):
        calls[0] += 1
        return -a * y

    solution = solve("dopri5", "rhs", field, a, checkpointing=STORES["stages"])
    steps = solution.stats.steps
    assert calls[0] == 6 * steps + 1
    calls[0] = 0
    solution.ys[-1].sum().backward()
    assert calls[0] == 6 * steps == solution.stats.backward.rhs


class Compiled(Net):
    def forward(self, t, y):
        return (self.linear(y) * self.scale).tanh()


@pytest.mark.parametrize(("name", "keywords"), [
    ("bosh3", {"rtol": 1e-3}), ("heun2", {"step_size": 0.1, "checkpointing": 2000}),
    ("esdirk6", {}), ("bdf", {}),
])  # fmt: skip
def test_compiled_solves(name, keywords, request):
    """What a graph computes cannot change but through the tensors that it reads."""
    if name != "heun2":  # machine code of one graph stands for that of others
        request.getfixturevalue("interpreted")
    net = Compiled()
    solver = pnode.Solver(net, method=name, compile=True, **keywords)
    weight = net.linear.weight

    def run(change):
        loss = solver(torch.ones(2, dtype=D), TIMES).ys[-1].sum()
        change()
        return torch.autograd.grad(loss, weight)[0]

    expected = run(lambda: None)
    assert torch.equal(run(net.eval), expected)
    assert torch.equal(run(lambda: setattr(net, "scale", net.scale * 1.5)), expected)
    with pytest.raises(FieldChanged, match="buffer 'scale' of Compiled was written into"):
        run(lambda: net.scale.mul_(0.5))
    with pytest.raises(FieldChanged, match=r"shape \(2, 2\)"):
        run(lambda: weight.data.mul_(1.1))


def test_reads():
    tensors = [torch.ones(2), torch.tensor([1, 2]), torch.tensor([1j, torch.nan])]
    reads = Reads(tensors)
    assert reads.changed() is None
    tensors[1][0] = 5
    assert reads.changed() is tensors[1]


class Rated(torch.nn.Module):
    """A number, a Module and a hook of which may change after a solve."""

    def __init__(self):
        super().__init__()
        self.inner, self.rate = torch.nn.Linear(2, 2, dtype=D), 0.5

    def forward(self, t, y):
        return torch.tanh(self.inner(y)) * self.rate - 0.1 * t * y


CHANGES_BEHIND = {
    "number": lambda net: setattr(net, "rate", 0.6),
    "Module": lambda net: setattr(net, "inner", torch.nn.Linear(2, 2, dtype=D)),
    "hook": lambda net: net.inner.register_forward_hook(lambda module, given, found: 2 * found),
}


@pytest.mark.parametrize("change", CHANGES_BEHIND)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["rk4", "cn"])
@pytest.mark.parametrize("wanted", ["times", "second derivatives"])
def test_what_only_python_would_evaluate(wanted, method, compile, change, interpreted):
    """Machine code and tapes have f as it was: slopes and second derivatives are not of another."""
    torch.manual_seed(0)
    net, times = Rated(), TIMES.clone().requires_grad_()
    solver = pnode.Solver(net, method=method, step_size=0.2, compile=compile)

    def loss():
        y0 = torch.tensor([0.3, -0.7], dtype=D, requires_grad=True)
        return y0, solver(y0, times).ys[-1].square().sum()

    def taken(y0, value, then=lambda net: None):
        if wanted == "times":
            then(net)
            return torch.autograd.grad(value, times)[0]
        (gradient,) = torch.autograd.grad(value, y0, create_graph=True)
        then(net)
        return torch.autograd.grad(gradient.square().sum(), y0)[0]

    loss()
    torch.testing.assert_close(taken(*loss()), taken(*loss()), rtol=1e-12, atol=1e-13)
    with pytest.raises(FieldChanged, match="forward sweep"):
        taken(*loss(), CHANGES_BEHIND[change])


@pytest.mark.parametrize("compile", [False, True])
def test_second_derivatives_of_rows_are_of_one_field(compile):
    """Steps of machine code that are taken again in Python end where they did, or f is another."""
    torch.manual_seed(0)
    net = Rated()
    solver = pnode.Solver(
        net, method="heun2", step_size=0.2, samples="independent", compile=compile
    )
    times = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.5, 0.9]], dtype=D)
    second = []
    for change in (False, False, True):
        y0 = torch.tensor([[0.3, -0.7], [0.1, 0.5]], dtype=D, requires_grad=True)
        value = solver(y0, times).ys[-1].square().sum()
        (gradient,) = torch.autograd.grad(value, y0, create_graph=True)
        if not change:
            second.append(torch.autograd.grad(gradient.square().sum(), y0)[0])
    assert torch.equal(*second)
    net.rate = 0.6
    with pytest.raises(FieldChanged, match="forward sweep"):
        torch.autograd.grad(gradient.square().sum(), y0)

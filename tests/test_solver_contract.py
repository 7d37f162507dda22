"""What Solver and odeint promise: arguments, shapes, times, parameters, repeated and nested use."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

import pnode
from pnode.configuration import PlainOptions

D = torch.float64
CHEAP = {"method": "rk4", "step_size": 0.1}
KINDS = {
    "rk4": CHEAP,
    "dopri5": {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9},
    "cn": {"method": "cn", "step_size": 0.1},
    "cn-matrix-free": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def decay(t, y):
    return -y


def state(*values, grad=False, dtype=D):
    return torch.tensor(values or (1.0, 0.5), dtype=dtype, requires_grad=grad)


def times(*values, dtype=D):
    return torch.tensor(values or (0.0, 0.5, 1.0), dtype=dtype)


class Net(torch.nn.Module):
    """A small field with a buffer, a shared, a frozen and an unused parameter."""

    def __init__(self, width=2):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layer = torch.nn.Linear(width, width, dtype=D)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=D) * 0.4)
        self.shared = self.layer.weight
        self.frozen = torch.nn.Parameter(torch.tensor(0.3, dtype=D), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.zeros(3, dtype=D))
        self.register_buffer("scale", torch.tensor(0.5, dtype=D))

    def forward(self, t, y):
        return self.scale * torch.tanh(self.layer(y)) @ self.shared - self.frozen * y


def rk4(field, y0, t, step_size):
    """Classical Runge-Kutta in plain torch."""
    ys = [y0]
    for start, end in itertools.pairwise(t.tolist()):
        number = max(1, math.ceil((end - start) / step_size - 1e-12))
        h, y = (end - start) / number, ys[-1]
        for index in range(number):
            now = torch.tensor(start + index * h, dtype=y.dtype)
            k1 = field(now, y)
            k2 = field(now + h / 2, y + h / 2 * k1)
            k3 = field(now + h / 2, y + h / 2 * k2)
            k4 = field(now + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        ys.append(y)
    return torch.stack(ys)


# Arguments of the constructor.

NOT_POSITIVE = [0, 0.0, -0.1, math.nan, math.inf, "many", [0.1], torch.ones(2)]
CONSTRUCTOR = [
    ("rhs", {"rhs": None}, "nothing given"),
    ("rhs and implicit", {"implicit": decay}, "exactly one"),
    ("rhs and residual", {"residual": decay}, "exactly one"),
    ("implicit", {"rhs": None, "implicit": decay}, "explicit"),
    ("residual and mass", {"rhs": None, "residual": decay, "mass": torch.eye(2)}, "exactly one"),
    ("explicit", {"rhs": None, "implicit": decay, "explicit": 3}, "3.*callable"),
    ("implicit= and explicit=", {"method": "ark4"}, "'ark4'.*'dopri5'"),
    ("mass=", {"method": "dopri5", "mass": torch.eye(2)}, "'dopri5'.*'beuler'"),
    ("rhs", {"rhs": 3.0}, "3.0"),
    ("method", {"method": "nonsense"}, "'nonsense'.*'dopri5'"),
    ("method", {"method": None}, "None.*'dopri5'"),
    ("method", {"method": ["rk4"]}, "rk4"),
    ("step_size", {"method": "rk4", "step_size": None}, "'rk4'.*None.*step_size=h"),
    *(("step_size", {"step_size": value}, None) for value in NOT_POSITIVE),
    *((name, {"step_size": None, "method": "dopri5", name: value}, None)
      for name in ("first_step", "min_step", "max_step") for value in NOT_POSITIVE),
    *((name, {name: value}, None) for name in ("rtol", "atol")
      for value in (-1e-6, math.nan, math.inf, "tight", None)),
    ("rtol and atol", {"rtol": 0.0, "atol": 0.0}, "positive"),
    ("min_step", {
        "step_size": None, "method": "dopri5", "min_step": 0.2, "max_step": 0.1,
    }, "0.2.*max_step=0.1"),
    *((name, {"step_size": 0.1, name: 0.05}, "=0.05 is given, and steps are fixed")
      for name in ("first_step", "min_step", "max_step")),
    *(("max_steps", {"max_steps": value}, None)
      for value in (0, -1, 1.5, True, "many", "5", [1], math.nan, math.inf)),
    *(("jacobian", {"jacobian": value}, "'auto'.*'matrix-free'.*'dense'")
      for value in ("lu", None, [])),
    ("linear_solver", {"linear_solver": "nonsense"}, "'nonsense'.*'gmres'"),
    ("linear_solver", {"linear_solver": 5}, "5"),
    ("petsc_options", {"petsc_options": 5}, "5.*dictionary"),
    ("petsc_options", {"petsc_options": "-ksp_type gmres"}, "dictionary"),
    ("petsc_options", {"petsc_options": {"-ksp_type": "gmres"}}, "'-ksp_type'.*dash"),
    ("petsc_options", {"petsc_options": {"": 1}}, "key"),
    ("petsc_options", {"petsc_options": {1: 2}}, "1"),
    ("monitor", {"monitor": 5}, "5.*callable"),
    ("event_fn", {"event_fn": 5}, "5.*callable"),
    *(("event_tol", {"event_tol": value}, None) for value in NOT_POSITIVE),
    ("dense", {"dense": "yes"}, "'yes'.*True"),
    ("comm", {"comm": 5}, "5"),
    ("checkpointing", {"checkpointing": "lots"}, "'lots'.*'256MiB'"),
    ("checkpointing", {"checkpointing": [1]}, r"\[1\]"),
    ("params", {"params": torch.ones(2)}, "list"),
    ("params", {"params": [1.0]}, "float"),
    ("params", {"params": [torch.ones(1), None]}, "NoneType.*entry 1"),
    ("params", {"params": 5}, "5|int"),
    ("compile", {"compile": 1}, "True or False"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("named", "keywords", "message"),
    CONSTRUCTOR,
    ids=[f"{index}-{next(iter(row[1]))}" for index, row in enumerate(CONSTRUCTOR)],
)
def test_unusable_argument_of_the_constructor(named, keywords, message):
    with pytest.raises(pnode.ConfigurationError) as info:
        pnode.Solver(**{"rhs": decay} | CHEAP | keywords)
    assert isinstance(info.value, ValueError)
    text = str(info.value)
    assert named in text
    if message is None:
        value = next(value for name, value in keywords.items() if name == named)
        assert repr(value) in text
    else:
        assert re.search(message, text, re.DOTALL), text


def test_positional_keywords_are_refused():
    with pytest.raises(TypeError):
        pnode.Solver(decay, "rk4")
    with pytest.raises(TypeError, match="nonsense"):
        pnode.Solver(decay, nonsense=1)


# Arguments of the call.

TIMES = {
    "empty": (torch.empty(0), "shape"),
    "scalar": (torch.tensor(1.0), "shape"),
    "two-dimensional": (torch.zeros(2, 2), "shape"),
    "repeated": (times(0.0, 0.5, 0.5), r"t\[2\] = 0.5 follows t\[1\] = 0.5"),
    "first-repeated": (times(0.0, 0.0), r"t\[1\] = 0.0 follows t\[0\] = 0.0"),
    "not-monotone": (times(0.0, 1.0, 0.5), r"t\[2\] = 0.5 follows t\[1\] = 1.0"),
    "turning": (times(1.0, 0.5, 0.7), r"t\[2\] = 0.7 follows t\[1\] = 0.5"),
    "nan": (times(0.0, math.nan), "NaN"),
    "infinite": (times(0.0, math.inf), "infinity"),
    "complex": (torch.tensor([0.0, 1.0j]), "complex"),
    "bool": (torch.tensor([False, True]), "bool"),
    "string": ("noon", "t='noon'"),
    "none": (None, "t=None"),
    "dict": ({}, r"t=\{\}"),
    "meta": (torch.zeros(2, device="meta"), "meta"),
}


@pytest.mark.parametrize("through", ["Solver", "odeint"])
@pytest.mark.parametrize("name", list(TIMES))
def test_unusable_times(name, through):
    t, message = TIMES[name]
    with pytest.raises(pnode.ConfigurationError, match=message) as info:
        if through == "Solver":
            pnode.Solver(decay, **CHEAP)(state(), t)
        else:
            pnode.odeint(decay, state(), t, **CHEAP)
    assert str(info.value).startswith("t") or "output times" in str(info.value)


STATES = {
    "integer": (torch.ones(2, dtype=torch.int64), "int64.*float64"),
    "half": (torch.ones(2, dtype=torch.float16), "float16"),
    "bool": (torch.ones(2, dtype=torch.bool), "bool"),
    "empty": (torch.ones(0), "no entries"),
    "empty-matrix": (torch.ones(3, 0), "no entries"),
    "empty-tuple": ((), "empty"),
    "nan": (state(1.0, math.nan), "NaN"),
    "infinite-part": ((state(), state(math.inf)), r"y0\[1\].*infinity"),
    "mixed": ((state(), state(dtype=torch.float32)), r"y0\[1\].*float32.*y0\[0\].*float64"),
    "floats": ([1.0, 2.0], r"y0\[0\] is a float"),
    "float": (1.0, "float"),
    "numpy": (np.ones(2), "ndarray"),
    "none": (None, "NoneType"),
    "nested": ((state(), (1.0,)), r"y0\[1\]\[0\] is a float"),
    "meta": (torch.ones(2, device="meta"), "meta"),
    "sparse": (torch.ones(2).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("name", list(STATES))
def test_unusable_state(name):
    y0, message = STATES[name]
    with pytest.raises(pnode.ConfigurationError, match=message) as info:
        pnode.Solver(decay, **CHEAP)(y0, times())
    assert "y0" in str(info.value)


OPTIONS = {
    "unknown": ({"options": {"tolerance": 1}}, "tolerance.*step_size"),
    "not-a-mapping": ({"options": 5}, "options.*5"),
    "pairs": ({"options": [("step_size", 0.1)]}, "options"),
    "twice": ({"options": {"step_size": 0.1}, "step_size": 0.1}, "step_size.*both"),
    "twice-max-steps": ({"options": {"max_num_steps": 3}, "max_steps": 3}, "max_num_steps.*both"),
    "negative": ({"options": {"step_size": -0.1}}, "step_size=-0.1"),
    "text": ({"options": {"first_step": "small"}, "method": "dopri5"}, "first_step='small'"),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_unusable_options_of_odeint(name):
    keywords, message = OPTIONS[name]
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.odeint(decay, state(), times(), **{"method": "rk4"} | keywords)


# Shapes, dtypes, times.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 4, 5), (2, 1, 3)])
@every_kind
def test_shapes_and_dtypes(kind, shape, dtype):
    y0 = torch.linspace(0.5, 1.5, max(1, math.prod(shape)), dtype=dtype).reshape(shape)
    y0.requires_grad_()
    seen = set()

    def field(t, y):
        seen.add((t.shape, t.dtype, y.shape, y.dtype))
        return -y

    keywords = KINDS[kind] | ({"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {})
    solution = pnode.Solver(field, **keywords)(y0, times())
    assert solution.ys.shape == (3, *shape) and solution.ys.dtype is dtype
    assert torch.equal(solution.ys[0], y0)
    assert solution.reason == "t_end"
    torch.testing.assert_close(solution.ys[-1], y0 * math.exp(-1.0), rtol=2e-3, atol=0.0)
    (gradient,) = torch.autograd.grad(solution.ys[-1].sum(), y0)
    assert gradient.shape == shape and gradient.dtype is dtype
    torch.testing.assert_close(gradient, torch.full_like(y0, math.exp(-1.0)), rtol=2e-3, atol=0.0)
    assert seen == {(torch.Size([]), dtype, torch.Size(shape), dtype)}


@pytest.mark.parametrize("container", [tuple, list])
@every_kind
def test_tuple_state(kind, container):
    parts = [state(grad=True), torch.tensor(2.0, dtype=D, requires_grad=True),
             torch.ones(2, 3, dtype=D, requires_grad=True)]  # fmt: skip

    def field(t, y):
        assert isinstance(y, tuple)
        assert [part.shape for part in y] == [part.shape for part in parts]
        return container((-y[0], -2.0 * y[1], -y[2] * 3.0))

    ys = pnode.Solver(field, **KINDS[kind])(container(parts), times()).ys
    assert isinstance(ys, tuple)
    assert [part.shape for part in ys] == [(3, 2), (3,), (3, 2, 3)]
    gradients = torch.autograd.grad(sum(part[-1].sum() for part in ys), parts)
    for rate, part, result, gradient in zip((1, 2, 3), parts, ys, gradients, strict=True):
        assert torch.equal(result[0], part)
        factor = math.exp(-rate)
        torch.testing.assert_close(result[-1], part * factor, rtol=3e-2, atol=0.0)
        torch.testing.assert_close(gradient, torch.full_like(part, factor), rtol=3e-2, atol=0.0)


def test_tuple_of_one():
    ys = pnode.Solver(lambda t, y: (-y[0],), **CHEAP)((state(),), times()).ys
    assert isinstance(ys, tuple) and ys[0].shape == (3, 2)


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_one_part_of_a_tuple(part):
    y0 = (state(grad=part == 0), state(grad=part == 1))
    ys = pnode.Solver(lambda t, y: (y[1], -y[0]), **CHEAP)(y0, times()).ys
    (gradient,) = torch.autograd.grad(ys[0][-1].sum(), y0[part])
    expected = math.cos(1.0) if part == 0 else math.sin(1.0)
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected), rtol=1e-5, atol=0.0)


STRANGE = {
    "transposed": lambda y: y.t().contiguous().t(),
    "strided": lambda y: torch.stack((y, 7.0 * y), -1)[..., 0],
    "expanded": lambda y: y[:1, :1].expand_as(y),
    "negative-bit": lambda y: torch.complex(y, -y).conj().imag,
}


@pytest.mark.parametrize("strange", list(STRANGE))
@every_kind
def test_states_and_slopes_with_any_strides(kind, strange):
    y0 = torch.full((2, 3), 0.7, dtype=D)
    expected = pnode.Solver(decay, **KINDS[kind])(y0, times()).ys
    view = STRANGE[strange]
    ys = pnode.Solver(lambda t, y: view(-y), **KINDS[kind])(view(y0), times()).ys
    torch.testing.assert_close(ys, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_times_in_another_dtype(dtype):
    t = torch.tensor([0, 1, 3], dtype=dtype)
    solution = pnode.Solver(decay, **CHEAP)(state(), t)
    assert torch.equal(solution.ys, pnode.Solver(decay, **CHEAP)(state(), times(0, 1, 3)).ys)
    assert solution.ys.dtype is D and torch.equal(solution.ts, t)


def test_times_as_a_list():
    solution = pnode.Solver(decay, **CHEAP)(state(), [0.0, 0.5, 1.0])
    assert torch.equal(solution.ys, pnode.Solver(decay, **CHEAP)(state(), times()).ys)


def nonautonomous(weight):
    return lambda t, y: -weight * y + torch.sin(3.0 * t) * torch.stack((y[1], -y[0]))


@every_kind
def test_decreasing_times_are_the_reflected_problem(kind):
    results = []
    for sign in (1.0, -1.0):
        weight, y0 = torch.tensor(0.4, dtype=D, requires_grad=True), state(grad=True)
        t = (sign * times(0.2, 0.5, 1.3)).requires_grad_()
        forward = nonautonomous(weight)
        field = forward if sign > 0 else lambda t, y, forward=forward: -forward(-t, y)
        ys = pnode.Solver(field, params=[weight], **KINDS[kind])(y0, t).ys
        gradients = torch.autograd.grad(ys.square().sum(), [y0, weight, t])
        results.append((ys, *gradients[:2], sign * gradients[2]))
    for reflected, direct in zip(*results, strict=True):
        assert torch.equal(reflected, direct)


@every_kind
def test_decreasing_times_undo_increasing_ones(kind):
    keywords = KINDS[kind] | ({"step_size": 0.01} if "step_size" in KINDS[kind] else {})
    solver = pnode.Solver(nonautonomous(torch.tensor(0.4, dtype=D)), **keywords)
    y0 = state()
    end = solver(y0, times(0.0, 1.0)).ys[-1]
    torch.testing.assert_close(solver(end, times(1.0, 0.0)).ys[-1], y0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("through", ["Solver", "odeint"])
@every_kind
def test_one_time_returns_the_initial_state(kind, through, shape):
    y0 = torch.full(shape, 0.3, dtype=D, requires_grad=True)
    weight = torch.tensor(1.0, dtype=D, requires_grad=True)
    t = times(0.7).requires_grad_()
    if through == "Solver":
        ys = pnode.Solver(lambda t, y: -weight * y, params=[weight], **KINDS[kind])(y0, t).ys
    else:
        ys = pnode.odeint(lambda t, y: -weight * y, y0, t, params=[weight], **KINDS[kind])
    assert torch.equal(ys, y0[None])
    cotangent = torch.rand(shape, dtype=D)
    (ys * cotangent).sum().backward()
    assert torch.equal(y0.grad, cotangent)
    assert t.grad is None or torch.equal(t.grad, torch.zeros(1, dtype=D))
    assert weight.grad is None or weight.grad == 0.0


AWKWARD = (0.1, 0.3, 0.30000000000000004, 0.7, 1.1, 1.1 + 1e-9, math.pi)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", ["rk4", "dopri5", "cn"])
def test_output_times_are_hit_exactly(kind, sign):
    seen = []
    t = sign * times(*AWKWARD)

    def monitor(step, t, y):
        seen.append((step, t, y))

    solution = pnode.Solver(decay, monitor=monitor, **KINDS[kind])(state(), t)
    assert [step for step, _, _ in seen] == list(range(1, solution.stats.steps + 1))
    reached = {time: y for _, time, y in seen}
    for time, y in zip(t.tolist()[1:], solution.ys[1:], strict=True):
        assert time in reached  # bit for bit
        assert torch.equal(reached[time], y)
    moments = [t[0].item(), *(time for _, time, _ in seen)]
    assert all(sign * (after - before) > 0 for before, after in itertools.pairwise(moments))


@pytest.mark.parametrize("output_times", [(0.0, 1.0), (0.0, 0.3, 1.0), (0.0, 1e-3, 2.0)])
@pytest.mark.parametrize("step_size", [0.1, 0.3, 1.0 / 3.0, 7.0])
@pytest.mark.parametrize("method", ["rk4", "cn", "dopri5"])
def test_fixed_steps_are_equal_and_at_most_the_step_size(method, step_size, output_times):
    moments = [output_times[0]]
    solver = pnode.Solver(
        decay, method=method, step_size=step_size, monitor=lambda step, t, y: moments.append(t)
    )
    stats = solver(state(), times(*output_times)).stats
    expected = [
        max(1, math.ceil(round((end - start) / step_size, 9)))
        for start, end in itertools.pairwise(output_times)
    ]
    assert stats.steps == sum(expected) == len(moments) - 1
    moments = np.array(moments)
    for start, end in itertools.pairwise(output_times):
        lengths = np.diff(moments[(moments >= start) & (moments <= end)])
        assert lengths.max() <= step_size * (1 + 1e-12)
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "cn"])
def test_first_step_is_taken(method):
    moments = []
    pnode.Solver(
        decay, method=method, first_step=1e-3, monitor=lambda step, t, y: moments.append(t)
    )(state(), times(2.0, 3.0))
    assert moments[0] == 2.0 + 1e-3


@pytest.mark.parametrize("method", ["cn", "implicit_midpoint", "beuler"])
def test_first_step_is_checked_against_the_tolerance(method):
    # A first step over the whole interval: there is no history to estimate its error from.
    solution = pnode.Solver(decay, method=method, rtol=1e-4, first_step=1.0)(state(), times(0, 1))
    accuracy = 1e-2 if method == "beuler" else 1e-3
    torch.testing.assert_close(
        solution.ys[-1], state() * math.exp(-1.0), rtol=accuracy, atol=accuracy
    )


@pytest.mark.parametrize("method", ["dopri5", "cn"])
def test_max_step_is_kept(method):
    moments = [0.0]
    pnode.Solver(
        decay, method=method, rtol=1e-2, max_step=0.05, monitor=lambda s, t, y: moments.append(t)
    )(state(), times())
    assert max(np.diff(moments)) <= 0.05 * (1 + 1e-9)


def test_min_step_is_kept():
    # Only a step that meets an output time may be shorter.
    moments = [0.0]
    solver = pnode.Solver(
        lambda t, y: -y * (1.0 + 3.0 * torch.exp(-((t - 1.0) ** 2) / 1e-2)),
        method="dopri5", rtol=1e-3, atol=1e-3, first_step=0.05, min_step=0.02,
        monitor=lambda s, t, y: moments.append(t),
    )  # fmt: skip
    solver(state(), times(0.0, 2.0))
    lengths = np.diff(moments)
    assert lengths[:-2].min() >= 0.02


def test_fixed_steps_of_an_adaptive_method_do_not_adapt():
    assert pnode.Solver(decay, method="dopri5", step_size=0.25)(state(), times()).stats.steps == 4


# Parameters.


def test_module_gradients_equal_plain_autograd():
    net, y0 = Net(), state(grad=True)
    t = times(0.0, 0.3, 1.0)
    wanted = [y0, net.layer.weight, net.layer.bias]
    expected = torch.autograd.grad(rk4(net, y0, t, 0.1).square().sum(), wanted)
    ys = pnode.Solver(net, **CHEAP)(y0, t).ys
    gradients = torch.autograd.grad(ys.square().sum(), wanted)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-13)


@every_kind
def test_frozen_and_unused_parameters_have_no_gradient(kind):
    net = Net()
    pnode.Solver(net, **KINDS[kind])(state(), times()).ys.sum().backward()
    assert net.frozen.grad is None and net.unused.grad is None
    assert net.layer.weight.grad is not None and net.layer.bias.grad is not None


@every_kind
def test_non_leaf_parameters(kind):
    raw = torch.tensor([0.2, -0.4], dtype=D, requires_grad=True)
    y0 = state()
    rates = raw.exp()
    ys = pnode.Solver(lambda t, y: -rates * y, params=[rates], **KINDS[kind])(y0, times()).ys
    ys[-1].sum().backward()
    expected = -(rates * torch.exp(-rates) * y0).detach()
    torch.testing.assert_close(raw.grad, expected, rtol=1e-2, atol=0.0)


@every_kind
def test_parameters_in_another_dtype_and_shape(kind):
    scale = torch.tensor([[0.5]], dtype=torch.float32, requires_grad=True)
    ys = pnode.Solver(lambda t, y: -scale.double()[0] * y, params=[scale], **KINDS[kind])(
        state(), times()
    ).ys
    ys[-1].sum().backward()
    assert scale.grad.dtype is torch.float32 and scale.grad.shape == (1, 1)
    assert scale.grad.item() == pytest.approx(-1.5 * math.exp(-0.5), rel=1e-2)


def test_parameter_given_twice_counts_once():
    net, y0 = Net(), state()
    ys = pnode.Solver(net, params=[net.layer.weight, net.layer.weight], **CHEAP)(y0, times()).ys
    (gradient,) = torch.autograd.grad(ys.sum(), net.layer.weight)
    (expected,) = torch.autograd.grad(rk4(net, y0, times(), 0.1).sum(), net.layer.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


def test_params_may_be_a_generator():
    net = Net()
    solver = pnode.Solver(lambda t, y: net(t, y), params=net.parameters(), **CHEAP)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(solver(state(), times()).ys.sum(), net.layer.bias)
    (expected,) = torch.autograd.grad(rk4(net, state(), times(), 0.1).sum(), net.layer.bias)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@every_kind
def test_no_gradient_wanted_at_all(kind):
    solution = pnode.Solver(decay, **KINDS[kind])(state(), times())
    assert not solution.ys.requires_grad
    assert solution.stats.ram_bytes == 0


@every_kind
def test_parameter_unfrozen_between_calls(kind):
    net = Net()
    solver = pnode.Solver(net, **KINDS[kind])
    solver(state(), times()).ys.sum().backward()
    net.frozen.requires_grad_()
    solver(state(), times()).ys.sum().backward()
    assert net.frozen.grad is not None


@pytest.mark.parametrize("loss", [lambda ys: ys[0].sum(), lambda ys: (0.0 * ys).sum()],
                         ids=["first-output", "zero-cotangent"])  # fmt: skip
@every_kind
def test_zero_gradients_are_zeros_as_in_autograd(kind, loss):
    net, y0 = Net(), state(grad=True)
    ys = pnode.Solver(net, **KINDS[kind])(y0, times()).ys
    gradients = torch.autograd.grad(loss(ys), [y0, net.layer.weight])
    expected = torch.autograd.grad(loss(rk4(net, y0, times(), 0.1)), [y0, net.layer.weight])
    for gradient, exact in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, exact)


@every_kind
def test_constant_field(kind):
    slope = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
    y0 = state(grad=True)
    ys = pnode.Solver(lambda t, y: slope.clone(), params=[slope], **KINDS[kind])(y0, times()).ys
    gradients = torch.autograd.grad(ys[-1].sum(), [y0, slope])
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.ones(2, dtype=D))
    field = pnode.Solver(lambda t, y: torch.ones(2, dtype=D), **KINDS[kind])
    (gradient,) = torch.autograd.grad(field(y0, times()).ys[-1].sum(), y0)
    torch.testing.assert_close(gradient, torch.ones(2, dtype=D))


@every_kind
def test_field_that_differentiates(kind):
    # Hamilton's equations from a learned energy.
    weight = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)

    def field(t, y):
        with torch.enable_grad():
            here = y if y.requires_grad else y.detach().requires_grad_()
            energy = (weight * here**2).sum() / 2
            (slope,) = torch.autograd.grad(energy, here, create_graph=True)
        return torch.stack((slope[1], -slope[0]))

    def by_hand(t, y):
        return torch.stack((weight[1] * y[1], -weight[0] * y[0]))

    results = []
    for function in (field, by_hand):
        y0 = state(grad=True)
        ys = pnode.Solver(function, params=[weight], **KINDS[kind])(y0, times()).ys
        results.append((ys, *torch.autograd.grad(ys.square().sum(), [y0, weight])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


# Repeated, nested and interleaved use.


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@every_kind
def test_several_live_forwards(kind, order):
    net = Net()
    solver = pnode.Solver(net, **KINDS[kind])
    states = [torch.full((2,), 0.3 * (i + 1), dtype=D, requires_grad=True) for i in range(3)]
    ends = [times(0.0, 0.5 + 0.25 * i) for i in range(3)]
    alone = [
        torch.autograd.grad(solver(y0, t).ys.square().sum(), [y0, net.layer.weight])
        for y0, t in zip(states, ends, strict=True)
    ]
    losses = [solver(y0, t).ys.square().sum() for y0, t in zip(states, ends, strict=True)]
    for index in order:
        gradients = torch.autograd.grad(losses[index], [states[index], net.layer.weight])
        for gradient, expected in zip(gradients, alone[index], strict=True):
            assert torch.equal(gradient, expected)


@every_kind
def test_chained_solves(kind):
    net, y0 = Net(), state(grad=True)
    solver = pnode.Solver(net, **KINDS[kind])
    middle = solver(y0, times(0.0, 0.5)).ys[-1]
    end = solver(middle, times(0.5, 1.0)).ys[-1]
    gradients = torch.autograd.grad(end.sum(), [y0, net.layer.weight])
    whole = solver(y0, times()).ys[-1]
    expected = torch.autograd.grad(whole.sum(), [y0, net.layer.weight])
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-8)


@every_kind
def test_forward_without_backward(kind):
    net, y0 = Net(), state(grad=True)
    solver = pnode.Solver(net, **KINDS[kind])
    (expected,) = torch.autograd.grad(solver(y0, times()).ys.sum(), y0)
    for _ in range(3):
        solver(y0, times())
    (gradient,) = torch.autograd.grad(solver(y0, times()).ys.sum(), y0)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("inner", ["odeint", "other", "same"])
@pytest.mark.parametrize("kind", ["rk4", "dopri5", "cn"])
def test_nested_solves(kind, inner):
    """y' = z(11) with z' = w z, z(10) = y, is y' = exp(w) y; from t = 10 on, f is z's."""
    weight, y0 = torch.tensor(-0.3, dtype=D, requires_grad=True), state(grad=True)

    def linear(t, z):
        return weight * z

    def field(t, y):
        if t >= 10.0:
            return linear(t, y)
        if inner == "odeint":
            return pnode.odeint(linear, y, times(10, 11), params=[weight], **KINDS[kind])[-1]
        solver = outer if inner == "same" else other
        return solver(y, times(10, 11)).ys[-1]

    other = pnode.Solver(linear, params=[weight], **KINDS[kind])
    outer = pnode.Solver(field, params=[weight], **KINDS[kind])
    for _ in range(2):
        end = outer(y0, times()).ys[-1]
        gradients = torch.autograd.grad(end.sum(), [y0, weight])
        growth = math.exp(math.exp(-0.3))
        torch.testing.assert_close(end, growth * y0, rtol=5e-3, atol=0.0)
        torch.testing.assert_close(gradients[0], torch.full_like(y0, growth), rtol=5e-3, atol=0.0)
        expected = growth * math.exp(-0.3) * y0.sum().item()
        assert gradients[1].item() == pytest.approx(expected, rel=1e-2)


@every_kind
def test_solvers_of_different_sizes_and_one_of_changing_size(kind):
    one = pnode.Solver(decay, **KINDS[kind])
    other = pnode.Solver(decay, **KINDS[kind])
    sizes = [1, 7, 2, 300, 2, 1, 5, 7, 3, 4]
    kept = []
    for size, dtype in itertools.product(sizes, (torch.float64, torch.float32)):
        y0 = torch.ones(size, dtype=dtype, requires_grad=True)
        kept += [(y0, solver(y0, times(0.0, 0.2)).ys) for solver in (one, other)]
    for y0, ys in reversed(kept):
        (gradient,) = torch.autograd.grad(ys[-1].sum(), y0)
        assert gradient.dtype is y0.dtype
        torch.testing.assert_close(
            gradient, torch.full_like(y0, math.exp(-0.2)), rtol=1e-3, atol=0.0
        )


@every_kind
def test_retain_graph_repeats_the_forward_sweep(kind):
    net, y0 = Net(), state(grad=True)
    solution = pnode.Solver(net, **KINDS[kind])(y0, times())
    loss, stats = solution.ys.square().sum(), solution.stats
    wanted = [y0, net.layer.weight, net.layer.bias]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    once = copy.copy(stats.backward)
    assert (once.steps, once.recomputed) == (stats.steps, 0)
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert stats.backward.recomputed == stats.steps
    assert (stats.backward.steps, stats.backward.vjp) == (2 * once.steps, 2 * once.vjp)
    loss.backward()
    torch.testing.assert_close(y0.grad, first[0], rtol=1e-13, atol=1e-14)
    assert stats.backward.recomputed == 2 * stats.steps


def test_backward_twice_without_retain_graph_is_torchs_error():
    y0 = state(grad=True)
    loss = pnode.Solver(decay, **CHEAP)(y0, times()).ys.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_kind
def test_without_gradients(kind, mode):
    net = Net()
    solver = pnode.Solver(net, **KINDS[kind])
    expected = solver(state(), times()).ys
    y0 = state(grad=True)
    with mode():
        solution = solver(y0, times())
        inside = solver(state() * 1.0, times() + 0.0).ys  # inference tensors
    assert not solution.ys.requires_grad and solution.stats.ram_bytes == 0
    torch.testing.assert_close(solution.ys, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inside, expected.detach(), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(solver(y0, times()).ys.sum(), y0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["rk4", "dopri5"])
def test_module_made_in_inference_mode(kind):
    # Implicit methods differentiate, which torch refuses for tensors made in inference mode.
    with torch.inference_mode():
        ys = pnode.Solver(Net(), **KINDS[kind])(state(), times()).ys
    assert torch.isfinite(ys).all()


def test_backward_inside_no_grad():
    y0 = state(grad=True)
    ys = pnode.Solver(decay, **CHEAP)(y0, times()).ys
    with torch.no_grad():
        (gradient,) = torch.autograd.grad([ys], [y0], [torch.ones_like(ys)])
    assert torch.isfinite(gradient).all()


# The Solver as a Module.


def test_solver_is_a_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = pnode.Solver(Net(), **CHEAP)
            self.head = torch.nn.Linear(2, 1, dtype=D)

        def forward(self, y):
            return self.head(self.flow(y, times()).ys[-1])

    model = Model()
    assert {"flow.rhs.layer.weight", "flow.rhs.scale", "head.weight"} <= set(model.state_dict())
    twin = Model()
    twin.load_state_dict(model.state_dict())
    batch = torch.rand(5, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin(batch), model(batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(batch) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval()
    assert not model.flow.rhs.training
    assert "rk4" in repr(model)


def test_precision_of_a_solver_follows_the_module():
    solver = pnode.Solver(Net(), **CHEAP).float()
    ys = solver(state(dtype=torch.float32), times()).ys
    assert ys.dtype is torch.float32
    with pytest.raises((pnode.VectorFieldError, RuntimeError)):
        solver(state(), times())
    ys = solver.double()(state(), times()).ys
    assert ys.dtype is D


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@every_kind
def test_copies_are_independent(kind, duplicate, used_before):
    solver = pnode.Solver(Net(), petsc_options={}, max_steps=1000, **KINDS[kind])
    if used_before:
        solver(state(), times()).ys.sum().backward()
    twin = duplicate(solver)
    expected = solver(state(), times()).ys
    assert torch.equal(twin(state(), times()).ys, expected)
    with torch.no_grad():
        twin.rhs.layer.weight.mul_(2.0)
    assert not torch.equal(twin(state(), times()).ys, expected)
    assert torch.equal(solver(state(), times()).ys, expected)
    del twin
    assert torch.equal(solver(state(), times()).ys, expected)


def test_result_owns_its_memory():
    solver = pnode.Solver(decay, **CHEAP)
    first = solver(state(), times()).ys
    kept = first.clone()
    solver(state(3.0, 4.0), times())
    assert torch.equal(first, kept)
    first.mul_(2.0)
    assert torch.equal(solver(state(), times()).ys, kept)


@every_kind
def test_tensors_kept_by_the_field_do_not_change(kind):
    kept = []

    def field(t, y):
        kept.append((t, y, t.clone().detach(), y.clone().detach()))
        return -y

    y0 = state(grad=True)
    pnode.Solver(field, **KINDS[kind])(y0, times()).ys.sum().backward()
    for t, y, t_then, y_then in kept:
        assert torch.equal(t, t_then) and torch.equal(y.detach(), y_then)


# Gradients with respect to time.


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", ["dopri5", "cn"])
def test_time_gradient_of_a_linear_problem(kind, sign):
    # y(t_i) = y0 exp(a (t_i - t_0))
    a, y0 = -0.7, torch.tensor(1.3, dtype=D)
    keywords = KINDS[kind] | ({"step_size": 1e-3} if kind == "cn" else {})
    t = (sign * times(0.1, 0.4, 1.0)).requires_grad_()
    weights = state(0.3, -1.2, 2.0)
    ys = pnode.Solver(lambda t, y: a * y, **keywords)(y0, t).ys
    (gradient,) = torch.autograd.grad((weights * ys).sum(), t)
    later = weights[1:] * a * y0 * torch.exp(a * (t[1:] - t[0])).detach()
    expected = torch.cat((-later.sum()[None], later))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_gradients_of_an_autonomous_field_sum_to_zero(dtype):
    net = Net()
    t = times(0.0, 0.3, 0.8, 2.0, dtype=dtype).requires_grad_()
    ys = pnode.Solver(net, rtol=1e-11, atol=1e-12)(state(), t).ys
    (gradient,) = torch.autograd.grad(ys.square().sum(), t)
    assert gradient.dtype is dtype
    assert gradient.abs().max() > 1e-2
    assert gradient.sum().abs() < (1e-6 if dtype is torch.float32 else 1e-9)


@every_kind
def test_only_the_times_require_a_gradient(kind):
    t = times().requires_grad_()
    ys = pnode.Solver(decay, **KINDS[kind])(state(), t).ys
    assert ys.requires_grad
    (gradient,) = torch.autograd.grad(ys[1].sum(), t)
    expected = 1.5 * math.exp(-0.5)
    torch.testing.assert_close(
        gradient, torch.tensor([expected, -expected, 0.0], dtype=D), rtol=1e-2, atol=1e-12
    )


def test_gradient_flows_through_a_learned_end_time():
    end = torch.tensor(0.9, dtype=D, requires_grad=True)
    ys = pnode.odeint(decay, state(1.0), torch.stack((torch.zeros_like(end), end)))
    ys[-1].sum().backward()
    assert end.grad.item() == pytest.approx(-math.exp(-0.9), rel=1e-6)


# odeint.


@pytest.mark.parametrize("method", ["dopri5", "rk4", "cn", "beuler", "bosh3"])
def test_odeint_equals_solver(method):
    keywords = {"step_size": 0.25, "method": method}
    solver = pnode.Solver(Net(), rtol=1e-7, atol=1e-9, **keywords)
    ys = pnode.odeint(Net(), state(), times(), **keywords)
    assert torch.equal(ys, solver(state(), times()).ys)


def test_odeint_defaults_to_dopri5():
    expected = pnode.Solver(decay, method="dopri5", rtol=1e-7, atol=1e-9)(state(), times()).ys
    assert torch.equal(pnode.odeint(decay, state(), times()), expected)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_odeint_without_step_size_takes_one_step_per_interval(method):
    t = times(0.0, 0.1, 0.7, 1.0)
    moments = []
    pnode.odeint(decay, state(), t, method=method, monitor=lambda step, t, y: moments.append(t))
    assert moments == t.tolist()[1:]
    pnode.odeint(decay, state(), times(1.0), method=method)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"step_size": 0.25}, {"step_size": 0.25}),
        ({"first_step": 0.01}, {"first_step": 0.01}),
        ({"max_step": 0.1, "min_step": 1e-6}, {"max_step": 0.1, "min_step": 1e-6}),
        ({"max_num_steps": 500}, {"max_steps": 500}),
        ({}, {}),
        (None, {}),
    ],
)
def test_torchdiffeq_options(options, keywords):
    assert torch.equal(
        pnode.odeint(decay, state(), times(), options=options),
        pnode.odeint(decay, state(), times(), **keywords),
    )


TORCHDIFFEQ = ["euler", "midpoint", "heun2", "bosh3", "fehlberg2", "rk4", "dopri5",
               "adaptive_heun", "implicit_euler", "implicit_midpoint", "trapezoid"]  # fmt: skip


@pytest.mark.parametrize("method", TORCHDIFFEQ)
def test_torchdiffeq_names_work(method):
    ys = pnode.odeint(decay, state(), times(), method=method, options={"step_size": 0.02})
    torch.testing.assert_close(ys[-1], state() * math.exp(-1.0), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize(
    ("method", "nearest"),
    [("explicit_adams", "dopri5"), ("fixed_adams", "rk4"),
     ("implicit_adams", "cn"), ("kvaerno5", "esdirk6"),
     ("gl2", "implicit_midpoint"), ("scipy_solver", "bdf")],
)  # fmt: skip
def test_refused_names_mention_the_nearest_method(method, nearest):
    with pytest.raises(pnode.ConfigurationError, match=f"{method!r}.*nearest.*{nearest!r}"):
        pnode.odeint(decay, state(), times(), method=method)


def test_odeint_adjoint_warns_once_about_what_it_ignores():
    net = Net()
    keywords = {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-3, "adjoint_method": "rk4",
                "adjoint_options": {"norm": "seminorm"}}  # fmt: skip
    with pytest.warns(UserWarning, match=r"adjoint_atol.*adjoint_method.*adjoint_rtol") as caught:
        ys = pnode.odeint_adjoint(
            lambda t, y: net(t, y), state(), times(), adjoint_params=net.parameters(), **keywords
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(ys, pnode.odeint(net, state(), times()))
    (gradient,) = torch.autograd.grad(ys.sum(), net.layer.weight)
    assert torch.isfinite(gradient).all()


def test_odeint_adjoint_alone_is_odeint():
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = pnode.odeint_adjoint(net, state(), times(), adjoint_params=tuple(net.parameters()))
    assert torch.equal(ys, pnode.odeint(net, state(), times()))


def test_odeint_adjoint_params_given_twice():
    weight = torch.ones(1, dtype=D, requires_grad=True)
    with pytest.raises(pnode.ConfigurationError, match="params= and adjoint_params="):
        pnode.odeint_adjoint(decay, state(), times(), params=[weight], adjoint_params=[weight])


def test_unknown_keyword_of_odeint():
    with pytest.raises(TypeError, match="nonsense"):
        pnode.odeint(decay, state(), times(), nonsense=1)


# Monitor and progress.


@pytest.mark.parametrize("grad", [False, True])
@every_kind
def test_monitor_sees_every_accepted_step_once(kind, grad):
    seen = []
    y0 = (state(grad=grad), torch.tensor(1.0, dtype=D))
    solver = pnode.Solver(
        lambda t, y: (-y[0], -y[1]), monitor=lambda *item: seen.append(item), **KINDS[kind]
    )
    solution = solver(y0, times())
    forward_steps = list(range(1, solution.stats.steps + 1))
    assert [step for step, _, _ in seen] == forward_steps
    for _, t, y in seen:
        assert isinstance(t, float) and isinstance(y, tuple) and y[1].shape == ()
        assert not y[0].requires_grad
        torch.testing.assert_close(y[0], state() * math.exp(-t), rtol=1e-2, atol=0.0)
        y[0].zero_()  # a copy
    torch.testing.assert_close(solution.ys[1][-1].item(), math.exp(-1.0), rtol=1e-2, atol=0.0)
    if grad:
        solution.ys[0].sum().backward()
        solution.ys[0].detach()
        assert [step for step, _, _ in seen] == forward_steps


@pytest.mark.parametrize("t", [(0.0, 0.5, 1.0), (1.0, 0.0), (0.5,)])
def test_progress_bar(capsys, t):
    seen = []
    solver = pnode.Solver(decay, progress=True, monitor=lambda step, t, y: seen.append(t), **CHEAP)
    solution = solver(state(), times(*t))
    assert len(seen) == solution.stats.steps
    assert ("100%" in capsys.readouterr().err) == (len(t) > 1)
    assert torch.equal(solution.ys, pnode.Solver(decay, **CHEAP)(state(), times(*t)).ys)


# ------------------------------------------------------------------------------------ assignments


def test_options_assigned_later_are_refused():
    """All of them: assigned to, they would be without effect."""
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    names = {*inspect.signature(pnode.Solver).parameters, *PlainOptions.__annotations__}
    replaced = {"rhs", "implicit", "explicit", "residual", "mass", "cost", "event_fn"}
    for name in names - replaced - {"plain"}:
        with pytest.raises(pnode.ConfigurationError, match=rf"solver\.{name} = 0\.05.*{name}="):
            setattr(solver, name, 0.05)
    for name in replaced - {"rhs"}:
        with pytest.raises(pnode.ConfigurationError, match=rf"{name} = .*made without {name}="):
            setattr(solver, name, lambda t, y: y[0])
        setattr(solver, name, None)
    with pytest.raises(pnode.ConfigurationError, match=r"rhs = None: .*made with rhs="):
        solver.rhs = None
    with pytest.raises(pnode.ConfigurationError, match=r"rhs = 3: give a callable"):
        solver.rhs = 3
    solver.of_the_users_own = 3


def test_functions_replaced_later_are_taken():
    """By others of the same form: the solves are those of a new solver, gradients too."""
    y0, t = torch.tensor([0.5, 1.0], dtype=D, requires_grad=True), torch.tensor([0.0, 1.0])
    k = torch.tensor(2.0, dtype=D, requires_grad=True)
    given = {
        "implicit": lambda t, y: -y, "explicit": lambda t, y: y.sin(),
        "mass": torch.tensor([1.0, 2.0], dtype=D), "cost": lambda t, y: y.sum(),
        "event_fn": lambda t, y: y[0] - 0.3,
    }  # fmt: skip
    other = {
        "implicit": lambda t, y: -k * y, "explicit": lambda t, y: -y.cos(),
        "mass": torch.tensor([3.0, 1.0], dtype=D), "cost": lambda t, y: k * y.square(),
        "event_fn": lambda t, y: y[0] - 0.4 * k / 2.0,
    }  # fmt: skip
    options = {"params": [k], "method": "ark3", "step_size": 0.1}
    solver = pnode.Solver(**given, **options)
    solver(y0, t)
    for name in given:
        setattr(solver, name, other[name])
        given[name] = other[name]
        found = []
        for one in (solver, pnode.Solver(**given, **options)):
            solution = one(y0, t)
            loss = solution.ys[-1].sum() + solution.costs[-1].sum() + solution.ts[-1]
            found.append((loss, *torch.autograd.grad(loss, [y0, k])))
        assert all(map(torch.equal, *found))
    for name in ("cost", "event_fn"):
        setattr(solver, name, None)
    solution = solver(y0, t)
    assert solution.costs is None and solution.reason == "t_end"

"""Controls through samples: values, ends, gradients, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

import pnode
from pnode import controls

D = torch.float64
TIMES = torch.tensor([0.0, 0.3, 0.7, 1.5], dtype=torch.float64)
VALUES = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0], [1.5, 1.0]], dtype=torch.float64)
INSIDE = [0.0, 0.1, 0.3, 0.69, 0.7, 1.2, 1.5]


def test_hold_has_the_new_value_at_its_time():
    control = controls.hold(TIMES, VALUES)
    for t, row in [(-1.0, 0), (0.0, 0), (0.29, 0), (0.3, 1), (0.8, 2), (1.5, 3), (9.0, 3)]:
        assert torch.equal(control(torch.tensor(t, dtype=torch.float64)), VALUES[row])
    assert torch.equal(control.breakpoints, TIMES[1:])


def test_times_of_a_list_are_double():
    control = controls.linear([0.0, 0.3, 0.7, 1.5], VALUES.float())
    assert torch.equal(control.times, TIMES)


def test_linear_and_cubic_against_numpy_and_scipy():
    polygon, spline = controls.linear(TIMES, VALUES), controls.cubic(TIMES, VALUES)
    oracle = CubicSpline(TIMES.numpy(), VALUES.numpy(), bc_type="natural")
    for t in INSIDE:
        at = torch.tensor(t, dtype=torch.float64)
        expected = [np.interp(t, TIMES.numpy(), column) for column in VALUES.numpy().T]
        np.testing.assert_allclose(polygon(at).numpy(), expected, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(spline(at).numpy(), oracle(t), rtol=1e-13, atol=1e-13)
    for control in (polygon, spline):
        for t, row in ((-2.0, 0), (4.0, 3)):
            assert torch.equal(control(torch.tensor(t, dtype=torch.float64)), VALUES[row])
    two = controls.cubic([0.0, 1.0], VALUES[:2])
    torch.testing.assert_close(two(torch.tensor(0.5)), VALUES[:2].mean(0))


@pytest.mark.parametrize("kind", [controls.hold, controls.linear, controls.cubic])
@pytest.mark.parametrize("more", [(), (2,), (4,), (2, 3)])
def test_many_times_at_once(kind, more):
    """Also as many times as a row has entries, or as there are samples."""
    control = kind(TIMES, torch.arange(4.0 * math.prod(more), dtype=D).sin().reshape(4, *more))
    for times in (TIMES + 0.1, torch.rand(3, 2, dtype=D)):
        alone = torch.stack([control(t) for t in times.flatten()]).reshape(*times.shape, *more)
        torch.testing.assert_close(control(times), alone, rtol=1e-14, atol=1e-15)
        column = times.reshape(*times.shape, *[1 for _ in more])
        assert torch.equal(control(column), control(times))


@pytest.mark.parametrize("kind", [controls.linear, controls.cubic])
def test_derivatives_by_time(kind):
    """Against autograd; z' = z X'(t), a controlled equation, has z = z(0) exp(X(t) - X(0))."""
    values = torch.randn(4, 2, dtype=D, generator=torch.manual_seed(0), requires_grad=True)
    control = kind(TIMES, values)
    t = torch.linspace(float(TIMES[0]) - 0.3, float(TIMES[-1]) + 0.2, 12, dtype=D)
    t.requires_grad_()
    expected = [torch.autograd.grad(control(t)[:, k].sum(), t)[0] for k in (0, 1)]
    found = control.derivative(t)
    assert found[0].eq(0).all() and found[-1].eq(0).all() and found[1:-1].ne(0).any()
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-12, atol=1e-13)
    inside = torch.rand(3, dtype=D) + 0.2
    assert torch.autograd.gradcheck(
        lambda v, s: kind(s, v).derivative(inside), (values, TIMES.clone().requires_grad_())
    )
    solver = pnode.Solver(
        lambda t, z: z * control.derivative(t), params=[values], method="verner8", step_size=0.02
    )
    ends = torch.stack([TIMES[0], TIMES[-1]])
    z = solver(torch.ones(2, dtype=D), ends, breakpoints=control).ys[-1]
    exact = torch.exp(values[-1] - values[0])
    torch.testing.assert_close(z, exact, rtol=1e-8, atol=1e-10)
    by, exactly = (torch.autograd.grad(end.sum(), values)[0] for end in (z, exact))
    torch.testing.assert_close(by, exactly, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "method", "compile"),
    [
        (controls.hold, "rodaspr", False), (controls.linear, "rodaspr", False),
        (controls.cubic, "rodaspr", False), (controls.cubic, "dopri5", True),
    ],
)  # fmt: skip
def test_independent_samples(kind, method, compile):
    control = kind(TIMES, VALUES)
    times = torch.tensor([[0.0, 1.0], [0.1, 0.5], [0.2, 1.4]], dtype=D)
    y0 = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.5, 0.5]], dtype=D)
    keywords = {"method": method, "step_size": 0.01, "compile": compile}
    rows = pnode.Solver(lambda t, y: control(t) - y, samples="independent", **keywords)(y0, times)
    for row, y, t in zip(rows.ys.unbind(1), y0, times, strict=True):
        alone = pnode.Solver(lambda t, y: control(t) - y, **keywords)(y, t).ys
        torch.testing.assert_close(row, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [controls.linear, controls.cubic])
def test_gradients_to_times_and_values(kind):
    def of(times, values):
        return torch.stack([kind(times, values)(torch.tensor(t)) for t in (0.1, 0.5, 1.1)])

    assert torch.autograd.gradcheck(
        of, (TIMES.clone().requires_grad_(), VALUES.clone().requires_grad_())
    )


@pytest.mark.parametrize("kind", [controls.hold, controls.linear, controls.cubic])
def test_a_solve_has_gradients_to_samples(kind):
    """Euler steps from output to output look at one piece of a hold in each interval."""

    def loss(values):
        control = kind(TIMES, values)
        solver = pnode.Solver(
            lambda t, y: control(t) - y * y, method="euler", step_size=0.04, params=[values],
            compile=False,
        )  # fmt: skip
        return solver(torch.zeros(2, dtype=torch.float64), TIMES).ys[-1]

    point = VALUES.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, point, check_undefined_grad=False)


class Driven(torch.nn.Module):
    def __init__(self, control):
        super().__init__()
        self.control = control

    def forward(self, t, y):
        return self.control(t) - y * y


@pytest.mark.parametrize("kind", [controls.hold, controls.linear, controls.cubic])
def test_compiled_solves(kind):
    """Euler's steps against a loop under autograd; Rosenbrock's, with df/dt, without a compiler."""
    field = Driven(kind(TIMES, torch.nn.Parameter(VALUES.clone())))
    y, h, found = torch.zeros(2, dtype=torch.float64), 1.5 / 64, []
    for k in range(64):
        y = y + h * field(torch.tensor(k * h, dtype=torch.float64), y)
    found.append((y, *torch.autograd.grad(y.sum(), field.parameters())))
    for method, step, compile in (
        ("euler", h, True), ("rodaspr", 0.05, False), ("rodaspr", 0.05, True)
    ):  # fmt: skip
        solver = pnode.Solver(field, method=method, step_size=step, compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = solver(torch.zeros_like(y), [0.0, 1.5]).ys[-1]
        found.append((y, *torch.autograd.grad(y.sum(), field.parameters())))
    for one, other in (found[:2], found[2:]):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [controls.hold, controls.linear, controls.cubic])
def test_a_parameter_is_the_control_s(kind):
    control = kind(TIMES, torch.nn.Parameter(VALUES.clone()))
    assert [tensor is control.values for tensor in control.parameters()] == [True]


@pytest.mark.parametrize("kind", [controls.hold, controls.linear, controls.cubic])
@pytest.mark.parametrize(
    ("times", "values", "named"),
    [
        ([0.0, 1.0], VALUES, "times has shape"),
        ([0.0, 2.0, 1.0, 3.0], VALUES, "strictly increase"),
        ([0.0, 1.0, float("nan"), 3.0], VALUES, "finite"),
        (TIMES, VALUES / 0.0, "values contains"),
        (TIMES, VALUES.long(), "values="),
        (["a", "b", "c", "d"], VALUES, "times="),
    ],
)
def test_unusable_samples(kind, times, values, named):
    with pytest.raises(pnode.ConfigurationError, match=named):
        kind(times, values)


def test_what_a_kind_refuses():
    for kind in (controls.linear, controls.cubic):
        with pytest.raises(pnode.ConfigurationError, match="two at least"):
            kind([0.0], VALUES[:1])
    with pytest.raises(pnode.ConfigurationError, match="times of hold require grad"):
        controls.hold(TIMES.clone().requires_grad_(), VALUES)
    with pytest.raises(pnode.ConfigurationError, match="hold jumps"):
        controls.hold(TIMES, VALUES).derivative(TIMES[0])

"""States that are dicts, NamedTuples or nested, and complex ones."""

import collections
import math
import warnings

import pytest
import torch

import pnode

D, C = torch.float64, torch.complex128
T = torch.linspace(0.0, 1.0, 4, dtype=D)
Pair = collections.namedtuple("Pair", "q p")
WAYS = {
    "rk4": {"method": "rk4", "step_size": 0.2},
    "rk4, limit": {"method": "rk4", "step_size": 0.1, "checkpointing": 1000},
    "dense": {"method": "dopri5", "rtol": 1e-4, "dense": True},
    "es325": {"method": "es325", "rtol": 1e-4},
    "cn, matrix-free": {"method": "cn", "step_size": 0.2, "jacobian": "matrix-free"},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-4},
    "bdf": {"method": "bdf", "rtol": 1e-4},
}


def leaves():
    return (
        torch.tensor([0.4, -0.7], dtype=D, requires_grad=True),
        torch.tensor(0.9, dtype=D, requires_grad=True),
        torch.tensor([[0.2, 0.5]], dtype=D, requires_grad=True),
    )


def nested(a, b, c):
    return {"a": a, "rest": [Pair(b, c)]}


def parts_of(y):
    return y["a"], y["rest"][0].q, y["rest"][0].p


def flat_field(t, y):
    a, b, c = y
    return torch.sin(c[0]) * b, -b * a.sum(), torch.cos(t) * c - a


def nested_field(t, y):
    assert isinstance(y, dict) and type(y["rest"]) is list and isinstance(y["rest"][0], Pair)
    a, b, c = flat_field(t, parts_of(y))
    return {"rest": [(Pair(b, c))], "a": a}  # keys in another order


@pytest.mark.parametrize("name", WAYS)
def test_a_nested_state_is_the_tuple_of_its_leaves(name):
    own, other = leaves(), leaves()
    ys = pnode.Solver(nested_field, **WAYS[name])(nested(*own), T).ys
    expected = pnode.Solver(flat_field, **WAYS[name])(other, T).ys
    assert type(ys) is dict and list(ys) == ["a", "rest"] and isinstance(ys["rest"][0], Pair)
    for one, two in zip(parts_of(ys), expected, strict=True):
        assert torch.equal(one, two)
    losses = [sum((part * part).sum() for part in parts) for parts in (parts_of(ys), expected)]
    gradients = [torch.autograd.grad(*each) for each in zip(losses, (own, other), strict=True)]
    for one, two in zip(*gradients, strict=True):
        assert one.any() and torch.equal(one, two)


def test_everything_around_a_nested_state():
    """Monitor, cost, events, stages, tolerances by leaf; a plain tuple for a NamedTuple."""
    seen, stages = [], []
    solver = pnode.Solver(
        lambda t, y: (y.p, -y.q), method="dopri5", rtol=(1e-9, 1e-9), atol=(1e-12, 1e-12),
        cost=lambda t, y: y.q.sum(), monitor=lambda step, t, y: seen.append(y),
        event_fn=pnode.Event(lambda t, y: y.q[0], terminal=False),
    )  # fmt: skip
    start = Pair(torch.ones(1, dtype=D, requires_grad=True), torch.zeros(1, dtype=D))
    solution = solver(start, torch.tensor([0.0, 2.0], dtype=D))
    assert all(isinstance(y, Pair) for y in seen) and len(seen) == solution.stats.steps
    found = solution.events[0]
    assert isinstance(found.states, Pair) and found.states.q.shape == (1, 1)
    assert found.times.item() == pytest.approx(math.pi / 2, rel=1e-8)
    assert found.states.p.item() == pytest.approx(-1.0, rel=1e-8)
    assert solution.costs[-1].item() == pytest.approx(math.sin(2.0), rel=1e-7)

    plain = pnode.Solver(lambda t, y: Pair(y.p, -y.q), method="rk4", step_size=0.5)
    solution = plain(start, torch.tensor([0.0, 1.0], dtype=D))
    solution.stages(Pair(torch.ones(2, 1, dtype=D), torch.zeros(2, 1, dtype=D)), stages.append)
    assert len(stages) == 8
    assert all(isinstance(each.state, Pair) and isinstance(each.adjoint, Pair) for each in stages)
    symplectic = pnode.Solver(
        lambda t, y: Pair(y.p, -y.q), method="velocity_verlet", step_size=0.01
    )
    end = symplectic(start, torch.tensor([0.0, 1.0], dtype=D)).ys
    assert end.q[-1].item() == pytest.approx(math.cos(1.0), rel=1e-4)


def test_compiled_nested_state():
    solver = pnode.Solver(nested_field, method="es325", step_size=0.2, compile=True)
    plain = pnode.Solver(nested_field, method="es325", step_size=0.2, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = solver(nested(*leaves()), T).ys
    expected = plain(nested(*leaves()), T).ys
    for one, two in zip(parts_of(ys), parts_of(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


STRUCTURES = {
    "a key less": (lambda t, y: {"a": y["a"]}, r"dict of \['a'\].*\['b'\].*same structure"),
    "a tuple": (lambda t, y: (y["a"], y["b"]), "tuple of .*same structure"),
    "a number": (lambda t, y: {"a": y["a"], "b": 0.0}, r"float at y\['b'\]"),
    "complex": (lambda t, y: {"a": y["a"], "b": 1j * y["b"]}, r"complex .*at y\['b'\].*real"),
    "shape": (lambda t, y: {"a": y["a"], "b": y["b"].sum()}, r"shape \(\)"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_fields_that_return_something_else(name):
    field, message = STRUCTURES[name]
    start = {"a": torch.ones(2, dtype=D), "b": torch.ones(3, dtype=D)}
    for options in ({"method": "rk4", "step_size": 0.5}, {"method": "cn", "step_size": 0.5}):
        with pytest.raises(pnode.VectorFieldError, match=message):
            pnode.Solver(field, **options)(start, T)


STATES = {
    "half complex": (torch.ones(2, dtype=torch.complex32), "complex32.*complex128"),
    "a number inside": ({"a": 1.0}, r"y0\['a'\] is a float"),
    "empty": ({}, "empty dict"),
    "not finite": ({"a": torch.tensor([math.nan])}, r"y0.* NaN"),
    "not finite, complex": (torch.tensor([complex(0.0, math.inf)]), "y0.* infinity"),
    "mixed": ({"a": torch.ones(1, dtype=D), "z": torch.ones(1, dtype=torch.complex64)}, "agree"),
}


@pytest.mark.parametrize("name", STATES)
def test_unusable_states(name):
    start, message = STATES[name]
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(lambda t, y: y, method="rk4", step_size=0.5)(start, T)


# Complex states.

MATRIX = torch.tensor([[0.1 + 1.0j, 0.4 - 0.2j], [-0.3j, -0.5 + 0.3j]], dtype=C)


def fields():
    """Return a field that is not holomorphic, and its parameter."""
    w = torch.tensor([0.3 - 0.4j, 0.2j], dtype=C, requires_grad=True)
    return lambda t, z: MATRIX @ z + w * z.conj() * torch.cos(t) + 0.1 * z.abs() * z, w


def begin():
    return torch.tensor([1.0 - 0.5j, 0.3 + 0.8j], dtype=C, requires_grad=True)


def loss_of(z):
    return (z.abs() ** 2).sum() + (z * (1.0 - 2.0j)).real.sum()


def rk4(field, z, h, steps):
    t = torch.zeros((), dtype=D)
    for _ in range(steps):
        k1 = field(t, z)
        k2 = field(t + h / 2, z + h / 2 * k1)
        k3 = field(t + h / 2, z + h / 2 * k2)
        k4 = field(t + h, z + h * k3)
        z, t = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h
    return z


def implicit_midpoint(field, z, h, steps):
    """By a fixed-point iteration that autograd goes through, to round-off."""
    t = torch.zeros((), dtype=D)
    for _ in range(steps):
        middle = z
        for _ in range(60):
            middle = z + h / 2 * field(t + h / 2, middle)
        z, t = 2 * middle - z, t + h
    return z


REPLICAS = {"rk4": (rk4, {}), "implicit_midpoint": (
    implicit_midpoint, {"petsc_options": {"snes_rtol": 1e-14, "snes_atol": 1e-14}})}  # fmt: skip


@pytest.mark.parametrize("method", REPLICAS)
def test_complex_states_against_autograd_through_a_replica(method):
    replica, options = REPLICAS[method]
    field, w = fields()
    z, other = begin(), begin()
    solution = pnode.Solver(field, params=[w], method=method, step_size=0.125, **options)(z, T[::3])
    assert solution.ys.dtype is C and solution.ys.shape == (2, 2)
    end = replica(field, other, 0.125, 8)
    torch.testing.assert_close(solution.ys[-1], end, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(loss_of(solution.ys[-1]), [z, w])
    expected = torch.autograd.grad(loss_of(end), [other, w])
    for one, two in zip(found, expected, strict=True):
        assert one.is_complex()
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", WAYS)
def test_complex_states_are_their_pairs(name):
    """The same steps, numbers and gradients as of the real state of (Re z, Im z)."""
    field, w = fields()
    z, pairs = begin(), torch.view_as_real(begin()).detach().requires_grad_()

    def real(t, y):
        return torch.view_as_real(field(t, torch.view_as_complex(y)).resolve_conj())

    ys = pnode.Solver(field, params=[w], **WAYS[name])(z, T).ys
    expected = pnode.Solver(real, params=[w], **WAYS[name])(pairs, T).ys
    torch.testing.assert_close(torch.view_as_real(ys), expected, rtol=1e-13, atol=1e-14)
    found = torch.autograd.grad(loss_of(ys), [z, w])
    other = torch.autograd.grad(loss_of(torch.view_as_complex(expected)), [pairs, w])
    torch.testing.assert_close(torch.view_as_real(found[0]), other[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[1], other[1], rtol=1e-11, atol=1e-12)


def test_rotation_has_the_order_of_the_method():
    """z' = i w z: z(1) = exp(i w) z_0, dz(1)/dw = i z(1)."""
    errors = []
    for h in (0.1, 0.05):
        w = torch.tensor(2.0, dtype=D, requires_grad=True)
        solver = pnode.Solver(lambda t, z, w: 1j * w * z, method="rk4", step_size=h)
        end = solver(torch.ones((), dtype=C), T[::3], args=w).ys[-1]
        (gradient,) = torch.autograd.grad(end.real, w)
        errors.append((abs(end.item() - complex(math.cos(2.0), math.sin(2.0))),
                       abs(gradient.item() + math.sin(2.0))))  # fmt: skip
    for coarse, fine in zip(*errors, strict=True):
        assert 3.7 < math.log2(coarse / fine) < 4.3


def test_more_of_complex_states():
    """Half the precision, a conjugate as result, an odd place in memory, second derivatives."""
    z = torch.tensor([1.0 + 1.0j], dtype=torch.complex64)
    ys = pnode.Solver(lambda t, z: z.conj(), method="rk4", step_size=0.1)(z, T.float()).ys
    assert ys.dtype is torch.complex64
    expected = torch.complex(torch.tensor(math.e), torch.tensor(math.exp(-1.0)))
    torch.testing.assert_close(ys[-1, 0], expected, rtol=1e-5, atol=0.0)

    start = {"odd": torch.ones(1, dtype=D), "z": begin()}
    solver = pnode.Solver(
        lambda t, y: {"odd": -y["odd"] * y["z"].abs().sum(), "z": y["z"] * (y["odd"] + 1j)},
        method="cn", step_size=0.25, petsc_options={"snes_rtol": 1e-13},
    )  # fmt: skip

    def ends(x, z):
        ys = solver({"odd": x, "z": z}, T[:2]).ys
        return ys["odd"][-1], ys["z"][-1].abs()

    inputs = (start["odd"].requires_grad_(), start["z"])
    assert torch.autograd.gradcheck(ends, inputs)
    assert torch.autograd.gradgradcheck(ends, inputs)
    real = torch.func.grad(lambda x: ends(x, start["z"].detach())[0].sum())(torch.ones(1, dtype=D))
    (expected,) = torch.autograd.grad(ends(*inputs)[0].sum(), inputs[0])
    torch.testing.assert_close(real, expected, rtol=1e-12, atol=0.0)


def test_tolerances_of_complex_entries():
    """A tensor of y0's shape, each for both numbers of its entry."""

    def steps(entry):
        atol = torch.full((2,), 1e-3, dtype=D)
        atol[entry] = 1e-10
        solver = pnode.Solver(
            lambda t, z: torch.tensor([-1.0 + 0.0j, -1.0 + 40.0j]) * z, rtol=1e-12, atol=atol
        )
        return solver(torch.ones(2, dtype=C), T).stats.steps

    assert steps(1) > 2 * steps(0)


def test_events_and_stages_of_complex_states():
    w = torch.tensor(2.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, z: 1j * w * z, params=[w], rtol=1e-10, atol=1e-12, event_fn=lambda t, z: z.real
    )
    solution = solver(torch.ones((), dtype=C), torch.tensor([0.0, 3.0], dtype=D))
    assert solution.event_time.item() == pytest.approx(math.pi / 4, rel=1e-9)
    (gradient,) = torch.autograd.grad(solution.event_time, w)
    assert gradient.item() == pytest.approx(-math.pi / 8, rel=1e-8)

    field, w = fields()
    z, stages = begin(), []
    solution = pnode.Solver(field, params=[w], method="rk4", step_size=0.25)(z, T)
    cotangents = torch.full_like(solution.ys, 1.0 - 0.5j).detach()
    (expected,) = torch.autograd.grad(solution.ys, w, cotangents, retain_graph=True)
    solution.stages(cotangents, stages.append)
    total = torch.zeros_like(w)
    for stage in stages:
        value = field(torch.tensor(stage.t, dtype=D), stage.state)
        total += torch.autograd.grad(value, w, stage.adjoint)[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)


def test_what_complex_states_refuse():
    z = torch.ones(2, dtype=C)
    with pytest.warns(UserWarning, match="the state is complex"):
        solver = pnode.Solver(lambda t, z: 1j * z, method="rk4", step_size=0.1, compile=True)
        end = solver(z, T).ys[-1]
    expected = torch.tensor(complex(math.cos(1.0), math.sin(1.0)), dtype=C).expand(2)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=0.0)
    with pytest.raises(pnode.VectorFieldError, match=r"real .*and the state is complex"):
        pnode.Solver(lambda t, z: z.real, method="rk4", step_size=0.1)(z, T)
    with pytest.raises(pnode.ConfigurationError, match="mass is given and y0 is complex"):
        solver = pnode.Solver(lambda t, z: z, mass=torch.ones(2, dtype=D), method="cn", step_size=1)
        solver(z, T)
    with pytest.raises(pnode.ConfigurationError, match="preconditioner is a callable"):
        solver = pnode.Solver(
            lambda t, z: z, method="cn", step_size=1, jacobian="matrix-free",
            preconditioner=lambda t, z: torch.eye(4, dtype=D),
        )  # fmt: skip
        solver(z, T)
    with pytest.raises(pnode.ConfigurationError, match=r"atol has shape .*broadcast.*2,"):
        pnode.Solver(lambda t, z: z, atol=torch.ones(3, dtype=D))(z, T)
    with pytest.raises(pnode.ConfigurationError, match=r"y0.*complex"):
        pnode.sensitivities(pnode.Solver(lambda t, z: z, method="rk4", step_size=1), z, T)
    with pytest.raises(pnode.EventError, match="complex"):
        pnode.Solver(lambda t, z: z, event_fn=lambda t, z: z)(z, T)
    with pytest.raises(pnode.VectorFieldError, match=r"cost returned torch\.complex128"):
        pnode.Solver(lambda t, z: z, cost=lambda t, z: z)(z, T)

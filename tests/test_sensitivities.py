"""Jacobians of all outputs: forward and adjoint agree, and the cheaper one is chosen."""

from __future__ import annotations

import pytest
import torch
from replica import replica
from torch.func import functional_call

import pnode
from pnode.problems.problem import collect_parameters

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)


class Kinetics(torch.nn.Module):
    """Robertson's reactions with mild rates."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.4, 3.0, 1.5], dtype=D))

    def forward(self, t, y):
        a, b, c = self.rates
        forth = a * y[..., 0] - b * y[..., 1] * y[..., 2]
        last = c * y[..., 1] ** 2
        return torch.stack([-forth, forth - last, last], dim=-1)


def start():
    return torch.tensor([1.0, 0.2, 0.1], dtype=D)


def solver_of(method, **keywords):
    return pnode.Solver(Kinetics(), method=method, step_size=0.1, **keywords)


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("rk4", 1e-13), ("dopri5", 1e-13), ("cn", 1e-9), ("es325", 1e-9), ("rodaspr", 1e-11),
     ("bdf2", 1e-8)],
)  # fmt: skip
def test_both_ways_give_the_same(method, tolerance):
    solver = solver_of(method)
    ways = [
        pnode.sensitivities(solver, start(), T, wrt=("y0", "rates"), mode=mode)
        for mode in ("forward", "adjoint")
    ]
    assert [found.mode for found in ways] == ["forward", "adjoint"]
    for name in ("y0", "rates"):
        assert ways[0][name].shape == (3, 3, 3) and not ways[0][name].requires_grad
        assert difference(ways[0][name], ways[1][name]) < tolerance
    assert torch.equal(ways[0]["y0"][0], torch.eye(3, dtype=D))
    assert not ways[0]["rates"][0].any()


class Twice(torch.nn.Module):
    """One Module in two places, and one parameter in two Modules."""

    def __init__(self):
        super().__init__()
        self.first = self.second = torch.nn.Linear(3, 3, dtype=D)
        self.third = torch.nn.Linear(3, 3, dtype=D)
        self.third.weight = self.first.weight

    def forward(self, t, y):
        return self.first(self.second(y).sin()) - self.third(y)


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_parameters_in_several_places_stay_there(mode):
    field = Twice()
    before = dict(field.named_parameters(remove_duplicate=False))
    solver = pnode.Solver(field, method="rk4", step_size=0.1)
    found = pnode.sensitivities(solver, start(), T, wrt=["first.weight", "third.bias"], mode=mode)
    after = dict(field.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor for name, tensor in before.items())
    last = solver(start(), T).ys[-1, 0]
    wanted = torch.autograd.grad(last, [field.first.weight, field.third.bias])
    torch.testing.assert_close(
        (found["first.weight"][-1, 0], found["third.bias"][-1, 0]), wanted, rtol=1e-12, atol=0.0
    )


def test_tensors_that_functional_call_leaves_behind_are_told():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = Kinetics()
            self.solver = pnode.Solver(self.field, method="rk4", step_size=0.1)

        def forward(self):
            return self.solver(start(), T).ys

    model = Model()
    lent = functional_call(model, {"field.rates": torch.ones(3, dtype=D)}, ())
    with pytest.warns(RuntimeWarning, match="'rates' of Kinetics: a tensor is in the place"):
        assert torch.equal(model(), lent)
    with pytest.warns(RuntimeWarning) as told:
        collect_parameters([model.field, torch.nn.Linear(1, 1)], None)
    assert len(told) == 1
    model.field._parameters["rates"] = torch.nn.Parameter(torch.zeros(3, dtype=D))
    assert torch.equal(model()[-1], start())


def test_they_are_those_of_a_replica():
    solver = solver_of("rk4")
    steps = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    def outputs(y0, rates):
        def field(t, y):
            return functional_call(solver.rhs, {"rates": rates}, (t, y))

        whole = replica(field, "rk4", y0, steps)
        return torch.stack([whole[i] for i in (0, 2, 5)])

    expected = torch.autograd.functional.jacobian(outputs, (start(), solver.rhs.rates.detach()))
    found = pnode.sensitivities(solver, start(), T, wrt=("y0", "rhs.rates"), mode="forward")
    assert difference(found["y0"], expected[0]) < 1e-13
    assert difference(found["rhs.rates"], expected[1]) < 1e-13


def test_the_way_with_fewer_solves_is_chosen():
    solver = solver_of("rk4")
    found = pnode.sensitivities(solver, start(), T, wrt=("rates",))
    assert (found.mode, found.tangents, found.cotangents) == ("forward", 3, 9)
    batch = start().expand(4, 3).contiguous()
    found = pnode.sensitivities(solver, batch, T[:1], wrt=("y0", "rates"))
    assert (found.mode, found.tangents, found.cotangents) == ("adjoint", 15, 12)
    assert found["y0"].shape == (1, 4, 3, 4, 3) and found["rates"].shape == (1, 4, 3, 3)


def test_forward_solves_once_for_all_tangents():
    solver, evaluations = solver_of("es325"), []
    solver.rhs.register_forward_pre_hook(lambda *_: evaluations.append(None))
    pnode.sensitivities(solver, start(), T, wrt=("rates",))
    for_three = len(evaluations)
    pnode.sensitivities(solver, start(), T, wrt=("y0", "rates"))
    assert len(evaluations) == 2 * for_three


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_tuple_states(mode):
    def field(t, y):
        return -y[0] * y[1].sum(), y[1] * y[0][0]

    solver = pnode.Solver(field, method="rk4", step_size=0.1)
    y0 = (torch.tensor([1.0, 0.5], dtype=D), torch.tensor([0.3], dtype=D))
    blocks = pnode.sensitivities(solver, y0, T, mode=mode)["y0"]
    assert [[block.shape for block in row] for row in blocks] == [
        [(3, 2, 2), (3, 2, 1)], [(3, 1, 2), (3, 1, 1)],
    ]  # fmt: skip

    def joined(y):
        return torch.cat(field(None, (y[:2], y[2:])))

    whole = pnode.sensitivities(
        pnode.Solver(lambda t, y: joined(y), method="rk4", step_size=0.1), torch.cat(y0), T
    )["y0"]
    found = torch.cat([torch.cat(row, dim=2) for row in blocks], dim=1)
    assert difference(found, whole) < 1e-13


class Algebraic(torch.nn.Module):
    """A differential equation and an algebraic one."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.7, 1.3], dtype=D))

    def forward(self, t, y):
        a, b = self.rates
        return torch.stack([-a * y[0] - 0.1 * y[1], b * y[0] ** 2 - y[1]])


class Implicit(Algebraic):
    def forward(self, t, y, rate):
        return torch.stack([rate[0], torch.zeros_like(rate[1])]) - super().forward(t, y)


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize(
    ("method", "form"),
    [("beuler", "mass"), ("radau5", "mass"), ("ra34pw2", "mass"), ("bdf2", "residual")],
)
def test_algebraic_equations(method, form, consistent):
    """By parameters of equations that y0 is checked with, or moved to, before the solve."""
    problem = {"residual": Implicit()}
    if form == "mass":
        problem = {"rhs": Algebraic(), "mass": torch.tensor([1.0, 0.0], dtype=D)}
    solver = pnode.Solver(
        **problem, method=method, step_size=0.1, consistent_start=consistent,
        petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14},
    )  # fmt: skip
    y0 = torch.tensor([1.0, 1.0 if consistent else 1.3], dtype=D, requires_grad=True)
    (rates,) = solver.parameters()
    ys = solver(y0, T).ys
    expected = [
        torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in ys.reshape(-1)])
        for x in (y0, rates)
    ]
    assert bool(expected[1].view(3, 2, 2)[0].any()) == consistent
    for mode in ("forward", "adjoint"):
        found = pnode.sensitivities(solver, y0, T, wrt=("y0", "rates"), mode=mode)
        for name, one in zip(("y0", "rates"), expected, strict=True):
            assert difference(found[name].reshape(one.shape), one) < 1e-9


def test_gradients_around_it_are_left_alone():
    solver = solver_of("rk4")
    found = pnode.sensitivities(solver, start().requires_grad_(), T, wrt=("y0", "rates"))
    assert not any(one.requires_grad for one in found.values())
    assert solver.rhs.rates.grad is None and solver.rhs.rates.requires_grad


def test_a_covariance_by_gauss_newton():
    """The linearized covariance of estimated rates covers what noise does to their estimate."""
    solver = solver_of("es325")
    noise, t = 1e-4, torch.linspace(0.0, 2.0, 21, dtype=D)
    J = pnode.sensitivities(solver, start(), t, wrt=("rates",))["rates"].reshape(-1, 3)
    covariance = noise**2 * torch.linalg.inv(J.T @ J)
    torch.manual_seed(0)
    with torch.no_grad():
        clean = solver(start(), t).ys
    estimates = []
    for _ in range(400):  # one Gauss-Newton step from the truth, enough for small noise
        residual = (noise * torch.randn_like(clean)).reshape(-1)
        estimates.append(torch.linalg.lstsq(J, residual[:, None]).solution[:, 0])
    spread = torch.stack(estimates).var(dim=0)
    # The variance of 400 samples has a relative standard deviation of sqrt(2 / 399) = 0.07.
    assert ((spread / covariance.diagonal() - 1.0).abs() < 4 * 0.0708).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"wrt": 3}, "wrt=3: give a sequence of names"),
        ({"wrt": ("weight",)}, r"wrt names 'weight', which is no parameter.*'rhs.rates'"),
        ({"wrt": "y0"}, r"wrt='y0': give a sequence of names"),
        ({"wrt": ()}, r"wrt=\(\): give a sequence"),
        ({"wrt": ("y0", "y0")}, "names something twice"),
        ({"wrt": ("rates", "rhs.rates")}, "names something twice"),
        ({"wrt": (1,)}, r"wrt=\(1,\): give a sequence"),
        ({"mode": "reverse"}, "mode='reverse' is unknown: choose one of 'auto'"),
    ],
)
def test_what_is_refused(keywords, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.sensitivities(solver_of("rk4"), start(), T, **keywords)


def test_wrong_objects_are_refused():
    with pytest.raises(pnode.ConfigurationError, match="solver is a Kinetics"):
        pnode.sensitivities(Kinetics(), start(), T)
    with pytest.raises(pnode.ConfigurationError, match="y0 is a float"):
        pnode.sensitivities(solver_of("rk4"), 1.0, T)
    event = solver_of("rk4", event_fn=lambda t, y: y[0] - 0.9)
    with pytest.raises(pnode.ConfigurationError, match=r"event.s time"):
        pnode.sensitivities(event, start(), T)
    closure = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    with pytest.raises(pnode.ConfigurationError, match="there is none; f has to be a"):
        pnode.sensitivities(closure, start(), T, wrt=("rates",))

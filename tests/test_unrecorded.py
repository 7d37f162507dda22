"""Values that torch does not record, of f, of its parts and of cost: no derivative is lost."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import grad

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.2], dtype=D)


def field(t, y):
    return -y.sin()


def recorded(t, y):
    return y.square().sum(-1)


def by_numpy(t, y):
    return torch.from_numpy(np.square(y.detach().numpy()).sum(-1))


def detached(t, y):
    return y.detach().square().sum(-1)


def state():
    return torch.tensor([[0.6, -0.4]], dtype=D, requires_grad=True)


def slope(start, cost=None, **options):
    """Return the gradient of an integral, or of the last state."""
    options = {"step_size": 0.1, "compile": False, **options}
    solution = pnode.Solver(cost=cost, **options)(start, T)
    ys = solution.ys[0] if isinstance(start, tuple) else solution.ys
    return grad((ys if cost is None else solution.costs)[-1].sum(), start)


PATHS = {
    "explicit": {"method": "rk4"},
    "rosenbrock": {"method": "ra34pw2"},
    "coupled": {"method": "radau3"},
    "stages": {"method": "cn"},
    "dense": {"method": "cn", "dense": True},
    "event": {"method": "rk4", "event_fn": lambda t, y: y[0, 0] - 9.0},
    "rows": {"method": "rk4", "samples": "independent"},
    "implicit rows": {"method": "cn", "samples": "independent"},
    "budget": {"method": "cn", "checkpointing": "2kB"},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_cost_or_a_field_without_a_graph_is_refused(path):
    """Not because of the other's graph does one pass without."""
    options = PATHS[path]
    with pytest.raises(pnode.VectorFieldError, match="the value of cost depends on y") as caught:
        slope(state(), by_numpy, rhs=field, **options)
    assert caught.value.time == 0.0
    for cost in (None, recorded):
        with pytest.raises(pnode.VectorFieldError, match="value of the vector field depends"):
            slope(state(), cost, rhs=lambda t, y: field(t, y).detach(), **options)
    with torch.no_grad():
        pnode.Solver(field, cost=by_numpy, step_size=0.1, compile=False, **options)(state(), T)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_tangents_of_costs_without_a_graph_are_refused(method):
    solver = pnode.Solver(field, cost=detached, method=method, step_size=0.1, compile=False)
    y0 = state().detach()
    with pytest.raises(pnode.VectorFieldError, match="the value of cost depends on y"):
        torch.func.jvp(lambda y: solver(y, T).costs, (y0,), (y0,))
    with pytest.raises(pnode.VectorFieldError, match="the value of cost depends on y"):
        torch.func.grad(lambda y: solver(y, T).costs.sum())(y0)


FORMS = {
    "beuler": lambda f: {"residual": lambda t, y, rate: rate - f(y)},
    "ars443": lambda f: {"implicit": lambda t, y: -y, "explicit": lambda t, y: f(y)},
    "ark3": lambda f: {"explicit": lambda t, y: -y, "implicit": lambda t, y: f(y)},
}


@pytest.mark.parametrize("method", FORMS)
def test_parts_and_residuals_without_a_graph_are_refused(method):
    """A residual's graph over y' hides neither that over y nor that of cost."""
    form = FORMS[method]
    with pytest.raises(pnode.VectorFieldError, match="the value of cost depends on y"):
        slope(state(), by_numpy, method=method, **form(torch.cos))
    for cost in (None, recorded):
        with pytest.raises(pnode.VectorFieldError, match="value of the vector field depends"):
            slope(state(), cost, method=method, **form(lambda y: y.detach().cos()))
    assert slope(state(), recorded, method=method, **form(torch.cos))[0].all()


@pytest.mark.parametrize("method", ["rk4", "ruth3", "cn"])
def test_a_part_of_a_tuple_without_a_graph_is_refused(method):
    start = (state(), state())
    with pytest.raises(pnode.VectorFieldError, match=r"\(part 1\) depends on y"):
        slope(start, rhs=lambda t, y: (y[1], -y[0].detach()), method=method)
    with pytest.raises(pnode.VectorFieldError, match="the value of cost depends on y"):
        slope(start, lambda t, y: y[0].detach(), rhs=lambda t, y: (y[1], -y[0]), method=method)


@pytest.mark.parametrize("method", ["rk4", "cn", "beuler"])
def test_a_graph_of_parameters_hides_no_missing_one_of_y(method):
    """Of the whole value, of a part of a tuple, of cost, and of a residual."""
    k = torch.tensor(0.7, dtype=D, requires_grad=True)
    field = lambda t, y: k * torch.tensor(y.detach().tolist(), dtype=D)  # noqa: E731
    forms = [{"rhs": field}, {"rhs": lambda t, y: -k * y, "cost": field}]
    if method == "beuler":
        forms.append({"residual": lambda t, y, rate: rate - field(t, y)})
    for form in forms:
        with pytest.raises(pnode.VectorFieldError, match="depends on y"):
            slope(state(), method=method, params=[k], **form)
    with pytest.raises(pnode.VectorFieldError, match=r"\(part 1\) depends on y"):
        parts = lambda t, y: (y[1], field(t, y[0]))  # noqa: E731
        slope((state(), state()), rhs=parts, method=method, params=[k])
    (found,) = slope(state(), rhs=lambda t, y: (k * t).expand(1, 2), method=method, params=[k])
    assert found.eq(1.0).all()


NUMBERS = {"item": lambda x: x.item(), "float": float, "tolist": lambda x: x.tolist()}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_made_of_tensors_are_told_of(number):
    """Beside what is recorded, of y and of parameters; not where .detach() says it is meant."""
    take, k = NUMBERS[number], torch.tensor(0.7, dtype=D, requires_grad=True)
    forms = {
        "rk4": [{"rhs": lambda t, y: -y * take(y[0, 1])}, {"rhs": lambda t, y: -k * y * take(k)}],
        "beuler": [{"residual": lambda t, y, rate: rate + k * y * take(y[0, 1])}],
        "ark3": [{"implicit": lambda t, y: -y, "explicit": lambda t, y: -y * take(y[0, 1])}],
        "cn": [{"rhs": lambda t, y: -y, "cost": lambda t, y: y * take(y[0, 1])}],
    }
    for method, every in forms.items():
        for form in every:
            with pytest.warns(RuntimeWarning, match=rf"{number}.* shape \(\) that requires grad"):
                slope(state(), method=method, params=[k], **form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = lambda t, y: -k * y * take(y[0, 1].detach()) * (1 if y[0, 0] > 0.0 else 2)  # noqa: E731
        slope(state(), rhs=quiet, method="cn", params=[k])


@pytest.mark.parametrize("path", PATHS)
def test_costs_that_depend_on_no_state_pass(path):
    """Constants, those of the time alone, and those that jump where y is."""
    for cost in (
        lambda t, y: torch.ones(1, dtype=D),
        lambda t, y: t.reshape(-1)[:1] ** 2,
        lambda t, y: (y[:, 0] > 0.6).to(D),
    ):
        (found,) = slope(state(), cost, rhs=field, **PATHS[path])
        assert not found.any()


NAMED = {
    "random numbers": (lambda t, y: torch.rand((), dtype=D) * y.sum(), "draws random numbers"),
    "in place": (lambda t, y: y.mul_(2.0).sum(), "wrote into its input"),
    "sparse": (lambda t, y: y.to_sparse(), "layout torch.sparse_coo"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_refusals_name_cost(method, kind):
    cost, text = NAMED[kind]
    with pytest.raises(pnode.VectorFieldError, match=f"cost .*{text}"):
        slope(state(), cost, rhs=field, method=method)


def test_an_undeclared_tensor_of_cost_is_named():
    undeclared = torch.ones((), dtype=D, requires_grad=True)
    for method in ("rk4", "cn"):
        with pytest.raises(pnode.ConfigurationError, match="cost uses a tensor"):
            slope(state(), lambda t, y: undeclared * y, rhs=field, method=method)
    for method in ("ruth3", "symplectic_euler"):  # which do not begin with a call of cost
        with pytest.raises(pnode.ConfigurationError, match="cost uses a tensor"):
            slope(
                (state(), state()), lambda t, y: undeclared * y[0], method=method,
                rhs=lambda t, y: (y[1], -y[0]),
            )  # fmt: skip


def test_of_the_time_alone():
    """The trapezoidal rule is exact for t: half of the square of the last time."""
    t = T.clone().requires_grad_()
    costs = pnode.Solver(field, cost=lambda t, y: t, method="cn", step_size=0.1, compile=False)(
        state(), t
    ).costs
    (found,) = grad(costs[-1], t)
    assert math.isclose(float(found[-1]), 0.2, rel_tol=1e-13)
    assert math.isclose(float(found[0]), 0.0, abs_tol=1e-15)

"""Arguments that are no use are refused where they are given, by name, value and remedy."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from petsc4py import PETSc

import pnode
from pnode.base.ledger import Ledger
from pnode.field.vectorfield import vector_field
from pnode.problems.compared import shared
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.trace import Untraceable, trace_field

D = torch.float64
Y0 = torch.tensor([1.0], dtype=D)
NAN = float("nan")


def decay(t, y):
    return -y


GRAD = torch.tensor(1e-3, requires_grad=True)
REFUSED = {
    "consistent_start": ["no", 1, None],
    "progress": ["no", 0, None],
    "dense": ["yes", 1, np.True_],
    "compile": ["yes", 1, None],
    "rtol": [GRAD, True, "1e-3", None, [1e-3, GRAD]],
    "atol": [GRAD, False, b"1", 1j],
    "step_size": [GRAD, True, "0.1", -0.1, NAN, torch.tensor(True), torch.ones(2)],
    "first_step": [GRAD, True, 0.0, math.inf],
    "min_step": [GRAD, True, -1.0],
    "max_step": [GRAD, np.True_, 0.0],
    "max_steps": [GRAD, True, 1.5, 0, "many"],
    "event_tol": [GRAD, True, 0.0, 1.0, None],
    "method": [None, 5, ["rk4"]],
    "controller": [None, 5, ["pi"], pnode.PID],
    "norm": [None, 5, "rmse", ["max"], torch.ones(2)],
    "jacobian": [None, 5, ["dense"], np.zeros(2)],
    "jacobian_reuse": [None, 5, ["step"], np.zeros(2)],
    "linear_solver": [5, ["gmres"], "nothing"],
    "device_state": [None, 5, ["host"], np.zeros(2)],
    "petsc_options": ["ksp_type", 5, {5: 6}],
    "petsc_setup": [5, "setup"],
    "params": [torch.ones(1), 5, [1.0]],
    "checkpointing": [True, 0, -5, "lots", [1]],
    "monitor": [5, "print"],
    "event_fn": [5, True],
    "comm": [5, "world"],
    "layout": [5, (3, 4)],
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_every_argument_of_a_solver_is_checked(name):
    implicit = name in ("jacobian", "jacobian_reuse", "linear_solver")
    for value in REFUSED[name]:
        keywords = {"method": "cn"} if implicit else {}
        with pytest.raises(pnode.ConfigurationError, match=name):
            pnode.Solver(decay, **keywords | {name: value})


@pytest.mark.parametrize(
    "keywords", [{"reproducible": "no"}, {"reproducible": 1}, {"store": ["tape"]}, {"store": None}]
)
def test_checkpointing_is_checked(keywords):
    with pytest.raises(pnode.ConfigurationError, match=next(iter(keywords))):
        pnode.Checkpointing(**keywords)


def test_a_time_that_wants_a_gradient_is_not_dropped_from_a_list():
    end = torch.tensor(1.0, dtype=D, requires_grad=True)
    for t in ([0.0, end], (torch.tensor(0.0), end)):
        with pytest.raises(pnode.ConfigurationError, match=r"t\[1\] requires grad.*torch\.stack"):
            pnode.odeint(decay, Y0, t)
    t = torch.stack([torch.zeros((), dtype=D), end])
    pnode.odeint(decay, Y0, t)[-1].backward()
    assert end.grad.item() == pytest.approx(-math.exp(-1.0), rel=1e-6)


_NO_TIMES = {
    "a word": "give", "True": "real numbers", "complex": "real numbers", "list": r"requires grad",
    "meta": "give values", "sparse": "give values",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_NO_TIMES))
@pytest.mark.parametrize("rows", [False, True])
def test_what_are_no_times_is_refused_wherever_times_are_given(kind, rows):
    given = {
        "a word": "a", "True": [0.0, True], "complex": torch.tensor([0.0, 1.0 + 0.0j]),
        "list": [0.0, torch.tensor(1.0, requires_grad=True)],
        "meta": torch.zeros(2, device="meta"), "sparse": torch.tensor([0.0, 1.0]).to_sparse(),
    }[kind]  # fmt: skip
    y0 = torch.ones(3, 2, dtype=D)
    options = {"samples": "independent"} if rows else {}
    solution = pnode.Solver(decay, dense=True, **options)(y0, [0.0, 1.0])
    calls = [lambda: pnode.Solver(decay, **options)(y0, given), lambda: solution(given),
             lambda: solution.derivative(given)]  # fmt: skip
    if not rows:
        values = torch.ones(2, dtype=D)
        calls += [lambda: pnode.Solver(decay, grid=given),
                  lambda: pnode.odeint(decay, y0, [0.0, 2.0], breakpoints=given),
                  lambda: pnode.odeint(decay, y0, [0.0, 2.0], options={"jump_t": given}),
                  ]  # fmt: skip
        for control in (pnode.controls.hold, pnode.controls.linear, pnode.controls.cubic):
            calls.append(lambda control=control: control(given, values))
            if kind != "list":
                calls.append(lambda control=control: control([0.0, 1.0], values)(given))
    for call in calls:
        with pytest.raises(pnode.ConfigurationError, match=_NO_TIMES[kind]):
            call()


def test_odeint_event_takes_a_direction():
    with pytest.raises(pnode.ConfigurationError, match="reverse_time='no'"):
        pnode.odeint_event(decay, Y0, 0.0, event_fn=lambda t, y: y - 0.5, reverse_time="no")


# PETSc's objects and options.


@pytest.mark.parametrize("name", ["preconditioner", "jacobian_pattern"])
@pytest.mark.parametrize("kind", [PETSc.Mat, PETSc.PC, PETSc.Vec])
def test_petsc_objects_are_no_matrices(name, kind):
    jacobian = {"preconditioner": "matrix-free", "jacobian_pattern": "sparse"}[name]
    with pytest.raises(pnode.ConfigurationError, match=rf"{name} is a PETSc {kind.__name__}: give"):
        pnode.Solver(decay, method="cn", step_size=0.1, jacobian=jacobian, **{name: kind()})


def test_a_petsc_matrix_returned_by_a_preconditioner():
    solver = pnode.Solver(
        decay, method="cn", step_size=0.1, jacobian="matrix-free",
        preconditioner=lambda t, y: PETSc.Mat(),
    )  # fmt: skip
    with pytest.raises(pnode.ConfigurationError, match=r"preconditioner\(t, y\) is a Mat"):
        solver(Y0, [0.0, 1.0])


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"ksp_type": "nonsense"}, "Unable to find requested KSP type nonsense"),
        ({"pc_type": "nonsense"}, "Unable to find requested PC type nonsense"),
        ({"snes_rtol": "tight"}, "Input string tight has no numeric value"),
    ],
)
def test_a_refused_option_tells_the_reason_first(options, reason):
    solver = pnode.Solver(decay, method="cn", step_size=0.1, petsc_options=options)
    with pytest.raises(pnode.ConfigurationError) as caught:
        solver(Y0, [0.0, 1.0])
    text = str(caught.value)
    assert 0 < text.index(reason) < text.index("; of {")
    assert "() at" not in text


@pytest.mark.parametrize("pc", ["lu", "cholesky", "ilu"])
def test_no_factors_of_a_matrix_that_is_not_there(pc):
    solver = pnode.Solver(
        decay, method="cn", step_size=0.1, jacobian="auto", petsc_options={"pc_type": pc}
    )
    many = torch.ones(300, dtype=D)  # "auto" is matrix-free
    with pytest.raises(pnode.ConfigurationError, match="needs a matrix to factor"):
        solver(many, [0.0, 1.0])
    if pc == "lu":  # and of a smaller one there are
        assert solver(Y0, [0.0, 1.0]).ys[-1].item() == pytest.approx(math.exp(-1.0), rel=1e-2)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_fused_attention_draws_nothing_without_dropout(p):
    weight = torch.randn(8, 24, dtype=D, generator=torch.Generator().manual_seed(0))

    def f(t, y):
        q, k, v = (y @ weight).view(1, 5, 3, 8).permute(2, 0, 1, 3)
        attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return attention.tanh()[0] - t * y

    y0 = torch.randn(5, 8, dtype=D, generator=torch.Generator().manual_seed(1))
    problem = InitialValueProblem.create(f, y0, torch.tensor([0.0, 1.0]))
    if p:
        with pytest.raises(Untraceable, match="draws random numbers"):
            trace_field(vector_field(problem, Ledger()))
        return
    graph = trace_field(vector_field(problem, Ledger()))
    time = torch.tensor(0.3, dtype=D)
    value, *saved = graph.value(time, y0, *graph.inputs())
    assert torch.allclose(value, f(time, y0), rtol=0.0, atol=1e-14)
    w, leaf = torch.ones_like(y0), y0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(time, leaf), leaf, w)
    product, *_ = graph.product(w, time, y0, *graph.inputs(), *saved)
    assert torch.allclose(product, expected, rtol=0.0, atol=1e-13)


# What is not finite is told as that.


@pytest.mark.parametrize("method", ["rodaspr", "ra34pw2", "es325", "bdf", "dopri5"])
@pytest.mark.parametrize("broken", [lambda t, y: y * NAN, lambda t, y: (y - 1.0).log()])
def test_nan_at_the_start_is_the_fields(method, broken):
    solver = pnode.Solver(broken, method=method)
    for y0 in (Y0, Y0.clone().requires_grad_()):
        with pytest.raises(pnode.NonFiniteVectorField, match="returned NaN or infinity") as caught:
            solver(y0, [0.0, 1.0])
        assert caught.value.time == 0.0


@pytest.mark.parametrize("method", ["velocity_verlet", "forest_ruth"])
def test_nan_in_a_force_is_no_coupling(method):
    """In q's share of a product with NaN times 0 there is NaN, which tells nothing."""
    scale = torch.ones(1, dtype=D, requires_grad=True)

    def solver(force):
        field = lambda t, y: (y[1] * scale, force(y[0]))  # noqa: E731
        return pnode.Solver(field, method=method, step_size=0.1, params=[scale])

    start, t = (Y0, torch.zeros(1, dtype=D)), [0.0, 1.0]
    with pytest.raises(pnode.NonFiniteVectorField, match="returned NaN or infinity"):
        solver(lambda q: -q * NAN)(start, t)
    # |q| is differentiable but where the solution starts.
    resting = (torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    y = solver(lambda q: -q.square().sqrt())(resting, t).ys[0]
    assert y[-1].item() == pytest.approx(math.sin(1.0), rel=1e-2)
    # What does depend on itself is still found, at the first point where it can be told.
    coupled = lambda t, y: (y[1] * scale + y[0].square().sqrt(), -y[0])  # noqa: E731
    with pytest.raises(pnode.ConfigurationError, match="dq/dt depends on q"):
        pnode.Solver(coupled, method=method, step_size=0.1, params=[scale])(resting, t)


# Rosenbrock methods need df/dt.

HIDDEN = {
    "float": lambda t, y: -y + math.cos(float(t)),
    "item": lambda t, y: -y + math.sin(t.item()),
    "detach": lambda t, y: -y + torch.cos(t.detach()),
    "numpy": lambda t, y: -y + float(np.interp(t.detach().numpy(), [0.0, 1.0], [0.0, 2.0])),
}
OPEN = {
    "cos": lambda t, y: -1e6 * (y - torch.cos(t)),
    "autonomous": lambda t, y: -y,
    "constant": lambda t, y: torch.ones_like(y),
    "switched": lambda t, y: -y + torch.where(t > 0.4, 1.0, 0.0),
    "sampled": lambda t, y: -y + (0.0, 1.0)[int(t.detach() > 0.4)],
}


def warned(f, times, dtype=D, **keywords):
    """The number of our warnings and of evaluations, beside those in the ledger, of two solves."""
    calls = []

    def field(t, y):
        calls.append(float(t.detach()))
        return f(t, y)

    solver = pnode.Solver(field, method="rodaspr", rtol=1e-3, atol=1e-3, **keywords)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counted = sum(solver(Y0.to(dtype), times).stats.rhs for _ in range(2))
    return sum("needs df/dt" in str(each.message) for each in caught), len(calls) - counted


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("case", list(HIDDEN))
def test_a_hidden_time_is_told_once(case, dtype):
    for times in ([0.0, 1.0], [1.0, 0.0], [100.0, 101.0]):
        if case == "numpy" and times[0] == 100.0:
            continue  # constant there
        assert warned(HIDDEN[case], times, dtype) == (1, 1)


@pytest.mark.parametrize("case", list(OPEN))
def test_no_warning_of_other_fields(case):
    warnings_, more = warned(OPEN[case], [0.0, 1.0])
    assert warnings_ == 0
    if case != "constant":  # of which there is no graph
        assert more == (0 if case == "cos" else 1)


def test_a_field_that_ends_where_the_solve_does():
    """The evaluation ahead is nobody's business if it fails."""

    def field(t, y):
        if t.detach() > 0.5e-4:
            raise LookupError("no data")
        return -y

    solver = pnode.Solver(field, method="rodaspr", rtol=1e-3, max_steps=3, first_step=1e-9)
    with pytest.raises((LookupError, pnode.StepLimitReached)):
        solver(Y0, [0.0, 1.0])


# Groups of options.

GROUPED = {
    "steps": (pnode.Steps, {
        "step_size": 0.1, "first_step": 0.1, "min_step": 1e-3, "max_step": 0.2, "rtol": 1e-4,
        "atol": 1e-5, "controller": "pi", "max_steps": 70, "sensitivity_control": "random",
        "samples": "independent", "on_failure": "nan", "norm": "max", "grid": (0.0, 1.0),
    }),
    "linear_algebra": (pnode.LinearAlgebra, {
        "jacobian": "sparse", "linear_solver": "gmres", "jacobian_pattern": torch.eye(2),
        "jacobian_reuse": "step", "preconditioner": "block",
    }),
    "output": (pnode.Output, {
        "dense": True, "event_fn": lambda t, y: y, "event_tol": 1e-9, "monitor": print,
        "progress": True,
    }),
}  # fmt: skip
OPTIONS = [(group, name) for group, (_, options) in GROUPED.items() for name in options]


@pytest.mark.parametrize("group", GROUPED)
def test_groups_are_complete(group):
    kind, options = GROUPED[group]
    assert [each.name for each in dataclasses.fields(kind)] == list(options)


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_an_option_given_twice_is_refused(group, name):
    """Whatever its value, that of the default too."""
    kind, options = GROUPED[group]
    (default,) = (each.default for each in dataclasses.fields(kind) if each.name == name)
    for value in (options[name], default):
        with pytest.raises(pnode.ConfigurationError) as caught:
            pnode.Solver(decay, method="cn", **{group: kind(), name: value})
        assert f"{name}={value!r} and {group}=" in str(caught.value)
        assert f"pnode.{kind.__name__}({name}=" in str(caught.value)


@pytest.mark.parametrize("name", [name for _, name in OPTIONS])
def test_groups_check_their_options(name):
    (kind,) = (kind for kind, options in GROUPED.values() if name in options)
    for value in REFUSED.get(name, []):
        with pytest.raises(pnode.ConfigurationError, match=name):
            kind(**{name: value})


@pytest.mark.parametrize("group", GROUPED)
def test_something_else_for_a_group(group):
    kind, _ = GROUPED[group]
    other = pnode.Output() if group == "steps" else pnode.Steps()
    for value in ({}, 0.1, kind, other):
        with pytest.raises(pnode.ConfigurationError, match=rf"{group}=.*pnode\.{kind.__name__}\("):
            pnode.Solver(decay, **{group: value})


def test_groups_do_what_plain_keywords_do():
    seen = []
    plain = {
        "rtol": 1e-4, "max_step": 0.2, "controller": "pi", "jacobian": "matrix-free",
        "preconditioner": "dense", "jacobian_reuse": "step", "event_fn": lambda t, y: y - 0.5,
        "monitor": lambda step, t, y: seen.append(t),
    }  # fmt: skip
    own = {
        group: kind(**{name: plain[name] for name in options if name in plain})
        for group, (kind, options) in GROUPED.items()
    }
    found = []
    for keywords in (plain, own, {**own, "steps": None, "rtol": 1e-4, "max_step": 0.2,
                                  "controller": "pi"}):  # fmt: skip
        y0 = Y0.clone().requires_grad_()
        solution = pnode.Solver(decay, method="es325", **keywords)(y0, [0.0, 1.0])
        solution.event_time.backward()
        found.append((solution.ys.tolist(), y0.grad.item(), solution.stats, seen.copy()))
        seen.clear()
    assert found[0] == found[1] == found[2]
    assert found[0][3]


def test_options_are_frozen():
    for kind, options in GROUPED.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), next(iter(options)), None)


def test_the_nearest_keyword_is_named():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'rtoll'.*'rtol'"):
        pnode.Solver(decay, rtoll=1e-3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'methods'.*'method'"):
        pnode.Solver(decay, methods="rk4")


@pytest.mark.parametrize(("name", "near"), [
    ("dorpi5", "did you mean 'dopri5'"), ("Tsit5", "did you mean 'tsit5'"),
    ("CN", "did you mean 'cn'"), ("RK45", "nearest here is method='dopri5'"),
    ("LSODA", "nearest here is method='bdf'"),
])  # fmt: skip
def test_the_nearest_method_is_named(name, near):
    with pytest.raises(pnode.ConfigurationError, match=near):
        pnode.Solver(decay, method=name)


def test_odeint_has_tolerances_of_its_own():
    with pytest.raises(pnode.ConfigurationError, match=r"steps=.*odeint.*pnode\.Solver"):
        pnode.odeint(decay, Y0, [0.0, 1.0], steps=pnode.Steps())
    event = pnode.Output(event_fn=lambda t, y: y - 0.5)
    time, ys = pnode.odeint(decay, Y0, [0.0, 1.0], output=event)
    assert time.item() == pytest.approx(math.log(2.0), rel=1e-6)
    assert len(ys) == 2


def test_what_ranks_compare_of_options():
    """Each option of each group, but for those that are a rank's own."""
    kinds = [kind(**options) for kind, options in GROUPED.values()
             if kind is not pnode.Steps] + [pnode.Steps()]  # fmt: skip
    facts = shared(*kinds)
    assert set(facts) == {name for _, name in OPTIONS}
    assert [name for name, fact in facts.items() if fact is None] == [
        "monitor", "progress", "step_size", "first_step", "min_step", "max_step", "max_steps",
        "grid",
    ]  # fmt: skip
    assert facts["preconditioner"] == "block" and facts["jacobian_pattern"] is True
    entrywise = shared(pnode.Steps(rtol=torch.ones(3)))
    assert entrywise["rtol"] == "entrywise" and entrywise["atol"] == 1e-8

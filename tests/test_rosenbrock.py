"""Rosenbrock-W methods: coefficients, exactness of step and gradient, counts and failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from replica import replica, rosw_step
from representatives import representatives
from test_gradients import Field, gradients, initial, relative_difference, weights_like

import pnode
from pnode import ConfigurationError, LinearSolveFailed, NonFiniteVectorField
from pnode.base.ledger import Ledger
from pnode.base.options import PETSc
from pnode.base.vectors import copy_out
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.methods import METHODS, find_method
from pnode.solvers.petsc.library import set_recompute_jacobian, set_subtype
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK

ROSW = [method for method in METHODS if method.ts_type == "rosw"]
NAMES = [method.name for method in ROSW]
# Whose order needs g_t, and which have stages with different matrices.
CLASSICAL = [m.name for m in ROSW if ROSENBROCK[m.subtype].needs_time_slope]
SEVERAL = [m.name for m in ROSW if not ROSENBROCK[m.subtype].one_matrix]
T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def forced(t, y):
    """Non-autonomous, nonlinear."""
    u, v, w = y
    return torch.stack([v * w + torch.cos(t), 0.3 * v * v - u * w * t, torch.sin(u) - w])


def petsc_step(method, f, y, t, h, jacobian=None):
    """One step by petsc4py alone: no callback of pnode's, PETSc's treatment of J and time.

    Returns
    -------
    end : ndarray
        State after the step.
    stages : list of (time, state, u_dot)
        Where PETSc evaluated the residual.
    shifts : list of float
        Shifts of the Jacobians.
    """
    size, stages, shifts = y.numel(), [], []
    vector = PETSc.Vec().createSeq(size, comm=PETSc.COMM_SELF)
    vector.setArray(y.numpy())
    matrix = PETSc.Mat().createDense((size, size), comm=PETSc.COMM_SELF)
    matrix.setUp()

    def residual(ts, s, u, u_dot, out):
        stages.append((s, u.array_r.copy(), u_dot.array_r.copy()))
        out.array_w[...] = (
            u_dot.array_r - f(torch.tensor(s, dtype=torch.float64), copy_out(u)).numpy()
        )

    def shifted_jacobian(ts, s, u, u_dot, shift, a, p):
        shifts.append(shift)
        J = jacobian
        if J is None:
            J = torch.func.jacrev(lambda x: f(torch.tensor(s, dtype=torch.float64), x))(copy_out(u))
        p.getDenseArray()[...] = shift * np.eye(size) - J.numpy()
        p.assemble()

    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType("rosw")
    set_subtype(ts, "rosw", method.subtype, method.stages)
    set_recompute_jacobian(ts, method.name in SEVERAL)
    ts.setEquationType(PETSc.TS.EquationType.ODE_EXPLICIT)
    ts.setIFunction(residual, vector.duplicate())
    ts.setIJacobian(shifted_jacobian, matrix, matrix)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.setMaxTime(1e9)
    ts.setTime(t)
    ts.setTimeStep(h)
    ts.getSNES().getKSP().setType("preonly")
    ts.getSNES().getKSP().getPC().setType("lu")
    ts.setTolerances(rtol=1e9, atol=1e9)  # accept whatever comes
    ts.setSolution(vector)
    ts.setUp()
    ts.step()
    end = vector.array_r.copy()
    ts.destroy()
    return end, stages, shifts


# ------------------------------------------------------------------------------------- coefficients


def test_every_type_of_petsc_is_in_the_table():
    assert {method.subtype for method in ROSW} == set(ROSENBROCK)
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType("rosw")
    with pytest.raises(PETSc.Error):
        set_subtype(ts, "rosw", "no such type", 1)
    for method in ROSW:
        set_subtype(ts, "rosw", method.subtype, method.stages)
        tableau = ROSENBROCK[method.subtype]
        assert tableau.stages == method.stages
        # The others' error estimate is missing, or zero on linear problems: test_combinations.py.
        blind = method.subtype in ("theta1", "theta2", "ra3pw", "lassp3p4s2c")
        assert method.adaptive == (not blind)
    ts.destroy()


@pytest.mark.parametrize("method", ROSW, ids=NAMES)
def test_order_conditions(method):
    """Hairer & Wanner II, table IV.7.1, with beta = A + Gamma, up to order 3; order 4 in part."""
    tableau, s = ROSENBROCK[method.subtype], method.stages
    A, Gamma = np.array(tableau.A), np.array(tableau.Gamma)
    assert A.shape == Gamma.shape == (s, s)
    b, beta, alpha = np.array(tableau.b), A + Gamma, A.sum(axis=1)
    sums = beta.sum(axis=1)
    conditions = [
        (1, b.sum(), 1.0),
        (2, b @ sums, 1 / 2),
        (3, b @ alpha**2, 1 / 3),
        (3, b @ beta @ sums, 1 / 6),
        (4, b @ alpha**3, 1 / 4),
        (4, b @ (alpha * (A @ sums)), 1 / 8),
        (4, b @ beta @ alpha**2, 1 / 12),
        (4, b @ beta @ beta @ sums, 1 / 24),
    ]
    for order, value, expected in conditions:
        if order <= method.order:
            # The coefficients have 16 digits and are as large as 20 in rodaspr.
            assert value == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("method", ROSW, ids=NAMES)
def test_step_from_the_coefficients_is_petscs(method):
    """On a nonlinear non-autonomous problem, with PETSc's treatment of J and of time.

    PETSc leaves g_t out, and gives stages with matrices of their own Jacobians of their own.
    """
    y = torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64)
    end, _, _ = petsc_step(method, forced, y, 0.4, 0.2)
    ours = rosw_step(
        forced, ROSENBROCK[method.subtype], 0.4, 0.2, y, time_slope=False,
        own_matrices=method.name in SEVERAL,
    )  # fmt: skip
    assert np.abs(ours.detach().numpy() - end).max() < 1e-13


@pytest.mark.parametrize("method", ROSW, ids=NAMES)
def test_coefficients_are_petscs(method):
    """Read off a step of length 1 from zero of y' = g, g the k-th unit vector at the k-th stage.

    Without a Jacobian k_i is the i-th unit vector: stages are the rows of A, the end is b, and
    the u_dot of an implicit stage before its solve is -Gamma_ij / Gamma_ii, j < i. The shift is
    1 / Gamma_ii.
    """
    tableau, s = ROSENBROCK[method.subtype], method.stages
    units = iter(torch.eye(s, dtype=torch.float64))
    zero = torch.zeros(s, dtype=torch.float64)
    end, stages, shifts = petsc_step(
        method, lambda t, y: next(units), zero, 0.0, 1.0, jacobian=torch.zeros(s, s)
    )
    assert np.allclose(end, tableau.b, rtol=0, atol=1e-13)
    assert len(stages) == s
    implicit = [i for i in range(s) if tableau.Gamma[i][i]]
    if method.name in SEVERAL:
        shifts = [shift for shift in shifts if shift]
        assert np.allclose(shifts, [1.0 / tableau.Gamma[i][i] for i in implicit])
    else:
        assert shifts == [pytest.approx(1.0 / tableau.Gamma[0][0])]
    for i, (time, state, u_dot) in enumerate(stages):
        assert time == pytest.approx(sum(tableau.A[i]), abs=1e-14)
        assert np.allclose(state[:i], tableau.A[i][:i], rtol=0, atol=1e-12)
        if i in implicit:
            row = np.array(tableau.Gamma[i][: i + 1])
            assert np.allclose(u_dot[:i], -row[:-1] / row[-1], rtol=0, atol=1e-11)


# ------------------------------------------------------------------------- what PETSc alone gives


def petsc_error(method, steps):
    """Error at t = 1 of steps by petsc4py alone on ``forced``."""
    y = torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64)
    with torch.no_grad():
        exact = pnode.odeint(forced, y, [0.0, 1.0], method="verner8", rtol=1e-13, atol=1e-13)[-1]
    for k in range(steps):
        end, _, _ = petsc_step(method, forced, y, k / steps, 1.0 / steps)
        y = torch.from_numpy(end)
    return float((y - exact).norm())


@pytest.mark.parametrize("name", ["rodas3", "rodaspr", "grk4t"])
def test_time_slope_restores_the_order(name):
    """PETSc leaves g_t out: first order here. pnode's order is in tests/test_methods.py."""
    method = find_method(name)
    slope = math.log2(petsc_error(method, 16) / petsc_error(method, 32))
    assert slope == pytest.approx(1.0, abs=0.2)
    assert name in CLASSICAL


def test_methods_of_w_type_do_not_need_the_time_slope():
    """Their field may hide its time from torch."""
    method = find_method("ra34pw2")
    assert method.name not in CLASSICAL
    slope = math.log2(petsc_error(method, 16) / petsc_error(method, 32))
    assert slope == pytest.approx(3.0, abs=0.2)


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("name", "jacobian"),
    [(name, "dense") for name in NAMES] + [(m.name, "matrix-free") for m in representatives(ROSW)],
)
def test_equals_autograd_through_a_replica(name, jacobian):
    """To round-off: there is no iteration but the Krylov one, which stops at 1e-12."""
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method=name, step_size=0.1, jacobian=jacobian)
    solution = solver(y0, T)
    states = replica(field, name, y0, [k / 10 for k in range(11)])[[0, 3, 10]]
    tolerance = 1e-12 if jacobian == "dense" else 1e-10
    assert relative_difference([solution.ys.detach()], [states.detach()]) < tolerance
    weights = weights_like(states)
    ours = gradients((solution.ys * weights).sum(), field, y0)
    theirs = gradients((states * weights).sum(), field, y0)
    assert relative_difference(ours, theirs) < tolerance
    backward = solution.stats.backward
    if jacobian == "dense":
        assert (solution.stats.jacobians, backward.jacobians) == (10, 10)
    else:
        assert (solution.stats.jacobians, backward.jacobians) == (0, 0)
        assert solution.stats.krylov > solution.stats.newton > 0
        assert backward.krylov > 0


@pytest.mark.parametrize("name", ["ra34pw2", "rodas3", "assp3p3s1c", "rodaspr"])
def test_tuple_state_and_decreasing_times(name):
    """A tuple state gives the gradient of the same state in one tensor."""
    field = Field()
    t = -T

    def run(as_tuple):
        y0 = initial()
        if as_tuple:
            parts = (y0[:1], y0[1:])
            solver = pnode.Solver(
                lambda t, y: tuple(field(t, part) for part in y), method=name, step_size=0.1,
                params=field.parameters(),
            )  # fmt: skip
            ys = torch.cat(solver(parts, t).ys, dim=1)
        else:
            ys = pnode.Solver(field, method=name, step_size=0.1)(y0, t).ys
        return ys.detach(), gradients((ys * weights_like(ys)).sum(), field, y0)

    (states, ours), (expected_states, expected) = run(True), run(False)
    assert relative_difference([states], [expected_states]) < 1e-13
    assert relative_difference(ours, expected) < 1e-12


@pytest.mark.parametrize("name", ["rosw_theta1", "ra34pw2", "lassp3p4s2c", "rodaspr"])
def test_float32(name):
    def run(dtype):
        field = Field().to(dtype)
        y0 = initial().detach().to(dtype).requires_grad_()
        ys = pnode.Solver(field, method=name, step_size=0.1)(y0, T).ys
        assert ys.dtype is dtype
        return gradients(ys[-1].square().sum(), field, y0)

    single, double = run(torch.float32), run(torch.float64)
    assert all(gradient.dtype is torch.float32 for gradient in single)
    # f and J round to 6e-8; a few dozen evaluations, rodaspr's coefficients as large as 27.
    assert relative_difference([gradient.double() for gradient in single], double) < 2e-5


@pytest.mark.parametrize("kind", ["linear", "constant", "time only"])
def test_fields_without_second_derivatives(kind):
    """Nothing to differentiate twice is no error, and the gradient is right."""
    a = torch.tensor([[-1.0, 0.5], [0.2, -2.0]], dtype=torch.float64, requires_grad=True)
    fields = {
        "linear": lambda t, y: y @ a,
        "constant": lambda t, y: a[0] * 1.0,
        "time only": lambda t, y: a[0] * torch.cos(t),
    }
    y0 = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    for name in ("ra34pw2", "rodas3"):
        solver = pnode.Solver(fields[kind], method=name, step_size=0.1, params=[a])
        ours = torch.autograd.grad(solver(y0, T).ys[-1].square().sum(), [y0, a])
        states = replica(fields[kind], name, y0, [k / 10 for k in range(11)])
        theirs = torch.autograd.grad(states[-1].square().sum(), [y0, a])
        assert relative_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_second_derivatives_of_a_vector_field(direction):
    """d/du of w^T J v and of w^T g_t, against torch's own Hessians."""
    p = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return torch.stack([p[0] * y[0] ** 2 * y[1] * t**2, torch.sin(p[1] * y[0]) + y[1] * t**3])

    generator = torch.Generator().manual_seed(1)
    u, v, w = (torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(3))
    problem = InitialValueProblem.create(f, u, direction * torch.tensor([0.0, 1.0]), [p])
    field = VectorField(problem, Ledger())
    ours = field.linearize(0.7, u.clone(), differentiate_time=True)

    def g(s, y):
        return direction * f(direction * s, y)

    time = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = u.clone().requires_grad_()
    J = torch.autograd.functional.jacobian(lambda x: g(time, x), y, create_graph=True)
    slope = torch.autograd.functional.jacobian(lambda s: g(s, y), time, create_graph=True)
    assert torch.allclose(ours.time_derivative(), slope, rtol=1e-14)
    rows, one = torch.stack([w, 2.0 * v]), torch.tensor([1.0, 0.5], dtype=torch.float64)
    pairs = (
        (ours.second_vjp(w[None], v[None]), w @ J @ v),
        (ours.second_vjp(w[None], 0.0 * v[None], one[:1]), w @ slope),
        (ours.second_vjp(rows, rows.flip(0), one),
         2.0 * (w @ J @ v + v @ J @ w) + w @ slope + v @ slope),
    )  # fmt: skip
    for products, scalar in pairs:
        state, parameters = torch.autograd.grad(scalar, [y, p], retain_graph=True)
        assert torch.allclose(products.state, state, rtol=1e-13)
        assert torch.allclose(products.parameters[0], parameters, rtol=1e-13)


@pytest.mark.parametrize(("name", "slopes"), [("ra34pw2", 0), ("rodas3", 1)])
def test_counts(name, slopes):
    """One evaluation and one linear solve per stage, one Jacobian per step; the same backwards.

    Two VJPs per stage backwards: through g and through J; g_t costs a JVP per step each way and a
    VJP more. A checkpoint is the start of the step.
    """
    steps, stages = 8, find_method(name).stages
    field, y0 = Field(), initial()
    solution = pnode.Solver(field, method=name, step_size=1.0 / steps)(y0, [0.0, 1.0])
    stats = solution.stats
    assert stats.rhs == stats.newton == stages * steps
    assert (stats.jacobians, stats.jvp, stats.vjp) == (steps, slopes * steps, 0)
    assert stats.ram_bytes == steps * y0.numel() * 8
    solution.ys[-1].sum().backward()
    backward = stats.backward
    assert backward.rhs == stages * steps
    assert backward.vjp == (2 * stages + slopes) * steps
    assert (backward.jacobians, backward.jvp) == (steps, slopes * steps)
    assert (backward.steps, backward.recomputed) == (steps, 0)


def test_second_backward_repeats_the_forward_sweep():
    y0 = initial()
    solution = pnode.Solver(Field(), method="rodas3", step_size=0.1)(y0, T)
    loss = solution.ys[-1].square().sum()
    (first,) = torch.autograd.grad(loss, [y0], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [y0])
    assert solution.stats.backward.recomputed == 10
    assert torch.equal(first, second)


# ----------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("jacobian", ["dense", "matrix-free"])
@pytest.mark.parametrize("name", ["ra34pw2", "rodas3", "lassp3p4s2c"])
def test_nan_is_reported(name, jacobian):
    solver = pnode.Solver(
        lambda t, y: y * (math.nan if t > 0.45 else 1.0), method=name, step_size=0.1,
        jacobian=jacobian,
    )  # fmt: skip
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NonFiniteVectorField) as caught:
        solver(y0, [0.0, 1.0])
    assert (caught.value.step, caught.value.method) == (4, name)
    assert solver(y0, [0.0, 0.3]).stats.steps == 3


def test_adaptive_steps_avoid_a_domain_error():
    """y' = -50 log y from far off its rest y = 1: stages of too long a step are negative."""
    solver = pnode.Solver(lambda t, y: -50.0 * torch.log(y), method="ra34pw2", rtol=1e-4, atol=1e-6)
    y0 = torch.tensor([1e-3], dtype=torch.float64, requires_grad=True)
    solution = solver(y0, [0.0, 1.0])
    assert solution.ys[-1].item() == pytest.approx(1.0, abs=1e-3)
    assert solution.stats.rejected > 0
    solution.ys[-1].sum().backward()
    assert bool(torch.isfinite(y0.grad).all())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exception_in_the_field_comes_through(where):
    armed = where == "forward"

    def f(t, y):
        if armed and t > 0.45:
            raise ZeroDivisionError("mine")
        return torch.sin(y)

    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(f, method="rodas3", step_size=0.1)
    if where == "forward":
        with pytest.raises(ZeroDivisionError, match="mine"):
            solver(y0, [0.0, 1.0])
    else:
        ys = solver(y0, [0.0, 1.0]).ys
        armed = True
        with pytest.raises(ZeroDivisionError, match="mine"):
            ys[-1].sum().backward()
    armed = False
    assert solver(y0, [0.0, 1.0]).stats.steps == 10


def test_singular_matrix():
    """I / (h gamma) - J is zero for y' = y / (h gamma)."""
    gamma = ROSENBROCK["ra34pw2"].Gamma[0][0]
    solver = pnode.Solver(lambda t, y: y / (0.5 * gamma), method="ra34pw2", step_size=0.5)
    with pytest.raises(LinearSolveFailed) as caught:
        solver(torch.ones(1, dtype=torch.float64), [0.0, 1.0])
    assert (caught.value.step, caught.value.method) == (0, "ra34pw2")


@pytest.mark.parametrize("sweep", ["forward", "backward"])
def test_krylov_failure_says_what_to_do(sweep):
    y0 = torch.linspace(0.1, 1.0, 6, dtype=torch.float64).requires_grad_()
    A = torch.diag(torch.logspace(0, 3, 6, dtype=torch.float64))
    A = A + torch.triu(torch.ones(6, 6, dtype=torch.float64), 1)
    options = {"ksp_max_it": 2} if sweep == "forward" else {"ksp_rtol": 1e-300, "ksp_max_it": 3}
    solver = pnode.Solver(
        lambda t, y: -(A @ y), method="ra34pw2", step_size=0.5, jacobian="matrix-free",
        petsc_options=options,
    )  # fmt: skip
    with pytest.raises(LinearSolveFailed, match="jacobian='dense'"):
        solver(y0, [0.0, 1.0]).ys[-1].sum().backward()


@pytest.mark.parametrize(("option", "value"), [
    ("snes_type", "newtonls"),
    ("snes_lag_jacobian", 3),
    ("snes_lag_preconditioner", 2),
    ("ts_rosw_recompute_jacobian", 1),
    ("ts_rosw_type", "rodas3"),
])  # fmt: skip
def test_options_that_change_the_method_are_refused(option, value):
    solver = pnode.Solver(
        lambda t, y: -y, method="ra34pw2", step_size=0.1, petsc_options={option: value}
    )
    with pytest.raises(ConfigurationError, match=f"{option}.*ra34pw2"):
        solver(torch.ones(1), [0.0, 1.0])


def test_theta_forms_ask_for_a_step_size():
    for name in ("rosw_theta1", "rosw_theta2"):
        with pytest.raises(ConfigurationError, match="no error estimate"):
            pnode.Solver(lambda t, y: y, method=name)

"""Adjoints over the stages: coefficients, gradients, counts and failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from replica import measured_tableau, replica, solve_implicit
from representatives import representatives
from test_gradients import Field, initial, relative_difference, weights_like
from ts_adjoint import TSAdjoint

import pnode
import pnode.sweeping.engine
from pnode import ConfigurationError, NonFiniteVectorField
from pnode.adjoint.create import create_adjoint
from pnode.adjoint.stepper import StageCotangents
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions, next_prefix
from pnode.field.vectorfield import vector_field
from pnode.problems.mass import MassMatrix
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.solvers import scheme as schemes
from pnode.solvers import symplectic_schemes
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.methods import METHODS, find_method
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.stepping import Step
from pnode.testing import taylor_test

SSP = [method.name for method in METHODS if method.ts_type == "ssp"]
SYMPLECTIC = [method.name for method in METHODS if method.ts_type == "basicsymplectic"]
# Without graphs from the forward sweep: the adjoint evaluates f at each stage.
STAGES = pnode.Checkpointing(store="stages")


class Oscillators(torch.nn.Module):
    """Separable, non-autonomous and nonlinear, with momenta and positions of different shapes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape):
            return torch.nn.Parameter(
                torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6
            )

        self.mass, self.stiffness, self.unused = weight(4, 3), weight(3, 4), weight(2)

    def forward(self, t, state):
        q, p = state
        q_dot = torch.tanh(p @ self.mass) * (1.0 + 0.3 * torch.sin(t))
        return q_dot, -torch.sin(q) @ self.stiffness * torch.cos(t) - 0.1


def pair():
    generator = torch.Generator().manual_seed(5)
    q, p = (torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    return q.requires_grad_(), p.requires_grad_()


# ------------------------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("name", SSP)
def test_ssp_tableau_is_that_of_petsc(name):
    method = find_method(name)
    ours, theirs = schemes.ssp_scheme(method.subtype, method.stages), measured_tableau(method)
    for key in ("A", "b", "c"):
        assert np.allclose(getattr(ours, key), theirs[key], rtol=0, atol=2e-15), key
    assert ours.c[0] == 0.0
    for k in range(1, method.order + 1):
        assert np.dot(ours.b, np.power(ours.c, k - 1)) == pytest.approx(1 / k, abs=1e-14)


@pytest.mark.parametrize(("name", "coefficient"), [
    ("ssprk22", 1), ("ssprk52", 4), ("ssprk43", 2), ("ssprk93", 6), ("ssprk104", 6),
])  # fmt: skip
def test_ssp_coefficient(name, coefficient):
    """The published radius of absolute monotonicity: s - 1, n^2 - n, 6 (Ketcheson 2008).

    With K = (A, 0; b, 0), every entry of r K (I + r K)^-1 and of 1 - its row sums is non-negative
    for r up to the coefficient, and some are not beyond it.
    """
    method = find_method(name)
    tableau = schemes.ssp_scheme(method.subtype, method.stages)
    s = method.stages
    K = np.zeros((s + 1, s + 1))
    K[:s, :s], K[s, :s] = tableau.A, tableau.b

    def smallest(r):
        alpha = r * K @ np.linalg.inv(np.eye(s + 1) + r * K)
        return min(alpha.min(), (1.0 - alpha.sum(axis=1)).min())

    assert smallest(coefficient) > -1e-13
    assert smallest(coefficient + 0.01) < -1e-6


def test_symplectic_weights_add_up_to_a_step():
    for scheme in symplectic_schemes.SYMPLECTIC.values():
        assert sum(scheme.c) == pytest.approx(1.0, abs=1e-15)
        assert sum(scheme.d) == pytest.approx(1.0, abs=1e-15)


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", SYMPLECTIC)
def test_symplectic_equals_autograd_through_a_replica(name, direction):
    field, y0 = Oscillators(), pair()
    t = direction * torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    ys = pnode.Solver(field, method=name, step_size=0.1)(y0, t).ys
    states = replica(field, name, y0, [direction * k / 10 for k in range(11)])
    chosen = [part[[0, 3, 7, 10]] for part in states]
    assert relative_difference([y.detach() for y in ys], [x.detach() for x in chosen]) < 1e-13
    tensors = [*y0, field.mass, field.stiffness]
    losses = [sum((x * weights_like(x)).sum() for x in parts) for parts in (ys, chosen)]
    ours, theirs = (torch.autograd.grad(loss, tensors) for loss in losses)
    assert relative_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_symplectic_taylor_remainder(name):
    field, y0 = Oscillators(), pair()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    solver = pnode.Solver(field, method=name, step_size=0.2)
    inputs = [*y0, field.mass, field.stiffness]
    result = taylor_test(
        lambda: sum(y[1:].square().sum() for y in solver(y0, t).ys), inputs, size=1e-2
    )
    assert result.order > 1.95, result
    assert field.unused.grad is None


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_flow_is_symplectic(name):
    """J^T Omega J = Omega for the Jacobian J of ten steps of a pendulum, rows from the adjoint."""
    y0 = tuple(torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.8, 0.3))
    solver = pnode.Solver(lambda t, y: (y[1], -torch.sin(y[0])), method=name, step_size=0.3)
    ys = solver(y0, torch.tensor([0.0, 3.0])).ys
    rows = [torch.cat(torch.autograd.grad(y[-1], y0, retain_graph=True)) for y in ys]
    # In two dimensions J^T Omega J = det(J) Omega.
    assert float(torch.linalg.det(torch.stack(rows))) == pytest.approx(1.0, abs=1e-13)


def test_momenta_are_driven_at_the_time_of_the_positions():
    """With PETSc's stage times, the sums of d, Verlet would be of first order on p' = g(t)."""
    y0 = (torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def error(steps):
        solver = pnode.Solver(
            lambda t, y: (y[1] * 1.0, torch.exp(t).expand(1)), method="velocity_verlet",
            step_size=1.0 / steps,
        )  # fmt: skip
        with torch.no_grad():
            return abs(float(solver(y0, torch.tensor([0.0, 1.0])).ys[1][-1]) - (math.e - 1.0))

    assert math.log2(error(16) / error(32)) == pytest.approx(2.0, abs=0.05)


FAMILIES = ("rk", "beuler", "cn", "theta", "dirk", "arkimex")
SOME = representatives()
WITH_TSADJOINT = [
    (method.name, form, jacobian)
    for method in METHODS if method.ts_type in FAMILIES
    for form in method.forms if form != "residual"
    # Of these PETSc's adjoint takes the mass matrix for the identity.
    if not (method.ts_type in ("dirk", "arkimex") and "mass" in form)
    for jacobian in ("dense", "matrix-free")
    if jacobian == "dense" or (method.implicit and method in SOME)
]  # fmt: skip
DRIFT = 0.2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def compared(method, form, jacobian, monkeypatch, oracle):
    """Gradients by pnode's pass or by TSAdjoint, and the counts."""
    field, other, y0 = Field(), Field(), initial()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    keywords = {"method": method, "step_size": 0.2, "checkpointing": STAGES}
    if find_method(method).implicit:
        keywords |= {"jacobian": jacobian}
    if form == "imex":
        keywords |= {"implicit": field, "explicit": other}
    elif form == "mass":
        keywords |= {"rhs": field, "mass": torch.eye(6, dtype=torch.float64) + DRIFT}
    else:
        keywords |= {"rhs": field}
    if oracle:
        monkeypatch.setattr(pnode.sweeping.engine, "create_adjoint", TSAdjoint)
    solution = pnode.Solver(**keywords)(y0, t)
    loss = (solution.ys * weights_like(solution.ys)).sum()
    others = [other.inner, other.outer, other.bias] if form == "imex" else []
    found = torch.autograd.grad(loss, [y0, field.inner, field.outer, field.bias, *others])
    return found, solution.stats.backward


@pytest.mark.parametrize(("method", "form", "jacobian"), WITH_TSADJOINT)
def test_stage_adjoint_equals_tsadjoint(method, form, jacobian, monkeypatch):
    """The pass over the stages gives the gradients of PETSc's own adjoint, for no more work.

    Matrix-free both leave the residual of their Krylov solves, 1e-12 of the right-hand side each.
    PETSc takes up to two products more a stage, and does not skip idle ones.
    """
    ours, ledger = compared(method, form, jacobian, monkeypatch, oracle=False)
    expected, petsc = compared(method, form, jacobian, monkeypatch, oracle=True)
    assert relative_difference(ours, expected) < (1e-13 if jacobian == "dense" else 1e-10)
    assert ledger.steps == petsc.steps
    assert ledger.rhs <= petsc.rhs
    assert ledger.vjp <= petsc.vjp
    assert ledger.jacobians <= petsc.jacobians


@pytest.mark.parametrize("name", ["cn", "es325", "ark3"])
def test_implicit_counts(name):
    """Of n steps with s stages, e of them explicit, that share their ends with their neighbours.

    Each stage is linearized once, a shared end once for both its steps; each implicit stage takes
    one matrix, one solve and one product, for the parameters, and each explicit one a product. An
    IMEX method has as many products with the explicit part.
    """
    method, n, field, y0 = find_method(name), 7, Field(), initial()
    parts = {"implicit": field, "explicit": field} if name == "ark3" else {"rhs": field}
    solver = pnode.Solver(**parts, method=name, step_size=1.0 / n, params=list(field.parameters()))
    solution = solver(y0, [0.0, 1.0])
    solution.ys[-1].sum().backward()
    s, backward = method.stages, solution.stats.backward
    linearized = n * (s - 1) + 1 if method.shares_ends else 2 * n * s
    assert (backward.rhs, backward.vjp) == (linearized, n * s * (2 if name == "ark3" else 1))
    assert (backward.jacobians, backward.krylov) == (n * (s - 1), n * (s - 1))


def test_without_parameters_an_implicit_stage_takes_no_product():
    solver = pnode.Solver(lambda t, y: -y.sinh(), method="sdirk2", step_size=0.25)
    solution = solver(initial(), [0.0, 1.0])
    solution.ys[-1].sum().backward()
    assert solution.stats.backward.vjp == 0


def stages_of(scheme, t, h, u, implicit, explicit=None, mass=None):
    """Stages and slopes of a step, and its end, differentiable."""
    Ys, Ks, Es = [], [], []
    M = torch.eye(u.numel(), dtype=torch.float64) if mass is None else mass
    for i, row in enumerate(scheme.A):
        Z = u + h * sum((a * k for a, k in zip(row, Ks, strict=False)), 0.0 * u)
        if explicit is not None:
            Z = Z + h * sum((a * k for a, k in zip(scheme.A_explicit[i], Es, strict=False)), 0 * u)
        s, ha = torch.as_tensor(t + scheme.c[i] * h, dtype=u.dtype), h * row[i]
        Y = Z
        if ha:
            Y = solve_implicit(
                lambda x, Z=Z, ha=ha, s=s: (
                    ((x - Z) / ha).reshape(-1) @ M.T - implicit(s, x).reshape(-1)
                ),
                Z,
            )
        Ys.append(Y)
        Ks.append((Y - Z) / ha if ha else implicit(s, Y))
        if explicit is not None:
            s = torch.as_tensor(t + scheme.c_explicit[i] * h, dtype=u.dtype)
            Es.append(explicit(s, Y))
    end = u + h * sum(b * k for b, k in zip(scheme.b, Ks, strict=True))
    if explicit is not None:
        end = end + h * sum(b * k for b, k in zip(scheme.b_explicit, Es, strict=True))
        Ks = [k + e for k, e in zip(Ks, Es, strict=True)]
    return Ys, Ks, Ys[-1] if scheme.stiffly_accurate else end


@pytest.mark.parametrize(("name", "form"), [
    ("rk4", "rhs"), ("dopri5", "rhs"), ("ssprk43", "rhs"), ("cn", "rhs"), ("sdirk2", "rhs"),
    ("es325", "rhs"), ("dirk657a", "rhs"), ("ark3", "imex"), ("ars443", "imex"),
    ("implicit_midpoint", "mass"), ("sdirk2", "mass"),
])  # fmt: skip
def test_cotangents_inside_a_step(name, form):
    """Of each stage and slope besides the end: equal to autograd through the step."""
    method, field, other, u, h = find_method(name), Field(), Field(), initial(), 0.2
    other.bias.data.mul_(-0.7)
    mass = torch.eye(6, dtype=torch.float64) + DRIFT if form == "mass" else None
    explicit = other if form == "imex" else None
    Ys, Ks, end = stages_of(method.scheme, 0.1, h, u, field, explicit, mass)
    every = [*Ys, *Ks, end]
    cotangents = [weights_like(end) * (1 + index) / 7 for index in range(len(every))]
    parameters = [field.inner, field.outer, field.bias]
    if form == "imex":
        parameters += [other.inner, other.outer, other.bias]
    loss = sum((c * y).sum() for c, y in zip(cotangents, every, strict=True))
    expected = torch.autograd.grad(loss, [u, *parameters])

    if mass is not None:
        mass = MassMatrix(mass, StateLayout.of(u))
    problem = InitialValueProblem.create(
        field, u, torch.zeros(1), parameters, form=form, explicit=explicit, mass=mass
    )
    settings = IntegratorSettings(method, u.numel(), torch.float64, form=form)
    options = default_options(method, False, "dense", torch.float64, adjoint=True)
    adjoint = create_adjoint(settings, SolverOptions(next_prefix(), None, options), True)
    ledger, flat, s, seen = Ledger(), [c.reshape(-1) for c in cotangents], len(Ys), {}
    adjoint.begin(vector_field(problem, ledger))
    adjoint.add(flat[-1])
    adjoint.load(Checkpoint(tuple(Y.detach().reshape(-1) for Y in Ys)))
    with torch.enable_grad():
        adjoint.step(
            Step(0, 0.1, h, 0.1 + h), ledger,
            StageCotangents(flat[:s], flat[s : 2 * s], seen.__setitem__),
        )  # fmt: skip
    ours = [adjoint.state_gradient().view_as(u), *adjoint.parameter_gradients(len(parameters))]
    adjoint.end()
    assert relative_difference(ours, expected) < 1e-12
    if method.kind == "explicit":
        assert all(torch.allclose(seen[i], K.reshape(-1), atol=1e-15) for i, K in enumerate(Ks))
        assert ledger.vjp == ledger.rhs == s
    adjoint.destroy()


@pytest.mark.parametrize("name", SSP)
def test_evaluation_counts_of_ssp(name):
    """One evaluation per stage forward; one evaluation and one product per stage backward."""
    stages, steps, field, y0 = find_method(name).stages, 7, Field(), initial()
    solver = pnode.Solver(field, method=name, step_size=1.0 / steps, checkpointing=STAGES)
    solution = solver(y0, [0.0, 1.0])
    assert solution.stats.rhs == stages * steps
    assert solution.stats.ram_bytes == stages * steps * y0.numel() * 8
    solution.ys[-1].sum().backward()
    backward = solution.stats.backward
    assert (backward.rhs, backward.vjp) == (stages * steps, stages * steps)
    assert (backward.steps, backward.recomputed) == (steps, 0)


@pytest.mark.parametrize(("name", "updates"), list(zip(SYMPLECTIC, [2, 3, 6, 7], strict=True)))
def test_evaluation_counts_of_symplectic(name, updates):
    """One evaluation per half-update; two products more to check that the field is separable."""
    steps = 5
    solution = pnode.Solver(Oscillators(), method=name, step_size=1.0 / steps)(pair(), [0.0, 1.0])
    assert (solution.stats.rhs, solution.stats.vjp) == (updates * steps, 2)
    sum(y[-1].sum() for y in solution.ys).backward()
    backward = solution.stats.backward
    assert (backward.rhs, backward.vjp) == (updates * steps, updates * steps)


@pytest.mark.parametrize("name", ["ssprk43", "velocity_verlet"])
def test_second_backward_repeats_the_forward_sweep(name):
    pair_wanted = name in SYMPLECTIC
    field, y0 = (Oscillators(), pair()) if pair_wanted else (Field(), (initial(),))
    solution = pnode.Solver(field, method=name, step_size=0.1)(
        y0 if pair_wanted else y0[0], torch.tensor([0.0, 1.0])
    )
    ys = solution.ys if pair_wanted else (solution.ys,)
    loss = sum(y[-1].square().sum() for y in ys)
    first = torch.autograd.grad(loss, y0, retain_graph=True)
    second = torch.autograd.grad(loss, y0)
    assert solution.stats.backward.recomputed == 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [*SSP, *SYMPLECTIC])
def test_float32(name):
    def run(dtype):
        if name in SYMPLECTIC:
            field = Oscillators().to(dtype)
            y0 = tuple(x.detach().to(dtype).requires_grad_() for x in pair())
        else:
            field = Field().to(dtype)
            y0 = (initial().detach().to(dtype).requires_grad_(),)
        solver = pnode.Solver(field, method=name, step_size=0.1)
        ys = solver(y0 if len(y0) > 1 else y0[0], torch.tensor([0.0, 1.0])).ys
        parts = ys if isinstance(ys, tuple) else (ys,)
        assert all(part.dtype is dtype for part in parts)
        return torch.autograd.grad(sum(part[-1].square().sum() for part in parts), y0)

    single, double = run(torch.float32), run(torch.float64)
    assert all(gradient.dtype is torch.float32 for gradient in single)
    # f rounds to 6e-8; a few dozen evaluations and a conditioning of order one.
    assert relative_difference([gradient.double() for gradient in single], double) < 1e-5


# ----------------------------------------------------------------------------------------- failures


def tuple_or_tensor(name, f):
    """A field of the shape that ``name`` integrates, and an initial state."""
    y = torch.ones(2, dtype=torch.float64, requires_grad=True)
    if name in SYMPLECTIC:
        return (lambda t, state: (f(t, state[1]), f(t, state[0]))), (y, y)
    return f, y


@pytest.mark.parametrize("name", ["ssprk22", "ssprk104", "velocity_verlet", "ruth3"])
def test_nan_is_reported(name):
    def f(t, y):
        return y * (math.nan if t > 0.45 else 1.0)

    field, y0 = tuple_or_tensor(name, f)
    solver = pnode.Solver(field, method=name, step_size=0.1)
    with pytest.raises(NonFiniteVectorField) as caught:
        solver(y0, torch.tensor([0.0, 1.0]))
    assert caught.value.step == 4
    assert caught.value.method == name
    assert solver(y0, [0.0, 0.3]).stats.steps == 3


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", ["ssprk43", "velocity_verlet"])
def test_exception_in_the_field_comes_through(name, where):
    armed = where == "forward"

    def f(t, y):
        if armed and t > 0.45:
            raise ZeroDivisionError("mine")
        return torch.sin(y)

    field, y0 = tuple_or_tensor(name, f)
    solver = pnode.Solver(field, method=name, step_size=0.1, checkpointing=STAGES)
    t = torch.tensor([0.0, 1.0])
    if where == "forward":
        with pytest.raises(ZeroDivisionError, match="mine"):
            solver(y0, t)
    else:
        ys = solver(y0, t).ys
        armed = True
        with pytest.raises(ZeroDivisionError, match="mine"):
            (ys[0] if name in SYMPLECTIC else ys)[-1].sum().backward()
    armed = False
    assert solver(y0, t).stats.steps == 10  # nothing is left half done


def test_wrong_shape_in_the_backward_sweep_says_where():
    broken = False
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: y.sum() if broken else y.sin(), method="ssprk22", step_size=0.5,
        checkpointing=STAGES,
    )  # fmt: skip
    ys = solver(y0, torch.tensor([0.0, 1.0])).ys
    broken = True
    with pytest.raises(pnode.VectorFieldError) as caught:
        ys[-1].sum().backward()
    assert (caught.value.step, caught.value.method) == (1, "ssprk22")


def test_symplectic_methods_want_a_pair():
    one = torch.ones(2)
    for y0, got in ((one, "one tensor"), ((one, one, one), "a tuple of 3")):
        with pytest.raises(ConfigurationError, match=f"y0 is {got}.*velocity_verlet"):
            pnode.Solver(lambda t, y: y, method="velocity_verlet", step_size=0.1)(y0, [0.0, 1.0])


@pytest.mark.parametrize("part", ["q", "p"])
def test_symplectic_methods_want_a_separable_field(part):
    def f(t, y):
        q, p = y
        return (p + 0.1 * q, -q) if part == "q" else (p, -q - 0.1 * p)

    y0 = (torch.ones(2).requires_grad_(), torch.ones(2))
    solver = pnode.Solver(f, method="forest_ruth", step_size=0.1)
    with pytest.raises(ConfigurationError, match=f"d{part}/dt depends on {part}"):
        solver(y0, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("name", "options"), [
    ("ssprk43", {"ts_ssp_num_stages": 9}),
    ("ssprk43", {"ts_ssp_type": "rk104"}),
    ("ruth3", {"ts_basicsymplectic_type": "2"}),
])  # fmt: skip
def test_options_that_contradict_the_method_are_refused(name, options):
    field, y0 = tuple_or_tensor(name, lambda t, y: y)
    solver = pnode.Solver(field, method=name, step_size=0.1, petsc_options=options)
    with pytest.raises(ConfigurationError, match="contradicts method="):
        solver(y0, torch.tensor([0.0, 1.0]))


def test_fixed_step_methods_ask_for_a_step_size():
    for name in (*SSP, *SYMPLECTIC):
        with pytest.raises(ConfigurationError, match="no error estimate"):
            pnode.Solver(lambda t, y: y, method=name)


def test_every_method_has_an_adjoint():
    assert {method.adjoint for method in METHODS} == {"stages", "multistep"}
    assert {m.ts_type for m in METHODS if m.adjoint == "multistep"} == {"python"}

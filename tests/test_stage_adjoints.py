"""Methods without a TSAdjoint: their coefficients, gradients, counts and failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from replica import measured_tableau, replica, rk_step
from test_gradients import Field, gradients, initial, relative_difference, weights_like

import pnode
import pnode.engine
from pnode import ConfigurationError, NonFiniteVectorField
from pnode.adjoint.discrete import DiscreteAdjoint
from pnode.adjoint.stages import ExplicitAdjoint
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.solvers import scheme as schemes
from pnode.solvers.integrator import IntegratorSettings
from pnode.solvers.methods import METHODS, find_method
from pnode.solvers.stepping import Step
from pnode.testing import taylor_test
from pnode.vectorfield import VectorField

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
    for scheme in schemes.SYMPLECTIC.values():
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


@pytest.mark.parametrize("method", [m for m in METHODS if m.ts_type == "rk"], ids=str)
def test_stage_adjoint_equals_tsadjoint(method, monkeypatch):
    """The pass over the stages gives the gradients of PETSc's own TSRK adjoint, and its counts."""
    field, y0 = Field(), initial()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def solve():
        solver = pnode.Solver(field, method=method.name, step_size=0.1, checkpointing=STAGES)
        solution = solver(y0, t)
        ours = gradients((solution.ys * weights_like(solution.ys)).sum(), field, y0)
        return ours, solution.stats.backward

    ours, own_ledger = solve()
    used = []

    def create(settings, options, parameters):
        used.append(DiscreteAdjoint(settings, options, parameters))
        return used[-1]

    monkeypatch.setattr(pnode.engine, "create_adjoint", create)
    expected, ledger = solve()
    assert len(used) == 1
    assert relative_difference(ours, expected) < 1e-13
    assert own_ledger.steps == ledger.steps
    assert own_ledger.vjp <= ledger.vjp  # PETSc does not skip idle stages


def test_cotangents_inside_a_step():
    """Outputs u + h sum_i weights_i k_i besides the end: equal to autograd through the step."""
    field, y0, h = Field(), initial(), 0.2
    tableau = schemes.ssp_scheme("rks3", 4)
    stages, slopes = [], []

    def recorded(t, y):
        stages.append(y.detach().clone().reshape(-1))
        slopes.append(field(t, y))
        return slopes[-1]

    values = {"A": tableau.A, "b": tableau.b, "c": tableau.c}
    end = rk_step(recorded, values, 0.1, h, y0)
    inside = [[0.2, 0.0, 0.1, 0.05], [0.3, 0.1, 0.0, 0.0]]
    outputs = [y0 + h * sum(w * k for w, k in zip(row, slopes, strict=True)) for row in inside]
    cotangents = [weights_like(end) * (index + 1) for index in range(3)]
    loss = sum((c * y).sum() for c, y in zip(cotangents, [end, *outputs], strict=True))
    expected = gradients(loss, field, y0)

    parameters = [field.inner, field.outer, field.bias]
    problem = InitialValueProblem.create(field, y0, torch.zeros(1), parameters)
    settings = IntegratorSettings(find_method("ssprk43"), y0.numel(), torch.float64)
    adjoint, ledger = ExplicitAdjoint(settings, True), Ledger()
    adjoint.begin(VectorField(problem, ledger))
    adjoint.add(cotangents[0].reshape(-1))
    adjoint.load(tuple(stages))
    with torch.enable_grad():
        adjoint.step(
            Step(0, 0.1, h, 0.1 + h), ledger,
            [(row, c.reshape(-1)) for row, c in zip(inside, cotangents[1:], strict=True)],
        )  # fmt: skip
    ours = [adjoint.state_gradient().view_as(y0), *adjoint.parameter_gradients(3)]
    adjoint.end()
    assert relative_difference(ours, expected) < 1e-14
    assert ledger.vjp == 4


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
    assert {method.adjoint for method in METHODS} == {"TSAdjoint", "stages", "multistep"}
    own = {method.ts_type for method in METHODS if method.adjoint == "stages"}
    assert own == {"rk", "ssp", "basicsymplectic", "rosw"}

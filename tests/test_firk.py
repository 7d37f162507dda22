"""Fully implicit Runge-Kutta methods: stability, invariants, adjoints, adaptive radau5, refusals.

Orders of convergence, gradients through replicas and a changed field are tested with those of all
methods (``test_methods.py``, ``test_gradients.py``, ``test_field_changed.py``).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from replica import coupled_step
from torch.autograd import grad

import pnode
from pnode.base.ranks import ALONE
from pnode.problems.mass import MassMatrix
from pnode.problems.problem import StateLayout
from pnode.solvers.firk.gmres import gmres
from pnode.solvers.firk.sparse_factors import SparseFactors
from pnode.solvers.firk.systems import CoupledSystem, Krylov, SimplifiedSystem
from pnode.solvers.firk.tableaus import transformation
from pnode.solvers.methods import find_method
from pnode.testing import taylor_test

D = torch.float64
NAMES = ["radau3", "radau5", "gauss4", "gauss6"]
TIGHT = {"snes_stol": 1e-15}
every = pytest.mark.parametrize("name", NAMES)


class Robertson(torch.nn.Module):
    """The chemical reactions of Robertson, with their rates as parameters; a DAE if wanted."""

    def __init__(self, algebraic=False):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.04, 3e7, 1e4], dtype=D))
        self.algebraic = algebraic

    def forward(self, t, y):
        first, second, third = self.rates * torch.stack([y[0], y[1] ** 2, y[1] * y[2]])
        last = y.sum() - 1.0 if self.algebraic else second
        return torch.stack([-first + third, first - second - third, last])


class VanDerPol(torch.nn.Module):
    """The oscillator, also of several independent samples."""

    def __init__(self, mu=20.0):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor(mu, dtype=D))

    def forward(self, t, y):
        x, v = y[..., 0], y[..., 1]
        return torch.stack([v, self.mu * (1.0 - x * x) * v - x], -1)


def start(*values):
    return torch.tensor(values, dtype=D, requires_grad=True)


def times(*values):
    return torch.tensor(values, dtype=D)


def difference(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def solve_and_differentiate(field, y0, t, component=1, **keywords):
    solution = pnode.Solver(field, **keywords)(y0, t)
    found = grad(solution.ys[-1].flatten()[component], [y0, *field.parameters()])
    return solution, found


# ------------------------------------------------------------------------------ linear algebra


@every
def test_transformation_and_coupled_system_are_the_same_matrix(name):
    """With one Jacobian for all stages, against the Kronecker products written out."""
    scheme = find_method(name).scheme
    new, s, n, h = transformation(scheme), scheme.stages, 4, 0.3
    generator = torch.Generator().manual_seed(1)
    J, M = (torch.randn(n, n, generator=generator, dtype=D) for _ in range(2))
    b = torch.randn(s, n, generator=generator, dtype=D)
    inverse = torch.linalg.inv(torch.tensor(scheme.A, dtype=D)).contiguous()
    matrix = torch.kron(inverse / h, M) - torch.kron(torch.eye(s, dtype=D), J)
    expected = torch.linalg.solve(matrix, b.reshape(-1)).view(s, n)
    mass = MassMatrix(M, StateLayout.of(b[0]))
    one = SimplifiedSystem(new, h, J[None], mass, M[None], Krylov({}, 1e-12), ALONE)
    assert one.factored == (s + 1) // 2
    assert difference([one.solve(b)], [expected]) < 1e-12
    all_ = CoupledSystem(new, h, [J[None]] * s, mass, M[None], Krylov({}, 1e-12), ALONE)
    assert difference([all_.solve(b)], [expected]) < 1e-12
    transposed = torch.linalg.solve(matrix.T, b.reshape(-1)).view(s, n)
    batch = torch.stack([b, 2.0 * b])
    found = all_.solve(batch, transposed=True)
    assert difference(found, [transposed, 2.0 * transposed]) < 1e-12
    if name == "radau5":
        gamma = float(new.eigenvalues[0].real)
        assert gamma == pytest.approx(3.0 + 3.0 ** (2 / 3) - 3.0 ** (1 / 3), rel=1e-13)
        right = torch.linalg.solve(gamma / h * M - J, b[0])
        assert difference([one.solve_real(b[0])], [right]) < 1e-12


def test_gmres_with_restarts():
    generator = torch.Generator().manual_seed(2)
    matrix = torch.eye(30, dtype=D) * 3.0
    matrix += torch.randn(30, 30, generator=generator, dtype=D) * 0.25
    b = torch.randn(5, 6, generator=generator, dtype=D)

    def apply(v):
        return (matrix @ v.reshape(-1)).view(v.shape)

    for restart in (100, 8):
        x, taken = gmres(apply, b, ALONE, 1e-12, restart)
        assert float((apply(x) - b).norm() / b.norm()) < 1e-11
        assert (taken <= 30) == (restart == 100)
    assert gmres(apply, torch.zeros_like(b), ALONE, 1e-12)[1] == 0
    singular = gmres(lambda v: torch.zeros_like(v), b, ALONE, 1e-12)
    assert singular[0] is None


# ------------------------------------------------------------------------ stability, invariants


@every
def test_stability_of_stiff_components(name):
    """A-stable at h lambda = -1e8: Radau methods damp at once, Gauss methods keep the size."""
    field, y0 = (lambda t, y: -1e8 * (y - torch.cos(t))), start(2.0)
    ys = pnode.Solver(field, method=name, step_size=1.0)(y0, times(0.0, 1.0, 2.0)).ys
    errors = (ys[1:, 0] - torch.cos(times(1.0, 2.0))).abs()
    if name.startswith("radau"):
        assert float(errors.detach().max()) < 1e-7
    else:
        # R(infinity) is 1 or -1; cos is no polynomial of the stages' degree.
        assert 0.5 < float(errors.detach().max()) < 1.5


@every
def test_b_stability(name):
    """Of a dissipative nonlinear field, steps of any length bring two solutions together."""
    field = lambda t, y: -(y**3) - 100.0 * y  # noqa: E731
    solver = pnode.Solver(field, method=name, step_size=0.7)
    pair = [solver(start(a), torch.arange(5) * 0.7).ys[:, 0].detach() for a in (1.0, -2.0)]
    distances = (pair[0] - pair[1]).abs().tolist()
    assert all(after <= before for before, after in itertools.pairwise(distances))


@pytest.mark.parametrize("name", ["gauss4", "gauss6"])
def test_gauss_methods_keep_quadratic_invariants(name):
    """Energy and angular momentum of a rigid body."""
    inertia = torch.tensor([1.0, 2.0, 3.0], dtype=D)

    def field(t, m):
        return torch.linalg.cross(m, m / inertia)

    m = torch.tensor([0.8, 1.1, 0.5], dtype=D)
    with torch.no_grad():
        solver = pnode.Solver(field, method=name, step_size=0.25, petsc_options=TIGHT)
        ys = solver(m, torch.linspace(0, 20, 5)).ys
    for invariant in ((ys**2).sum(1), (ys**2 / inertia).sum(1)):
        assert float((invariant / invariant[0] - 1.0).abs().max()) < 1e-13


# ------------------------------------------------------------------------------------ adjoints


@every
def test_taylor_remainders_and_the_tangents_transpose(name):
    field, y0, t = VanDerPol(3.0), start(1.2, -0.4), times(0.0, 0.5, 1.3)
    solver = pnode.Solver(field, method=name, step_size=0.2, petsc_options=TIGHT)
    result = taylor_test(lambda: solver(y0, t).ys.square().sum(), [y0, field.mu])
    assert result.order > 1.9, result
    v, w = torch.tensor([0.3, -0.7], dtype=D), torch.linspace(-1.0, 1.0, 6, dtype=D).view(3, 2)
    _, tangent = torch.func.jvp(lambda y: solver(y, t).ys, (y0.detach(),), (v,))
    adjoint = grad(solver(y0, t).ys, y0, w)[0]
    left, right = (tangent.detach() * w).sum(), adjoint @ v
    assert float(left) == pytest.approx(float(right), rel=1e-12)


@pytest.mark.parametrize("keywords", [{"step_size": 0.1}, {"rtol": 1e-5, "atol": 1e-7}])
def test_other_jacobians_give_the_same(keywords):
    """Blocks of independent samples and products alone, against one dense matrix."""
    y0 = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.3, -0.1]], dtype=D, requires_grad=True)
    found = {}
    for jacobian in ("dense", "block", "matrix-free"):
        solution, gradients = solve_and_differentiate(
            VanDerPol(4.0), y0, times(0.0, 1.0), method="radau5", jacobian=jacobian, **keywords
        )
        found[jacobian] = (solution.ys[-1], *gradients)
        stats = solution.stats
        assert (stats.krylov > 0) == (stats.backward.krylov > 0) == (jacobian == "matrix-free")
        assert (stats.jacobians > 0) == (stats.factorizations > 0) == (jacobian != "matrix-free")
    assert difference(found["block"], found["dense"]) < 1e-12
    # Adaptive steps are solved to the tolerances, products to 1e-5.
    within = 1e-10 if "step_size" in keywords else 1e-6
    assert difference(found["matrix-free"], found["dense"]) < within


def test_block_is_compared_with_a_product():
    coupled = lambda t, y: -y + y.flip(0)  # noqa: E731
    solver = pnode.Solver(coupled, method="gauss4", step_size=0.5, jacobian="block")
    with pytest.raises(pnode.ConfigurationError, match="couples them"):
        solver(torch.eye(2, dtype=D), times(0.0, 1.0))


@every
def test_mass_matrix_is_the_field_times_its_inverse(name):
    M = torch.tensor([[2.0, 0.5], [0.0, 1.5]], dtype=D)
    inverse, field, y0, t = torch.linalg.inv(M), VanDerPol(2.0), start(1.0, 0.3), times(0.0, 1.0)
    keywords = {"method": name, "step_size": 0.25, "petsc_options": TIGHT}
    y = pnode.Solver(field, mass=M, **keywords)(y0, t).ys[-1]
    other = pnode.Solver(
        lambda t, y: inverse @ field(t, y), params=[field.mu], **keywords
    )(y0, t).ys[-1]  # fmt: skip
    assert difference([y], [other]) < 1e-12
    found, expected = (grad(end.square().sum(), [y0, field.mu]) for end in (y, other))
    assert difference(found, expected) < 1e-11


@pytest.mark.parametrize("keywords", [{"step_size": 0.5}, {"rtol": 1e-7, "atol": 1e-11}])
def test_differential_algebraic_equation(keywords):
    """Robertson with the sum of the concentrations as an equation, against the ODE."""
    t, y0 = times(0.0, 10.0), start(1.0, 0.0, 0.0)
    ode, dae = Robertson(), Robertson(algebraic=True)
    one = pnode.Solver(ode, method="radau5", **keywords)(y0, t).ys[-1]
    mass = torch.tensor([1.0, 1.0, 0.0], dtype=D)
    other = pnode.Solver(dae, mass=mass, method="radau5", **keywords)(y0, t).ys[-1]
    assert abs(float(other.detach().sum()) - 1.0) < 1e-14
    within = 1e-9 if "step_size" in keywords else 1e-6
    assert difference([other], [one]) < within
    found, expected = grad(other[1], dae.rates)[0], grad(one[1], ode.rates)[0]
    assert difference([found * ode.rates], [expected * ode.rates]) < within


# ------------------------------------------------------------------------------ adaptive radau5


def recorded_grid(ys):
    node = ys.grad_fn
    while not hasattr(node, "runs"):
        node = node.next_functions[0][0]
    steps = node.runs.only().sweep.trajectory.steps
    return [(step.start, step.length) for step in steps]


def test_adaptive_gradient_equals_autograd_through_the_steps_taken():
    """With tight Newton to 1e-9, which is what the replica's own Newton leaves."""
    field, y0 = VanDerPol(10.0), start(2.0, 0.0)
    keywords = {"method": "radau5", "rtol": 1e-4, "atol": 1e-6}
    ys = pnode.Solver(field, petsc_options=TIGHT, **keywords)(y0, times(0.0, 1.0)).ys
    y = y0
    for s, h in recorded_grid(ys):
        y = coupled_step(field, find_method("radau5").scheme, s, h, y)
    assert difference([ys[-1]], [y]) < 1e-10
    found, expected = (grad(end[0], [y0, field.mu]) for end in (ys[-1], y))
    assert difference(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("field", "y0", "end"),
    [(Robertson(), (1.0, 0.0, 0.0), 1.0), (VanDerPol(50.0), (2.0, -0.01), 10.0)],
    ids=["Robertson", "van der Pol"],
)
def test_adaptive_gradient_by_finite_differences(field, y0, end):
    (parameter,) = field.parameters()
    y0, t = start(*y0), times(0.0, end)
    solver = pnode.Solver(field, method="radau5", rtol=1e-9, atol=1e-13)
    found = grad(solver(y0, t).ys[-1][0], parameter)[0].reshape(-1)[0]
    values, eps = [], 1e-3
    with torch.no_grad():
        entry = parameter.reshape(-1)[:1]
        base = entry.clone()
        for sign in (1, -1, 2, -2):
            entry.copy_(base * (1.0 + sign * eps))
            values.append(float(solver(y0, t).ys[-1][0]))
        entry.copy_(base)
    up, down, far, back = values
    expected = (8.0 * (up - down) - (far - back)) / (12.0 * eps * float(base))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_default_newton_tolerance_hardly_changes_the_gradient():
    """Newton's method leaves sqrt(rtol) of the tolerance: far less than the discretisation."""
    field, y0, t = Robertson(), start(1.0, 0.0, 0.0), times(0.0, 40.0)
    keywords = {"method": "radau5", "rtol": 1e-5, "atol": 1e-9, "component": 0}
    _, usual = solve_and_differentiate(field, y0, t, **keywords)
    _, tight = solve_and_differentiate(field, y0, t, petsc_options=TIGHT, **keywords)
    _, exact = solve_and_differentiate(field, y0, t, **keywords | {"rtol": 1e-9, "atol": 1e-13})
    assert difference(usual, tight) < 1e-5
    assert difference(usual, exact) < 1e-4


def test_jacobians_are_kept_and_errors_follow_the_tolerance():
    field, y0, t = Robertson(), torch.tensor([1.0, 0.0, 0.0], dtype=D), times(0.0, 4e3)
    ends = []
    for rtol in (1e-4, 1e-6, 1e-8):
        with torch.no_grad():
            solution = pnode.Solver(field, method="radau5", rtol=rtol, atol=1e-4 * rtol)(y0, t)
        stats = solution.stats
        ends.append(solution.ys[-1])
        assert stats.jacobians < 0.6 * stats.steps
        assert stats.rhs < 10 * (stats.steps + stats.rejected)
    assert difference([ends[0]], [ends[2]]) < 1e-3
    assert difference([ends[1]], [ends[2]]) < 1e-5


def test_rejected_and_failed_steps_are_reported():
    """y' = y^2 has a pole at 1: the steps shrink until no shorter one is left."""
    solver = pnode.Solver(lambda t, y: y * y, method="radau5", min_step=1e-6)
    with pytest.raises(pnode.StepSizeUnderflow, match="min_step"):
        solver(torch.ones(1, dtype=D), times(0.0, 2.0))
    nan = pnode.Solver(lambda t, y: torch.sqrt(0.5 - t) * y, method="radau5", min_step=1e-4)
    with pytest.raises(pnode.NonFiniteVectorField):
        nan(torch.ones(1, dtype=D), times(0.0, 2.0))
    hard = pnode.Solver(
        lambda t, y: torch.exp(20.0 * y), method="gauss4", step_size=1.0,
    )  # fmt: skip
    with pytest.raises(pnode.SolveError):
        hard(torch.ones(1, dtype=D), times(0.0, 1.0))


def test_fixed_steps_that_defeat_simplified_newton_are_solved():
    """With each stage's own Jacobian: the same as with steps that do not."""
    field, y0 = (lambda t, y: -(y**5)), start(3.0)
    for jacobian in ("dense", "matrix-free"):
        solver = pnode.Solver(field, method="radau5", step_size=1.0, jacobian=jacobian)
        solution = solver(y0, times(0.0, 1.0))
        y = coupled_step(field, find_method("radau5").scheme, 0.0, 1.0, y0)
        assert difference([solution.ys[-1]], [y]) < 1e-9
        found, expected = (grad(end.sum(), y0) for end in (solution.ys[-1], y))
        assert difference(found, expected) < 1e-8


# ---------------------------------------------------------------- checkpoints, and what else is


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_over_checkpoint_schedules(name, tmp_path):
    field, y0, t = VanDerPol(5.0), start(2.0, 0.0), times(0.0, 1.0, 2.0)
    limits = {
        "all": None,
        "few": "200B",
        "solutions": pnode.Checkpointing(memory="100B", store="solutions"),
        "disk": pnode.Checkpointing(memory="150B", disk=tmp_path),
    }
    found = {
        key: solve_and_differentiate(
            field, y0, t, method=name, step_size=0.125, checkpointing=limit
        ) for key, limit in limits.items()
    }  # fmt: skip
    assert found["few"][0].stats.backward.recomputed > 0
    for solution, gradients in found.values():
        assert torch.equal(solution.ys, found["all"][0].ys)
        for one, other in zip(gradients, found["all"][1], strict=True):
            assert torch.equal(one, other)


def test_same_bits_over_checkpoint_schedules_of_adaptive_steps():
    """Steps start afresh where some are to be repeated; without limits, with reproducible=True."""
    field, y0, t = VanDerPol(10.0), start(2.0, 0.0), times(0.0, 3.0, 12.0)
    limits = [
        pnode.Checkpointing(reproducible=True),
        "300B",
        pnode.Checkpointing(memory="1kB", reproducible=True),
    ]
    found = [
        solve_and_differentiate(
            field, y0, t, method="radau5", rtol=1e-4, atol=1e-6, checkpointing=limit
        ) for limit in limits
    ]  # fmt: skip
    assert found[1][0].stats.backward.recomputed > 0
    assert found[0][0].stats.rejected > 0
    for solution, gradients in found[1:]:
        assert torch.equal(solution.ys, found[0][0].ys)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.equal(one, other)


def test_second_backward_repeats_adaptive_steps_bit_by_bit():
    """With the attempts that failed between them, and the Jacobians that were kept."""
    field, y0 = VanDerPol(20.0), start(2.0, 0.0)
    solution = pnode.Solver(field, method="radau5", rtol=1e-4, atol=1e-6)(y0, times(0.0, 20.0))
    assert solution.stats.rejected > 0
    loss = solution.ys[-1][0]
    first = grad(loss, [y0, field.mu], retain_graph=True)
    second = grad(loss, [y0, field.mu])
    assert all(map(torch.equal, first, second))
    assert solution.stats.backward.recomputed == solution.stats.steps


@pytest.mark.parametrize("keywords", [
    {"method": "gauss4", "step_size": 0.1}, {"method": "radau5", "rtol": 1e-6},
    {"method": "gauss4", "step_size": 0.1, "jacobian": "matrix-free"},
    {"method": "gauss4", "step_size": 0.1, "mass": torch.tensor([[1.0, 0.3], [0.0, 2.0]], dtype=D)},
])  # fmt: skip
def test_derivatives_of_second_order_and_tangents(keywords):
    """Of systems that are solved directly, and by products."""
    field, y0, t = VanDerPol(2.0), start(1.0, 0.5), times(0.0, 1.0)
    solver = pnode.Solver(field, petsc_options=TIGHT, **keywords)
    gradient = grad(solver(y0, t).ys[-1][0], y0, create_graph=True)[0]
    second = grad(gradient[1], [y0, field.mu])
    eps = 1e-4
    moved = []
    for sign in (1.0, -1.0):
        y = (y0.detach() + sign * eps * torch.tensor([1.0, 0.0], dtype=D)).requires_grad_()
        moved.append(grad(solver(y, t).ys[-1][0], y)[0][1])
    expected = (moved[0] - moved[1]) / (2.0 * eps)
    assert float(second[0][0]) == pytest.approx(float(expected), rel=1e-6)
    forward, adjoint = (
        pnode.sensitivities(solver, y0.detach(), t, wrt=("y0", "mu"), mode=mode)
        for mode in ("forward", "adjoint")
    )
    for key in ("y0", "mu"):
        assert difference([forward[key][-1]], [adjoint[key][-1]]) < 1e-10


@pytest.mark.parametrize("keywords", [{"method": "gauss6", "step_size": 0.1}, {"method": "radau5"}])
def test_cost_integrals(keywords):
    field, y0, t = VanDerPol(2.0), start(1.0, 0.5), times(0.0, 0.5, 1.0)
    cost = lambda t, y: (y**2).sum() * torch.cos(t)  # noqa: E731
    solution = pnode.Solver(field, cost=cost, **keywords)(y0, t)
    plain = pnode.Solver(field, **keywords)(y0, t)
    assert difference([solution.ys], [plain.ys]) < (1e-11 if "step_size" in keywords else 1e-7)
    accurate = pnode.Solver(field, cost=cost, method="dopri8", rtol=1e-11, atol=1e-12)(y0, t)
    found, expected = (
        [one.costs[-1], *grad(one.costs[-1], [y0, field.mu])] for one in (solution, accurate)
    )
    assert difference(found, expected) < 1e-5


def test_events_and_dense_output():
    field, y0, t = VanDerPol(2.0), start(1.0, 0.5), torch.linspace(0.0, 3.0, 13, dtype=D)
    for keywords in ({"method": "radau5", "rtol": 1e-8}, {"method": "gauss6", "step_size": 0.05}):
        accurate = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12}
        ends = []
        for options in (keywords, accurate):
            solver = pnode.Solver(field, event_fn=lambda t, y: y[0] - 0.2, **options)
            solution = solver(y0, t)
            assert solution.reason == "event"
            ends.append([solution.ts[-1], *grad(solution.ts[-1], [y0, field.mu])])
        assert difference(*ends) < 1e-5
        dense = [pnode.Solver(field, dense=True, **options)(y0, t).ys
                 for options in (keywords, accurate)]  # fmt: skip
        assert difference([dense[0]], [dense[1]]) < 1e-3
        found, expected = (grad(ys[5].sum(), [y0, field.mu]) for ys in dense)
        assert difference(found, expected) < 1e-2


def test_float32_and_tuples():
    field = lambda t, y: (y[1], -5.0 * y[0])  # noqa: E731
    x = torch.ones(2, dtype=torch.float32, requires_grad=True)
    for keywords in ({"method": "radau5", "rtol": 1e-5, "atol": 1e-6},
                     {"method": "gauss6", "step_size": 0.2}):  # fmt: skip
        solution = pnode.Solver(field, **keywords)((x, torch.zeros(2)), torch.tensor([0.0, 1.0]))
        exact = float(torch.cos(torch.tensor(5.0**0.5)))
        assert solution.ys[0].dtype is torch.float32
        assert solution.ys[0][-1].tolist() == pytest.approx([exact, exact], abs=1e-4)
        assert grad(solution.ys[0][-1].sum(), x)[0].tolist() == pytest.approx([exact] * 2, abs=1e-4)


def test_decreasing_times_and_batches_of_gradients():
    field, y0 = VanDerPol(1.0), start(1.0, 0.5)
    ys = pnode.Solver(field, method="radau5", rtol=1e-9, atol=1e-11)(y0, times(1.0, 0.0)).ys
    back = pnode.Solver(field, method="radau5", rtol=1e-9, atol=1e-11)(ys[-1], times(0.0, 1.0)).ys
    assert difference([back[-1]], [y0]) < 1e-7
    rows = grad(ys[-1], y0, torch.eye(2, dtype=D), is_grads_batched=True, retain_graph=True)[0]
    for row, end in zip(rows, ys[-1], strict=True):
        assert difference([row], grad(end, y0, retain_graph=True)) < 1e-12


class Spread(torch.nn.Module):
    """A reaction that diffuses along a line, in a forcing that depends on time."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([40.0, 3.0], dtype=D))

    def forward(self, t, u):
        padded = torch.nn.functional.pad(u, (1, 1))
        spread = padded[..., 2:] - 2.0 * u + padded[..., :-2]
        return self.rates[0] * spread + self.rates[1] * u * (1.0 - u) * (1.0 + t)


LINE = torch.linspace(0.0, 1.0, 60, dtype=D)
NEXT = torch.diag(torch.ones(59, dtype=D), 1)
MASSES = {
    "none": None, "diagonal": 1.0 + LINE,
    "sparse": (4.0 * torch.eye(60, dtype=D) + NEXT + NEXT.T).to_sparse(),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mass"), [
    ("radau5", "none"), ("radau5", "sparse"), ("radau3", "diagonal"), ("gauss4", "sparse"),
    ("gauss6", "none"),
])  # fmt: skip
def test_sparse_jacobians(name, mass):
    """The steps and gradients of dense ones: a real and a complex sparse matrix, one for all."""
    keywords = {"method": name, "mass": MASSES[mass], "compile": False}
    keywords |= {"rtol": 1e-4, "atol": 1e-6} if name == "radau5" else {"step_size": 0.1}
    u0, runs, field = (-30.0 * (LINE - 0.5) ** 2).exp().requires_grad_(), [], Spread()
    for jacobian in ("dense", "sparse"):
        solver = pnode.Solver(field, jacobian=jacobian, **keywords)
        solution = solver(u0, times(0.0, 0.2, 0.3))
        found = grad(solution.ys[1:].square().sum(), [u0, *field.parameters()])
        runs.append((solution.ys.detach(), *found, solution.stats))
    (*expected, dense), (*found, sparse) = runs
    assert (sparse.steps, sparse.newton) == (dense.steps, dense.newton)
    assert sparse.krylov == 0 and "colors=3" in repr(solver)
    assert difference(found, expected) < 1e-12


def elsewhere(jacobian):
    """Derivatives, a tuple, float32 and an event with one kind of Jacobian; backwards in time."""
    field, u0, t = Spread(), (-30.0 * (LINE - 0.5) ** 2).exp()[:12], times(0.1, 0.0)
    keywords = {"method": "gauss4", "compile": False, "jacobian": jacobian, "step_size": 0.05}
    solve = pnode.Solver(field, cost=lambda t, u: u.sum(), **keywords)
    u = u0.clone().requires_grad_()
    solution = solve(u, t)
    (slope,) = grad(solution.costs[-1] + solution.ys[-1].sum(), u, create_graph=True)
    (curvature,) = grad(slope.square().sum(), u)
    tangent = torch.func.jvp(lambda u: solve(u, t).ys[-1], (u0,), (LINE[:12],))[1]
    pair = pnode.Solver(lambda t, y: (field(t, y[0]), -y[1]), params=field.parameters(), **keywords)
    both = pair((u0, u0[:3]), t.flip(0)).ys
    until = pnode.Solver(field, event_fn=lambda t, u: u.max() - 0.1, rtol=1e-4,
                         **keywords | {"method": "radau5", "step_size": None})  # fmt: skip
    end = until(u, times(0.0, 3.0))
    assert end.reason == "event"
    moved = grad(end.event_time, u)[0]
    single = pnode.Solver(field.float(), **keywords)(u0.float(), t.flip(0)).ys.double()
    return [slope, curvature, tangent, *both, moved, single]


def test_a_sparse_jacobian_elsewhere():
    """Backwards in time, in tuples and float32, for second derivatives, costs and events."""
    found, expected = elsewhere("sparse"), elsewhere("dense")
    assert difference(found[:-1], expected[:-1]) < 1e-8
    assert difference(found[-1:], expected[-1:]) < 1e-5
    solver = pnode.Solver(
        Spread(), method="radau5", jacobian="sparse", jacobian_pattern=torch.eye(12, dtype=D)
    )
    with pytest.raises(pnode.ConfigurationError, match="misses entries"):
        solver(LINE[:12], times(0.0, 0.1))


def test_a_singular_sparse_system():
    """Or one that is not finite: no numbers, and Newton's method fails."""
    factors = SparseFactors(torch.arange(3), torch.arange(3), torch.tensor([1.0, 0.0, 2.0]))
    assert bool(factors.singular) and bool(factors.solve(torch.ones(2, 3)).isnan().all())
    for value in (torch.nan, torch.inf):
        assert bool(SparseFactors(*[torch.arange(1)] * 2, torch.tensor([value])).singular)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "gauss4"}, "no error estimate"),
        ({"method": "radau3"}, "no error estimate"),
        ({"method": "radau5", "jacobian": "sparse", "jacobian_reuse": "step"}, "'sparse' or"),
        ({"method": "radau5", "jacobian": "matrix-free", "preconditioner": "dense"},
         "preconditioner"),
        ({"method": "radau5", "jacobian_reuse": "constant"}, "jacobian_reuse"),
        ({"method": "radau5", "linear_solver": "lu"}, "has no effect"),
        ({"method": "radau5", "petsc_options": {"ts_adapt_type": "dsp"}}, "has no effect"),
        ({"method": "radau5", "controller": "dsp"}, "controller"),
    ],
)  # fmt: skip
def test_refusals(keywords, message):
    with pytest.raises(pnode.ConfigurationError, match=message):
        pnode.Solver(VanDerPol(), **keywords)(start(1.0, 0.0), times(0.0, 1.0))


def test_taking_up_again_is_for_fixed_steps(tmp_path):
    limit = pnode.Checkpointing(memory="1kB", disk=tmp_path, resume="run")
    field, y0, t = VanDerPol(2.0), start(1.0, 0.5), times(0.0, 1.0)
    with pytest.raises(pnode.ConfigurationError, match="adaptive radau5"):
        pnode.Solver(field, method="radau5", checkpointing=limit)(y0, t)
    keywords = {"method": "radau5", "step_size": 0.1}
    _, found = solve_and_differentiate(field, y0, t, checkpointing=limit, **keywords)
    assert all(map(torch.equal, found, solve_and_differentiate(field, y0, t, **keywords)[1]))


def test_residuals_are_refused():
    with pytest.raises(pnode.ConfigurationError, match="residual="):
        pnode.Solver(residual=lambda t, y, rate: rate - y, method="radau5")


def test_compiled_fields_behind_steps_of_python():
    """The steps stay as they are; f and its products are compiled."""
    field, y0, t = VanDerPol(2.0), start(1.0, 0.5), times(0.0, 1.0)
    found = [
        solve_and_differentiate(field, y0, t, method="gauss4", step_size=0.2, compile=compiled)
        for compiled in (False, True)
    ]
    assert difference([found[1][0].ys], [found[0][0].ys]) < 1e-13
    assert difference(found[1][1], found[0][1]) < 1e-11


def test_gmres_has_the_same_bits_each_time():
    """Wherever its tensors lie: a repeated step is the recorded one."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(9, 9, generator=generator, dtype=torch.float64) + 5.0 * torch.eye(9)
    b = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    kept, found = [], []
    for size in range(1, 60):
        kept.append(torch.empty(size))
        found.append(gmres(lambda v: (A @ v.flatten()).view(3, 3), b, ALONE, 1e-13)[0])
    assert all(torch.equal(x, found[0]) for x in found)
    torch.testing.assert_close((A @ found[0].flatten()).view(3, 3), b, rtol=1e-12, atol=1e-12)

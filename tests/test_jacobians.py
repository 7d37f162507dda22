"""Kinds of Jacobian and their reuse: the same numbers, at the promised cost, or a clear error."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch

import pnode
from pnode.base.options import PETSc, log_stage
from pnode.base.ranks import ALONE
from pnode.errors import ConfigurationError, LinearSolveFailed, NonFiniteVectorField
from pnode.field import linearization
from pnode.solvers.linear.dense import DenseAssembly
from pnode.solvers.linear.direct import DirectSolves
from pnode.solvers.linear.jacobians import Jacobian
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.methods import METHODS
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.library import color_columns

D = torch.float64
TIGHT = {"snes_rtol": 1e-15, "snes_stol": 1e-15}
T = [0.0, 0.3, 1.0]


class Field(torch.nn.Module):
    """Acts on each row of y by itself; not linear, not autonomous."""

    def __init__(self, width=3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=D) * 0.6)

        self.inner, self.outer = weight(width, 5), weight(5, width)

    def forward(self, t, y):
        return torch.tanh(y @ self.inner) @ self.outer * torch.cos(t) - 3.0 * y


class Residual(Field):
    """(1 + y^2 / 10) y' - f(t, y)."""

    def forward(self, t, y, yp):
        return (1.0 + 0.1 * y * y) * yp - super().forward(t, y)


def initial(batch=4, width=3, dtype=D):
    generator = torch.Generator().manual_seed(5)
    y0 = torch.randn(batch, width, generator=generator, dtype=D).to(dtype)
    return y0.requires_grad_()


MASS = torch.linspace(0.5, 1.5, 12, dtype=D)
# method, arguments of the problem
CASES = {
    "cn": ("cn", lambda: {"rhs": Field()}),
    "es325": ("es325", lambda: {"rhs": Field()}),
    "ark4": ("ark4", lambda: {"implicit": Field(), "explicit": lambda t, y: -torch.sin(y) * t}),
    "beuler-mass": ("beuler", lambda: {"rhs": Field(), "mass": MASS}),
    "cn-mass": ("cn", lambda: {"rhs": Field(), "mass": MASS}),
    "beuler-residual": ("beuler", lambda: {"residual": Residual()}),
}
KINDS = {
    "block": {"jacobian": "block"},
    "sparse": {"jacobian": "sparse"},
    "sparse-ilu": {"jacobian": "sparse", "linear_solver": {
        "ksp_type": "gmres", "ksp_rtol": 1e-13, "pc_type": "ilu"}},
    "block-gmres": {"jacobian": "block", "linear_solver": "gmres"},
    "block-lu": {"jacobian": "block", "linear_solver": "lu"},
    "matrix-free+dense": {"jacobian": "matrix-free", "preconditioner": "dense"},
    "matrix-free+block": {"jacobian": "matrix-free", "preconditioner": "block"},
    "matrix-free+sparse": {"jacobian": "matrix-free", "preconditioner": "sparse"},
    "dense-step": {"jacobian": "dense", "jacobian_reuse": "step"},
    "dense-solve": {"jacobian": "dense", "jacobian_reuse": "solve"},
    "block-step": {"jacobian": "block", "jacobian_reuse": "step"},
    "sparse-solve": {"jacobian": "sparse", "jacobian_reuse": "solve"},
    "matrix-free+block-step": {
        "jacobian": "matrix-free", "preconditioner": "block", "jacobian_reuse": "step"},
}  # fmt: skip


def solve(method, problem, y0, t=T, step=0.1, **keywords):
    """Return the solution, and it with its gradients as a list of tensors."""
    options = keywords.pop("petsc_options", TIGHT)
    solver = pnode.Solver(
        method=method, step_size=step, petsc_options=options, **problem, **keywords
    )
    solution = solver(y0, torch.tensor(t, dtype=D))
    loss = solution.ys[1:].square().sum() + solution.ys[1].sum()
    inputs = [y0, *(p for p in solver.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, inputs)
    return solution, [solution.ys.detach(), *found]


def difference(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_dense(kind, case):
    method, problem = CASES[case]
    _, expected = solve(method, problem(), initial(), jacobian="dense")
    solution, ours = solve(method, problem(), initial(), **KINDS[kind])
    assert difference(ours, expected) < 1e-9
    assert solution.stats.jacobians > 0
    assert solution.stats.backward.jacobians > 0


@pytest.mark.parametrize("kind", ["block", "sparse", "matrix-free+sparse", "dense-step"])
def test_equals_dense_with_decreasing_times(kind):
    t = [1.0, 0.6, 0.2]
    _, expected = solve("cn", {"rhs": Field()}, initial(), t=t, jacobian="dense")
    _, ours = solve("cn", {"rhs": Field()}, initial(), t=t, **KINDS[kind])
    assert difference(ours, expected) < 1e-9


@pytest.mark.parametrize("kind", ["block", "sparse", "matrix-free+block", "dense-step"])
def test_adaptive_steps_equal_dense(kind):
    def run(**keywords):
        field, y0 = Field(), initial()
        solver = pnode.Solver(
            field, method="es325", rtol=1e-6, atol=1e-8, petsc_options=TIGHT, **keywords
        )
        ys = solver(y0, torch.tensor(T, dtype=D)).ys
        return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, field.inner])]

    # Step sizes come from differences of states, which amplify round-off.
    assert difference(run(**KINDS[kind]), run(jacobian="dense")) < 1e-8


@pytest.mark.parametrize("kind", ["block", "sparse", "dense-step", "matrix-free+sparse"])
def test_float32(kind):
    keywords = KINDS[kind] | {"petsc_options": None}
    _, expected = solve("cn", {"rhs": Field()}, initial(), jacobian="dense")
    _, ours = solve("cn", {"rhs": Field().float()}, initial(dtype=torch.float32), **keywords)
    assert all(tensor.dtype is torch.float32 for tensor in ours)
    # f rounds to 6e-8; a few dozen evaluations and a conditioning of order one.
    assert difference([tensor.double() for tensor in ours], expected) < 1e-5


def test_block_of_single_numbers_and_of_longer_shapes():
    for shape in ((6,), (3, 2, 2)):
        y0 = torch.linspace(0.1, 1.0, 12, dtype=D)[: int(np.prod(shape))].view(shape)
        y0 = y0.clone().requires_grad_()
        field = {"rhs": lambda t, y: torch.cos(t) * y.sin() - y**3}
        _, expected = solve("cn", field, y0, jacobian="dense")
        _, ours = solve("cn", field, y0, jacobian="block")
        assert difference(ours, expected) < 1e-12


def mass_matrix(kind):
    """M couples neighbours inside of each row of (4, 3)."""
    tridiagonal = torch.eye(3, dtype=D) + 0.2 * torch.diag(torch.ones(2, dtype=D), 1)
    dense = torch.block_diag(*[tridiagonal] * 4)
    return dense if kind == "dense" else dense.to_sparse()


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["block", "sparse", "matrix-free+block", "matrix-free+sparse"])
def test_mass_matrix(kind, layout):
    _, expected = solve(
        "cn", {"rhs": Field(), "mass": mass_matrix("dense")}, initial(), jacobian="dense"
    )
    problem = {"rhs": Field(), "mass": mass_matrix(layout)}
    _, ours = solve("cn", problem, initial(), **KINDS[kind])
    assert difference(ours, expected) < 1e-9


@pytest.mark.parametrize("jacobian", ["sparse", "dense"])
def test_singular_mass_matrix(jacobian):
    """Robertson's kinetics with the conservation law as third equation."""

    def f(t, y):
        a, b, c = y
        r, s = 0.04 * a - 1e4 * b * c, 3e7 * b * b
        return torch.stack([-r, r - s, a + b + c - 1.0])

    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    solver = pnode.Solver(
        f, mass=torch.tensor([1.0, 1.0, 0.0], dtype=D), method="beuler", step_size=0.01,
        jacobian=jacobian,
    )  # fmt: skip
    with torch.no_grad():
        y = solver(y0, [0.0, 0.4]).ys[-1]
    # Hairer & Wanner's end value at 0.4, to the accuracy of 40 steps of order one.
    assert y[0].item() == pytest.approx(0.98517, abs=2e-4)
    assert y.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_tuple_state_with_a_sparse_jacobian():
    def f(t, y):
        a, b = y
        return -a * b.sum(), torch.stack([a.sum() * t, -b[1]])

    y0 = (torch.ones(3, dtype=D), torch.tensor([0.5, 0.2], dtype=D))
    results = [
        pnode.Solver(f, method="cn", step_size=0.1, jacobian=kind)(y0, [0.0, 1.0]).ys
        for kind in ("dense", "sparse")
    ]
    for dense, sparse in zip(*results, strict=True):
        assert torch.allclose(dense, sparse, rtol=1e-10)


def test_field_that_torch_cannot_batch():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return g * 3 * ctx.saved_tensors[0] ** 2

    def field(t, y):
        return -Cube.apply(y)

    _, expected = solve("cn", {"rhs": lambda t, y: -(y**3)}, initial(), jacobian="dense")
    for kind in ("block", "sparse"):
        _, ours = solve("cn", {"rhs": field}, initial(), jacobian=kind)
        assert difference(ours, expected) < 1e-12


# -------------------------------------------------------------------------------- block: counts


def count_backward_seeds(monkeypatch):
    """Collect how many rows each batch of products has."""
    rows = []
    original = linearization.batched

    def batched(ends, inputs, seeds):
        rows.append(len(seeds[0]))
        return original(ends, inputs, seeds)

    monkeypatch.setattr(linearization, "batched", batched)
    return rows


@pytest.mark.parametrize(("jacobian", "products"), [("dense", 12), ("block", 4), ("sparse", 4)])
def test_products_per_assembly(jacobian, products, monkeypatch):
    rows = count_backward_seeds(monkeypatch)
    solver = pnode.Solver(Field(), method="cn", step_size=0.1, jacobian=jacobian)
    with torch.no_grad():
        stats = solver(initial(), [0.0, 1.0]).stats
    # One product of each checks the others; three Jacobians give the pattern.
    assert rows.count(products) == stats.jacobians
    assert set(rows) == {products} | ({12} if jacobian == "sparse" else set())


def test_stats_count_assemblies_and_not_their_checks():
    stats = {}
    for jacobian in ("dense", "block", "sparse"):
        solution, _ = solve(
            "cn", {"rhs": Field()}, initial(), jacobian=jacobian, jacobian_reuse="iteration"
        )
        stats[jacobian] = solution.stats
    assert stats["block"].jacobians == stats["block"].newton
    assert stats["block"].rhs == stats["dense"].rhs
    assert stats["block"].vjp == stats["sparse"].vjp == 0
    assert stats["block"].backward.vjp == stats["dense"].backward.vjp
    # Detection looks at two states besides the first.
    assert stats["sparse"].rhs == stats["dense"].rhs + 2


# --------------------------------------------------------------------------- block: what it refuses


class Coupled(Field):
    def forward(self, t, y):
        return super().forward(t, y) + 0.1 * y.mean(0)


@pytest.mark.parametrize("keywords", [KINDS["block"], KINDS["matrix-free+block"]])
def test_coupled_samples_are_refused(keywords):
    solver = pnode.Solver(Coupled(), method="cn", step_size=0.1, **keywords)
    with pytest.raises(ConfigurationError, match=r"jacobian='block'.*couples.*jacobian='dense'"):
        solver(initial(), [0.0, 1.0])
    # The solver still works for a field that is right.
    solver.rhs = Field()
    assert solver(initial(), [0.0, 1.0]).stats.steps == 10


class Switched(torch.nn.Module):
    """Couples far entries, and so samples, only within a window of times."""

    def __init__(self, far=3, window=(0.31, 0.71)):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=D))
        self.far, self.window = far, window

    def forward(self, t, y):
        on = ((t > self.window[0]) & (t < self.window[1])).to(y)
        far = torch.roll(y.reshape(-1), self.far).view_as(y)
        return (-3.0 * self.rates * y.reshape(-1)).view_as(y) + 2.0 * on * far.square()


@pytest.mark.parametrize("method", ["cn", "ra34pw2", "rodaspr", "radau5", "bdf2"])
@pytest.mark.parametrize("until", [0.71, 2.0])
def test_entries_that_appear_within_a_sweep(method, until):
    """Neither at the first assembly of the forward sweep nor, perhaps, of the backward one."""
    options = {"method": method, "step_size": 0.1, "petsc_options": TIGHT}
    field, found = Switched(window=(0.31, until)), []
    for jacobian in ("dense", "sparse"):
        y0 = torch.linspace(1.0, 2.0, 8, dtype=D).requires_grad_()
        ys = pnode.Solver(field, jacobian=jacobian, compile=False, **options)(y0, T).ys
        found.append([ys, *torch.autograd.grad(ys[-1].square().sum(), [y0, field.rates])])
    for dense, sparse in zip(*found, strict=True):
        assert torch.allclose(dense, sparse, rtol=1e-10)


def test_pattern_that_misses_entries_later_is_refused():
    solver = pnode.Solver(
        Switched(), method="cn", step_size=0.1, jacobian="sparse",
        jacobian_pattern=torch.eye(8, dtype=D),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"misses entries.*jacobian_pattern="):
        solver(torch.linspace(1.0, 2.0, 8, dtype=D), T)


@pytest.mark.parametrize("method", ["cn", "ra34pw2", "radau5", "bdf2"])
def test_samples_that_couple_later_are_refused(method):
    y0 = torch.linspace(1.0, 2.0, 8, dtype=D).view(4, 2)
    solver = pnode.Solver(Switched(), method=method, step_size=0.1, jacobian="block")
    with pytest.raises(ConfigurationError, match=r"jacobian='block'.*couples"):
        solver(y0, T)


def test_coupled_residual_is_refused():
    def residual(t, y, yp):
        return yp + 0.1 * yp.mean(0) + y

    solver = pnode.Solver(residual=residual, method="beuler", step_size=0.1, jacobian="block")
    with pytest.raises(ConfigurationError, match="couples"):
        solver(initial(), [0.0, 1.0])


@pytest.mark.parametrize("y0", [torch.tensor(1.0, dtype=D), (torch.ones(2, 2, dtype=D),) * 2])
def test_state_without_samples_is_refused(y0):
    solver = pnode.Solver(lambda t, y: y, method="cn", step_size=0.1, jacobian="block")
    with pytest.raises(ConfigurationError, match=r"shape \(B, ...\).*jacobian='sparse'"):
        solver(y0, [0.0, 1.0])


def test_mass_that_couples_samples_is_refused():
    mass = torch.eye(12, dtype=D)
    mass[0, 11] = 0.1
    solver = pnode.Solver(Field(), mass=mass, method="cn", step_size=0.1, jacobian="block")
    with pytest.raises(ConfigurationError, match="mass couples the 4 samples"):
        solver(initial(), [0.0, 1.0])


def test_block_with_another_preconditioner_is_refused():
    solver = pnode.Solver(
        Field(), method="cn", step_size=0.1, jacobian="block", linear_solver={"pc_type": "ilu"}
    )
    with pytest.raises(ConfigurationError, match=r"pc_type='ilu'.*jacobian='sparse'"):
        solver(initial(), [0.0, 1.0])


@pytest.mark.parametrize("kind", ["block", "sparse", "dense", "matrix-free+block"])
def test_singular_matrix(kind):
    """Crank-Nicolson with h = 0.1 solves with 20 - J: one sample has J = 20."""
    rates = torch.tensor([[1.0], [20.0], [3.0]], dtype=D)
    keywords = KINDS.get(kind, {"jacobian": kind})
    solver = pnode.Solver(lambda t, y: rates * y, method="cn", step_size=0.1, **keywords)
    with pytest.raises(LinearSolveFailed) as caught:
        solver(torch.ones(3, 1, dtype=D), [0.0, 1.0])
    assert caught.value.time == 0.0 and caught.value.step == 0
    if kind == "dense":  # LAPACK's own error, which PETSc does not recover from
        return
    # Adaptive steps go on with another length.
    solver = pnode.Solver(lambda t, y: rates * y, method="cn", first_step=0.1, **keywords)
    assert solver(torch.ones(3, 1, dtype=D), [0.0, 0.2]).ys.isfinite().all()


def alternating(pivot, size=50):
    """A matrix of condition 30 whose rows in turn have this pivot."""
    diagonal = np.where(np.arange(size) % 2, 3.0, pivot)
    return scipy.sparse.diags_array([1.0, diagonal, -1.5], offsets=[-1, 0, 1], shape=(size, size))


@pytest.mark.parametrize("pivot", [1e-13, 3e-16])
@pytest.mark.parametrize("transposed", [False, True])
def test_bad_pivots_of_sparse_lu(pivot, transposed):
    """PETSc takes pivots as they come: refinement mends the first, SuperLU the second."""
    dense = alternating(pivot).toarray()
    csr = alternating(pivot).tocsr()
    matrix = PETSc.Mat().createAIJ(csr.shape, csr=(csr.indptr, csr.indices, csr.data))
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(matrix)
    ksp.setType("preonly")
    ksp.getPC().setType("lu")
    ksp.getPC().setFactorPivot(0.0)
    ksp.setFromOptions()
    b, x = matrix.createVecs()
    b.setArray(np.linspace(1.0, 2.0, 50))
    solve = ksp.solveTranspose if transposed else ksp.solve
    solve(b, x)
    exact = np.linalg.solve(dense.T if transposed else dense, b.getArray())
    assert np.abs(x.getArray() - exact).max() > 1e-9 * np.abs(exact).max()
    solves = DirectSolves()
    assert solves.mend(ksp, b, x, transposed, ALONE)
    assert np.abs(x.getArray() - exact).max() <= 1e-13 * np.abs(exact).max()
    before = x.getArray().copy()
    assert solves.mend(ksp, b, x, transposed, ALONE)
    assert np.array_equal(before, x.getArray())


class Chain(torch.nn.Module):
    """Cells in a row; of every second one the diagonal of shift - J cancels."""

    def __init__(self, shift):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([1.0, 0.3], dtype=D))
        self.own = shift - torch.tensor([3e-13, 3.0], dtype=D).repeat(20)

    def forward(self, t, y):
        p, q = self.p
        flow = p * (y + 0.1 * torch.atan(y))
        pad = torch.nn.functional.pad
        return self.own * y - pad(flow[:-1], (1, 0)) - pad(flow[1:], (0, 1)) + q * torch.cos(t)


@pytest.mark.parametrize("method", ["es325", "ra34pw2"])
def test_steps_with_bad_pivots(method):
    """Nothing corrects solves of Rosenbrock stages and of adjoints: up to 4e-10 was lost."""
    scheme = {one.name: one for one in METHODS}[method].scheme
    gamma = scheme.gamma_diagonal[0] if scheme.gamma_diagonal else scheme.A[-1][-1]
    field, y0 = Chain(2.0 / gamma), torch.linspace(0.5, 1.5, 40, dtype=D).requires_grad_()
    found = []
    for jacobian in ("sparse", "dense"):
        solver = pnode.Solver(field, method=method, step_size=0.5, jacobian=jacobian, compile=False)
        end = solver(y0, [0.0, 1.5]).ys[-1]
        gradients = torch.autograd.grad(end @ torch.linspace(1, 2, 40, dtype=D), [y0, field.p])
        found.append([end.detach(), *gradients])
    for one, two in zip(*found, strict=True):
        assert torch.linalg.norm(one - two) <= 3e-12 * torch.linalg.norm(two)


def test_check_that_did_not_pass_is_made_again():
    """Not of a value that raises, nor of one that is not finite, which differs from none."""
    values = iter([ValueError("not here"), torch.tensor([torch.nan]), torch.ones(1), torch.ones(1)])
    checks = []

    class Assembled(DenseAssembly):
        def evaluate(self, linearizer, point, check):
            checks.append(check)
            found = next(values)
            if isinstance(found, Exception):
                raise found
            return found, None

    jacobian, linearizer = Jacobian(Assembled(), "iteration"), Linearizer()
    point = Point(0.0, torch.ones(1), (0, 0), None)
    for _ in range(4):
        jacobian._fill(linearizer, point)
        linearizer.take_exception()
    assert checks == [True, True, True, False]


@pytest.mark.parametrize("kind", ["block", "sparse", "dense"])
def test_singular_matrix_in_the_adjoint(kind):
    rates = torch.tensor([[1.0], [2.0], [3.0]], dtype=D)
    slopes = rates.clone()

    class Product(torch.autograd.Function):
        """Its value stays what it was, or f would not be the same any more."""

        @staticmethod
        def forward(ctx, y):
            return rates * y

        @staticmethod
        def backward(ctx, w):
            return slopes * w

    solver = pnode.Solver(lambda t, y: Product.apply(y), method="cn", step_size=0.1, jacobian=kind)
    y0 = torch.ones(3, 1, dtype=D, requires_grad=True)
    loss = solver(y0, [0.0, 1.0]).ys[-1].sum()
    slopes[1] = 20.0
    with pytest.raises(LinearSolveFailed, match="transposed"):
        loss.backward()


@pytest.mark.parametrize("kind", ["block", "sparse"])
def test_field_that_is_not_finite(kind):
    def field(t, y):
        return torch.where(t > 0.45, torch.nan, 1.0) * y.sin()

    solver = pnode.Solver(field, method="cn", step_size=0.1, jacobian=kind)
    with pytest.raises(NonFiniteVectorField):
        solver(initial(), [0.0, 1.0])


# ----------------------------------------------------------------------------------------- sparse


def chain(n):
    """Nearest neighbours on a line, nonlinear; its Jacobian has three diagonals."""

    def field(t, y):
        left, right = torch.roll(y, 1), torch.roll(y, -1)
        ends = torch.zeros(n, dtype=D)
        ends[0] = ends[-1] = 1.0
        left = torch.where(torch.arange(n) == 0, ends, left)
        right = torch.where(torch.arange(n) == n - 1, ends, right)
        return 5.0 * (left - 2.0 * y + right) - y**3

    return field


def tridiagonal(n):
    return scipy.sparse.diags([1.0, 1.0, 1.0], [-1, 0, 1], shape=(n, n))


PATTERNS = {
    "scipy": lambda n: tridiagonal(n).tocsr(),
    "bool": lambda n: torch.from_numpy(tridiagonal(n).toarray() != 0),
    "sparse": lambda n: torch.from_numpy(tridiagonal(n).toarray()).to_sparse(),
    "csr": lambda n: torch.from_numpy(tridiagonal(n).toarray()).to_sparse_csr(),
    "numpy": lambda n: tridiagonal(n).toarray(),
    "zeros stored": lambda n: 0.0 * torch.from_numpy(tridiagonal(n).toarray()).to_sparse(),
    "detected": lambda n: None,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("given", list(PATTERNS))
def test_sparse_pattern(given):
    n = 30
    y0 = torch.linspace(0.0, 1.0, n, dtype=D).requires_grad_()
    _, expected = solve("cn", {"rhs": chain(n)}, y0, jacobian="dense")
    keywords = {"jacobian": "sparse", "jacobian_pattern": PATTERNS[given](n)}
    _, ours = solve("cn", {"rhs": chain(n)}, y0, **keywords)
    assert difference(ours, expected) < 1e-10
    solver = pnode.Solver(chain(n), method="cn", step_size=0.1, **keywords)
    solver(y0, [0.0, 0.1])
    assert "jacobian='sparse', colors=3" in repr(solver)


def test_coloring_is_valid():
    """No two columns of one color share a row: random patterns, an empty one, a full one."""
    generator = np.random.default_rng(3)
    for density in (0.0, 0.02, 0.1, 0.5, 1.0):
        pattern = generator.random((40, 40)) <= density if density else np.zeros((40, 40), bool)
        csr = scipy.sparse.csr_matrix(pattern.astype(float))
        index = PETSc.IntType
        matrix = PETSc.Mat().createAIJ(
            csr.shape, csr=(csr.indptr.astype(index), csr.indices.astype(index), csr.data)
        )
        matrix.assemble()
        colors = color_columns(matrix)
        for color in range(colors.max() + 1):
            assert pattern[:, colors == color].sum(axis=1).max(initial=0) <= 1
        bound = max(pattern.sum(axis=1).max(), 1)
        assert bound <= colors.max() + 1 <= 40
        matrix.destroy()


def test_pattern_is_detected_once_per_shape():
    solver = pnode.Solver(chain(20), method="cn", step_size=0.1, jacobian="sparse")
    y0 = torch.linspace(0.0, 1.0, 20, dtype=D).requires_grad_()
    first = solver(y0, [0.0, 1.0])
    first.ys[-1].sum().backward()
    second = solver(y0, [0.0, 1.0])
    assert second.stats.rhs == first.stats.rhs - 2
    assert first.stats.backward.rhs == 11


def test_pattern_follows_the_shape_of_the_state():
    solver = pnode.Solver(
        lambda t, y: -y.sum(0) * y.sin(), method="cn", step_size=0.1, jacobian="sparse"
    )
    dense = pnode.Solver(solver.rhs, method="cn", step_size=0.1, jacobian="dense")
    for shape in ((2, 6), (6, 2)):
        y0 = torch.linspace(0.1, 1.0, 12, dtype=D).view(shape)
        assert torch.allclose(solver(y0, [0.0, 1.0]).ys, dense(y0, [0.0, 1.0]).ys, rtol=1e-10)


def test_entries_that_vanish_at_first_are_found_in_a_later_solve():
    """A weight that begins at zero hides what it couples."""
    weight = torch.zeros(5, 5, dtype=D)

    def field(t, y):
        return torch.tanh(weight @ y) - y

    solver = pnode.Solver(field, method="cn", step_size=0.1, jacobian="sparse")
    dense = pnode.Solver(field, method="cn", step_size=0.1, jacobian="dense")
    y0 = torch.linspace(0.1, 1.0, 5, dtype=D).requires_grad_()
    solver(y0, [0.0, 1.0])
    weight.copy_(torch.eye(5, dtype=D).roll(1, 0) + 0.3)
    ours, theirs = solver(y0, [0.0, 1.0]).ys, dense(y0, [0.0, 1.0]).ys
    assert torch.allclose(ours, theirs, rtol=1e-10)
    ours, theirs = (torch.autograd.grad(ys[-1].sum(), y0)[0] for ys in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=1e-10)


def test_pattern_that_misses_entries_is_refused():
    solver = pnode.Solver(
        chain(30), method="cn", step_size=0.1, jacobian="sparse",
        jacobian_pattern=torch.eye(30, dtype=D),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"misses entries.*jacobian_pattern="):
        solver(torch.linspace(0, 1, 30, dtype=D), [0.0, 1.0])


def test_pattern_of_another_size_is_refused():
    solver = pnode.Solver(
        chain(30), method="cn", step_size=0.1, jacobian="sparse",
        jacobian_pattern=torch.eye(29, dtype=D),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="jacobian_pattern has 29 rows"):
        solver(torch.linspace(0, 1, 30, dtype=D), [0.0, 1.0])


@pytest.mark.parametrize("pattern", ["tridiagonal", torch.ones(3), torch.ones(3, 4), 3])
def test_unusable_pattern_is_refused(pattern):
    with pytest.raises(ConfigurationError, match="jacobian_pattern"):
        pnode.Solver(
            chain(3), method="cn", step_size=0.1, jacobian="sparse", jacobian_pattern=pattern
        )


# --------------------------------------------------------------------------------- preconditioners


def heat(n):
    """Diffusion on a line (eigenvalues up to 4 n^2) with a weak reaction; and its main part."""
    laplacian = n * n * (tridiagonal(n) - 3.0 * scipy.sparse.eye(n))
    matrix = torch.from_numpy(laplacian.toarray())
    return (lambda t, y: matrix @ y + torch.sin(y)), laplacian


PRECONDITIONERS = {
    "scipy": lambda a: a,
    "dense": lambda a: torch.from_numpy(a.toarray()),
    "sparse": lambda a: torch.from_numpy(a.toarray()).to_sparse(),
    "callable dense": lambda a: lambda t, y: torch.from_numpy(a.toarray()) + torch.cos(y).diag(),
    "callable sparse": lambda a: lambda t, y: torch.from_numpy(a.toarray()).to_sparse(),
    "callable that changes": lambda a: (
        lambda t, y: (
            torch.from_numpy(a.toarray()) if t < 0.5 else torch.from_numpy(a.toarray()).to_sparse()
        )
    ),
    '"dense"': lambda a: "dense",
    '"sparse"': lambda a: "sparse",
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", ["rhs", "mass"])
@pytest.mark.parametrize("kind", list(PRECONDITIONERS))
def test_preconditioner_saves_krylov_iterations(kind, form, sign):
    n = 40
    field, laplacian = heat(n)
    problem = {"rhs": (lambda t, y: sign * field(t, y))}
    if form == "mass":
        problem["mass"] = torch.linspace(1.0, 2.0, n, dtype=D)
    y0 = torch.linspace(0.0, 1.0, n, dtype=D).requires_grad_()
    keywords = {"t": [0.0, sign * 0.3, sign * 1.0], "jacobian": "matrix-free"}
    keywords["petsc_options"] = TIGHT | {"ksp_rtol": 1e-13}
    given = PRECONDITIONERS[kind](sign * laplacian)
    plain, expected = solve("cn", problem, y0, **keywords)
    better, ours = solve("cn", problem, y0, preconditioner=given, **keywords)
    assert difference(ours, expected) < 1e-9
    assert better.stats.krylov < 0.3 * plain.stats.krylov
    assert better.stats.backward.krylov < 0.3 * plain.stats.backward.krylov
    assert better.stats.jvp > 0


@pytest.mark.parametrize("reuse", ["step", "solve"])
def test_preconditioner_is_reused(reuse):
    field, _ = heat(40)
    y0 = torch.linspace(0.0, 1.0, 40, dtype=D).requires_grad_()
    solution, _ = solve(
        "es325", {"rhs": field}, y0, jacobian="matrix-free", preconditioner="sparse",
        jacobian_reuse=reuse,
    )  # fmt: skip
    steps = solution.stats.steps
    assert solution.stats.jacobians <= (steps + 1 if reuse == "step" else 2)
    # The adjoint preconditions each stage with its own.
    assert solution.stats.backward.jacobians == 4 * steps


@pytest.mark.parametrize(
    ("preconditioner", "message"),
    [
        ("jacobi", "'jacobi' is unknown.*'dense'"),
        (torch.ones(4, dtype=D), "Tensor of shape"),
        (3.0, "preconditioner is a float"),
        (torch.ones(4, 4, dtype=torch.complex128), "real matrix"),
    ],
)
def test_unusable_preconditioner_is_refused(preconditioner, message):
    with pytest.raises(ConfigurationError, match=message):
        pnode.Solver(
            chain(4), method="cn", step_size=0.1, jacobian="matrix-free",
            preconditioner=preconditioner,
        )  # fmt: skip


@pytest.mark.parametrize("given", [torch.eye(3, dtype=D), lambda t, y: torch.eye(3, dtype=D)])
def test_preconditioner_of_another_size_is_refused(given):
    solver = pnode.Solver(
        chain(4), method="cn", step_size=0.1, jacobian="matrix-free", preconditioner=given
    )
    with pytest.raises(pnode.errors.PnodeError, match=r"preconditioner has shape \(3, 3\)"):
        solver(torch.ones(4, dtype=D), [0.0, 1.0])


def test_exception_in_the_preconditioner_surfaces_as_itself():
    def preconditioner(t, y):
        raise KeyError("mine")

    solver = pnode.Solver(
        chain(4), method="cn", step_size=0.1, jacobian="matrix-free", preconditioner=preconditioner
    )
    with pytest.raises(KeyError, match="mine"):
        solver(torch.ones(4, dtype=D), [0.0, 1.0])


def test_matrix_for_a_residual_is_refused():
    with pytest.raises(ConfigurationError, match="residual has no f"):
        pnode.Solver(
            residual=Residual(), method="beuler", step_size=0.1, jacobian="matrix-free",
            preconditioner=torch.eye(12, dtype=D),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ reuse


def factorizations(function):
    """Sparse LU factorizations (PETSc's own log) during a call."""
    PETSc.Log.begin()
    event = PETSc.Log.Event("MatLUFactorNum")

    def count():
        stages = [log_stage("pnode forward"), log_stage("pnode adjoint")]
        return np.array([event.getPerfInfo(stage.id)["count"] for stage in stages])

    before = count()
    result = function()
    return result, tuple(count() - before)


def linear_imex(n=12):
    matrix = torch.nn.Parameter(8.0 * torch.from_numpy(tridiagonal(n).toarray() - 3 * np.eye(n)))
    bias = torch.nn.Parameter(torch.linspace(0.0, 1.0, n, dtype=D))
    return {
        "implicit": lambda t, y: matrix @ y + torch.cos(t),
        "explicit": lambda t, y: bias * torch.sin(y),
        "params": [matrix, bias],
    }, [matrix, bias]


@pytest.mark.parametrize("kind", ["dense", "sparse", "matrix-free", "matrix-free+sparse"])
def test_constant_jacobian_is_evaluated_and_factored_once(kind):
    """Twenty steps of ARK4, of two lengths that differ by round-off: five solves each."""
    keywords = KINDS.get(kind, {"jacobian": kind})

    def run(**more):
        problem, parameters = linear_imex()
        y0 = torch.linspace(0.0, 1.0, 12, dtype=D).requires_grad_()
        solver = pnode.Solver(method="ark4", step_size=0.05, **problem, **more)
        solution = solver(y0, torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=D))
        inputs = [y0, *parameters]
        found = torch.autograd.grad(solution.ys[1:].square().sum(), inputs)
        return solution.stats, [solution.ys.detach(), *found]

    _, expected = run(jacobian="dense", petsc_options=TIGHT)
    (stats, ours), factored = factorizations(lambda: run(jacobian_reuse="constant", **keywords))
    assert difference(ours, expected) < 1e-9
    assert stats.newton == stats.steps * 5 == 100
    # Six evaluations of the explicit part a step; of the implicit one, one for each solve and
    # one for the explicit first stage. Two more test the promise: at the first other point, and ten
    # times as far from the first.
    assert stats.rhs == 20 * (6 + 6) + 2 + (2 if "sparse" in kind else 0)
    assembled = int(kind != "matrix-free")
    assert (stats.jacobians, stats.backward.jacobians) == (assembled, assembled)
    if "sparse" in kind:
        assert factored == (1, 1)


def test_constant_jacobian_of_blocks():
    rates = torch.tensor([[1.0, 50.0], [2.0, 3.0]], dtype=D)
    problem = {"rhs": lambda t, y: (y @ rates.T).flip(-1) * -0.5 - y}
    y0 = initial(4, 2)
    _, expected = solve("es325", problem, y0, jacobian="dense")
    solution, ours = solve("es325", problem, y0, jacobian="block", jacobian_reuse="constant")
    assert difference(ours, expected) < 1e-9
    assert (solution.stats.jacobians, solution.stats.backward.jacobians) == (1, 1)


@pytest.mark.parametrize("kind", ["dense", "sparse", "matrix-free"])
@pytest.mark.parametrize("form", ["rhs", "mass", "residual"])
def test_constant_jacobian_of_other_forms(form, kind):
    matrix = torch.nn.Parameter(torch.from_numpy(heat(12)[1].toarray()) / 20.0)
    mass = torch.linspace(1.0, 2.0, 12, dtype=D)
    problem = {
        "rhs": {"rhs": lambda t, y: matrix @ y + torch.cos(t)},
        "mass": {"rhs": lambda t, y: matrix @ y + torch.cos(t), "mass": mass},
        "residual": {"residual": lambda t, y, yp: mass * yp - matrix @ y - torch.cos(t)},
    }[form] | {"params": [matrix]}
    y0 = torch.linspace(0.0, 1.0, 12, dtype=D).requires_grad_()
    _, expected = solve("beuler", problem, y0, jacobian="dense")
    _, ours = solve("beuler", problem, y0, jacobian=kind, jacobian_reuse="constant")
    assert difference(ours, expected) < 1e-9


def test_constant_jacobian_with_adaptive_steps():
    def run(**keywords):
        problem, parameters = linear_imex()
        y0 = torch.linspace(0.0, 1.0, 12, dtype=D).requires_grad_()
        solver = pnode.Solver(method="ark4", rtol=1e-6, atol=1e-8, **problem, **keywords)
        solution = solver(y0, torch.tensor(T, dtype=D))
        found = torch.autograd.grad(solution.ys.square().sum(), [y0, *parameters])
        return solution.stats, [solution.ys.detach(), *found]

    _, expected = run(petsc_options=TIGHT)
    (stats, ours), (forward, _) = factorizations(
        lambda: run(jacobian="sparse", jacobian_reuse="constant")
    )
    # Step sizes come from differences of states, which amplify round-off.
    assert difference(ours, expected) < 1e-8
    assert stats.jacobians == 1
    assert forward <= stats.steps + stats.rejected


@pytest.mark.parametrize("kind", ["block", "sparse", "matrix-free+sparse"])
def test_field_without_derivative(kind):
    problem = {"rhs": lambda t, y: torch.ones_like(y) * t}
    _, ours = solve("cn", problem, initial(), **KINDS[kind])
    assert torch.allclose(ours[0][-1], initial().detach() + 0.5, rtol=1e-13)


def test_factorizations_without_reuse_and_with_reuse_over_a_step():
    """Five solves a step; one Jacobian and one matrix suffice for those of a step."""
    problem, _ = linear_imex()
    y0 = torch.linspace(0.0, 1.0, 12, dtype=D)

    def run(reuse):
        solver = pnode.Solver(
            method="ark4", step_size=0.1, jacobian="sparse", jacobian_reuse=reuse, **problem
        )
        with torch.no_grad():
            return solver(y0, [0.0, 1.0]).stats

    stats, factored = factorizations(lambda: run("iteration"))
    assert factored[0] == stats.jacobians == stats.newton >= 50
    stats, factored = factorizations(lambda: run("step"))
    assert factored[0] == stats.jacobians == 10
    stats, factored = factorizations(lambda: run("solve"))
    assert stats.jacobians == 1
    assert factored[0] <= 3  # the step size varies by round-off


@pytest.mark.parametrize("jacobian", ["dense", "sparse", "matrix-free"])
def test_broken_promise_of_a_constant_jacobian(jacobian):
    solver = pnode.Solver(
        chain(6), method="cn", step_size=0.1, jacobian=jacobian, jacobian_reuse="constant"
    )
    with pytest.raises(ConfigurationError, match="jacobian_reuse='constant' promises"):
        solver(torch.linspace(0.0, 1.0, 6, dtype=D), [0.0, 1.0])


def test_constant_jacobian_with_a_field_that_is_not_finite():
    def field(t, y):
        return torch.where(t > 0.45, torch.nan, 1.0) - y

    solver = pnode.Solver(field, method="cn", step_size=0.1, jacobian_reuse="constant")
    with pytest.raises(NonFiniteVectorField):
        solver(initial(), [0.0, 1.0])


@pytest.mark.parametrize("reuse", ["step", "solve"])
def test_evaluations_that_record_no_graph(reuse):
    """With a Jacobian at hand, f is evaluated without grad; and fewer Jacobians are."""
    grads = []

    def field(t, y):
        grads.append(torch.is_grad_enabled())
        return -(y**3) * torch.cos(t)

    def run(how):
        grads.clear()
        solver = pnode.Solver(field, method="es325", step_size=0.1, jacobian_reuse=how)
        with torch.no_grad():
            return solver(initial(), [0.0, 1.0]).stats

    plain = run("iteration")
    assert all(grads)
    stats = run(reuse)
    assert stats.jacobians < 0.3 * plain.jacobians
    assert sum(grads) == stats.jacobians
    assert stats.rhs == len(grads)


@pytest.mark.parametrize("reuse", ["iteration", "step"])
@pytest.mark.parametrize("jacobian", ["dense", "block", "sparse"])
def test_recomputed_steps_have_the_same_bits(jacobian, reuse):
    """From any step's start, without what came before it."""
    field, y0 = Field(), initial()
    solver = pnode.Solver(
        field, method="cn", step_size=0.1, jacobian=jacobian, jacobian_reuse=reuse
    )
    with torch.no_grad():
        ys = solver(y0, torch.linspace(0.0, 1.0, 11, dtype=D)).ys
        for index in (3, 7):
            t = torch.linspace(0.0, 1.0, 11, dtype=D)[index : index + 2]
            again = solver(ys[index].clone(), t).ys[-1]
            assert torch.equal(again, ys[index + 1])


@pytest.mark.parametrize("reuse", ["step", "solve"])
def test_jacobian_is_renewed_where_convergence_is_slow(reuse):
    """A field whose stiffness jumps by four orders: one Jacobian cannot do."""

    def field(t, y):
        return -torch.where(t < 0.5, 1.0, 1e4) * (y**3 + y - torch.cos(t))

    y0 = initial()
    _, expected = solve("beuler", {"rhs": field}, y0, jacobian="dense")
    solution, ours = solve(
        "beuler", {"rhs": field}, y0, jacobian="dense", jacobian_reuse=reuse,
        petsc_options={"snes_stol": 1e-13},
    )  # fmt: skip
    assert difference(ours, expected) < 1e-9
    assert 1 < solution.stats.jacobians < 60


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_step_that_fails_with_an_old_jacobian_is_repeated(jacobian, monkeypatch):
    """With the slope from before the jump, the iterates leave the square root's domain."""
    repeated = []
    original = TimeIntegrator._try_newton

    def repeat(self, s, step, where):
        repeated.append(s)
        return original(self, s, step, where)

    monkeypatch.setattr(TimeIntegrator, "_try_newton", repeat)

    def field(t, y):
        return torch.where(t < 0.25, -0.1 * y, 50.0 * (1.0 - y.sqrt()) * (1.0 + 20.0 * y))

    y0 = torch.tensor([4.0, 9.0], dtype=D)
    found = {}
    for reuse in ("iteration", "solve"):
        solver = pnode.Solver(
            field, method="beuler", step_size=0.1, jacobian=jacobian, jacobian_reuse=reuse
        )
        with torch.no_grad():
            found[reuse] = solver(y0, [0.0, 0.4]).ys[-1]
    assert repeated == [0.2]
    assert torch.allclose(found["solve"], found["iteration"], rtol=1e-9)


# -------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"jacobian": "blocks"}, "'blocks' is unknown.*'block', 'sparse'"),
        ({"jacobian_reuse": "never"}, "jacobian_reuse='never' is unknown.*'constant'"),
        ({"jacobian_reuse": ["step"]}, "jacobian_reuse=.* is unknown"),
        ({"jacobian": "matrix-free", "jacobian_reuse": "step"}, "nothing to reuse"),
        ({"preconditioner": "dense"}, "belongs to jacobian='matrix-free'"),
        ({"jacobian": "block", "preconditioner": "dense"}, "jacobian='block'.*belongs to"),
        ({"jacobian_pattern": torch.eye(3)}, "belongs to jacobian='sparse'"),
        ({"method": "rk4", "jacobian_reuse": "step"}, "jacobian_reuse given.*explicit"),
        ({"method": "rk4", "jacobian_pattern": torch.eye(3)}, "jacobian_pattern given.*explicit"),
        ({"method": "rk4", "preconditioner": "dense"}, "preconditioner given.*explicit"),
    ],
)
def test_unusable_argument(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        pnode.Solver(Field(), **{"method": "cn", "step_size": 0.1, **keywords})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_configuration(duplicate):
    solver = pnode.Solver(
        Field(), method="cn", step_size=0.1, jacobian="matrix-free", preconditioner="sparse",
        jacobian_pattern=torch.block_diag(*[torch.ones(3, 3)] * 4), jacobian_reuse="step",
    )  # fmt: skip
    first = solver(initial(), [0.0, 1.0])
    second = duplicate(solver)(initial(), [0.0, 1.0])
    assert torch.equal(first.ys, second.ys)
    assert first.stats == second.stats


def test_shared_solvers_of_several_kinds_nest():
    """A solver inside the field of another, both with matrices of their own."""
    inner = pnode.Solver(Field(), method="cn", step_size=0.5, jacobian="block")

    def field(t, y):
        return inner(y, [0.0, 1.0]).ys[-1] - y

    y0 = initial()
    dense = pnode.Solver(field, method="beuler", step_size=0.5, jacobian="dense")
    block = pnode.Solver(
        field, params=inner.parameters(), method="beuler", step_size=0.5, jacobian="block"
    )
    with torch.no_grad():
        assert torch.allclose(block(y0, [0.0, 1.0]).ys, dense(y0, [0.0, 1.0]).ys, rtol=1e-9)

"""``jacobian="auto"`` of large states: samples and sparsity are found, and checked."""

from __future__ import annotations

import pytest
import torch

import pnode
from pnode.base.ledger import Ledger
from pnode.field.vectorfield import vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.linear.sparse import SparsityPattern
from pnode.solvers.linear.structure import find_structure

D = torch.float64
TIGHT = {"snes_rtol": 1e-14, "snes_stol": 1e-14}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Look for structure after one solve, however few products it took."""
    monkeypatch.setattr("pnode.sweeping.engine._MANY_PRODUCTS", 0)


def chain(n, rate=30.0):
    """Nonlinear diffusion on a line."""

    def field(t, y):
        left, right = torch.roll(y, 1), torch.roll(y, -1)
        edge = torch.ones(n, dtype=D)
        edge[0] = edge[-1] = 0.0
        return rate * edge * (left - 2.0 * y + right) - y**3 + torch.cos(t)

    return field


def plane(n):
    """Two species that react, and diffuse on a periodic square."""

    def field(t, y):
        u, v = y

        def laplacian(a):
            return sum(torch.roll(a, k, d) for k in (1, -1) for d in (0, 1)) - 4.0 * a

        reaction = u * u * v
        return torch.stack([
            1.0 + reaction - 4.4 * u + 5.0 * laplacian(u), 3.4 * u - reaction + 5.0 * laplacian(v)
        ])  # fmt: skip

    return field


class Samples(torch.nn.Module):
    """Rows by themselves, but for ``coupling``."""

    def __init__(self, coupling=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=D))
        self.coupling = coupling

    def forward(self, t, y):
        result = torch.tanh(y @ self.weight) - 20.0 * y * torch.tensor([0.1, 1.0, 10.0], dtype=D)
        return result + self.coupling * y.mean(0) if self.coupling else result


def rows(batch=120):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, generator=generator, dtype=D).requires_grad_()


def structure(field, y0, most=1 << 15):
    problem = InitialValueProblem.create(field, y0, torch.zeros(1, dtype=D))
    part = vector_field(problem, Ledger())
    flat = problem.layout.flatten(y0).detach()
    return find_structure(problem.layout, flat, lambda u: part.linearize(0.0, u), 256, most)


def entries(field, y0):
    """Where a dense Jacobian is not zero."""
    size = y0.numel()
    jacobian = torch.autograd.functional.jacobian(
        lambda y: field(torch.tensor(0.3), y), y0.detach()
    )
    return jacobian.reshape(size, size).ne(0)


@pytest.mark.parametrize(
    ("field", "y0"),
    [
        (chain(300), torch.linspace(0.1, 1.0, 300, dtype=D)),
        (plane(13), torch.linspace(0.5, 1.5, 2 * 13 * 13, dtype=D).view(2, 13, 13)),
        (lambda t, y: torch.cumsum(y.view(-1, 4), 1).reshape(-1).sin(),
         torch.linspace(0.1, 1.0, 264, dtype=D)),
    ],
)  # fmt: skip
def test_patterns_are_those_of_dense_jacobians(field, y0):
    found = structure(field, y0)
    assert isinstance(found, SparsityPattern)
    pattern = torch.zeros(y0.numel(), y0.numel(), dtype=torch.bool)
    pattern[found.rows, found.columns] = True
    assert torch.equal(pattern, entries(field, y0))


def test_random_pattern():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(331, 331, generator=generator) < 0.006
    weight = torch.randn(331, 331, generator=generator, dtype=D) * mask
    found = structure(lambda t, y: weight @ y.sin(), torch.linspace(0.1, 1.0, 331, dtype=D))
    pattern = torch.zeros(331, 331, dtype=torch.bool)
    pattern[found.rows, found.columns] = True
    assert torch.equal(pattern, mask)


def test_few_products_find_a_pattern(monkeypatch):
    """Some sixty a state, instead of one for each of its 1,000 entries."""
    products = []
    from pnode.field.linearization import Linearization

    original = Linearization.rows

    def count(self, cotangents):
        products.append(len(cotangents))
        return original(self, cotangents)

    monkeypatch.setattr(Linearization, "rows", count)
    assert structure(chain(1000), torch.linspace(0.1, 1.0, 1000, dtype=D)).color_count <= 5
    assert sum(products) < 3 * 80


def test_samples_are_found():
    assert structure(Samples(), rows()) == "block"
    assert structure(Samples(0.1), rows()) is None
    couples_two = rows().detach()

    def field(t, y):
        result = -y
        return torch.cat([result[:-1], result[-1:] + y[17] ** 2])

    assert structure(field, couples_two) != "block"


def test_no_structure():
    dense = torch.randn(300, 300, dtype=D, generator=torch.Generator().manual_seed(1))
    assert structure(lambda t, y: torch.tanh(dense @ y), torch.ones(300, dtype=D)) is None
    assert structure(chain(300), torch.ones(300, dtype=D), most=200) is None


def ripples(n):
    return 1.0 + 0.1 * torch.sin(torch.arange(n, dtype=D))


PROBLEMS = {
    "chain": (lambda: chain(300), lambda: torch.linspace(0.1, 1.0, 300, dtype=D), "sparse"),
    "plane": (lambda: plane(12), lambda: ripples(288).view(2, 12, 12), "sparse"),
    "samples": (Samples, rows, "block"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["cn", "es325", "bdf", "ark4", "radau3"])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_equals_products_alone(name, method):
    make, state, kind = PROBLEMS[name]

    def run(**keywords):
        field, y0 = make(), state().detach().requires_grad_()
        parameters = list(field.parameters()) if isinstance(field, torch.nn.Module) else []
        problem = {"rhs": field}
        if method == "ark4":
            problem = {"implicit": field, "explicit": lambda t, y: torch.sin(y)}
        steps = {"rtol": 1e-7, "atol": 1e-9} if method == "bdf" else {"step_size": 0.05}
        solver = pnode.Solver(method=method, compile=False, **problem, **steps, **keywords)
        solution = solver(y0, [0.0, 0.1, 0.2])
        if kind == "sparse":
            solution = solver(y0, [0.0, 0.1, 0.2])
        found = torch.autograd.grad(solution.ys[-1].square().sum(), [y0, *parameters])
        return solver, solution.stats, [solution.ys.detach(), *found]

    solver, stats, ours = run()
    _, _, expected = run(jacobian="matrix-free", petsc_options=TIGHT | {"ksp_rtol": 1e-13})
    # BDF solves to a part of its tolerance, and its steps vary with what is left.
    bound = 1e-4 if method == "bdf" else 1e-9
    assert all(
        float((a - b).norm() / b.norm()) < bound for a, b in zip(ours, expected, strict=True)
    )
    assert stats.jacobians > 0 and stats.jvp == 0
    assert (kind == "sparse") == ("colors" in repr(solver))


@pytest.mark.parametrize(("rate", "stiff"), [(1.0, False), (1e5, True)])
def test_sparsity_is_looked_for_where_products_are_many(rate, stiff, monkeypatch):
    """In the solve after one whose systems took more than twenty each, once per shape."""
    monkeypatch.undo()
    solver = pnode.Solver(chain(300, rate), method="cn", step_size=0.1, compile=False)
    y0 = torch.linspace(0.1, 1.0, 300, dtype=D)
    with torch.no_grad():
        first, second, third = (solver(y0, [0.0, 0.5]) for _ in range(3))
    assert first.stats.jacobians == 0 and first.stats.jvp > 0
    assert (first.stats.krylov > 20 * first.stats.newton) == stiff
    if not stiff:
        assert torch.equal(first.ys, third.ys) and second.stats == third.stats
        return
    assert second.stats.jacobians == third.stats.jacobians >= 5
    assert (second.stats.jvp, second.stats.rhs) == (0, third.stats.rhs + 3)
    assert torch.allclose(first.ys, second.ys, rtol=1e-8)
    assert torch.equal(second.ys, third.ys)


def hidden(at=0.25):
    """The rows of a batch by themselves, until a time."""

    def field(t, y):
        return -5.0 * y + torch.where(t > at, 3.0, 0.0) * torch.roll(y, 1, 0) ** 2

    return field


@pytest.mark.parametrize("power", [1, 3])
def test_a_linear_implicit_part_is_factored_at_once(power, monkeypatch):
    """At the first solve, before many products; the numbers are those of a dense matrix."""
    monkeypatch.setattr("pnode.sweeping.engine._MANY_PRODUCTS", 1 << 20)

    def diffusion(t, y):
        return 20.0 * (torch.roll(y, 1) + torch.roll(y, -1) - 2.0 * y**power)

    y0 = torch.linspace(0.1, 1.0, 300, dtype=D).requires_grad_()
    found = []
    for jacobian in ("auto", "dense"):
        solver = pnode.Solver(
            implicit=diffusion, explicit=lambda t, y: torch.sin(3.0 * y), method="ark3",
            step_size=0.02, jacobian=jacobian, compile=False,
            petsc_options=TIGHT if power > 1 else None,
        )  # fmt: skip
        solution = solver(y0, torch.tensor([0.0, 0.2], dtype=D))
        (gradient,) = torch.autograd.grad(solution.ys[-1].square().sum(), y0)
        found.append((solution.ys[-1].detach(), gradient))
        if jacobian == "auto":
            stats = solution.stats
            assert (stats.krylov == stats.newton and 1 <= stats.jacobians <= 3) == (power == 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["cn", "radau3"])
def test_coupling_that_was_not_there(method):
    """Newton's method notes it forwards, the check of every solve backwards.

    Coupled stages' Jacobians are compared with a product each.
    """

    def run(**keywords):
        y0 = (0.3 * rows(90)).detach().requires_grad_()
        solver = pnode.Solver(hidden(), method=method, step_size=0.05, compile=False, **keywords)
        solution = solver(y0, [0.0, 0.5])
        (gradient,) = torch.autograd.grad(solution.ys[-1].square().sum(), y0)
        return solution.stats, solution.ys.detach(), gradient

    stats, ys, gradient = run()
    assert method != "cn" or (stats.jvp == 0 and stats.jacobians > 0)
    _, other_ys, other = run(jacobian="matrix-free", petsc_options=TIGHT | {"ksp_rtol": 1e-13})
    assert torch.allclose(ys, other_ys, rtol=1e-10, atol=1e-12)
    assert float((gradient - other).norm() / other.norm()) < 1e-9


def test_coupling_that_comes_between_solves():
    field = Samples()
    solver = pnode.Solver(field, method="cn", step_size=0.1, compile=False)
    with torch.no_grad():
        assert solver(rows(), [0.0, 0.2]).stats.jvp == 0
        field.coupling = 0.5
        solution = solver(rows(), [0.0, 0.2])
    assert solution.stats.jvp > 0 and solution.stats.jacobians == 0
    other = pnode.Solver(field, method="cn", step_size=0.1, jacobian="matrix-free", compile=False)
    with torch.no_grad():
        assert torch.allclose(solution.ys, other(rows(), [0.0, 0.2]).ys, rtol=1e-9)


@pytest.mark.parametrize(
    "keywords",
    [{"linear_solver": "gmres"}, {"petsc_options": {"pc_type": "none"}}, {"method": "ra34pw2"}],
)
def test_nothing_is_looked_for_where_something_else_is_chosen(keywords):
    solver = pnode.Solver(
        chain(300), **{"method": "cn", "step_size": 0.1, "compile": False, **keywords}
    )
    with torch.no_grad():
        for _ in range(2):
            stats = solver(torch.linspace(0.1, 1.0, 300, dtype=D), [0.0, 0.2]).stats
    assert stats.jacobians == 0 and stats.jvp > 0


def test_field_that_fails_near_the_initial_state():
    def field(t, y):
        if not torch.equal(y[:2], torch.ones(2, dtype=D)) and float(t) == 0.0:
            raise ValueError("not here")
        return torch.cat([0.0 * y[:2], -(y[2:] ** 2)])

    solver = pnode.Solver(field, method="cn", step_size=0.1, compile=False)
    with torch.no_grad():
        for _ in range(2):
            assert solver(torch.ones(300, dtype=D), [0.0, 0.2]).stats.jacobians == 0


def test_second_derivatives():
    field, y0 = chain(260), torch.linspace(0.1, 1.0, 260, dtype=D).requires_grad_()

    def product(**keywords):
        solver = pnode.Solver(field, method="cn", step_size=0.1, compile=False, **keywords)
        solver(y0, [0.0, 0.2])
        (first,) = torch.autograd.grad(
            solver(y0, [0.0, 0.2]).ys[-1].square().sum(), y0, create_graph=True
        )
        return torch.autograd.grad(first.sum(), y0)[0]

    assert torch.allclose(product(), product(jacobian="matrix-free"), rtol=1e-7, atol=1e-9)

"""Compiled sweeps with sparse and block Jacobians: the eager ones' steps and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

import pnode
from pnode.errors import ConfigurationError

TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
CELLS = 24


class Ring(torch.nn.Module):
    """Two species that react and diffuse on a ring; the state has shape (2, cells)."""

    def __init__(self, far=0.0):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([3.4, 20.0], dtype=torch.float64))
        self.far = far

    def forward(self, t, y):
        b, d = self.rates
        u, v = y
        flow = u * u * v - b * u
        laplacian = d * (y.roll(1, -1) + y.roll(-1, -1) - 2.0 * y)
        # Another column that matters later only.
        late = self.far * torch.relu(v.roll(5) - 2.0)
        return torch.stack([1.0 + flow - u + torch.sin(t) + late, -flow]) + laplacian


class Rows(torch.nn.Module):
    """Van der Pol oscillators that do not know of one another."""

    def __init__(self):
        super().__init__()
        self.damping = torch.nn.Parameter(torch.linspace(1.0, 30.0, 40, dtype=torch.float64))

    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, self.damping * (1.0 - x * x) * v - x + 0.1 * torch.cos(t)], -1)


def ring_start():
    x = torch.arange(CELLS, dtype=torch.float64) / CELLS
    return torch.stack([1.0 + x * (1.0 - x), 1.5 + 0.4 * torch.sin(6.0 * x)])


def rows_start():
    return torch.linspace(0.5, 2.0, 80, dtype=torch.float64).view(40, 2)


def solve(field, y0, compile, compiled="whole sweeps", **keywords):
    """Return the solution and gradients with respect to start and parameters."""
    solver = pnode.Solver(field, compile=compile, **keywords)
    y0 = y0.clone().requires_grad_(True)
    field.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, TIMES)
    assert (f"compiled={compiled!r}" in repr(solver)) == compile
    weights = torch.linspace(-1.0, 2.0, solution.ys.numel(), dtype=torch.float64)
    (solution.ys * weights.view(solution.ys.shape)).sum().backward()
    return solution, [y0.grad, *(p.grad for p in field.parameters())]


def compare(a, b, tolerance):
    """Steps and counts are the same, numbers up to a tolerance."""
    assert torch.linalg.norm(a[0].ys - b[0].ys) <= tolerance * torch.linalg.norm(b[0].ys)
    for one, two in zip(a[1], b[1], strict=True):
        assert torch.linalg.norm(one - two) <= tolerance * torch.linalg.norm(two)
    for name in ("steps", "rejected", "jacobians", "newton"):
        assert getattr(a[0].stats, name) == getattr(b[0].stats, name), name


BDF = {"method": "bdf", "rtol": 1e-6, "atol": 1e-8}


@pytest.mark.parametrize("keywords", [BDF, {"method": "bdf3", "step_size": 0.05}])
@pytest.mark.parametrize("jacobian", ["sparse", "block"])
def test_bdf_takes_the_eager_steps(jacobian, keywords):
    """Eager LU and LU by fronts differ in round-off, which 100 steps may make larger."""
    field, y0 = (Ring(), ring_start()) if jacobian == "sparse" else (Rows(), rows_start())
    eager, compiled = (solve(field, y0, c, jacobian=jacobian, **keywords) for c in (False, True))
    compare(compiled, eager, 1e-10)
    assert compiled[0].stats.factorizations == eager[0].stats.factorizations
    backward = compiled[0].stats.backward
    assert 0 < backward.factorizations < backward.steps / 2 < backward.krylov


@pytest.mark.parametrize(("method", "jacobian"), [
    ("cn", "sparse"), ("es325", "block"), ("rodaspr", "sparse")
])  # fmt: skip
def test_other_families_take_the_eager_steps(method, jacobian):
    field, y0 = (Ring(), ring_start()) if jacobian == "sparse" else (Rows(), rows_start())
    keywords = {"method": method, "step_size": 0.02, "jacobian": jacobian}
    eager, compiled = (solve(field, y0, c, **keywords) for c in (False, True))
    # SNES stops at updates of 1e-8 of the state, and leaves about their square.
    compare(compiled, eager, 1e-9)


def test_gradients_are_those_of_dense_jacobians():
    sparse, dense = (
        solve(Ring(), ring_start(), True, jacobian=jacobian, **BDF)
        for jacobian in ("sparse", "dense")
    )
    compare(sparse, dense, 1e-10)


def test_backward_twice_and_tangents():
    """A second backward sweep gives the same bits; tangents and gradients agree."""
    field, keywords = Ring(), {"jacobian": "sparse", "compile": True, **BDF}
    solver = pnode.Solver(field, **keywords)
    y0 = ring_start().requires_grad_(True)
    ys = solver(y0, TIMES).ys
    w = torch.linspace(-1.0, 1.0, ys[-1].numel(), dtype=torch.float64).view(ys[-1].shape)
    first, second = (
        torch.autograd.grad((ys[-1] * w).sum(), y0, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    v = torch.cos(3.0 * w)
    _, moved = torch.func.jvp(lambda y: solver(y, TIMES).ys[-1], (y0.detach(),), (v,))
    a, b = float((moved.detach() * w).sum()), float((first * v).sum())
    assert abs(a - b) <= 1e-9 * abs(b)


def test_patterns_that_miss_entries():
    """A given one is refused as eagerly; the solve of one that was detected goes on without."""
    band = torch.eye(2 * CELLS, dtype=torch.float64)
    keywords = {"jacobian": "sparse", "compile": True, **BDF}
    given = pnode.Solver(Ring(), jacobian_pattern=band, **keywords)
    with pytest.raises(ConfigurationError, match="jacobian_pattern="):
        given(ring_start(), TIMES)
    y0 = ring_start() + torch.tensor([[0.0], [0.6]], dtype=torch.float64)
    start = torch.where(y0 > 1.95, 1.95, y0)  # v rises above 2 a little later
    field = Ring(far=3.0)
    eager, compiled = (
        pnode.Solver(field, **{**keywords, "compile": c})(start, TIMES).ys for c in (False, True)
    )
    assert float(eager[1, 1].max()) > 2.0
    # Newton's iterates differ where the patterns do.
    assert torch.linalg.norm(compiled - eager) <= 1e-5 * torch.linalg.norm(eager)


def test_two_patterns_of_one_field():
    """Programs are for one pattern each, whatever else they share."""
    field = Ring()
    full = torch.ones(2 * CELLS, 2 * CELLS, dtype=torch.float64)
    found = [
        solve(field, ring_start(), True, jacobian="sparse", **BDF, **more)
        for more in ({}, {"jacobian_pattern": full}, {})
    ]
    assert torch.equal(found[0][0].ys, found[2][0].ys)
    assert torch.equal(found[0][1][0], found[2][1][0])
    compare(found[1], found[0], 1e-10)


def test_cotangents_that_are_not_finite_give_such_gradients():
    y0 = ring_start().requires_grad_(True)
    solver = pnode.Solver(Ring(), jacobian="sparse", compile=True, **BDF)
    solver(y0, TIMES).ys[-1].mul(torch.nan).sum().backward()
    assert bool(y0.grad.isnan().all())


class Heat(torch.nn.Module):
    """Heat, much stiffer than the ring, and a sink."""

    def __init__(self, diffusivity, cells):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.factor = diffusivity * cells**2

    def forward(self, t, y):
        inside = torch.nn.functional.pad(y, (1, 1))
        laplacian = inside[2:] + inside[:-2] - 2.0 * y
        return self.factor * laplacian - self.rate * y**3


@pytest.mark.parametrize(("cells", "diffusivity"), [(300, 1.0), (48, 1e6)])
def test_adjoint_of_stiff_equations(cells, diffusivity):
    """Round-off of the solution leaves more of a residual than that of the right-hand side."""
    y0 = 1.0 + torch.sin(9.0 * torch.linspace(0, 1, cells, dtype=torch.float64))
    keywords = {"method": "bdf", "jacobian": "sparse", "rtol": 1e-6, "atol": 1e-8}
    field, w = Heat(diffusivity, cells), torch.linspace(1.0, 2.0, cells, dtype=torch.float64)
    solver = pnode.Solver(field, compile=True, **keywords)
    start = y0.clone().requires_grad_()
    end = solver(start, TIMES).ys[-1]
    of_y0, of_rate = torch.autograd.grad((end * w).sum(), [start, field.rate])
    v = torch.cos(3.0 * y0)
    _, tangent = torch.func.jvp(lambda y: solver(y, TIMES).ys[-1], (y0,), (v,))
    products = float((tangent.detach() * w).sum()), float((of_y0 * v).sum())
    assert products[0] == pytest.approx(products[1], rel=1e-8, abs=1e-12)
    eager = pnode.Solver(field, compile=False, **keywords)
    right = torch.autograd.grad((eager(start, TIMES).ys[-1] * w).sum(), field.rate)[0]
    assert float(of_rate) == pytest.approx(float(right), rel=1e-4, abs=1e-9)  # other steps


def test_many_entries_of_a_rosenbrock_method():
    """A million entries of J are not on the stack."""

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, t, y):
            return -self.k * y * y.mean(-1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    y0 = torch.rand(16, 256, dtype=torch.float64, generator=generator)
    keywords = {"method": "ra34pw2", "jacobian": "block", "step_size": 0.15}
    compare(solve(Mixed(), y0, True, **keywords), solve(Mixed(), y0, False, **keywords), 1e-10)


@pytest.mark.parametrize(("method", "shift"), [("cn", 2.0), ("rosw_theta1", 1.0)])
def test_fronts_with_bad_pivots(method, shift):
    """Of v most of the diagonal of shift - J cancels: 1e-3 of the numbers was lost without a word.

    At the end of a step of cn, whose Newton's method mends the values, and at the start of the
    other method's. The step back of cn leads where that step begins.
    """
    step, field = torch.tensor([0.0, 1.0], dtype=torch.float64), Ring()
    cells = torch.tensor([0, 2, 3, 7, 9, 12, 16, 20])
    y0 = torch.zeros(2, CELLS, dtype=torch.float64).index_fill_(1, cells, 0.6)
    y0[1] = 0.0
    with torch.no_grad():
        field.rates.copy_(torch.tensor([3.0, 3e-13 - 0.5 * shift], dtype=torch.float64))
        if method == "cn":
            back = pnode.Solver(field, method=method, step_size=1.0, compile=False)
            y0 = back(y0, step.flip(0)).ys[-1]
    w = torch.linspace(-1.0, 2.0, 2 * CELLS, dtype=torch.float64).view(2, CELLS)
    found = []
    for jacobian, compile in (("sparse", True), ("dense", False)):
        solver = pnode.Solver(
            field, method=method, step_size=1.0, jacobian=jacobian, compile=compile
        )
        start = y0.clone().requires_grad_()
        end = solver(start, step).ys[-1]
        gradients = torch.autograd.grad((end * w).sum(), [start, field.rates])
        _, along = torch.func.jvp(lambda y, s=solver: s(y, step).ys[-1], (y0,), (w,))
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
        found.append([end.detach(), *gradients, along.detach()])
    for one, two in zip(*found, strict=True):
        assert torch.linalg.norm(one - two) <= 1e-11 * torch.linalg.norm(two)


def test_states_that_fade_below_the_smallest_numbers():
    """They are rounded to nothing of their equations, which no pivots mend."""
    cells, found = 2000, []
    field = Heat(4e3 / cells**2, cells)
    y0 = torch.zeros(cells, dtype=torch.float64)
    y0[0] = 1.0
    for compile in (False, True):
        solver = pnode.Solver(
            field, method="sdirk2", step_size=1e-3, jacobian="sparse", compile=compile
        )
        start = y0.clone().requires_grad_()
        end = solver(start, [0.0, 0.002]).ys[-1]
        smallest = torch.finfo(torch.float64).tiny
        assert bool(((end != 0.0) & (end.abs() < smallest)).any())
        found.append(torch.autograd.grad(end[0], [start, field.rate]))
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
    for one, two in zip(*found, strict=True):
        assert torch.linalg.norm(one - two) <= 1e-10 * torch.linalg.norm(two)

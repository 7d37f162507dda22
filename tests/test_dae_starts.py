"""Starts of differential-algebraic equations: which are refused, at any size and in any form."""

from __future__ import annotations

import math

import pytest
import torch

import pnode
from pnode.errors import ConfigurationError, NonFiniteVectorField
from pnode.problems.nullspaces import DENSE_ENTRIES, SquareOperator, null_spaces

D = torch.float64
# q' = -p, 0 = p^2 - q: so many pairs that products with the Jacobian serve.
N = 1500
assert 2 * N * N > DENSE_ENTRIES
Q = torch.linspace(1.0, 2.0, N, dtype=D)
GOOD = torch.cat([Q, Q.sqrt()])
SHUFFLE = torch.randperm(N, generator=torch.Generator().manual_seed(0))
# Equations in units of their own.
UNITS = torch.logspace(-6, 6, N, dtype=D)[SHUFFLE]
T = torch.tensor([0.0, 1e-3], dtype=D)


def pairs(t, y):
    q, p = y[:N], y[N:]
    return torch.cat([-p, p * p - q])


def shuffled(t, y):
    """Equation i does not belong to unknown i."""
    slope = pairs(t, y)
    return torch.cat([slope[:N], slope[N:][SHUFFLE]])


def scaled(t, y):
    slope = pairs(t, y)
    return torch.cat([slope[:N], UNITS * slope[N:]])


def hidden_constraint(t, y):
    """Index 2: the constraint holds of q alone."""
    return torch.cat([-y[N:], y[:N] - Q])


def dependent(t, y):
    """Two equations for p_0 + p_1, none for their difference."""
    q, p = y[:N], y[N:]
    both = p[0] + p[1] - q[0].sqrt() - q[1].sqrt()
    return torch.cat([-p, torch.stack([both, 2.0 * both]), p[2:] ** 2 - q[2:]])


def bad(entry=N + 17, value=5.0):
    y0 = GOOD.clone()
    y0[entry] = value
    return y0


ALGEBRAIC = torch.cat([torch.ones(N, dtype=D), torch.zeros(N, dtype=D)])


def band():
    """A mass matrix of finite elements for q beside rows of zeros."""
    i = torch.arange(N)
    rows, columns = torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])
    values = torch.cat([torch.full((N,), 4.0, dtype=D), torch.ones(2 * N - 2, dtype=D)])
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (2 * N, 2 * N))


def sums():
    """(q + p)' = f: the algebraic unknown is q_i - p_i, no entry of the state."""
    i = torch.arange(N)
    places = torch.stack([torch.cat([i, i]), torch.cat([i, i + N])])
    return torch.sparse_coo_tensor(places, torch.ones(2 * N, dtype=D), (2 * N, 2 * N))


def solve(y0, field=pairs, *, mass=None, residual=False, t=T, **keywords):
    form = {"rhs": field, "mass": ALGEBRAIC if mass is None else mass}
    if residual:
        form = {
            "residual": lambda t, y, yp: torch.cat([yp[:N], yp[N:] * 0.0]) - field(t, y),
        }
    keywords = {"method": "beuler", "step_size": 1e-3, "jacobian": "matrix-free"} | keywords
    solver = pnode.Solver(**form, **keywords)
    with torch.no_grad():
        return solver(y0, t).ys


@pytest.mark.parametrize("form", ["mass", "residual", "band", "sums"])
def test_a_large_start_is_checked(form):
    keywords = {
        "mass": {}, "residual": {"residual": True}, "band": {"mass": band()},
        "sums": {"mass": sums()},
    }[form]  # fmt: skip
    y = solve(GOOD, t=T if form == "mass" else T[:1], **keywords)[-1]
    assert float((y[N:] ** 2 - y[:N]).abs().max()) < 1e-9
    entry = 17 if form == "sums" else 1517  # q and p share what is wrong with q - p
    with pytest.raises(ConfigurationError, match=f"entry {entry} of .* consistent_start=True"):
        solve(bad(), **keywords)


@pytest.mark.parametrize("field", [shuffled, scaled])
def test_arrangement_and_units_of_equations_do_not_matter(field):
    """A violated equation is found; a good start is not suspected (one time: no steps)."""
    assert torch.equal(solve(GOOD, field, t=T[:1])[0], GOOD)
    with pytest.raises(ConfigurationError, match=r"entry 1517 of .* 2\.4"):
        solve(bad(), field)
    with pytest.raises(ConfigurationError, match="entry 1517"):
        solve(bad(value=float(GOOD[N + 17]) + 1e-4), field)


@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
def test_large_entries_elsewhere_hide_nothing(large):
    if large:
        y0 = bad()
        y0[0], y0[N] = 1e8, 1e4
        with pytest.raises(ConfigurationError, match="entry 1517"):
            solve(y0)
        return
    solver = pnode.Solver(
        lambda t, y: torch.stack([-y[0], -y[1], y[2] - y[1]]),
        mass=torch.tensor([1.0, 1.0, 0.0], dtype=D), method="cn", step_size=0.1,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"entry 2 .* 4\.00e\+00"):
        solver(torch.tensor([1e8, 1.0, 5.0], dtype=D), T)
    solver(torch.tensor([1e8, 1.0, 1.0 + 1e-8], dtype=D), T)


@pytest.mark.parametrize("residual", [False, True], ids=["mass", "residual"])
@pytest.mark.parametrize("field", [hidden_constraint, dependent])
def test_index_above_one_of_a_large_problem(field, residual):
    with pytest.raises(ConfigurationError, match="index above 1"):
        solve(GOOD, field, residual=residual)


@pytest.mark.parametrize("residual", [False, True], ids=["mass", "residual"])
def test_decreasing_times_and_tuple_states(residual):
    def field(t, y):
        return -y[1], y[1] ** 2 - y[0]

    form = {"rhs": field, "mass": (torch.ones(N, dtype=D), torch.zeros(N, dtype=D))}
    if residual:
        form = {"residual": lambda t, y, yp: (yp[0] + y[1], y[1] ** 2 - y[0])}
    solver = pnode.Solver(**form, method="beuler", step_size=1e-3, jacobian="matrix-free")
    with torch.no_grad():
        q, p = solver((Q, Q.sqrt()), T.flip(0)).ys
        assert float((p[-1] ** 2 - q[-1]).abs().max()) < 1e-9
        with pytest.raises(ConfigurationError, match=r"t = 0\.001: entry 1517"):
            solver((Q, bad()[N:]), T.flip(0))


def test_a_large_start_is_made_consistent_with_its_gradient():
    """0 = p^2 - a q: p = sqrt(a q), dp/da = p / (2 a), dp/dq = a / (2 p)."""
    a = torch.tensor(1.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: torch.cat([-y[N:], y[N:] ** 2 - a * y[:N]]), mass=ALGEBRAIC, params=[a],
        method="beuler", step_size=1e-3, jacobian="matrix-free", consistent_start=True,
    )  # fmt: skip
    y0 = torch.cat([Q, Q]).requires_grad_()
    start = solver(y0, T).ys[0]
    assert torch.allclose(start.detach(), GOOD, rtol=1e-13)
    gradients = torch.autograd.grad(start[N:].sum(), [a, y0])
    assert float(gradients[0]) == pytest.approx(float(0.5 * GOOD[N:].sum()), rel=1e-6)
    assert torch.allclose(gradients[1][:N], 0.5 / GOOD[N:], rtol=1e-6)
    assert float(gradients[1][N:].abs().max()) < 1e-6


def test_null_spaces_by_parts_are_those_of_the_whole():
    """Blocks 2 x 2 of rank 1, a band, a block 3 x 2, a row of zeros; rows and columns shuffled."""
    generator = torch.Generator().manual_seed(3)
    blocks = [torch.outer(*torch.randn(2, 2, generator=generator, dtype=D)) for _ in range(5)]
    blocks += [torch.diag(torch.full((9,), 2.0, dtype=D)) + torch.diag(torch.ones(8, dtype=D), 1)]
    blocks += [torch.randn(3, 2, generator=generator, dtype=D), torch.zeros(1, 2, dtype=D)]
    matrix = torch.block_diag(*blocks)
    size = len(matrix)
    rows, columns = (torch.randperm(size, generator=generator) for _ in range(2))
    matrix = matrix[rows][:, columns]
    u, singular, vh = torch.linalg.svd(matrix)
    rank = int((singular > 1e-12).sum())
    for given in (matrix, matrix.to_sparse(), matrix.to_sparse_csr()):
        left, right = null_spaces(given)
        assert left.shape == right.shape == (size, size - rank)
        assert torch.allclose(left @ left.T, u[:, rank:] @ u[:, rank:].T, atol=1e-12)
        assert torch.allclose(right @ right.T, vh[rank:].T @ vh[rank:], atol=1e-12)


def test_null_vector_of_a_large_connected_matrix():
    """Differences around a ring: constants are the only null vectors, on both sides."""
    size = 2100
    i = torch.arange(size)
    places = torch.stack([torch.cat([i, i]), torch.cat([i, (i + 1) % size])])
    values = torch.cat([torch.ones(size, dtype=D), -torch.ones(size, dtype=D)])
    ring = torch.sparse_coo_tensor(places, values, (size, size))
    constant = torch.full((size, 1), size**-0.5, dtype=D)
    for basis in null_spaces(ring):
        assert basis.shape == (size, 1)
        assert torch.allclose(basis.abs(), constant, atol=1e-12)

    def field(t, y):
        return y.roll(-1) - y + (y.sum() - size) / size

    assert torch.equal(solve(torch.ones(size, dtype=D), field, mass=ring)[-1], torch.ones(size))
    with pytest.raises(ConfigurationError, match=r"5\.00e-01"):
        solve(torch.full((size,), 1.5, dtype=D), field, mass=ring)


@pytest.mark.parametrize("singular", [False, True])
def test_operators_known_by_products(singular):
    """Random matrices with rows and columns in units of their own; one with a null vector."""
    generator = torch.Generator().manual_seed(5)
    size = 120
    q, p = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=D))[0] for _ in range(2)
    )
    values = torch.linspace(0.0 if singular else 0.2, 1.0, size, dtype=D)
    units = torch.logspace(-5, 5, size, dtype=D)
    matrix = units[:, None] * (q @ torch.diag(values) @ p) * units.flip(0)
    operator = SquareOperator(
        lambda v: matrix @ v, lambda w: matrix.T @ w, size, False, torch.device("cpu")
    )
    test = operator.test()
    assert (test.converged, test.singular) == (not singular, singular)
    if not singular:
        x = torch.randn(size, generator=generator, dtype=D) / units.flip(0)
        assert torch.allclose(operator.solve(matrix @ x).x * units.flip(0), x * units.flip(0), 1e-4)


def start_of(residual, y0, **keywords):
    solver = pnode.Solver(residual=residual, method="beuler", step_size=0.01, **keywords)
    return solver(torch.tensor(y0, dtype=D), torch.tensor([0.0, 0.02], dtype=D)).ys


@pytest.mark.parametrize("consistent_start", [False, True])
@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (lambda t, y, yp: yp + y * math.nan, NonFiniteVectorField, "whatever y'"),
        (lambda t, y, yp: yp * (y / 0.0), NonFiniteVectorField, "whatever y'"),
        (lambda t, y, yp: y * 0.0, ConfigurationError, "entry 0 .* index above 1"),
        (lambda t, y, yp: torch.zeros(2, dtype=D), ConfigurationError, "index above 1"),
        (lambda t, y, yp: (yp[0] + y[0]).expand(2), ConfigurationError, "entry 1 .*index above 1"),
        (
            lambda t, y, yp: torch.stack([yp.sum() - y[0], yp.sum() ** 2 - y[1]]),
            ConfigurationError,
            "null space depends on y'",
        ),
        (
            lambda t, y, yp: torch.stack([yp[0] + y[1], y[1].sqrt() - y[0] + 1.0]),
            NonFiniteVectorField,
            "derivative of an algebraic equation",
        ),
    ],
)
def test_starts_without_an_answer(residual, error, message, consistent_start):
    with pytest.raises(error, match=message):
        start_of(residual, [1.0, 0.0], consistent_start=consistent_start)


def test_equations_in_a_power_of_the_rate_are_not_algebraic():
    """(y')^3 = y^3: dF/dy' vanishes at y' = 0 alone. So does a square root's finiteness there."""
    y = start_of(lambda t, y, yp: yp**3 - y**3, [1.0, 2.0])[-1]
    assert torch.allclose(y, torch.tensor([1.0, 2.0], dtype=D) / 0.99**2, rtol=1e-8)


def test_equations_without_rates_alone():
    y = start_of(lambda t, y, yp: y * y - 4.0, [2.0, -2.0])
    assert torch.equal(y[-1], torch.tensor([2.0, -2.0], dtype=D))
    with pytest.raises(ConfigurationError, match="entry 0 "):
        start_of(lambda t, y, yp: y * y - 4.0, [3.0, -2.0])
    y = start_of(lambda t, y, yp: y * y - 4.0, [3.0, -1.0], consistent_start=True)
    assert torch.allclose(y[-1], torch.tensor([2.0, -2.0], dtype=D))


HALF_ALGEBRAIC, OVER = torch.tensor([1.0, 0.0], dtype=D), torch.tensor([0.0, 0.5], dtype=D)


def started(y, method="es325"):
    """Solve y' = z^2 - y, z + z^3 = y from a start whose z is not consistent."""
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1] ** 2 - y[0], y[1] + y[1] ** 3 - y[0]]),
        mass=HALF_ALGEBRAIC, method=method, step_size=0.25,
        consistent_start=True, compile=False,
        petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14},
    )  # fmt: skip
    return solver(y, OVER).ys


def test_derivatives_of_a_consistent_start():
    """By the closed form z(y) = 2 sinh(asinh(1.5 sqrt(3) y) / 3) / sqrt(3), to third order."""
    start = torch.tensor([1.0, 0.7], dtype=D)

    def derivatives(f):
        """The first three along the first entry."""
        y = start.clone().requires_grad_()
        found, value = [], f(y)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, y, create_graph=True)
            value = gradient[0]
            found.append(gradient.detach())
        return torch.stack(found)

    root = math.sqrt(3.0)
    exact = derivatives(lambda y: 2.0 * torch.sinh(torch.asinh(1.5 * root * y[0]) / 3.0) / root)
    found = derivatives(lambda y: started(y)[0, 1])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["rodaspr", "es325", "bdf2"])
def test_a_consistent_start_in_every_mode(method):
    start, along = torch.tensor([1.0, 0.7], dtype=D), torch.tensor([0.3, -0.2], dtype=D)

    def end(y):
        return started(y, method)[-1]

    expected = torch.autograd.functional.jacobian(end, start)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(start, along)
        found = [torch.autograd.forward_ad.unpack_dual(end(dual)).tangent]
    found += [torch.func.jvp(end, (start,), (along,))[1], torch.func.jacfwd(end)(start) @ along]
    found += [torch.func.jacrev(end)(start) @ along]
    for one in found:
        torch.testing.assert_close(one, expected @ along, rtol=1e-9, atol=1e-12)
    step = 1e-5 * along

    def gradient(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(end(y).square().sum(), y)[0]

    product = torch.autograd.functional.hvp(lambda y: end(y).square().sum(), start, along)[1]
    difference = (gradient(start + step) - gradient(start - step)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-7, atol=1e-9)

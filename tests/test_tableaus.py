"""Order conditions, and Runge-Kutta methods of the user's own."""

from __future__ import annotations

import itertools
import pickle
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from replica import arkimex_step, arkimex_tableau, dirk_tableau, petsc_tableau, replica
from small_net import SmallNet
from test_compiled import interpreted

import pnode
from pnode.base.interpolation import polynomial
from pnode.errors import BackwardError, ConfigurationError
from pnode.solvers.methods import METHODS, find_method
from pnode.solvers.order_conditions import defect, order_of, parts_of, trees

__all__ = ["interpreted"]  # a fixture

D = torch.float64
T = torch.tensor([0.0, 0.3, 0.6], dtype=D)
GRID = [0.1 * step for step in range(7)]
GAMMA = 1 - 2**-0.5
NORSETT = (3 + 3**0.5) / 6
TIGHT = {"snes_rtol": 1e-14, "snes_stol": 1e-14, "snes_atol": 1e-15}

#: Kutta's 3/8 rule; Norsett's and Alexander's SDIRK methods, of order 3 and 2; TR-BDF2; Ascher,
#: Ruuth & Spiteri's (2,2,2).
OWN = {
    "own_kutta": {
        "A": [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]], "b": [1 / 8, 3 / 8, 3 / 8, 1 / 8],
        "c": [0, 1 / 3, 2 / 3, 1], "embedded": [1 / 4, 1 / 4, 1 / 4, 1 / 4],
    },
    "own_norsett": {
        "A": [[NORSETT], [1 - 2 * NORSETT, NORSETT]], "b": [1 / 2, 1 / 2],
        "c": [NORSETT, 1 - NORSETT], "embedded": [1, 0],
    },
    "own_alexander": {
        "A": [[GAMMA], [1 - GAMMA, GAMMA]], "b": [1 - GAMMA, GAMMA], "c": [GAMMA, 1],
        "embedded": [0.5, 0.5],
    },
    "own_trbdf2": {
        "A": [[], [GAMMA, GAMMA], [2**0.5 / 4, 2**0.5 / 4, GAMMA]],
        "b": [2**0.5 / 4, 2**0.5 / 4, GAMMA], "c": [0, 2 * GAMMA, 1],
        "embedded": [(1 - 2**0.5 / 4) / 3, (3 * 2**0.5 / 4 + 1) / 3, GAMMA / 3],
    },
    "own_ars222": {
        "A": [[], [0, GAMMA], [0, 1 - GAMMA, GAMMA]], "b": [0, 1 - GAMMA, GAMMA],
        "c": [0, GAMMA, 1], "embedded": [0, 0.5, 0.5],
        "A_explicit": [[], [GAMMA], [1 - 1 / (2 * GAMMA), 1 / (2 * GAMMA)]],
        "b_explicit": [1 - 1 / (2 * GAMMA), 1 / (2 * GAMMA), 0],
    },
}  # fmt: skip
ORDERS = {"own_kutta": 4, "own_norsett": 3, "own_alexander": 2, "own_trbdf2": 2, "own_ars222": 2}
PLAIN = [name for name in OWN if name != "own_ars222"]


@pytest.fixture(autouse=True)
def own_methods():
    """Register them, as often as one likes."""
    for name, coefficients in OWN.items():
        assert pnode.tableau(name, **coefficients).order == ORDERS[name]


class Field(SmallNet):
    """A small network, with time and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=D))

    def forward(self, t, y):
        return self.net(y) * torch.cos(t) - self.rate * y


def state():
    torch.manual_seed(2)
    return torch.randn(3, dtype=D)


def weights_like(ys):
    return torch.cos(torch.arange(ys.numel(), dtype=D)).view(ys.shape)


def outcome(f, method, t=T, y0=None, **keywords):
    """Return the states, the gradients with respect to y0 and parameters, and the ledger."""
    y0 = (state() if y0 is None else y0).requires_grad_()
    solution = pnode.Solver(f, method=method, **keywords)(y0, t)
    loss = (solution.ys * weights_like(solution.ys)).sum()
    found = torch.autograd.grad(loss, [y0, *f.parameters()])
    return [solution.ys.detach(), *found], solution.stats


def difference(found, expected):
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )


# ------------------------------------------------------------------------------ order conditions


def test_numbers_of_trees():
    """The sequences A000081 and A000151 of the On-Line Encyclopedia of Integer Sequences."""
    assert [len(trees(n, 1)) for n in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]
    assert [len(trees(n, 2)) for n in range(1, 7)] == [2, 4, 14, 52, 214, 916]


def test_conditions_of_order_four_are_those_written_down():
    """For every tree of up to four nodes, on coefficients that fulfil none of them."""
    rng = np.random.default_rng(0)
    A, b = np.tril(rng.standard_normal((4, 4)), -1), rng.standard_normal(4)
    c = A.sum(1)
    written = {
        1: [b.sum() - 1], 2: [b @ c - 1 / 2], 3: [b @ c**2 - 1 / 3, b @ A @ c - 1 / 6],
        4: [b @ c**3 - 1 / 4, b @ (c * (A @ c)) - 1 / 8, b @ A @ c**2 - 1 / 12,
            b @ A @ A @ c - 1 / 24],
    }  # fmt: skip
    moduli = {
        1: [b], 2: [b * c], 3: [b * c**2, b * (A @ c)],
        4: [b * c**3, b * c * (A @ c), b * (A @ c**2), b * (A @ A @ c)],
    }  # fmt: skip
    for order, missed in written.items():
        scaled = [
            abs(x) / max(1.0, np.abs(m).sum())
            for x, m in zip(missed, moduli[order], strict=True)
        ]  # fmt: skip
        assert defect([(A, b)], order) == pytest.approx(max(scaled), rel=1e-12)


TABLE = [m for m in METHODS if m.scheme is not None and not m.linearly_implicit]


@pytest.mark.parametrize("method", TABLE, ids=[m.name for m in TABLE])
def test_every_method_of_the_table_fulfils_the_conditions_of_its_order_and_no_more(method):
    assert order_of(parts_of(method.scheme)) == method.order
    if method.ts_type == "rk" and method.adaptive:
        embedded = parts_of(method.scheme, method.scheme.b_embedded)
        assert order_of(embedded) == method.order - 1


def test_interpolant_of_tsit5_is_of_fourth_order():
    scheme = find_method("tsit5").scheme
    A = np.array(scheme.A)
    for theta in (0.2, 0.5, 0.9):
        # On a step of length theta h: A and b scaled by 1 / theta.
        weights = np.array(polynomial(scheme.interpolation, theta))
        assert max(defect([(A / theta, weights / theta)], n) for n in range(1, 5)) < 1e-14
        assert defect([(A / theta, weights / theta)], 5) > 1e-5
    assert np.allclose(polynomial(scheme.interpolation, 1.0), scheme.b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("compile", [False, True])
def test_dense_output_of_tsit5_is_its_interpolant(compile, interpreted):
    """Against the stages of one step, written down; its error falls with h^4 and better."""

    def f(t, y):
        return torch.cos(t) * y + y.roll(1) ** 2

    y0, scheme = state(), find_method("tsit5").scheme
    solver = pnode.Solver(f, method="tsit5", step_size=0.2, dense=True, compile=compile)
    ys = solver(y0, torch.tensor([0.0, 0.07, 0.2], dtype=D)).ys
    slopes = []
    for row, c in zip(scheme.A, scheme.c, strict=True):
        stage = y0 + 0.2 * sum(a * k for a, k in zip(row, slopes, strict=False))
        slopes.append(f(torch.tensor(0.2 * c, dtype=D), stage))
    expected = y0 + 0.2 * sum(
        w * k for w, k in zip(polynomial(scheme.interpolation, 0.35), slopes, strict=True)
    )
    assert torch.allclose(ys[1], expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------- the same as the built-in


@pytest.mark.parametrize("steps", [{"step_size": 0.1}, {"rtol": 1e-7, "atol": 1e-7}])
@pytest.mark.parametrize("name", ["rk4", "bosh3", "dopri5", "verner7"])
def test_a_method_of_petsc_registered_again_has_the_same_bits(name, steps):
    known, tableau = find_method(name), petsc_tableau(find_method(name))
    if not known.adaptive and "rtol" in steps:
        pytest.skip("no embedded solution")
    own = pnode.tableau(
        f"again_{name}", tableau["A"], torch.as_tensor(tableau["b"]), tableau["c"],
        tableau["b_embedded"],
    )  # fmt: skip
    assert (own.order, own.stages, own.fsal, own.kind, own.adaptive, own.checkpoint) == (
        known.order, known.stages, known.fsal, known.kind, known.adaptive, known.checkpoint
    )  # fmt: skip
    theirs, expected = outcome(Field(), name, **steps, compile=False)
    ours, ledger = outcome(Field(), own.name, **steps, compile=False)
    assert all(map(torch.equal, ours, theirs))
    assert ledger == expected


def test_a_dirk_of_petsc_registered_again_is_the_same_method():
    known, scheme = find_method("es325"), find_method("es325").scheme
    own = pnode.tableau("again_es325", scheme.A, scheme.b, embedded=scheme.b_embedded)
    assert (own.order, own.shares_ends, own.adjoint) == (3, True, known.adjoint)
    theirs, expected = outcome(Field(), "es325", rtol=1e-6, atol=1e-6, petsc_options=TIGHT)
    ours, ledger = outcome(Field(), own.name, rtol=1e-6, atol=1e-6, petsc_options=TIGHT)
    # Its coefficients were measured, to round-off.
    assert difference(ours, theirs) < 1e-10
    assert (ledger.steps, ledger.rejected) == (expected.steps, expected.rejected)


# ------------------------------------------------------------------------------- orders, gradients


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_a_replica(name):
    f, y0 = Field(), state().requires_grad_()
    implicit = find_method(name).implicit
    ours, _ = outcome(f, name, step_size=0.1, petsc_options=TIGHT if implicit else None)
    ys = replica(f, name, y0, GRID)[[0, 3, 6]]
    theirs = torch.autograd.grad((ys * weights_like(ys)).sum(), [y0, *f.parameters()])
    assert difference(ours, [ys.detach(), *theirs]) < (1e-9 if implicit else 1e-12)


@pytest.mark.parametrize("name", ["own_norsett", "own_alexander", "own_trbdf2"])
def test_petsc_takes_the_coefficients_of_a_dirk(name):
    tableau, scheme = dirk_tableau(find_method(name)), find_method(name).scheme
    for part in ("A", "b", "c"):
        assert np.allclose(tableau[part], getattr(scheme, part), rtol=0, atol=1e-15), part


def test_gradients_of_an_imex_method_are_those_of_a_replica():
    stiff, mild, y0 = Field(), Field(), state().requires_grad_()
    inputs = [y0, *stiff.parameters(), *mild.parameters()]
    solver = pnode.Solver(
        implicit=stiff, explicit=mild, method="own_ars222", step_size=0.1, petsc_options=TIGHT
    )
    ys = solver(y0, torch.tensor([0.0, 0.6], dtype=D)).ys[-1]
    ours = torch.autograd.grad((ys * weights_like(ys)).sum(), inputs)
    tableau, y = arkimex_tableau(find_method("own_ars222")), y0
    for t, after in itertools.pairwise(GRID):
        y = arkimex_step(stiff, mild, tableau, t, after - t, y)
    theirs = torch.autograd.grad((y * weights_like(y)).sum(), inputs)
    assert difference([ys.detach(), *ours], [y.detach(), *theirs]) < 1e-9


@pytest.mark.parametrize("name", list(OWN))
def test_orders_and_adaptive_steps(name):
    def stiff(t, y):
        return torch.stack([y[1], -y[0]])

    def mild(t, y):
        return -0.3 * y * y * torch.cos(t)

    y0, t = torch.tensor([1.0, 0.4], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    parts = {"rhs": lambda t, y: stiff(t, y) + mild(t, y)}
    exact = pnode.Solver(**parts, method="verner8", rtol=1e-13, atol=1e-13)(y0, t).ys[-1]
    if name == "own_ars222":
        parts = {"implicit": stiff, "explicit": mild}

    def error(**steps):
        found = pnode.Solver(**parts, method=name, petsc_options=TIGHT, **steps)(y0, t)
        return float((found.ys[-1] - exact).norm()), found.stats.steps

    counts = (16, 32, 64)
    errors = [error(step_size=1 / count)[0] for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert ORDERS[name] - 0.2 < slope < ORDERS[name] + 1.2, errors
    (loose, few), (tight, many) = (error(rtol=tol, atol=tol) for tol in (1e-3, 1e-5))
    assert tight < 0.2 * loose
    assert few < many < 1000


# ------------------------------------------------------------------------------- everything else


@pytest.mark.parametrize("name", PLAIN)
def test_budgets_and_disks_do_not_change_gradients(name, tmp_path):
    t = torch.linspace(0.0, 1.0, 3, dtype=D)
    keywords = {"step_size": 0.02, "compile": False}
    expected, _ = outcome(Field(), name, t, **keywords)
    for limits in ("1KiB", pnode.Checkpointing(memory="1KiB", disk=tmp_path)):
        ours, ledger = outcome(Field(), name, t, checkpointing=limits, **keywords)
        # Repeated DIRK steps begin with a slope that is solved for anew.
        assert difference(ours, expected) < (1e-9 if find_method(name).implicit else 1e-14)
        assert ledger.ram_bytes <= 1024
    assert pnode.plan(name, 50, 24, 1024).recomputed > 0


@pytest.mark.parametrize("name", PLAIN)
def test_second_derivatives_and_tangents(name):
    f, y0, v = Field(), state(), torch.ones(3, dtype=D)
    solver = pnode.Solver(f, method=name, step_size=0.1, petsc_options=TIGHT)

    def loss(y):
        return (solver(y, T).ys ** 3).sum()

    def gradient(y):
        y = y.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(y), y, create_graph=True)
        return found, y

    first, y = gradient(y0)
    (product,) = torch.autograd.grad(first @ v, y)
    ahead, behind = (gradient(y0 + sign * 1e-5 * v)[0].detach() for sign in (1, -1))
    # Central differences, of whose 1e-10 round-off leaves about as much.
    assert difference([product], [(ahead - behind) / 2e-5]) < 1e-7
    _, tangent = torch.func.jvp(loss, (y0,), (v,))
    assert float(tangent) == pytest.approx(float(first.detach() @ v), rel=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_dense_output_and_events(name):
    def f(t, y):
        return torch.stack([y[1], -y[0]])

    y0 = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    solver = pnode.Solver(f, method=name, step_size=0.01, dense=True)
    t = torch.tensor([0.0, 0.005, 0.505, 1.0], dtype=D)
    ys = solver(y0, t).ys
    assert torch.allclose(ys[:, 0], torch.cos(t), rtol=0, atol=1e-4)
    (slope,) = torch.autograd.grad(ys[2, 0], y0)
    assert torch.allclose(slope, torch.stack([t[2].cos(), t[2].sin()]), rtol=0, atol=1e-4)
    falling = pnode.Solver(f, method=name, step_size=0.01, event_fn=lambda t, y: y[0])
    event = falling(y0, torch.tensor([0.0, 3.0])).event_time
    assert float(event) == pytest.approx(torch.pi / 2, abs=1e-4)
    (slope,) = torch.autograd.grad(event, y0)
    # cos(t + a) for y0 = (cos a, -sin a): dt / dy0[1] = 1.
    assert torch.allclose(slope, torch.tensor([0.0, 1.0], dtype=D), atol=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_compiled_steps(name, interpreted):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        for steps in ({"step_size": 0.1}, {"rtol": 1e-4, "atol": 1e-4}):
            options = {"jacobian": "dense"} if find_method(name).implicit else {}
            ours, ledger = outcome(Field(), name, **steps, **options, compile=True)
            theirs, expected = outcome(Field(), name, **steps, **options, compile=False)
            assert difference(ours, theirs) < (1e-6 if find_method(name).implicit else 1e-12)
            assert (ledger.steps, ledger.rejected) == (expected.steps, expected.rejected)


def test_stages_float32_tuples_and_decreasing_times():
    torch.manual_seed(0)
    y0 = torch.randn(2, dtype=torch.float32), torch.randn(3, 1, dtype=torch.float32)

    def f(t, y):
        return -y[0] * torch.cos(t), y[1] * y[0].sum()

    def end(method, t):
        return pnode.odeint(f, y0, torch.tensor(t), method=method, step_size=0.05)

    for ours, theirs in zip(end("own_kutta", [1.0, 0.0]), end("rk4", [1.0, 0.0]), strict=True):
        assert ours.dtype is torch.float32
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gauss_newton_stages_of_an_own_method():
    f, y0 = Field(), state().requires_grad_()
    solution = pnode.Solver(f, method="own_kutta", step_size=0.1)(y0, T)
    total, cotangents = 0.0, weights_like(solution.ys)

    def add(stage):
        nonlocal total
        value = f(torch.tensor(stage.t, dtype=D), stage.state)
        total = total + torch.autograd.grad(value, f.rate, stage.adjoint)[0]

    solution.stages(cotangents, add)
    (expected,) = torch.autograd.grad((solution.ys * cotangents).sum(), f.rate)
    assert torch.allclose(total, expected, rtol=1e-12)
    with pytest.raises(BackwardError, match="dense"):
        dense = pnode.Solver(f, method="own_kutta", step_size=0.1, dense=True)(y0, T)
        dense.stages(cotangents, add)


def test_a_solver_of_an_own_method_is_pickled():
    solver = pnode.Solver(Field(), method="own_alexander", step_size=0.1)
    copy = pickle.loads(pickle.dumps(solver))
    assert torch.equal(copy(state(), T).ys, solver(state(), T).ys)


# ---------------------------------------------------------------------------------------- arguments


def test_names_numbers_and_what_is_listed():
    own = pnode.tableau(
        "fractions", [[0, 0], [Fraction(2, 3), 0]], [Fraction(1, 4), Fraction(3, 4)],
        torch.tensor([0.0, 2 / 3], dtype=D), order=1, reference="A. Ralston (1962)",
    )  # fmt: skip
    assert own is pnode.tableau(
        "fractions", [[], [2 / 3]], np.array([1 / 4, 3 / 4]), order=1, reference="A. Ralston (1962)"
    )
    assert own.order == 1  # as claimed, less than it has
    assert own.scheme.reference == "A. Ralston (1962)"
    assert own in pnode.methods()
    assert find_method("fractions") is own
    with pytest.raises(ConfigurationError, match=r"choose one of .*'fractions'"):
        pnode.Solver(Field(), method="nonsense")
    with pytest.raises(ConfigurationError, match="give step_size"):
        pnode.Solver(Field(), method="fractions")
    with pytest.raises(ConfigurationError, match="does not solve problems given as implicit="):
        pnode.Solver(implicit=Field(), explicit=Field(), method="own_kutta", step_size=0.1)
    # What is equal to b but for round-off is the end at the last stage, exactly.
    assert find_method("own_trbdf2").scheme.stiffly_accurate


HEUN = {"A": [[], [1]], "b": [1 / 2, 1 / 2], "c": [0, 1]}


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": ""}, "name='': give a name"),
    ({"name": 3}, "name=3: give a name"),
    ({"name": "naïve"}, "ASCII"),
    ({"name": "dopri5"}, "name='dopri5' is taken, by another method"),
    ({"name": "2a"}, "name='2a' is taken"),
    ({"name": "prssp2"}, "name='prssp2' is taken"),
    ({"name": "gl2"}, "is taken, by a method of another package"),
    ({"name": "own_kutta"}, "is taken, by a tableau with other coefficients"),
    ({"b": []}, "b is empty"),
    ({"b": 1.0}, "b=1.0 is not a sequence"),
    ({"b": "12"}, "b='12' is not a sequence"),
    ({"b": [1 / 2, "x"]}, r"b\[1\]='x' is not a real number"),
    ({"b": [1 / 2, 1j]}, r"b\[1\]=1j is not a real number"),
    ({"b": [1 / 2, float("nan")]}, r"b\[1\]=nan must be finite"),
    ({"b": torch.tensor([0.5, 0.5], requires_grad=True)}, r"give b\.detach\(\)"),
    ({"A": torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)}, r"give A\.detach\(\)"),
    ({"b": [1 / 2, 1 / 4, 1 / 4]}, "A has 2 rows, and b has 3 entries"),
    ({"A": [[], [1, 0, 0]]}, r"A\[1\] has 3 entries, and b has 2"),
    ({"A": 3}, "A=3 is not a matrix"),
    ({"A": [0, 1]}, r"A\[0\]=0 is not a sequence"),
    ({"A": [[0, 1], [1, 0]]}, r"A\[0\]\[1\]=1.0 is above the diagonal.*Gauss"),
    ({"c": [0, 0.5]}, r"c\[1\]=0.5 is not the sum of row 1 of A, 1.0"),
    ({"c": [0]}, "c has 1 entries, and b has 2"),
    ({"embedded": [1]}, "embedded has 1 entries"),
    ({"embedded": [1 / 2, 1 / 2]}, "embedded is the same as b"),
    ({"embedded": [1 / 2, 1 / 4]}, "embedded sums up to 0.75"),
    ({"b": [1 / 2, 1 / 3]}, "b sums up to 0.833"),
    ({"order": 3}, "conditions of order 3 are missed by .* or claim order=2"),
    ({"order": 11}, "order=11 is more than can be checked, 10"),
    ({"order": 0}, "order=0 must be a whole number"),
    ({"order": 2.0}, "order=2.0 must be a whole number"),
    ({"order": True}, "order=True must be a whole number"),
    ({"b": [0.33333333, 0.66666667], "order": 2}, "conditions of order 2 are missed"),
    ({"b_explicit": [0, 1]}, "b_explicit is given without A_explicit"),
    ({"A_explicit": [[], [1]]}, "A has zeros on the diagonal, and A_explicit is given"),
    ({"A": [[1 / 2], [1 / 2, 1 / 2]], "c": None, "A_explicit": [[], [1, 1]]},
     r"A_explicit\[1\]\[1\]=1.0 is on the diagonal"),
    ({"A": [[1 / 2], [1]], "c": [1 / 2, 1]}, r"A\[1\]\[1\] is 0: .* only the first"),
    ({"A": [[], [1 / 4, 3 / 4]]}, "b differs from the last row of A, by up to 2.5e-01"),
])  # fmt: skip
def test_what_is_refused(changes, message):
    before = pnode.methods()
    given = {"name": "refused", **HEUN, **changes}
    with pytest.raises(ConfigurationError, match=message):
        pnode.tableau(**given)
    assert pnode.methods() == before


def test_conditions_that_couple_the_parts_of_an_imex_method_count():
    """Both parts are of order 2 by themselves; with other abscissae they are not together."""
    coefficients = OWN["own_ars222"] | {
        "A_explicit": [[], [1 / 2], [1 / 2, 1 / 2]], "b_explicit": [0, 1, 0], "embedded": None,
    }  # fmt: skip
    assert pnode.tableau("uncoupled", **coefficients).order == 1
    parts = parts_of(find_method("uncoupled").scheme)
    assert [order_of([part]) for part in parts] == [2, 2]
    with pytest.raises(ConfigurationError, match="conditions of order 2"):
        pnode.tableau("other", **coefficients, order=2)


def test_a_scheme_knows_itself_from_others():
    """Compiled graphs and PETSc objects are kept by method."""
    method = find_method("own_kutta")
    other = replace(method, own=replace(method.own, b=(1 / 4,) * 4))
    assert method != other
    assert {method: 1}.get(other) is None

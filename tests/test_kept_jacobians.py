"""``jacobian_reuse="auto"``: fewer matrices, the same numbers, and wrong guesses undone."""

from __future__ import annotations

import pytest
import torch
from replica import replica

import pnode
from pnode.errors import NonlinearSolveFailed
from pnode.solvers.linear.constancy import rounded
from pnode.solvers.petsc.integrator import TimeIntegrator

D = torch.float64
TIGHT = {"snes_rtol": 1e-15, "snes_stol": 1e-15}
ONE_STEP = ["beuler", "cn", "implicit_midpoint", "sdirk2", "trbdf2", "es325", "esdirk6"]


class Field(torch.nn.Module):
    """Stiff, nonlinear, not autonomous; acts on each row by itself."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = torch.nn.Parameter(torch.randn(3, 5, generator=generator, dtype=D) * 0.6)
        self.outer = torch.nn.Parameter(torch.randn(5, 3, generator=generator, dtype=D) * 0.6)
        self.rates = torch.tensor([1.0, 30.0, 900.0], dtype=D)

    def forward(self, t, y):
        return torch.tanh(y @ self.inner) @ self.outer * torch.cos(t) - self.rates * y


def initial(rows=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 3, generator=generator, dtype=D).requires_grad_()


def gradients(problem, y0, parameters, **keywords):
    """Return the ledger, and the states with their gradients."""
    solver = pnode.Solver(**problem, **{"compile": False, **keywords})
    solution = solver(y0, torch.tensor([0.0, 0.3, 1.0], dtype=D))
    loss = solution.ys[1:].square().sum() + solution.ys[1].sum()
    found = torch.autograd.grad(loss, [y0, *parameters])
    return solution.stats, [solution.ys.detach(), *found]


def difference(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def linear(n=12, form="imex"):
    """Diffusion with constant coefficients, one of the four forms of a problem."""
    stencil = torch.diag(torch.full((n,), -2.0, dtype=D))
    stencil += torch.diag(torch.ones(n - 1, dtype=D), 1) + torch.diag(
        torch.ones(n - 1, dtype=D), -1
    )
    matrix = torch.nn.Parameter(40.0 * stencil)
    bias = torch.nn.Parameter(torch.linspace(0.0, 1.0, n, dtype=D))
    mass = torch.linspace(1.0, 2.0, n, dtype=D)

    def implicit(t, y):
        return matrix @ y + bias * torch.cos(t)

    problem = {
        "imex": {"implicit": implicit, "explicit": lambda t, y: bias * torch.sin(y)},
        "rhs": {"rhs": implicit},
        "mass": {"rhs": implicit, "mass": mass},
        "residual": {"residual": lambda t, y, yp: mass * yp - implicit(t, y)},
    }[form]
    return problem | {"params": [matrix, bias]}, [matrix, bias]


def start(n=12):
    return torch.linspace(0.0, 1.0, n, dtype=D).requires_grad_()


# ----------------------------------------------------------------------- Jacobians kept over a step


@pytest.mark.parametrize("jacobian", ["dense", "block", "sparse"])
@pytest.mark.parametrize("method", ONE_STEP)
def test_equals_new_jacobians_at_each_iterate(method, jacobian):
    """To what Newton's method leaves: the residual 1e-11 of its first, or 1e-12 of a step."""

    def run(reuse, **more):
        field, y0 = Field(), initial()
        return gradients(
            {"rhs": field}, y0, list(field.parameters()), method=method, step_size=0.1,
            jacobian=jacobian, jacobian_reuse=reuse, **more,
        )  # fmt: skip

    _, exact = run("iteration", petsc_options=TIGHT)
    fresh, _ = run("iteration")
    kept, ours = run("auto")
    assert difference(ours, exact) < 1e-10
    assert kept.steps <= kept.jacobians < fresh.jacobians
    assert kept.factorizations < fresh.factorizations
    # The adjoint is taken with the matrices of the converged stages.
    assert kept.backward.jacobians == fresh.backward.jacobians


@pytest.mark.parametrize("method", ["cn", "es325", "esdirk6"])
def test_gradient_equals_autograd_through_a_replica(method):
    field, y0 = Field(), initial()
    parameters = list(field.parameters())
    solver = pnode.Solver(field, method=method, step_size=0.1, compile=False)
    ys = solver(y0, torch.tensor([0.0, 0.5, 1.0], dtype=D)).ys
    ours = torch.autograd.grad(ys.square().sum(), [y0, *parameters])
    states = replica(field, method, y0, [k / 10 for k in range(11)])[[0, 5, 10]]
    expected = torch.autograd.grad(states.square().sum(), [y0, *parameters])
    assert difference(ours, expected) < 1e-9


@pytest.mark.parametrize("method", ["es325", "esdirk6", "ark4"])
def test_adaptive_steps(method):
    def run(reuse):
        field, y0 = Field(), initial()
        problem = {"rhs": field}
        if method == "ark4":
            problem = {"implicit": field, "explicit": lambda t, y: -torch.sin(y) * t}
        return gradients(
            problem, y0, list(field.parameters()), method=method, rtol=1e-5, atol=1e-7,
            jacobian_reuse=reuse,
        )  # fmt: skip

    fresh, expected = run("iteration")
    kept, ours = run("auto")
    assert kept.steps == fresh.steps
    # Step sizes come from differences of states, which amplify what Newton's method leaves.
    assert difference(ours, expected) < 1e-8
    assert kept.jacobians < 0.4 * fresh.jacobians


def test_stages_with_one_diagonal_share_a_matrix():
    """Of six implicit stages of esdirk6, one factorization a step where convergence is fast."""
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method="esdirk6", step_size=0.01, compile=False)
    with torch.no_grad():
        stats = solver(y0, [0.0, 0.1]).stats
    assert (stats.steps, stats.jacobians) == (10, 10)
    # The slope that the first step begins with is solved for as well.
    assert stats.factorizations <= 12


def test_adaptive_step_that_fails_is_tried_with_new_jacobians(monkeypatch):
    """Where a kept Jacobian fails, the step is not shortened before new ones were tried."""
    tried = []
    original = TimeIntegrator._try_newton

    def spy(self, s, step, where):
        error = original(self, s, step, where)
        tried.append(error)
        return error

    monkeypatch.setattr(TimeIntegrator, "_try_newton", spy)

    def field(t, y):
        return -200.0 * torch.atan(3.0 * (y - 1.0 - 5.0 * torch.tanh(40.0 * (t - 0.5))))

    def run(reuse):
        # Nine iterations do for quadratic convergence.
        solver = pnode.Solver(
            field, method="es325", rtol=1e-3, atol=1e-5, jacobian_reuse=reuse, compile=False,
            petsc_options={"snes_max_it": 9},
        )  # fmt: skip
        with torch.no_grad():
            return solver(torch.zeros(2, dtype=D), [0.0, 1.0])

    kept = run("auto")
    assert None in tried
    assert torch.allclose(kept.ys[-1], run("iteration").ys[-1], rtol=1e-6)


def test_bits_of_a_step_do_not_depend_on_those_before():
    field, y0 = Field(), initial()
    solver = pnode.Solver(field, method="cn", step_size=0.1, compile=False)
    t = torch.linspace(0.0, 1.0, 11, dtype=D)
    with torch.no_grad():
        ys = solver(y0, t).ys
        for index in (3, 7):
            again = solver(ys[index].clone(), t[index : index + 2]).ys[-1]
            assert torch.equal(again, ys[index + 1])


def test_preconditioner_is_kept_over_a_step():
    field, y0 = Field(), initial()
    keywords = {"method": "es325", "step_size": 0.1, "jacobian": "matrix-free"}
    stats, ours = gradients(
        {"rhs": field}, y0, [field.inner], preconditioner="block", **keywords
    )  # fmt: skip
    _, expected = gradients({"rhs": field}, y0, [field.inner], petsc_options=TIGHT,
                            method="es325", step_size=0.1, jacobian_reuse="iteration")  # fmt: skip
    assert difference(ours, expected) < 1e-9
    assert stats.jacobians == stats.steps


@pytest.mark.parametrize("method", ["bdf", "bdf3", "ra34pw2", "rodas3"])
def test_methods_with_rules_of_their_own_keep_them(method):
    step = {} if method == "bdf" else {"step_size": 0.05}
    found = []
    for reuse in ("auto", "iteration"):
        field, y0 = Field(), initial()
        found.append(
            gradients(
                {"rhs": field}, y0, [field.inner], method=method, jacobian_reuse=reuse, **step
            )
        )
    assert same_bits(found[0][1], found[1][1])
    assert found[0][0] == found[1][0]


# ------------------------------------------------------------------------------ constant Jacobians

LINEAR = {
    "ark4": ("ark4", "imex"), "es325": ("es325", "rhs"), "cn": ("cn", "rhs"),
    "cn-mass": ("cn", "mass"), "beuler-residual": ("beuler", "residual"),
}  # fmt: skip


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("case", list(LINEAR))
def test_linear_part_is_evaluated_three_times(case, jacobian):
    method, form = LINEAR[case]

    def run(reuse, **more):
        problem, parameters = linear(form=form)
        return gradients(
            problem, start(), parameters, method=method, step_size=0.05, jacobian=jacobian,
            jacobian_reuse=reuse, **more,
        )  # fmt: skip

    _, expected = run("iteration", petsc_options=TIGHT)
    once, _ = run("constant")
    stats, ours = run("auto")
    assert difference(ours, expected) < 1e-10
    # For a residual, the consistency of y0 was looked at before.
    assert stats.jacobians == once.jacobians + 2
    assert stats.backward.jacobians == 3
    # One matrix each for the three that are evaluated, and that of the initial slope.
    assert stats.factorizations <= 4
    assert stats.backward.factorizations <= 6
    # One iteration a system.
    assert stats.newton <= 1.3 * stats.steps * {"ark4": 5, "es325": 4}.get(method, 1)


def test_linear_samples():
    rates = torch.tensor([[1.0, 50.0], [2.0, 3.0]], dtype=D, requires_grad=True)

    def run(reuse):
        problem = {"rhs": lambda t, y: (y @ rates.T).flip(-1) * -0.5 - y, "params": [rates]}
        y0 = torch.linspace(0.1, 1.0, 8, dtype=D).view(4, 2).requires_grad_()
        return gradients(
            problem, y0, [rates], method="cn", step_size=0.05, jacobian="block",
            jacobian_reuse=reuse,
        )  # fmt: skip

    _, expected = run("iteration")
    stats, ours = run("auto")
    assert difference(ours, expected) < 1e-10
    assert stats.jacobians == stats.backward.jacobians == 3


def test_linear_part_with_adaptive_steps():
    def run(reuse):
        problem, parameters = linear()
        return gradients(
            problem, start(), parameters, method="ark4", rtol=1e-6, atol=1e-8, jacobian_reuse=reuse
        )

    _, expected = run("iteration")
    stats, ours = run("auto")
    assert difference(ours, expected) < 1e-8
    # One more where round-off was all that was left of a residual.
    assert 3 <= stats.jacobians <= 4 and stats.backward.jacobians == 3


@pytest.mark.parametrize("method", ["cn", "ark4"])
def test_linear_part_within_a_budget(method):
    """The same bits, whatever is repeated: a repeated step need not know of the guess."""

    def run(**more):
        problem, parameters = linear(form="imex" if method == "ark4" else "rhs")
        return gradients(problem, start(), parameters, method=method, step_size=0.03, **more)

    _, expected = run()
    stats, ours = run(checkpointing=12 * 8 * (12 if method == "ark4" else 4))
    assert stats.backward.recomputed > 0
    assert same_bits(ours, expected)


def test_second_backward_has_the_same_bits():
    problem, parameters = linear()
    y0 = start()
    solver = pnode.Solver(method="ark4", step_size=0.05, compile=False, **problem)
    loss = solver(y0, [0.0, 1.0]).ys[-1].square().sum()
    first = torch.autograd.grad(loss, [y0, *parameters], retain_graph=True)
    assert same_bits(torch.autograd.grad(loss, [y0, *parameters]), first)


def test_float32():
    problem, _ = linear(form="rhs")
    matrix, bias = (p.detach().float().requires_grad_() for p in problem["params"])
    single = {"rhs": lambda t, y: matrix @ y + bias * torch.cos(t), "params": [matrix, bias]}
    y0 = start().detach().float().requires_grad_()
    stats, ours = gradients(single, y0, [matrix, bias], method="cn", step_size=0.05)
    problem, parameters = linear(form="rhs")
    _, expected = gradients(problem, start(), parameters, method="cn", step_size=0.05)
    assert stats.jacobians == stats.backward.jacobians == 3
    # f rounds to 6e-8 of terms a hundred times as large as their sum.
    assert difference([x.double() for x in ours], expected) < 1e-4


# ------------------------------------------------------------------------------- guesses undone


def switching(after=0.55):
    """Linear, with other coefficients from a time on: the first ten Jacobians are the same."""
    first = torch.tensor([[-40.0, 1.0], [2.0, -1.0]], dtype=D)
    second = torch.tensor([[-1.0, 30.0], [-30.0, -5.0]], dtype=D)
    gain = torch.nn.Parameter(torch.tensor([1.0, 0.5], dtype=D))

    def field(t, y):
        return torch.where(t > after, second @ y, first @ y) + gain * torch.cos(t)

    return field, gain


@pytest.fixture
def undone(monkeypatch):
    """Steps that were repeated without a guess."""
    steps = []
    original = TimeIntegrator._step_without_guess

    def spy(self, s, step, index, where):
        steps.append(index)
        original(self, s, step, index, where)

    monkeypatch.setattr(TimeIntegrator, "_step_without_guess", spy)
    return steps


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["cn", "beuler", "es325", "esdirk6"])
def test_wrong_guess_is_undone(method, jacobian, undone):
    def run(reuse):
        field, gain = switching()
        y0 = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
        return gradients(
            {"rhs": field, "params": [gain]}, y0, [gain], method=method, step_size=0.1,
            jacobian=jacobian, jacobian_reuse=reuse,
        )  # fmt: skip

    _, expected = run("iteration")
    assert undone == []
    stats, ours = run("auto")
    assert undone == [5]
    assert difference(ours, expected) < 1e-10
    assert stats.jacobians > 3 and stats.backward.jacobians > 3


@pytest.mark.parametrize("method", ["cn", "implicit_midpoint"])
def test_bits_after_a_wrong_guess(method, undone):
    """Repeated from its start, a step has the bits of the sweep that had guessed."""
    field, _ = switching()
    t = torch.linspace(0.0, 1.0, 11, dtype=D)
    solver = pnode.Solver(field, method=method, step_size=0.1, compile=False)
    with torch.no_grad():
        ys = solver(torch.tensor([1.0, -2.0], dtype=D), t).ys
        assert undone == [{"cn": 5, "implicit_midpoint": 6}[method]]
        for index in (4, 5, 6, 8):
            again = solver(ys[index].clone(), t[index : index + 2]).ys[-1]
            assert torch.equal(again, ys[index + 1])


def test_adaptive_wrong_guess_is_undone(undone):
    def run(reuse):
        field, gain = switching()
        y0 = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
        return gradients(
            {"rhs": field, "params": [gain]}, y0, [gain], method="es325", rtol=1e-4, atol=1e-6,
            jacobian_reuse=reuse,
        )  # fmt: skip

    _, expected = run("iteration")
    _, ours = run("auto")
    assert len(undone) == 1
    assert difference(ours, expected) < 1e-7


@pytest.mark.parametrize("units", [3, 6])
def test_wrong_guess_within_a_budget(units):
    """The adjoint guesses too, from the end."""

    def run(**more):
        field, gain = switching()
        y0 = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
        return gradients(
            {"rhs": field, "params": [gain]}, y0, [gain], method="cn", step_size=0.05, **more
        )

    _, expected = run()
    stats, ours = run(checkpointing=units * 16)
    assert stats.backward.recomputed > 0
    assert same_bits(ours, expected)


def test_piecewise_linear_network(undone):
    """The same Jacobian from step to step until a unit switches."""
    generator = torch.Generator().manual_seed(0)
    inner, outer = (torch.randn(3, 3, generator=generator, dtype=D) for _ in range(2))
    inner, outer = torch.nn.Parameter(inner), torch.nn.Parameter(outer)

    def run(reuse):
        y0 = torch.tensor([1.0, -0.5, 0.3], dtype=D, requires_grad=True)
        problem = {
            "rhs": lambda t, y: outer @ torch.relu(inner @ y) - 2.0 * y + 4.0 * torch.cos(9.0 * t),
            "params": [inner, outer],
        }
        return gradients(
            problem, y0, [inner, outer], method="cn", step_size=0.01, jacobian_reuse=reuse
        )

    _, expected = run("iteration")
    stats, ours = run("auto")
    assert difference(ours, expected) < 1e-9
    assert undone and 3 < stats.jacobians < 400


def test_field_that_fails_all_the_same():
    def field(t, y):
        return torch.where(t > 0.45, torch.nan, 1.0) - y

    solver = pnode.Solver(field, method="cn", step_size=0.05, compile=False)
    with pytest.raises(pnode.errors.NonFiniteVectorField), torch.no_grad():
        solver(start(), [0.0, 1.0])


@pytest.mark.parametrize("reuse", ["auto", "step", "solve", "iteration"])
@pytest.mark.parametrize("method", ["cn", "beuler", "es325", "bdf2"])
def test_field_that_leaves_its_domain(method, reuse):
    """SNES would call an iteration converged whose last line search had a short step."""

    def field(t, y):
        return -torch.sqrt(y) - 1.0

    solver = pnode.Solver(field, method=method, step_size=0.25, jacobian_reuse=reuse, compile=False)
    with pytest.raises(pnode.errors.NonFiniteVectorField), torch.no_grad():
        solver(torch.ones(1, dtype=D), [0.0, 1.0])


def test_newton_failure_is_still_one():
    solver = pnode.Solver(lambda t, y: 1.0 + y * y, method="beuler", step_size=1.0, compile=False)
    with pytest.raises(NonlinearSolveFailed), torch.no_grad():
        solver(torch.tensor([3.0], dtype=D), [0.0, 2.0])


def test_rounded_shift():
    shift = 1.0 / (0.25 * 0.05)
    assert rounded(shift * (1.0 + 1e-13)) == rounded(shift) == shift
    assert abs(rounded(1.0 / 3.0) - 1.0 / 3.0) <= 2.0**-38
    assert rounded(0.0) == 0.0 and rounded(float("inf")) == float("inf")

"""Cost integrals: the method's own quadrature, its gradient, and no influence on the solve."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from small_net import SmallNet
from torch.autograd import grad

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.3, 0.9], dtype=D)
METHODS = [
    "rk4", "dopri5", "ssprk43", "beuler", "cn", "implicit_midpoint", "es325", "sdirk2", "rodaspr",
    "ra34pw2", "bdf1", "bdf3",
]  # fmt: skip
methods = pytest.mark.parametrize("method", METHODS)
# Whose states are solved alone, and r is taken at their stages: pnode/sweeping/quadrature.py.
ALONE = ["beuler", "cn", "implicit_midpoint", "es325", "sdirk2", "bdf1", "bdf3"]


class Field(SmallNet):
    def forward(self, t, y):
        return self.net(y) * torch.cos(t) - 0.3 * y


class Cost(torch.nn.Module):
    """Two numbers, with a parameter of their own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.4, dtype=D))

    def forward(self, t, y):
        return torch.stack([self.weight * (y**2).sum(), torch.sin(y[0]) * t])


class Augmented(torch.nn.Module):
    """What cost integrals are without: one more part of the state."""

    def __init__(self, field, cost):
        super().__init__()
        self.field, self.cost = field, cost

    def forward(self, t, x):
        return self.field(t, x[0]), self.cost(t, x[0])


def state():
    return torch.tensor([0.6, -0.4, 0.2], dtype=D, requires_grad=True)


def loss_of(ys, costs):
    return (ys**3).sum() + (costs**2).sum() + costs[1, 0]


def difference(found, expected):
    found, expected = (torch.cat([one.reshape(-1) for one in all_]) for all_ in (found, expected))
    return float((found - expected).detach().norm() / expected.detach().norm())


@methods
def test_integrals_are_those_of_the_augmented_state(method):
    f, r, y0 = Field(), Cost(), state()
    inputs = [y0, *f.parameters(), *r.parameters()]
    solution = pnode.Solver(f, cost=r, method=method, step_size=0.1)(y0, T)
    ys, costs = pnode.Solver(Augmented(f, r), method=method, step_size=0.1)(
        (y0, torch.zeros(2, dtype=D)), T
    ).ys
    assert solution.costs.shape == (3, 2)
    assert solution.ys.shape == (3, 3)
    # Newton's method stops by the state alone, and leaves about 1e-11.
    assert difference([solution.ys, solution.costs], [ys, costs]) < 1e-9
    found = grad(loss_of(solution.ys, solution.costs), inputs)
    assert difference(found, grad(loss_of(ys, costs), inputs)) < 1e-9
    if method in ("rk4", "dopri5", "ssprk43"):
        assert torch.equal(solution.costs, costs)


@pytest.mark.parametrize("method", ["cn", "es325", "bdf3"])
def test_integrals_from_stages_are_those_beside_the_state(method):
    """With a monitor both are integrated; backwards in time, and by the times, too."""
    f, r, y0 = Field(), Cost(), state()
    t = T.flip(0).clone().requires_grad_()
    found = []
    for monitor in (None, lambda *seen: None):
        solution = pnode.Solver(
            f, cost=r, method=method, step_size=0.1, monitor=monitor, compile=False,
            petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14},
        )(y0, t)  # fmt: skip
        values = [solution.ys, solution.costs]
        found.append([*values, *grad(loss_of(*values), [y0, t, *f.parameters(), r.weight])])
    assert max(difference([one], [other]) for one, other in zip(*found, strict=True)) < 1e-12


@pytest.mark.parametrize("method", ["cn", "es325", "bdf3"])
def test_integrals_go_on_from_breaks(method):
    """Of a cost that jumps there: exact where it is constant, and as beside the state."""
    y0, found = state(), []
    r = lambda t, y: torch.stack([(t > 0.45) + 1.0 + 0.0 * y[0], (t > 0.45) * y[1] ** 2])  # noqa: E731
    for monitor in (None, lambda *seen: None):
        solution = pnode.Solver(
            Field(), cost=r, method=method, step_size=0.1, monitor=monitor, compile=False,
            petsc_options={"snes_rtol": 1e-14, "snes_stol": 1e-14},
        )(y0, T, breakpoints=[0.2, 0.45])  # fmt: skip
        found.append([solution.costs, *grad((solution.costs**2).sum(), y0)])
    assert difference(*found) < 1e-12
    assert solution.costs[:, 0].tolist() == pytest.approx([0.0, 0.3, 0.9 + 0.45], rel=1e-13)
    assert found[0][0][:, 0].tolist() == pytest.approx([0.0, 0.3, 0.9 + 0.45], rel=1e-13)


@methods
def test_integrals_change_nothing(method):
    """Not by a bit, however large they are."""
    f, y0 = Field(), state()
    plain = pnode.Solver(f, method=method, step_size=0.1)(y0, T)
    solution = pnode.Solver(f, cost=lambda t, y: 1e8 * y, method=method, step_size=0.1)(y0, T)
    assert solution.stats.newton == plain.stats.newton
    assert torch.equal(solution.ys, plain.ys)
    if method in ALONE:  # nor do they change the gradient of what depends on the states alone
        inputs = [y0, *f.parameters()]
        slopes = [grad(one.ys.sin().sum(), inputs) for one in (solution, plain)]
        assert all(map(torch.equal, *slopes))


@pytest.mark.parametrize("method", ["dopri5", "es325", "rodaspr", "bdf"])
def test_integrals_choose_no_steps(method):
    """A stiff cost, which in the state itself makes more steps."""
    f, y0 = Field(), state()
    stiff = lambda t, y: 1e6 * torch.sin(40.0 * t) * y[:1]  # noqa: E731
    options = {"method": method, "rtol": 1e-6, "atol": 1e-8}
    plain = pnode.Solver(f, **options)(y0, T)
    solution = pnode.Solver(f, cost=stiff, **options)(y0, T)
    within = pnode.Solver(Augmented(f, stiff), **options)((y0, torch.zeros(1, dtype=D)), T)
    assert solution.stats.steps == plain.stats.steps < within.stats.steps
    assert solution.stats.rejected == plain.stats.rejected
    if method in ("es325", "bdf"):  # solved alone
        assert torch.equal(solution.ys, plain.ys)
    else:  # the tolerances are scaled, and divide to other last bits
        assert difference([solution.ys], [plain.ys]) < 1e-9


@pytest.mark.parametrize("options", [{}, {"petsc_options": {"snes_rtol": 1e-4}}])
def test_bdf_beside_its_integrals_does_what_it_does_without(options):
    """It keeps a Jacobian over many steps, and ends Newton's method in the same way."""
    plain, solution = (
        pnode.Solver(
            Field(), cost=cost, method="bdf", rtol=1e-6, atol=1e-8, compile=False,
            monitor=lambda *seen: None, **options,
        )(state(), T)
        for cost in (None, lambda t, y: 1e6 * torch.sin(40.0 * t) * y[:1])
    )  # fmt: skip
    for name in ("steps", "rejected", "newton", "jacobians"):
        assert getattr(solution.stats, name) == getattr(plain.stats, name)
    assert difference([solution.ys], [plain.ys]) < 1e-9


@methods
def test_a_state_at_rest(method):
    """Nothing is left to do for Newton's method, but the integral."""
    solver = pnode.Solver(
        lambda t, y: -y, cost=lambda t, y: torch.ones_like(y), method=method, step_size=0.1
    )
    costs = solver(torch.zeros(1, dtype=D), T).costs
    assert torch.allclose(costs[:, 0], T, rtol=1e-13)


def test_a_cost_that_is_not_linear_where_the_field_is():
    """Newton's method is done after one step, with the integral still at the state before it."""
    options = {"step_size": 0.1, "jacobian_reuse": "constant"}
    found = []
    for reuse in ("constant", "iteration"):
        options["jacobian_reuse"] = reuse
        solver = pnode.Solver(
            lambda t, y: -y, cost=lambda t, y: y**3, method="implicit_midpoint", **options
        )
        y0 = torch.ones(1, dtype=D, requires_grad=True)
        costs = solver(y0, T).costs
        found.append([costs, *grad(costs[-1].sum(), y0)])
    assert difference(*found) < 1e-12
    # The midpoint rule on y_n = q^n, whose middles are (y_n + y_{n+1}) / 2.
    q = 0.95 / 1.05
    middles = [0.5 * (q**n + q ** (n + 1)) for n in range(9)]
    assert float(found[0][0][-1].detach()) == pytest.approx(0.1 * sum(m**3 for m in middles))


ORDERS = {"rk4": 4, "cn": 2, "es325": 3, "rodaspr": 4, "bdf3": 3}


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence(method):
    """On y = exp(-t^2 / 2), whose square integrates to an error function."""
    solve = lambda n: pnode.Solver(  # noqa: E731
        lambda t, y: -t * y, cost=lambda t, y: y**2, method=method, step_size=1.0 / n
    )(torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)).costs[-1]  # fmt: skip
    exact = math.sqrt(math.pi) / 2.0 * math.erf(1.0)
    coarse, fine = (abs(float(solve(n)) - exact) for n in (40, 80))
    assert math.log2(coarse / fine) > ORDERS[method] - 0.25


FULL = torch.tensor([[3.0, 1.0, 0.0], [0.2, 2.0, -0.5], [0.0, 0.4, 1.5]], dtype=D)
FORMS = {
    "imex": ("ark3", lambda f: {
        "implicit": lambda t, y: -(y**3), "explicit": f,
    }),
    "mass": ("cn", lambda f: {"rhs": f, "mass": torch.tensor([1.0, 2.0, 3.0], dtype=D)}),
    "full mass": ("bdf2", lambda f: {"rhs": f, "mass": FULL}),
    "sparse mass": ("beuler", lambda f: {"rhs": f, "mass": FULL.to_sparse()}),
    "residual": ("bdf2", lambda f: {"residual": lambda t, y, yp: yp * (1.0 + y**2) - f(t, y)}),
    "residual by theta": (
        "beuler", lambda f: {"residual": lambda t, y, yp: yp * (1.0 + y**2) - f(t, y)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    """The gradient by differences; the states as without."""
    method, functions = FORMS[form]
    f, r, y0 = Field(), Cost(), state()
    given = functions(f)
    inputs = [y0, r.weight, f.net[0].weight]
    solver = pnode.Solver(
        **given, cost=r, params=f.parameters(), method=method, step_size=0.1
    )  # fmt: skip
    plain = pnode.Solver(**given, params=f.parameters(), method=method, step_size=0.1)
    assert difference([solver(y0, T).ys], [plain(y0, T).ys]) < 1e-9
    gradient = grad(loss_of(solver(y0, T).ys, solver(y0, T).costs), inputs)
    torch.manual_seed(3)
    along = [torch.randn_like(tensor) for tensor in inputs]

    def at(factor):
        with torch.no_grad():
            for tensor, v in zip(inputs, along, strict=True):
                tensor.add_(factor * v)
            solution = solver(y0, T)
            for tensor, v in zip(inputs, along, strict=True):
                tensor.sub_(factor * v)
        return float(loss_of(solution.ys, solution.costs))

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    found = sum(float((g * v).sum()) for g, v in zip(gradient, along, strict=True))
    assert math.isclose(found, expected, rel_tol=1e-7)


@pytest.mark.parametrize("jacobian", ["dense", "block", "sparse", "matrix-free"])
@pytest.mark.parametrize("method", ["cn", "rodaspr", "bdf2"])
def test_every_jacobian(method, jacobian):
    torch.manual_seed(5)
    k = torch.randn(3, dtype=D, requires_grad=True)
    y0 = torch.randn(4, 3, dtype=D, requires_grad=True)
    found = []
    for kind in (jacobian, "dense"):
        solution = pnode.Solver(
            lambda t, y: torch.tanh(y * k) - y * y.roll(1, dims=1),
            cost=lambda t, y: (k * y).sum(), params=[k], method=method, step_size=0.1,
            jacobian=kind,
        )(y0, T)  # fmt: skip
        assert solution.costs.shape == (3,)
        found.append([solution.costs, *grad(solution.costs.sin().sum(), [y0, k])])
    assert difference(*found) < 1e-9


@pytest.mark.parametrize("kind", ["tensor", "pair", "view"])
@pytest.mark.parametrize("method", ["cn", "es325", "rodaspr", "bdf2"])
def test_integrands_cost_no_evaluation_of_f(method, kind):
    """Their part of a graph is told from that of f: see pnode/field/pair_parts.py."""
    evaluations = []

    def f(t, y):
        evaluations.append(torch.is_grad_enabled())
        parts = y if kind == "pair" else (y[:1], y[1:])
        found = (torch.cos(parts[1].sum() * t) * parts[0], torch.tanh(parts[1] * parts[0]))
        return found if kind == "pair" else torch.cat(found)

    def r(t, y):
        y = torch.cat(y) if kind == "pair" else y
        if kind == "view":
            return y
        return torch.stack([y.square().sum(), y[0] * t])

    y0 = torch.tensor([0.6, -0.4, 0.2], dtype=D, requires_grad=True)
    start = y0.split((1, 2)) if kind == "pair" else y0
    tight = {} if method == "rodaspr" else {"snes_rtol": 1e-13, "snes_stol": 1e-13}
    counts, slopes = [], []
    for cost in (None, r):
        evaluations.clear()
        solver = pnode.Solver(
            f, cost=cost, method=method, step_size=0.1, compile=False, petsc_options=tight
        )
        solution = solver(start, T)
        ys = torch.cat(solution.ys, 1) if kind == "pair" else solution.ys
        value = ys[-1].sin().sum() + (0.0 if cost is None else solution.costs[-1].cos().sum())
        slopes.append(grad(value, y0)[0])
        counts.append(len(evaluations))
    if kind != "pair" or method != "rodaspr":  # of the parts of a tuple f is evaluated again there
        assert counts[1] == counts[0]

    def augmented(t, x):
        y = (x[:1], x[1:3]) if kind == "pair" else x[:3]
        value = f(t, y)
        return torch.cat([*(value if kind == "pair" else (value,)), r(t, y)])

    replica = pnode.Solver(
        augmented, method=method, step_size=0.1, compile=False, jacobian="dense",
        petsc_options=tight,
    )  # fmt: skip
    x = replica(torch.cat([y0, y0.new_zeros(solution.costs.shape[1])]), T).ys[-1]
    (expected,) = grad(x[:3].sin().sum() + x[3:].cos().sum(), y0)
    assert torch.allclose(slopes[1], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["rk4", "cn", "bdf2"])
def test_budgets_and_disks(method, tmp_path):
    f, r, y0 = Field(), Cost(), state()
    found = []
    disk = pnode.Checkpointing(memory="3kB", disk=tmp_path)
    for limit in (None, "5kB", disk):
        solution = pnode.Solver(f, cost=r, method=method, step_size=0.02, checkpointing=limit)(
            y0, T
        )
        found.append(grad(loss_of(solution.ys, solution.costs), [y0, *f.parameters(), r.weight]))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@pytest.mark.parametrize("method", ["dopri5", "es325"])
def test_dense_output(method):
    f, r, y0 = Field(), Cost(), state()
    options = {"method": method, "step_size": 0.2, "dense": True}
    solution = pnode.Solver(f, cost=r, **options)(y0, T)
    ys, costs = pnode.Solver(Augmented(f, r), **options)((y0, torch.zeros(2, dtype=D)), T).ys
    assert difference([solution.costs], [costs]) < 1e-10
    inputs = [y0, *f.parameters(), r.weight]
    found = grad(loss_of(solution.ys, solution.costs), inputs)
    assert difference(found, grad(loss_of(ys, costs), inputs)) < 1e-10


def test_second_derivatives_up_to_an_event():
    """Steps of given lengths, as those to an event are, are never rejected."""
    weight = torch.linspace(1.0, 2.0, 2, dtype=D)
    f = lambda t, y: torch.stack([y[1], 5.0 * (1.0 - y[0] ** 2) * y[1] - y[0]])  # noqa: E731
    r = lambda t, y: (y**2).sum().reshape(1) * torch.cos(3.0 * t)  # noqa: E731
    found = []
    for compile in (False, True):
        y0 = torch.tensor([1.2, 0.3], dtype=D, requires_grad=True)
        solution = pnode.Solver(
            f, cost=r, method="es325", rtol=1e-5, atol=1e-7, compile=compile,
            event_fn=lambda t, y: y[0] + 0.8,
        )(y0, T * 5.0)  # fmt: skip
        assert solution.reason == "event"
        value = solution.costs.square().sum() + solution.ys[-1].sin().sum()
        slope = grad(value, y0, create_graph=True)[0]
        found.append([slope.detach(), *grad(slope @ weight, y0)])
    assert difference(*found) < 1e-6


def test_up_to_an_event():
    """The integral of y = exp(-t) until it is a: 1 - a, whatever the time; d/da = -1."""
    a = torch.tensor(0.4, dtype=D, requires_grad=True)
    seen = []
    solver = pnode.Solver(
        lambda t, y: -y, cost=lambda t, y: y, method="dopri5", rtol=1e-10, atol=1e-12,
        event_fn=lambda t, y: y[0] - a, monitor=lambda step, t, y: seen.append(y.shape),
    )  # fmt: skip
    solution = solver(torch.ones(1, dtype=D), torch.tensor([0.0, math.inf], dtype=D))
    assert solution.reason == "event"
    assert set(seen) == {(1,)}
    assert float(solution.costs[-1].detach()) == pytest.approx(0.6, abs=1e-9)
    (slope,) = grad(solution.costs[-1].sum(), a)
    assert float(slope) == pytest.approx(-1.0, abs=1e-8)


def test_derivatives_of_every_order():
    f, r, y0 = Field(), Cost(), state()
    solver = pnode.Solver(f, cost=r, method="es325", step_size=0.1)
    within = pnode.Solver(Augmented(f, r), method="es325", step_size=0.1)
    inputs = [y0, *f.parameters(), r.weight]
    found = []
    for solve in (
        lambda: (solver(y0, T).ys, solver(y0, T).costs),
        lambda: within((y0, torch.zeros(2, dtype=D)), T).ys,
    ):
        first = grad(loss_of(*solve()), inputs, create_graph=True)
        found.append(grad(sum(g.sin().sum() for g in first), inputs))
    assert difference(*found) < 1e-8
    _, tangent = torch.func.jvp(lambda y: solver(y, T).costs, (y0.detach(),), (y0.detach(),))
    J = torch.autograd.functional.jacobian(lambda y: solver(y, T).costs, y0.detach())
    assert difference([tangent], [J @ y0.detach()]) < 1e-10


def test_forward_mode_by_parameters_of_a_cost_beside_a_mass_matrix():
    """Whose algebraic equations are looked at without the cost."""
    r, mass = Cost(), torch.tensor([1.0, 2.0, 3.0], dtype=D)
    solver = pnode.Solver(Field(), cost=r, mass=mass, method="cn", step_size=0.3)
    names = {name: p.detach() for name, p in solver.named_parameters()}

    def solve(w):
        return torch.func.functional_call(
            solver, names | {"cost.weight": w}, (state().detach(), T)
        ).costs

    weight = r.weight.detach()
    costs, tangent = torch.func.jvp(solve, (weight,), (torch.ones_like(weight),))
    # They are linear in it; Newton's method leaves about 1e-11.
    assert difference([tangent[:, 0]], [costs[:, 0] / weight]) < 1e-10
    assert not tangent[:, 1].any()


def test_output_times_and_tuples():
    """By an output time, the derivative of the integral is r there."""
    t = T.clone().requires_grad_()
    solver = pnode.Solver(
        lambda t, y: (y[1], -y[0]), cost=lambda t, y: y[0] * y[1], method="dopri5", step_size=0.05
    )
    y0 = (torch.ones(2, dtype=D), torch.zeros(2, dtype=D))
    solution = solver(y0, t)
    assert isinstance(solution.ys, tuple)
    assert solution.costs.shape == (3, 2)
    (slope,) = grad(solution.costs[-1].sum(), t)
    p, q = (float(part[-1, 0].detach()) for part in solution.ys)
    assert float(slope[-1]) == pytest.approx(2.0 * p * q, rel=1e-9)


def test_float32():
    f = lambda t, y: -y  # noqa: E731
    single = pnode.Solver(f, cost=lambda t, y: y, method="cn", step_size=0.01)
    costs = single(torch.ones(1), torch.tensor([0.0, 1.0])).costs
    assert costs.dtype is torch.float32
    assert float(costs[-1]) == pytest.approx(1.0 - math.exp(-1.0), rel=1e-4)


ADAPTIVE = {"rtol": 1e-6, "atol": 1e-8}
CONVERGED = {"petsc_options": {"snes_rtol": 1e-13, "snes_stol": 1e-14}}
COMPILED = {
    "bosh3": ADAPTIVE, "cn": {"step_size": 0.1, **CONVERGED}, "es325": ADAPTIVE | CONVERGED,
    "rodaspr": ADAPTIVE, "bdf": ADAPTIVE | {"petsc_options": {"snes_stol": 1e-14}},
}  # fmt: skip


@pytest.mark.parametrize("method", COMPILED)
def test_compiled_sweeps_integrate_them(method):
    """No error norm or Newton iteration looks at them; tangents have them too."""
    f, r, y0, t = Field(), Cost(), state(), T.clone().requires_grad_()
    along, found, counts = torch.tensor([0.3, -1.0, 2.0], dtype=D), [], []
    cost = lambda t, y: r(t, y) * torch.tensor([1.0, 1e6], dtype=D)  # noqa: E731
    for compiled in (True, False):
        solver = pnode.Solver(
            f, cost=cost, params=[*f.parameters(), r.weight], method=method, compile=compiled,
            **COMPILED[method],
        )  # fmt: skip
        solution = solver(y0, t)
        assert ("compiled='whole sweeps'" in repr(solver)) == compiled
        values = [solution.ys, solution.costs * torch.tensor([1.0, 1e-6], dtype=D)]
        _, Z = torch.func.jvp(lambda y, s=solver: s(y, T).costs, (y0.detach(),), (along,))
        found.append([*values, *grad(loss_of(*values), [y0, t, *f.parameters(), r.weight]), Z])
        counts.append((solution.stats.steps, solution.stats.rejected))
    assert max(difference([one], [other]) for one, other in zip(*found, strict=True)) < 1e-11
    assert counts[0] == counts[1]


BAD = {
    "a number": (lambda t, y: 1.0, pnode.VectorFieldError, "float"),
    "another dtype": (lambda t, y: y.float(), pnode.VectorFieldError, "float32"),
    "complex": (lambda t, y: torch.complex(y, y), pnode.VectorFieldError, "are real"),
    "nothing": (lambda t, y: y[:0], pnode.ConfigurationError, "at least one"),
    "another shape": (
        lambda t, y: y if t < 0.2 else y[:1], pnode.VectorFieldError, "must not change",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_costs(kind):
    cost, error, text = BAD[kind]
    solver = pnode.Solver(Field(), cost=cost, method="rk4", step_size=0.1)
    with pytest.raises(error, match=text):
        solver(state(), T)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_costs_of_a_complex_state_are_real(method):
    y0 = torch.tensor([1.0 + 2.0j, 0.5j], dtype=torch.complex128)

    def costs(cost):
        solver = pnode.Solver(lambda t, y: 1j * y, cost=cost, method=method, step_size=0.01)
        return solver(y0, torch.tensor([0.0, 1.0])).costs[-1]

    assert float(costs(lambda t, y: y.abs().square().sum())) == pytest.approx(5.25, rel=1e-9)
    with pytest.raises(pnode.VectorFieldError, match=r"view_as_real"):
        costs(lambda t, y: (y * y.conj()).sum())


@pytest.mark.parametrize("method", ["cn", "es325", "bdf3"])
def test_several_cotangents_in_one_sweep(method):
    f, r, y0 = Field(), Cost(), state()
    inputs = [y0, *f.parameters(), r.weight]
    solution = pnode.Solver(f, cost=r, method=method, step_size=0.1)(y0, T)
    torch.manual_seed(2)
    seeds = torch.randn(3, 3, 2, dtype=D)
    together = grad(solution.costs, inputs, seeds, is_grads_batched=True, retain_graph=True)
    steps = solution.stats.backward.steps
    single = [grad(solution.costs, inputs, seed, retain_graph=True) for seed in seeds]
    assert steps == solution.stats.steps
    assert difference(together, [torch.stack(rows) for rows in zip(*single, strict=True)]) < 1e-12


@pytest.mark.parametrize("method", ["cn", "es325", "bdf3"])
def test_a_cost_that_changes_before_the_gradient_is_refused(method):
    factor, y0 = [1.0], state()
    solver = pnode.Solver(
        Field(), cost=lambda t, y: factor[0] * y.sin(), method=method, step_size=0.3
    )
    costs = solver(y0, T).costs
    factor[0] = 1.001
    with pytest.raises(pnode.errors.FieldChanged, match=r"^cost is not the one"):
        grad(costs.sum(), y0)


NOT_FINITE = {
    "value": (lambda t, y: (t - 0.5).sqrt() * y, "cost returned NaN"),
    "derivative": (lambda t, y: (y - y.detach()).abs().sqrt(), "derivative of cost"),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("method", ["cn", "bdf3"])
def test_costs_that_are_not_finite(method, kind):
    cost, text = NOT_FINITE[kind]
    y0 = state()
    with pytest.raises(pnode.NonFiniteVectorField, match=text) as caught:
        costs = pnode.Solver(Field(), cost=cost, method=method, step_size=0.3)(y0, T).costs
        grad(costs.sum(), y0)
    assert caught.value.method == method
    assert caught.value.step is not None


@pytest.mark.parametrize(("method", "step_size"), [("rk4", 0.5), ("dopri5", None), ("radau5", None),
                                                   ("rodaspr", None), ("cn", 0.5)])  # fmt: skip
@pytest.mark.parametrize("faulty", ["cost", "the vector field"])
def test_who_is_not_finite_at_the_start_is_named(method, step_size, faulty):
    def call(t, y, own):
        return -y * torch.where(t > 0.0, 1.0, torch.nan if own == faulty else 1.0)

    solver = pnode.Solver(
        lambda t, y: call(t, y, "the vector field"), method=method, step_size=step_size,
        cost=lambda t, y: call(t, y, "cost").sum(),
    )  # fmt: skip
    with pytest.raises(pnode.NonFiniteVectorField, match=f"^{faulty} returned NaN"):
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D))


def test_who_is_not_finite_later_is_one_of_two():
    cost = lambda t, y: torch.where(t < 0.5, y, torch.nan).sum()  # noqa: E731
    solver = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.25, cost=cost)
    with pytest.raises(pnode.NonFiniteVectorField, match=r"^the vector field or cost returned NaN"):
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D))


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_a_module_with_the_result_of_its_own_solve_is_freed(method):
    """No sweep keeps what owns r or f alive: nodes of torch hide circles from the collector."""
    r, f = Cost(), Field()
    r.solution = pnode.Solver(lambda t, y: -y, cost=r, method=method, step_size=0.3)(state(), T)
    f.solution = pnode.Solver(f, cost=lambda t, y: y, method=method, step_size=0.3)(state(), T)
    there = weakref.ref(r), weakref.ref(f)
    costs = f.solution.costs
    del r, f
    gc.collect()
    assert there[0]() is None and there[1]() is None
    y0 = state()
    plain = pnode.Solver(Field(), cost=lambda t, y: y, method=method, step_size=0.3)(y0, T)
    assert torch.equal(costs, plain.costs)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_what_is_refused(method):
    with pytest.raises(pnode.ConfigurationError, match="callable"):
        pnode.Solver(Field(), cost=3.0)
    opaque = lambda t, y: torch.from_numpy(y.detach().numpy())  # noqa: E731
    by_numpy = pnode.Solver(Field(), cost=opaque, method=method, step_size=0.1)
    with pytest.raises(pnode.VectorFieldError, match="inside of a transform"):
        torch.func.jvp(lambda y: by_numpy(y, T).costs, *[(state().detach(),)] * 2)
    undeclared = torch.ones((), dtype=D, requires_grad=True)
    solver = pnode.Solver(Field(), cost=lambda t, y: undeclared * y, method=method, step_size=0.1)
    with pytest.raises(pnode.ConfigurationError, match="params"):
        solver(state(), T)


# Entries of the state with an infinite tolerance.


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf"])
def test_infinite_tolerances_neither_control_nor_count(method):
    f, y0 = Field(), state()
    wild = lambda t, y: 1e3 * torch.sin(40.0 * t) * y[:1]  # noqa: E731
    options = {"method": method, "rtol": 1e-6}
    plain = pnode.Solver(f, atol=1e-8, **options)(y0, T)
    free = pnode.Solver(Augmented(f, wild), atol=(1e-8, math.inf), **options)(
        (y0, torch.zeros(1, dtype=D)), T
    )
    assert free.stats.steps == plain.stats.steps
    assert difference([free.ys[0]], [plain.ys]) < 1e-7
    entries = torch.tensor([1e-8, 1e-8, math.inf], dtype=D)
    pnode.Solver(f, atol=entries, **options)(y0, T)
    with pytest.raises(pnode.ConfigurationError, match="atol=inf"):
        pnode.Solver(f, atol=math.inf, **options)
    with pytest.raises(pnode.ConfigurationError, match=r"rtol\[2\]=inf"):
        pnode.Solver(f, method=method, rtol=entries)
    with pytest.raises(pnode.ConfigurationError, match="infinite"):
        pnode.Solver(f, atol=entries * math.inf, **options)(y0, T)


@pytest.mark.parametrize("method", ["beuler", "bdf"])
def test_integrals_beside_a_residual_backwards_in_time(method):
    """The integral's equation has the sign of the state's."""
    y0 = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    forms = {
        "residual": lambda t, y, y_dot: y_dot + (1.0 + t) * y.sin(),
        "rhs": lambda t, y: -(1.0 + t) * y.sin(),
    }
    for times in ([0.0, 0.4, 0.8], [0.8, 0.4, 0.0]):
        one, other = (
            pnode.Solver(
                **{name: f}, method=method, cost=lambda t, y: y.square().sum(), step_size=0.1,
                compile=False,
            )(y0, times).costs
            for name, f in forms.items()
        )  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
        slopes = [grad(costs[-1], y0)[0] for costs in (one, other)]
        torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-10)

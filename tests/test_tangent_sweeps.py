"""Tangents from the stages of the steps: those of the pair's solve, for less."""

from __future__ import annotations

import pytest
import torch
from small_net import SmallNet
from test_compiled import interpreted
from torch.func import functional_call, jacfwd, jacrev, jvp

import pnode
from pnode.adjoint import rosenbrock_stages, tangents
from pnode.derivatives import stage_tangents, tangent_solves
from pnode.errors import FieldChanged

__all__ = ["interpreted"]  # a fixture

D = torch.float64
T = torch.tensor([0.0, 0.25, 1.0], dtype=D)
Y0 = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.3, -0.2]], dtype=D)


class Field(SmallNet):
    """Depends on time, state and parameters."""

    def forward(self, t, y):
        return self.net(y) * torch.cos(t) - 0.5 * y


class Damping(torch.nn.Module):
    """The explicit part of a split field."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.3, 0.7, 0.1], dtype=D))

    def forward(self, t, y):
        return -self.rate * y * torch.sin(t)


def solver_of(kind: str, **options) -> pnode.Solver:
    """Return a solver of one kind of problem."""
    options.setdefault("step_size", 0.125)
    if kind == "imex":
        return pnode.Solver(implicit=Field(), explicit=Damping(), compile=False, **options)
    if kind == "mass":
        mass = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.2, 1.5]], dtype=D)
        options["mass"] = torch.block_diag(mass, mass)
    if kind == "cost":
        options["cost"] = lambda t, y: y.square().sum()
    if kind == "block":
        options["jacobian"] = "block"
    if kind == "matrix-free":
        options["jacobian"] = "matrix-free"
    return pnode.Solver(Field(), compile=options.pop("compile", False), **options)


CASES = [
    *(("rhs", m) for m in ("rk4", "dopri5", "ssprk43", "cn", "beuler", "implicit_midpoint")),
    *(("rhs", m) for m in ("es325", "esdirk6", "bdf1", "bdf2", "bdf4")),
    ("imex", "ark3"), ("imex", "bpr3"), ("mass", "beuler"), ("mass", "bdf2"),
    ("mass", "implicit_midpoint"), ("cost", "rk4"), ("cost", "es325"), ("cost", "bdf2"),
    ("block", "es325"), ("matrix-free", "cn"),
    *(("rhs", m) for m in ("rodaspr", "rodas3", "assp3p3s1c", "lassp3p4s2c")),
    ("cost", "ra34pw2"), ("block", "rodaspr"), ("matrix-free", "ros2m"),
]  # fmt: skip


def function(solver: pnode.Solver, t: torch.Tensor = T):
    """Return the solve as a function of y0 and the parameters, and these."""
    parameters = {name: tensor.detach() for name, tensor in solver.named_parameters()}

    def solve(y0, parameters):
        solution = functional_call(solver, parameters, (y0, t))
        costs = () if solution.costs is None else (solution.costs[:, None],)
        return torch.cat([solution.ys.flatten(1), *costs], 1)

    return solve, parameters


@pytest.fixture
def ways(monkeypatch):
    """Note how tangents were found: True from stages."""
    found = []
    of_stages = tangent_solves.of_stages

    def noted(*arguments):
        known = of_stages(*arguments)
        found.append(known is not None)
        return known

    monkeypatch.setattr(tangent_solves, "of_stages", noted)
    return found


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_tangents_are_those_of_the_pair_and_of_the_adjoint(kind, method, ways, monkeypatch):
    """One tangent, all at once, and backward sweeps for every output."""
    tolerance = 1e-8 if kind != "rhs" or method.startswith("bdf") else 1e-11
    if method in ("rk4", "dopri5", "ssprk43"):
        tolerance = 1e-13
    solve, parameters = function(solver_of(kind, method=method))
    torch.manual_seed(0)
    along = torch.randn_like(Y0), {n: torch.randn_like(p) for n, p in parameters.items()}
    _, one = jvp(solve, (Y0, parameters), along)
    forward = jacfwd(solve, (0, 1))(Y0, parameters)
    assert ways == [True, True]
    adjoint = jacrev(solve, (0, 1))(Y0, parameters)
    assert torch.allclose(forward[0], adjoint[0], rtol=tolerance, atol=tolerance)
    total = torch.einsum("tiab,ab->ti", adjoint[0], along[0])
    for name in parameters:
        assert torch.allclose(forward[1][name], adjoint[1][name], rtol=tolerance, atol=tolerance)
        total = total + (adjoint[1][name] * along[1][name]).flatten(2).sum(2)
    assert torch.allclose(one, total, rtol=tolerance, atol=10 * tolerance)
    monkeypatch.setattr(stage_tangents, "has_tangents", lambda *_: False)
    _, pair = jvp(solve, (Y0, parameters), along)
    assert ways[2:] == [False]
    assert torch.allclose(one, pair, rtol=tolerance, atol=10 * tolerance)


class Pendulum(torch.nn.Module):
    """A separable field of positions and momenta, which depends on time."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([1.3, 0.4], dtype=D))

    def forward(self, t, y):
        q, p = y
        return self.rate[0] * p + p**3, -torch.sin(q) + self.rate[1] * q**2 * torch.cos(t)


@pytest.mark.parametrize("method", ["symplectic_euler", "velocity_verlet", "forest_ruth"])
def test_symplectic_methods(method, ways):
    """Forward, by k cotangents in one sweep, and by differences; time decreases."""
    solver = pnode.Solver(Pendulum(), method=method, step_size=0.125, compile=False)

    def solve(q, p, rate):
        return torch.cat(functional_call(solver, {"rhs.rate": rate}, ((q, p), T.flip(0))).ys, 1)

    given = Y0[0, :2], Y0[1, :2], torch.tensor([1.1, 0.6], dtype=D)
    forward, reverse = jacfwd(solve, (0, 1, 2))(*given), jacrev(solve, (0, 1, 2))(*given)
    assert ways == [True]
    for k, (one, other) in enumerate(zip(forward, reverse, strict=True)):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
        for j in range(2):
            moved = [[x.clone() for x in given] for _ in range(2)]
            moved[0][k][j] += 1e-6
            moved[1][k][j] -= 1e-6
            differences = (solve(*moved[0]) - solve(*moved[1])) / 2e-6
            assert torch.allclose(one[..., j], differences, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["dopri5", "es325", "bdf", "rodaspr"])
def test_adaptive_steps_and_decreasing_times(method, ways):
    options = {"step_size": None, "rtol": 1e-7, "atol": 1e-7}
    solve, parameters = function(solver_of("rhs", method=method, **options), T.flip(0))
    forward = jacfwd(solve)(Y0, parameters)
    assert ways == [True]
    tolerance = 1e-6 if method == "bdf" else 1e-10
    assert torch.allclose(forward, jacrev(solve)(Y0, parameters), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("method", "stages"), [("es325", 4), ("cn", 1), ("bdf1", 1)])
def test_systems_of_all_tangents_share_their_factors(method, stages):
    """A matrix for each implicit stage, a back-substitution for each tangent, no Newton step."""
    for number in (1, 5):
        solver, along = solver_of("rhs", method=method), torch.randn(number, *Y0.shape, dtype=D)
        parameters = {n: p.detach() for n, p in solver.named_parameters()}
        kept = []

        def solve(y0, solver=solver, parameters=parameters, kept=kept):
            solution = functional_call(solver, parameters, (y0, T))
            kept.append(solution.stats)
            return solution.ys

        torch.func.vmap(lambda v, solve=solve: jvp(solve, (Y0,), (v,))[1])(along)
        (stats,) = kept
        tangents, systems = stats.tangents, stages * stats.steps
        assert (tangents.steps, tangents.newton) == (stats.steps, 0)
        assert (tangents.jacobians, tangents.krylov) == (systems, number * systems)
        assert tangents.rhs <= systems + 1 + stats.steps  # and an explicit first stage


def test_tangents_of_kept_graphs_evaluate_nothing():
    solver = solver_of("rhs", method="rk4")
    kept = []

    def solve(y0):
        kept.append(solver(y0, T).stats)
        return solver(y0, T).ys

    with torch.no_grad():
        jvp(solve, (Y0,), (torch.ones_like(Y0),))
    stats = kept[0].tangents
    assert (stats.steps, stats.rhs, stats.jvp) == (8, 0, 32)


def test_gradients_after_tangents_are_the_same():
    """The graphs and checkpoints of the solve stay, for its own backward sweep."""
    for method in ("rk4", "es325"):
        solver = solver_of("rhs", method=method)
        found = []
        for tangent in (False, True):
            y0 = Y0.clone().requires_grad_()
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(y0, torch.ones_like(y0))
                ys = solver(dual if tangent else y0, T).ys
                plain = torch.autograd.forward_ad.unpack_dual(ys).primal
                found.append(torch.autograd.grad(plain.square().sum(), y0)[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("method", ["rk4", "es325"])
def test_tangents_are_differentiated_by_a_sweep_of_the_pair(method, ways, monkeypatch):
    """Its steps are taken once its adjoint is wanted."""
    solver = solver_of("rhs", method=method)
    parameters = list(solver.parameters())

    def penalty():
        kept = []

        def solve(y0):
            solution = solver(y0, T)
            kept.append(solution.stats)
            return solution.ys[-1]

        _, tangent = jvp(solve, (Y0,), (torch.ones_like(Y0),))
        before = kept[0].tangents.steps, kept[0].tangents.newton
        first = torch.autograd.grad(tangent.square().sum(), parameters, create_graph=True)
        assert (kept[0].tangents.steps, before[0]) == (16, 8)
        assert before[1] == 0
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), parameters)]

    one = penalty()
    assert ways == [True]
    monkeypatch.setattr(tangent_solves, "of_stages", lambda *_: None)
    other = [p.clone() for p in one]
    solver = solver_of("rhs", method=method)
    _, tangent = jvp(lambda y0: solver(y0, T).ys[-1], (Y0,), (torch.ones_like(Y0),))
    parameters = list(solver.parameters())
    first = torch.autograd.grad(tangent.square().sum(), parameters, create_graph=True)
    other = [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), parameters)]
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_limits_of_memory_take_the_pair(method, ways):
    options = {"method": method, "step_size": 0.0625}
    solve, parameters = function(solver_of("rhs", **options))
    budget = pnode.Checkpointing(memory=800)
    limited, _ = function(solver_of("rhs", **options, checkpointing=budget))
    one, other = jacfwd(solve)(Y0, parameters), jacfwd(limited)(Y0, parameters)
    assert ways == [True, False]
    assert torch.allclose(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["rk4", "es325", "bdf2"])
def test_compiled_solves_take_their_steps_again(method, ways, interpreted):
    solve, parameters = function(solver_of("rhs", method=method))
    compiled = pnode.Solver(Field(), method=method, step_size=0.125, compile=True)
    one = jacfwd(solve)(Y0, parameters)
    with torch.no_grad():
        other = jacfwd(lambda y0: compiled(y0, T).ys)(Y0)
    assert ways == [True, True]
    assert torch.allclose(one, other.reshape(one.shape), rtol=1e-8, atol=1e-9)


class NotBatched(torch.autograd.Function):
    """x -> x^3, without a rule for batches."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Square.apply(x) * 3.0 * g


class Square(torch.autograd.Function):
    """x -> x^2, without a rule for batches."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2.0 * x * g


@pytest.mark.parametrize("method", ["rk4", "es325", "rodaspr"])
def test_fields_that_torch_cannot_batch(method, ways):
    custom = pnode.Solver(
        lambda t, y: -0.1 * NotBatched.apply(y), method=method, step_size=0.25, compile=False
    )
    plain = pnode.Solver(lambda t, y: -0.1 * y**3, method=method, step_size=0.25, compile=False)
    one, other = (pnode.sensitivities(s, Y0, T)["y0"] for s in (custom, plain))
    assert ways == [True, True]
    assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_field_that_has_changed_is_found():
    """Here it changes in the last step of the solve itself."""
    scale = [1.0]
    solver = pnode.Solver(
        lambda t, y: -scale[0] * torch.sin(y), method="es325", step_size=0.25, compile=False,
        monitor=lambda step, t, y: scale.__setitem__(0, 2.0 if step == 4 else 1.0),
    )  # fmt: skip
    with pytest.raises(FieldChanged, match="its value"):
        jvp(lambda y0: solver(y0, T).ys, (Y0,), (torch.ones_like(Y0),))
    solver = pnode.Solver(lambda t, y: -torch.sin(y), method="es325", step_size=0.25, compile=False)
    jvp(lambda y0: solver(y0, T).ys, (Y0,), (torch.ones_like(Y0),))


class Turn(torch.nn.Module):
    """A field of a pair, with time and parameters in it, which may branch on numbers."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=D))
        self.branches = branches

    def forward(self, t, y):
        a, b = y
        if self.branches and float(t) < -1.0:
            return a, b
        return torch.sin(self.rate[:2] * b.sum() + t) - a, (a * self.rate[1:]).sum() * b


@pytest.mark.parametrize(("method", "branches"), [("dopri5", False), ("rk4", False), ("rk4", True)])
def test_many_stages_are_differentiated_at_once(method, branches, monkeypatch):
    """As those of each by itself; a field that torch cannot map is left to these."""
    solver = pnode.Solver(Turn(branches), method=method, step_size=0.02, compile=False)
    y0 = (torch.tensor([0.4, -0.2], dtype=D), torch.tensor([1.3], dtype=D))
    t = torch.tensor([0.5, 0.3, 0.0], dtype=D)
    taken = []
    ahead = tangents.derivatives_ahead
    monkeypatch.setattr(
        tangents, "derivatives_ahead",
        lambda *given: taken.append(ahead(*given) is not None) or ahead(*given),
    )  # fmt: skip
    one = pnode.sensitivities(solver, y0, t, wrt=("y0", "rate"), mode="forward")
    assert taken == [not branches]
    monkeypatch.setattr(tangents, "pays", lambda *given: False)
    other = pnode.sensitivities(solver, y0, t, wrt=("y0", "rate"), mode="forward")
    assert len(taken) == 1
    for part in range(2):
        assert torch.allclose(one["rate"][part], other["rate"][part], rtol=1e-12, atol=1e-14)
        for a, b in zip(one["y0"][part], other["y0"][part], strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "t"),
    [("rodaspr", (0.0, 0.6)), ("rosw_ark3", (0.5, 0.0)), ("llssp3p4s2c", (0.0, 0.6))],
)
def test_rosenbrock_stages_are_differentiated_at_once(method, t, monkeypatch):
    """With time in f, backward in time, an explicit stage, and several matrices."""
    known = []
    create = rosenbrock_stages.KnownStages.create
    monkeypatch.setattr(
        rosenbrock_stages.KnownStages, "create",
        lambda *given: known.append(create(*given)) or known[-1],
    )  # fmt: skip
    y0 = (torch.tensor([0.4, -0.2], dtype=D), torch.tensor([1.3], dtype=D))
    found = []
    for branches in (False, True):
        solver = pnode.Solver(Turn(branches), method=method, step_size=0.02, compile=False)
        one = pnode.sensitivities(solver, y0, torch.tensor(t), wrt=("y0", "rate"), mode="forward")
        found.append([*one["rate"], *one["y0"][0], *one["y0"][1]])
    assert [one is not None for one in known] == [True, False]
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("jacobian", ["dense", "block"])
def test_several_right_hand_sides_are_solved_at_once(jacobian, monkeypatch):
    """As one by one; and those of Krylov methods are taken one by one."""
    f, along = Field(), torch.randn(3, *Y0.shape, dtype=D)
    found = []
    for options in ({}, {"ksp_type": "gmres", "ksp_rtol": 1e-13}):
        solver = pnode.Solver(
            f, method="cn", step_size=0.125, jacobian=jacobian, compile=False,
            petsc_options=options,
        )  # fmt: skip
        tangent = lambda v, solver=solver: jvp(lambda y: solver(y, T).ys, (Y0,), (v,))[1]  # noqa: E731
        together = torch.func.vmap(tangent)(along)
        found.append(together)
        assert torch.allclose(together, torch.stack([*map(tangent, along)]), rtol=1e-13, atol=1e-14)
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)


def test_a_change_of_the_field_is_found_at_once_too():
    scale = [1.0]
    solver = pnode.Solver(
        lambda t, y: -scale[0] * torch.sin(y), method="rk4", step_size=0.02, compile=False,
        monitor=lambda step, t, y: scale.__setitem__(0, 2.0 if step == 50 else 1.0),
    )  # fmt: skip
    with pytest.raises(FieldChanged, match="its value"):
        jacfwd(lambda y0: solver(y0, T).ys)(Y0)


def test_tangents_by_decreasing_output_times():
    solver = pnode.Solver(lambda t, y: -y * t, method="rk4", step_size=0.1, compile=False)
    y0, t = torch.ones(1, dtype=torch.float64), torch.tensor([1.0, 0.6, -0.3], dtype=torch.float64)
    by_tangents = torch.func.jacfwd(lambda t: solver(y0, t).ys)(t)
    torch.testing.assert_close(by_tangents, torch.func.jacrev(lambda t: solver(y0, t).ys)(t))

"""``solution.stages()``: each stage of a solve, and the cotangent of f there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_net import SmallNet
from test_compiled import interpreted
from torch.autograd import grad

import pnode

__all__ = ["interpreted"]  # a fixture

D = torch.float64
T = torch.tensor([0.1, 0.5, 1.2], dtype=D)


class Field(SmallNet):
    def forward(self, t, y):
        return self.net(y) * torch.cos(3.0 * t) - 0.5 * y


def weights(ys):
    return torch.linspace(-1.0, 2.0, ys.numel(), dtype=ys.dtype).reshape(ys.shape)


def start():
    return torch.tensor([0.6, -0.4, 0.2], dtype=D, requires_grad=True)


class Sum:
    """Adds up a_i^T df/dp over the stages, and keeps (t, weight, part) of each."""

    def __init__(self, parameters, **parts):
        self.parameters, self.parts = list(parameters), parts
        self.total = [torch.zeros_like(p) for p in self.parameters]
        self.seen = []

    def __call__(self, stage):
        self.seen.append((stage.t, stage.weight, stage.part))
        states = stage.state if isinstance(stage.state, tuple) else (stage.state,)
        assert not any(one.requires_grad for one in states)
        value = self.parts[stage.part](torch.tensor(stage.t, dtype=states[0].dtype), stage.state)
        pairs = zip(value, stage.adjoint, strict=True) if isinstance(value, tuple) else [
            (value, stage.adjoint)
        ]  # fmt: skip
        outputs, seeds = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        found = grad(outputs, self.parameters, seeds, allow_unused=True)
        for total, one in zip(self.total, found, strict=True):
            if one is not None:
                total += one


def difference(found, expected):
    found, expected = (torch.cat([one.reshape(-1) for one in all_]) for all_ in (found, expected))
    return float((found - expected).norm() / expected.norm())


def check(solver, parameters, bound, y0=None, t=T, **parts):
    """Compare the sum over the stages with the gradient, and return the stages seen."""
    parameters = list(parameters)
    solution = solver(start() if y0 is None else y0, t)
    seeds = weights(solution.ys.detach())
    total = Sum(parameters, **parts)
    solution.stages(seeds, total)
    expected = grad(solution.ys, parameters, seeds, retain_graph=True, allow_unused=True)
    kept = [(one, own) for one, own in zip(expected, total.total, strict=True) if one is not None]
    assert difference([own for _, own in kept], [one for one, _ in kept]) < bound
    again = Sum(parameters, **parts)
    solution.stages(seeds, again)  # after the checkpoints were used up
    assert difference(again.total, total.total) < bound
    assert again.seen == total.seen
    return total.seen, solution


FIXED, ADAPTIVE = {"step_size": 0.1}, {"rtol": 1e-6, "atol": 1e-8}
SMALL, ROOMY = pnode.Checkpointing(memory=200), pnode.Checkpointing(memory=2000)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("euler", FIXED), ("rk4", FIXED), ("dopri5", FIXED), ("dopri5", ADAPTIVE),
        ("ssprk43", FIXED), ("bosh3", ADAPTIVE), ("cn", FIXED), ("beuler", FIXED),
        ("implicit_midpoint", FIXED), ("es325", FIXED), ("es325", ADAPTIVE), ("sdirk2", FIXED),
        ("trbdf2", FIXED), ("bdf3", FIXED), ("bdf", ADAPTIVE),
        ("rk4", FIXED | {"checkpointing": SMALL}), ("dopri5", ADAPTIVE | {"checkpointing": ROOMY}),
        ("cn", FIXED | {"checkpointing": SMALL}), ("es325", FIXED | {"checkpointing": ROOMY}),
        ("cn", FIXED | {"jacobian": "matrix-free", "petsc_options": {"ksp_rtol": 1e-13}}),
    ],
)  # fmt: skip
def test_sum_over_stages_is_the_parameter_gradient(method, options):
    f = Field()
    seen, solution = check(pnode.Solver(f, method=method, **options), f.parameters(), 1e-11, rhs=f)
    times = [t for t, _, _ in seen]
    assert all(T[0] <= t <= T[-1] for t in times)
    assert {part for _, _, part in seen} == {"rhs"}
    total = sum(weight for _, weight, _ in seen)
    assert total == pytest.approx(1.1, rel=1e-12)  # each step's weights add up to its length
    assert solution.stats.backward.steps == 3 * solution.stats.steps
    if method == "rk4":
        assert len(seen) == 4 * solution.stats.steps


def test_on_disk(tmp_path):
    f = Field()
    limits = pnode.Checkpointing(memory=200, disk=tmp_path)
    check(pnode.Solver(f, method="rk4", step_size=0.05, checkpointing=limits), f.parameters(),
          1e-12, rhs=f)  # fmt: skip


def test_one_step_by_hand():
    """The midpoint rule of y' = p y: k_1 = p y0, k_2 = p (y0 + h/2 k_1), y1 = y0 + h k_2."""
    p, h = torch.tensor(0.7, dtype=D, requires_grad=True), 0.25
    y0 = torch.tensor([2.0], dtype=D, requires_grad=True)
    solver = pnode.Solver(lambda t, y: p * y, params=[p], method="midpoint", step_size=h)
    solution = solver(y0, torch.tensor([1.0, 1.0 + h], dtype=D))
    seen = []
    solution.stages(torch.tensor([[5.0], [3.0]], dtype=D), seen.append)
    second, first = seen
    assert (first.t, second.t) == (1.0, 1.0 + h / 2)
    assert (first.weight, second.weight) == (0.0, h)
    assert first.state.item() == 2.0
    assert second.state.item() == pytest.approx(2.0 + h / 2 * 1.4, rel=1e-15)
    assert second.adjoint.item() == pytest.approx(3.0 * h, rel=1e-15)
    assert first.adjoint.item() == pytest.approx(3.0 * h * 0.7 * h / 2, rel=1e-15)


@pytest.mark.parametrize("method", ["ars122", "ark3", "imexl2", "bpr3"])
def test_both_parts_of_imex_methods(method):
    f, stiff = Field(), torch.nn.Linear(3, 3, dtype=D)
    implicit = torch.nn.Sequential(stiff, torch.nn.Tanh())

    class Implicit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = implicit

        def forward(self, t, y):
            return -3.0 * y + self.net(y)

    g = Implicit()
    solver = pnode.Solver(implicit=g, explicit=f, method=method, step_size=0.1)
    parameters = [*f.parameters(), *g.parameters()]
    seen, _ = check(solver, parameters, 1e-11, implicit=g, explicit=f)
    for name in ("implicit", "explicit"):
        assert sum(w for _, w, part in seen if part == name) == pytest.approx(1.1, rel=1e-12)


def test_mass_matrix():
    f = Field()
    mass = torch.tensor([[2.0, 0.3, 0.0], [0.1, 1.0, 0.0], [0.0, 0.2, 3.0]], dtype=D)
    for method in ("cn", "beuler", "bdf2"):
        check(pnode.Solver(f, mass=mass, method=method, step_size=0.1), f.parameters(), 1e-11,
              rhs=f)  # fmt: skip


@pytest.mark.parametrize("method", ["rk4", "es325", "bdf2"])
def test_decreasing_times(method):
    f = Field()
    solver = pnode.Solver(f, method=method, step_size=0.1)
    seen, _ = check(solver, f.parameters(), 1e-11, t=T.flip(0), rhs=f)
    assert sum(weight for _, weight, _ in seen) == pytest.approx(-1.1, rel=1e-12)


def test_tuple_state_and_symplectic_halves():
    net = torch.nn.Linear(2, 2, dtype=D)
    f = lambda t, x: (torch.tanh(net(x[1])), -torch.sin(net(x[0])))  # noqa: E731
    y0 = (torch.tensor([0.3, 0.1], dtype=D), torch.tensor([0.0, 0.5], dtype=D))
    for method, parts in (("rk4", ["rhs"]), ("velocity_verlet", ["positions", "momenta"])):
        solver = pnode.Solver(f, params=net.parameters(), method=method, step_size=0.1)
        solution = solver(y0, T)
        seeds = tuple(weights(one.detach()) for one in solution.ys)
        total = Sum(net.parameters(), **dict.fromkeys(parts, f))
        solution.stages(seeds, total)
        expected = grad(solution.ys, list(net.parameters()), seeds)
        assert difference(total.total, expected) < 1e-12
        for name in parts:
            assert sum(w for _, w, part in total.seen if part == name) == pytest.approx(1.1)


def test_float32_and_costs():
    f = Field().float()
    y0 = start().detach().float().requires_grad_()
    check(pnode.Solver(f, method="rk4", step_size=0.1), f.parameters(), 1e-5, y0=y0, rhs=f)
    f = Field()
    solver = pnode.Solver(f, cost=lambda t, y: y.square().sum(), method="es325", step_size=0.1)
    check(solver, f.parameters(), 1e-11, rhs=f)


def test_stages_that_no_output_depends_on_are_left_out():
    f = Field()
    solution = pnode.Solver(f, method="rk4", step_size=0.1)(start(), T)
    seeds = torch.zeros(3, 3, dtype=D)
    total = Sum(f.parameters(), rhs=f)
    seeds[1] = 1.0
    solution.stages(seeds, total)
    assert max(t for t, _, _ in total.seen) == 0.5
    assert difference(total.total, grad(solution.ys, list(f.parameters()), seeds)) < 1e-12


def test_memory_is_bounded_by_checkpointing():
    f = Field()
    limits = pnode.Checkpointing(memory=1000)
    solver = pnode.Solver(f, method="rk4", step_size=0.01, checkpointing=limits)
    solution = solver(start(), T)
    alive, most = weakref.WeakSet(), 0

    def look(stage):
        nonlocal most
        alive.add(stage)
        most = max(most, len(alive))

    solution.stages(weights(solution.ys.detach()), look)
    assert most <= 2
    assert solution.stats.backward.recomputed > 0
    assert solution.stats.backward.ram_bytes <= 1000
    assert solution.stats.ram_bytes <= 1000


@pytest.mark.parametrize("method", ["heun2", "beuler"])
def test_compiled_steps_are_taken_again_without(method, interpreted):
    f = Field()
    solver = pnode.Solver(f, method=method, step_size=0.1, compile=True)
    solution = solver(start(), T)
    seeds = weights(solution.ys.detach())
    total = Sum(f.parameters(), rhs=f)
    solution.stages(seeds, total)
    assert solution.stats.backward.recomputed == solution.stats.steps
    expected = grad(solution.ys, list(f.parameters()), seeds)
    assert difference(total.total, expected) < (1e-12 if method == "heun2" else 1e-8)


def test_grad_mode_is_the_callers_and_exceptions_come_through():
    f, modes = Field(), []
    solution = pnode.Solver(f, method="rk4", step_size=0.1)(start(), T)
    seeds = weights(solution.ys.detach())
    with torch.no_grad():
        solution.stages(seeds, lambda stage: modes.append(torch.is_grad_enabled()))
    solution.stages(seeds, lambda stage: modes.append(torch.is_grad_enabled()))
    assert set(modes[: len(modes) // 2]) == {False}
    assert set(modes[len(modes) // 2 :]) == {True}

    def stop(stage):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        solution.stages(seeds, stop)
    total = Sum(f.parameters(), rhs=f)
    solution.stages(seeds, total)
    assert difference(total.total, grad(solution.ys, list(f.parameters()), seeds)) < 1e-12


def test_a_solution_holds_no_more_than_its_graph():
    """What is kept goes with the solution, without the collector; copies have numbers alone."""
    f = Field()
    solution = pnode.Solver(f, method="rk4", step_size=0.1)(start(), T)
    kept = weakref.ref(solution.stage_sweep._run)
    f.last = solution  # a circle, were it not for copies
    del f, solution
    gc.collect()
    assert kept() is None
    plain = pnode.Solver(Field(), method="rk4", step_size=0.1)(start(), T)
    plain.ys = plain.ys.detach()
    for one in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert torch.equal(one.ys, plain.ys)
        assert one.stage_sweep is None


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"method": "ra34pw2"}, "method='ra34pw2'"),
        ({"rhs": None, "residual": lambda t, y, yp: yp + y, "method": "beuler"}, "residual="),
        ({"event_fn": lambda t, y: y[0] - 0.5}, "an event"),
        ({"dense": True}, "dense=False"),
        ({"layout": pnode.parallel.Grid((3,))}, "layout="),
    ],
)
def test_refusals(options, names):
    keywords = {"rhs": lambda t, y: -y[..., :3], "method": "rk4", "step_size": 0.1} | options
    solution = pnode.Solver(**keywords)(start(), T)
    with pytest.raises(pnode.BackwardError, match=names):
        solution.stages(torch.ones_like(solution.ys), print)


def test_solves_without_a_discrete_gradient():
    f, seeds = Field(), torch.ones(3, 3, dtype=D)
    with torch.no_grad():
        nothing = pnode.Solver(f, method="rk4", step_size=0.1)(start(), T)
    continuous = pnode.Solver(f, method="rk4", step_size=0.1, gradient="continuous")(start(), T)
    for solution in (nothing, continuous):
        with pytest.raises(pnode.BackwardError, match="no stages"):
            solution.stages(seeds, print)

    def inside(y):
        solution = pnode.Solver(f, method="rk4", step_size=0.1)(y, T)
        with pytest.raises(pnode.BackwardError, match=r"torch\.func"):
            solution.stages(seeds, print)
        return solution.ys.sum()

    torch.func.grad(inside)(start().detach())


def test_wrong_arguments_and_tensors_written_into():
    f, y0 = Field(), start().detach()
    solution = pnode.Solver(f, method="rk4", step_size=0.1)(y0, T)
    for wrong in (torch.ones(3, dtype=D), (torch.ones(3, 3, dtype=D),), 1.0):
        with pytest.raises(pnode.ConfigurationError, match="cotangents have shapes"):
            solution.stages(wrong, print)
    with pytest.raises(pnode.ConfigurationError, match="callback=None"):
        solution.stages(torch.ones(3, 3, dtype=D), None)
    y0 += 1.0
    with pytest.raises(pnode.BackwardError, match="written into"):
        solution.stages(torch.ones(3, 3, dtype=D), print)

"""How Newton's method begins the stages of DIRK and IMEX steps."""

import math

import pytest
import torch

import pnode
from pnode.solvers.methods import find_method
from pnode.solvers.scheme import Scheme

D = torch.float64
#: SNES alone decides, by residuals of round-off.
BY_RESIDUAL = {"snes_rtol": 1e-15, "snes_stol": 1e-15, "snes_atol": 1e-14}


def kinetics(rate):
    """Robertson's, from whose start all is scaled to about 1."""

    def f(t, y):
        a, b, c = y.unbind()
        ab, bc, ba = rate * a, 3e3 * b * b, 1e4 * b * c
        return torch.stack([ba - ab, ab - ba - bc, bc])

    return f, torch.tensor([1.0, 1e-3, 0.1], dtype=D)


def solve(method, reuse="auto", times=(0.0, 2.0), **more):
    """Return the end, the gradient of a norm of it, and the counts."""
    rate = torch.tensor(0.4, dtype=D, requires_grad=True)
    f, y0 = kinetics(rate)
    y0.requires_grad_()
    more.setdefault("compile", False)
    solver = pnode.Solver(f, method=method, params=[rate], jacobian_reuse=reuse, **more)
    solution = solver(y0, torch.tensor(times, dtype=D))
    grads = torch.autograd.grad(solution.ys[-1].square().sum(), [y0, rate])
    return solution.ys[-1].detach(), torch.cat([g.reshape(-1) for g in grads]), solution.stats


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("method", ["trbdf2", "es325", "esdirk6", "sdirk2", "dirk658a", "ark4"])
def test_guesses_are_polynomials_through_stages(method):
    """Quadratic in c where three nodes are known, linear where two are; weights of no more."""
    scheme = find_method(method).scheme
    nodes = (0.0, *scheme.c)
    for i, row in enumerate(scheme.stage_guesses):
        if not row:
            continue
        assert len(row) == i + 1 and sum(w != 0.0 for w in row) <= 3
        known = len({round(node, 12) for node in nodes[: i + 1]})
        for power in range(min(known, 3)):
            found = math.fsum(w * node**power for w, node in zip(row, nodes, strict=False))
            assert abs(found - scheme.c[i] ** power) < 1e-11  # nodes are rounded to 12 digits


@pytest.mark.parametrize("reuse", ["auto", "iteration"])
@pytest.mark.parametrize("method", ["trbdf2", "es325", "esdirk6", "sdirk2"])
def test_solved_as_by_residuals(method, reuse):
    """Gradients are those of stages solved to round-off."""
    steps = {"step_size": 0.1}
    y, gradient, stats = solve(method, reuse, **steps)
    exact, right, more = solve(method, reuse, petsc_options=BY_RESIDUAL, **steps)
    assert apart(y, exact) < 1e-11
    assert apart(gradient, right) < 1e-10
    assert stats.steps == more.steps


@pytest.mark.parametrize("method", ["es325", "esdirk6"])
def test_guesses_spare_evaluations(monkeypatch, method):
    """The same steps to the same states, for less of Newton's method."""
    how = {"rtol": 1e-6, "atol": 1e-9}
    y, gradient, stats = solve(method, **how)
    without = property(lambda self: ((),) * self.stages)
    monkeypatch.setattr(Scheme, "stage_guesses", without)
    right, expected, more = solve(method, **how)
    assert (stats.steps, stats.rejected) == (more.steps, more.rejected)
    assert apart(y, right) < 1e-10 and apart(gradient, expected) < 1e-9
    assert stats.rhs < more.rhs and stats.newton < more.newton


@pytest.mark.parametrize("how", [{"step_size": 0.05}, {"rtol": 1e-6, "atol": 1e-9}])
def test_a_guess_where_f_has_no_value(monkeypatch, how):
    """The step is solved without guesses: the same states, for more evaluations."""

    def run():
        solver = pnode.Solver(
            lambda t, y: -50.0 * (y.sqrt() - torch.cos(t)), method="es325", compile=False, **how
        )
        with torch.no_grad():
            return solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D))

    def rows(weight):
        return property(lambda self: ((), *((weight,) + (0.0,) * i for i in range(1, 5))))

    right = run()
    monkeypatch.setattr(Scheme, "stage_guesses", rows(-1.0))
    found = run()
    assert found.stats.steps == right.stats.steps and found.stats.rejected == right.stats.rejected
    assert apart(found.ys[-1], right.ys[-1]) < 1e-10


def test_newton_does_not_disturb_the_error_estimate():
    """Near round-off, too, steps are those of stages solved by their residuals."""
    tolerances = {"rtol": 1e-9, "atol": 1e-12}
    _, _, stats = solve("esdirk6", **tolerances)
    _, _, right = solve("esdirk6", petsc_options=BY_RESIDUAL, **tolerances)
    assert stats.steps <= 1.05 * right.steps


def test_a_changed_field_is_noticed():
    """A factor of f that is another one in the backward sweep."""
    scale = [1.0]
    rate = torch.tensor(0.4, dtype=D, requires_grad=True)
    f, y0 = kinetics(rate)
    solver = pnode.Solver(
        lambda t, y: scale[0] * f(t, y), params=[rate], method="esdirk6", step_size=0.1,
        compile=False,
    )  # fmt: skip
    end = solver(y0, torch.tensor([0.0, 1.0], dtype=D)).ys[-1]
    scale[0] = 1.0 + 1e-4
    with pytest.raises(pnode.PnodeError):
        end.sum().backward()


def test_a_guess_where_f_raises():
    """The step is solved without guesses, as where f has no value."""

    def f(t, y):
        if bool((y < 0.0).any()):
            raise ValueError("negative state")
        return -200.0 * (y - 1e-3) * (1.0 + y**2)

    def run():
        solver = pnode.Solver(f, method="es325", rtol=1e-2, atol=1e-3, compile=False)
        return solver(torch.tensor([1.0, 0.5], dtype=D), torch.tensor([0.0, 1.0], dtype=D))

    solution = run()
    assert solution.stats.steps == 9 and bool((solution.ys > 0.0).all())


def test_a_jump_of_an_algebraic_variable_takes_many_iterations():
    """0 = z^3 - u(t), u from 1 to 1e-6: no step is short enough for few."""

    def f(t, y):
        u = 1.0 if t < 0.5 else 1e-6
        return torch.stack([y[1] - y[0], y[1] ** 3 - u])

    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    solver = pnode.Solver(f, method="es325", mass=mass, rtol=1e-4, compile=False)
    end = solver(torch.tensor([0.0, 1.0], dtype=D), torch.tensor([0.0, 1.0], dtype=D)).ys[-1]
    assert abs(end[1] - 1e-2) < 1e-6

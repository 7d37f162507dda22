"""Plain-torch replicas of the methods, differentiated by autograd: what pnode must equal."""

from __future__ import annotations

import itertools

import torch

from pnode.options import SolverOptions, next_prefix
from pnode.solvers.bridge import Bridge
from pnode.solvers.integrator import IntegratorSettings, build_ts
from pnode.solvers.methods import Method, find_method
from pnode.solvers.petsc_c import rk_tableau


def petsc_tableau(method: Method) -> dict:
    """PETSc's own Butcher tableau of an explicit method."""
    ts = build_ts(
        IntegratorSettings(method, 1, torch.float64), SolverOptions(next_prefix()), Bridge()
    )
    tableau = rk_tableau(ts)
    ts.destroy()
    return tableau


def rk_step(f, tableau, t, h, y):
    """One explicit Runge-Kutta step."""
    slopes: list[torch.Tensor] = []
    for row, c in zip(tableau["A"], tableau["c"], strict=True):
        stage = y + sum(h * a * k for a, k in zip(row, slopes, strict=False) if a != 0.0)
        slopes.append(f(torch.as_tensor(t + c * h, dtype=y.dtype), stage))
    return y + sum(h * b * k for b, k in zip(tableau["b"], slopes, strict=True) if b != 0.0)


def solve_implicit(residual, guess):
    """Root of a residual, by Newton without graph, then one step whose graph is the IFT's.

    At the root y*, y = y* - J^{-1} F(y*; inputs) with J held fixed has the value y* and the
    derivative -J^{-1} dF/dinputs.
    """

    def flat(x):
        return residual(x.view_as(guess)).reshape(-1)

    root = guess.detach().reshape(-1)
    for _ in range(30):
        with torch.no_grad():
            jacobian = torch.func.jacrev(flat)(root)
            update = torch.linalg.solve(jacobian, flat(root))
            root = root - update
        if update.norm() <= 1e-15 * max(1.0, float(root.norm())):
            break
    with torch.no_grad():
        jacobian = torch.func.jacrev(flat)(root)
    return (root - torch.linalg.solve(jacobian, flat(root))).view_as(guess)


def theta_step(f, name, t, h, y):
    """One step of backward Euler, Crank-Nicolson or the implicit midpoint rule."""
    time = torch.as_tensor

    def at(offset, state):
        return f(time(t + offset, dtype=y.dtype), state)

    if name == "beuler":
        return solve_implicit(lambda x: x - y - h * at(h, x), y)
    if name == "cn":
        return solve_implicit(lambda x: x - y - 0.5 * h * (at(0.0, y) + at(h, x)), y)
    stage = solve_implicit(lambda x: x - y - 0.5 * h * at(0.5 * h, x), y)
    return 2.0 * stage - y


def replica(f, name, y0, grid):
    """States at every time of ``grid`` (a list of floats), differentiable."""
    method = find_method(name)
    tableau = None if method.implicit else petsc_tableau(method)
    states, y = [y0], y0
    for t, after in itertools.pairwise(grid):
        h = after - t
        y = theta_step(f, method.name, t, h, y) if tableau is None else rk_step(f, tableau, t, h, y)
        states.append(y)
    return torch.stack(states)


__all__ = ["petsc_tableau", "replica", "rk_step", "solve_implicit", "theta_step"]

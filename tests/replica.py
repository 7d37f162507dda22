"""Plain-torch replicas of the methods, differentiated by autograd: what pnode must equal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from pnode import Solver
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions, next_prefix
from pnode.base.vectors import copy_out
from pnode.field.vectorfield import VectorField, vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.methods import Method, find_method
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.library import before_each_stage, rk_scheme, stage_vectors
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.petsc.ts import build_ts

#: Up to which derivative the replicas of implicit methods are right.
DERIVATIVES = 1


def petsc_tableau(method: Method) -> dict:
    """PETSc's own Butcher tableau of an explicit method."""
    ts = build_ts(
        IntegratorSettings(method, 1, torch.float64), SolverOptions(next_prefix()), Bridge()
    )
    scheme = rk_scheme(ts)
    ts.destroy()
    names = ("A", "b", "b_embedded", "interpolation")
    found = {name: getattr(scheme, name) for name in names}
    arrays = {name: None if x is None else np.array(x) for name, x in found.items()}
    return arrays | {"c": np.array(scheme.c), "fsal": scheme.fsal}


def measured_tableau(method: Method) -> dict:
    """Butcher tableau of an explicit method, measured: PETSc tells only that of TSRK.

    On y' = g with g the k-th unit vector at the k-th evaluation, a step of length 1 from zero
    evaluates at the stages (a_k1, ..., a_ks) and ends at (b_1, ..., b_s).
    """
    times, stages = [], []

    def indicator(t, y):
        times.append(float(t))
        stages.append(y.clone())
        return torch.eye(method.stages, dtype=torch.float64)[len(times) - 1]

    zero = torch.zeros(method.stages, dtype=torch.float64)
    with torch.no_grad():
        ys = Solver(indicator, method=method.name, step_size=1.0)(zero, torch.tensor([0.0, 1.0])).ys
    return {"A": torch.stack(stages).numpy(), "b": ys[-1].numpy(), "c": np.array(times)}


def symplectic_step(f, subtype, t, h, y):
    """One step of positions, then momenta; each part has a clock of its own."""
    third, root = 1.0 / 3.0, 2.0 ** (1.0 / 3.0)
    w = 1.0 / (2.0 - root)
    positions, momenta = {
        "1": ([1.0], [1.0]),
        "2": ([0.0, 1.0], [0.5, 0.5]),
        "3": ([1.0, -2 * third, 2 * third], [-1 / 24, 3 / 4, 7 / 24]),
        "4": ([w / 2, (1 - root) * w / 2, (1 - root) * w / 2, w / 2], [w, -root * w, w, 0.0]),
    }[subtype]
    q, p = y
    for i, (c, d) in enumerate(zip(positions, momenta, strict=True)):
        time = torch.as_tensor(t + h * sum(momenta[:i]), dtype=q.dtype)
        q = q + c * h * f(time, (q, p))[0]
        time = torch.as_tensor(t + h * sum(positions[: i + 1]), dtype=q.dtype)
        p = p + d * h * f(time, (q, p))[1]
    return q, p


def dirk_tableau(method: Method) -> dict:
    """Butcher tableau of a DIRK, measured: PETSc does not tell it.

    On y' = g with g the k-th unit vector in the k-th stage, a step of length 1 from zero has the
    stages Y_i = (a_i1, ..., a_is) and the end (b_1, ..., b_s).
    """
    times, now = [0.0] * method.stages, -1

    def indicator(t, y):
        times[max(now, 0)] = float(t)
        return torch.eye(method.stages, dtype=torch.float64)[max(now, 0)]

    def count():
        nonlocal now
        now += 1
        integrator.bridge.stage_begins()

    zero = torch.zeros(method.stages, dtype=torch.float64)
    problem = InitialValueProblem.create(indicator, zero, torch.zeros(1))
    integrator = TimeIntegrator(
        IntegratorSettings(method, method.stages, torch.float64),
        SolverOptions(next_prefix(), None, default_options(method, False, "dense", torch.float64)),
    )
    kept = before_each_stage(integrator.ts, count)
    integrator.begin(VectorField(problem, Ledger()), zero, 0.0)
    integrator.attempt(0.0, 1.0, 0)
    integrator.end()
    assert now == method.stages - 1 and kept is not None
    tableau = {
        "A": torch.stack([copy_out(stage) for stage in stage_vectors(integrator.ts)]).numpy(),
        "b": copy_out(integrator.solution).numpy(),
        "c": np.array(times),
    }
    integrator.destroy()
    return tableau


def dirk_step(f, tableau, t, h, y):
    """One diagonally implicit Runge-Kutta step."""
    slopes: list[torch.Tensor] = []
    for i, (row, c) in enumerate(zip(tableau["A"], tableau["c"], strict=True)):
        base = y + sum(h * a * k for a, k in zip(row[:i], slopes, strict=True))
        time = torch.as_tensor(t + c * h, dtype=y.dtype)
        diagonal = h * row[i]
        if diagonal == 0.0:
            stage = base
        else:
            stage = solve_implicit(
                lambda x, z=base, d=diagonal, s=time: x - z - d * f(s, x),
                base,
            )
        slopes.append(f(time, stage))
    return y + sum(h * b * k for b, k in zip(tableau["b"], slopes, strict=True))


def arkimex_tableau(method: Method) -> dict:
    """Both Butcher tableaus of an IMEX method, measured stage by stage.

    On y' = g, the k-th unit vector in stage k for each part (in its own half of the state), a
    step of length 1 from zero has the stages (a_i1, ..., a_is) and the end (b_1, ..., b_s).
    """
    stages, now = method.stages, -1
    times: dict[str, list[float]] = {"ct": [0.0] * stages, "c": [0.0] * stages}

    def part(name, half):
        def unit(t, y):
            times[name][now] = float(t)
            slope = torch.zeros(2, stages, dtype=torch.float64)
            slope[half, now] = 1.0
            return slope

        return unit

    zero = torch.zeros(2, stages, dtype=torch.float64)
    problem = InitialValueProblem.create(
        part("ct", 0), zero, torch.zeros(1), form="imex", explicit=part("c", 1)
    )
    integrator = TimeIntegrator(
        IntegratorSettings(method, 2 * stages, torch.float64, form="imex"),
        SolverOptions(next_prefix(), None, default_options(method, False, "dense", torch.float64)),
    )

    def count():
        nonlocal now
        now += 1

    kept = before_each_stage(integrator.ts, count)
    integrator.begin(vector_field(problem, Ledger()), zero.flatten(), 0.0)
    integrator.attempt(0.0, 1.0, 0)
    integrator.end()
    assert now == stages - 1 and kept is not None
    A = torch.stack([copy_out(stage) for stage in stage_vectors(integrator.ts)])
    b = copy_out(integrator.solution)
    integrator.destroy()
    return {
        "At": A[:, :stages].numpy(), "A": A[:, stages:].numpy(),
        "bt": b[:stages].numpy(), "b": b[stages:].numpy(),
    } | {name: np.array(values) for name, values in times.items()}  # fmt: skip


def arkimex_step(implicit, explicit, tableau, t, h, y):
    """One additive Runge-Kutta step."""

    def combine(weights, slopes):
        return sum((h * w * k for w, k in zip(weights, slopes, strict=False)), torch.zeros_like(y))

    slopes_i: list[torch.Tensor] = []
    slopes_e: list[torch.Tensor] = []
    for i in range(len(tableau["b"])):
        base = y + combine(tableau["At"][i][:i], slopes_i) + combine(tableau["A"][i][:i], slopes_e)
        time = torch.as_tensor(t + tableau["ct"][i] * h, dtype=y.dtype)
        diagonal = h * tableau["At"][i][i]
        stage = base
        if diagonal != 0.0:
            stage = solve_implicit(
                lambda x, z=base, d=diagonal, s=time: x - z - d * implicit(s, x), base
            )
        slopes_i.append(implicit(time, stage))
        slopes_e.append(explicit(torch.as_tensor(t + tableau["c"][i] * h, dtype=y.dtype), stage))
    return y + combine(tableau["bt"], slopes_i) + combine(tableau["b"], slopes_e)


def rosw_step(f, tableau, t, h, y, time_slope=None, own_matrices=False):
    """One Rosenbrock step, in the variables of the textbook.

    ``time_slope``: whether g_t is part of it, by default where the method would lose its order
    without. ``own_matrices``: every stage has the Jacobian at its own state, as PETSc's option
    ts_rosw_recompute_jacobian does (but explicit stages have that at the start of the step).
    """

    def time_at(offset):
        return torch.as_tensor(t + offset * h, dtype=y.dtype)

    def jacobian(time, state):
        def flat(x):
            return f(time, x.view_as(y)).reshape(-1)

        return torch.autograd.functional.jacobian(flat, state.reshape(-1), create_graph=True)

    start = jacobian(time_at(0.0), y)
    slope = 0.0
    if tableau.needs_time_slope if time_slope is None else time_slope:
        slope = torch.autograd.functional.jacobian(
            lambda s: f(s, y).reshape(-1), time_at(0.0), create_graph=True
        )
    slopes: list[torch.Tensor] = []
    eye = torch.eye(y.numel(), dtype=y.dtype)
    for i, (a, gamma) in enumerate(zip(tableau.A, tableau.Gamma, strict=True)):
        stage = y.reshape(-1) + sum(x * k for x, k in zip(a, slopes, strict=False))
        time = time_at(sum(a))
        J = start
        if own_matrices:
            J = jacobian(time, stage if gamma[i] else y)
        before = sum((x * k for x, k in zip(gamma, slopes, strict=False)), start=0.0 * stage)
        b = h * f(time, stage.view_as(y)).reshape(-1) + h * J @ before + h * h * sum(gamma) * slope
        slopes.append(torch.linalg.solve(eye - h * gamma[i] * J, b))
    return y + sum(b * k for b, k in zip(tableau.b, slopes, strict=True)).view_as(y)


def rk_step(f, tableau, t, h, y):
    """One explicit Runge-Kutta step."""
    slopes: list[torch.Tensor] = []
    for row, c in zip(tableau["A"], tableau["c"], strict=True):
        stage = y + sum(h * a * k for a, k in zip(row, slopes, strict=False) if a != 0.0)
        slopes.append(f(torch.as_tensor(t + c * h, dtype=y.dtype), stage))
    return y + sum(h * b * k for b, k in zip(tableau["b"], slopes, strict=True) if b != 0.0)


def _iterate(flat, root):
    """Root of a function of vectors, by Newton with a matrix of differences that is kept."""
    matrix, before = None, math.inf
    for _ in range(60):
        value = flat(root)
        if matrix is None:
            shifts = 1e-7 * torch.eye(len(root), dtype=root.dtype)
            matrix = torch.stack([flat(root + shift) - value for shift in shifts], 1) / 1e-7
        update = torch.linalg.solve(matrix, value)
        root = root - update
        size = float(update.norm())
        if size <= 1e-15 * max(1.0, float(root.norm())):
            break
        if size > 0.1 * before:  # it was made too far away
            matrix = None
        before = size
    return root


def solve_implicit(residual, guess):
    """Root of a residual, by iterations without graph, then one step whose graph is the IFT's.

    At the root y*, y = y* - J^{-1} F(y*; inputs) with J held fixed has the value y* and the
    derivative -J^{-1} dF/dinputs. Each step more makes one derivative more right.
    """

    def flat(x):
        return residual(x.view_as(guess)).reshape(-1)

    with torch.no_grad():
        root = _iterate(flat, guess.detach().reshape(-1))
        jacobian = torch.func.jacrev(flat)(root)
    for _ in range(DERIVATIVES):
        root = root - torch.linalg.solve(jacobian, flat(root))
    return root.view_as(guess)


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


def coupled_step(f, scheme, t, h, y):
    """One step of a fully implicit Runge-Kutta method: all slopes at once."""
    A, b = (torch.tensor(x, dtype=y.dtype) for x in (scheme.A, scheme.b))
    times = [torch.as_tensor(t + c * h, dtype=y.dtype) for c in scheme.c]

    def residual(K):
        states = y + h * torch.tensordot(A, K, 1)
        return K - torch.stack([f(s, Y) for s, Y in zip(times, states, strict=True)])

    start = torch.zeros(len(b), *y.shape, dtype=y.dtype)
    return y + h * torch.tensordot(b, solve_implicit(residual, start), 1)


def bdf_replica(f, grid, y0, orders):
    """BDF on a grid; an order -p is extrapolated implicit Euler of order p."""
    times, states = [grid[0]], [y0]
    for after, order in zip(grid[1:], orders, strict=True):
        time = torch.as_tensor(after, dtype=y0.dtype)
        if order > 0:
            # sum_j d_j x_j^m is the derivative of x^m at t_n = 0: 1 for m = 1, 0 otherwise.
            nodes = np.array([after, *times[: -order - 1 : -1]]) - after
            scale = -nodes[1]
            powers = np.vander(nodes / scale, increasing=True).T
            d = np.linalg.solve(powers, np.eye(order + 1)[1]) / scale
            psi = sum(w * u for w, u in zip(d[1:], reversed(states), strict=False))
            new = solve_implicit(lambda x, d=d, p=psi, t=time: d[0] * x + p - f(t, x), states[-1])
        else:
            new = extrapolated_euler_step(f, -order, times[-1], after - times[-1], states[-1])
        times.append(after)
        states.append(new)
    return torch.stack(states)


def extrapolated_euler_step(f, order, t, h, y):
    """Implicit Euler with 1, 2... substeps, extrapolated by Aitken and Neville."""
    row: list[torch.Tensor] = []
    for number in range(1, order + 1):
        u = y
        for i in range(1, number + 1):
            time = torch.as_tensor(t + i * h / number, dtype=y.dtype)
            u = solve_implicit(lambda x, u=u, n=number, s=time: x - u - h / n * f(s, x), u)
        column = [u]
        for k, before in enumerate(row, start=1):
            column.append(column[-1] + (column[-1] - before) / (number / (number - k) - 1.0))
        row = column
    return row[-1]


def recorded_orders(ys):
    """Orders of the steps behind the result of a solve."""
    node = ys.grad_fn
    while not hasattr(node, "runs"):
        node = node.next_functions[0][0]
    return [step.order for step in node.runs.only().sweep.trajectory.steps]


def replica(f, name, y0, grid, orders=None):
    """States at every time of ``grid`` (a list of floats), differentiable.

    ``orders`` are those of a multistep method's steps; without, those of fixed steps.
    """
    method = find_method(name)
    if method.multistep:
        k = method.order
        if orders is None:
            orders = [1 - k if step < k - 1 else k for step in range(len(grid) - 1)]
        return bdf_replica(f, grid, y0, orders)
    if method.coupled:
        tableau, step = method.scheme, coupled_step
    elif method.ts_type == "dirk":
        tableau, step = dirk_tableau(method), dirk_step
    elif method.ts_type == "rosw":
        tableau, step = method.scheme, rosw_step
    elif method.implicit:
        tableau, step = method.name, theta_step
    elif method.ts_type == "ssp":
        tableau, step = measured_tableau(method), rk_step
    elif method.ts_type == "basicsymplectic":
        tableau, step = method.subtype, symplectic_step
    else:
        tableau, step = petsc_tableau(method), rk_step
    states, y = [y0], y0
    for t, after in itertools.pairwise(grid):
        h = after - t
        y = step(f, tableau, t, h, y)
        states.append(y)
    if isinstance(y0, tuple):
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    return torch.stack(states)


__all__ = [
    "measured_tableau",
    "petsc_tableau",
    "replica",
    "rk_step",
    "rosw_step",
    "solve_implicit",
    "symplectic_step",
    "theta_step",
]

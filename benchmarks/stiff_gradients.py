"""Gradients of stiff problems' end states: the rows of ``stiff.py``, and their references.

    python benchmarks/stiff_gradients.py

computes the reference gradients of ``stiff_problems.py`` anew, by two independent methods, and
prints how they differ from the ones there. It takes a few minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from stiff_problems import SENSITIVITIES, Sensitivity
from stiff_solvers import MAX_STEPS, SolveFailed, diffrax_solve

import pnode

__all__ = ["create_gradient", "pnode_gradient"]


def create_gradient(name: str, sensitivity: Sensitivity) -> Callable[[float], Any]:
    """Return a function from rtol to the gradient and, for pnode, its ledger.

    ``name`` is a pnode method, also with ":compiled", or "diffrax-kvaerno5".
    """
    if name == "diffrax-kvaerno5":
        return _diffrax_gradient(sensitivity)
    return pnode_gradient(name, sensitivity)


def pnode_gradient(method: str, sensitivity: Sensitivity) -> Callable[[float], Any]:
    """Return the discrete adjoint with a pnode method."""
    problem = sensitivity.problem
    method, _, how = method.partition(":")
    parameters = torch.tensor(problem.parameters, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor(problem.start, dtype=torch.float64)
    times = torch.tensor([0.0, problem.end], dtype=torch.float64)
    solvers: dict[float, pnode.Solver] = {}

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack(problem.field(y.unbind(), parameters.unbind()))

    def gradient(rtol: float) -> tuple[np.ndarray, pnode.Stats]:
        if rtol not in solvers:
            solvers[rtol] = pnode.Solver(
                field, params=[parameters], method=method, rtol=rtol, atol=problem.ratio * rtol,
                max_steps=MAX_STEPS, compile=how == "compiled",
            )  # fmt: skip
        solution = solvers[rtol](y0, times)
        value = solution.ys[-1, sensitivity.component]
        (result,) = torch.autograd.grad(value, parameters)
        return result.numpy(), solution.stats

    return gradient


def _diffrax_gradient(sensitivity: Sensitivity) -> Callable[[float], Any]:
    """Return backpropagation through Kvaerno5: RecursiveCheckpointAdjoint, diffrax's default."""
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    problem = sensitivity.problem
    parameters, start = jnp.array(problem.parameters), jnp.array(problem.start)

    def field(y: Any, p: Any) -> Any:
        return jnp.stack(problem.field(tuple(y), p))

    def value(p: Any, rtol: Any) -> Any:
        atol = problem.ratio * rtol
        solved = diffrax_solve(field, start, p, problem.end, rtol, atol)
        return solved.ys[-1, sensitivity.component], solved

    program = jax.jit(jax.value_and_grad(value, has_aux=True))

    def gradient(rtol: float) -> tuple[np.ndarray, None]:
        (_, solved), result = program(parameters, rtol)
        result.block_until_ready()
        if solved.result != diffrax.RESULTS.successful:
            raise SolveFailed(diffrax.RESULTS[solved.result])
        return np.asarray(result), None

    return gradient


def forward_sensitivities(sensitivity: Sensitivity, rtol: float = 1e-12) -> np.ndarray:
    """Return the gradient from the forward sensitivity equations S' = f_y S + f_p."""
    problem, p = sensitivity.problem, sensitivity.problem.parameters
    n, m = len(problem.start), len(p)

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        y = z[:n].tolist()
        by_state, by_parameter = problem.jacobian(y, p), sensitivity.by_parameter(y, p)
        products = np.array(by_state) @ z[n:].reshape(n, m) + np.array(by_parameter)
        return np.concatenate([problem.field(y, p), products.ravel()])

    def jacobian(t: float, z: np.ndarray) -> np.ndarray:
        """Without the derivative of f_y S by y, which Newton's method can do without."""
        by_state = np.array(problem.jacobian(z[:n].tolist(), p))
        matrix = np.zeros((n * (m + 1),) * 2)
        matrix[:n, :n] = by_state
        matrix[n:, n:] = np.kron(by_state, np.eye(m))
        return matrix

    start = np.concatenate([problem.start, np.zeros(n * m)])
    scale = np.concatenate([np.ones(n), np.tile(1.0 / np.array(p), n)])
    solved = solve_ivp(
        slope, (0.0, problem.end), start, method="Radau", jac=jacobian, rtol=rtol,
        atol=rtol * problem.ratio * scale,
    )  # fmt: skip
    return solved.y[n:, -1].reshape(n, m)[sensitivity.component]


def central_differences(
    sensitivity: Sensitivity, relative_step: float = 2e-3, rtol: float = 1e-13
) -> np.ndarray:
    """Return the gradient from fourth-order central differences of Radau's end values."""
    problem = sensitivity.problem

    def end(p: np.ndarray) -> float:
        parameters = p.tolist()
        solved = solve_ivp(
            lambda t, y: problem.field(y.tolist(), parameters), (0.0, problem.end), problem.start,
            method="Radau", jac=lambda t, y: problem.jacobian(y.tolist(), parameters),
            rtol=rtol, atol=rtol * problem.ratio,
        )  # fmt: skip
        return solved.y[sensitivity.component, -1]

    p = np.array(problem.parameters)
    steps = np.diag(relative_step * p)
    return np.array([
        (8.0 * (end(p + h) - end(p - h)) - (end(p + 2 * h) - end(p - 2 * h))) / (12.0 * h.sum())
        for h in steps
    ])  # fmt: skip


def main() -> None:
    """Print the reference gradients, recomputed, and their differences from those on file."""
    for name, sensitivity in SENSITIVITIES.items():
        for method in (forward_sensitivities, central_differences):
            start = time.perf_counter()
            gradient = method(sensitivity)
            seconds = time.perf_counter() - start
            differences = np.abs(gradient / np.array(sensitivity.gradient) - 1.0)
            print(
                f"{name}, {method.__name__}: {[f'{entry:.13e}' for entry in gradient.tolist()]}, "
                f"differs by {differences.max():.1e} ({seconds:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Consistent initial states of differential-algebraic equations of index 1.

Where dF/dy' is singular, some equations hold at one time, without y'. An initial state that
violates them has no solution; moving it along the null space of dF/dy', the algebraic unknowns,
solves them. Source: Brenan, Campbell & Petzold, Numerical Solution of Initial-Value Problems in
Differential-Algebraic Equations, section 5.3.4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pnode.errors import ConfigurationError, NonlinearSolveFailed
from pnode.mass import null_spaces
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.transfers import remote
from pnode.vectorfield import VectorField, vector_field
from pnode.vectors import REAL

__all__ = ["check_consistency", "consistent_state"]

# A residual is checked unasked up to this size: it takes one product per equation.
_CHECKED_RESIDUAL = 256
# And a mass matrix: its singular value decomposition, and one product per equation.
_CHECKED_MASS = 2048
_MAX_ITERATIONS = 20


def check_consistency(problem: InitialValueProblem, u: torch.Tensor, ledger: Ledger) -> None:
    """Raise unless the initial state satisfies the algebraic equations. Not collective.

    Parameters
    ----------
    problem : InitialValueProblem
        Given by a mass matrix or a residual.
    u : Tensor
        Flat initial state, the user's precision.
    ledger : Ledger
        Counts evaluations.

    Raises
    ------
    ConfigurationError
        If a Newton correction of the algebraic unknowns is larger than 1e-6 (float32: 1e-4) of
        the largest entry of the state.
    """
    if u.numel() > (_CHECKED_RESIDUAL if problem.form == "residual" else _CHECKED_MASS):
        return
    field = vector_field(replace(problem, check_undeclared=False), ledger)
    with torch.inference_mode(False):
        u = u.clone()
        left, right = _null_spaces(field, u)
        if not left.shape[1]:
            return
        correction, _ = _correction(field, u, left, right)
    largest, scale = float(correction.abs().max()), float(u.abs().max())
    limit = (1e-6 if u.dtype is torch.float64 else 1e-4) * max(scale, 1e-300)
    if largest > limit:
        entry = int(correction.abs().argmax())
        raise ConfigurationError(
            f"y0 does not satisfy the algebraic equations at t = "
            f"{problem.direction * problem.times[0]!r}: entry {entry} of the flattened state is "
            f"off by about {largest:.2e}; correct it, or let consistent_start=True do so"
        )


def consistent_state(problem: InitialValueProblem, u: torch.Tensor, ledger: Ledger) -> torch.Tensor:
    """Solve the algebraic equations for the algebraic unknowns. Differentiable. Not collective.

    Parameters
    ----------
    problem : InitialValueProblem
        Given by a mass matrix or a residual.
    u : Tensor
        Flat initial state, the user's precision.
    ledger : Ledger
        Counts evaluations.

    Returns
    -------
    Tensor
        The nearest state along the algebraic unknowns, shape of u. Its graph is that of the
        implicit function theorem, with respect to u and the parameters.

    Raises
    ------
    ConfigurationError
        If the algebraic equations do not determine the algebraic unknowns (index above 1).
    NonlinearSolveFailed
        If Newton's method does not converge.
    """
    field = vector_field(replace(problem, check_undeclared=False), ledger)
    start = u.detach().clone()
    left, right = _null_spaces(field, start)
    if not left.shape[1]:
        return u
    solution = start.clone()
    small = 1e-13 if u.dtype is torch.float64 else 1e-5
    for _ in range(_MAX_ITERATIONS):
        correction, inverse = _correction(field, solution, left, right)
        solution = solution + correction
        if float(correction.abs().max()) <= small * float(solution.abs().max()):
            break
    else:
        raise NonlinearSolveFailed(
            f"no consistent initial state was found in {_MAX_ITERATIONS} Newton iterations: start "
            "from a better guess of the algebraic unknowns",
            time=problem.direction * problem.times[0],
        )
    # One more Newton step, whose graph is that of the implicit function.
    layout = problem.layout
    moved = u + (solution - start)
    time = torch.scalar_tensor(
        problem.direction * problem.times[0], dtype=layout.dtype, device=layout.device
    )
    state = layout.unflatten(moved)
    arguments: tuple[Any, ...] = (state,)
    if problem.form == "residual":
        arguments = (state, layout.unflatten(torch.zeros_like(start)))
    value = remote(problem.function, problem.compute, ledger)(time, *arguments)
    equations = left.T @ layout.flatten(value).to(REAL)
    return moved - (right @ (inverse @ (equations - equations.detach()))).to(u.dtype)


def _null_spaces(field: VectorField, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right null space of dF/du_dot."""
    if field.mass is not None:
        return field.mass.null_spaces()
    rate = field.linearize(field.problem.times[0], u.clone(), torch.zeros_like(u)).rate_jacobian()
    assert rate is not None
    return null_spaces(rate.to(REAL))


def _correction(
    field: VectorField, u: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a Newton correction of u, and the inverse of the user's algebraic Jacobian."""
    problem = field.problem
    linearization = field.linearize(problem.times[0], u.clone(), torch.zeros_like(u))
    equations = left.T @ linearization.flat_value().to(REAL)
    matrix = linearization.vjps(left.T.to(u.dtype)).to(REAL) @ right
    # g is the user's function up to its sign.
    sign = -1.0 if problem.form == "residual" else problem.direction
    try:
        inverse = torch.linalg.inv(matrix)
        singular = (
            not bool(torch.isfinite(inverse).all())
            or float(torch.linalg.cond(matrix)) > 0.1 / torch.finfo(u.dtype).eps
        )
    except torch.linalg.LinAlgError:
        singular = True
    if singular:
        raise ConfigurationError(
            "the algebraic equations do not determine the algebraic unknowns at y0: the problem "
            "has an index above 1 there; differentiate its constraints with respect to time"
        )
    return -(right @ (inverse @ equations)).to(u.dtype), sign * inverse

"""What went wrong in a call of PETSc's, as an error that says what to do."""

from __future__ import annotations

from typing import Any

from pnode.base.errors import (
    LinearSolveFailed,
    NonFiniteDerivative,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
)
from pnode.base.options import PETSc, failure_reason
from pnode.solvers.petsc.bridge import Bridge

__all__ = [
    "infinite_derivative",
    "linear_error",
    "monitor_error",
    "newton_error",
    "nonfinite_error",
    "own_error",
    "raise_stored",
    "reason_name",
    "step_error",
]

_FLOATING_POINT = 72  # PETSC_ERR_FP
# PETSC_ERR_MAT_LU_ZRPVT: LAPACK found a dense matrix singular; sparse ones fail the solve.
_SINGULAR = 71


def raise_stored(bridge: Bridge, failure: Any, where: dict[str, Any]) -> None:
    """Raise what the user's code raised during a PETSc call, if anything.

    Parameters
    ----------
    bridge : Bridge
        Keeps exceptions of the callbacks.
    failure : PETSc.Error or None
        What the call itself raised; its cause may be an exception from outside the callbacks'
        guarded part, such as a KeyboardInterrupt.
    where : dict
        Time, step and method, for pnode's own errors.
    """
    exception = bridge.take_exception() or (failure.__cause__ if failure is not None else None)
    if isinstance(exception, SolveError):
        exception = exception.located(**where)
    try:
        if exception is not None:
            raise exception from exception.__cause__
    finally:
        del exception, failure  # the traceback refers to this frame: break the cycle


def infinite_derivative(bridge: Bridge, where: dict[str, Any]) -> NonFiniteDerivative | None:
    """Return the error for a Jacobian that is not finite at the last point, if it is that."""
    s = None if bridge.ranks.parallel else bridge.infinite_derivative()
    return None if s is None else _derivative_error(s, bridge, where)


def _derivative_error(s: float, bridge: Bridge, where: dict[str, Any]) -> NonFiniteDerivative:
    return NonFiniteDerivative(
        "a derivative of the vector field with respect to y is NaN or infinite at "
        f"t = {bridge.field.problem.direction * s!r}, where its value is finite: keep the state "
        "away from there, or write the field so that its derivative exists (sqrt and norm at "
        "zero: add a small constant inside)",
        **where,
    )


def nonfinite_error(
    at: float | None, where: dict[str, Any], bridge: Bridge
) -> NonFiniteVectorField:
    """Return the error for a field, or its derivative, that was not finite, at a time if known."""
    found = infinite_derivative(bridge, where)
    if found is not None:
        return found
    text = f"{bridge.field.who} returned NaN or infinity" + (
        f" at t = {bridge.field.problem.direction * at!r}" if at is not None else ""
    )
    text = f"{text}: check it there, or take smaller steps"
    return NonFiniteVectorField(text, **where)


def own_error(bridge: Bridge, where: dict[str, Any]) -> NonFiniteVectorField | None:
    """Return, and forget, what this rank knows of a field that was not finite. Not collective."""
    at, derivative = bridge.first_nonfinite(), bridge.infinite_at
    bridge.nonfinite_time = bridge.infinite_at = None
    if derivative is not None:
        return _derivative_error(derivative, bridge, where)
    return None if at is None else nonfinite_error(at, where, bridge)


def step_error(failure: Any, where: dict[str, Any], bridge: Bridge) -> SolveError:
    """Turn a PETSc.Error from a step into an error that says what to do."""
    if failure.ierr == _SINGULAR:
        return LinearSolveFailed(
            "the matrix of a linear solve is singular: take another step size, or choose "
            "another linear_solver",
            reason="zero pivot in LU factorization", **where,
        )  # fmt: skip
    overflow, at = "", bridge.first_nonfinite()
    if failure.ierr == _FLOATING_POINT and at is not None and not bridge.ranks.parallel:
        return nonfinite_error(at, where, bridge)
    own = own_error(bridge, where) if failure.ierr == _FLOATING_POINT else None
    if own is not None:  # of one of several ranks
        bridge.ranks.fail(own)
    if failure.ierr == _FLOATING_POINT:
        overflow = (
            "; an error norm overflows when rtol * |y| + atol is zero or tiny for an entry "
            "of y, or the Jacobian is not finite"
        )
    return SolveError(
        f"PETSc could not take this step{overflow}", reason=failure_reason(failure), **where
    )


def newton_error(snes: Any, where: dict[str, Any], bridge: Bridge) -> SolveError:
    """Turn SNES's reason into an error that says what to do."""
    reason = snes.getConvergedReason()
    name = reason_name(PETSc.SNES.ConvergedReason, reason)
    if "NANORINF" in name or "FNORM_NAN" in name or "DOMAIN" in name:
        found = infinite_derivative(bridge, where)
        if found is not None:
            return found
        return NonFiniteVectorField(
            f"{bridge.field.who} returned NaN or infinity in a nonlinear solve: check it near this "
            "state, or take smaller steps",
            reason=name, **where,
        )  # fmt: skip
    if reason == PETSc.SNES.ConvergedReason.DIVERGED_LINEAR_SOLVE:
        ksp_reason = snes.getKSP().getConvergedReason()
        ksp_name = reason_name(PETSc.KSP.ConvergedReason, ksp_reason)
        return LinearSolveFailed(
            "a linear solve of Newton's method failed: take smaller steps, use jacobian='dense', "
            "or choose another linear_solver",
            reason=ksp_name, **where,
        )  # fmt: skip
    return NonlinearSolveFailed(
        f"Newton's method failed after {snes.getIterationNumber()} iterations with a residual of "
        f"{snes.getFunctionNorm():.2e}: take smaller steps, or allow more iterations with "
        "petsc_options={'snes_max_it': ...}",
        reason=name, **where,
    )  # fmt: skip


def monitor_error(failure: BaseException, **where: Any) -> SolveError:
    """Return the error for one of PETSc's monitors that has failed."""
    error = SolveError(
        "a monitor of PETSc's failed: check the options that ask for it",
        reason=failure_reason(failure), **where,
    )  # fmt: skip
    error.__cause__ = failure
    return error


def linear_error(ksp: Any, failure: Any, where: dict[str, Any], kind: str) -> LinearSolveFailed:
    """Return the error for a solve of an adjoint, "linear" or "transposed", that has failed."""
    name = reason_name(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())
    return LinearSolveFailed(
        f"a {kind} solve of the adjoint failed: use jacobian='dense', or give linear_solver a "
        "preconditioner or more iterations",
        reason=str(failure).replace("\n", " ") if failure is not None else name,
        **where,
    )


def reason_name(enumeration: Any, reason: int) -> str:
    """Return PETSc's name of a convergence reason, such as ``DIVERGED_MAX_IT``."""
    for name, value in vars(enumeration).items():
        if isinstance(value, int) and value == reason and not name.startswith("_"):
            return name
    return str(reason)

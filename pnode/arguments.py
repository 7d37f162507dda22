"""Checks of arguments: each names the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pnode.errors import ConfigurationError
from pnode.options import PETSc, check_petsc_options
from pnode.solvers.assemblies import GivenMatrix, SparsityPattern, as_matrix
from pnode.solvers.jacobians import JacobianOptions
from pnode.solvers.methods import METHODS, Method

__all__ = [
    "check_communicator",
    "check_form",
    "count",
    "finite",
    "jacobian_options",
    "linear_solver_options",
    "parameters",
    "positive",
    "problem_form",
    "refuse_reserved",
    "tolerance",
]


def refuse_reserved(**arguments: Any) -> None:
    """Refuse keywords that later versions will give a meaning."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ConfigurationError(
                f"{name}={value!r} is reserved for a later version of pnode; this one keeps all "
                "stages in memory"
            )


def problem_form(rhs: Any, implicit: Any, explicit: Any, mass: Any, residual: Any) -> str:
    """Return which problem form the arguments make up: exactly one must be complete."""
    given = {
        name: value
        for name, value in (
            ("rhs", rhs), ("implicit", implicit), ("explicit", explicit), ("residual", residual)
        )
        if value is not None
    }  # fmt: skip
    forms = {
        ("rhs",): "rhs" if mass is None else "mass",
        ("implicit", "explicit"): "imex",
        ("residual",): "residual",
    }
    form = forms.get(tuple(given))
    if form is None or (mass is not None and form != "mass"):
        names = [*given, *(["mass"] if mass is not None else [])]
        raise ConfigurationError(
            f"{' and '.join(names) or 'nothing'} given: give exactly one of rhs; implicit and "
            "explicit; rhs and mass; residual"
        )
    for name, value in given.items():
        if not callable(value):
            raise ConfigurationError(
                f"{name} is {value!r}: give a callable f(t, y) (residual: F(t, y, yp)) or a torch "
                "Module"
            )
    return form


def check_form(form: str, method: Method) -> None:
    """Refuse a method that does not solve problems of this form."""
    if form in method.forms:
        return
    able = ", ".join(repr(other.name) for other in METHODS if form in other.forms)
    names = {"imex": "implicit= and explicit=", "mass": "mass=", "residual": "residual="}
    hint = (
        f"; it wants a right-hand side in two parts, {names['imex']}"
        if method.kind == "imex"
        else ""
    )
    raise ConfigurationError(
        f"method={method.name!r} does not solve problems given as {names.get(form, 'rhs=')}: "
        f"choose one of {able}{hint}"
    )


def check_communicator(comm: Any) -> None:
    """Accept communicators of one process."""
    if comm is None:
        return
    size = comm.Get_size() if hasattr(comm, "Get_size") else getattr(comm, "size", None)
    if size != 1:
        raise ConfigurationError(
            f"comm={comm!r} has {size} processes: this version integrates one state per process, "
            "use comm=None and average gradients over the processes yourself"
        )


def finite(name: str, value: Any) -> float:
    """Return a finite number."""
    try:
        number = float("nope" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name}={value!r} is not a number") from error
    if not math.isfinite(number):
        raise ConfigurationError(f"{name}={value!r} must be finite")
    return number


def positive(name: str, value: Any) -> float | None:
    """Return a positive number, or None."""
    if value is None:
        return None
    number = finite(name, value)
    if number <= 0.0:
        raise ConfigurationError(
            f"{name}={value!r} must be positive (decreasing output times need no negative steps)"
        )
    return number


def tolerance(name: str, value: Any) -> float:
    """Return a number that is not negative."""
    number = finite(name, value)
    if number < 0.0:
        raise ConfigurationError(f"{name}={value!r} must not be negative")
    return number


def count(name: str, value: Any) -> int | None:
    """Return a whole number of at least 1, or None."""
    if value is None:
        return None
    number = finite(name, value)
    if isinstance(value, bool) or not number.is_integer() or number < 1:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
    return int(number)


def linear_solver_options(linear_solver: Any, jacobian: str) -> dict[str, Any]:
    """Turn ``linear_solver=`` into PETSc options."""
    if linear_solver is None:
        return {}
    if linear_solver == "lu":
        if jacobian == "matrix-free":
            raise ConfigurationError(
                "linear_solver='lu' needs a matrix to factor, and jacobian='matrix-free' has "
                "none: use jacobian='dense'"
            )
        if jacobian == "block":  # has its own
            return {"ksp_type": "preonly"}
        return {"ksp_type": "preonly", "pc_type": "lu"}
    if isinstance(linear_solver, str):
        known = {
            value for name, value in vars(PETSc.KSP.Type).items()
            if isinstance(value, str) and not name.startswith("_")
        }  # fmt: skip
        if linear_solver not in known:
            raise ConfigurationError(
                f"linear_solver={linear_solver!r} is not a PETSc KSP type: use 'lu', 'gmres', "
                "'bcgs', 'fgmres', ..."
            )
        return {"ksp_type": linear_solver}
    if not isinstance(linear_solver, Mapping):
        raise ConfigurationError(
            f"linear_solver={linear_solver!r}: give a PETSc KSP type such as 'gmres', 'lu', or a "
            "mapping of ksp and pc options such as {'ksp_type': 'gmres', 'pc_type': 'jacobi'}"
        )
    return check_petsc_options(linear_solver)


_REUSE = ("iteration", "step", "solve", "constant")
_ASSEMBLED = ("dense", "block", "sparse")


def jacobian_options(
    method: Method, form: str, jacobian: str, pattern: Any, preconditioner: Any, reuse: str
) -> JacobianOptions:
    """Check what belongs to ``jacobian=``."""
    if reuse not in _REUSE:
        choices = ", ".join(map(repr, _REUSE))
        raise ConfigurationError(f"jacobian_reuse={reuse!r} is unknown: choose one of {choices}")
    named = [
        name
        for name, given in (
            ("jacobian_pattern", pattern is not None),
            ("preconditioner", preconditioner is not None),
            ("jacobian_reuse", reuse != "iteration"),
        )
        if given
    ]
    if named and not method.implicit:
        raise ConfigurationError(
            f"{' and '.join(named)} given, and method={method.name!r} is explicit: drop it, or "
            "take an implicit method such as 'cn' or 'es325'"
        )
    if isinstance(preconditioner, str) and preconditioner not in _ASSEMBLED:
        choices = ", ".join(map(repr, _ASSEMBLED))
        raise ConfigurationError(
            f"preconditioner={preconditioner!r} is unknown: choose one of {choices}, or give a "
            "matrix that approximates df/dy, or a callable (t, y) that returns one"
        )
    if preconditioner is not None and jacobian != "matrix-free":
        raise ConfigurationError(
            f"preconditioner given with jacobian={jacobian!r}: it belongs to "
            "jacobian='matrix-free' (for an assembled Jacobian, choose one of PETSc's with "
            "linear_solver={'pc_type': ...})"
        )
    if pattern is not None and "sparse" not in (jacobian, preconditioner):
        raise ConfigurationError(
            f"jacobian_pattern given with jacobian={jacobian!r}: it belongs to jacobian='sparse' "
            "and preconditioner='sparse'"
        )
    if reuse in ("step", "solve") and jacobian == "matrix-free" and preconditioner is None:
        raise ConfigurationError(
            f"jacobian_reuse={reuse!r} has nothing to reuse with jacobian='matrix-free': give a "
            "preconditioner, or use jacobian='dense', 'block' or 'sparse'"
        )
    if preconditioner is not None and not isinstance(preconditioner, str):
        if form == "residual":
            raise ConfigurationError(
                "preconditioner is a matrix or a callable, which approximates df/dy, and a "
                "residual has no f: use preconditioner='dense', 'block' or 'sparse'"
            )
        preconditioner = GivenMatrix(preconditioner)
    if pattern is not None:
        pattern = _sparsity_pattern(pattern)
    return JacobianOptions(reuse, preconditioner, pattern)


def _sparsity_pattern(pattern: Any) -> SparsityPattern:
    """Return the entries stored in a sparse matrix, or those of a dense one that are not zero."""
    matrix = as_matrix(pattern, "jacobian_pattern")
    if matrix.shape[0] != matrix.shape[1]:
        raise ConfigurationError(
            f"jacobian_pattern has shape {tuple(matrix.shape)}: give a square matrix, one row and "
            "column per entry of the flattened state"
        )
    dense = matrix.layout is torch.strided
    rows, columns = matrix.nonzero().T if dense else matrix.indices()
    return SparsityPattern(rows, columns, matrix.shape[0])


def parameters(params: Any) -> tuple[Any, ...] | None:
    """Return ``params=`` as a tuple, or None."""
    if params is None:
        return None
    if isinstance(params, torch.Tensor):
        raise ConfigurationError("params is one tensor: give a list of tensors, [tensor]")
    try:
        return tuple(params)
    except TypeError as error:
        raise ConfigurationError(
            f"params={params!r} is not iterable: give a list of tensors"
        ) from error

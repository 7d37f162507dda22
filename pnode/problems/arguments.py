"""Checks of arguments: each names the argument, its value and the remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from mpi4py import MPI

from pnode.base.communicators import as_communicator
from pnode.base.errors import ConfigurationError
from pnode.base.launchers import launcher_mismatch
from pnode.base.options import PETSc, check_petsc_options
from pnode.layout.dm_layouts import DMLayout
from pnode.layout.layouts import Layout

__all__ = [
    "alone",
    "check_sensitivity_control",
    "choice",
    "communicator",
    "compilation",
    "count",
    "finite",
    "flag",
    "linear_solver_options",
    "parameters",
    "positive",
    "problem_form",
    "refuse_inference",
    "setup",
    "tolerance",
]


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
        ("implicit", "explicit"): "imex" if mass is None else "imex_mass",
        ("residual",): "residual",
    }
    form = forms.get(tuple(given))
    if form is None or (mass is not None and form == "residual"):
        names = [*given, *(["mass"] if mass is not None else [])]
        raise ConfigurationError(
            f"{' and '.join(names) or 'nothing'} given: give exactly one of rhs; implicit and "
            "explicit; either of them and mass; residual"
        )
    for name, value in given.items():
        if not callable(value):
            raise ConfigurationError(
                f"{name} is {value!r}: give a callable f(t, y) (residual: F(t, y, yp)) or a torch "
                "Module"
            )
    return form


def communicator(
    comm: Any, layout: Any, form: str, resume: str | None, event_fn: Any
) -> tuple[Any, Layout | None]:
    """Return the communicator of a solve and its layout, and refuse what several ranks cannot do.

    Not collective, but for a DM of PETSc's: the arguments that decide are compared among the ranks
    at the first solve.
    """
    if isinstance(layout, PETSc.DM):
        layout = DMLayout(layout)
    if layout is not None and not isinstance(layout, Layout):
        raise ConfigurationError(
            f"layout={layout!r} is not a layout: give a pnode.parallel.Grid or GhostLayout, or a "
            "PETSc DM"
        )
    if comm is not None:
        comm = as_communicator(comm)
        if layout is not None and comm != layout.comm:
            raise ConfigurationError(
                "comm= and layout= have different communicators: drop comm=, the layout has one"
            )
    chosen = as_communicator(layout.comm if layout is not None else comm)
    if comm is not None or layout is not None:
        alone = launcher_mismatch(MPI.COMM_WORLD.size)
        if alone is not None:
            warnings.warn(alone, RuntimeWarning, stacklevel=3)
    if layout is not None and form == "residual":
        raise ConfigurationError(
            "layout= with residual= is not supported: give rhs=, implicit= and explicit=, or rhs= "
            "and mass="
        )
    if chosen.size == 1:
        return chosen, layout
    unsupported = {
        "residual": form == "residual",
        "event_fn": event_fn is not None,
        "resume": resume is not None,
    }
    for name in (name for name, given in unsupported.items() if given):
        raise ConfigurationError(
            f"{name}= is not supported with a communicator of {chosen.size} ranks: drop it, or "
            "integrate on each rank by itself (comm=None)"
        )
    return chosen, layout


def alone(comm: Any, exchange: Layout | None, consistent_start: bool) -> bool:
    """Return whether nobody shares the state; refuse what is not for shared ones."""
    if consistent_start and exchange is not None:
        raise ConfigurationError(
            "consistent_start=True is not supported with layout=: give a consistent y0"
        )
    return bool(comm.size == 1)


def setup(value: Any, method: Any, compiled: Any) -> Any:
    """Return what ``petsc_setup=`` may be; warn of what it prevents."""
    if value is None:
        return None
    if not callable(value):
        raise ConfigurationError(f"petsc_setup={value!r}: give a callable (ts)")
    if method.coupled:
        raise ConfigurationError(
            f"petsc_setup= with method={method.name!r}, whose coupled stages PETSc does not solve: "
            "drop it, or take another method such as 'es325' or 'bdf'"
        )
    if compiled is True:
        warnings.warn(
            "compile=True would pass over what petsc_setup= sets up: solving without",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r}: give True or False")
    return value


def compilation(value: Any) -> bool | Literal["auto"]:
    """Return what ``compile=`` may be."""
    if value == "auto" and isinstance(value, str):
        return "auto"
    if not isinstance(value, bool):
        raise ConfigurationError(f"compile={value!r}: give True or False, or 'auto'")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return one of some words."""
    if not isinstance(value, str) or value not in choices:
        words = ", ".join(map(repr, choices))
        raise ConfigurationError(f"{name}={value!r} is unknown: choose one of {words}")
    return value


def finite(name: str, value: Any) -> float:
    """Return a finite number; no truth value, and nothing that wants a gradient."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ConfigurationError(
            f"{name} requires grad, and the accepted steps count as constants: give {name}.detach()"
        )
    is_number = not isinstance(value, (str, bytes, bool, np.bool_)) and not (
        isinstance(value, torch.Tensor) and value.dtype is torch.bool
    )
    try:
        number = float(value if is_number else "nope")
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
    if not number.is_integer() or number < 1:
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
        if isinstance(linear_solver, PETSc.Object):
            raise ConfigurationError(
                f"linear_solver is a PETSc {type(linear_solver).__name__}, and the matrix of a "
                "step is pnode's: give its options, {'ksp_type': ..., 'pc_type': ...}, set the "
                "solver's own KSP up in petsc_setup=, or precondition with it (preconditioner=)"
            )
        raise ConfigurationError(
            f"linear_solver={linear_solver!r}: give a PETSc KSP type such as 'gmres', 'lu', or a "
            "mapping of ksp and pc options such as {'ksp_type': 'gmres', 'pc_type': 'jacobi'}"
        )
    return check_petsc_options(linear_solver)


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


def refuse_inference(parameters: Iterable[torch.Tensor], method: Any) -> None:
    """Refuse parameters that have no derivatives where a method needs some."""
    if method.implicit and any(tensor.is_inference() for tensor in parameters):
        raise ConfigurationError(
            f"a parameter was made in torch.inference_mode, and method={method.name!r} needs "
            "derivatives of the vector field: make the module outside of it"
        )


def check_sensitivity_control(value: Any, step_size: Any) -> None:
    """Refuse what are no tangents, and tangents where steps are fixed."""
    if value is None:
        return
    usable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    if value != "random" if isinstance(value, str) else not (usable and bool(value.ne(0).any())):
        raise ConfigurationError(
            f"sensitivity_control={value!r}: give 'random', or tangents of y0 as the rows of a "
            "tensor of shape (m, *y0.shape), not all zero"
        )
    if step_size is not None:
        raise ConfigurationError(
            f"sensitivity_control with fixed steps of {step_size} (step_size= or a grid), which "
            "have no error test: drop one of them"
        )

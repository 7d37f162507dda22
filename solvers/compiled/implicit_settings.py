"""The settings of implicit steps in C, for implicit_steps.cpp and what comes below it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from pnode.base.devices import HOST
from pnode.base.vectors import REAL
from pnode.problems import tolerances
from pnode.solvers.compiled.backend import Wanted
from pnode.solvers.compiled.programs import ImplicitProgram
from pnode.solvers.compiled.trace import Untraceable
from pnode.solvers.firk.integrator import ERROR_WEIGHTS
from pnode.solvers.firk.stage_newton import StageNewton
from pnode.solvers.firk.tableaus import transformation
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.newton import ModifiedNewton
from pnode.solvers.petsc.second_attempts import backtracks
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.scheme import Scheme

__all__ = ["decisions", "prepared", "scheme_of", "tolerance"]

# Newton's options, SNES's defaults, and their names in C.
_NEWTON = {
    "snes_rtol": (1e-8, "newton_rtol"), "snes_stol": (1e-8, "newton_stol"),
    "snes_atol": (1e-50, "newton_atol"), "snes_max_it": (50, "max_newton"),
    "snes_divergence_tolerance": (1e4, "newton_divtol"),
}  # fmt: skip
_INTEGERS = (
    "stages", "adaptive", "max_newton", "wanted", "one_matrix", "time_slope", "stiffly_accurate",
    "explicit_first", "carries_slope", "keeps_jacobian", "backtracks", "lowest", "highest",
    "by_residual", "by_norm", "integrals",
)  # fmt: skip
_NUMBERS = (
    "newton_rtol", "newton_stol", "newton_atol", "newton_divtol", "newton_kappa",
    "krylov_rtol",
)  # fmt: skip
_ARRAYS = (
    "A", "inverse", "correction", "b", "defect", "alpha", "gamma", "diagonal",
    "A_explicit", "b_explicit", "defect_explicit", "alpha_explicit",
    "eigenvalues", "vectors", "covectors", "separated", "rtol", "atol",
)  # fmt: skip


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


def _arrays(method: Method, adaptive: bool) -> dict[str, np.ndarray]:
    """Return the coefficients: of a Rosenbrock method those in the variables Y = G k."""
    if method.multistep:
        return {}
    scheme = scheme_of(method)
    if method.coupled:
        new = transformation(scheme)
        complexes = (new.eigenvalues, new.vectors, new.covectors)
        own = {name: np.ascontiguousarray(array, dtype=complex).view(float) for name, array in zip(
            ("eigenvalues", "vectors", "covectors"), complexes, strict=True
        )}  # fmt: skip
        arrays = {
            "b": new.end, "alpha": scheme.c, "defect": ERROR_WEIGHTS, "inverse": new.inverse,
            "separated": new.separated,
        }  # fmt: skip
        return own | {name: np.array(array, dtype=float) for name, array in arrays.items()}
    if method.linearly_implicit:
        A, inverse, correction, b = scheme.transformed()
        arrays = {
            "A": A, "b": b, "alpha": scheme.c, "inverse": inverse, "correction": correction,
            "gamma": scheme.gamma, "diagonal": scheme.gamma_diagonal,
        }  # fmt: skip
    else:
        # Backward Euler does without the start; an embedded solution may need every stage.
        split = scheme.A_explicit is not None
        if not split and (scheme.b_embedded is None or (scheme.explicit and not adaptive)):
            scheme = scheme.without_idle_stages(scheme.explicit and scheme.fsal)
        arrays = {"A": scheme.A, "b": scheme.b, "alpha": scheme.c}
        if split:
            arrays |= {
                "A_explicit": scheme.A_explicit, "b_explicit": scheme.b_explicit,
                "alpha_explicit": scheme.c_explicit,
            }  # fmt: skip
    if scheme.b_embedded is not None:
        defect = np.subtract(scheme.b_embedded, scheme.b)
        arrays["defect"] = defect @ arrays["inverse"] if method.linearly_implicit else defect
    if scheme.b_explicit is not None and scheme.b_embedded is not None:
        embedded = scheme.b_explicit_embedded or scheme.b_embedded
        arrays["defect_explicit"] = np.subtract(embedded, scheme.b_explicit)
    return {name: np.ascontiguousarray(array, dtype=float) for name, array in arrays.items()}


def prepared(program: ImplicitProgram, wanted: Wanted) -> _Settings:
    """Return the settings, which stay the same from solve to solve."""
    settings = wanted.settings
    for known, struct, _ in program.prepared:
        if known is settings or known == settings:
            found: _Settings = struct
            return found
    arrays = _arrays(settings.method, settings.adaptive)
    for name in ("rtol", "atol"):
        values = tolerance(settings, name).reshape(-1).expand(settings.size)
        arrays[name] = np.ascontiguousarray(values.numpy())
    keeps = program.keeps_jacobian and settings.jacobian_options.reuse == "auto"
    struct = _Settings(
        adaptive=settings.adaptive, wanted=program.entries + program.row_entries,
        keeps_jacobian=keeps, backtracks=backtracks(settings, wanted.options),
        integrals=settings.integrals, krylov_rtol=float(wanted.options.values.get("ksp_rtol", 0.0)),
        **_newton(wanted, keeps),
        **_structure(settings.method, arrays),
        **{name: array.ctypes.data for name, array in arrays.items()},
    )  # fmt: skip
    program.prepared.append((settings, struct, list(arrays.values())))
    return struct


def decisions(program: ImplicitProgram, wanted: Wanted) -> list[float]:
    """Return what Newton's method decides by, besides norms."""
    struct = prepared(program, wanted)
    names = [name for name in (*_INTEGERS, *_NUMBERS) if name != "wanted"]
    return [program.library.pnode_decides(), *(getattr(struct, name) for name in names)]


def tolerance(settings: IntegratorSettings, name: str) -> torch.Tensor:
    """Return rtol or atol, 0-dim or ``(size,)``."""
    values = tolerances.values(getattr(settings, name))
    return torch.as_tensor(values, dtype=REAL, device=HOST.device)


def _structure(method: Method, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Return what the coefficients are."""
    if method.multistep:
        return {"lowest": 1 if method.name == "bdf" else method.order, "highest": method.order}
    if method.coupled:
        return {"stages": method.stages, "stiffly_accurate": scheme_of(method).stiffly_accurate}
    found = {
        "stages": len(arrays["b"]), "carries_slope": method.carries_slope,
        "stiffly_accurate": "A_explicit" not in arrays
        and bool((arrays["A"][-1] == arrays["b"]).all()),
    }  # fmt: skip
    if method.linearly_implicit:
        scheme = scheme_of(method)
        return found | {"one_matrix": scheme.one_matrix, "time_slope": scheme.needs_time_slope}
    return found | {"explicit_first": bool(arrays["A"][0, 0] == 0.0)}


def scheme_of(method: Method) -> Scheme:
    """Return the coefficients of a one-step method."""
    assert method.scheme is not None
    return method.scheme


def _newton(wanted: Wanted, keeps_jacobian: bool) -> dict[str, float]:
    """Return when Newton's method is content, for the fields of the structure."""
    settings, method = wanted.settings, wanted.settings.method
    values = _newton_options(wanted, keeps_jacobian)
    found: dict[str, Any] = {
        field: type(usual)(values.get(name, usual)) for name, (usual, field) in _NEWTON.items()
    }
    if not method.multistep and not method.coupled:
        return found
    # ModifiedNewton and StageNewton hear only what is given.
    found |= {field: 0.0 for name, (_, field) in _NEWTON.items() if name not in values} | {
        "by_residual": "snes_rtol" in values or "snes_atol" in values,
        "by_norm": "snes_stol" in values, "max_newton": found["max_newton"],
    }  # fmt: skip
    if "snes_max_it" not in values:
        if method.multistep and settings.adaptive:
            found["max_newton"] = ModifiedNewton.MOST_ITERATIONS
        if method.coupled and not found["by_norm"]:
            found["max_newton"] = StageNewton.MOST_ITERATIONS
    if method.coupled:
        found["newton_kappa"] = StageNewton.content(settings)
    return found


def _newton_options(wanted: Wanted, keeps_jacobian: bool) -> dict[str, Any]:
    """Return PETSc's options; but for Newton's they must be those that pnode sets."""
    settings, values = wanted.settings, wanted.options.values
    expected, own = (
        default_options(
            settings.method, settings.adaptive, settings.jacobian, settings.dtype, False,
            settings.controller, options, settings.comm.size,
        )
        for options in (settings.jacobian_options, JacobianOptions())
    )  # fmt: skip
    for name, value in values.items():
        same = name in expected and str(expected[name]) == str(value)
        if not same and name not in _NEWTON:
            raise Untraceable(f"the PETSc option {name!r} is for PETSc's own steps: drop it")
    own_newton = settings.method.multistep or settings.method.coupled
    if not own_newton and not keeps_jacobian:  # the Jacobian is evaluated at each iterate
        values = {**values, **{name: own[name] for name in own if name not in wanted.options.given}}
    return values

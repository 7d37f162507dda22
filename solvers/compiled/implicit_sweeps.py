"""Whole sweeps of implicit methods on small problems: which there are, and their settings."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pnode import tolerances
from pnode.checkpointing import Checkpointing
from pnode.solution import Ledger
from pnode.solvers.compiled.backend import Backend, Checked, Compilation, Trace, Wanted
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.evaluations import agree
from pnode.solvers.compiled.programs import Program
from pnode.solvers.compiled.trace import Untraceable
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.newton import ModifiedNewton
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.scheme import Scheme
from pnode.vectorfield import VectorField, vector_field
from pnode.vectors import REAL

__all__ = ["ImplicitSweeps"]

# LU factors of larger matrices belong to LAPACK, and larger fields to torch.
_LARGEST_STATE = 32
# Newton's options, and SNES's defaults.
_NEWTON = {
    "snes_rtol": 1e-8, "snes_stol": 1e-8, "snes_atol": 1e-50, "snes_max_it": 50,
    "snes_divergence_tolerance": 1e4,
}  # fmt: skip
_INTEGERS = (
    "stages", "adaptive", "max_newton", "wanted", "one_matrix", "time_slope", "stiffly_accurate",
    "explicit_first", "carries_slope", "lowest", "highest", "by_residual", "by_norm",
)  # fmt: skip
_NUMBERS = ("newton_rtol", "newton_stol", "newton_atol", "newton_divtol")
_ARRAYS = (
    "A", "inverse", "correction", "b", "defect", "alpha", "gamma", "diagonal", "rtol", "atol",
)  # fmt: skip


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


class ImplicitSweeps(Backend):
    """Sweeps of theta, DIRK, BDF and Rosenbrock methods, as programs of scalars."""

    implicit = True

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        settings, method = wanted.settings, wanted.settings.method
        if wanted.watched:
            return "dense=True, events and monitors look at single steps of implicit methods"
        if wanted.keep and wanted.checkpointing != Checkpointing():
            return "of implicit methods all steps are kept: drop checkpointing"
        if settings.form != "rhs" and not (settings.form == "mass" and method.multistep):
            return (
                f"the form {settings.form!r} is not compiled: only y' = f(t, y) is, and of BDF "
                "M y' = f(t, y)"
            )
        if method.kind != "implicit" or method.coupled:
            return (
                f"method={method.name!r} is not compiled so far: of the implicit methods, "
                "'beuler', 'cn', 'implicit_midpoint', BDF, the DIRK and the Rosenbrock methods are"
            )
        embedded = method.multistep or _scheme(method).b_embedded is not None
        if settings.adaptive and not embedded:
            return f"method={method.name!r} is compiled for fixed steps only: give step_size"
        if method.multistep and bool((_tolerance(settings, "atol") == 0.0).any()):
            return "BDF is compiled for atol without zeros"
        reuse = settings.jacobian_options.reuse
        if settings.jacobian != "dense" or reuse not in ("auto", "iteration"):
            return (
                "implicit methods are compiled with jacobian='dense' and jacobian_reuse='auto' or "
                "'iteration'"
            )
        if settings.size > _LARGEST_STATE:
            return f"implicit methods are compiled for up to {_LARGEST_STATE} state entries"
        if settings.dtype is not torch.float64:
            return "implicit methods are compiled in float64 only"
        if settings.controller not in ("basic", "none"):
            return f"controller={settings.controller!r} is PETSc's alone: use controller='basic'"
        return None

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Program:
        method = wanted.settings.method
        rosenbrock = method.linearly_implicit
        steps = "bdf" if method.multistep else "rosenbrock" if rosenbrock else "dirk"
        key = (ImplicitSweeps, steps)
        if key not in trace.codes:
            program = Program(trace.graph, part.problem.parameters, steps)
            _check(program, part, y0, rosenbrock)
            trace.codes[key] = program
        made: Program = trace.codes[key]
        _prepared(made, wanted)
        return made

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the sweep."""
        program: Program = checked[0].code
        mass = field_.problem.mass
        handle = program.stand_at(
            _prepared(program, wanted), y0, None if mass is None else mass.dense()
        )
        sweep = CompiledSweep(
            program, handle, None, field_.problem, wanted.settings, wanted.control, wanted.keep,
            wanted.control.first_step or 0.0,
        )  # fmt: skip
        return Compilation(sweep, captured=tuple(program.captured))


def _check(program: Program, part: VectorField, y0: torch.Tensor, rosenbrock: bool) -> None:
    """Compare the derivatives with the field's own near y0."""
    problem = replace(part.problem, check_undeclared=False)
    generator = torch.Generator().manual_seed(1)
    noise, w, v = torch.randn(3, len(y0), generator=generator, dtype=REAL)
    y = y0.detach() + 1e-2 * noise * (1.0 + y0.detach().abs())
    s, direction = problem.times[0] + 0.1, problem.direction
    here = vector_field(problem, Ledger()).linearize(s, y.clone(), differentiate_time=rosenbrock)
    f, back, mu = program.products(direction * s, y, w)
    expected = here.vjp(w)
    pairs = [(f * direction, here.flat_value()), (back * direction, expected.state)]
    pairs += _matched(program, mu * direction, expected.parameters)
    if rosenbrock:
        _, back, mu = program.products(direction * s, y, w, v * direction)
        jacobian, slope = here.second_vjp(w, v), here.time_derivative_vjp(w)
        pairs.append((back, jacobian.state + slope.state))
        sums = [
            b if a is None else a if b is None else a + b
            for a, b in zip(jacobian.parameters, slope.parameters, strict=True)
        ]
        pairs += _matched(program, mu, sums)
    if not all(agree(a, b) for a, b in pairs):
        raise Untraceable(
            "its derivatives are not those of its scalar operations: does it define some of its "
            "own?"
        )


def _matched(
    program: Program, mu: torch.Tensor, expected: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the gradients in pairs; what is None is zero."""
    found = dict(program.gradients([mu]))
    pairs = []
    for index, b in enumerate(expected):
        a = found.get(index)
        if a is not None or b is not None:
            like = a if b is None else b
            assert like is not None
            pairs.append(tuple(torch.zeros_like(like) if x is None else x for x in (a, b)))
    return pairs  # type: ignore[return-value]


def _arrays(method: Method) -> dict[str, np.ndarray]:
    """Return the coefficients: of a Rosenbrock method those in the variables Y = G k."""
    if method.multistep:
        return {}
    scheme = _scheme(method)
    if method.linearly_implicit:
        A, inverse, correction, b = scheme.transformed()
        arrays = {
            "A": A, "b": b, "alpha": scheme.c, "inverse": inverse, "correction": correction,
            "gamma": scheme.gamma, "diagonal": scheme.gamma_diagonal,
        }  # fmt: skip
    else:
        # Backward Euler does without the start; an embedded solution may need every stage.
        fixed = scheme if scheme.b_embedded is not None else scheme.without_idle_stages()
        arrays = {"A": fixed.A, "b": fixed.b, "alpha": fixed.c}
    if scheme.b_embedded is not None:
        defect = np.subtract(scheme.b_embedded, scheme.b)
        arrays["defect"] = defect @ arrays["inverse"] if method.linearly_implicit else defect
    return {name: np.ascontiguousarray(array, dtype=float) for name, array in arrays.items()}


def _prepared(program: Program, wanted: Wanted) -> _Settings:
    """Return the settings in C, which stay the same from solve to solve."""
    settings = wanted.settings
    for known, struct, _ in program.prepared:
        if known == settings:
            found: _Settings = struct
            return found
    method, arrays = settings.method, _arrays(settings.method)
    newton = _newton_options(wanted)
    alive = dict(arrays)
    for name in ("rtol", "atol"):
        tolerance = _tolerance(settings, name).reshape(-1).expand(settings.size)
        alive[name] = np.ascontiguousarray(tolerance.numpy())
    more: dict[str, Any]
    if method.multistep:
        more = _orders(wanted)
        newton["snes_max_it"] = more.pop("iterations", newton["snes_max_it"])
    else:
        more = {
            "stages": len(arrays["b"]), "carries_slope": method.carries_slope,
            "stiffly_accurate": bool((arrays["A"][-1] == arrays["b"]).all()),
        }  # fmt: skip
        if method.linearly_implicit:
            found_ = _scheme(method)
            more |= {"one_matrix": found_.one_matrix, "time_slope": found_.needs_time_slope}
        else:
            more["explicit_first"] = bool(arrays["A"][0, 0] == 0.0)
    struct = _Settings(
        adaptive=settings.adaptive, wanted=program.entries > 0,
        max_newton=int(newton["snes_max_it"]),
        newton_rtol=newton["snes_rtol"], newton_stol=newton["snes_stol"],
        newton_atol=newton["snes_atol"], newton_divtol=newton["snes_divergence_tolerance"],
        **more, **{name: array.ctypes.data for name, array in alive.items()},
    )  # fmt: skip
    program.prepared.append((settings, struct, list(alive.values())))
    return struct


def _scheme(method: Method) -> Scheme:
    assert method.scheme is not None
    return method.scheme


def _tolerance(settings: IntegratorSettings, name: str) -> torch.Tensor:
    return torch.as_tensor(tolerances.values(getattr(settings, name)), dtype=REAL)


def _orders(wanted: Wanted) -> dict[str, Any]:
    """Return the orders of BDF, and when its Newton's method is content; see ModifiedNewton."""
    method, given = wanted.settings.method, wanted.options.values
    found: dict[str, Any] = {
        "lowest": 1 if method.name == "bdf" else method.order, "highest": method.order,
        "by_residual": "snes_rtol" in given or "snes_atol" in given,
        "by_norm": "snes_stol" in given,
    }  # fmt: skip
    if wanted.settings.adaptive and "snes_max_it" not in given:
        found["iterations"] = ModifiedNewton.MOST_ITERATIONS
    return found


def _newton_options(wanted: Wanted) -> dict[str, Any]:
    """Return Newton's options; all others must be those that pnode sets."""
    settings, values = wanted.settings, wanted.options.values
    expected, own = (
        default_options(
            settings.method, settings.adaptive, settings.jacobian, settings.dtype, False,
            settings.controller, options,
        )
        for options in (settings.jacobian_options, JacobianOptions())
    )  # fmt: skip
    for name, value in values.items():
        same = name in expected and str(expected[name]) == str(value)
        if not same and name not in _NEWTON:
            raise Untraceable(f"the PETSc option {name!r} is for PETSc's own steps: drop it")
    if not settings.method.multistep:  # the program evaluates the Jacobian at each iterate
        values = {**values, **{name: own[name] for name in own if name not in wanted.options.given}}
    return {name: float(values.get(name, usual)) for name, usual in _NEWTON.items()}

"""Whole sweeps of implicit methods on small problems as machine code, forwards and backwards.

The field and its derivatives become straight-line C++ (:mod:`pnode.scalars`), compiled together
with the steps and the driver (``implicit_sweeps.cpp``) by the C++ compiler that torch's inductor
uses; the result is kept on disk. A sweep is one call then.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._utils import _unflatten_dense_tensors

from pnode import tolerances
from pnode.compilation import CompilationFailed, compile_source
from pnode.errors import LinearSolveFailed, SolveError
from pnode.options import SolverOptions
from pnode.scalars import Scalars, Symbols, decomposed
from pnode.solution import Ledger
from pnode.solvers.compiled import Compiler, agree
from pnode.solvers.integrator import IntegratorSettings, default_options
from pnode.solvers.methods import Method
from pnode.solvers.step_control import StepControl
from pnode.tracing import FieldGraph, Untraceable
from pnode.vectorfield import VectorField, vector_field
from pnode.vectors import REAL

__all__ = ["ImplicitCompiler", "ImplicitSweep"]

# LU factors of larger matrices belong to LAPACK, and larger fields to torch.
_LARGEST_STATE = 32
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
_SOURCE = Path(__file__).with_name("implicit_sweeps.cpp")
_PRELUDE = """\
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {
using std::fabs;
// torch's: NaN wins.
inline double larger(double a, double b) { return a >= b || a != a ? a : b; }
inline double smaller(double a, double b) { return a <= b || a != a ? a : b; }
typedef const double* const* Captured;
"""
# PETSc's largest step (TSAdaptSetStepLimits).
_LONGEST = 1e20
# Kept per solver: each holds on to the tensors that f reads.
_MOST_PROGRAMS = 8
_ROUND_OFF = 1e-9  # relative
_SINGULAR = 5  # Status in implicit_sweeps.cpp
# Newton's options, and SNES's defaults.
_NEWTON = {
    "snes_rtol": 1e-8, "snes_stol": 1e-8, "snes_atol": 1e-50, "snes_max_it": 50,
    "snes_divergence_tolerance": 1e4,
}  # fmt: skip


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("steps", "rejected", "rhs", "vjp", "jacobians", "newton", "krylov", "bytes")
    ]


_INTEGERS = (
    "rosenbrock", "stages", "adaptive", "keep", "max_steps", "max_newton", "one_matrix",
    "time_slope", "stiffly_accurate", "explicit_first", "carries_slope",
)  # fmt: skip
_NUMBERS = (
    "direction", "order", "first_step", "min_step", "max_step", "longest",
    "newton_rtol", "newton_stol", "newton_atol", "newton_divtol",
)  # fmt: skip
_ARRAYS = (
    "A", "inverse", "correction", "b", "defect", "alpha", "gamma", "diagonal", "rtol", "atol",
)  # fmt: skip


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


class _Program:
    """The machine code for one field and one of the two kinds of methods.

    Parameters
    ----------
    traced : FieldGraph
        The field.
    parameters : sequence of Tensor
        Those that gradients are wanted for.
    rosenbrock : bool
        Whether for Rosenbrock methods, which differentiate twice.
    """

    def __init__(
        self, traced: FieldGraph, parameters: Sequence[torch.Tensor], rosenbrock: bool
    ) -> None:
        for tensor in traced.captured:
            if tensor.dtype in (torch.float32, torch.complex128) or tensor.device.type != "cpu":
                raise Untraceable(f"it reads a tensor of type {tensor.dtype} on {tensor.device}")
        self.traced = traced
        self.size = math.prod(traced.shape)
        self._templates = [torch.empty(part.shape, device="meta") for part in traced.parameters]
        self.sums = sum(template.numel() for template in self._templates)
        self._pointers = ctypes.c_void_p * max(1, len(traced.captured))
        self.library = _load(_generate(traced, parameters, rosenbrock))

    def inputs(self) -> tuple[list[torch.Tensor], Any]:
        """Return what f reads, to be kept alive, and the pointers to it."""
        present = [
            x if x.dtype is REAL and x.is_contiguous() else x.detach().to(REAL).contiguous()
            for x in self.traced.captured
        ]
        return present, self._pointers(*[x.data_ptr() for x in present])

    def agrees(self, pointers: Any, t: float, y: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether f is what it should be but for round-off; y and f are flat and contiguous."""
        difference: float = self.library.pnode_difference(
            pointers, ctypes.c_double(t), _at(y), _at(expected)
        )
        return difference <= _ROUND_OFF

    def products(
        self, t: float, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return f, w^T df/dy and w^T df/dp; with v the derivatives of w^T (df/dy v + df/dt)."""
        f, back, mu = (torch.zeros(n, dtype=REAL) for n in (self.size, self.size, self.sums))
        _alive, pointers = self.inputs()
        time = ctypes.c_double(t)
        if v is None:
            self.library.pnode_products(pointers, time, *map(_at, (y, w, f, back, mu)))
        else:
            self.library.pnode_second(pointers, time, *map(_at, (y, w, v, back, mu)))
        return f, back, mu

    def split(self, mu: torch.Tensor, count: int) -> list[torch.Tensor | None]:
        """Return the gradient with respect to each of so many parameters."""
        gradients: list[torch.Tensor | None] = [None] * count
        parts = _unflatten_dense_tensors(mu, self._templates) if self._templates else ()
        for part, gradient in zip(self.traced.parameters, parts, strict=True):
            gradients[part.index] = gradient
        return gradients


def _at(tensor: torch.Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


def _generate(traced: FieldGraph, parameters: Sequence[torch.Tensor], rosenbrock: bool) -> str:
    """Return the program of a field in C++."""
    scalars, size = Scalars(), math.prod(traced.shape)
    like = torch.zeros((), dtype=REAL)
    state = torch.zeros(traced.shape, dtype=REAL)
    inputs = traced.inputs()
    with torch.no_grad():
        _, *saved_values = traced.value(like, state, *inputs)
    value = decomposed(traced.value, (like, state, *inputs))
    product = decomposed(traced.product, (state.clone(), like, state, *inputs, *saved_values))
    t, y = scalars.variable("t"), scalars.input("y", traced.shape)
    # Integers are constants of a program, as Python's numbers are.
    captured = [
        scalars.input(f"c[{i}]", x.shape) if x.dtype in (REAL, torch.bool) else x.detach().clone()
        for i, x in enumerate(traced.captured)
    ]
    read = [*captured, *(_transposed(captured[i]) for i in traced.transposed)]
    f, *saved = scalars.evaluate(value, t, y, *read)

    def pull_back(w: Symbols) -> list[Symbols]:
        return scalars.evaluate(product, w, t, y, *read, *saved)

    w = scalars.input("w", traced.shape)
    transposed, *parts = pull_back(w)
    mu: list[int] = []
    for part in traced.parameters:
        result = parts[part.first]
        if part.factors:
            left, right = parts[part.first : part.first + 2]
            result = scalars.matrix_product(_transposed(left), right)
            result = _transposed(result) if part.transposed else result
        mu += result.flat()
    rows = []
    for row in torch.eye(size, dtype=REAL):
        rows.append(pull_back(scalars.constants(row.view(traced.shape)))[0].flat())
    slope = [(f"f[{k}] =", number) for k, number in enumerate(f.flat())]
    entries = [number for row in rows for number in row]
    jacobian = [*slope, *((f"J[{k}] =", number) for k, number in enumerate(entries))]
    back = [(f"l[{k}] =", number) for k, number in enumerate(transposed.flat())]
    sums = [(f"mu[{k}] +=", number) for k, number in enumerate(mu) if number]
    timed = scalars.depends((number for _, number in jacobian), t.flat()[0])
    functions = [
        ("value", "double* f", slope),
        ("jacobian", "double* f, double* J", jacobian),
        ("parameters", "const double* w, Captured c, double* mu", sums),
    ]
    if rosenbrock:
        rates = scalars.directional(f.flat(), t.flat()[0])
        times = [(f"ft[{k}] =", number) for k, number in enumerate(rates)]
        S = scalars.input("S", (size, size)).flat()
        form = scalars.total(
            [scalars.product_sum(S, entries), scalars.product_sum(w.flat(), rates)]
        )
        wanted = y.flat()
        for part in traced.parameters:
            parameter = captured[_position(traced, parameters[part.index])]
            assert isinstance(parameter, Symbols)
            wanted += parameter.flat()
        slopes = scalars.gradient(form, wanted)
        second = [(f"l[{k}] +=", x) for k, x in enumerate(slopes[:size]) if x]
        second += [(f"mu[{k}] +=", x) for k, x in enumerate(slopes[size:]) if x]
        functions += [
            ("slopes", "double* f, double* J, double* ft", [*jacobian, *times]),
            ("pull_back", "const double* w, Captured c, double* l", back),
            (
                "second", "const double* S, const double* w, Captured c, double* l, double* mu",
                second,
            ),
        ]  # fmt: skip
    text = [
        f"#define ROSENBROCK {int(rosenbrock)}", _PRELUDE,
        f"constexpr int N = {size};",
        f"constexpr bool AUTONOMOUS = {str(not timed).lower()};",
    ]  # fmt: skip
    for name, arguments, results in functions:
        given = arguments if "Captured" in arguments else f"Captured c, {arguments}"
        text.append(
            f"void {name}(double t, const double* y, {given}) {{\n{scalars.code(results)}\n}}"
        )
    return "\n".join([*text, "}  // namespace", _SOURCE.read_text(encoding="utf-8")])


def _transposed(matrix: Any) -> Any:
    return Symbols(matrix.ids.t()) if isinstance(matrix, Symbols) else matrix.t()


def _position(traced: FieldGraph, parameter: torch.Tensor) -> int:
    """Return which of the captured tensors a parameter is."""
    for position, tensor in enumerate(traced.captured):
        if tensor is parameter:
            return position
    raise Untraceable(f"it reads a parameter of shape {tuple(parameter.shape)} in disguise")


def _load(source: str) -> ctypes.CDLL:
    """Compile a program, or take it from the disk."""
    library = compile_source(source, _FLAGS)
    library.pnode_forward.restype = ctypes.c_void_p
    library.pnode_reverse.restype = ctypes.c_int64
    library.pnode_difference.restype = ctypes.c_double
    return library


@dataclass(eq=False)
class _Kept:
    program: _Program
    used: list[bool]  # parameters
    prepared: list[tuple[IntegratorSettings, _Settings, list[np.ndarray]]] = field(
        default_factory=list
    )


class ImplicitCompiler(Compiler):
    """Compiles the sweeps of one implicit solver, once per shape of the state."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Any, _Kept] = {}
        #: Whether the last solve has a sweep.
        self.begun = False

    def begin(
        self, field_: VectorField, y0: torch.Tensor, settings: IntegratorSettings,
        options: SolverOptions, control: StepControl, unusual: str | None,
    ) -> ImplicitSweep | None:  # fmt: skip
        """Return the sweep of a solve from y0, or None, with a ``reason``, if there is none.

        Parameters
        ----------
        field_ : VectorField
            The field; evaluated once.
        y0 : Tensor
            Flat initial state.
        settings : IntegratorSettings
            Method, size, controller.
        options : SolverOptions
            PETSc options, most of which only PETSc can follow.
        control : StepControl
            How steps are chosen.
        unusual : str or None
            What else the solve is to do that such a sweep does not.
        """
        self.begun = False
        reason = self.refused or unusual or _unsupported(settings)
        if reason is None and y0.device.type != "cpu":
            reason = f"implicit methods are compiled for the CPU, and y0 is on {y0.device}"
        if reason is not None:
            self.reason = reason
            return None
        try:
            sweep = self._begin(field_, y0, settings, options, control)
            self.begun = True
            return sweep
        except (Untraceable, CompilationFailed) as error:
            self.refused = self.reason = str(error)
            return None

    def _begin(
        self, field_: VectorField, y0: torch.Tensor, settings: IntegratorSettings,
        options: SolverOptions, control: StepControl,
    ) -> ImplicitSweep:  # fmt: skip
        problem = field_.problem
        layout, direction = problem.layout, problem.direction
        t, y0 = direction * problem.times[0], y0.detach().contiguous()
        key = (layout, tuple(map(id, problem.parameters)))
        kept = self._kept.get(key)
        if kept is not None:
            _alive, pointers = kept.program.inputs()
            time = torch.scalar_tensor(t, dtype=layout.dtype)
            with torch.no_grad():
                value = _flat(problem.function(time, layout.unflatten(y0.clone())))
            usual = value is not None and len(value) == layout.size
            if value is not None and usual and kept.program.agrees(pointers, t, y0, value):
                field_.used[:] = kept.used
                prepared = _prepare(kept, settings, options, control)
                return ImplicitSweep(kept.program, prepared, direction)
        # The first time, or something has changed: with all checks.
        try:
            value = field_.rhs(problem.times[0], y0.clone()) * direction
        except SolveError as error:
            name = settings.method.name
            raise error.located(time=t, step=0, method=name) from error.__cause__
        field_.ledger.rhs -= 1  # the method makes no use of it
        rosenbrock = settings.method.ts_type == "rosw"
        program = _Program(self._trace(problem, y0).traced, problem.parameters, rosenbrock)
        self._check(program, field_, y0, rosenbrock)
        _alive, pointers = program.inputs()
        finite = bool(value.isfinite().all())
        if finite and not program.agrees(pointers, t, y0, value.contiguous()):
            raise Untraceable(
                "its value is not that of its graph: does it compute with something else than "
                "torch?"
            )
        kept = self._kept[key] = _Kept(program, list(field_.used))
        if len(self._kept) > _MOST_PROGRAMS:  # parameters that are other tensors every time
            del self._kept[next(iter(self._kept))]
        prepared = _prepare(kept, settings, options, control)
        return ImplicitSweep(program, prepared, direction)

    def _check(
        self, program: _Program, field_: VectorField, y0: torch.Tensor, rosenbrock: bool
    ) -> None:
        """Compare the derivatives with the field's own near y0."""
        problem = replace(field_.problem, check_undeclared=False)
        generator = torch.Generator().manual_seed(1)
        noise, w, v = torch.randn(3, len(y0), generator=generator, dtype=REAL)
        y = y0.detach() + 1e-2 * noise * (1.0 + y0.detach().abs())
        s, direction = problem.times[0] + 0.1, problem.direction
        own = vector_field(problem, Ledger())
        here = own.linearize(s, y.clone(), differentiate_time=rosenbrock)
        f, back, mu = program.products(direction * s, y, w)
        expected = here.vjp(w)
        pairs = [(f * direction, here.flat_value()), (back * direction, expected.state)]
        found = program.split(mu * direction, len(problem.parameters))
        pairs += _matched(found, expected.parameters)
        if rosenbrock:
            _, back, mu = program.products(direction * s, y, w, v * direction)
            jacobian, slope = here.second_vjp(w, v), here.time_derivative_vjp(w)
            pairs.append((back, jacobian.state + slope.state))
            sums = [
                b if a is None else a if b is None else a + b
                for a, b in zip(jacobian.parameters, slope.parameters, strict=True)
            ]
            pairs += _matched(program.split(mu, len(problem.parameters)), sums)
        if not all(agree(a, b) for a, b in pairs):
            raise Untraceable(
                "its derivatives are not those of its scalar operations: does it define some of "
                "its own?"
            )


def _flat(result: Any) -> torch.Tensor | None:
    """Return what a field has returned as one float64 tensor, None if that is nothing usual."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    if not all(isinstance(part, torch.Tensor) and part.dtype is REAL for part in parts):
        return None
    return (
        torch.cat([part.reshape(-1) for part in parts])
        if len(parts) > 1
        else (parts[0].reshape(-1).contiguous())
    )


def _matched(found: Sequence[Any], expected: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return the gradients in pairs; what is None is zero."""
    pairs = []
    for a, b in zip(found, expected, strict=True):
        if a is not None or b is not None:
            a, b = (
                (torch.zeros_like(b) if a is None else a),
                (torch.zeros_like(a) if b is None else b),
            )
            pairs.append((a, b))
    return pairs


def _unsupported(settings: IntegratorSettings) -> str | None:
    """Return why there are no such sweeps for these settings."""
    method = settings.method
    if settings.form != "rhs":
        return f"the form {settings.form!r} is not compiled: only y' = f(t, y) is"
    if method.ts_type not in ("rosw", "dirk", "theta", "cn", "beuler"):
        return (
            f"method={method.name!r} is not compiled so far: of the implicit methods, 'beuler', "
            "'cn', 'implicit_midpoint', the DIRK and the Rosenbrock methods are"
        )
    if settings.adaptive and method.ts_type not in ("rosw", "dirk"):
        return f"method={method.name!r} is compiled for fixed steps only: give step_size"
    if settings.jacobian != "dense" or settings.jacobian_options.reuse != "iteration":
        return "implicit methods are compiled with jacobian='dense', jacobian_reuse='iteration'"
    if settings.size > _LARGEST_STATE:
        return f"implicit methods are compiled for up to {_LARGEST_STATE} state entries"
    if settings.comm.size > 1:
        return "implicit methods are compiled for solves by one process only"
    if settings.dtype is not torch.float64:
        return "implicit methods are compiled in float64 only"
    if settings.controller not in ("basic", "none"):
        return f"controller={settings.controller!r} is PETSc's alone: use controller='basic'"
    return None


def _arrays(method: Method) -> dict[str, np.ndarray]:
    """Return the coefficients: of a Rosenbrock method those in the variables Y = G k."""
    scheme = method.scheme
    assert scheme is not None
    if method.ts_type == "rosw":
        A, inverse, correction, b = scheme.transformed()
        arrays = {
            "A": A, "b": b, "alpha": scheme.c, "inverse": inverse, "correction": correction,
            "gamma": scheme.gamma, "diagonal": scheme.gamma_diagonal,
        }  # fmt: skip
    else:
        # Backward Euler does without the start.
        fixed = scheme if method.ts_type == "dirk" else scheme.without_idle_stages()
        arrays = {"A": fixed.A, "b": fixed.b, "alpha": fixed.c}
    if scheme.b_embedded is not None:
        defect = np.subtract(scheme.b_embedded, scheme.b)
        arrays["defect"] = defect @ arrays["inverse"] if method.ts_type == "rosw" else defect
    return {name: np.array(array) for name, array in arrays.items()}


def _prepare(
    kept: _Kept, settings: IntegratorSettings, options: SolverOptions, control: StepControl
) -> _Settings:
    """Return the settings in C, which stay the same from solve to solve."""
    for known, struct, _ in kept.prepared:
        if known == settings:
            return struct
    method, arrays = settings.method, _arrays(settings.method)
    expected = default_options(
        method, settings.adaptive, settings.jacobian, settings.dtype, False, settings.controller,
        settings.jacobian_options,
    )  # fmt: skip
    values = options.values
    for name, value in values.items():
        same = name in expected and str(expected[name]) == str(value)
        if not same and name not in _NEWTON:
            raise Untraceable(f"the PETSc option {name!r} is for PETSc's own steps: drop it")
    newton = {name: float(values.get(name, usual)) for name, usual in _NEWTON.items()}
    rosenbrock = method.ts_type == "rosw"
    size = settings.size
    alive = {name: np.ascontiguousarray(array, dtype=float) for name, array in arrays.items()}
    for name in ("rtol", "atol"):
        tolerance = torch.as_tensor(tolerances.values(getattr(settings, name)), dtype=REAL)
        alive[name] = np.ascontiguousarray(tolerance.reshape(-1).expand(size).numpy())
    slopes = {}
    if rosenbrock:
        found = method.scheme
        assert found is not None
        slopes = {"one_matrix": found.one_matrix, "time_slope": found.needs_time_slope}
    struct = _Settings(
        rosenbrock=rosenbrock, stages=len(arrays["b"]), adaptive=settings.adaptive,
        max_steps=-1 if control.max_steps is None else control.max_steps,
        max_newton=int(newton["snes_max_it"]),
        stiffly_accurate=bool((arrays["A"][-1] == arrays["b"]).all()),
        explicit_first=bool(not rosenbrock and arrays["A"][0, 0] == 0.0),
        carries_slope=method.ts_type == "dirk",
        order=method.order,
        first_step=control.first_step or 0.0, min_step=control.min_step,
        max_step=control.max_step, longest=min(control.max_step, _LONGEST),
        newton_rtol=newton["snes_rtol"], newton_stol=newton["snes_stol"],
        newton_atol=newton["snes_atol"], newton_divtol=newton["snes_divergence_tolerance"],
        **slopes, **{name: array.ctypes.data for name, array in alive.items()},
    )  # fmt: skip
    kept.prepared.append((settings, struct, list(alive.values())))
    return struct


class ImplicitSweep:
    """One forward sweep in machine code, with what its adjoint needs."""

    def __init__(self, program: _Program, prepared: _Settings, direction: float) -> None:
        self._program = program
        self._settings = _Settings.from_buffer_copy(prepared)
        self._prepared = prepared  # with whose arrays it lives
        self._settings.direction = direction
        self._handle: int | None = None

    @property
    def captured(self) -> Sequence[torch.Tensor]:
        """What f reads."""
        return self._program.traced.captured

    def forward(
        self, times: Sequence[float], numbers: Sequence[int] | None, y0: torch.Tensor,
        keep: bool, ledger: Ledger,
    ) -> torch.Tensor | None:  # fmt: skip
        """Integrate.

        Parameters
        ----------
        times : sequence of float
            Increasing output times, the integrator's.
        numbers : sequence of int or None
            Of fixed steps between them.
        y0 : Tensor
            Flat initial state.
        keep : bool
            Whether an adjoint may follow.
        ledger : Ledger
            Counts what a successful sweep did.

        Returns
        -------
        Tensor or None
            Shape ``(T, size)``; None if a step failed for good: what PETSc makes of it is to be
            seen.
        """
        program, counts, status = self._program, _Counts(), ctypes.c_int64()
        _alive, pointers = program.inputs()
        start = y0.detach().to(REAL).contiguous()
        outputs = torch.empty((len(times), program.size), dtype=REAL)
        self._settings.keep = keep
        handle = program.library.pnode_forward(
            ctypes.byref(self._settings), pointers, _at(start),
            (ctypes.c_double * len(times))(*times), (ctypes.c_int64 * len(times))(*(numbers or ())),
            ctypes.c_int64(len(times)), _at(outputs), ctypes.byref(counts), ctypes.byref(status),
        )  # fmt: skip
        self._handle = handle
        weakref.finalize(self, program.library.pnode_free, ctypes.c_void_p(handle))
        if status.value:
            return None
        _add(counts, ledger)
        return outputs

    def reverse(
        self, cotangents: torch.Tensor, nonzero: Sequence[bool], count: int, ledger: Ledger
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Take the adjoint of all steps.

        Parameters
        ----------
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``; the first
            output's is left to the caller.
        nonzero : sequence of bool
            Which of them do not vanish.
        count : int
            Number of parameters.
        ledger : Ledger
            Counts.

        Returns
        -------
        state : Tensor
            The derivative with respect to y0, shape ``(size,)``.
        parameters : list of Tensor or None
            One per parameter, None for those that the field never used.

        Raises
        ------
        LinearSolveFailed
            If a matrix is singular.
        """
        program, counts = self._program, _Counts()
        _alive, pointers = program.inputs()
        given = cotangents.detach().to(REAL).contiguous()
        state, mu = torch.zeros(program.size, dtype=REAL), torch.zeros(program.sums, dtype=REAL)
        status = program.library.pnode_reverse(
            ctypes.byref(self._settings), pointers, ctypes.c_void_p(self._handle), _at(given),
            bytes(nonzero), _at(state), _at(mu), ctypes.c_int64(program.sums > 0),
            ctypes.byref(counts),
        )  # fmt: skip
        if status == _SINGULAR:
            raise LinearSolveFailed(
                "a transposed solve of the adjoint failed", reason="zero pivot in LU factorization"
            )
        _add(counts, ledger)
        return state, program.split(mu, count)


def _add(counts: _Counts, ledger: Ledger) -> None:
    ledger.steps += counts.steps
    ledger.rejected += counts.rejected
    ledger.rhs += counts.rhs
    ledger.vjp += counts.vjp
    ledger.jacobians += counts.jacobians
    ledger.newton += counts.newton
    ledger.krylov += counts.krylov
    ledger.ram_bytes = max(ledger.ram_bytes, counts.bytes)

"""A field as a program of scalars in C++, with the implicit steps on it that the driver takes.

The field and its derivatives become straight-line C++ (``scalars.py``), compiled together with the
steps (``implicit_steps.cpp``) by the C++ compiler that torch's inductor uses; the result is kept on
disk.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors

from pnode.base.vectors import REAL
from pnode.solvers.compiled.backend import Code
from pnode.solvers.compiled.decomposition import decomposed
from pnode.solvers.compiled.driver import at, pointers, source
from pnode.solvers.compiled.inductor import compile_source
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.numbers_read import Numbers
from pnode.solvers.compiled.operations import Operations
from pnode.solvers.compiled.scalars import Scalars, Symbols
from pnode.solvers.compiled.trace import FieldGraph, ParameterPart, Untraceable

__all__ = ["INCLUDES", "MOST_STAGES", "PRELUDE", "ImplicitProgram", "Program", "Writer"]

#: Of implicit_steps.cpp.
MOST_STAGES = 16

# Of steps that are more than one file.
_FILES = {
    "bdf": ("bdf_control.h", "modified_newton.h", "bdf_steps.cpp"),
    "dirk": ("dirk_steps.cpp", "dirk_derivatives.cpp"),
}
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
#: What comes before each program's field.
INCLUDES = """\
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <vector>
"""
#: What comes before scalar operations.
PRELUDE = """\
// torch's: NaN wins.
static inline double larger(double a, double b) { return a >= b || a != a ? a : b; }
static inline double smaller(double a, double b) { return a <= b || a != a ? a : b; }
"""


class ImplicitProgram(Kernel, Code):
    """The machine code for one field and one kind of methods.

    Parameters
    ----------
    traced : FieldGraph
        The field.
    field : str
        What stands before the steps of it.
    steps : {"explicit", "dirk", "bdf", "coupled", "rosenbrock"}
        The methods.
    flags : sequence of str
        More options of the compiler.
    systems : sequence of str
        The files that have the linear systems.
    own : str
        A program for this field alone, where the steps are for all of its size.
    """

    dtype = REAL
    #: Whether a DIRK's Newton method is to do with few Jacobians.
    keeps_jacobian = False
    #: Entries of the part of mu that each of independent samples has.
    row_entries = 0

    def __init__(
        self, traced: FieldGraph, field: str, steps: str, flags: Sequence[str] = (),
        systems: Sequence[str] = ("dense_systems.h",), own: str = "",
    ) -> None:  # fmt: skip
        self.traced = traced
        self.size = math.prod(traced.returned)
        #: Entries of mu.
        self.entries = sum(math.prod(part.shape) for part in traced.parameters)
        self._indices = [part.index for part in traced.parameters]
        nothing = torch.zeros((), dtype=REAL)
        self._shapes = [nothing.expand(part.shape) for part in traced.parameters]
        files = _FILES.get(steps, (f"{steps}_steps.cpp",))
        complex_numbers = "#include <complex>\n" if steps == "coupled" else ""
        text = "\n".join((
            source("kernel.h"), INCLUDES + complex_numbers, field,
            source("lu.h", *systems, "implicit_steps.cpp", *files),
        ))  # fmt: skip
        parts = (text, "") if not own else (own, text)
        self.library = compile_source(parts[0], (*_FLAGS, *flags), shared=parts[1])
        self.library.pnode_implicit_steps.restype = ctypes.c_void_p
        #: Settings in C by those in Python, and the arrays that they point to.
        self.prepared: list[tuple[Any, Any, Any]] = []

    def sums(self) -> list[torch.Tensor]:
        """Return zeros for mu, all parameters one after the other."""
        return [torch.zeros(self.entries, dtype=REAL)]

    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums."""
        if len(self._shapes) == 1:  # in less time
            return [(self._indices[0], sums[0].view(self._shapes[0].shape))]
        parts = _unflatten_dense_tensors(sums[0], self._shapes)
        return list(zip(self._indices, parts, strict=True))

    def takes_tangents(self, number: int, of_parameters: bool, steps: int) -> bool:
        """Whether there is code for tangents; see :class:`Kernel`."""
        return True

    def stand_at(
        self, settings: ctypes.Structure, y0: torch.Tensor, mass: torch.Tensor | None = None
    ) -> int:
        """Return a kernel at a state, for settings in C, and some methods a mass matrix."""
        state = y0.detach().contiguous()
        matrix = None if mass is None else mass.contiguous()  # kept alive until it is copied
        handle: int = self.library.pnode_implicit_steps(
            ctypes.byref(settings), at(state), None if matrix is None else at(matrix)
        )
        return handle


class Program(ImplicitProgram):
    """Where the field is scalar operations too.

    Parameters
    ----------
    traced : FieldGraph
        The field.
    parameters : sequence of Tensor
        Those that gradients are wanted for.
    steps : {"explicit", "dirk", "bdf", "coupled", "rosenbrock"}
        The methods; Rosenbrock's differentiate twice.
    """

    def __init__(self, traced: FieldGraph, parameters: Sequence[torch.Tensor], steps: str) -> None:
        self._numbers = Numbers(traced.captured)
        own = self._written_field(traced, parameters, steps)
        sizes, header = own.partition("\n")[0], source("scalar_field.h")
        super().__init__(traced, f"{sizes}\n{header}", steps, own=own)

    def _written_field(
        self, traced: FieldGraph, parameters: Sequence[torch.Tensor], steps: str
    ) -> str:
        return Writer(traced, parameters).text(steps)

    def _is_out_of_date(self) -> bool:
        return self._numbers.are_out_of_date()

    def inputs(self) -> list[torch.Tensor]:
        """Return what f reads as the program takes it."""
        return Numbers.present(self.traced.captured)

    def at(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        """Return f(t, y), flat."""
        f, y, read = torch.empty(self.size, dtype=REAL), y.contiguous(), self.inputs()
        self.library.pnode_value(pointers(read), ctypes.c_double(t.item()), at(y), at(f))
        return (f.fill_(math.nan) if self._is_out_of_date() else f,)

    def products(
        self, t: float, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return f, w^T df/dy and w^T df/dp; with v the derivatives of w^T (df/dy v + df/dt)."""
        f, back, mu = (torch.zeros(n, dtype=REAL) for n in (self.size, len(y), self.entries))
        read, time = self.inputs(), ctypes.c_double(t)
        if v is None:
            self.library.pnode_products(pointers(read), time, *map(at, (y, w, f, back, mu)))
        else:
            self.library.pnode_second(pointers(read), time, *map(at, (y, w, v, back, mu)))
        return f, back, mu


class Writer:
    """Writes a field and its derivatives in C++: the functions that ``implicit_steps.cpp`` lists.

    Parameters
    ----------
    traced : FieldGraph
        The field.
    parameters : sequence of Tensor
        Those that gradients are wanted for.
    """

    def __init__(self, traced: FieldGraph, parameters: Sequence[torch.Tensor]) -> None:
        self._traced, self._parameters = traced, parameters
        self._scalars = Scalars()
        self._operations = self._new_operations()
        shapes: tuple[tuple[int, ...], ...] = ((), traced.shape, traced.returned)
        like, state, cotangent = (torch.zeros(shape, dtype=REAL) for shape in shapes)
        inputs, values = traced.inputs(), traced.saved_examples()
        value = decomposed(traced.value, (like, state, *inputs))
        product = decomposed(traced.product, (cotangent, like, state, *inputs, *values))
        self._t, self._y, self._w = self._variables()
        # Integers are constants of a program, as Python's numbers are.
        self._captured = [
            self._input(i, x) if x.dtype in (REAL, torch.bool) else x.detach().clone()
            for i, x in enumerate(traced.captured)
        ]
        read = [*self._captured, *(_transposed(self._captured[i]) for i in traced.transposed)]
        with self._scalars.exactly():
            f, *saved = self._operations.evaluate(value, self._t, self._y, *read)
        self._f = self._of_state(f)
        pulled, *self._parts = self._operations.evaluate(
            product, self._w, self._t, self._y, *read, *saved
        )
        self._pulled, w = self._of_state(pulled), self._of_state(self._w)
        units = torch.eye(len(w), dtype=REAL).tolist()
        rows = [
            self._scalars.substituted(
                self._pulled, dict(zip(w, map(self._scalars.constant, row), strict=True))
            )
            for row in units
        ]
        self._jacobian = [number for row in rows for number in row[: len(w)]]
        # dF/dy', where f is -F of y and y'.
        self._jacobian += [
            self._scalars.apply("neg", number) for row in rows for number in row[len(w) :]
        ]

    def _new_operations(self) -> Operations:
        return Operations(self._scalars)

    def _variables(self) -> tuple[Symbols, Symbols, Symbols]:
        """Return t, y and the cotangent w, as the graphs get them."""
        traced, scalars = self._traced, self._scalars
        w = scalars.input("w", traced.returned)
        return scalars.variable("t"), scalars.input("y", traced.shape), w

    def _input(self, index: int, tensor: torch.Tensor) -> Symbols:
        """Return what f reads besides."""
        return self._scalars.input(f"c[{index}]", tensor.shape)

    def _of_state(self, values: Symbols) -> list[int]:
        """Return the expressions of the state's entries."""
        return values.flat()

    def text(self, steps: str) -> str:
        """Return the program, sizes first; for Rosenbrock methods with second derivatives."""
        jacobian = [*_targets("f[{}] =", self._f), *_targets("J[{}] =", self._jacobian)]
        sums = self._sums(self._gradient())
        functions = [
            ("value", "double* f", _targets("f[{}] =", self._f)),
            ("jacobian", "double* f, double* J", jacobian),
            ("parameters", "const double* w, Captured c, double* mu", sums),
        ]
        if steps in ("rosenbrock", "explicit"):
            back = _targets("l[{}] =", self._pulled)
            functions.append(("pull_back", "const double* w, Captured c, double* l", back))
        if steps == "rosenbrock":
            functions += self._second(jacobian)
        state = (self._scalars.variable("t").flat()[0], *self._of_state(self._y))
        timed = self._scalars.depends([*self._f, *self._jacobian], state[:1])
        linear = not self._scalars.depends(self._jacobian, state)
        parts = [
            f"constexpr int N = {len(self._f)}, WIDTH = {len(state) - 1};",
            source("scalar_field.h"), PRELUDE,
            f"const bool AUTONOMOUS = {str(not timed).lower()}, CONSTANT = {str(linear).lower()};",
        ]  # fmt: skip
        for name, arguments, results in functions:
            given = arguments if "Captured" in arguments else f"Captured c, {arguments}"
            code = self._scalars.code(results)
            parts.append(f"void {name}(double t, const double* y, {given}) {{\n{code}\n}}")
        return "\n".join(parts)

    def _gradient(self) -> list[int]:
        """Return (df/dp)^T w, all parameters one after the other."""
        mu: list[int] = []
        for part in self._traced.parameters:
            mu += self._of_parameter(part, self._gradient_of(part))
        return mu

    def _gradient_of(self, part: ParameterPart) -> Symbols:
        if not part.factors:
            return self._parts[part.first]
        left, right = self._parts[part.first : part.first + 2]
        result = self._product_of_factors(left, right)
        return _transposed(result) if part.transposed else result

    def _product_of_factors(self, left: Symbols, right: Symbols) -> Symbols:
        return self._operations.matrix_product(_transposed(left), right)

    def _of_parameter(self, part: ParameterPart, values: Symbols) -> list[int]:
        """Return the expressions of a gradient's entries."""
        return values.flat()

    def _sums(self, gradient: Sequence[int]) -> list[tuple[str, int]]:
        """Return where the gradient's entries are added."""
        return _targets("mu[{}] +=", gradient)

    def _second(self, jacobian: list[tuple[str, int]]) -> list[tuple[str, str, Any]]:
        """Return df/dt, and the derivatives of sum_kl S_kl J_kl + w^T df/dt."""
        scalars, size = self._scalars, len(self._f)
        y, w = self._of_state(self._y), self._of_state(self._w)
        rates = scalars.directional(self._f, self._time())
        S = scalars.input("S", (size, size)).flat()
        form = scalars.total(
            [scalars.product_sum(S, self._jacobian), scalars.product_sum(w, rates)]
        )
        wanted = y
        for part in self._traced.parameters:
            wanted = [*wanted, *self._input_of(self._parameters[part.index])]
        slopes = scalars.gradient(form, wanted)
        second = [*_targets("l[{}] +=", slopes[:size]), *self._sums(slopes[size:])]
        times = _targets("ft[{}] =", rates)
        return [
            ("slopes", "double* f, double* J, double* ft", [*jacobian, *times]),
            (
                "second_of_sums",
                "const double* S, const double* w, Captured c, double* l, double* mu", second,
            ),
        ]  # fmt: skip

    def _time(self) -> int:
        """Return the expression of the time that f gets, which is t taken to a window."""
        (time,) = self._scalars.variable("t").flat()
        if self._traced.ends is None:
            return time
        low, high = self._entries(self._traced.ends)
        do = self._scalars.apply
        return do("minimum", do("maximum", time, low), high)

    def _input_of(self, parameter: torch.Tensor) -> list[int]:
        """Return the expressions of a parameter's entries."""
        for index, tensor in enumerate(self._traced.captured):
            if tensor is parameter:
                return self._entries(index)
        raise Untraceable(f"it reads a parameter of shape {tuple(parameter.shape)} in disguise")

    def _entries(self, index: int) -> list[int]:
        symbols = self._captured[index]
        assert isinstance(symbols, Symbols)
        return symbols.flat()


def _targets(target: str, numbers: Sequence[int]) -> list[tuple[str, int]]:
    """Return where expressions go, nothing where zero is added."""
    return [(target.format(k), n) for k, n in enumerate(numbers) if n or "+=" not in target]


def _transposed(matrix: Any) -> Any:
    return Symbols(matrix.ids.t()) if isinstance(matrix, Symbols) else matrix.t()

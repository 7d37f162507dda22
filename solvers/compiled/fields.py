"""A vector field whose values and derivatives are compiled graphs, behind the usual interface.

For the solves that are not compiled as a whole: every integrator and adjoint goes on as it is, and
each evaluation, product or Jacobian is one call of machine code.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pnode.base.ledger import Ledger
from pnode.base.notices import outside
from pnode.base.vectors import REAL
from pnode.field.distributed import DistributedLinearization
from pnode.field.linearization import Linearization, Products
from pnode.field.products import transposed
from pnode.field.vectorfield import DistributedField, VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled import inductor
from pnode.solvers.compiled.backend import (
    Backend,
    Checked,
    Code,
    Compilation,
    Trace,
    Wanted,
)
from pnode.solvers.compiled.evaluations import agree
from pnode.solvers.compiled.inductor import CompilationFailed, Compiled, fingerprint
from pnode.solvers.compiled.lifting import differentiable
from pnode.solvers.compiled.trace import FieldGraph

__all__ = [
    "CompiledField",
    "CompiledLinearization",
    "FieldCode",
    "Fields",
    "compiled_field",
    "field_code",
]

_SOURCE = "".join(
    Path(file).read_text(encoding="utf-8") for file in (__file__, transposed.__code__.co_filename)
)
# So many requests for a number of rows are worth a graph of their own.
_OFTEN = 3


class FieldCode(Code):
    """The compiled graphs of one field, each made when it is first wanted.

    Parameters
    ----------
    traced : FieldGraph
        The field and its vector-Jacobian product.
    dtype : torch.dtype
        The user's precision.
    quiet : bool
        Whether nobody is told of what cannot be compiled.
    """

    def __init__(self, traced: FieldGraph, dtype: torch.dtype, quiet: bool = False) -> None:
        self.traced = traced
        self._quiet = quiet
        self._dtype = dtype
        self._rows: dict[int, Compiled | None] = {}
        self._asked: Counter[int] = Counter()

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype)

    @cached_property
    def _examples(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Time, state and what f reads; what is saved of an evaluation. Values do not matter."""
        given = [self._zeros(()), self._zeros(self.traced.shape), *self.traced.inputs()]
        return given, self.traced.saved_examples()

    def _compile(self, kind: str, function: Any, examples: Sequence[torch.Tensor]) -> Compiled:
        shapes = [(tuple(x.shape), x.dtype) for x in examples]
        name = f"{kind}-{fingerprint('field', self.traced.code, repr(shapes), _SOURCE)}"
        return inductor.compile_graph(name, function, [x.detach() for x in examples])

    def _compile_if_possible(
        self, kind: str, function: Any, examples: Sequence[torch.Tensor]
    ) -> Compiled:
        """Compile a derivative in the middle of a solve, which must not fail for that."""
        try:
            return self._compile(kind, function, examples)
        except CompilationFailed as error:
            if not self._quiet:
                warnings.warn(
                    f"compile=True: the {kind} of the field goes uncompiled: {error}",
                    stacklevel=outside(),
                )

            def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
                with torch.no_grad():
                    return list(function(*inputs))

            return run

    def at(self, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """Return f(t, y), flat, and what is saved of it."""
        point = y.to(self._dtype).view(self.traced.shape)
        value, *saved = self.value([t.to(self._dtype), point, *self.traced.inputs()])
        return [value.reshape(-1), *saved]

    def _evaluate(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, *saved = self.traced.value(*given)
        return value, *(x.contiguous() for x in saved)

    def _product(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, *parts = self.traced.product(*given)
        return state, *(part.gradient(parts) for part in self.traced.parameters)

    @cached_property
    def value(self) -> Compiled:
        """``[t, y, *inputs] -> [f, *saved]``."""
        return self._compile("value", self._evaluate, self._examples[0])

    @cached_property
    def product(self) -> Compiled:
        """``[w, t, y, *inputs, *saved] -> [w^T f_y, *(w^T f_p)]``, the parameters used."""
        given, saved = self._examples
        w = self._zeros(self.traced.returned)
        return self._compile("product", self._product, [w, *given, *saved])

    @cached_property
    def state_product(self) -> Compiled:
        """``[w, t, y, *inputs, *saved] -> [w^T f_y]``, for many of them at one point."""
        if not self.traced.parameters:
            return self.product

        def product(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.traced.product(*given)[:1]

        given, saved = self._examples
        w = self._zeros(self.traced.returned)
        return self._compile("state-product", product, [w, *given, *saved])

    @cached_property
    def derivative(self) -> Compiled:
        """``[v, t, y, *inputs, *saved] -> [f_y v]``.

        The transpose of ``w -> f_y^T w``, which is linear: its own vector-Jacobian product.
        """
        product = differentiable(self.traced.product)

        def transpose(v: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            w = v.new_zeros(self.traced.returned)
            return (transposed(lambda w: product(w, *rest)[0], v, at=w),)

        given, saved = self._examples
        v = self._zeros(self.traced.shape)
        return self._compile_if_possible("derivative", transpose, [v, *given, *saved])

    def rows(
        self, number: int, t: torch.Tensor, y: torch.Tensor, at_once: bool = False
    ) -> Compiled | None:
        """Return ``[W, t, y, *inputs, *saved] -> [W f_y]`` for so many rows w of W.

        None where it is asked for too seldom, unless it is wanted ``at_once``, and where products
        are to be taken one by one, as near (t, y) those of a batch are other ones.
        """
        if number not in self._rows:
            self._asked[number] += 1
            if self._asked[number] < _OFTEN and not at_once:
                return None
            given, saved = self._examples
            examples = [self._zeros((number, *self.traced.returned)), *given, *saved]
            right = self._batches(number, t, y)
            self._rows[number] = (
                self._compile_if_possible("rows", self._products, examples) if right else None
            )
        return self._rows[number]

    def _products(self, W: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.vmap(lambda w: self.traced.product(w, *rest)[0])(W),)

    def _batches(self, number: int, t: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether a batch of products is what each is alone, near (t, y).

        torch's rules for batches may be wrong, as that for the derivative of ``cdist`` is.
        """
        generator = torch.Generator().manual_seed(4)
        shapes = self.traced.shape, (number, *self.traced.returned)
        noise, W = (torch.randn(x, generator=generator, dtype=REAL).to(self._dtype) for x in shapes)
        point = y.detach().to(self._dtype).view(self.traced.shape)
        given = [t, point + 1e-2 * noise * (1.0 + point.abs()), *self.traced.inputs()]
        try:
            with torch.no_grad():
                given += self._evaluate(*given)[1:]
                (found,) = self._products(W, *given)
                some = {0, number // 2, number - 1}
                alone = {k: self.traced.product(W[k], *given)[0] for k in some}
        except Exception:  # as no rule is known, or f fails there
            return False
        return all(agree(found[k].reshape(-1), one.reshape(-1)) for k, one in alone.items())


class CompiledField(VectorField):
    """A vector field that calls compiled graphs; for one sweep.

    Parameters
    ----------
    problem, ledger, function
        As for :class:`VectorField`.
    code : FieldCode
        The graphs.
    """

    def __init__(
        self, problem: InitialValueProblem, ledger: Ledger, function: Any = None, *, code: FieldCode
    ) -> None:
        super().__init__(problem, ledger, function)
        self.code = code
        self.inputs = code.traced.inputs()
        self._check_first = False

    def rhs(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return g(s, u), flat, in the user's precision."""
        value = self.evaluate(s, u)[2][0].reshape(-1)
        return value if self._direction > 0 else -value

    def evaluate(
        self, s: float, u: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return the user's time, the state as the graphs take it, f and what is saved of it."""
        self.ledger.rhs += 1
        time, y = self._time(s), u.detach().view(self.code.traced.shape)
        return time, y, self.code.value([time, y, *self.inputs])

    def linearize(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        differentiate_time: bool = False,
    ) -> Linearization:
        """Evaluate f at (s, u), for products with the Jacobian."""
        if differentiate_time:
            return super().linearize(s, u, u_dot, True)  # of rates alone, at an output
        return self._wrap_results(self, self._direction, *self.evaluate(s, u))

    def _wrap_results(self, *arguments: Any) -> Linearization:
        return CompiledLinearization(*arguments)


class CompiledLinearization(Linearization):
    """g at one point, and products with dg/du and its transpose by compiled graphs.

    Parameters
    ----------
    field : CompiledField
        The field.
    sign : float
        g = sign * f.
    time, y : Tensor
        Where.
    results : list of Tensor
        Of ``FieldCode.value``.
    """

    def __init__(
        self,
        field: CompiledField,
        sign: float,
        time: torch.Tensor,
        y: torch.Tensor,
        results: list[torch.Tensor],
    ) -> None:
        super().__init__(field.shared, (y,), results[0], sign, time)
        self._field = field
        self.results = results

    def kept_bytes(self, copy: int = 0) -> int:
        """Return how many bytes are kept besides the state."""
        return sum(x.nbytes for x in self.results)

    def _arguments(self, field: CompiledField) -> list[torch.Tensor]:
        return [self._time, self._leaves[0], *field.inputs, *self.results[1:]]

    def vjp(self, w: torch.Tensor) -> Products:
        """Return w^T dg/dy and w^T dg/dp; see :class:`Linearization`."""
        field = self._field
        self._shared.ledger.vjp += 1
        cotangent = (w if self._sign > 0 else -w).view(self._value.shape)
        state, *found = field.code.product([cotangent, *self._arguments(field)])
        products: list[torch.Tensor | None] = [None] * len(field.parameters)
        for part, product in zip(field.code.traced.parameters, found, strict=True):
            products[part.index] = product
        rate = None if field.mass is None else field.mass.apply_transpose(w)
        return Products(state.reshape(-1), tuple(products), rate)

    def jvp(self, v: torch.Tensor, state: float = 1.0, rate: float = 0.0) -> torch.Tensor:
        """Return ``state dg/du v + rate dF/du_dot v``, flat."""
        field, y = self._field, self._leaves[0]
        self._shared.ledger.jvp += 1
        direction = (v * (state * self._sign)).view(y.shape)
        (flat,) = field.code.derivative([direction, *self._arguments(field)])
        flat = flat.reshape(-1)
        if rate:
            flat = flat + rate * (v if field.mass is None else field.mass.apply(v))
        return flat

    def _rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        """Return the VJPs of the rows of ``cotangents``, shape ``(k, size)``."""
        code, shape = self._field.code, self._value.shape
        rows = cotangents.reshape(-1, *shape)
        given = self._arguments(self._field)
        run = code.rows(len(rows), self._time, self._leaves[0])
        if run is not None:
            return [run([rows, *given])[0].reshape(len(rows), -1)]
        return [torch.stack([code.product([row, *given])[0].reshape(-1) for row in rows])]

    def second_vjp(
        self, w: torch.Tensor, v: torch.Tensor, time: torch.Tensor | None = None
    ) -> Products:
        """Not available."""
        raise NotImplementedError("compiled fields have no second derivatives")

    def time_derivative(self) -> torch.Tensor:
        """Not available."""
        raise NotImplementedError("compiled fields have no derivative with respect to time")


class _DistributedLinearization(DistributedLinearization, CompiledLinearization):
    """Exchanges ghost cells, and calls compiled graphs."""


class _DistributedField(DistributedField, CompiledField):
    """Exchanges ghost cells, and calls compiled graphs."""

    def _wrap_results(self, *arguments: Any) -> Linearization:
        return _DistributedLinearization(self._cells, *arguments)


def compiled_field(
    problem: InitialValueProblem, ledger: Ledger, codes: Sequence[FieldCode]
) -> CompiledField:
    """Return the field of a problem, or its two parts, one code each."""
    kind = _DistributedField if problem.distributed else CompiledField
    field = kind(problem, ledger, code=codes[0])
    if problem.explicit is not None:
        field.explicit = kind(problem, ledger, problem.explicit, code=codes[1])
        field.explicit.used = field.used
    return field


def field_code(trace: Trace, part: VectorField, wanted: Wanted) -> FieldCode:
    """Return the graphs of a field, the same ones for all that call them."""
    made = FieldCode(trace.graph, part.dtype, wanted.auto)
    code: FieldCode = trace.codes.setdefault(Fields, made)
    return code


class Fields(Backend):
    """The field of a solve whose sweeps or steps are not compiled as a whole."""

    share = 0.5
    ghosts: bool | None = None

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why it makes nothing for a solve, whatever the field."""
        if wanted.settings.form == "residual":
            return "a residual by itself is not"
        if wanted.settings.method.linearly_implicit:
            return "single products of Rosenbrock methods, which differentiate it twice, are not"
        if wanted.settings.integrals and wanted.settings.method.implicit:
            return "the vector field by itself, beside which cost= is integrated, is not"
        return None

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> FieldCode:
        code = field_code(trace, part, wanted)
        code.value  # noqa: B018  # a failure is still in time for the other way
        if wanted.keep or wanted.settings.method.implicit:
            code.product  # noqa: B018
        return code

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the code of each part."""
        codes = tuple(each.code for each in checked)
        return Compilation(codes=codes, captured=sum((x.traced.captured for x in codes), ()))

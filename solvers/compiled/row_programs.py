"""A field on independent samples as the program of one of them, which all of them have."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Sequence

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.driver import at, pointers
from pnode.solvers.compiled.operations import Operations
from pnode.solvers.compiled.programs import Program, Writer
from pnode.solvers.compiled.row_operations import Coupled, RowOperations
from pnode.solvers.compiled.scalars import Symbols
from pnode.solvers.compiled.trace import FieldGraph, ParameterPart, Untraceable

__all__ = ["RowProgram"]

Axes = tuple[int | None, ...]


class RowProgram(Program):
    """The machine code of one row, and where the rows' tensors are.

    Parameters
    ----------
    traced : FieldGraph
        The field on all rows.
    parameters : sequence of Tensor
        Those that gradients are wanted for.
    steps : {"explicit", "dirk", "bdf", "coupled", "rosenbrock"}
        The methods.
    clock : Tensor
        What is added to t for the time of each row, ``(B,)``.

    Raises
    ------
    Coupled
        If rows depend on one another, or compute different things.
    """

    def __init__(
        self, traced: FieldGraph, parameters: Sequence[torch.Tensor], steps: str,
        clock: torch.Tensor,
    ) -> None:  # fmt: skip
        self._clock, self.rows = clock, len(clock)
        super().__init__(traced, parameters, steps)
        self.size //= self.rows
        sizes = [math.prod(part.shape) for part in traced.parameters]
        own = [axis is not None for axis in self._gradient_axes]
        self.entries = sum(itertools.compress(sizes, (not one for one in own)))
        self.row_entries = sum(itertools.compress(sizes, own)) // self.rows
        #: How far apart the rows are in each of :meth:`inputs`, and in what comes behind them.
        self.apart = [
            0 if axis is None else x.numel() // self.rows
            for x, axis in zip(traced.captured, self._axes, strict=True)
        ] + [self.row_entries]

    def _written_field(
        self, traced: FieldGraph, parameters: Sequence[torch.Tensor], steps: str
    ) -> str:
        writer, text = _written(traced, parameters, steps, self._clock)
        self._axes, self._gradient_axes = writer.axes, tuple(writer.gradient_axes)
        #: Tells programs apart.
        self.fingerprint = hash(text)
        return text

    @property
    def captured(self) -> Sequence[torch.Tensor]:
        """What f reads besides t and y."""
        return [x for x in self.traced.captured if x is not self._clock]

    def inputs(self, actual: dict[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return what f reads as the program takes it: rows, of what has them, come first.

        ``actual``: tensors that are to be read instead of others, by the identity of these.
        """
        present = [(actual or {}).get(id(x), x) for x in self.traced.captured]
        read = (x.detach().to(REAL) for x in present)
        return [
            (x if axis is None else x.movedim(axis, 0)).contiguous()
            for x, axis in zip(read, self._axes, strict=True)
        ]

    def row_sums(self) -> torch.Tensor:
        """Return zeros for the part of mu that each row has."""
        return torch.zeros(self.rows, self.row_entries, dtype=REAL)

    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums, and the parts of rows."""
        shared, own = sums
        found, ends = [], [0, 0]
        for part, axis in zip(self.traced.parameters, self._gradient_axes, strict=True):
            size, shape = math.prod(part.shape), list(part.shape)
            start = ends[axis is not None]
            if axis is None:
                ends[0] += size
                found.append((part.index, shared[start : ends[0]].view(shape)))
            else:
                ends[1] += size // self.rows
                del shape[axis]
                values = own[:, start : ends[1]].reshape(self.rows, *shape)
                found.append((part.index, values.movedim(0, axis)))
        return found

    def at(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        """Return f of all rows, flat, at t and the differences of the clock."""
        y = y.view(self.rows, -1)
        return (self.row_products(t + self._clock, y, torch.zeros_like(y))[0].reshape(-1),)

    def products(
        self, t: float, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return f, w^T df/dy and the sums of w^T df/dp of all rows; see :class:`Program`."""
        y, w = y.view(self.rows, -1), w.view(self.rows, -1)
        rows = None if v is None else v.view(self.rows, -1)
        f, back, *sums = self.row_products(t + self._clock, y, w, rows)
        return f.reshape(-1), back.reshape(-1), *sums

    def row_products(
        self, t: torch.Tensor, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor | None = None,
        actual: dict[int, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return f, w^T df/dy and the sums and rows of w^T df/dp, at times of rows.

        With v the derivatives of w^T (df/dy v + df/dt).
        """
        function = "pnode_row_products" if v is None else "pnode_row_seconds"
        t, y, w, v = (x.contiguous() for x in (t, y, w, w if v is None else v))
        f, back = torch.zeros(2, *y.shape, dtype=REAL)
        mu, own = torch.zeros(self.entries, dtype=REAL), self.row_sums()
        read = [*self.inputs(actual), own]
        getattr(self.library, function)(
            pointers(read), (ctypes.c_int64 * len(read))(*self.apart), ctypes.c_int64(len(read)),
            *map(at, (t, y, w, v)), ctypes.c_int64(len(y)), *map(at, (f, back, mu)),
        )  # fmt: skip
        if self._is_out_of_date():
            f.fill_(math.nan)
        return f, back, mu, own


def _written(
    traced: FieldGraph, parameters: Sequence[torch.Tensor], steps: str, clock: torch.Tensor
) -> tuple[_Writer, str]:
    """Return the program, with the axes of rows for which it is one.

    Any for which the writer finds that all rows have one program are right: each row then does what
    that does with what belongs to the row.
    """
    rows = len(clock)
    choices = [
        [axis for axis, size in enumerate(x.shape) if size == rows > 1]
        if x is not clock and x.dtype in (REAL, torch.bool) else []
        for x in traced.captured
    ]  # fmt: skip

    def attempt(axes: Sequence[int | None], opaque: Sequence[int] = ()) -> _Writer:
        return _Writer(traced, parameters, clock, tuple(axes), frozenset(opaque))

    first = [own[0] if own else None for own in choices]
    try:
        writer = attempt(first)
        return writer, writer.text(steps)
    except Untraceable as error:
        if not any(choices):
            raise
        reason = error
    # One after the other, of which the rest may be anything.
    axes: list[int | None] = [None] * len(choices)
    for index, own in enumerate(choices):
        rest = [k for k, others in enumerate(choices) if others and k != index]
        for axis in own:
            with contextlib.suppress(Untraceable):
                attempt([axis if k == index else None for k in range(len(choices))], rest)
                axes[index] = axis
                break
    try:
        if axes == first:
            raise reason
        writer = attempt(axes)
        return writer, writer.text(steps)
    except Untraceable:
        raise reason from None


class _Writer(Writer):
    """Writes the program of one row.

    Parameters
    ----------
    traced, parameters, clock
        Those of the program.
    axes : tuple of int or None
        For each captured tensor the axis of rows; None for what all of them share.
    opaque : set of int
        Tensors all of whose entries are to be taken for the same.
    """

    def __init__(
        self, traced: FieldGraph, parameters: Sequence[torch.Tensor], clock: torch.Tensor,
        axes: Axes, opaque: frozenset[int],
    ) -> None:  # fmt: skip
        self.axes, self._clock, self._opaque = axes, clock, opaque
        self.rows = len(clock)
        super().__init__(traced, parameters)
        #: For each gradient of a parameter the axis of rows, once they are written.
        self.gradient_axes: list[int | None] = []

    def _new_operations(self) -> Operations:
        return RowOperations(self._scalars, self.rows)

    @property
    def _by_rows(self) -> RowOperations:
        assert isinstance(self._operations, RowOperations)
        return self._operations

    def _variables(self) -> tuple[Symbols, Symbols, Symbols]:
        size = math.prod(self._traced.shape) // self.rows
        y, w = (self._by_rows.of_rows(self._scalars.input(name, (size,)), 0).ids for name in "yw")
        shape = self._traced.shape
        zero = Symbols(torch.zeros((), dtype=torch.int64))  # times are those of the clock
        return zero, Symbols(y.reshape(shape)), Symbols(w.reshape(shape))

    def _input(self, index: int, tensor: torch.Tensor) -> Symbols:
        if tensor is self._clock:
            return self._by_rows.of_rows(self._scalars.variable("t"), 0)
        axis, shape = self.axes[index], list(tensor.shape)
        if index in self._opaque:
            one = self._by_rows.shared(self._scalars.input(f"c[{index}]", ()))
            return Symbols(one.ids.expand(shape).clone())
        if axis is None:
            return self._by_rows.shared(self._scalars.input(f"c[{index}]", shape))
        del shape[axis]
        return self._by_rows.of_rows(self._scalars.input(f"c[{index}]", shape), axis)

    def _of_state(self, values: Symbols) -> list[int]:
        return self._by_rows.row(Symbols(values.ids.reshape(self.rows, -1))).flat()

    def _product_of_factors(self, left: Symbols, right: Symbols) -> Symbols:
        if not len(left.ids) % self.rows:  # of each row by itself
            with contextlib.suppress(Coupled):
                one, other = (
                    self._by_rows.row(Symbols(x.ids.reshape(self.rows, -1, x.ids.shape[1])))
                    for x in (left, right)
                )
                product = Operations(self._scalars).matrix_product(Symbols(one.ids.t()), other)
                return self._by_rows.summed(product)
        return super()._product_of_factors(left, right)

    def _of_parameter(self, part: ParameterPart, values: Symbols) -> list[int]:
        axis = self._own_axis(part)
        if axis is None:
            try:
                found = self._by_rows.total(values)
            except Coupled:
                axis = next((k for k, n in enumerate(part.shape) if n == self.rows), None)
                if axis is None:
                    raise
        if axis is not None:
            found = self._by_rows.row(Symbols(values.ids.movedim(axis, 0)))
        self.gradient_axes.append(axis)
        return found.flat()

    def _own_axis(self, part: ParameterPart) -> int | None:
        """Return the axis of rows of a parameter that f reads."""
        parameter = self._parameters[part.index]
        pairs = zip(self.axes, self._traced.captured, strict=True)
        return next((axis for axis, x in pairs if x is parameter), None)

    def _sums(self, gradient: Sequence[int]) -> list[tuple[str, int]]:
        names = ("mu", f"const_cast<double*>(c[{len(self._captured)}])")
        ends, targets = [0, 0], []
        for part, axis in zip(self._traced.parameters, self.gradient_axes, strict=True):
            own = axis is not None
            size = math.prod(part.shape) // (self.rows if own else 1)
            targets += [f"{names[own]}[{ends[own] + k}] +=" for k in range(size)]
            ends[own] += size
        return [(place, n) for place, n in zip(targets, gradient, strict=True) if n]

    def _entries(self, index: int) -> list[int]:
        symbols, axis = self._captured[index], self.axes[index]
        assert isinstance(symbols, Symbols)
        if axis is None:
            return self._by_rows.alike(symbols).flat()
        return self._by_rows.row(Symbols(symbols.ids.movedim(axis, 0))).flat()

"""A step of an explicit Runge-Kutta method and its adjoint as one graph each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pnode.base.vectors import REAL
from pnode.problems import tolerances
from pnode.solvers.compiled import inductor
from pnode.solvers.compiled.backend import Code
from pnode.solvers.compiled.inductor import Compiled, CompiledGraph, fingerprint
from pnode.solvers.compiled.products import apart, sums_of_products
from pnode.solvers.compiled.trace import FieldGraph, ParameterPart
from pnode.solvers.scheme import Rows, Scheme

__all__ = ["StepGraphs", "combined"]

Tensors = tuple[torch.Tensor, ...]


class Layout(NamedTuple):
    """Which results of a step make a checkpoint.

    Attributes
    ----------
    results : int
        Number of results.
    begin, end : int
        The stages, which come after the step's start and before what was saved of the first.
    last : int
        From ``end`` to here: what was saved of the others. From here on: what the next step's
        checkpoint takes for its first stage.
    """

    results: int
    begin: int
    end: int
    last: int


# Bytes of a state and of what f evaluates, up to which torch's calls take longer than a step.
_SMALL = 65_536
_SOURCE = "".join(Path(x).read_text(encoding="utf-8") for x in (__file__, tolerances.__file__))


@dataclass(eq=False)
class StepGraphs(Code):
    """The compiled graphs of one field, method and kind of state.

    With k_i = f(t + c_i h, U_i), U_i = u + h sum_j a_ij k_j and u' = u + h sum_i b_i k_i.

    Parameters
    ----------
    traced : FieldGraph
        The field, in the user's time: h is negative where that runs backwards.
    scheme : Scheme
        A, b and c.
    b_embedded : tuple of float or None
        Weights of the embedded solution, for adaptive steps.
    fsal : bool
        Whether the last stage is u': its slope is the next step's k_1.
    size : int
        Entries of the state.
    dtype : torch.dtype
        The user's precision.
    keeps_saved : bool
        Whether steps keep what the products need, so that the adjoint evaluates nothing again.
    interpolation : tuple of tuple of float or None
        Where outputs lie inside of steps: how they depend on each slope, with FSAL, see
        :attr:`Scheme.interpolation`. A step then returns its slopes, and its adjoint takes
        cotangents of all but the last.
    """

    traced: FieldGraph
    scheme: Scheme
    b_embedded: tuple[float, ...] | None
    fsal: bool
    size: int
    dtype: torch.dtype
    keeps_saved: bool
    interpolation: Rows | None = None
    _steps: dict[Any, Compiled] = field(default_factory=dict, init=False)
    quick: Any = field(default=None, init=False)  # by a step of length 0, see :meth:`start`
    #: What the driver takes, see :class:`pnode.solvers.compiled.graph_steps.GraphSteps`.
    kernels: dict[Any, Any] = field(default_factory=dict, init=False)

    def bound(self, graph: FieldGraph) -> StepGraphs:
        """Return them for a graph that differs in the tensors that it reads alone."""
        made = super().bound(graph)
        if made is not self:
            made.kernels = {key: one and one.bound(made) for key, one in self.kernels.items()}
        return made

    @property
    def stages(self) -> int:
        """How many stages a checkpoint holds, and evaluations of f a step takes."""
        return len(self.scheme.c) - self.fsal

    @property
    def saved(self) -> int:
        """How many tensors a stage adds to a checkpoint."""
        return self.traced.saved if self.keeps_saved else 0

    def saved_examples(self) -> list[torch.Tensor]:
        """Return tensors like those that a stage adds to a checkpoint."""
        return self.traced.saved_examples()[: self.saved]

    @cached_property
    def products(self) -> int:
        """How many vector-Jacobian products the adjoint of a step takes."""
        return self.stages if self.interpolation else len(self.scheme.live_stages())

    def at(self, t: torch.Tensor, y: torch.Tensor) -> Tensors:
        """Return f(t, y), PETSc's precision, and what is saved of it."""
        slope, saved = self.start(t, y)
        return slope, *saved

    def start(self, t: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Return k_1, PETSc's precision, and what is saved of it."""
        read = self.traced.inputs()
        if self.quick is not None:
            # A step of length 0 evaluates f at u, in less time than torch takes for a small f.
            run, tolerances = self.quick
            state = u.to(REAL).contiguous()
            zero, slope = torch.zeros_like(t), torch.zeros_like(state)
            results = run([t, zero, state, *tolerances, slope, *read])
            if math.isfinite(float(results[2].sum())):
                return results[2], tuple(results[self.layout.last :])
        point = u.to(self.dtype).view(self.traced.shape)
        value, saved = self._evaluate(t, point, read)
        # As the adjoint takes them: what f saves may be a column of the state.
        return value.reshape(-1), tuple(x.contiguous() for x in saved)

    # ---------------------------------------------------------------------------------- the graphs

    def _evaluate(self, t: torch.Tensor, u: torch.Tensor, captured: Sequence[torch.Tensor]) -> Any:
        value, *saved = self.traced.value(t.to(self.dtype), u, *captured)
        return value.to(REAL), tuple(saved[: self.saved])

    def _step(self, error: bool, *inputs: torch.Tensor) -> Tensors:
        """One step.

        Inputs: t, h, u; for ``error`` rtol and atol; with FSAL k_1; what f reads.
        Outputs: what to look at (see :class:`CompiledIntegrator`), u', with FSAL k_s, with an
        interpolant all slopes as one tensor; the stages after the first. Where what f saves is
        kept, these are one tensor, and what is saved of the stages evaluated here follows, one
        tensor for all stages each; with FSAL the last stage's apart.
        """
        t, h, u, *rest = inputs
        shape = self.traced.shape
        u = u.view(shape)
        A, b, c = self.scheme.A, self.scheme.b, self.scheme.c
        rtol, atol = (
            (_shaped(rest.pop(0), shape), _shaped(rest.pop(0), shape)) if error else (None, None)
        )
        slopes = [rest.pop(0).view(shape)] if self.fsal else []
        captured = tuple(rest)
        points, saved = [], []
        for i in range(len(slopes), len(c) - self.fsal):
            point = (combined(u, h, A[i], slopes) if i else u).to(self.dtype)
            slope, kept = self._evaluate(t + c[i] * h, point, captured)
            points.append(point)
            slopes.append(slope)
            saved.append(kept)
        end = combined(u, h, b, slopes)
        looks = [end.square().sum()]
        carried: list[torch.Tensor] = []
        if self.fsal:
            slope, kept = self._evaluate(t + h, end.to(self.dtype), captured)
            slopes.append(slope)
            saved.append(apart(kept, (end, slope)))
            carried = [slope]
        if error:
            assert self.b_embedded is not None and rtol is not None and atol is not None
            differences = [
                e - w for e, w in zip(self.b_embedded, (*b, *[0.0] * len(c)), strict=False)
            ]
            defect = combined(None, h, differences, slopes)
            # VecErrorWeightedNorms: the embedded solution is end + defect.
            scale = atol + rtol * torch.maximum(end.abs(), (end + defect).abs())
            looks.append(tolerances.error_norm(defect.reshape(-1), scale.reshape(-1)))
            looks.append(torch.stack([k.square().sum() for k in slopes]).max())
        points = points if self.fsal else points[1:]
        states = [x.reshape(-1) for x in (end, *carried)]
        if self.interpolation is not None:
            states.append(torch.stack([slope.reshape(-1) for slope in slopes]))
        if not self.keeps_saved:
            return (torch.stack(looks), *states, *(x.reshape(-1) for x in points))
        here = saved[:-1] if self.fsal else saved
        groups: list[Any] = [points, *zip(*here, strict=True)]
        stacks = [torch.stack(group).contiguous() for group in groups if group]
        return (torch.stack(looks), *states, *stacks, *(saved[-1] if self.fsal else ()))

    def _adjoint(self, *inputs: torch.Tensor) -> Tensors:
        """The adjoint of one step; see :class:`pnode.adjoint.stages.ExplicitAdjoint`.

        Inputs: t, h, lambda, with an interpolant cotangents of slopes; the checkpoint, see
        :meth:`checkpoint`; mu; what f reads.
        Outputs: lambda and mu at the start of the step.
        """
        t, h, state, *rest = inputs
        A, b, c = self.scheme.A, self.scheme.b, self.scheme.c
        state = state.view(self.traced.shape)
        shape = (self.stages, *self.traced.shape)
        given = None if self.interpolation is None else rest.pop(0).view(shape)
        points, kept = self.stages_of(rest)
        sums = [rest.pop(0) for _ in self.traced.parameters]
        captured = tuple(rest)
        below: list[torch.Tensor | None] = [None] * self.stages
        parts: list[Tensors] = []
        for i in reversed(range(self.stages)):
            rows = [(b[i], state)] + [(A[j][i], below[j]) for j in range(i + 1, self.stages)]
            terms = [weight * tensor for weight, tensor in rows if weight and tensor is not None]
            if not (terms or given is not None):
                continue
            w = h * sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(state)
            w = (w if given is None else w + given[i]).to(self.dtype)
            time = (t + c[i] * h).to(self.dtype)
            saved = kept[i]
            if not self.keeps_saved:
                _, *saved = self.traced.value(time, points[i], *captured)
            product, *results = self.traced.product(w, time, points[i], *captured, *saved)
            below[i] = product.to(REAL)
            parts.append(tuple(results))
        state = sum((product for product in below if product is not None), start=state)
        for index, part in enumerate(self.traced.parameters):
            if part.factors:
                pairs = [results[part.first : part.first + 2] for results in reversed(parts)]
                for total in sums_of_products(pairs):
                    sums[index] = sums[index] + total
            else:
                for results in parts:
                    sums[index] = sums[index] + results[part.first]
        return (state.reshape(-1), *(total.contiguous() for total in sums))

    def stages_of(
        self, rest: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Return the stages and what was saved of each, of a checkpoint that begins ``rest``.

        It is taken out of there.
        """
        points = [rest.pop(0).view(self.traced.shape)]
        kept: list[list[torch.Tensor]] = [[] for _ in range(self.stages)]
        if not self.keeps_saved:
            points += [rest.pop(0).view(self.traced.shape) for _ in range(self.stages - 1)]
            return points, kept
        if self.stages > 1:
            points += _rows(rest.pop(0))
        first = 0
        if self.fsal:
            kept[0] = [rest.pop(0) for _ in range(self.saved)]
            first = 1
        for _ in range(self.saved if self.stages > first else 0):
            for row, tensors in zip(_rows(rest.pop(0)), kept[first:], strict=True):
                tensors.append(row)
        return points, kept

    def checkpoint(self, u: torch.Tensor, saved: Tensors, results: list[torch.Tensor]) -> Tensors:
        """Return what the adjoint of a step takes, from the step's start and results.

        The stages that the solution depends on; where what f saves is kept, those after the first
        as one tensor, and what was saved of the first (FSAL), and of the others.
        """
        layout = self.layout
        return (
            u.to(self.dtype), *results[layout.begin : layout.end], *saved,
            *results[layout.end : layout.last],
        )  # fmt: skip

    @cached_property
    def layout(self) -> Layout:
        """Where the results of a step go."""
        begin = 2 + self.fsal + (self.interpolation is not None)
        if not self.keeps_saved:
            end = begin + self.stages - 1
            return Layout(end, begin, end, end)
        end = begin + (self.stages > 1)
        last = end + (self.saved if self.stages > self.fsal else 0)
        return Layout(last + self.saved * self.fsal, begin, end, last)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint."""
        kept = self.traced.saved_bytes if self.keeps_saved else 0
        return self.stages * (self.size * self.dtype.itemsize + kept)

    # -------------------------------------------------------------------------------- the compiler

    def _key(self, kind: str, *more: object) -> str:
        facts = (self.scheme, self.b_embedded, self.fsal, self.size, self.dtype, self.keeps_saved)
        text = repr((facts, self.interpolation is not None))
        return f"{kind}-{fingerprint(self.traced.code, text, repr(more), _SOURCE)}"

    def compile_step(self, given: Sequence[torch.Tensor]) -> Compiled:
        """Return the graph of a step; adaptive if tolerances are given."""
        shapes = tuple(tuple(x.shape) for x in given)
        if shapes not in self._steps:
            self._steps[shapes] = self._compile_step(given, shapes)
        run, evaluated = self._steps[shapes], self.size * REAL.itemsize + self.traced.saved_bytes
        if self.fsal and evaluated <= _SMALL and isinstance(run, CompiledGraph):
            self.quick = run, given
        return run

    def _compile_step(self, given: Sequence[torch.Tensor], shapes: object) -> Compiled:
        number, state = torch.zeros((), dtype=REAL), torch.zeros(self.size, dtype=REAL)
        first = [state.clone()] if self.fsal else []
        examples = [number, number.clone(), state, *given, *first, *self.traced.inputs()]
        return self._made("step", partial(self._step, bool(given)), examples, shapes)

    @cached_property
    def slope(self) -> Compiled:
        """The graph of ``[t, u, *inputs] -> [k_1, *saved]``; see :meth:`start`."""
        examples = [torch.zeros((), dtype=REAL), torch.zeros(self.size, dtype=REAL)]

        def slope(t: torch.Tensor, u: torch.Tensor, *captured: torch.Tensor) -> Tensors:
            value, saved = self._evaluate(t, u.view(self.traced.shape).to(self.dtype), captured)
            return value.reshape(-1), *apart(saved, (value,))

        return self._made("slope", slope, [*examples, *self.traced.inputs()])

    @cached_property
    def adjoint(self) -> Compiled:
        """The graph of the adjoint of a step."""
        first = [torch.zeros(self.size, dtype=REAL)]
        if self.interpolation is not None:
            first.append(torch.zeros(self.stages, self.size, dtype=REAL))
        return self.compile("adjoint", self._adjoint, first, self.zeros())

    def compile(
        self, kind: str, function: Any, first: list[torch.Tensor],
        then: Sequence[torch.Tensor] = (), *more: object,
    ) -> Compiled:  # fmt: skip
        """Return the graph of ``[t, h, *first, *checkpoint, *then, *inputs] -> function``."""
        number = torch.zeros((), dtype=REAL)
        point = torch.zeros(self.size, dtype=self.dtype)
        saved, stacked = self.saved_examples(), self.stages - self.fsal
        if self.keeps_saved:
            others = [point.view(self.traced.shape)] * (self.stages - 1)
            kept = [torch.stack(others)] if others else []
            kept += [x.clone() for x in saved] if self.fsal else []
            kept += [torch.stack([x] * stacked) for x in saved if stacked]
        else:
            kept = [point.clone() for _ in range(self.stages - 1)]
        examples = [number, number.clone(), *first, point, *kept, *then, *self.traced.inputs()]
        return self._made(kind, function, examples, *more)

    def _made(
        self, kind: str, function: Any, examples: Sequence[torch.Tensor], *more: object
    ) -> Compiled:
        key, own = self._key(kind, *more), [tensor.detach() for tensor in examples]
        return inductor.compile_graph(key, lambda *inputs: function(*inputs), own)

    def zeros(self) -> list[torch.Tensor]:
        """Return zero sums for mu, one per parameter that f uses."""
        return [
            torch.zeros(part.shape[::-1] if _is_transposed(part) else part.shape, dtype=REAL)
            for part in self.traced.parameters
        ]

    def gradients(self, sums: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums: the index of each parameter that f uses, and its gradient."""
        return [
            (part.index, total.t().contiguous() if _is_transposed(part) else total)
            for part, total in zip(self.traced.parameters, sums, strict=True)
        ]


def _is_transposed(part: ParameterPart) -> bool:
    """Whether the transpose of a gradient is summed: of matrix products the wide form is."""
    if not part.factors:
        return False
    rows, columns = part.shape
    return rows > columns if rows != columns else part.transposed


def _rows(stack: torch.Tensor) -> list[torch.Tensor]:
    return [stack.select(0, index) for index in range(len(stack))]


def combined(
    u: torch.Tensor | None, h: torch.Tensor, weights: Sequence[float], slopes: list[torch.Tensor]
) -> torch.Tensor:
    """Return u + h sum_j weights_j slopes_j."""
    terms = [w * slope for w, slope in zip(weights, slopes, strict=False) if w]
    if not terms:
        return u if u is not None else torch.zeros_like(slopes[0])
    total = h * sum(terms[1:], start=terms[0])
    return total if u is None else u + total


def _shaped(tolerance: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return tolerance.view(shape) if tolerance.dim() else tolerance

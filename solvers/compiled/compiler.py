"""What of a solve is compiled, and why not more: one cache of traces, one list of reasons.

See docs/compile.md: whole sweeps of implicit methods, steps of explicit ones, and for everything
else the vector field alone, each made by a :class:`Backend`.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from pnode.checkpointing import Checkpointing
from pnode.errors import SolveError
from pnode.options import SolverOptions
from pnode.solution import Ledger
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.inductor import CompilationFailed
from pnode.solvers.compiled.trace import FieldGraph, Untraceable, trace_field
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.step_control import StepControl
from pnode.vectorfield import VectorField, vector_field
from pnode.vectors import REAL

__all__ = [
    "Backend", "Checked", "Code", "Compilation", "Compiler", "Reason", "Trace", "Wanted", "agree",
    "outside",
]  # fmt: skip

# Fields whose graph changes more often than this are not compiled any more.
_MOST_GRAPHS = 8
# Traces kept, each with the tensors that it reads.
_MOST_TRACES = 8


class Code(ABC):
    """Machine code of a field, or of steps of it."""

    @abstractmethod
    def at(self, t: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return f(t, y) by this code, flat, and what is saved of it; y is flat, t the user's."""


class Reason(NamedTuple):
    """Why a backend compiles nothing; ``final``: nor does any other."""

    text: str
    final: bool = False


@dataclass(eq=False)
class Trace:
    """A trace of a field, and what was compiled of it."""

    graph: FieldGraph
    codes: dict[Any, Any] = field(default_factory=dict)
    #: Which parameters f uses, once that has been looked at.
    used: list[bool] | None = None


class Checked(NamedTuple):
    """Code that gives what the field itself gives at the initial state.

    Attributes
    ----------
    code : Code
        The code.
    value : Tensor
        The slope as f gives it, in the integrator's time and the user's precision.
    found : sequence of Tensor
        What :meth:`Code.at` gave.
    """

    code: Any
    value: torch.Tensor
    found: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """A solve, as far as it decides what can be compiled.

    Attributes
    ----------
    settings : IntegratorSettings
        Method, size, controller.
    options : SolverOptions
        PETSc options, some of which only PETSc's own steps can follow.
    control : StepControl
        How steps are chosen.
    checkpointing : Checkpointing
        What checkpoints may take.
    keep : bool
        Whether a backward sweep may follow.
    dense : bool
        Whether outputs are interpolated.
    watched : bool
        Whether events or monitors look at single steps, or outputs are interpolated.
    lend : callable
        Lends an integrator of given settings, whose TS has read the PETSc options.
    """

    settings: IntegratorSettings
    options: SolverOptions
    control: StepControl
    checkpointing: Checkpointing
    keep: bool
    dense: bool
    watched: bool
    lend: Callable[[IntegratorSettings], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Compilation:
    """What of a solve is compiled: at most one of these.

    Attributes
    ----------
    sweep : CompiledSweep or None
        The whole sweep, to be taken. Where it fails, single steps tell the error.
    start : Start or None
        The compiled steps, see :mod:`pnode.solvers.compiled.integrator`.
    codes : tuple of FieldCode
        The field, and its explicit part.
    captured : tuple of Tensor
        What the machine code reads.
    """

    sweep: CompiledSweep | None = None
    start: Any = None
    codes: tuple[Any, ...] = ()
    captured: tuple[torch.Tensor, ...] = ()


class Backend(ABC):
    """A way from a field's graphs to machine code.

    Attributes
    ----------
    implicit : bool or None
        Whether it is for implicit methods or for explicit ones; None: for all.
    final : bool
        Whether no other one is left where it fails.
    """

    implicit: bool | None = None
    final = False

    @abstractmethod
    def refuses(self, wanted: Wanted) -> str | None:
        """Return why it makes nothing for a solve, whatever the field."""

    def compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Code | Reason:
        """Return the code of a field or of one of its parts, made or kept in ``trace``."""
        try:
            return self._compile(trace, part, y0, wanted)
        except (Untraceable, CompilationFailed) as error:
            return Reason(str(error), self.final)

    @abstractmethod
    def _compile(self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted) -> Code:
        """Do as :meth:`compile`; raises Untraceable and CompilationFailed."""

    @abstractmethod
    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return what a solve from y0 takes of checked code, one for each part of the field."""


class Compiler:
    """Compiles what can be of the solves of one solver.

    A graph holds Python numbers and the course of Python's control flow as they were. The field is
    therefore evaluated once a solve, and traced anew if the graph gives another value.

    Parameters
    ----------
    backends : sequence of Backend
        Those to be tried, best first.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends
        self._traces: dict[Any, Trace] = {}
        self._codes: set[str] = set()
        # Why the field is not compiled, once that is certain, and by which backend.
        self._refused: dict[Backend, Reason] = {}
        self._warned = False

    def begin(self, field_: VectorField, y0: torch.Tensor, wanted: Wanted) -> Compilation:
        """Compile what can be of a solve from y0, or load it; one warning if that is nothing.

        Parameters
        ----------
        field_ : VectorField
            The field; each part is evaluated once, which is not counted.
        y0 : Tensor
            Flat initial state.
        wanted : Wanted
            The solve.
        """
        if not wanted.settings.place.on_host or field_.problem.compute is not None:
            self._warn(["y0 is on a device, for which nothing is compiled yet"])
            return Compilation()
        reasons: list[str] = []
        evaluations = field_.ledger.rhs
        for backend in self._backends:
            if backend.implicit not in (None, wanted.settings.method.implicit):
                continue
            text = backend.refuses(wanted)
            found = Reason(text) if text else self._checked(backend, field_, y0, wanted)
            field_.ledger.rhs = evaluations
            if not isinstance(found, Reason):
                return backend.begin(found, field_, y0, wanted)
            if not any(found.text in reason for reason in reasons):
                reasons.append(found.text)
            if found.final:
                break
        self._warn(reasons)
        return Compilation()

    def _warn(self, reasons: list[str]) -> None:
        """Warn once that nothing is compiled."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "compile=True has no effect, the solve goes on without: " + "; ".join(reasons),
                stacklevel=outside(),
            )

    def _checked(
        self, backend: Backend, field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> list[Checked] | Reason:
        """Return the code of each part of a field."""
        if backend in self._refused:
            return self._refused[backend]
        made: list[Checked] = []
        for part in (field_, field_.explicit):
            if part is not None:
                found = self._part(backend, part, y0, wanted, len(made))
                if isinstance(found, Reason):
                    return found
                made.append(found)
        return made

    def _part(
        self, backend: Backend, part: VectorField, y0: torch.Tensor, wanted: Wanted, number: int
    ) -> Checked | Reason:
        problem = part.problem
        key = (problem.layout, number, tuple(map(id, problem.parameters)))
        known = self._traces.get(key)
        if known is not None and known.graph.fits():
            if known.used is not None:
                with _trusted(part, known.used):
                    value = _value(part, y0, wanted)
                found = self._compare(backend, known, part, value, y0, wanted)
                if found is not None:
                    return found
                part.trust(None)
            # The first time, or something has changed: with all checks.
            value = _value(part, y0, wanted)
            found = self._compare(backend, known, part, value, y0, wanted)
        else:
            value, found = _value(part, y0, wanted), None
        if found is None:
            trace = self._trace(key, part, y0)
            if isinstance(trace, Reason):
                return trace
            found = self._compare(backend, trace, part, value, y0, wanted)
        return found or self._refuse(
            "the vector field's value is not that of its graph: does it compute with something "
            "else than torch?"
        )

    def _compare(
        self, backend: Backend, trace: Trace, part: VectorField, value: torch.Tensor,
        y0: torch.Tensor, wanted: Wanted,
    ) -> Checked | Reason | None:  # fmt: skip
        """Return the code of a trace, if it gives what f does."""
        problem = part.problem
        code = backend.compile(trace, part, y0, wanted)
        if isinstance(code, Reason):
            self._refused[backend] = code
            return code
        time = torch.scalar_tensor(problem.direction * problem.times[0], dtype=REAL)
        with torch.no_grad():
            found = code.at(time, y0.detach())
        if not agree(found[0] if problem.direction > 0 else -found[0], value):
            return None
        if problem.check_undeclared and problem.explicit is None:
            trace.used = list(part.used)
        return Checked(code, value, found)

    def _refuse(self, text: str) -> Reason:
        """Compile this field no more."""
        reason = Reason(text, final=True)
        self._refused = dict.fromkeys(self._backends, reason)
        return reason

    def _trace(self, key: Any, part: VectorField, y0: torch.Tensor) -> Trace | Reason:
        """Trace a part of a field, and keep that."""
        if len(self._codes) == _MOST_GRAPHS:  # for this solve: others may go on with what there is
            return Reason(
                f"the vector field was compiled {_MOST_GRAPHS} times and is different again: let "
                "numbers that change be tensors, such as buffers, and keep to few shapes of y0",
                final=True,
            )
        problem = replace(
            part.problem, function=part.function, explicit=None, form="rhs", check_undeclared=False
        )
        field_ = vector_field(problem, Ledger())
        try:
            graph = trace_field(field_)
        except Untraceable as error:
            return self._refuse(str(error))
        self._codes.add(graph.code)
        if not _is_recorded(graph, field_, y0):
            return self._refuse(
                "the vector field depends on the state in a way that torch does not record (numpy? "
                "Python control flow?)"
            )
        made = self._traces[key] = Trace(graph)
        while len(self._traces) > _MOST_TRACES:  # parameters that are new in each solve
            del self._traces[next(iter(self._traces))]
        return made


@contextmanager
def _trusted(part: VectorField, used: list[bool]) -> Iterator[None]:
    """Evaluate a field without its checks and without a graph, for a first look at it."""
    recording, part.recording = part.recording, False
    part.trust(used)
    try:
        yield
    finally:
        part.recording = recording


def _value(part: VectorField, y0: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Evaluate f where the solve begins."""
    problem = part.problem
    s = problem.times[0]
    try:
        return part.rhs(s, y0.detach().to(part.dtype, copy=True))
    except SolveError as error:
        at, name = problem.direction * s, wanted.settings.method.name
        raise error.located(time=at, step=0, method=name) from error.__cause__


def _is_recorded(graph: FieldGraph, field_: VectorField, y0: torch.Tensor) -> bool:
    """Compare value and product of a graph with the field's own at another point."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(y0), generator=generator, dtype=torch.float64)
    point = (y0.detach() + 1e-2 * noise[0] * (1.0 + y0.detach().abs())).to(field_.dtype)
    w = noise[1].to(field_.dtype)
    problem, times = field_.problem, field_.problem.times
    s = times[0] + 0.37 * (
        times[1] - times[0] if len(times) > 1 and math.isfinite(times[1]) else 1.0
    )
    time = torch.scalar_tensor(problem.direction * s, dtype=field_.dtype)
    inputs = graph.inputs()
    with torch.no_grad():
        shaped = point.view(graph.shape)
        value, *saved = graph.value(time, shaped, *inputs)
        state, *_ = graph.product(w.view(graph.shape), time, shaped, *inputs, *saved)
    here = field_.linearize(s, point.clone())
    return agree(value.reshape(-1) * problem.direction, here.flat_value()) and agree(
        state.reshape(-1) * problem.direction, here.vjp(w).state
    )


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values are the same but for round-off."""
    rtol = 1e-9 if b.dtype is torch.float64 else 1e-4
    a, b = a.detach().double(), b.detach().double()
    if float((a - b).abs().max()) <= rtol * float(b.abs().max()):
        return True
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=rtol, atol=rtol * scale, equal_nan=True)


def outside() -> int:
    """Return the stack level, for a warning by the caller, of the code that uses pnode."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(("pnode.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level

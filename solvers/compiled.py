"""Explicit Runge-Kutta steps as compiled graphs, behind the interface of an integrator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pnode import tolerances
from pnode.compilation import CompilationFailed, Compiled
from pnode.errors import NonFiniteVectorField, SolveError
from pnode.interpolation import polynomial
from pnode.options import PETSc, SolverOptions
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.solvers.clock import FixedGrid
from pnode.solvers.explicit_graphs import StepGraphs
from pnode.solvers.integrator import IntegratorSettings, StepOutcome, TimeIntegrator
from pnode.tracing import FieldGraph, Untraceable, trace_field
from pnode.vectorfield import VectorField, vector_field
from pnode.vectors import REAL

__all__ = ["CompiledIntegrator", "Compiler", "Start", "Tape"]

# Fields whose graph changes more often than this are not compiled any more.
_MOST_GRAPHS = 8
# Traces kept, each with the tensors that it reads.
_MOST_ENTRIES = 8
# TSADAPTBASIC's defaults (TSAdaptSetSafety, TSAdaptSetClip).
_SAFETY, _LEAST_FACTOR, _LARGEST_FACTOR = 0.9, 0.1, 10.0
# What an adaptive step may square and divide by a tolerance; see vectors.is_moderate.
_MODERATE = 1e200


@dataclass(frozen=True, eq=False)
class Start:
    """The graphs for one solve, and the first slope, which is known from checking them.

    Attributes
    ----------
    graphs : StepGraphs
        The graphs.
    slope : Tensor
        f at the initial state, flat, PETSc's precision.
    saved : tuple of Tensor
        What is saved of it.
    tolerances : tuple of Tensor
        Relative and absolute, of adaptive steps.
    value : Tensor
        The slope as f itself gives it, in the integrator's time and the user's precision.
    inputs : list of Tensor
        What the graphs take for what f reads.
    """

    graphs: StepGraphs
    slope: torch.Tensor
    saved: tuple[torch.Tensor, ...]
    tolerances: tuple[torch.Tensor, ...]
    value: torch.Tensor
    inputs: list[torch.Tensor]


@dataclass(eq=False)
class Entry:
    """A trace of a field, and what was compiled of it."""

    traced: FieldGraph
    graphs: dict[Any, StepGraphs] = field(default_factory=dict)
    #: Which parameters f uses, once that has been looked at.
    used: list[bool] | None = None


class TooManyGraphs(Untraceable):
    """For this solve; others may go on with the graphs there are."""


class Compiler:
    """Compiles the steps of one solver, once per shape and dtype of the state.

    A graph holds Python numbers and the course of Python's control flow as they were. The field is
    therefore evaluated once a solve, and traced anew if the graph gives another value.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, Entry] = {}
        self._codes: set[str] = set()
        #: Why the field is not compiled, once that is certain.
        self.refused: str | None = None
        #: Why the last solve was not, and whether that is the field's fault.
        self.reason, self.field_fails = "", False

    def start(
        self, field_: VectorField, y0: torch.Tensor, settings: IntegratorSettings,
        options: SolverOptions, tape: bool,
    ) -> Start | None:  # fmt: skip
        """Return the graphs for a solve from y0, or None, with a ``reason``, if there are none.

        Parameters
        ----------
        field_ : VectorField
            The field; evaluated once.
        y0 : Tensor
            Flat initial state.
        settings : IntegratorSettings
            Method, size, controller.
        options : SolverOptions
            PETSc options, some of which only PETSc can follow.
        tape : bool
            Whether steps keep what their adjoints need.
        """
        reason = self.refused or _unsupported(settings, options)
        self.field_fails = self.refused is not None
        if reason is not None:
            self.reason = reason
            return None
        evaluations = field_.ledger.rhs
        try:
            return self._start(field_, y0, settings, tape)
        except (Untraceable, CompilationFailed) as error:
            if not isinstance(error, TooManyGraphs):
                self.refused = str(error)
            self.reason, self.field_fails = str(error), True
            field_.ledger.rhs = evaluations
            return None

    def _start(
        self, field_: VectorField, y0: torch.Tensor, settings: IntegratorSettings, tape: bool
    ) -> Start:
        problem = field_.problem
        time = torch.scalar_tensor(problem.direction * problem.times[0], dtype=REAL)
        state = y0.detach().to(REAL)
        key = (problem.layout, tuple(map(id, problem.parameters)))
        entry = self._entries.get(key)
        trusted = entry is not None and entry.used is not None
        if entry is not None and entry.used is not None:
            field_.trust(entry.used)
        value = self._value(field_, y0, settings)
        for attempt in range(2):
            if entry is None or attempt or not entry.traced.fits():
                if trusted:  # something has changed: with all checks
                    trusted, before = False, field_.ledger.rhs
                    field_.trust(None)
                    value = self._value(field_, y0, settings)
                    field_.ledger.rhs = before
                entry = self._entry(key, problem, y0, renew=True)
            graphs = self._graphs(entry, settings, tape)
            inputs = entry.traced.inputs()
            with torch.no_grad():
                slope, saved = graphs.start(time, state, inputs)
            if agree(slope if problem.direction > 0 else -slope, value):
                # Compile what will be wanted now: a failure is still in time for the other way.
                given = _tolerances(settings)
                graphs.compile_step(given)
                if tape:
                    graphs.adjoint  # noqa: B018
                if problem.check_undeclared:
                    entry.used = list(field_.used)
                return Start(graphs, slope, saved, given, value, inputs)
        raise Untraceable(
            "the vector field's value is not that of its graph: does it compute with something "
            "else than torch?"
        )

    def _entry(
        self, key: Any, problem: InitialValueProblem, y0: torch.Tensor, renew: bool
    ) -> Entry:
        """Return the trace of a field, a new one if there is none that fits, or to ``renew`` it."""
        entry = self._entries.get(key)
        if entry is None or renew or not entry.traced.fits():
            entry = self._entries[key] = self._trace(problem, y0)
            while len(self._entries) > _MOST_ENTRIES:  # parameters that are new in each solve
                del self._entries[next(iter(self._entries))]
        return entry

    def _value(
        self, field_: VectorField, y0: torch.Tensor, settings: IntegratorSettings
    ) -> torch.Tensor:
        """Evaluate f where the solve begins."""
        problem, method = field_.problem, settings.method
        s = problem.times[0]
        try:
            value = field_.rhs(s, y0.detach().to(field_.dtype, copy=True))
        except SolveError as error:
            at = problem.direction * s
            raise error.located(time=at, step=0, method=method.name) from error.__cause__
        if not method.fsal:  # a check, which the method makes no use of
            field_.ledger.rhs -= 1
        return value

    def _trace(self, problem: InitialValueProblem, y0: torch.Tensor) -> Entry:
        """Trace the field and compare value and product at another point."""
        if len(self._codes) == _MOST_GRAPHS:
            raise TooManyGraphs(
                f"the vector field was compiled {_MOST_GRAPHS} times and is different again: let "
                "numbers that change be tensors, such as buffers, and keep to few shapes of y0"
            )
        field_ = vector_field(replace(problem, check_undeclared=False), Ledger())
        graph = trace_field(field_)
        self._codes.add(graph.code)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, len(y0), generator=generator, dtype=torch.float64)
        point = (y0.detach() + 1e-2 * noise[0] * (1.0 + y0.detach().abs())).to(field_.dtype)
        w = noise[1].to(field_.dtype)
        times = problem.times
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
        same = agree(value.reshape(-1) * problem.direction, here.flat_value())
        if not same or not agree(state.reshape(-1) * problem.direction, here.vjp(w).state):
            raise Untraceable(
                "the vector field depends on the state in a way that torch does not record (numpy? "
                "Python control flow?)"
            )
        return Entry(graph)

    def _graphs(self, entry: Entry, settings: IntegratorSettings, tape: bool) -> StepGraphs:
        key = (settings.method, settings.adaptive, tape)
        if key not in entry.graphs:
            scheme = settings.method.scheme
            assert scheme is not None
            embedded = scheme.b_embedded if settings.adaptive else None
            if not settings.adaptive:
                scheme = scheme.without_idle_stages(settings.method.fsal)
            entry.graphs[key] = StepGraphs(
                entry.traced, scheme, embedded, settings.method.fsal, settings.size,
                settings.dtype, tape,
            )  # fmt: skip
        return entry.graphs[key]


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values are the same but for round-off."""
    rtol = 1e-9 if b.dtype is torch.float64 else 1e-4
    a, b = a.detach().double(), b.detach().double()
    if float((a - b).abs().max()) <= rtol * float(b.abs().max()):
        return True
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=rtol, atol=rtol * scale, equal_nan=True)


def _unsupported(settings: IntegratorSettings, options: SolverOptions) -> str | None:
    """Return why there are no compiled steps for these settings."""
    method = settings.method
    if method.ts_type not in ("rk", "ssp"):
        return (
            f"method={method.name!r} is not an explicit Runge-Kutta method (see pnode.methods()), "
            "and only these are compiled so far"
        )
    if settings.controller not in ("basic", "none"):
        return f"controller={settings.controller!r} is PETSc's alone: use controller='basic'"
    plain = ("ts_adapt_type", "ts_monitor", "ts_view")
    for name, value in options.values.items():
        if name.startswith("ts_") and not name.startswith(plain):
            return f"the PETSc option {name!r} is for PETSc's own steps: drop it"
        if name == "ts_adapt_type" and value != settings.controller and value != "none":
            return f"the PETSc option {name!r} is for PETSc's own steps: drop it"
    return None


def _tolerances(settings: IntegratorSettings) -> tuple[torch.Tensor, ...]:
    if not settings.adaptive:
        return ()
    found = (tolerances.values(settings.rtol), tolerances.values(settings.atol))
    return tuple(torch.as_tensor(value, dtype=REAL) for value in found)


@dataclass(eq=False)
class Tape:
    """Checkpoints of all steps of one forward sweep.

    Attributes
    ----------
    steps : list of tuple
        Of each step t and h (0-dim), and the checkpoint.
    outputs : list of int
        For each output time, how many steps come before it.
    """

    steps: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]] = field(
        default_factory=list
    )
    outputs: list[int] = field(default_factory=lambda: [0])

    @property
    def bytes(self) -> int:
        """Size of the checkpoints: no two share a tensor, and all are alike."""
        first = self.steps[0][2] if self.steps else ()
        return len(self.steps) * sum(tensor.numel() * tensor.element_size() for tensor in first)


class CompiledIntegrator(TimeIntegrator):
    """Takes each step by one call of a compiled graph.

    The TS of the base class only carries options and monitors. Where PETSc's controller would
    choose the next step, TSADAPTBASIC's formula does.

    Parameters
    ----------
    settings : IntegratorSettings
        With ``graphs``.
    options : SolverOptions
        PETSc options.
    """

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        super().__init__(settings, options)
        graphs = settings.graphs
        assert graphs is not None
        self._graphs: StepGraphs = graphs
        self._tolerances = _tolerances(settings)
        self._run: Compiled = graphs.compile_step(self._tolerances)
        memory = np.zeros(settings.size)
        self._memory = torch.from_numpy(memory)
        self.solution = PETSc.Vec().createWithArray(memory, comm=settings.comm)
        #: Longest adaptive step.
        self.longest = self.ts.getStepLimits()[1] if settings.adaptive else math.inf
        self._slope: torch.Tensor | None = None
        self._saved: tuple[torch.Tensor, ...] = ()
        self._number: tuple[float, torch.Tensor] = (0.0, torch.zeros((), dtype=REAL))

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep, or go on, from state ``u`` at time ``s``. Collective."""
        super().begin(field, u, s, step_index)
        self._field = field
        self._inputs = self._graphs.field_graph.inputs()
        self._stand_at(u.detach().to(REAL, copy=True))

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        super().end()
        del self._field, self._last
        self._inputs = []
        self.restart_step()

    def know_slope(self, start: Start) -> None:
        """Take the slope at the state it stands at."""
        if self._graphs.fsal:
            self._slope, self._saved = start.slope, start.saved

    def restart_step(self) -> None:
        """Forget the slope that the last step has left."""
        self._slope = None
        self._saved = ()

    def _stand_at(self, u: torch.Tensor) -> None:
        self._u = u = u.contiguous()
        self._memory.copy_(u)
        self.solution.stateIncrease()
        self._last: tuple[Any, ...] = ()
        self.restart_step()

    @property
    def history(self) -> Any:
        """What the next step needs: the solution (see :meth:`restore`)."""
        return (self._u,)

    def restore(self, history: Any) -> None:
        """Go on from a history, which an integrator of the same method had. Collective."""
        self._stand_at(history[0].detach().to(REAL))

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``. Collective.

        Returns
        -------
        StepOutcome
            A rejected attempt leaves the solution as it was.
        """
        graphs, ledger = self._graphs, self._field.ledger
        # The graphs are in the user's time.
        t = torch.scalar_tensor(self._direction * s, dtype=REAL)
        length = self._direction * step
        if self._number[0] != length:
            self._number = (length, torch.scalar_tensor(length, dtype=REAL))
        inputs = [t, self._number[1], self._u, *self._tolerances]
        saved = self._saved
        if graphs.fsal:
            slope = self._slope
            if slope is None:
                slope, saved = graphs.start(t, self._u)
                self._slope, self._saved = slope, saved
                ledger.rhs += 1
            inputs.append(slope)
        results = self._run(inputs + self._inputs)
        ledger.rhs += graphs.evaluations
        looks = results[0].tolist()
        proposed = step
        if self.settings.adaptive:
            accepted, proposed = self._choose(step, looks)
            error = self._look(looks, results[1], s, index)
            if error is not None or not accepted:
                return StepOutcome(False, proposed, error)
        else:
            error = self._look(looks, results[1], s, index)
            if error is not None:
                return StepOutcome(False, proposed, error)
        self._last, self._begin = (self._u, saved, results), self._direction * s
        self._u = results[1]
        self._memory.copy_(self._u)
        self.solution.stateIncrease()
        if graphs.fsal:
            self._slope = results[2]
            self._saved = tuple(results[-graphs.saved :]) if graphs.saved else ()
        return StepOutcome(True, proposed)

    def sweep(self, grid: FixedGrid, outputs: torch.Tensor, tape: Tape | None) -> int:
        """Take the fixed steps to all output times: :func:`forward_sweep` without its choices.

        Between two steps the interpreter does next to nothing.

        Parameters
        ----------
        grid : FixedGrid
            The steps.
        outputs : Tensor
            Receives the states at these times, shape ``(T, size)``.
        tape : Tape or None
            Receives what the adjoint needs.

        Returns
        -------
        int
            Number of steps.

        Raises
        ------
        NonFiniteVectorField
            After the step that leaves the finite numbers.
        """
        graphs, run, inputs, direction = self._graphs, self._run, self._inputs, self._direction
        fsal, last = graphs.fsal, -graphs.saved or None
        u, slope, saved, number = self._u, self._slope, self._saved, 0
        length, h = math.nan, self._number[1]
        outputs[0] = u
        if fsal and slope is None and grid.counts:
            t = torch.scalar_tensor(direction * grid.times[0], dtype=REAL)
            slope, saved = graphs.start(t, u)
            self._field.ledger.rhs += 1
        for interval in range(len(grid.counts)):
            for s, this_length, _ in grid.steps(interval):
                t = torch.scalar_tensor(direction * s, dtype=REAL)
                if this_length != length:
                    length = this_length
                    h = torch.scalar_tensor(direction * length, dtype=REAL)
                results = run(
                    [t, h, u, slope, *inputs] if slope is not None else [t, h, u, *inputs]
                )
                if not results[0].item() < _MODERATE:
                    error = self._look(results[0].tolist(), results[1], s, number)
                    if error is not None:
                        raise error
                if tape is not None:
                    tape.steps.append((t, h, graphs.checkpoint(u, saved, results)))
                u = results[1]
                if fsal:
                    slope = results[2]
                    saved = tuple(results[last:]) if last else ()
                number += 1
            outputs[interval + 1] = u
            if tape is not None:
                tape.outputs.append(number)
        self._field.ledger.rhs += number * graphs.evaluations
        self._stand_at(u)
        return number

    def _choose(self, step: float, looks: list[float]) -> tuple[bool, float]:
        """Return whether to accept the step, and the next length: TSADAPTBASIC."""
        error = looks[1]
        if not math.isfinite(error):
            return False, step
        factor = _SAFETY * error ** (-1.0 / self.settings.method.order) if error else math.inf
        factor = min(max(factor, _LEAST_FACTOR), _LARGEST_FACTOR)
        return error <= 1.0, min(step * factor, self.longest)

    def _look(
        self, looks: list[float], end: torch.Tensor, s: float, index: int
    ) -> SolveError | None:
        """Look for values that are not finite; as PETSc's own steps, see the base class."""
        if looks[0] < _MODERATE and (len(looks) == 1 or looks[2] < _MODERATE):
            return None
        if len(looks) == 1 and bool(end.isfinite().all()):
            return None
        return NonFiniteVectorField(
            "the vector field returned NaN or infinity: check it there, or take smaller steps",
            time=self._direction * s, step=index, method=self.settings.method.name,
        )  # fmt: skip

    def checkpoint(self, previous: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...]:
        """Return what the adjoint of the last step needs. Not collective.

        The stages at which f was evaluated, as other explicit methods do, and what was saved of
        each (see :class:`StepGraphs`).
        """
        # Matrix products write into what they return, which is not the user's doing: .data has a
        # version of its own.
        return tuple(tensor.data for tensor in self._graphs.checkpoint(*self._last))

    def evidence(self) -> tuple[float, ...]:
        """Return nothing: what the graphs compute cannot change but through their inputs."""
        return ()

    def interpolate(self, s: float) -> torch.Tensor:
        """Return the state at a time in the last step by the method's interpolant. Collective."""
        graphs = self._graphs
        (start, _, results), scheme = self._last, self.settings.method.scheme
        assert scheme is not None
        stages = self.checkpoint(None)[: graphs.stages]
        begin, h = self._begin, self._number[0]
        slopes = []
        for c, stage in zip(graphs.scheme.c, stages, strict=False):
            slopes.append(graphs.start(torch.scalar_tensor(begin + c * h, dtype=REAL), stage)[0])
            self._field.ledger.rhs += 1
        if graphs.fsal:
            slopes.append(results[2])
        theta = (self._direction * s - begin) / h
        weights = polynomial(scheme.interpolation, theta)
        state = start.clone()
        for weight, slope in zip(weights, slopes, strict=True):
            state.add_(slope, alpha=float(weight) * h)
        return state

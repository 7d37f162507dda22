"""Explicit steps as compiled graphs, for the driver; see ``graph_steps.cpp``."""

from __future__ import annotations

import ctypes
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from typing import Any

import torch

from pnode.base.communicators import allreduce
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled import driver
from pnode.solvers.compiled.account import paid
from pnode.solvers.compiled.backend import Backend, Checked, Compilation, Trace, Wanted
from pnode.solvers.compiled.budgets import Budget
from pnode.solvers.compiled.evaluations import trusted
from pnode.solvers.compiled.graph_calls import Graph, described, dtype_code, lend_torch, opened
from pnode.solvers.compiled.inductor import CompilationFailed, CompiledGraph
from pnode.solvers.compiled.integrator import Start, step_tolerances
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.shown_steps import ShownSteps
from pnode.solvers.compiled.step_tangents import StepTangents
from pnode.solvers.compiled.steps import StepGraphs, Tensors
from pnode.solvers.compiled.trace import FieldGraph
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Scheme
from pnode.solvers.step_control import automatic_step

__all__ = ["ExplicitSteps", "GraphSteps", "keeps_all"]

_NUMBERS = (
    "size", "dtype", "fsal", "adaptive", "results", "begin", "end", "last", "evaluations",
    "products", "again", "bytes", "saved", "slopes",
)  # fmt: skip


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS), ("step", Graph), ("adjoint", Graph),
        ("slope", Graph),
    ]  # fmt: skip


# How many tangents a graph takes: one, or several.
_AT_ONCE = 1, 8


@cache
def _warn_once(what: str, reason: str) -> None:
    warnings.warn(
        f"{what} from Python, which takes longer: {reason}",
        RuntimeWarning, stacklevel=6,
    )  # fmt: skip


class GraphSteps(Kernel):
    """One kind of compiled step, for the driver.

    Parameters
    ----------
    graphs : StepGraphs
        The steps and their adjoints.
    tolerances : sequence of Tensor
        Those of adaptive steps.
    keep, afresh, looked_at : bool
        Whether the driver is to take adjoints too, to begin steps without what the last one has
        left, and to look for events.
    t, y : float, Tensor
        Near which the field may be evaluated.
    auto : bool
        Whether code for tangents is made only once they have come to pay for it.

    Raises
    ------
    CompilationFailed
        If the driver could not be compiled, or the graphs need torch's help.
    """

    def __init__(
        self, graphs: StepGraphs, tolerances: Sequence[torch.Tensor], keep: bool, afresh: bool,
        looked_at: bool, t: float, y: torch.Tensor, auto: bool,
    ) -> None:  # fmt: skip
        self._library = driver.library()
        self.graphs = graphs
        self._tangents = _Tangents(graphs, t, y.detach().clone(), auto)
        self._owner: GraphSteps | None = None  # of the plan, if that is another
        self.size, self.dtype = graphs.size, graphs.dtype
        self._tolerances = tuple(tolerances)
        library, step = opened(graphs.compile_step(tolerances))
        lend_torch(library, self._library)
        adjoint = opened(graphs.adjoint)[1] if keep else Graph()
        slopes = looked_at or (afresh and graphs.fsal)
        slope = opened(graphs.slope)[1] if slopes else Graph()
        self.interpolation = graphs.interpolation
        saved = graphs.saved_examples()
        self._saved = saved if graphs.fsal else ()
        layout = graphs.layout
        settings = _Settings(
            graphs.size, dtype_code(library, graphs.dtype), graphs.fsal, bool(tolerances),
            layout.results, layout.begin, layout.end, layout.last, graphs.stages,
            graphs.products, 0 if graphs.keeps_saved else graphs.products,
            graphs.checkpoint_bytes, graphs.saved, graphs.interpolation is not None, step, adjoint,
            slope,
        )  # fmt: skip
        text = described(library, self._tolerances, self._saved, self.inputs(), self.sums())
        self._plan = self._library.pnode_plan(ctypes.byref(settings), text)
        weakref.finalize(self, self._library.pnode_free_plan, self._plan).atexit = False

    def begins(self, problem: InitialValueProblem) -> bool:
        """Whether it evaluates f at the initial state, and chooses an adaptive first step."""
        alone = problem.norm is None and not problem.ranks.parallel
        return self.graphs.quick is not None and self.dtype is REAL and alone

    def stand_at(
        self, state: torch.Tensor, slope: torch.Tensor | None, saved: Tensors
    ) -> tuple[int, Any]:
        """Return a kernel at a state, which is taken over, and what it reads.

        Parameters
        ----------
        state : Tensor
            The initial state, flat, PETSc's precision.
        slope : Tensor or None
            f there; None: to be evaluated.
        saved : tuple of Tensor
            What is saved of that evaluation.
        """
        kept = self._saved if slope is not None else ()
        saved = tuple(
            x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
            for x, like in zip(saved if self.graphs.fsal else (), kept, strict=True)
        )
        alive = (state.contiguous(), slope if slope is None else slope.contiguous(), saved)
        handle = self._library.pnode_graph_steps(
            self._plan, driver.pointers(self._tolerances), alive[0].data_ptr(),
            None if alive[1] is None else alive[1].data_ptr(), driver.pointers(saved),
        )  # fmt: skip
        return handle, alive

    def bound(self, graphs: StepGraphs) -> GraphSteps:
        """Return them for graphs that differ in the tensors that they read alone."""
        made = copy(self)
        made.graphs, made._owner = graphs, self._owner or self
        return made

    @property
    def traced(self) -> FieldGraph:  # type: ignore[override]
        """The field."""
        return self.graphs.traced

    def takes_tangents(self, number: int, of_parameters: bool, steps: int) -> bool:
        """Whether there is code for tangents; see :class:`Kernel`."""
        if self.interpolation is not None:
            return False
        some = any(math.prod(part.shape) for part in self.traced.parameters)
        place, at_once = 2 * (number > 1) + (of_parameters and some), _AT_ONCE[number > 1]
        code = self._tangents.code(at_once, bool(place % 2), steps)
        if code is None:
            return False
        self._library.pnode_plan_tangents(self._plan, place, ctypes.byref(code), at_once)
        return True

    def sums(self) -> list[torch.Tensor]:
        """Return zeros for mu."""
        return self.graphs.zeros()

    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums."""
        return self.graphs.gradients(sums)


class _Tangents:
    """The code for tangents of a kind of steps, made when it is wanted.

    Parameters
    ----------
    graphs, t, y, auto : StepGraphs, float, Tensor, bool
        As for :class:`GraphSteps`.
    """

    def __init__(self, graphs: StepGraphs, t: float, y: torch.Tensor, auto: bool) -> None:
        self._graphs, self._near, self._auto = graphs, (t, y), auto
        self._steps: StepTangents | None = None
        self._made: dict[Any, Graph | None] = {}
        self._evaluations = 0  # what tangents and steps without code have taken

    def code(self, at_once: int, of_parameters: bool, steps: int) -> Graph | None:
        """Return that for so many at once, of so many steps; None if there is none."""
        key = at_once, of_parameters
        if key not in self._made:
            self._evaluations += 2 * steps * self._graphs.products
            operations = len(self._graphs.traced.value.graph.nodes)
            if self._auto and not paid(self._evaluations, operations):
                return None
            self._made[key] = None
            try:
                if self._steps is None:
                    self._steps = StepTangents(self._graphs, *self._near)
                self._made[key] = opened(self._steps.compiled(*key))[1]
            except CompilationFailed as error:
                if not self._auto:
                    _warn_once("tangents of compiled steps are taken", str(error))
        return self._made[key]


class ExplicitSteps(Backend):
    """Steps of explicit methods, taken by the driver or one by one.

    Of a state that ranks share by the driver alone, on all of them at once.
    """

    implicit = False
    final = True  # what inductor cannot compile here it cannot compile elsewhere

    def __init__(self) -> None:
        self._known: set[IntegratorSettings] = set()
        self._last: IntegratorSettings | None = None  # to be hashed takes time

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no compiled steps for a solve, whatever the field."""
        settings, method = wanted.settings, wanted.settings.method
        if method.scheme is None or not method.scheme.explicit:
            return (
                f"method={method.name!r} is not an explicit Runge-Kutta method (see "
                "pnode.methods()), and only these are compiled so far"
            )
        if strange := wanted.strange_controller:
            return strange
        plain = ("ts_adapt_type", "ts_monitor", "ts_view")
        for name, value in wanted.options.values.items():
            ours = name.startswith(plain) if name.startswith("ts_") else True
            if name == "ts_adapt_type":
                ours = value in (settings.controller, "none")
            if not ours:
                return f"the PETSc option {name!r} is for PETSc's own steps: drop it"
        if not settings.parallel or (wanted.plain and allreduce() is not None):
            return None
        return (
            "of states that ranks share only whole sweeps are compiled, where nobody looks at "
            "single steps, and checkpoints stay in memory"
        )

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> StepGraphs:
        if wanted.interpolant is not None and wanted.plain:
            made = self._made(trace, wanted, wanted.interpolant)
            if self._kernel(made, wanted, part, y0) is not None:
                return made
        graphs = self._made(trace, wanted)
        # Compile what will be wanted now: a failure is still in time for the other way.
        graphs.compile_step(step_tolerances(wanted.settings))
        if graphs.keeps_saved:
            graphs.adjoint  # noqa: B018
        kernel = None
        if _is_driven(graphs, wanted):
            kernel = self._kernel(graphs, wanted, part, y0)
        if wanted.settings.parallel and kernel is None:
            raise CompilationFailed("the driver cannot take these steps")
        return graphs

    def _made(
        self, trace: Trace, wanted: Wanted, interpolant: Scheme | None = None
    ) -> StepGraphs:  # fmt: skip
        """Return the graphs of the steps, with their slopes for an interpolant."""
        settings, saved = wanted.settings, keeps_all(wanted, interpolant)
        method, inside = settings.method, interpolant is not None
        key = (method, settings.adaptive, saved, inside)
        if key not in trace.codes:
            scheme = interpolant or method.scheme
            assert scheme is not None
            embedded = scheme.b_embedded if settings.adaptive else None
            if not (settings.adaptive or inside):
                scheme = scheme.without_idle_stages(method.fsal)
            trace.codes[key] = StepGraphs(
                trace.graph, scheme, embedded, method.fsal or inside, settings.size,
                settings.dtype, saved, scheme.interpolation if inside else None,
            )  # fmt: skip
        graphs: StepGraphs = trace.codes[key]
        return graphs

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the steps, and the sweep if there is nothing to do between them but to go on."""
        (found,) = checked
        graphs, start, sweep = found.code, None, None
        kernel = self._kernel(graphs, wanted, field_, y0) if _is_driven(graphs, wanted) else None
        alone = kernel is not None and kernel.begins(field_.problem)
        if not (found.found or alone) and (graphs.fsal or wanted.settings.adaptive):
            found = found.evaluated(field_.problem, y0)
        slope, saved = (found.found[0], tuple(found.found[1:])) if found.found else (None, ())
        field_.ledger.rhs += graphs.fsal and slope is not None  # the check is the first slope
        if graphs.interpolation is None:  # others are for the driver alone
            start = Start(graphs, slope, saved)
        if kernel is not None:
            given = y0.detach().to(REAL, copy=True), slope, saved
            trial = None
            if "events" in wanted.watched and wanted.parts is not None:
                single = self._kernel(graphs, wanted.parts, field_, y0)
                trial = None if single is None else partial(single.stand_at, *given)
            stand = partial(kernel.stand_at, *given)
            sweep = self._sweep(kernel, stand, found, field_, y0, wanted, trial)
        return Compilation(sweep, start, captured=graphs.traced.captured)

    def _sweep(
        self, kernel: Kernel, stand: Callable[[], tuple[int, Any]], found: Checked,
        field_: VectorField, y0: torch.Tensor, wanted: Wanted,
        trial: Callable[[], tuple[int, Any]] | None = None,
    ) -> driver.CompiledSweep:  # fmt: skip
        """Return the sweep of a kernel that ``stand`` puts at y0. Collective.

        ``trial`` does so with one that takes parts of steps.
        """
        self._read_options(field_, y0, wanted)
        problem, control, settings = field_.problem, wanted.control, wanted.settings
        first = control.first_step or 0.0
        if settings.adaptive and not first and not kernel.begins(problem):
            begin, *others = problem.times
            end, order = others[-1 if wanted.dense else 0], settings.method.order
            with trusted(field_, field_.used):
                first = automatic_step(
                    field_, y0.detach(), settings, order, begin, end, control, found.value
                )
        budget = Budget()
        if wanted.keep and wanted.budget is not None:
            budget = wanted.budget(problem)
        sweep = driver.CompiledSweep(
            kernel, *stand(), problem, settings, control, wanted.keep, first, budget, wanted.dense
        )
        if wanted.watched:
            sweep.watch(ShownSteps(settings, y0), *((None,) if trial is None else trial()))
        return sweep

    def _read_options(self, field_: VectorField, y0: torch.Tensor, wanted: Wanted) -> None:
        """Let PETSc read its options, once for solves of a kind. Collective."""
        if wanted.settings is not self._last and wanted.settings not in self._known:
            self._known.add(wanted.settings)
            with wanted.lend(wanted.settings, field_, y0):
                pass
        self._last = wanted.settings

    def _kernel(
        self, graphs: StepGraphs, wanted: Wanted, part: VectorField, y0: torch.Tensor
    ) -> GraphSteps | None:
        """Return the steps for the driver, or None, after one warning, if it cannot take them."""
        given = step_tolerances(wanted.settings)
        afresh = wanted.begins_afresh
        looked_at = "events" in wanted.watched
        key = (tuple(tuple(x.shape) for x in given), wanted.keep, afresh, looked_at)
        if key not in graphs.kernels:
            graphs.kernels[key] = None
            if isinstance(graphs.compile_step(given), CompiledGraph):
                try:
                    problem = part.problem
                    t = problem.direction * problem.times[0]
                    graphs.kernels[key] = GraphSteps(
                        graphs, given, wanted.keep, afresh, looked_at, t, y0, wanted.auto
                    )
                except CompilationFailed as error:
                    if not (wanted.auto or wanted.settings.parallel):
                        _warn_once("compiled steps are called one by one", str(error))
        found: GraphSteps | None = graphs.kernels[key]
        return found


def _is_driven(graphs: StepGraphs, wanted: Wanted) -> bool:
    """Whether the driver can take a solve's steps with these graphs."""
    return wanted.plain and (graphs.interpolation is None) == (wanted.interpolant is None)


def keeps_all(wanted: Wanted, interpolant: Scheme | None = None) -> bool:
    """Whether steps keep what their adjoints need."""
    chosen = wanted.checkpointing
    free = chosen.bytes is None and chosen.disk is None and chosen.store in ("auto", "tape")
    return wanted.keep and free and (interpolant is not None or not wanted.dense)

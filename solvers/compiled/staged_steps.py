"""Explicit steps of states with ghost cells, for the driver; see ``staged_steps.cpp``."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled import driver
from pnode.solvers.compiled.backend import Checked, Code, Compilation, Trace, Wanted
from pnode.solvers.compiled.exchanges import NO_FOREST, Exchange, exchange
from pnode.solvers.compiled.fields import FieldCode, field_code
from pnode.solvers.compiled.graph_calls import Graph, described, lend_torch, opened
from pnode.solvers.compiled.graph_steps import ExplicitSteps, keeps_all
from pnode.solvers.compiled.integrator import step_tolerances
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.records import integers
from pnode.solvers.compiled.records import numbers as in_c
from pnode.solvers.compiled.trace import FieldGraph
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["StagedSteps"]

_NOTHING, _EVERYTHING, _STAGES = range(3)  # Keeps in staged_steps.cpp


class _Settings(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "size", "stages", "fsal", "adaptive", "alone", "saved", "keeps", "parameters",
                "bytes",
            )
        ),
        ("exchange", Exchange), ("value", Graph), ("product", Graph),
    ]  # fmt: skip


class StagedCode(Kernel, Code):
    """Steps of one method, and one field of a rank's cells with ghost cells around them.

    Parameters
    ----------
    code : FieldCode
        The field, from what f gets to what it returns.
    settings : IntegratorSettings
        The method, and whether steps are adaptive.
    keeps : int
        What is kept for adjoints: see ``staged_steps.cpp``.
    """

    collective = True

    def __init__(self, code: FieldCode, settings: IntegratorSettings, keeps: int) -> None:
        self._code, self._keeps, self.traced = code, keeps, code.traced
        self._adaptive = settings.adaptive
        self.size, self.dtype = math.prod(code.traced.returned), REAL
        scheme = settings.method.scheme
        assert scheme is not None
        self._fsal = settings.method.fsal
        if not settings.adaptive:
            scheme = scheme.without_idle_stages(self._fsal)
        self._scheme = scheme
        self._tolerances = [
            x.expand(self.size).contiguous() for x in step_tolerances(settings)
        ] or [torch.zeros(1, dtype=REAL)] * 2  # fmt: skip
        graphs = [code.value, *([code.product] if keeps else [])]
        (self._graphs, *_), self._calls = zip(*map(opened, graphs), strict=True)
        self._library = driver.library()
        lend_torch(self._graphs, self._library)
        self._plan: Any = None
        self._forest: Any = None
        self._owner: StagedCode | None = None  # of the plan, if that is another

    def at(self, t: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return f(t, y), flat, and what is saved of it; y has ghost cells."""
        return self._code.at(t, y)

    def bound(self, graph: FieldGraph) -> StagedCode:
        """Return it for a graph that differs in the tensors that it reads alone."""
        made = super().bound(graph)
        if made is not self:
            made._code, made._owner = self._code.bound(graph), self._owner or self
        return made

    def stand_at(self, y0: torch.Tensor, forest: Any, alone: bool) -> tuple[int, None]:
        """Return a kernel at a rank's own part of a state, and what it reads; see ``kernel.h``.

        Parameters
        ----------
        y0 : Tensor
            The part, flat.
        forest : petsc4py.PETSc.SF
            Of :meth:`pnode.layout.layouts.Layout.forest`.
        alone : bool
            Whether no other rank waits for its cells.
        """
        if self._plan is None:
            self._plan = self._planned(forest, alone)
            self._forest, self._owner = forest, None
            weakref.finalize(self, self._library.pnode_free_staged_plan, self._plan).atexit = False
        start = y0.detach().to(REAL).contiguous()
        given = start, *self._tolerances
        return self._library.pnode_staged_steps(self._plan, *(x.data_ptr() for x in given)), None

    def _planned(self, forest: Any, alone: bool) -> Any:
        traced, scheme, stages = self.traced, self._scheme, self._scheme.stages
        seen, returned = (torch.zeros(x, dtype=REAL) for x in (traced.shape, traced.returned))
        of_stage = seen.nbytes + traced.saved_bytes
        if self._keeps == _STAGES:
            of_stage = returned.nbytes
        settings = _Settings(
            self.size, stages, self._fsal, self._adaptive, alone, traced.saved, self._keeps,
            len(traced.parameters), (stages - self._fsal) * of_stage, exchange(forest),
            *self._calls,
        )  # fmt: skip
        embedded = scheme.b_embedded if self._adaptive else scheme.b
        assert embedded is not None
        numbers = [x for row in scheme.A for x in row] + [*scheme.b, *scheme.c]
        numbers += [e - b for e, b in zip(embedded, scheme.b, strict=True)]
        live = scheme.live_stages()
        marks = integers(tuple(int(i in live) for i in range(stages)), stages)
        text = described(self._graphs, (seen, returned), self.inputs())
        given = in_c(tuple(numbers)), marks, text
        return self._library.pnode_staged_plan(ctypes.byref(settings), *given)

    def sums(self) -> list[torch.Tensor]:
        """Return zeros for mu."""
        return [torch.zeros(part.shape, dtype=REAL) for part in self.traced.parameters]

    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums."""
        parts = self.traced.parameters
        return [(part.index, total) for part, total in zip(parts, sums, strict=True)]


class StagedSteps(ExplicitSteps):
    """Whole sweeps of explicit methods on states with ghost cells, on all ranks at once."""

    ghosts = True

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        settings = wanted.settings
        if settings.dtype is not REAL:
            return "steps of states with ghost cells are compiled in float64 only"
        chosen = wanted.checkpointing
        plain = wanted.plain and not wanted.dense and "events" not in wanted.watched
        plain = plain and (chosen.bytes is None or chosen.store != "tape")  # which is refused
        if settings.form == "rhs" and settings.method.scheme and not plain:
            return (
                "of states with ghost cells only whole sweeps are compiled, where nobody looks at "
                "single steps, and checkpoints stay in memory"
            )
        return super().refuses(wanted)

    def _compile(self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted) -> Any:
        settings = wanted.settings
        keeps = _EVERYTHING if keeps_all(wanted) else _STAGES if wanted.keep else _NOTHING
        more = settings.adaptive, settings.rtol, settings.atol, keeps
        key = (StagedSteps, settings.method, *more)
        if key not in trace.codes:
            code = field_code(trace, part, wanted)
            trace.codes[key] = StagedCode(code, settings, keeps)
        return trace.codes[key]

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the sweep. Collective."""
        (found,) = checked
        problem, code = field_.problem, found.code
        assert problem.exchange is not None
        forest = problem.exchange.forest()
        if forest is None:
            return Compilation(reasons=(NO_FOREST,))
        stand = partial(code.stand_at, y0, forest, not problem.ranks.parallel)
        sweep = self._sweep(code, stand, found, field_, y0, wanted)
        return Compilation(sweep, captured=code.traced.captured)

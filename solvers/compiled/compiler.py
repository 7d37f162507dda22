"""What of a solve is compiled, and why not more: one cache of traces, one list of reasons.

See docs/compile.md: whole sweeps of implicit methods, steps of explicit ones, and for everything
else the vector field alone, each made by a :class:`Backend`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger
from pnode.base.notices import outside
from pnode.base.ranks import ALONE
from pnode.field.field_checks import undisturbed
from pnode.field.rebinding import Rebound
from pnode.field.stacked import StackedResidual, stacked
from pnode.field.vectorfield import VectorField, vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.backend import Backend, Checked, Compilation, Reason, Trace, Wanted
from pnode.solvers.compiled.evaluations import agree, is_recorded, local, trusted, value_of
from pnode.solvers.compiled.following import Followed
from pnode.solvers.compiled.guards import Guard, followed, has_own_derivatives
from pnode.solvers.compiled.repeated import again, begun, keep, key_of
from pnode.solvers.compiled.trace import FieldGraph, Untraceable, trace_field

__all__ = ["Compiler", "bare"]

_MOST_GRAPHS = 8
# Traces kept, each with the tensors that it reads.
_MOST_TRACES = 8
# What becomes of a solve on one rank; of a solve of several the least of them.
_NEVER, _CHANGED, _PASSING, _MADE = range(4)


class _Prepared(NamedTuple):
    """A backend that compiles a solve, or none, its code, and why not others."""

    backend: Backend | None
    checked: Sequence[Checked]
    reasons: list[str]
    changed: bool
    lent: bool


def _nobody() -> None:
    return None


class Compiler:
    """Compiles what can be of the solves of one solver.

    A graph holds Python numbers and the course of Python's control flow as they were. The field is
    therefore evaluated once a solve, and traced anew if it calls other operations, or if the graph
    gives another value.

    Parameters
    ----------
    backends : sequence of Backend
        Those to be tried, best first.
    trace : callable
        Traces a field.
    most_graphs : float
        Fields whose graph changes more often than this are not compiled any more.
    """

    def __init__(
        self, backends: Sequence[Backend], trace: Callable[[VectorField], FieldGraph] = trace_field,
        most_graphs: float = _MOST_GRAPHS,
    ) -> None:  # fmt: skip
        self.backends, self._trace_field, self._most_graphs = backends, trace, most_graphs
        self._traces: dict[Any, Trace] = {}
        self._codes: set[str] = set()
        # Why the field is not compiled, once that is certain, and by which backend.
        self._refused: dict[Backend, Reason] = {}
        self._warned = False
        #: The backends for the last solve, and why not the others.
        self._last: tuple[Any, list[Backend], list[str]] = _nobody, [], []

    def known(self, problem: InitialValueProblem) -> Trace | None:
        """Return the trace of f alone, if that is known to be what it was. Not collective."""
        alone = problem.form == "rhs" and problem.window is None and problem.compute is None
        if not (self._traces and alone) or problem.distributed:
            return None
        found = self._traces.get(key_of(problem, 0))
        return found if found is not None and found.still_is(problem.function) else None

    def begin(self, field_: VectorField, y0: torch.Tensor, wanted: Wanted) -> Compilation:
        """Compile what can be of a solve from y0, or load it; one warning if that is nothing.

        Collective: of a state that ranks share all of them compile it, or none.

        Parameters
        ----------
        field_ : VectorField
            The field; each part is evaluated once, which is not counted.
        y0 : Tensor
            Flat initial state.
        wanted : Wanted
            The solve.
        """
        ranks = field_.problem.ranks
        ranks.where = {
            "time": field_.problem.direction * field_.problem.times[0], "step": 0,
            "method": wanted.settings.method.name,
        }  # fmt: skip
        made = again(field_, y0, wanted, self._refused)
        if made is not None:
            return made
        place, among = local(field_, y0), self.backends
        # Perhaps it is on this rank alone that someone looks at steps.
        looked_at = ranks.parallel and wanted.watched and not wanted.dense
        found = nothing = _Prepared(None, [], [], False, False)
        refused: tuple[str, ...] = ()
        while True:  # until it is the same backend on all ranks
            if found.backend not in among:
                found = ranks.attempt(self._prepared, *place, wanted, among) or nothing
            backend, checked, reasons, changed, lent = found
            mark = _PASSING if looked_at else _CHANGED if changed else _NEVER
            if backend is not None:
                mark = _MADE + among[::-1].index(backend)
            agreed, most = ranks.extremes(mark)
            if agreed < _MADE:
                break
            among = among[len(among) - 1 - (agreed - _MADE) :]
            if agreed == most:
                assert backend is not None
                made = begun(backend, checked, field_, y0, wanted, reasons, refused)
                reasons = list(made.reasons)
                if made.what:
                    keep(field_.known, wanted, backend, checked, made.reasons)
                    return made
                refused, among = made.reasons, among[1:]
        reasons = [*refused, *reasons]
        if backend is not None:
            reasons.append("another rank does not compile its part of the state")
        self.explain(wanted, reasons)
        return Compilation(
            reasons=tuple(reasons), changed=agreed == _CHANGED, lent=lent,
            passing=agreed == _PASSING,
        )  # fmt: skip

    def _prepared(
        self, field_: VectorField, y0: torch.Tensor, wanted: Wanted, among: Sequence[Backend]
    ) -> _Prepared:
        """Return the first backend that compiles a solve, and its code; not collective."""
        candidates, reasons = self.candidates(field_, wanted)
        evaluations, changed, lent = field_.ledger.rhs, False, False
        for backend in (one for one in candidates if one in among):
            found = self._checked(backend, field_, y0, wanted)
            field_.ledger.rhs = evaluations
            if not isinstance(found, Reason):
                return _Prepared(backend, found, reasons, changed, lent)
            changed, lent = changed or found.changed, lent or found.lent
            if not any(found.text in reason for reason in reasons):
                reasons.append(found.text)
            if found.final:
                break
        return _Prepared(None, [], reasons, changed, lent)

    def candidates(self, field_: VectorField, wanted: Wanted) -> tuple[list[Backend], list[str]]:
        """Return the backends for a solve, whatever the field is, and why not the others."""
        if not wanted.settings.place.on_host or field_.problem.compute is not None:
            return [], ["y0 is on a device, for which nothing is compiled yet"]
        known, found, reasons = self._last
        if known() is not wanted:
            found, reasons = [], []
            for backend in self.backends:
                if backend.is_for(wanted):
                    text = backend.why_not(wanted)
                    if text is None:
                        found.append(backend)
                    elif text not in reasons:
                        reasons.append(text)
            self._last = weakref.ref(wanted), found, reasons
        return list(found), list(reasons)

    def explain(self, wanted: Wanted, reasons: list[str]) -> None:
        """Warn once that nothing is compiled; raise ConfigurationError if there is no other way."""
        if wanted.needed:
            raise ConfigurationError(f"{wanted.needed} is not compiled: {'; '.join(reasons)}")
        if not wanted.auto:
            self.warn(reasons)

    def warn(self, reasons: Sequence[str]) -> None:
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
                found = self._part(backend, *stacked(part, y0), wanted, len(made))
                if isinstance(found, Reason):
                    return found
                made.append(found)
        return made

    def _part(
        self, backend: Backend, part: VectorField, y0: torch.Tensor, wanted: Wanted, number: int
    ) -> Checked | Reason:
        problem, window, key = part.problem, part.problem.window, key_of(part.problem, number)
        known, name = self._traces.get(key), wanted.settings.method.name
        if known is not None and window is not None:
            known = self._traces[key] = known.within(window)
        if known is not None and not known.graph.fits():
            known = None
        lent = known is None and isinstance(problem.function, Rebound)
        bound = None
        if known is None and (lent or backend.implicit is not None):
            bound = known = self._bound(key, problem)
        used = None if known is None else known.uses()
        looked_at = used is not None or not problem.check_undeclared
        if known is not None and looked_at and not (wanted.ghosts or wanted.settings.parallel):
            if known is part.known or known.still_is(part.function):
                part.trust(used or [False] * len(problem.parameters))
                return self._code(backend, known, part, y0, wanted)
        if known is not None and used is not None:
            recorded = known.guard.recorded and _is_differentiated(wanted)
            with trusted(part, used, recorded), followed(part, known.guard) as seen:
                value = value_of(part, y0, name)
            if _still_holds(known, part, seen, y0, wanted):
                found = self._compare(backend, known, part, value, y0, wanted)
                if found is not None:
                    return found
            known.own_derivatives |= seen.kind.functions  # operations may be the same all the same
            part.trust(None)
        # The first time, or something has changed: with all checks.
        with undisturbed(part.function, problem.layout.device):
            return self._part_anew(backend, part, y0, wanted, key, known, lent, bound)

    def _part_anew(
        self, backend: Backend, part: VectorField, y0: torch.Tensor, wanted: Wanted, key: Any,
        known: Trace | None, lent: bool, bound: Trace | None,
    ) -> Checked | Reason:  # fmt: skip
        name = wanted.settings.method.name
        with followed(part, Guard() if known is None else known.guard) as seen:
            value = value_of(part, y0, name)
        found = None
        if known is not None and _still_holds(known, part, seen, y0, wanted):
            found = self._compare(backend, known, part, value, y0, wanted)
        if found is None and bound is not None and not lent:
            known = None
        if found is None and known is not None and lent:
            return Reason(
                "the vector field has got other tensors from torch.func, and is not what it was "
                "with those before", final=True, lent=True,
            )  # fmt: skip
        if found is None and known is not None and wanted.auto:
            del self._traces[key]
            return Reason(
                "the vector field was another one in later solves: let numbers that change be "
                "tensors, such as buffers, and write into tensors instead of replacing them",
                final=True, changed=True,
            )  # fmt: skip
        if found is None:
            trace = self._trace(key, part, y0, seen)
            if isinstance(trace, Reason):
                return trace
            found = self._compare(backend, trace, part, value, y0, wanted)
        return found or self._refuse(
            "the vector field's value is not that of its graph: does it compute with something "
            "else than torch?"
        )

    def _bound(self, key: Any, problem: InitialValueProblem) -> Trace | None:
        """Return a trace of the same field with other parameters, for those of a problem."""
        for (*kind, _), trace in reversed(self._traces.items()):
            if tuple(kind) == key[:3]:
                made = trace.within(problem.window).bound(problem.parameters)
                if made is not None and made.graph.fits():
                    return made
        return None

    def _compare(
        self, backend: Backend, trace: Trace, part: VectorField, value: torch.Tensor,
        y0: torch.Tensor, wanted: Wanted,
    ) -> Checked | Reason | None:  # fmt: skip
        """Return the code of a trace, if it gives what f does."""
        problem = part.problem
        found = self._code(backend, trace, part, y0, wanted)
        if isinstance(found, Reason):
            return found
        found = found.evaluated(problem, y0)
        assert found.value is not None
        if not agree(found.value, value):
            return None
        if problem.check_undeclared and problem.explicit is None:
            trace.used, trace.looked_at = list(part.used), trace.trainable()
        trace.look(part.function)
        return found._replace(value=value)

    def _code(
        self, backend: Backend, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Checked | Reason:
        """Return the code of a trace."""
        code = backend.compile(trace, part, y0, wanted)
        if isinstance(code, Reason):
            self._refused[backend] = code
            return code
        return Checked(code)

    def _refuse(self, text: str) -> Reason:
        """Compile this field no more."""
        reason = Reason(text, final=True)
        self._refused = dict.fromkeys(self.backends, reason)
        return reason

    def _trace(
        self, key: Any, part: VectorField, y0: torch.Tensor, seen: Followed
    ) -> Trace | Reason:
        """Trace a part of a field, whose evaluation has been followed, and keep that."""
        most = self._most_graphs
        if len(self._codes) == most:  # for this solve: others may go on with what there is
            return Reason(
                f"the vector field was compiled {most} times and is different again: let numbers "
                "that change be tensors, such as buffers, and keep to few shapes of y0",
                final=True,
            )
        field_ = bare(part)
        guard = Guard()
        guard.learn(seen)
        try:
            graph = self._trace_field(field_)
        except Untraceable as error:
            return self._refuse(str(error))
        self._codes.add(graph.code)
        try:
            with followed(field_, guard) as seen:
                recorded = is_recorded(graph, field_, y0)
        except Exception as error:  # of f itself the solve will tell, where it gets there
            text = " ".join(str(error).split())[:200]
            return self._refuse(
                f"the vector field or its graph fails near y0 ({type(error).__name__}: {text})"
            )
        if not recorded:
            return self._refuse(
                "the vector field depends on the state in a way that torch does not record (numpy? "
                "Python control flow?)"
            )
        if not guard.holds(seen):
            return self._refuse("the vector field calls other operations in each evaluation")
        own = part.problem.parameters
        made = self._traces[key] = Trace(graph, guard, has_own_derivatives(seen), tuple(own))
        while len(self._traces) > _MOST_TRACES:  # parameters that are new in each solve
            del self._traces[next(iter(self._traces))]
        return made


def bare(part: VectorField) -> VectorField:
    """Return a part of a field by itself, as it is traced, without checks and counts."""
    form = "residual" if part.problem.form == "residual" else "rhs"
    problem = replace(
        part.problem, function=part.function, explicit=None, form=form, check_undeclared=False,
        ranks=ALONE,
    )  # fmt: skip
    made = vector_field(problem, Ledger())
    return made if made.has_rhs else StackedResidual(made)


def _is_differentiated(wanted: Wanted) -> bool:
    return wanted.keep or wanted.settings.method.implicit


def _still_holds(
    trace: Trace, part: VectorField, seen: Followed, y0: torch.Tensor, wanted: Wanted
) -> bool:
    """Whether f does what it did when it was traced."""
    if not trace.guard.holds(seen):
        return False
    if not (trace.own_derivatives and _is_differentiated(wanted)):
        return True
    try:
        return is_recorded(trace.graph, bare(part), y0)
    except Exception:  # traced anew, which will tell
        return False

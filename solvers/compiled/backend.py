"""What a backend is given to compile, and what it makes; see ``compiler.py``."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from pnode.base.graphs import no_graph
from pnode.base.options import SolverOptions
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem
from pnode.problems.windows import Window
from pnode.solvers.compiled.account import Entry
from pnode.solvers.compiled.budgets import Budget
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.guards import Guard
from pnode.solvers.compiled.inductor import CompilationFailed
from pnode.solvers.compiled.standing import Standing
from pnode.solvers.compiled.trace import FieldGraph, Untraceable
from pnode.solvers.compiled.unchanged import Unchanged
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Scheme
from pnode.solvers.step_control import StepControl

__all__ = [
    "GHOSTS", "Backend", "Checked", "Code", "Compilation", "Reason", "Trace", "Wanted",
]  # fmt: skip

#: Why there are no whole sweeps of states with ghost cells.
GHOSTS = (
    "of states with ghost cells whole sweeps are compiled of explicit methods, and of theta, DIRK, "
    "IMEX and BDF methods with jacobian='matrix-free' and no preconditioner, without mass=, where "
    "nobody looks at single steps"
)

# So often is taken down what a field reads, which may be others in each solve.
_LOOKS = 20


class Code(ABC):
    """Machine code of a field, or of steps of it.

    Attributes
    ----------
    traced : FieldGraph
        The field.
    """

    traced: FieldGraph

    @abstractmethod
    def at(self, t: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return f(t, y) by this code, flat, and what is saved of it; y is flat, t the user's."""

    def bound(self, graph: FieldGraph) -> Self:
        """Return it for a graph that differs in the tensors that it reads alone."""
        if graph is self.traced:
            return self
        made = copy(self)
        made.traced = graph
        return made


class Reason(NamedTuple):
    """Why a backend compiles nothing.

    ``final``: nor does any other; ``changed``: the field is another one than when it was compiled;
    ``lent``: so it is with the tensors that torch.func has lent it, which says nothing of others.
    """

    text: str
    final: bool = False
    changed: bool = False
    lent: bool = False


@dataclass(eq=False)
class Trace:
    """A trace of a field, what shows that it still is one, and what was compiled of it."""

    graph: FieldGraph
    guard: Guard
    #: Whether f has derivatives of its own, which its operations do not tell.
    own_derivatives: bool
    #: The parameters that it was made for.
    parameters: tuple[torch.Tensor, ...]
    codes: dict[Any, Any] = field(default_factory=dict)
    #: Which parameters f uses, once that has been looked at, and what :meth:`trainable` was then.
    used: list[bool] | None = None
    looked_at: list[bool] = field(default_factory=list)
    #: Whether it is :meth:`bound`, and shares its codes.
    lent: bool = False
    #: What tells that f is what it was without an evaluation, if that may be had.
    unchanged: Unchanged | None = field(default=None, init=False)
    #: What solves of an f that still is what it was have taken, and what they keep of it.
    chosen: Any = field(default_factory=weakref.WeakKeyDictionary, init=False)
    _standing: Standing | None = field(default=None, init=False)
    _looks: int = field(default=_LOOKS, init=False)

    def look(self, function: Any) -> None:
        """Take down what f reads, which is what it was, for the solves to come."""
        if self._looks and not (self.own_derivatives or self.guard.reads_numbers):
            self._looks -= 1
            self.unchanged = Unchanged.of(function, self.graph.captured)
            self._standing = None

    def standing(self, function: Any, device: torch.device) -> Standing:
        """Return what a solve keeps of an f that still is what it was."""
        if self._standing is None:
            tensors = (*self.graph.captured, *self.parameters)
            self._standing = Standing(function, tensors, device)
        return self._standing

    def still_is(self, function: Any) -> bool:
        """Whether f is known to be what it was without an evaluation."""
        return self.unchanged is not None and self.unchanged.holds(function)

    def trainable(self) -> list[bool]:
        """Return which of the tensors that f reads besides its parameters require grad."""
        own = set(map(id, self.parameters))
        return [x.requires_grad for x in self.graph.captured if id(x) not in own]

    def uses(self) -> list[bool] | None:
        """Return which parameters f uses, None where that is to be looked at again."""
        known = self.looked_at == self.trainable() and not self.own_derivatives
        return self.used if known else None

    def within(self, window: Window | None) -> Trace:
        """Return it for times within another window."""
        graph = self.graph.within(window)
        return self if graph is self.graph else replace(self, graph=graph)

    def bound(self, parameters: Sequence[torch.Tensor]) -> Trace | None:
        """Return it for a field with other parameters, None if those are not like its own."""
        kinds = [[(x.shape, x.dtype, x.device) for x in p] for p in (parameters, self.parameters)]
        if kinds[0] != kinds[1]:
            return None
        new = dict(zip(map(id, self.parameters), parameters, strict=True))
        captured = tuple(new.get(id(x), x) for x in self.graph.captured)
        graph = replace(self.graph, captured=captured)
        return replace(
            self, graph=graph, guard=self.guard.bound(new), parameters=tuple(parameters), lent=True
        )


class Checked(NamedTuple):
    """Code that gives what the field itself gives at the initial state.

    Attributes
    ----------
    code : Code
        The code.
    value : Tensor or None
        The slope as f gives it, in the integrator's time and the user's precision; None where f was
        not to be evaluated.
    found : sequence of Tensor
        What :meth:`Code.at` gave, if it was called.
    """

    code: Any
    value: torch.Tensor | None = None
    found: Sequence[torch.Tensor] = ()

    def evaluated(self, problem: InitialValueProblem, y0: torch.Tensor) -> Checked:
        """Return it with the values of the code where a solve begins."""
        time = torch.scalar_tensor(problem.direction * problem.times[0], dtype=REAL)
        with no_graph():
            found = self.code.at(time, y0.detach())
        value = found[0] if problem.direction > 0 else -found[0]
        return Checked(self.code, value, found)


@dataclass(frozen=True, eq=False)
class Wanted:
    """A solve, as far as it decides what can be compiled: one object for all that are the same.

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
    watched : tuple of str
        What looks at single steps: "events", "cuts" where they may cut steps in two, "monitor",
        "callbacks".
    lend : callable
        Lends an integrator of given settings, for a field and an initial state, whose TS has read
        the PETSc options.
    auto : bool
        Whether nobody asked for machine code: there are no warnings, and a field that has changed
        since it was compiled is not compiled again.
    budget : callable or None
        Returns what checkpoints of a problem may take; None: any number.
    parts : Wanted or None
        How parts of steps are taken, where events are looked for or outputs lie inside of steps.
    interpolant : Scheme or None
        An explicit method whose last stage is the next step's first, with weights of all slopes in
        outputs inside of steps, where these are made so.
    ghosts : bool
        Whether the state has ghost cells.
    needed : str
        What needs machine code, for an error without it; empty if there is another way.
    """

    settings: IntegratorSettings
    options: SolverOptions
    control: StepControl
    checkpointing: Checkpointing
    keep: bool
    dense: bool
    watched: tuple[str, ...]
    lend: Callable[[IntegratorSettings, VectorField, torch.Tensor], AbstractContextManager[Any]]
    auto: bool = False
    budget: Callable[[InitialValueProblem], Budget] | None = None
    parts: Wanted | None = None
    interpolant: Scheme | None = None
    ghosts: bool = False
    needed: str = ""

    @property
    def strange_controller(self) -> str | None:
        """Why machine code does not choose steps as is asked for."""
        settings, method = self.settings, self.settings.method
        rule = settings.controller
        if settings.norm != "rms":
            return f"norm={settings.norm!r} is not the root mean square"
        if isinstance(rule, str):
            known = rule in ("basic", "none")
            text = f"controller={rule!r} is PETSc's alone: use controller='basic' or a pnode.PID"
            return None if known else text
        return f"method={method.name!r} is not compiled with a PID" if method.coupled else None

    @cached_property
    def begins_afresh(self) -> bool:
        """Whether steps may begin without what the last one has left."""
        return self.keep and (self.checkpointing.may_repeat or self.checkpointing.reproducible)

    @cached_property
    def plain(self) -> bool:
        """Whether the driver shows single explicit steps to who looks, and keeps checkpoints."""
        chosen, shared = self.checkpointing, self.settings.parallel
        if (
            "callbacks" in self.watched
            or (shared and (self.watched or self.dense))
            or any(name.startswith("ts_monitor") for name in self.options.values)
        ):
            return False
        return not self.keep or (chosen.disk is None and chosen.device_memory is None)


@dataclass
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
    graphs : tuple of FieldGraph
        What it was made of: the field, and its explicit part.
    reasons : tuple of str
        Why there is none, or not more.
    changed, lent : bool
        Whether that is a field that is another one than when it was compiled, or is so for the
        tensors that torch.func has lent it.
    passing : bool
        Whether that is for this solve alone.
    entry : Entry or None
        In the account.
    """

    sweep: CompiledSweep | None = None
    start: Any = None
    codes: tuple[Any, ...] = ()
    captured: tuple[torch.Tensor, ...] = ()
    graphs: tuple[FieldGraph, ...] = ()
    reasons: tuple[str, ...] = ()
    changed: bool = False
    lent: bool = False
    passing: bool = False
    entry: Entry | None = None

    def note(self, gave_up: str = "") -> None:
        """Note that the sweep was taken, or why it gave up on steps that Python has taken."""
        if self.entry is not None:
            self.entry.note(gave_up)

    @property
    def what(self) -> str:
        """What it is, in words."""
        if self.sweep is not None:
            return "whole sweeps"
        if self.start is not None:
            return "steps"
        return "the vector field" if self.codes else ""


class Backend(ABC):
    """A way from a field's graphs to machine code.

    Attributes
    ----------
    implicit : bool or None
        Whether it is for implicit methods or for explicit ones; None: for all.
    final : bool
        Whether no other one is left where it fails.
    ghosts : bool or None
        Whether it is for states with ghost cells, and for no others; None: for all states.
    share : float
        About how much it saves of the time that torch's and PETSc's calls take on small problems.
    """

    implicit: bool | None = None
    final = False
    ghosts: bool | None = False
    share = 1.0

    def is_for(self, wanted: Wanted) -> bool:
        """Whether it is for methods and states of this kind."""
        of_method = self.implicit in (None, wanted.settings.method.implicit)
        return of_method and (wanted.ghosts or not self.ghosts)

    def why_not(self, wanted: Wanted) -> str | None:
        """Return why it makes nothing for a solve of a kind that it is for, whatever the field."""
        return GHOSTS if wanted.ghosts and self.ghosts is False else self.refuses(wanted)

    @abstractmethod
    def refuses(self, wanted: Wanted) -> str | None:
        """Return why it makes nothing for a solve, whatever the field."""

    def compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Code | Reason:
        """Return the code of a field or of one of its parts, made or kept in ``trace``."""
        try:
            code = self._compile(trace, part, y0, wanted)
            made = code.bound(trace.graph)
            if made is not code and not trace.lent:
                trace.codes.update({key: made for key, one in trace.codes.items() if one is code})
            return made
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

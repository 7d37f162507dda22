"""One forward sweep: what was asked of it, and what its backward sweeps need."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.base.errors import FieldChanged
from pnode.base.evidence import Reads
from pnode.base.ledger import Ledger, Stats
from pnode.base.surroundings import Surroundings
from pnode.field.held import held, now
from pnode.field.vectorfield import VectorField, record_all, vector_field
from pnode.layout.pair_layout import PairLayout
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.account import Entry
from pnode.solvers.compiled.fields import FieldCode, compiled_field
from pnode.solvers.compiled.standing import Standing
from pnode.solvers.compiled.trace import FieldGraph
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step
from pnode.sweeping.event_functions import Events
from pnode.sweeping.event_locator import Root

__all__ = ["Directions", "Recorded", "Requests", "Run", "Sweep", "Tangents", "with_functions"]

#: For each tangent, that of each parameter; None being zero.
Directions: TypeAlias = Sequence[Sequence[torch.Tensor | None]]


@dataclass(frozen=True)
class Tangents:
    """Tangents of a solve that was taken, to be solved for on its steps.

    Attributes
    ----------
    pair : PairLayout
        How that solve's state makes one with its tangents.
    run : Run
        That solve.
    directions : sequence of sequence of (Tensor or None)
        For each tangent, that of each parameter.
    moving : tuple of Tensor
        Those among them that something may be differentiated by, each once.
    mergeable : bool
        Whether a batch of such solves, for several tangents, may be one.
    """

    pair: PairLayout
    run: Run
    directions: Directions
    moving: tuple[torch.Tensor, ...]
    mergeable: bool


@dataclass(frozen=True)
class Recorded:
    """Steps to be taken instead of choosing some: those of a solve that was taken.

    Attributes
    ----------
    steps : sequence of Step
        The steps.
    outputs : tuple of int
        For each output that a step hits, how many steps come before it.
    settings : IntegratorSettings
        Of the integrator that is to take them.
    surroundings : Surroundings
        What f saw.
    tangents : Tangents or None
        What is solved with tangents, if they are.
    pieces : tuple of int or None
        Steps whose interpolants' coefficients are to be outputs, between the first and the last.
    """

    steps: Sequence[Step]
    outputs: tuple[int, ...]
    settings: IntegratorSettings
    surroundings: Surroundings
    tangents: Tangents | None = None
    pieces: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Requests:
    """What a forward sweep is to do besides integrating.

    Attributes
    ----------
    monitor : callable or None
        ``monitor(step, t, y)`` after every accepted step.
    dense : bool
        Whether steps pass over output times, which are interpolated then.
    events : Events or None
        What is to be looked for.
    event_tol : float
        Tolerance of that root, relative to the length of the step.
    recorded : Recorded or None
        Steps to be taken.
    plain : bool
        Whether nothing is to be compiled but whole sweeps, which have tangents.
    continuous : bool
        Whether gradients are those of the continuous adjoint.
    known : Tensor or None
        Its outputs, if these are known: a sweep is only taken for its adjoint, once that is wanted.
    sensitivity_control : str, Tensor or None
        Tangents that steps are chosen by, too; see ``pnode.Steps``.
    independent : str or None
        Of independent samples: what becomes of one that fails; None of one state.
    samples : Samples or None
        Of these: what is to be known of them.
    callbacks : callable or None
        ``callbacks((name, dt), t, y)`` where a step begins, before it is tried and when it is
        accepted or rejected; the names are torchdiffeq's.
    progress : bool
        Whether backward sweeps show how far they are.
    steps_before : int or None
        Of a part of a solve: how many steps the parts before have taken; None of a whole one.
    memory : int or None
        Of such a part: bytes that its checkpoints may take, if that is less than all may.
    sides : ndarray or None
        Of such a part: on which sides of its events the part before has ended.
    steps : bool
        Whether the steps are to be known afterwards, without gradients too.
    """

    monitor: Callable[[int, float, Any], None] | None = None
    dense: bool = False
    events: Events | None = None
    event_tol: float = 1e-12
    recorded: Recorded | None = None
    plain: bool = False
    continuous: bool = False
    known: torch.Tensor | None = None
    sensitivity_control: str | torch.Tensor | None = None
    independent: str | None = None
    samples: Any = None
    callbacks: Callable[[Any, float, Any], None] | None = None
    progress: bool = False
    steps_before: int | None = None
    memory: int | None = None
    sides: Any = None
    steps: bool = False
    #: How many steps the monitor was shown, before they were to be taken once more.
    shown: int = 0

    @property
    def watched(self) -> tuple[str, ...]:
        """What looks at single steps, see ``Wanted``."""
        looks = (
            ("events", self.events is not None),
            ("cuts", self.events is not None and self.events.cut),
            ("monitor", self.monitor is not None), ("callbacks", self.callbacks is not None),
        )  # fmt: skip
        return tuple(name for name, looks_on in looks if looks_on)


class Sweep(ABC):
    """A forward sweep that was taken, and its discrete adjoint."""

    #: Steps whose interpolants' coefficients are outputs.
    pieces: tuple[int, ...] | None = None
    #: Outputs inside of steps, a ``DenseOutput``; the steps if they were to be known, ``Noted``.
    dense: Any = None
    noted_steps: Any = None
    #: Whether tangents are had from what was kept, beside the outputs.
    at_hand = False

    @property
    @abstractmethod
    def interpolated(self) -> Set[int]:
        """Indices of the outputs that are interpolated."""

    def let_checkpoints_go(self) -> None:  # noqa: B027  # there may be none
        """Free the checkpoints, if there are any: a backward sweep repeats the steps first."""

    def takes_batches(self, run: Run) -> bool:
        """Whether :meth:`reverse` takes cotangents of shape ``(T, k, size)``: k sweeps in one."""
        return False

    @abstractmethod
    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and for each output that one hits how many come before it."""

    @abstractmethod
    def noted(self, output: int) -> Sequence[float]:
        """Return what was noted of f in the step that begins at an output, if one does."""

    @abstractmethod
    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint. Collective.

        Parameters
        ----------
        run : Run
            The solve, which it does not refer to: checkpoints go when the last reference goes.
        y0 : Tensor
            The initial state, flat, to repeat the sweep from when its checkpoints are gone.
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``.
        wants_times : bool
            Whether the derivatives with respect to interpolated outputs' times are wanted.
        """


@dataclass
class Run:
    """One forward sweep: what its backward sweeps need.

    Attributes
    ----------
    problem : InitialValueProblem
        The problem solved.
    stats : Stats
        Its ledger.
    settings : IntegratorSettings
        Of the integrator that did it.
    used : list of bool
        For each parameter, whether the vector field's first evaluation used it.
    sweep : Sweep or None
        The sweep, once it is taken.
    roots : sequence of Root
        Events found, whose states come behind the outputs; ``problem`` has the times of both.
    sides : ndarray or None
        On which sides of its events it has ended: what :attr:`Requests.sides` takes.
    last : Root or None
        That among them which ended the sweep early.
    codes : tuple of FieldCode
        Of the field and its explicit part, where these are compiled and nothing else.
    surroundings : Surroundings or None
        What f saw besides its arguments; None without gradients.
    reads : Reads or None
        What the compiled graphs of this sweep read, if there are any.
    look : callable or None
        Told of each stage in backward sweeps; see ``VectorField``.
    entry : Entry or None
        Where its evaluations are counted, if they may pay for a compilation.
    ys : Tensor or None
        Its outputs, shape ``(T, size)``, without their graph, as long as ``sweep.at_hand``.
    standing : Standing or None
        What is kept of f, if f is known to be unchanged.
    graphs : tuple of FieldGraph
        What was compiled, of f and of its explicit part.
    end : float or None
        Of compiled steps of independent samples, what tells their last states.
    lock : RLock
        Held by a backward sweep: those of several threads would share checkpoints and cotangents.
    """

    problem: InitialValueProblem
    stats: Stats
    settings: IntegratorSettings
    used: list[bool] = field(default_factory=list)
    sweep: Sweep | None = None
    roots: Sequence[Root] = ()
    last: Root | None = None
    sides: Any = None
    codes: tuple[FieldCode, ...] = ()
    surroundings: Surroundings | None = None
    reads: Reads | None = None
    look: Callable[..., None] | None = None
    entry: Entry | None = None
    ys: torch.Tensor | None = None
    standing: Standing | None = None
    graphs: tuple[FieldGraph, ...] = ()
    end: float | None = None
    lock: Any = field(default_factory=threading.RLock, init=False, repr=False, compare=False)

    def count(self, ledger: Ledger, before: int = 0) -> None:
        """Count what a sweep has done beyond ``before``, if that may pay for a compilation."""
        entry = self.entry
        if entry is None:
            return
        if self.problem.ranks.parallel:  # as on all ranks, whose own counts differ after failures
            attempts = self.stats.steps + self.stats.rejected
            entry.calls += attempts * self.settings.method.stages
        else:
            entry.add(ledger, before)

    def let_go(self) -> None:
        """Keep f for backward sweeps, but not what owns it: see :mod:`pnode.field.held`."""
        if self.standing is not None:
            self.problem = self.problem.but(function=self.standing.held)
            return
        declared = (*self.problem.parameters, *self.problem.frozen)
        self.problem = with_functions(self.problem, partial(held, declared=declared))

    def refuse_written(self) -> None:
        """Raise :class:`FieldChanged` if what machine code reads was written into.

        Not collective.
        """
        changed = None if self.reads is None else self.reads.changed()
        if changed is not None:
            assert self.surroundings is not None
            raise FieldChanged(
                f"a tensor of shape {tuple(changed.shape)} that the vector field uses was written "
                f"into after the forward sweep{self.surroundings.differences()}: take the gradient "
                "before it changes, or let the solve use a copy",
                method=self.settings.method.name,
            )

    def field(self, ledger: Ledger) -> VectorField:
        """Return the field for another sweep, without checks of what it uses."""
        problem = with_functions(self.problem, now).but(check_undeclared=False)
        field_ = (
            compiled_field(problem, ledger, self.codes)
            if self.codes
            else vector_field(problem, ledger)
        )
        record_all(field_)
        field_.look = self.look
        if self.surroundings is not None:
            for part in (field_, field_.explicit):
                if part is not None:
                    part.suspects = self.surroundings.differences
        return field_


def with_functions(
    problem: InitialValueProblem, change: Callable[[Any], Any]
) -> InitialValueProblem:
    """Return a problem, and that which it is made of, with the user's functions changed."""
    base = None if problem.base is None else with_functions(problem.base, change)
    return problem.but(
        function=change(problem.function), explicit=change(problem.explicit), base=base
    )

"""Checkpoint schedules: which steps to store, restore and repeat. Pure: no PETSc, no torch.

A schedule says what to store during the forward sweep, and then yields the actions that take the
adjoint from step m - 1 to step 0. Who executes the actions is the trajectory's business.

Two things are *live*, that is in the integrator's hands and not in a checkpoint:

- the live state: a solution at the start of some step;
- the live stages: what the adjoint of some step needs.

A solution checkpoint holds a state, a stage checkpoint holds stages; that of a stiffly accurate
method holds the step's end solution among them, and the forward sweep can start again from there.
Solutions and stages of the same step are separate checkpoints. Some schedules take the initial
state to be free: it can always be restored, and is never stored or discarded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = [
    "DISK",
    "RAM",
    "Action",
    "Adjoint",
    "Advance",
    "DiscardSolution",
    "DiscardStages",
    "KeepEnd",
    "RestoreEnd",
    "RestoreSolution",
    "RestoreStages",
    "Schedule",
    "StoreEverything",
    "StoreSolution",
    "StoreStages",
]

#: Storage levels.
RAM, DISK = 0, 1


@dataclass(frozen=True, slots=True)
class Action:
    """Something to do with step ``step``, or with the solution at its start."""

    step: int


@dataclass(frozen=True, slots=True)
class Advance(Action):
    """Repeat forward step ``step`` from the live state, which is at its start.

    Afterwards the live state is the start of ``step + 1``, the live stages those of ``step``.
    """


@dataclass(frozen=True, slots=True)
class Adjoint(Action):
    """Take the adjoint of ``step``, whose stages are live. Afterwards nothing is live."""


@dataclass(frozen=True, slots=True)
class StoreSolution(Action):
    """Store the live state, the start of ``step``. It stays live."""

    level: int = RAM


@dataclass(frozen=True, slots=True)
class RestoreSolution(Action):
    """Make the stored start of ``step`` the live state. It stays stored; no stages are live."""


@dataclass(frozen=True, slots=True)
class DiscardSolution(Action):
    """Free the stored start of ``step``. What is live stays live."""


@dataclass(frozen=True, slots=True)
class StoreStages(Action):
    """Store the live stages, those of ``step``. They and the live state stay live."""

    level: int = RAM


@dataclass(frozen=True, slots=True)
class RestoreStages(Action):
    """Make the stored stages of ``step`` live. They stay stored; no state is live."""


@dataclass(frozen=True, slots=True)
class RestoreEnd(Action):
    """Make the end solution in the stored stages of ``step`` the live state; no stages are live.

    Only for stiffly accurate methods. The live state is then the start of ``step + 1``.
    """


@dataclass(frozen=True, slots=True)
class KeepEnd(Action):
    """Replace the stored stages of ``step`` by the stored start of ``step + 1``, their end.

    Only for stiffly accurate methods. What is live stays live.
    """


@dataclass(frozen=True, slots=True)
class DiscardStages(Action):
    """Free the stored stages of ``step``. What is live stays live."""


class Schedule(ABC):
    """A checkpoint schedule of one trajectory.

    ``before_step(0)`` begins a forward sweep, which may be repeated. After the last step call
    :meth:`reverse`. The actions of a call are to be executed before the next call.
    """

    def before_step(self, step: int) -> Iterable[Action]:
        """Actions before forward step ``step`` is first tried.

        The start of ``step`` is the live state; the stages of ``step - 1``, if any, are live.
        """
        return ()

    def after_step(self, step: int) -> Iterable[Action]:
        """Actions once forward step ``step`` is accepted.

        The start of ``step + 1`` is the live state, the stages of ``step`` are live.
        """
        return ()

    #: Whether :meth:`reverse` begins with the last step's stages live.
    begins_live = True

    @abstractmethod
    def reverse(self, steps: int) -> Iterator[Action]:
        """Yield the actions that take the adjoint over steps ``steps - 1`` to 0, lazily.

        At the start the end of the sweep is live: the last step's end and its stages. At the end
        nothing is stored.

        Raises
        ------
        ConfigurationError
            If ``steps`` is not the number that the schedule was made for.
        """


class StoreEverything(Schedule):
    """Store the stages of every step; repeat none."""

    begins_live = False

    def after_step(self, step: int) -> Iterator[Action]:
        """Store this step."""
        yield StoreStages(step)

    def reverse(self, steps: int) -> Iterator[Action]:
        """Restore, take the adjoint of and discard each step, last first."""
        for step in range(steps - 1, -1, -1):
            yield RestoreStages(step)
            yield Adjoint(step)
            yield DiscardStages(step)

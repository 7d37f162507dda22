"""Checkpoint schedules: which steps to store, restore and repeat. Pure: no PETSc, no torch.

A schedule answers two questions. During the forward sweep: what to store after step n. During the
backward sweep: the sequence of actions that takes the adjoint from step m - 1 to step 0. Who
executes the actions is the trajectory's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "Action",
    "Adjoint",
    "Advance",
    "Discard",
    "Restore",
    "Schedule",
    "StoreEverything",
    "StoreStages",
]


@dataclass(frozen=True)
class Action:
    """Something to do with step ``step`` (or, for solutions, at its start)."""

    step: int


@dataclass(frozen=True)
class StoreStages(Action):
    """Keep what the adjoint of this step needs."""


@dataclass(frozen=True)
class Advance(Action):
    """Repeat the forward step."""


@dataclass(frozen=True)
class Restore(Action):
    """Put what the adjoint of this step needs back in place."""


@dataclass(frozen=True)
class Adjoint(Action):
    """Take the adjoint of this step."""


@dataclass(frozen=True)
class Discard(Action):
    """Free what was kept of this step."""


class Schedule(ABC):
    """A checkpoint schedule."""

    @abstractmethod
    def after_step(self, step: int) -> Iterator[Action]:
        """Actions once forward step ``step`` is done."""

    @abstractmethod
    def reverse(self, steps: int) -> Iterator[Action]:
        """Actions that take the adjoint over steps ``steps - 1`` to 0."""


class StoreEverything(Schedule):
    """Keep the stages of every step; repeat none."""

    def after_step(self, step: int) -> Iterator[Action]:
        """Store this step."""
        yield StoreStages(step)

    def reverse(self, steps: int) -> Iterator[Action]:
        """Restore, take the adjoint of and discard each step, last first."""
        for step in range(steps - 1, -1, -1):
            yield Restore(step)
            yield Adjoint(step)
            yield Discard(step)

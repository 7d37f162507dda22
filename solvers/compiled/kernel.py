"""The Python side of ``kernel.h``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.records import Course, new_course
from pnode.solvers.compiled.trace import FieldGraph
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Rows
from pnode.solvers.step_control import StepControl

__all__ = ["Kernel"]


class Kernel(ABC):
    """Steps in machine code, of one field and kind of state; see ``kernel.h``.

    Attributes
    ----------
    size : int
        Entries of the state.
    dtype : torch.dtype
        The user's precision.
    traced : FieldGraph
        The field, where there is one; :attr:`captured` is what it reads.
    collective : bool
        Whether ranks that share the state take each step together.
    interpolation : tuple of tuple of float or None
        How outputs inside of steps depend on their slopes; None if the driver is not told these.
    """

    collective = False
    interpolation: Rows | None = None
    _course: tuple[Any, ...] = (None, None, None)

    size: int
    dtype: torch.dtype
    traced: FieldGraph

    @property
    def captured(self) -> Sequence[torch.Tensor]:
        """What f reads besides t and y."""
        return self.traced.captured

    def inputs(self) -> list[torch.Tensor]:
        """Return it as the code takes it."""
        return self.traced.inputs()

    def course(
        self, settings: IntegratorSettings, control: StepControl, more: tuple[Any, ...]
    ) -> Course:
        """Return how a sweep is to go, see :func:`new_course`; the last one is kept."""
        last = self._course
        if last[0] is not settings or last[1] is not control or last[2] != more:
            last = settings, control, more, new_course(settings, control, *more)
            self._course = last
        made: Course = last[3]
        return made

    def begins(self, problem: InitialValueProblem) -> bool:
        """Whether it chooses the first step of an adaptive sweep."""
        return False

    @abstractmethod
    def sums(self) -> list[torch.Tensor]:
        """Return zeros for mu."""

    def takes_tangents(self, number: int, of_parameters: bool, steps: int) -> bool:
        """Whether there is code for so many tangents, ``of_parameters`` too, of so many steps."""
        return False

    def directions(self, moving: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Return tangents of the parameters, all one after the other, shape ``(m, entries)``."""
        known, number = dict(moving), len(moving[0][1])
        columns = [torch.zeros(number, 0, dtype=REAL)]
        for part in self.traced.parameters:
            shape = (number, *part.shape)
            rows = known[part.index] if part.index in known else torch.zeros(shape, dtype=REAL)
            columns.append(rows.reshape(number, -1).to(REAL))
        return torch.cat(columns, 1)

    @abstractmethod
    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums: the index of each parameter that f uses, and its gradient."""

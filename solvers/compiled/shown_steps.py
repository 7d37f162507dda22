"""The steps of a compiled sweep as observers see them: before each is accepted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.options import PETSc
from pnode.base.vectors import REAL
from pnode.solvers.compiled.records import pointers
from pnode.solvers.petsc.integrator import StepOutcome, TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Observer, Step

__all__ = ["GivenUp", "Part", "ShownSteps"]


class GivenUp(Exception):
    """A part of a step failed: the error is to be had from taking the steps one by one."""


class Part(TimeIntegrator):
    """What takes parts of a step that is shown, and where it stands: an integrator to observers.

    Parameters
    ----------
    settings : IntegratorSettings
        Of the sweep.
    state : Tensor
        Flat initial state.
    """

    interpolates = False
    _shown: Any = None

    def __init__(self, settings: IntegratorSettings, state: torch.Tensor) -> None:
        self.settings = settings
        memory = state.detach().to(REAL, copy=True).numpy()
        self.state = torch.from_numpy(memory)
        self.solution = PETSc.Vec().createWithArray(memory, comm=PETSc.COMM_SELF)

    @property
    def history(self) -> Any:
        """Nothing: the sweep itself goes on from the step that it accepts."""
        return None

    def restore(self, history: Any) -> None:
        """Stand where the sweep does, which it always does."""

    def restart_step(self) -> None:
        """Begin a step without what the last one has left: the sweep knows that it is to."""

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Take a part of the step that is shown, from its start.

        Raises
        ------
        GivenUp
            If that fails.
        """
        self._shown.take_part(step, self)
        return StepOutcome(True, step)


class ShownSteps(Part):
    """A sweep that shows each step to observers before it accepts it.

    Parameters
    ----------
    settings : IntegratorSettings
        Of the sweep.
    state : Tensor
        Flat initial state.

    Attributes
    ----------
    observers : list of Observer
        Those who look.
    number : int
        How many steps were shown.
    stopped : float or None
        Where an observer has let the sweep end.
    """

    def __init__(self, settings: IntegratorSettings, state: torch.Tensor) -> None:
        super().__init__(settings, state)
        self.observers: list[Observer] = []
        self.number = 0
        self.stopped: float | None = None

    def lent(self, library: Any, handle: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Show the steps of a sweep of the driver, which reads these tensors."""
        self._library, self._handle, self._inputs = library, handle, inputs
        self._read = pointers(inputs)

    def lend(self) -> Part:
        """Return what takes parts of steps."""
        part = Part(self.settings, self.state)
        part._shown = self
        return part

    def take_part(self, length: float, part: Part) -> None:
        """Take the step that is shown up to there."""
        place = ctypes.c_void_p(part.state.data_ptr())
        if self._library.pnode_part(self._handle, self._read, length, place):
            raise GivenUp
        part.solution.stateIncrease()

    def show(self) -> None:
        """Let the observers look at a step; the sweep accepts it, or the part that they choose."""
        times = (ctypes.c_double * 3)()
        self._library.pnode_shown(self._handle, times, ctypes.c_void_p(self.state.data_ptr()))
        self.solution.stateIncrease()
        start, end, order = times
        step = Step(self.number, start, end - start, end, int(order))
        taker: TimeIntegrator
        ends = False
        for observer in self.observers:
            shortened = observer.shorten(step, self)
            if shortened is not None:
                step, taker, ends = shortened
                if taker is not self or step.end != end:
                    self._library.pnode_cut(self._handle, step.end)
        if ends:
            self._library.pnode_stop(self._handle)
            self.stopped = step.end
        for observer in self.observers:
            observer.after_step(step, self, ends)
        self.number += 1

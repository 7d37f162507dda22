"""The steps of a compiled sweep as observers see them: before each is accepted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pnode.base.options import PETSc
from pnode.base.vectors import REAL
from pnode.solvers.compiled.driver_library import at
from pnode.solvers.compiled.records import pointers
from pnode.solvers.petsc.integrator import StepOutcome, TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Observer, Step

__all__ = ["GivenUp", "Part", "Seeker", "ShownSteps", "Sieve"]


class GivenUp(Exception):
    """What only steps taken one by one can tell: the error of a part of a step that failed."""


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


class Seeker(Protocol):
    """Looks for events in the steps that may hold one."""

    @property
    def sides(self) -> Any:
        """On which side of zero each number is, 0 for none yet; None before the first step."""
        ...

    def pass_over(self, s: float, step: int, state: torch.Tensor) -> None:
        """Go on at the start of a step, from a state behind steps that were not shown.

        Raises
        ------
        GivenUp
            If an event was among these.
        """
        ...


class Sieve(ctypes.Structure):
    """Tells the driver which steps to show, see ``suspects.h``.

    Parameters
    ----------
    program : EventProgram
        What is looked for.
    seeker : Seeker
        Who looks for it.
    thetas : sequence of float
        Where, from the start of a step to its end.
    weights : Tensor
        Of the interpolant there, shape ``(len(thetas), 4)``.
    """

    _fields_ = [
        ("values", ctypes.c_void_p), ("read", ctypes.c_void_p), ("entries", ctypes.c_int64),
        ("samples", ctypes.c_int64), ("thetas", ctypes.c_void_p), ("weights", ctypes.c_void_p),
        ("sides", ctypes.c_void_p),
    ]  # fmt: skip

    def __init__(
        self, program: Any, seeker: Seeker, thetas: Sequence[float], weights: torch.Tensor
    ) -> None:
        self.seeker = seeker
        # On which side of zero each number is, 0 where that is not known.
        self._sides_now = torch.zeros(program.entries, dtype=REAL)
        read, places = program.inputs(), torch.tensor(thetas, dtype=REAL)
        given = pointers(read)
        self._alive = program, read, given, places, weights
        super().__init__(
            ctypes.cast(program.function, ctypes.c_void_p), ctypes.cast(given, ctypes.c_void_p),
            program.entries, len(thetas), places.data_ptr(), weights.data_ptr(),
            self._sides_now.data_ptr(),
        )  # fmt: skip

    def update(self) -> None:
        """Tell the driver what was found in a step."""
        sides = self.seeker.sides
        if sides is not None:
            self._sides_now.copy_(torch.from_numpy(sides))


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
        How many steps there were up to the last that was shown.
    stopped : float or None
        Where an observer has let the sweep end.
    """

    def __init__(self, settings: IntegratorSettings, state: torch.Tensor) -> None:
        super().__init__(settings, state)
        self.observers: list[Observer] = []
        self.number = 0
        self.stopped: float | None = None
        #: Which steps are shown; None: all of them.
        self.sieve: Sieve | None = None

    def lent(self, library: Any, handle: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Show the steps of a sweep of the driver, which reads these tensors."""
        self._library, self._handle, self._inputs = library, handle, inputs
        self._read = pointers(inputs)
        if self.sieve is not None and library.pnode_sift(handle, ctypes.byref(self.sieve)):
            self.sieve = None

    def lend(self) -> Part:
        """Return what takes parts of steps."""
        part = Part(self.settings, self.state)
        part._shown = self
        return part

    def take_part(self, length: float, part: Part) -> None:
        """Take the step that is shown up to there."""
        if self._library.pnode_part(self._handle, self._read, length, at(part.state)):
            raise GivenUp
        part.solution.stateIncrease()

    def show(self) -> None:
        """Let the observers look at a step; the sweep accepts it, or the part that they choose."""
        times, begun = (ctypes.c_double * 4)(), torch.empty_like(self.state)
        self._library.pnode_shown(self._handle, times, at(begun), at(self.state))
        self.solution.stateIncrease()
        start, end, order, index = times
        step = Step(int(index), start, end - start, end, int(order))
        if self.sieve is not None and step.index > self.number:
            self.sieve.seeker.pass_over(step.start, step.index, begun)
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
        self.number = step.index + 1
        if self.sieve is not None:
            self.sieve.update()

    def check_end(self, s: float, steps: int, state: torch.Tensor) -> None:
        """Look at the end of a sweep, a state behind steps that were not shown; see Seeker."""
        if self.sieve is not None and self.stopped is None and self.number < steps:
            self.sieve.seeker.pass_over(s, steps, state)

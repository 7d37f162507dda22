"""The trajectory of one forward sweep: its steps, and the checkpoints a schedule asked for.

A trajectory belongs to one autograd node. Any number of them may be alive at once.
"""

from __future__ import annotations

import torch

from pnode.adjoint.schedule import (
    Action,
    DiscardSolution,
    DiscardStages,
    KeepEnd,
    RestoreStages,
    Schedule,
    StoreSolution,
    StoreStages,
)
from pnode.adjoint.store import CheckpointStore
from pnode.errors import CheckpointError, VectorFieldError
from pnode.solvers.integrator import TimeIntegrator
from pnode.solvers.stepping import Step

__all__ = ["Checkpoint", "Trajectory"]

#: What the adjoint of one step needs; see ``TimeIntegrator.checkpoint``.
Checkpoint = tuple[torch.Tensor, ...]

_STAGES, _SOLUTION = "stages", "solution"


class Trajectory:
    """Steps and checkpoints of one forward sweep.

    Parameters
    ----------
    schedule : Schedule
        What to store.
    store : CheckpointStore
        Where.

    Attributes
    ----------
    steps : list of Step
        Every accepted step.
    outputs : list of int
        For each output time, how many steps come before it.
    ready : bool
        Whether a backward sweep can begin.
    """

    def __init__(self, schedule: Schedule, store: CheckpointStore) -> None:
        self.schedule = schedule
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.ready = False
        self._store = store
        self._live: tuple[int, Checkpoint] | None = None
        self._held: Checkpoint | None = None

    def before_step(self, index: int, integrator: TimeIntegrator) -> None:
        """Store what the schedule wants before a step, whose start the integrator stands at."""
        for action in self.schedule.before_step(index):
            self.execute(action, integrator)

    def record(self, step: Step, integrator: TimeIntegrator) -> None:
        """Note an accepted step and store what the schedule wants of it."""
        if step.index == len(self.steps):
            self.steps.append(step)
        for action in self.schedule.after_step(step.index):
            self.execute(action, integrator)

    def finish(self, integrator: TimeIntegrator) -> None:
        """End the forward sweep: the last step's stages stay at hand if they are not stored."""
        if self.schedule.begins_live and self.steps:
            self.stages(len(self.steps) - 1, integrator)
        self.ready = True

    def mark_output(self) -> None:
        """Note that an output time was reached after the steps so far."""
        self.outputs.append(len(self.steps))

    def execute(self, action: Action, integrator: TimeIntegrator | None) -> None:
        """Store, restore or discard something; the integrator is for what is stored."""
        step, store = action.step, self._store
        match action:
            case StoreStages():
                checkpoint = self._find_live(step, integrator)
                self._live = None
                store.put((_STAGES, step), checkpoint, action.level)
            case StoreSolution():
                assert integrator is not None
                store.put((_SOLUTION, step), integrator.history, action.level)
            case DiscardStages():
                store.discard((_STAGES, step))
            case DiscardSolution():
                store.discard((_SOLUTION, step))
            case KeepEnd():
                end = store.get((_STAGES, step))[-1]
                store.discard((_STAGES, step))
                store.put((_SOLUTION, step + 1), (end,))
            case RestoreStages():
                self._live = (step, self._checked(step, store.get((_STAGES, step))))
            case _:
                raise AssertionError(f"{action} is not for the trajectory")

    def stages(self, index: int, integrator: TimeIntegrator | None) -> Checkpoint:
        """Return the stages of a step that are live: restored, or in the integrator's hands.

        They count as memory until :meth:`forget_live`.
        """
        live = self._find_live(index, integrator)
        if self._held is not live:
            if self._held is not None:
                self._store.release(self._held)
            self._store.hold(live)
            self._held = live
        return live

    def _find_live(self, index: int, integrator: TimeIntegrator | None) -> Checkpoint:
        if self._live is None or self._live[0] != index:
            if integrator is None:
                raise CheckpointError("there is no checkpoint of this step", step=index)
            self._keep_live(index, integrator)
        assert self._live is not None
        return self._live[1]

    def forget_live(self) -> None:
        """Let go of the live stages, after the adjoint of their step."""
        if self._held is not None:
            self._store.release(self._held)
        self._live = self._held = None

    def solution(self, index: int) -> torch.Tensor:
        """Return the stored state at the start of a step."""
        return self._store.get((_SOLUTION, index))[0]

    def end(self, index: int) -> torch.Tensor:
        """Return the end of a step from its stored stages."""
        return self._store.get((_STAGES, index))[-1]

    def clear(self) -> None:
        """Free all checkpoints, and the disk."""
        self._live = self._held = None
        self.ready = False
        self._store.close()

    def _keep_live(self, index: int, integrator: TimeIntegrator) -> None:
        previous = self._store.peek((_STAGES, index - 1))
        self._live = (index, self._checked(index, integrator.checkpoint(previous)))

    def _checked(self, index: int, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint unless the vector field has written into a state of this step.

        A checkpoint of an explicit method holds the very tensors that it was given.

        Raises
        ------
        VectorFieldError
            If it has.
        """
        if any(tensor._version for tensor in checkpoint):
            raise VectorFieldError(
                "the vector field kept a state y and wrote into it later; keep y.clone() instead",
                step=index,
            )
        return checkpoint

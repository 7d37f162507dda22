"""The trajectory of one forward sweep: its steps, and the checkpoints a schedule asked for.

A trajectory belongs to one autograd node. Any number of them may be alive at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pnode.adjoint.resume import Progress
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
from pnode.adjoint.steps import Steps
from pnode.adjoint.store import CheckpointStore
from pnode.errors import CheckpointError, VectorFieldError
from pnode.evidence import Evidence
from pnode.solvers.petsc.integrator import TimeIntegrator
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
    progress : Progress or None
        What the sweep is to be taken up from again.
    tapes : bool
        Whether to keep the graphs of steps where there is room.
    total : int or None
        Number of steps, if it is known: graphs of those that could not keep theirs to the end are
        not made.

    Attributes
    ----------
    steps : Steps or list of Step
        Every accepted step.
    outputs : list of int
        For each output time, how many steps come before it.
    ready : bool
        Whether a backward sweep can begin.
    progress : Progress or None
        As given.
    tapes : bool
        As given.
    evidence : Evidence
        What tells the f of these steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        store: CheckpointStore,
        progress: Progress | None = None,
        tapes: bool = False,
        total: int | None = None,
    ) -> None:
        self.tapes = tapes
        self._total = total
        self._first_tape = 0
        self.schedule = schedule
        self.progress = progress
        self._start: torch.Tensor | None = None
        self.steps: Steps | list[Step] = Steps() if store.limited else []
        self.outputs: list[int] = []
        self.ready = False
        self._store = store
        self.evidence = Evidence()
        self._live: tuple[int, Checkpoint] | None = None
        self._held: Checkpoint | None = None

    def before_step(self, index: int, integrator: TimeIntegrator) -> None:
        """Store what the schedule wants before a step, whose start the integrator stands at."""
        if self.progress is not None:
            (self._start,) = integrator.history
        for action in self.schedule.before_step(index):
            self.execute(action, integrator)

    def record(self, step: Step, integrator: TimeIntegrator) -> None:
        """Note an accepted step and store what the schedule wants of it."""
        if step.index == len(self.steps):
            self.steps.append(step)
            self.evidence.append(integrator.evidence())
            if self.progress is not None:
                self.progress.add_step(step)
        for action in self.schedule.after_step(step.index):
            self.execute(action, integrator)
        if self.tapes:
            self._keep_tape(step.index, integrator)

    def _keep_tape(self, index: int, integrator: TimeIntegrator) -> None:
        """Keep the graphs of the step just taken, and say whether the next one makes any."""
        kept = integrator.kept_graphs()
        if kept is not None:
            fits = self._store.keep_tape(index, *kept)
            if not fits:  # nor will the next: checkpoints only become more
                self.tapes = False
                integrator.make_graphs(False)
                return
            if index == 0 and self._total is not None:
                # The first stage may be the last of the step before.
                self._first_tape = self._total - self._store.most_tapes(kept[1]) - 1
        integrator.make_graphs(index + 1 >= self._first_tape)

    def tape(self, index: int) -> Any:
        """Return the graphs of a step's stages, None if they are not kept."""
        return self._store.graphs.get(index)

    def finish(self, integrator: TimeIntegrator) -> None:
        """End the forward sweep: the last step's stages stay at hand if they are not stored."""
        if self.schedule.begins_live and self.steps:
            self.stages(len(self.steps) - 1, integrator)
        self.ready = True

    def mark_output(self, state: torch.Tensor) -> None:
        """Note that an output time was reached after the steps so far, with this state."""
        if self.progress is not None:
            self.progress.add_output(len(self.outputs), len(self.steps), state)
        self.outputs.append(len(self.steps))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Be in the forward sweep: after a failure only what is to be taken up again stays."""
        try:
            if self.progress is not None:
                self.steps = Steps(self.progress.steps)  # there is a limit
                for _ in self.steps:
                    self.evidence.append(())
                self.outputs = [steps for steps, _ in self.progress.outputs]
                self.progress.adopt(self._store)
            yield
        except BaseException:
            if self.progress is None:
                self.clear()
            else:
                self._store.leave()
                self.progress.leave()
            raise

    def execute(self, action: Action, integrator: TimeIntegrator | None) -> None:
        """Store, restore or discard something; the integrator is for what is stored."""
        step, store = action.step, self._store
        match action:
            case StoreStages():
                checkpoint = self._find_live(step, integrator)
                self._live = None
                if self.progress is not None:
                    assert self._start is not None
                    checkpoint = (*checkpoint, self._start)
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
                self._live = (step, self._checked(step, self._own(store.get((_STAGES, step)))))
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

    def keep(self, index: int, integrator: TimeIntegrator) -> None:
        """Have the stages of a step at hand in case they are stored later."""
        self._find_live(index, integrator)

    def _find_live(self, index: int, integrator: TimeIntegrator | None) -> Checkpoint:
        if self._live is None or self._live[0] != index:
            if integrator is None:
                raise CheckpointError("there is no checkpoint of this step", step=index)
            self._keep_live(index, integrator)
        assert self._live is not None
        return self._live[1]

    def forget_live(self, index: int) -> None:
        """Let go of what is live of a step, after its adjoint."""
        self._store.graphs.drop(index)
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
        previous = None if previous is None else self._own(previous)
        self._live = (index, self._checked(index, integrator.checkpoint(previous)))

    def _own(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint without the start of its step, if that is with it."""
        return checkpoint if self.progress is None else checkpoint[:-1]

    def _checked(self, index: int, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint unless the vector field has written into a state of this step.

        A checkpoint of an explicit method holds the very tensors that it was given.

        Raises
        ------
        VectorFieldError
            If it has.
        """
        if any([tensor._version for tensor in checkpoint]):
            raise VectorFieldError(
                "the vector field kept a state y and wrote into it later; keep y.clone() instead",
                step=index,
            )
        return checkpoint

"""The trajectory of one forward sweep: its steps, and the checkpoints a schedule asked for.

A trajectory belongs to one autograd node. Any number of them may be alive at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    StoreEverything,
    StoreSolution,
    StoreStages,
)
from pnode.adjoint.steps import Steps
from pnode.adjoint.store import CheckpointStore
from pnode.base.errors import CheckpointError, VectorFieldError
from pnode.base.evidence import Evidence
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Step

__all__ = ["Trajectory"]

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
    keeps_graphs : bool
        Whether to keep the graphs of steps where there is room.
    total : int or None
        Number of steps, if it is known: graphs of those that could not keep theirs to the end are
        not made.
    multistep : bool
        Whether the method looks at more states than the last.
    only_repeated : bool
        Whether graphs are kept of steps that are repeated, and not of the forward sweep.

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
    keeps_graphs : bool
        As given, until there is no room for more.
    evidence : Evidence
        What tells the f of these steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        store: CheckpointStore,
        progress: Progress | None = None,
        keeps_graphs: bool = False,
        total: int | None = None,
        multistep: bool = False,
        only_repeated: bool = False,
    ) -> None:
        self._only_repeated = only_repeated
        self.keeps_graphs = keeps_graphs
        self._total = total
        self._multistep = multistep
        self._first_with_graphs = 0
        self._step_bytes = [math.inf, 0.0]  # of a step's graphs, once known, and its stages
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
        self._held_tensors: tuple[torch.Tensor, ...] = ()

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
        if self.keeps_graphs:
            self._keep_graphs(step.index, integrator)

    def _keep_graphs(self, index: int, integrator: TimeIntegrator) -> None:
        """Keep the graphs of the step just taken, and say whether the next one makes any."""
        kept = integrator.kept_graphs()
        if kept is not None:
            self._step_bytes[0] = kept[1]
            fits = not self._only_repeated and self._store.keep_graphs(index, *kept)
            if not fits:  # nor will the next: checkpoints only become more
                self.keeps_graphs = False
                integrator.make_graphs(False)
                return
            if index == 0 and self._total is not None:
                # The first stage may be the last of the step before.
                most = self._store.most_graphs(kept[1])
                self._first_with_graphs = self._total - most - 1
        integrator.make_graphs(index + 1 >= self._first_with_graphs)

    def wants_graphs(self, index: int) -> bool:
        """Whether a step that is repeated has no graphs, and room for them beside its stages."""
        return self.graphs(index) is None and self._store.could_keep(sum(self._step_bytes))

    def keep_repeated(self, index: int, integrator: TimeIntegrator) -> bool:
        """Keep the graphs of a step just repeated; return whether f is that of the first time."""
        kept, found, noted = integrator.kept_graphs(), integrator.evidence(), self.evidence[index]
        if kept is None or len(found) != len(noted):  # they began in the middle of the step
            return True
        self._step_bytes[0] = kept[1]
        same = all(map(math.isclose, found, noted))
        if same:
            self._store.keep_graphs(index, *kept)
        return same

    def graphs(self, index: int) -> Any:
        """Return the graphs of a step's stages, None if they are not kept."""
        return self._store.graphs.get(index)

    def finish(self, integrator: TimeIntegrator) -> None:
        """End the forward sweep: the last step's stages stay at hand if they are not stored."""
        if self.schedule.begins_live and self.steps:
            self.stages(len(self.steps) - 1, integrator)
        self.ready = True

    def mark_output(self, state: torch.Tensor, after: int | None = None) -> None:
        """Note an output with this state: after the steps so far, or after fewer."""
        if self.progress is not None:
            self.progress.add_output(len(self.outputs), len(self.steps), state)
        self.outputs.append(len(self.steps) if after is None else after)

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
                    checkpoint = checkpoint.with_start(self._start)
                store.put((_STAGES, step), checkpoint.tensors(), action.level)
            case StoreSolution():
                assert integrator is not None
                store.put((_SOLUTION, step), integrator.history, action.level)
            case DiscardStages():
                store.discard((_STAGES, step))
            case DiscardSolution():
                store.discard((_SOLUTION, step))
            case KeepEnd():
                end = self.end(step)
                store.discard((_STAGES, step))
                store.put((_SOLUTION, step + 1), (end,))
            case RestoreStages():
                found, plain = store.get((_STAGES, step)), self.progress is None
                plain = plain and not self._multistep
                checkpoint = Checkpoint(tuple(found)) if plain else self._read(found)
                self._live = (step, self._checked(step, checkpoint))
            case _:
                raise AssertionError(f"{action} is not for the trajectory")

    def stages(self, index: int, integrator: TimeIntegrator | None) -> Checkpoint:
        """Return the stages of a step that are live: restored, or in the integrator's hands.

        They count as memory until :meth:`forget_live`.
        """
        live = self._find_live(index, integrator)
        if self._held is not live:
            if self._held is not None:
                self._store.release(self._held_tensors)
            self._held = live
            self._held_tensors = live.tensors() if self._multistep else live.stages
            self._store.hold(self._held_tensors)
            if self._store.limited:
                self._step_bytes[1] = sum([tensor.nbytes for tensor in self._held_tensors])
        return live

    @property
    def at_hand(self) -> bool:
        """Whether the stages of all steps are in memory, which all ranks agree about."""
        everything = isinstance(self.schedule, StoreEverything)
        return self.ready and everything and self.progress is None and self._store.at_hand

    def peek(self, index: int) -> Checkpoint | None:
        """Return the stages of a step, which stay where they are; None if they are not at hand."""
        if self._live is not None and self._live[0] == index:
            return self._live[1]
        found = self._store.peek((_STAGES, index))
        return None if found is None else self._read(found)

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
            self._store.release(self._held_tensors)
        self._live = self._held = None
        self._held_tensors = ()

    def solution(self, index: int) -> torch.Tensor:
        """Return the stored state at the start of a step."""
        return self._store.get((_SOLUTION, index))[0]

    def end(self, index: int) -> torch.Tensor:
        """Return the end of a step from its stored stages."""
        return self._read(self._store.get((_STAGES, index))).stages[-1]

    def clear(self) -> None:
        """Free all checkpoints, and the disk."""
        self._live = self._held = None
        self._held_tensors = ()
        self.ready = False
        self._store.close()

    def _keep_live(self, index: int, integrator: TimeIntegrator) -> None:
        stored = self._store.peek((_STAGES, index - 1))
        previous = None if stored is None else self._read(stored)
        self._live = (index, self._checked(index, integrator.checkpoint(previous)))

    def _read(self, tensors: Sequence[torch.Tensor]) -> Checkpoint:
        """Return the checkpoint that is stored as these tensors, without the start of its step."""
        if self.progress is None:
            return Checkpoint.of(tensors, self._multistep)
        return Checkpoint.of(tensors, self._multistep, started=True).with_start(None)

    def _checked(self, index: int, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint unless the vector field has written into a state of this step.

        A checkpoint of an explicit method holds the very tensors that it was given.

        Raises
        ------
        VectorFieldError
            If it has.
        """
        tensors = checkpoint.tensors() if self._multistep else checkpoint.stages
        if any([tensor._version for tensor in tensors]):
            raise VectorFieldError(
                "the vector field kept a state y and wrote into it later; keep y.clone() instead",
                step=index,
            )
        return checkpoint

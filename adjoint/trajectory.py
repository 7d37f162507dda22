"""The trajectory of one forward sweep: its steps, and the checkpoints a schedule asked for.

A trajectory belongs to one autograd node. Any number of them may be alive at once.
"""

from __future__ import annotations

from collections import Counter

import torch

from pnode.adjoint.schedule import Schedule, StoreStages
from pnode.errors import CheckpointError, VectorFieldError
from pnode.solution import Ledger
from pnode.solvers.integrator import TimeIntegrator
from pnode.solvers.stepping import Step

__all__ = ["Checkpoint", "Trajectory"]

#: What the adjoint of one step needs; see ``TimeIntegrator.checkpoint``.
Checkpoint = tuple[torch.Tensor, ...]


class Trajectory:
    """Steps and checkpoints of one forward sweep.

    Parameters
    ----------
    schedule : Schedule
        What to store.
    ledger : Ledger
        Where the peak size is kept.

    Attributes
    ----------
    steps : list of Step
        Every accepted step.
    outputs : list of int
        For each output time, how many steps come before it.
    """

    def __init__(self, schedule: Schedule, ledger: Ledger) -> None:
        self.schedule = schedule
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self._ledger = ledger
        self._checkpoints: dict[int, Checkpoint] = {}
        self._holders: Counter[int] = Counter()
        self._bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every step can be restored."""
        return len(self._checkpoints) == len(self.steps)

    def record(self, step: Step, integrator: TimeIntegrator) -> None:
        """Note an accepted step and store what the schedule wants of it."""
        if step.index == len(self.steps):
            self.steps.append(step)
        for action in self.schedule.after_step(step.index):
            if isinstance(action, StoreStages):
                previous = self._checkpoints.get(step.index - 1)
                self._store(step.index, integrator.checkpoint(previous))

    def mark_output(self) -> None:
        """Note that an output time was reached after the steps so far."""
        self.outputs.append(len(self.steps))

    def restore(self, index: int) -> Checkpoint:
        """Return the checkpoint of a step.

        Raises
        ------
        CheckpointError
            If there is none.
        VectorFieldError
            If the vector field has written into a state that it was given in this step: the
            checkpoint holds these very tensors.
        """
        try:
            checkpoint = self._checkpoints[index]
        except KeyError:
            raise CheckpointError("there is no checkpoint of this step", step=index) from None
        if any(tensor._version for tensor in checkpoint):
            raise VectorFieldError(
                "the vector field kept a state y and wrote into it later; keep y.clone() instead",
                step=index,
            )
        return checkpoint

    def discard(self, index: int) -> None:
        """Free a checkpoint."""
        for tensor in self._checkpoints.pop(index):
            self._holders[id(tensor)] -= 1
            if not self._holders[id(tensor)]:
                del self._holders[id(tensor)]
                self._bytes -= _size(tensor)

    def clear(self) -> None:
        """Free all checkpoints."""
        for index in list(self._checkpoints):
            self.discard(index)

    def _store(self, index: int, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint; a tensor that two of them share counts once."""
        for tensor in checkpoint:
            if not self._holders[id(tensor)]:
                self._bytes += _size(tensor)
            self._holders[id(tensor)] += 1
        self._checkpoints[index] = checkpoint
        self._ledger.ram_bytes = max(self._ledger.ram_bytes, self._bytes)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

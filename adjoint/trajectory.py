"""The trajectory of one forward sweep: its steps, and the checkpoints a schedule asked for.

A trajectory belongs to one autograd node. Any number of them may be alive at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pnode import vectors
from pnode.adjoint.schedule import Schedule, StoreStages
from pnode.errors import CheckpointError
from pnode.solution import Ledger
from pnode.solvers.stepping import Step

__all__ = ["Checkpoint", "Trajectory"]


@dataclass(frozen=True)
class Checkpoint:
    """What the adjoint of one step needs: one tensor per vector, in PETSc's precision."""

    tensors: tuple[torch.Tensor, ...]


class Trajectory:
    """Steps and checkpoints of one forward sweep.

    Parameters
    ----------
    schedule : Schedule
        What to store.
    shares_ends : bool
        Whether a step's first vector is the one before's last (methods whose checkpoint is the
        states at both ends); it is stored once then.
    ledger : Ledger
        Where the peak size is kept.
    """

    def __init__(self, schedule: Schedule, shares_ends: bool, ledger: Ledger) -> None:
        self.schedule = schedule
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self._shares_ends = shares_ends
        self._ledger = ledger
        self._checkpoints: dict[int, Checkpoint] = {}
        self._bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every step can be restored."""
        return len(self._checkpoints) == len(self.steps)

    def record(self, step: Step, petsc_vectors: list[Any]) -> None:
        """Note an accepted step and store what the schedule wants of it."""
        if step.index == len(self.steps):
            self.steps.append(step)
        for action in self.schedule.after_step(step.index):
            if isinstance(action, StoreStages):
                self._store(step.index, petsc_vectors)

    def mark_output(self) -> None:
        """Note that an output time was reached after the steps so far."""
        self.outputs.append(len(self.steps))

    def restore(self, index: int, petsc_vectors: list[Any]) -> None:
        """Copy a checkpoint back into PETSc's vectors.

        Raises
        ------
        CheckpointError
            If there is none for this step.
        """
        checkpoint = self._checkpoints.get(index)
        if checkpoint is None:
            raise CheckpointError("there is no checkpoint of this step", step=index)
        for vector, tensor in zip(petsc_vectors, checkpoint.tensors, strict=True):
            vectors.copy_in(vector, tensor)

    def discard(self, index: int) -> None:
        """Free a checkpoint."""
        checkpoint = self._checkpoints.pop(index)
        shared = self._shares_ends and index - 1 in self._checkpoints
        self._bytes -= sum(_size(tensor) for tensor in checkpoint.tensors[1 if shared else 0 :])

    def clear(self) -> None:
        """Free all checkpoints."""
        self._checkpoints.clear()
        self._bytes = 0

    def _store(self, index: int, petsc_vectors: list[Any]) -> None:
        tensors: list[torch.Tensor] = []
        previous = self._checkpoints.get(index - 1) if self._shares_ends else None
        if previous is not None:
            tensors.append(previous.tensors[-1])
        for vector in petsc_vectors[len(tensors) :]:
            tensors.append(vectors.copy_out(vector))
            self._bytes += _size(tensors[-1])
        self._checkpoints[index] = Checkpoint(tuple(tensors))
        self._ledger.ram_bytes = max(self._ledger.ram_bytes, self._bytes)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

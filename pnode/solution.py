"""What a solve returns: the states at the output times and the ledger of what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Generic

import torch
from typing_extensions import TypeVar

__all__ = ["Ledger", "Solution", "Stats"]


@dataclass
class Ledger:
    """Counts of one sweep.

    Attributes
    ----------
    steps : int
        Accepted steps (forward), adjoint steps (backward).
    rejected : int
        Attempts thrown away: too large an error, a Newton failure, a non-finite vector field.
    rhs : int
        Evaluations of the vector field, those that record a graph included.
    jvp, vjp : int
        Jacobian-vector and vector-Jacobian products, outside of assembled Jacobians.
    jacobians : int
        Assembled Jacobians: n products each if dense, n / B for B blocks, one per color if sparse.
    newton, krylov : int
        Newton and Krylov iterations.
    recomputed : int
        Steps repeated because no checkpoint of them was kept.
    ram_bytes, disk_bytes, device_bytes : int
        Peak size of the checkpoints in memory, on disk, and on the device where that is a level of
        its own (``Checkpointing(device_memory=...)``).
    tape_bytes : int
        Peak size of the graphs of f that are kept besides, within the same limit of memory.
    copies, copied_bytes : int
        Copies between f's device and a state that is kept on the host
        (``Solver(device_state="host")``), and their bytes.
    """

    steps: int = 0
    rejected: int = 0
    rhs: int = 0
    jvp: int = 0
    vjp: int = 0
    jacobians: int = 0
    newton: int = 0
    krylov: int = 0
    recomputed: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    device_bytes: int = 0
    tape_bytes: int = 0
    copies: int = 0
    copied_bytes: int = 0

    def add(self, other: Ledger) -> None:
        """Add the counts of another sweep; of the peaks the larger one stays."""
        for item in fields(Ledger):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            peak = item.name in ("ram_bytes", "disk_bytes", "device_bytes", "tape_bytes")
            setattr(self, item.name, max(mine, theirs) if peak else mine + theirs)


@dataclass
class Stats(Ledger):
    """Ledger of the forward sweep; ``backward`` adds up all backward sweeps."""

    backward: Ledger = field(default_factory=Ledger)


State = TypeVar("State", default=Any)


@dataclass
class Solution(Generic[State]):
    """Result of a solve.

    Attributes
    ----------
    ts : Tensor
        The output times, shape ``(T,)``, as given. After an event: those before it, and its own
        time.
    ys : Tensor or tuple of Tensor
        The states, shape ``(T, *y0.shape)``, dtype and device of y0; differentiable.
    stats : Stats
        The ledger. ``stats.backward`` fills up when gradients are computed.
    reason : str
        ``"t_end"``, or ``"event"`` if event_fn changed sign before.
    event_time : Tensor or None
        Time of the event, 0-dim, differentiable; None without one.
    costs : Tensor or None
        Integrals of ``cost`` from ``t[0]`` to each output time, shape ``(T, *shape of r)``,
        differentiable; None without it. Of ranks that share a state: this rank's own.
    """

    ts: torch.Tensor
    ys: State
    stats: Stats
    reason: str = "t_end"
    event_time: torch.Tensor | None = None
    costs: torch.Tensor | None = None

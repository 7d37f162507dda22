"""Counts of what a sweep costs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

__all__ = ["Ledger", "Stats", "new_stats"]


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
    factorizations : int
        Matrices ``shift M - J`` formed of them and factored, or preconditioners set up.
    newton, krylov : int
        Newton and Krylov iterations.
    recomputed : int
        Steps repeated because no checkpoint of them was kept.
    ram_bytes, disk_bytes, device_bytes : int
        Most bytes of checkpoints at one instant of the sweep: in memory, on disk, and on the device
        where that is a level of its own (``Checkpointing(device_memory=...)``). Each tensor counts
        once, however many checkpoints hold it; graphs do not count.
    tape_bytes : int
        Most bytes of graphs of f, besides the states at which they begin, at one instant. It is
        another instant: graphs are let go while checkpoints grow, so that the two together never
        exceed ``Checkpointing(memory=...)``, which the sum of both peaks may.
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
    factorizations: int = 0
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
        own, more = vars(self), vars(other)
        for name in _COUNTS:
            if theirs := more[name]:
                own[name] = max(own[name], theirs) if name in _PEAKS else own[name] + theirs


_COUNTS = tuple(item.name for item in fields(Ledger))
_NOTHING = dict.fromkeys(_COUNTS, 0)
_PEAKS = frozenset({"ram_bytes", "disk_bytes", "device_bytes", "tape_bytes"})


@dataclass
class Stats(Ledger):
    """Ledger of the forward sweep.

    ``backward`` adds up all backward sweeps, ``tangents`` all solves for tangents: those of forward
    mode, and those that second derivatives are made of.
    """

    backward: Ledger = field(default_factory=Ledger)
    tangents: Ledger = field(default_factory=Ledger)


def new_stats() -> Stats:
    """Return what ``Stats()`` is, which takes four times as long."""
    made = object.__new__(Stats)
    made.backward, made.tangents = object.__new__(Ledger), object.__new__(Ledger)
    for one in (made, made.backward, made.tangents):
        vars(one).update(_NOTHING)
    return made

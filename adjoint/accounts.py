"""What counts as memory, and how much of it there is: of the host, or of a device."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from pnode.adjoint.slabs import Slabs, Tensors
from pnode.base.ledger import Ledger

__all__ = ["Account", "Graphs", "Kept"]

#: A checkpoint in memory: its tensors, or the slots of small ones.
Kept = Tensors | bytes


class Graphs:
    """Graphs of f at the stages of steps, which take what checkpoints leave of the memory.

    Parameters
    ----------
    ledger : Ledger
        Where the peak is kept.
    limit : float
        Bytes that they may hold at most besides.
    """

    def __init__(self, ledger: Ledger, limit: float) -> None:
        self.bytes = 0
        self.limit = limit
        self._ledger = ledger
        self._kept: dict[int, tuple[Any, int]] = {}

    def put(self, step: int, graphs: Any, size: int) -> None:
        """Keep the graphs of a step, ``size`` bytes."""
        self._kept[step] = (graphs, size)
        self.bytes += size
        self._ledger.tape_bytes = max(self._ledger.tape_bytes, self.bytes)

    def get(self, step: int) -> Any:
        """Return the graphs of a step, None if they are not kept."""
        return self._kept.get(step, (None, 0))[0]

    def drop(self, step: int) -> int:
        """Free the graphs of a step, if they are kept; return their bytes."""
        _, size = self._kept.pop(step, (None, 0))
        self.bytes -= size
        return size

    def free(self, missing: float) -> None:
        """Free the graphs of the earliest steps until so many bytes are free, or none is left."""
        while self._kept and missing > 0:
            missing -= self.drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Free all."""
        self._kept.clear()
        self.bytes = 0


class Account:
    """Bytes of the tensors that are held in one kind of memory, each counted once.

    Parameters
    ----------
    ledger : Ledger
        Where the peak is kept.
    peak : str
        Under which name.
    limit : float
        Bytes that may be held at any instant.
    graphs : Graphs, optional
        What goes when there is no room.
    slabs : bool
        Whether small tensors are kept side by side.

    Attributes
    ----------
    bytes : int
        What is held now, without graphs.
    limit, graphs
        As given.
    """

    def __init__(
        self,
        ledger: Ledger,
        peak: str,
        limit: float,
        graphs: Graphs | None = None,
        slabs: bool = False,
    ) -> None:
        self.bytes = 0
        self.limit = limit
        self.graphs = Graphs(ledger, 0) if graphs is None else graphs
        self._ledger = ledger
        self._peak = peak
        self._holders: Counter[int] = Counter()
        self._slabs = Slabs(limit) if slabs else None

    def room(self) -> float:
        """Return how many bytes could be added."""
        return self.limit - self.bytes - self.graphs.bytes

    def graphs_room(self) -> float:
        """Return how many bytes of graphs could be added."""
        return min(self.room(), self.graphs.limit - self.graphs.bytes)

    def most_graphs(self, size: int) -> int:
        """Return how many steps with graphs of ``size`` bytes there is room for at most."""
        most = min(self.limit, self.graphs.limit) / max(1, size)
        return sys.maxsize if math.isinf(most) else int(most)

    def added(self, tensors: Sequence[torch.Tensor]) -> int:
        """Return the bytes of those tensors that are not held."""
        new = [tensor for tensor in tensors if id(tensor) not in self._holders]
        if self._slabs is not None:
            new = [tensor for tensor in new if self._slabs.find(tensor) is None]
        return sum([tensor.nbytes for tensor in new])

    def count(self, size: int) -> None:
        """Add so many bytes, or take them off."""
        self.bytes += size
        if self.bytes > getattr(self._ledger, self._peak):
            setattr(self._ledger, self._peak, self.bytes)

    def keep(self, tensors: Tensors) -> Kept:
        """Hold tensors, side by side with others if they are small."""
        if self._slabs is None or not self._slabs.takes(tensors):
            self.hold(tensors)
            return tensors
        slots, new = self._slabs.put(tensors, self._forget)
        self.count(sum([tensor.nbytes for tensor in new]))
        return slots

    def tensors(self, kept: Kept) -> Tensors:
        """Return what is kept as tensors."""
        if isinstance(kept, bytes):
            assert self._slabs is not None
            return self._slabs.get(kept)
        return kept

    def drop(self, slots: bytes) -> None:
        """Stop counting small tensors by their slots."""
        assert self._slabs is not None
        self.count(-self._slabs.drop(slots))

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Count tensors; one that is held twice counts once."""
        if self.graphs.bytes:
            self.free_graphs(tensors)
        if self._slabs is not None:
            tensors = self._slabs.hold(tensors)
        holders = self._holders
        new = [tensor for tensor in tensors if not holders[id(tensor)]]
        self.count(sum([tensor.nbytes for tensor in dict.fromkeys(new)]))
        for tensor in tensors:
            holders[id(tensor)] += 1

    def release(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Stop counting tensors; return those that nobody holds now and that have no slot."""
        size = 0
        if self._slabs is not None:
            tensors, size = self._slabs.release(tensors)
        holders, gone = self._holders, []
        for tensor in tensors:
            holders[id(tensor)] -= 1
            if not holders[id(tensor)]:
                del holders[id(tensor)]
                gone.append(tensor)
        self.count(-size - sum([tensor.nbytes for tensor in gone]))
        return gone

    def is_held(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is held."""
        return id(tensor) in self._holders

    def free_graphs(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make room for tensors by freeing graphs, as far as that goes."""
        self.graphs.free(self.added(tensors) - self.room())

    def clear(self) -> None:
        """Count nothing any more."""
        self._holders.clear()
        self.graphs.clear()
        self.bytes = 0
        if self._slabs is not None:
            self._slabs = Slabs(self.limit)

    def _forget(self, tensor: torch.Tensor) -> int:
        """Return how often a tensor was held that is counted by its slot from now on."""
        number = self._holders.pop(id(tensor), 0)
        if number:
            self.count(-tensor.nbytes)
        return number

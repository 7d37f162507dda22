"""Small tensors of many checkpoints, side by side in a few large ones.

A tensor of one number takes some 700 bytes of objects and of memory that is rounded up. As a row
of a slab, whose number is its *slot*, it takes its numbers and twelve bytes, and a checkpoint is a
list of slots. Who holds a slot is counted; one that nobody holds is given to another tensor.

Checkpoints share tensors, and a tensor counts once: so the tensors that have a slot, and those that
were made from one, are known as long as they live.
"""

from __future__ import annotations

import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

__all__ = ["LARGEST", "SLAB", "Slabs", "Tensors"]

Tensors = tuple[torch.Tensor, ...]

#: Bytes of a slab, and of the largest tensor that gets a row of one: those beyond are worth their
#: objects.
SLAB, LARGEST = 16384, 2048

_DTYPES = (torch.float64, torch.float32)
_Kind = tuple[torch.Size, torch.dtype]


class Slabs:
    """Rows for small tensors, handed out, counted and taken back.

    Parameters
    ----------
    limit : float
        Bytes that all tensors hold at most: no slab is larger.
    """

    def __init__(self, limit: float) -> None:
        self._size = int(min(limit, SLAB))
        self._slabs: list[torch.Tensor] = []
        self._firsts: list[int] = []  # the slots of their first rows
        self._free: dict[_Kind, array[int]] = {}
        # By slot: how often it is held, and how many tensors had it before.
        self._holders, self._former = array("I"), array("I")
        # By id: a tensor, if it still lives, its slot, and how many had that before.
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        self._most = 64  # of these, until the dead ones go

    def takes(self, tensors: Tensors) -> bool:
        """Whether these are tensors for slabs."""
        return all(
            [
                type(tensor) is torch.Tensor
                and tensor.nbytes <= LARGEST
                and tensor.is_cpu
                and tensor.dtype in _DTYPES
                and tensor.numel() > 0
                and tensor.is_contiguous()
                for tensor in tensors
            ]
        )

    def find(self, tensor: torch.Tensor) -> int | None:
        """Return the slot of a tensor, None if it has none (any more)."""
        known = self._known.get(id(tensor))
        if known is None:
            return None
        reference, slot, former = known
        return slot if reference() is tensor and self._former[slot] == former else None

    def _know(self, tensor: torch.Tensor, slot: int) -> None:
        """Note the slot of a tensor."""
        if len(self._known) >= self._most:
            self._known = {i: known for i, known in self._known.items() if known[0]() is not None}
            self._most = 2 * len(self._known) + 64
        self._known[id(tensor)] = weakref.ref(tensor), slot, self._former[slot]

    def put(
        self, tensors: Tensors, forget: Callable[[torch.Tensor], int]
    ) -> tuple[bytes, list[torch.Tensor]]:
        """Give every tensor a slot, which is held once more.

        ``forget`` returns how often a tensor is held that had none until now.

        Returns
        -------
        slots : bytes
            For :meth:`get` and :meth:`drop`.
        new : list of Tensor
            Those that have got one.
        """
        found = {id(tensor): self.find(tensor) for tensor in tensors}
        new = {id(tensor): tensor for tensor in tensors if found[id(tensor)] is None}
        kinds: dict[_Kind, list[torch.Tensor]] = {}
        for tensor in new.values():
            kinds.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        for kind, alike in kinds.items():
            for tensor, slot in zip(alike, self._copy_in(kind, alike), strict=True):
                found[id(tensor)] = slot
                self._know(tensor, slot)
                self._holders[slot] = forget(tensor)
        slots = array("I", [found[id(tensor)] or 0 for tensor in tensors])
        for slot in slots:
            self._holders[slot] += 1
        return slots.tobytes(), list(new.values())

    def get(self, slots: bytes) -> Tensors:
        """Return tensors of their own with what is in these slots."""
        tensors = []
        for slot in array("I", slots):
            slab, row = self._place(slot)
            tensor = slab[row].clone()
            self._know(tensor, slot)
            tensors.append(tensor)
        return tuple(tensors)

    def drop(self, slots: bytes) -> int:
        """Hold slots once less; return the bytes of those that nobody holds now."""
        # From behind, so that they are handed out in their order.
        return sum([self._release(slot) for slot in reversed(array("I", slots))])

    def hold(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hold the slots of tensors once more; return the tensors that have none."""
        others = []
        for tensor in tensors:
            slot = self.find(tensor)
            if slot is None:
                others.append(tensor)
            else:
                self._holders[slot] += 1
        return others

    def release(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """Hold them once less; return the others, and the bytes that nobody holds now."""
        others, size = [], 0
        for tensor in tensors:
            slot = self.find(tensor)
            if slot is None:
                others.append(tensor)
            else:
                size += self._release(slot)
        return others, size

    def _release(self, slot: int) -> int:
        self._holders[slot] -= 1
        if self._holders[slot]:
            return 0
        slab, _ = self._place(slot)
        self._former[slot] += 1
        self._free[slab.shape[1:], slab.dtype].append(slot)
        return slab[0].nbytes

    def _place(self, slot: int) -> tuple[torch.Tensor, int]:
        """Return the slab of a slot, and the row in it."""
        number = bisect_right(self._firsts, slot) - 1
        return self._slabs[number], slot - self._firsts[number]

    def _copy_in(self, kind: _Kind, tensors: list[torch.Tensor]) -> list[int]:
        """Return slots with the numbers of tensors of one kind."""
        free = self._free.setdefault(kind, array("I"))
        while len(free) < len(tensors):
            self._grow(kind, tensors[0].nbytes)
        slots = [free.pop() for _ in tensors]
        first, number = slots[0], len(slots)
        slab, row = self._place(first)
        with torch.no_grad():
            if slots == list(range(first, first + number)) and row + number <= len(slab):
                torch.stack(tensors, out=slab[row : row + number])
            else:
                for tensor, slot in zip(tensors, slots, strict=True):
                    slab, row = self._place(slot)
                    slab[row].copy_(tensor)
        return slots

    def _grow(self, kind: _Kind, size: int) -> None:
        """Make one more slab for tensors of ``size`` bytes."""
        shape, dtype = kind
        rows, first = max(1, self._size // size), len(self._holders)
        self._slabs.append(torch.empty((rows, *shape), dtype=dtype, device="cpu"))
        self._firsts.append(first)
        self._holders.extend([0] * rows)
        self._former.extend([0] * rows)
        self._free[kind].extend(range(first + rows - 1, first - 1, -1))

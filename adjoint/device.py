"""Checkpoints on a device, the oldest of which move to memory beside the computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pnode.adjoint.accounts import Account
from pnode.adjoint.disk import Key
from pnode.adjoint.memory import Memory
from pnode.adjoint.offload import DeviceLevel, Transfer
from pnode.adjoint.slabs import Tensors
from pnode.base.errors import CheckpointError
from pnode.base.ledger import Ledger

__all__ = ["Device"]


class Device:
    """Checkpoints by key on a device, and below it in memory.

    Those with tensors there stay as long as there is room, the oldest move to memory, and are
    copied back when they are wanted. Both copies run beside the computation, one at a time each
    way; while it lasts, a checkpoint counts on both sides.

    Parameters
    ----------
    ledger : Ledger
        Where the peak is kept.
    level : DeviceLevel
        How much there is, and what copies.
    memory : Memory
        Where the oldest go.
    """

    def __init__(self, ledger: Ledger, level: DeviceLevel, memory: Memory) -> None:
        self.account = Account(ledger, "device_bytes", level.limit)
        self._offload = level.offload
        self._memory = memory
        self._kept: dict[Key, Tensors] = {}
        self._leaving: tuple[Key, Transfer, Tensors] | None = None
        self._arriving: tuple[Key, Transfer, int] | None = None
        self._back: tuple[Key, Tensors] | None = None  # the last one that was copied back
        self._twins: dict[int, torch.Tensor] = {}  # copies of tensors that others still hold
        self._masks: dict[Key, list[bool]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._kept or key in self._memory

    def put(self, key: Key, tensors: Tensors, level: int = 0) -> None:
        """Keep a checkpoint here, or in memory if it is the older ones that stay.

        Raises
        ------
        CheckpointError
            If there is no room.
        """
        account = self.account
        if not any(map(self._offload.resident, tensors)):
            self._memory.put(key, tensors, level)
            return
        self._make_room(lambda: self._added(tensors))
        size = self._added(tensors)
        if size <= account.room():
            self.hold(tensors)
            self._kept[key] = tensors
            # Room for the next one like this, while the next step is taken.
            if size > account.room() and self._leaving is None:
                self._move_oldest_off()
        elif size <= self._memory.room():
            mask, moving = self._moving(tensors)
            transfer = self._offload.to_host(moving)
            transfer.wait()
            self._keep_copies(key, tensors, mask, transfer)
        else:
            raise CheckpointError(
                f"checkpoints need more than device_memory={account.limit} and "
                f"memory={self._memory.account.limit}: raise one of them"
            )

    def peek(self, key: Key) -> Tensors | None:
        """Return a checkpoint if it is on the device."""
        return self._kept.get(key)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint on the device, from memory or disk if it is there."""
        if key in self._kept:
            return self._kept[key]
        if self._back is not None and self._back[0] == key:
            return self._back[1]
        self._forget_back()
        if self._leaving is not None and self._leaving[0] == key:
            self._finish_leaving()
        if self._arriving is not None and self._arriving[0] == key:
            _, transfer, size = self._arriving
            self._arriving = None
            self.account.count(-size)
        else:
            size = self._moved_size(key)
            self._make_room(lambda: size)
            transfer = self._begin_arriving(key)
        tensors = transfer.wait()
        self.hold(tensors)
        self._back = (key, tensors)
        following = self._memory.newest(key)
        if following is not None and self._arriving is None and self._leaving is None:
            size = self._moved_size(following)
            if size <= self.account.room():
                self._arriving = (following, self._begin_arriving(following), size)
                self.account.count(size)
        return tensors

    def drop(self, key: Key) -> None:
        """Free a checkpoint."""
        if key in self._kept:
            self.release(self._kept.pop(key))
            return
        if self._leaving is not None and self._leaving[0] == key:
            self._finish_leaving()
        if self._arriving is not None and self._arriving[0] == key:
            self._forget_arriving()
        if self._back is not None and self._back[0] == key:
            self._forget_back()
        self._masks.pop(key, None)
        self._memory.drop(key)

    def hold(self, tensors: Tensors) -> None:
        """Count tensors where they are; one that is held twice counts once."""
        here, there = self._places(tensors)
        if self.account.added(here):
            self._make_room(lambda: self.account.added(here))
        self.account.hold(here)
        self._memory.account.hold(there)

    def release(self, tensors: Tensors) -> None:
        """Stop counting them."""
        here, there = self._places(tensors)
        for tensor in self.account.release(here):
            self._twins.pop(id(tensor), None)
        self._memory.account.release(there)

    def close(self) -> None:
        """Free everything."""
        self._memory.close()
        self.account.clear()
        self._kept.clear()
        self._twins.clear()
        self._masks.clear()
        self._leaving = self._arriving = self._back = None

    def _places(self, tensors: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors on the device, and the others."""
        here: list[torch.Tensor] = []
        there: list[torch.Tensor] = []
        for tensor in tensors:
            (here if self._offload.resident(tensor) else there).append(tensor)
        return here, there

    def _added(self, tensors: Tensors) -> int:
        """Return the bytes on the device of those tensors that are not held."""
        return self.account.added(self._places(tensors)[0])

    def _make_room(self, added: Callable[[], int]) -> None:
        """Move the oldest checkpoints off the device until so many bytes more fit, if they can."""
        while added() > self.account.room():
            if self._arriving is not None:
                self._forget_arriving()
            elif self._leaving is not None:
                self._finish_leaving()
            elif self._back is not None:
                self._forget_back()
            elif not self._leaves_room(added() - self.account.room()):
                return
            else:
                self._move_oldest_off()

    def _leaves_room(self, excess: float) -> bool:
        """Whether the oldest checkpoints on the device, of so many bytes, fit into memory."""
        found = 0
        for tensors in self._kept.values():
            found += sum([tensor.nbytes for tensor in self._moving(tensors)[1]])
            if found >= excess:
                break
        return bool(self._kept) and found <= self._memory.room()

    def _moving(self, tensors: Tensors) -> tuple[list[bool], list[torch.Tensor]]:
        """Return which tensors are on the device, and those of them that have no copy yet."""
        mask = [self._offload.resident(tensor) for tensor in tensors]
        pairs = zip(tensors, mask, strict=True)
        return mask, [tensor for tensor, here in pairs if here and id(tensor) not in self._twins]

    def _move_oldest_off(self) -> None:
        """Begin to copy the oldest checkpoint on the device to memory, if there is room."""
        key, tensors = next(iter(self._kept.items()))
        mask, moving = self._moving(tensors)
        if sum([tensor.nbytes for tensor in moving]) > self._memory.room():
            return
        transfer = self._offload.to_host(moving)
        del self._kept[key]
        self._keep_copies(key, tensors, mask, transfer)
        self._leaving = (key, transfer, tensors)

    def _keep_copies(
        self, key: Key, tensors: Tensors, mask: Sequence[bool], transfer: Transfer
    ) -> None:
        """Keep a checkpoint in memory, from copies of those tensors that are on the device."""
        _, moving = self._moving(tensors)
        self._twins |= {id(a): b for a, b in zip(moving, transfer.tensors, strict=True)}
        own = tuple(
            self._twins[id(tensor)] if here else tensor
            for tensor, here in zip(tensors, mask, strict=True)
        )
        for tensor in moving:  # a copy serves others as long as the tensor is held
            if not self.account.is_held(tensor):
                del self._twins[id(tensor)]
        self._masks[key] = list(mask)
        self._memory.put(key, own, wait=transfer.wait)

    def _finish_leaving(self) -> None:
        """Wait until the checkpoint that leaves the device has left."""
        assert self._leaving is not None
        _, transfer, tensors = self._leaving
        self._leaving = None
        transfer.wait()
        self.release(tensors)

    def _begin_arriving(self, key: Key) -> Transfer:
        """Begin to copy a checkpoint to the device."""
        source = self._memory.get(key)
        mask = self._mask(key, source)
        moving = [tensor for tensor, moved in zip(source, mask, strict=True) if moved]
        transfer = self._offload.to_device(moving)

        def finish() -> None:
            transfer.wait()
            self._memory.let_go(key)

        copies = iter(transfer.tensors)
        return Transfer(
            tuple(
                next(copies) if moved else tensor
                for tensor, moved in zip(source, mask, strict=True)
            ),
            finish,
        )

    def _mask(self, key: Key, tensors: Tensors) -> list[bool]:
        """Return which tensors of a checkpoint in memory are copies."""
        return self._masks.get(key, [True] * len(tensors))

    def _moved_size(self, key: Key) -> int:
        tensors = self._memory.get(key)
        mask = self._mask(key, tensors)
        return sum([t.nbytes for t, moved in zip(tensors, mask, strict=True) if moved])

    def _forget_arriving(self) -> None:
        """Let go of what was copied to the device in advance."""
        assert self._arriving is not None
        _, transfer, size = self._arriving
        self._arriving = None
        transfer.wait()
        self.account.count(-size)

    def _forget_back(self) -> None:
        """Let go of the last checkpoint that was copied back; memory or disk still has it."""
        if self._back is not None:
            self.release(self._back[1])
            self._back = None

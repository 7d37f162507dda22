"""Checkpoints in memory, the oldest of which move to a disk when there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pnode.adjoint.accounts import Account, Kept
from pnode.adjoint.disk import Disk, Key
from pnode.adjoint.slabs import Tensors
from pnode.base.errors import CheckpointError

__all__ = ["Memory"]


class Memory:
    """Checkpoints by key in memory, and below it on a disk.

    Parameters
    ----------
    account : Account
        What counts as memory.
    disk : Disk or None
        Where the oldest go.
    """

    def __init__(self, account: Account, disk: Disk | None) -> None:
        self.account = account
        self._disk = disk
        self._kept: dict[Key, Kept] = {}
        self._last: tuple[Key, Tensors] | None = None  # tensors of the last one whose are in slabs
        self._coming: tuple[Key, Callable[[], Any]] | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._kept or (self._disk is not None and key in self._disk)

    def put(
        self, key: Key, tensors: Tensors, level: int = 0, wait: Callable[[], Any] | None = None
    ) -> None:
        """Keep a checkpoint, at once on the disk with ``level`` 1.

        ``wait`` waits until the values are there.

        Raises
        ------
        CheckpointError
            If there is no room.
        """
        if self.account.limit < math.inf:
            self._make_room(tensors)
        if level:
            assert self._disk is not None
            self._disk.put(key, tensors)
            return
        kept = self._kept[key] = self.account.keep(tensors)
        if isinstance(kept, bytes):
            self._last = (key, tensors)
        if wait is not None:
            self._coming = (key, wait)

    def peek(self, key: Key) -> Tensors | None:
        """Return a checkpoint if it is in memory."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        kept = self._kept.get(key)
        return None if kept is None else self.account.tensors(kept)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint.

        Raises
        ------
        CheckpointError
            If there is none, or its file is damaged.
        """
        kept = self._kept.get(key)
        if kept is not None and not isinstance(kept, bytes):
            return kept
        found = self.peek(key)
        if found is not None:
            return found
        if self._disk is None or key not in self._disk:
            raise CheckpointError(f"there is no checkpoint {key!r}")
        return self._disk.get(key)

    def drop(self, key: Key) -> None:
        """Free a checkpoint."""
        if self._last is not None and self._last[0] == key:
            self._last = None
        if self._coming is not None and self._coming[0] == key:
            self._coming = None
        kept = self._kept.pop(key, None)
        if kept is None:
            assert self._disk is not None
            self._disk.drop(key)
        elif isinstance(kept, bytes):
            self.account.drop(kept)
        else:
            self.account.release(kept)

    def room(self) -> float:
        """Return how many bytes could be added, when all that can has moved to the disk."""
        return math.inf if self._disk is not None else self.account.limit - self.account.bytes

    def newest(self, key: Key) -> Key | None:
        """Return the newest checkpoint in memory beside one, None if there is none."""
        return next((other for other in reversed(self._kept) if other != key), None)

    def let_go(self, key: Key) -> None:
        """Let go of what was read of a checkpoint, if it is on the disk."""
        if self._disk is not None:
            self._disk.let_go(key)

    def close(self) -> None:
        """Free everything."""
        self._kept.clear()
        self._last = self._coming = None
        self.account.clear()

    def _make_room(self, tensors: Tensors) -> None:
        """Move the oldest checkpoints to disk until these fit into memory."""
        account, disk = self.account, self._disk
        account.free_graphs(tensors)
        # What is added grows when a checkpoint that shares tensors with this one moves.
        while account.bytes + account.added(tensors) > account.limit:
            if disk is not None and disk.settle():
                continue
            if disk is None or not self._kept:
                needed = account.bytes + account.added(tensors)
                remedy = ", or give disk= a folder" if disk is None else ""
                raise CheckpointError(
                    f"checkpoints need more than memory={account.limit}: raise it to {needed} "
                    f"bytes or more{remedy}"
                )
            self._move_oldest(disk)

    def _move_oldest(self, disk: Disk) -> None:
        key = next(iter(self._kept))
        if self._coming is not None and self._coming[0] == key:
            self._coming[1]()
        tensors = self.account.tensors(self._kept[key])
        disk.put(key, tensors)
        self.drop(key)

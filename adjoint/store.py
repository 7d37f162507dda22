"""Where checkpoints live: on the device first, then in memory, then on a disk.

Each is a level that puts, gets and drops checkpoints and knows its room, and that moves its oldest
to the one below: :mod:`pnode.adjoint.device`, :mod:`pnode.adjoint.memory`,
:mod:`pnode.adjoint.disk`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pnode.adjoint.accounts import Account, Graphs
from pnode.adjoint.device import Device
from pnode.adjoint.disk import Disk, DiskFolder, Key
from pnode.adjoint.memory import Memory
from pnode.adjoint.offload import DeviceLevel
from pnode.adjoint.slabs import Tensors
from pnode.base.ledger import Ledger

__all__ = ["CheckpointStore"]


class CheckpointStore:
    """Checkpoints by key, and graphs by step.

    Without a device level, tensors count as memory wherever they are.

    Parameters
    ----------
    ledger : Ledger
        Where the peaks are kept.
    limit : int or None
        Bytes in memory at any instant; None for no limit. Where there is a disk, the oldest
        checkpoints move there to make room; otherwise the limit is an error.
    folder : callable or None
        Makes the folder for the disk when it is needed: a :class:`DiskFolder`.
    device : DeviceLevel or None
        Of a state on a device.
    graphs_limit : float
        Bytes that graphs may hold besides, at most: what checkpoints leave of ``limit``. Not with a
        device level.

    Attributes
    ----------
    limited : bool
        Whether there is a limit, and so small things count.
    graphs : Graphs
        Of the last steps.
    hold, release : callable
        Count tensors, one that is held twice once, and stop counting them.
    """

    def __init__(
        self,
        ledger: Ledger,
        limit: int | None = None,
        folder: Callable[[], DiskFolder] | None = None,
        device: DeviceLevel | None = None,
        graphs_limit: float = math.inf,
    ) -> None:
        # Pinned memory, which a device copies to and from, is not for slabs.
        self._ram = Account(
            ledger, "ram_bytes", math.inf if limit is None else limit,
            Graphs(ledger, graphs_limit), slabs=limit is not None and device is None,
        )  # fmt: skip
        self._disk = None if folder is None else Disk(ledger, self._ram, folder)
        memory = Memory(self._ram, self._disk)
        self.limited = limit is not None
        self.graphs = self._ram.graphs
        self._top: Memory | Device = memory
        holder: Account | Device = self._ram
        if device is not None:
            self._top = holder = Device(ledger, device, memory)
        self.hold: Callable[[Tensors], object] = holder.hold
        self.release: Callable[[Tensors], object] = holder.release

    def __contains__(self, key: Key) -> bool:
        return key in self._top

    @property
    def at_hand(self) -> bool:
        """Whether all checkpoints are in memory."""
        return self._disk is None and isinstance(self._top, Memory)

    def put(self, key: Key, tensors: Tensors, level: int = 0) -> None:
        """Keep a checkpoint; at once on the disk with ``level`` 1.

        Raises
        ------
        CheckpointError
            If there is no room.
        """
        self._top.put(key, tensors, level)

    def adopt(self, key: Key, size: int) -> None:
        """Take a file that is in the folder as the checkpoint ``key``."""
        assert self._disk is not None
        self._disk.adopt(key, size)

    def peek(self, key: Key) -> Tensors | None:
        """Return a checkpoint if it is in memory, or on the device where that is a level."""
        return self._top.peek(key)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint.

        Raises
        ------
        CheckpointError
            If there is none, or its file is damaged.
        """
        return self._top.get(key)

    def discard(self, key: Key) -> None:
        """Free a checkpoint."""
        self._top.drop(key)

    def keep_graphs(self, step: int, graphs: Any, size: int) -> bool:
        """Keep the graphs of a step, ``size`` bytes, if there is room when older ones go.

        Returns
        -------
        bool
            Whether there was.
        """
        self.graphs.free(size - self._ram.graphs_room())
        if self._ram.graphs_room() < size:
            return False
        self.graphs.put(step, graphs, size)
        return True

    def could_keep(self, size: float) -> bool:
        """Whether there is room for graphs of so many bytes when all others go."""
        return self._ram.graphs_room() + self.graphs.bytes >= size

    def most_graphs(self, size: int) -> int:
        """Return how many steps with graphs of ``size`` bytes there is room for at most."""
        return self._ram.most_graphs(size)

    def leave(self) -> None:
        """Finish what is being written, and let go of the folder as it is."""
        if self._disk is not None:
            self._disk.leave()

    def close(self) -> None:
        """Free everything, and remove the folder."""
        self._top.close()
        if self._disk is not None:
            self._disk.close()

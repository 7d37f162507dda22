"""Where checkpoints live: on the device first, then in memory, then on a disk.

Files are written and read by a thread while the sweep goes on; see :mod:`pnode.adjoint.disk`.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pnode.adjoint.disk import DiskFolder, Tensors
from pnode.adjoint.offload import DeviceLevel, Transfer
from pnode.errors import CheckpointError
from pnode.solution import Ledger

__all__ = ["CheckpointStore"]

#: Kind of a checkpoint and the step it belongs to.
Key = tuple[str, int]


class CheckpointStore:
    """Checkpoints by key, in memory (level 0) or on disk (level 1), or on a device before that.

    A disk checkpoint is written by a thread, one at a time; until it is written its tensors count
    as memory. One that was read counts as memory until it is discarded; the file before it is read
    ahead if there is room.

    With a device level, checkpoints of tensors there stay as long as there is room, the oldest move
    to memory, and are copied back when they are wanted. Both copies run beside the computation, one
    at a time each way; while it lasts, a checkpoint counts on both sides. Without one, tensors
    count as memory wherever they are.

    Parameters
    ----------
    ledger : Ledger
        Where the peaks are kept.
    limit : int or None
        Bytes in memory at any instant; None for no limit. Where there is a disk, the oldest
        checkpoints move there to make room; otherwise the limit is an error.
    folder : callable or None
        Makes the folder for level 1 when it is needed: a :class:`DiskFolder`.
    device : DeviceLevel or None
        Of a state on a device.
    tape_limit : float
        Bytes that graphs may hold besides, at most: what checkpoints leave of ``limit``. Not with a
        device level.
    """

    def __init__(
        self,
        ledger: Ledger,
        limit: int | None = None,
        folder: Callable[[], DiskFolder] | None = None,
        device: DeviceLevel | None = None,
        tape_limit: float = math.inf,
    ) -> None:
        self._ledger = ledger
        self._limit = math.inf if limit is None else limit
        self._create_folder = folder
        self._folder: DiskFolder | None = None
        self._memory: dict[Key, Tensors] = {}
        self._files: dict[Key, tuple[str, int]] = {}
        self._holders: Counter[int] = Counter()
        self._ram_bytes = self._disk_bytes = 0
        self._loaded: dict[Key, Tensors] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._process = os.getpid()  # the thread's
        self._writing: tuple[Key, Future[None], Tensors] | None = None
        self._reading: tuple[Key, Future[Tensors], int] | None = None
        self._tapes: dict[int, tuple[Any, int]] = {}
        self._tape_limit = tape_limit
        self._tape_bytes = 0
        self._level = device
        self._device_bytes = 0
        self._device: dict[Key, Tensors] = {}
        self._leaving: tuple[Key, Transfer, Tensors] | None = None
        self._arriving: tuple[Key, Transfer, int] | None = None
        self._back: tuple[Key, Tensors] | None = None  # the last one that was copied back
        self._twins: dict[int, torch.Tensor] = {}  # copies of tensors that others still hold
        self._masks: dict[Key, list[bool]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._device or key in self._memory or key in self._files

    def put(self, key: Key, tensors: Tensors, level: int = 0) -> None:
        """Keep a checkpoint.

        Raises
        ------
        CheckpointError
            If there is no room.
        """
        if self._level is not None and any(map(self._on_device, tensors)):
            self._put_on_device(key, tensors)
            return
        self._make_room(tensors)
        self.hold(tensors)
        if level == 0:
            self._memory[key] = tensors
        else:
            self._write(key, tensors)

    def adopt(self, key: Key, name: str, size: int) -> None:
        """Take a file that is in the folder as the checkpoint ``key``."""
        if self._folder is None:
            assert self._create_folder is not None
            self._folder = self._create_folder()
        self._files[key] = (name, size)
        self._disk_bytes += size
        self._ledger.disk_bytes = max(self._ledger.disk_bytes, self._disk_bytes)

    def keep_tape(self, step: int, tape: Any, size: int) -> bool:
        """Keep the graphs of a step, ``size`` bytes, if there is room when older ones go.

        Returns
        -------
        bool
            Whether there was.
        """
        self._drop_tapes(size, self._tape_room)
        if self._tape_room() < size:
            return False
        self._tapes[step] = (tape, size)
        self._tape_bytes += size
        self._ledger.tape_bytes = max(self._ledger.tape_bytes, self._tape_bytes)
        return True

    def most_tapes(self, size: int) -> int:
        """Return how many steps with graphs of ``size`` bytes there is room for at most."""
        most = min(self._limit, self._tape_limit) / max(1, size)
        return sys.maxsize if math.isinf(most) else int(most)

    def tape(self, step: int) -> Any:
        """Return the graphs of a step, None if they are not kept."""
        return self._tapes.get(step, (None, 0))[0]

    def discard_tape(self, step: int) -> None:
        """Free the graphs of a step, if they are kept."""
        self._tape_bytes -= self._tapes.pop(step, (None, 0))[1]

    def _room(self) -> float:
        """Return how many bytes could be added in memory."""
        return self._limit - self._ram_bytes - self._tape_bytes

    def _tape_room(self) -> float:
        """Return how many bytes of graphs could be added."""
        return min(self._room(), self._tape_limit - self._tape_bytes)

    def _drop_tapes(self, size: int, room: Callable[[], float]) -> None:
        """Free the graphs of the earliest steps until ``size`` bytes more fit, or none is left."""
        while self._tapes and room() < size:
            self.discard_tape(next(iter(self._tapes)))

    def peek(self, key: Key) -> Tensors | None:
        """Return a checkpoint if it is in memory, or on the device where that is a level."""
        return (self._memory if self._level is None else self._device).get(key)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint.

        Raises
        ------
        CheckpointError
            If there is none, or its file is damaged.
        """
        if key in self._device:
            return self._device[key]
        return self._get(key) if self._level is None else self._bring_back(key)

    def _get(self, key: Key) -> Tensors:
        """Return a checkpoint in memory or on disk."""
        if key in self._memory:
            return self._memory[key]
        if key in self._loaded:
            return self._loaded[key]
        if key not in self._files:
            raise CheckpointError(f"there is no checkpoint {key!r}")
        if self._writing is not None and self._writing[0] == key:
            return self._writing[2]
        if self._reading is not None and self._reading[0] == key:
            tensors = self._finish_reading()
        else:
            assert self._folder is not None
            tensors = self._folder.read(self._files[key][0])
        self.hold(tensors)
        self._loaded[key] = tensors
        self._read_ahead(key)
        return tensors

    def discard(self, key: Key) -> None:
        """Free a checkpoint."""
        if key in self._device:
            self.release(self._device.pop(key))
            return
        if self._leaving is not None and self._leaving[0] == key:
            self._finish_leaving()
        if self._arriving is not None and self._arriving[0] == key:
            self._forget_arriving()
        if self._back is not None and self._back[0] == key:
            self._forget_back()
        self._masks.pop(key, None)
        if key in self._memory:
            self.release(self._memory.pop(key))
            return
        if self._writing is not None and self._writing[0] == key:
            self._finish_writing()
        self.release(self._loaded.pop(key, ()))
        name, size = self._files.pop(key)
        self._disk_bytes -= size
        assert self._folder is not None
        self._submit(self._folder.remove, name)

    def hold(self, tensors: Tensors) -> None:
        """Count tensors as memory; one that is held twice counts once."""
        if self._tapes:
            self._drop_tapes(self._added(tensors), self._room)
        if self._level is not None and self._device_added(tensors):
            self._make_device_room(lambda: self._device_added(tensors))
        holders = self._holders
        new = [tensor for tensor in tensors if not holders[id(tensor)]]
        self._count(dict.fromkeys(new), 1)
        for tensor in tensors:
            holders[id(tensor)] += 1

    def _count(self, tensors: Iterable[torch.Tensor], sign: int) -> None:
        """Count bytes where tensors are."""
        ledger = self._ledger
        if self._level is None:
            self._ram_bytes += sign * sum([tensor.nbytes for tensor in tensors])
        else:
            for tensor in tensors:
                if self._on_device(tensor):
                    self._device_bytes += sign * tensor.nbytes
                else:
                    self._ram_bytes += sign * tensor.nbytes
            ledger.device_bytes = max(ledger.device_bytes, self._device_bytes)
        ledger.ram_bytes = max(ledger.ram_bytes, self._ram_bytes)

    def _on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor counts as memory of the device."""
        return self._level is not None and self._level.offload.resident(tensor)

    def release(self, tensors: Tensors) -> None:
        """Stop counting them."""
        holders, gone = self._holders, []
        for tensor in tensors:
            holders[id(tensor)] -= 1
            if not holders[id(tensor)]:
                del holders[id(tensor)]
                self._twins.pop(id(tensor), None)
                gone.append(tensor)
        self._count(gone, -1)

    def leave(self) -> None:
        """Finish what is being written, and let go of the folder as it is."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._folder = None

    def close(self) -> None:
        """Free everything, and remove the folder."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._memory.clear()
        self._files.clear()
        self._loaded.clear()
        self._holders.clear()
        self._tapes.clear()
        self._ram_bytes = self._disk_bytes = self._device_bytes = self._tape_bytes = 0
        self._writing = self._reading = None
        self._device.clear()
        self._twins.clear()
        self._masks.clear()
        self._leaving = self._arriving = self._back = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _make_room(self, tensors: Tensors) -> None:
        """Move the oldest checkpoints to disk until these fit into memory."""
        if self._limit == math.inf:
            return
        self._drop_tapes(self._added(tensors), self._room)
        # What is added grows when a checkpoint that shares tensors with this one moves.
        while self._ram_bytes + self._added(tensors) > self._limit:
            if self._reading is not None:
                self._finish_reading()
            elif self._writing is not None:
                self._finish_writing()
            elif self._create_folder is not None and self._memory:
                key = next(iter(self._memory))
                self._write(key, self._memory.pop(key))
            else:
                disk = ", or give disk= a folder" if self._create_folder is None else ""
                raise CheckpointError(
                    f"checkpoints need more than memory={self._limit}: raise it{disk}"
                )

    def _added(self, tensors: Tensors) -> int:
        """Return the bytes in memory of those tensors that are not held."""
        new = [tensor for tensor in tensors if id(tensor) not in self._holders]
        if self._level is not None:
            new = [tensor for tensor in new if not self._on_device(tensor)]
        return sum([tensor.nbytes for tensor in new])

    def _write(self, key: Key, tensors: Tensors) -> None:
        """Begin to write tensors that are held."""
        if self._leaving is not None and self._leaving[0] == key:
            self._finish_leaving()  # their values are there then
        self._finish_writing()
        if self._folder is None:
            assert self._create_folder is not None
            self._folder = self._create_folder()
        name = "-".join(map(str, key))
        size = sum([tensor.nbytes for tensor in tensors])
        self._files[key] = (name, size)
        self._disk_bytes += size
        self._ledger.disk_bytes = max(self._ledger.disk_bytes, self._disk_bytes)
        self._writing = (key, self._submit(self._folder.write, name, tensors), tensors)

    # ------------------------------------------------------------------------------ the device

    def _put_on_device(self, key: Key, tensors: Tensors) -> None:
        """Keep a checkpoint on the device, or in memory if it is the older ones that stay."""
        self._make_device_room(lambda: self._device_added(tensors))
        size, level = self._device_added(tensors), self._level
        assert level is not None
        if self._device_bytes + size <= level.limit:
            self.hold(tensors)
            self._device[key] = tensors
            # Room for the next one like this, while the next step is taken.
            if self._device_bytes + size > level.limit and self._leaving is None:
                self._move_oldest_off()
        elif self._fits_memory(size):
            mask, moving = self._moving(tensors)
            self._keep_copies(key, tensors, mask, level.offload.to_host(moving).wait())
        else:
            raise CheckpointError(
                f"checkpoints need more than device_memory={level.limit} and "
                f"memory={self._limit}: raise one of them"
            )

    def _make_device_room(self, added: Callable[[], int]) -> None:
        """Move the oldest checkpoints off the device until so many bytes more fit, if they can."""
        assert self._level is not None
        limit = self._level.limit
        while self._device_bytes + added() > limit:
            if self._arriving is not None:
                self._forget_arriving()
            elif self._leaving is not None:
                self._finish_leaving()
            elif self._back is not None:
                self._forget_back()
            elif not self._leaves_room(self._device_bytes + added() - limit):
                return
            else:
                self._move_oldest_off()

    def _leaves_room(self, excess: int) -> bool:
        """Whether the oldest checkpoints on the device, of so many bytes, fit into memory."""
        found = 0
        for tensors in self._device.values():
            found += sum([tensor.nbytes for tensor in self._moving(tensors)[1]])
            if found >= excess:
                break
        return bool(self._device) and self._fits_memory(found)

    def _fits_memory(self, size: int) -> bool:
        return self._create_folder is not None or self._ram_bytes + size <= self._limit

    def _device_added(self, tensors: Tensors) -> int:
        """Return the bytes on the device of those tensors that are not held."""
        new = [tensor for tensor in tensors if id(tensor) not in self._holders]
        return sum([tensor.nbytes for tensor in new if self._on_device(tensor)])

    def _moving(self, tensors: Tensors) -> tuple[list[bool], list[torch.Tensor]]:
        """Return which tensors are on the device, and those of them that have no copy yet."""
        mask = [self._on_device(tensor) for tensor in tensors]
        pairs = zip(tensors, mask, strict=True)
        return mask, [tensor for tensor, there in pairs if there and id(tensor) not in self._twins]

    def _move_oldest_off(self) -> None:
        """Begin to copy the oldest checkpoint on the device to memory, if there is room."""
        assert self._level is not None
        key, tensors = next(iter(self._device.items()))
        mask, moving = self._moving(tensors)
        if not self._fits_memory(sum([tensor.nbytes for tensor in moving])):
            return
        transfer = self._level.offload.to_host(moving)
        del self._device[key]
        self._keep_copies(key, tensors, mask, transfer.tensors)
        self._leaving = (key, transfer, tensors)

    def _keep_copies(self, key: Key, tensors: Tensors, mask: list[bool], copies: Tensors) -> None:
        """Keep a checkpoint in memory, from copies of those tensors that are on the device."""
        _, moving = self._moving(tensors)
        self._twins |= {id(a): b for a, b in zip(moving, copies, strict=True)}
        own = tuple(
            self._twins[id(tensor)] if there else tensor
            for tensor, there in zip(tensors, mask, strict=True)
        )
        for tensor in moving:  # a copy serves others as long as the tensor is held
            if id(tensor) not in self._holders:
                del self._twins[id(tensor)]
        self._make_room(own)
        self.hold(own)
        self._masks[key] = mask
        self._memory[key] = own

    def _finish_leaving(self) -> None:
        """Wait until the checkpoint that leaves the device has left."""
        assert self._leaving is not None
        _, transfer, tensors = self._leaving
        self._leaving = None
        transfer.wait()
        self.release(tensors)

    def _bring_back(self, key: Key) -> Tensors:
        """Return a checkpoint on the device, from memory or disk."""
        if self._back is not None and self._back[0] == key:
            return self._back[1]
        self._forget_back()
        if self._leaving is not None and self._leaving[0] == key:
            self._finish_leaving()
        if self._arriving is not None and self._arriving[0] == key:
            _, transfer, size = self._arriving
            self._arriving = None
            self._device_bytes -= size
        else:
            size = self._moved_size(self._get(key), key)
            self._make_device_room(lambda: size)
            transfer = self._begin_arriving(key)
        tensors = transfer.wait()
        self.hold(tensors)
        self._back = (key, tensors)
        others = (other for other in reversed(self._memory) if other != key)
        following = next(others, None)
        if following is not None and self._arriving is None and self._leaving is None:
            size = self._moved_size(self._memory[following], following)
            assert self._level is not None
            if self._device_bytes + size <= self._level.limit:
                self._arriving = (following, self._begin_arriving(following), size)
                self._device_bytes += size
                self._ledger.device_bytes = max(self._ledger.device_bytes, self._device_bytes)
        return tensors

    def _begin_arriving(self, key: Key) -> Transfer:
        """Begin to copy a checkpoint to the device."""
        assert self._level is not None
        source = self._get(key)
        mask = self._masks.get(key, [True] * len(source))
        moving = [tensor for tensor, there in zip(source, mask, strict=True) if there]
        transfer = self._level.offload.to_device(moving)

        def finish() -> None:
            transfer.wait()
            self.release(self._loaded.pop(key, ()))

        copies = iter(transfer.tensors)
        return Transfer(
            tuple(
                next(copies) if there else tensor
                for tensor, there in zip(source, mask, strict=True)
            ),
            finish,
        )

    def _moved_size(self, tensors: Tensors, key: Key) -> int:
        mask = self._masks.get(key, [True] * len(tensors))
        return sum([t.nbytes for t, there in zip(tensors, mask, strict=True) if there])

    def _forget_arriving(self) -> None:
        """Let go of what was copied to the device in advance."""
        assert self._arriving is not None
        _, transfer, size = self._arriving
        self._arriving = None
        transfer.wait()
        self._device_bytes -= size

    def _forget_back(self) -> None:
        """Let go of the last checkpoint that was copied back; memory or disk still has it."""
        if self._back is not None:
            self.release(self._back[1])
            self._back = None

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pnode-checkpoints")
            self._process = os.getpid()
        self._check_process()
        return self._thread.submit(function, *arguments)

    def _check_process(self) -> None:
        """Refuse to wait for a thread that a fork has not got."""
        if self._process != os.getpid():
            raise CheckpointError(
                "these checkpoints on disk belong to the process that this one was forked from: "
                "solve again in this process"
            )

    def _finish_writing(self) -> None:
        """Wait for the write in flight; its failure, if any, is raised here."""
        if self._writing is not None:
            self._check_process()
            _, future, tensors = self._writing
            self._writing = None
            self.release(tensors)
            future.result()

    def _read_ahead(self, key: Key) -> None:
        """Begin to read the newest other file, if it fits into memory."""
        others = (other for other in reversed(self._files) if other != key)
        following = next(others, None)
        if following is None or self._reading is not None or self._writing is not None:
            return
        name, size = self._files[following]
        if size <= self._room():
            assert self._folder is not None
            self._ram_bytes += size
            self._ledger.ram_bytes = max(self._ledger.ram_bytes, self._ram_bytes)
            self._reading = (following, self._submit(self._folder.read, name), size)

    def _finish_reading(self) -> Tensors:
        assert self._reading is not None
        self._check_process()
        _, future, size = self._reading
        self._reading = None
        self._ram_bytes -= size
        return future.result()

"""Where checkpoints live: memory first, then a disk.

A disk checkpoint is one file: a JSON header (shapes, dtypes, lengths, checksum), a newline, and the
tensors' bytes. Plain files need no library, can be written by a thread while the sweep goes on
(h5py holds the interpreter lock through its own), and one damaged file names itself.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pnode.errors import CheckpointError, ConfigurationError
from pnode.solution import Ledger

__all__ = ["CheckpointStore", "DiskFolder", "Tensors"]

Tensors = tuple[torch.Tensor, ...]
#: Kind of a checkpoint and the step it belongs to.
Key = tuple[str, int]

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.int64)}


class DiskFolder:
    """A private folder of checkpoint files.

    Parameters
    ----------
    scratch : str or path
        An existing folder, which other processes may use at the same time.

    Raises
    ------
    ConfigurationError
        If it is not a folder, or cannot be written to.

    Notes
    -----
    The folder is removed by :meth:`close`, when the object is collected, and at interpreter exit;
    a killed process leaves it behind (its name has the process id).
    """

    def __init__(self, scratch: str | os.PathLike[str]) -> None:
        try:
            name = tempfile.mkdtemp(prefix=f"pnode-{os.getpid()}-", dir=scratch)
        except (OSError, TypeError) as error:
            raise ConfigurationError(
                f"disk={scratch!r} cannot be written to ({error}): give an existing folder with "
                "room, such as a node's scratch space"
            ) from error
        self.path = Path(name).absolute()
        self._finalizer = weakref.finalize(self, _remove_tree, self.path, os.getpid())

    def close(self) -> None:
        """Remove the folder and everything in it."""
        self._finalizer()

    def write(self, name: str, tensors: Tensors) -> None:
        """Write a checkpoint; the file appears whole or not at all.

        Raises
        ------
        CheckpointError
            If the disk is full or the file cannot be written.
        """
        path, partial = self.path / name, self.path / f"{name}.partial"
        arrays = [tensor.detach().contiguous().cpu().numpy() for tensor in tensors]
        checksum = 0
        for array in arrays:
            checksum = zlib.crc32(array.data.cast("B") if array.size else b"", checksum)
        header = {
            "name": name,
            "tensors": [[str(t.dtype), list(t.shape)] for t in tensors],
            "checksum": checksum,
        }
        try:
            with partial.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for array in arrays:
                    if array.size:
                        file.write(array.data.cast("B"))
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"the checkpoint {path} could not be written ({error}): give disk= a folder with "
                "more room, or raise memory="
            ) from error

    def read(self, name: str) -> Tensors:
        """Read a checkpoint back.

        Raises
        ------
        CheckpointError
            If the file is missing, truncated or damaged.
        """
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"the checkpoint {path} cannot be read ({error})") from error
        line, _, body = data.partition(b"\n")
        try:
            header = json.loads(line)
            if header["name"] != name:
                raise ValueError("name")
            tensors, offset = [], 0
            for dtype_name, shape in header["tensors"]:
                dtype = _DTYPES[dtype_name]
                count = torch.Size(shape).numel()
                size = count * dtype.itemsize
                part = bytearray(body[offset : offset + size])
                if len(part) != size:
                    raise ValueError("length")
                tensors.append(
                    torch.frombuffer(part, dtype=dtype).view(shape)
                    if count
                    else torch.empty(shape, dtype=dtype)
                )
                offset += size
            if offset != len(body) or zlib.crc32(body) != header["checksum"]:
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged: its contents do not match its checksum"
            ) from error
        return tuple(tensors)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, if it is there."""
        (self.path / name).unlink(missing_ok=True)


class CheckpointStore:
    """Checkpoints by key, in memory (level 0) or on disk (level 1).

    A disk checkpoint is written by a thread, one at a time; until it is written its tensors count
    as memory. One that was read counts as memory until it is discarded; the file before it is read
    ahead if there is room.

    Parameters
    ----------
    ledger : Ledger
        Where the peaks are kept.
    limit : int or None
        Bytes in memory at any instant; None for no limit. Where there is a disk, the oldest
        checkpoints move there to make room; otherwise the limit is an error.
    folder : callable or None
        Makes the folder for level 1 when it is needed: a :class:`DiskFolder`.
    tape_limit : float
        Bytes that graphs may hold besides, at most: what checkpoints leave of ``limit``.
    """

    def __init__(
        self,
        ledger: Ledger,
        limit: int | None = None,
        folder: Callable[[], DiskFolder] | None = None,
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

    def __contains__(self, key: Key) -> bool:
        return key in self._memory or key in self._files

    def put(self, key: Key, tensors: Tensors, level: int = 0) -> None:
        """Keep a checkpoint.

        Raises
        ------
        CheckpointError
            If there is no room.
        """
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
        """Return how many bytes could be added."""
        return self._limit - self._ram_bytes - self._tape_bytes

    def _tape_room(self) -> float:
        """Return how many bytes of graphs could be added."""
        return min(self._room(), self._tape_limit - self._tape_bytes)

    def _drop_tapes(self, size: int, room: Callable[[], float]) -> None:
        """Free the graphs of the earliest steps until ``size`` bytes more fit, or none is left."""
        while self._tapes and room() < size:
            self.discard_tape(next(iter(self._tapes)))

    def peek(self, key: Key) -> Tensors | None:
        """Return a checkpoint if it is in memory."""
        return self._memory.get(key)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint.

        Raises
        ------
        CheckpointError
            If there is none, or its file is damaged.
        """
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
        holders = self._holders
        for tensor in tensors:
            if not holders[id(tensor)]:
                self._ram_bytes += tensor.nbytes
            holders[id(tensor)] += 1
        self._ledger.ram_bytes = max(self._ledger.ram_bytes, self._ram_bytes)

    def release(self, tensors: Tensors) -> None:
        """Stop counting them."""
        holders = self._holders
        for tensor in tensors:
            holders[id(tensor)] -= 1
            if not holders[id(tensor)]:
                del holders[id(tensor)]
                self._ram_bytes -= tensor.nbytes

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
        self._ram_bytes = self._disk_bytes = self._tape_bytes = 0
        self._writing = self._reading = None
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
        """Return the bytes of those tensors that are not held."""
        return sum([tensor.nbytes for tensor in tensors if id(tensor) not in self._holders])

    def _write(self, key: Key, tensors: Tensors) -> None:
        """Begin to write tensors that are held."""
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


def _remove_tree(path: Path, process: int) -> None:
    """Remove a folder, unless this is a fork of the process that owns it."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)

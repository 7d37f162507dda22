"""Checkpoints in files of a private folder, written and read by a thread beside the computation.

A checkpoint is one file: the checksum of all that follows, a JSON header (name, shapes, dtypes), a
newline, and the tensors' bytes. Plain files need no library, can be written by a thread while the
sweep goes on (h5py holds the interpreter lock through its own), and one damaged file names itself.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pnode.adjoint.accounts import Account
from pnode.adjoint.slabs import Tensors
from pnode.base import private_files
from pnode.base.errors import CheckpointError, ConfigurationError
from pnode.base.ledger import Ledger

__all__ = ["Disk", "DiskFolder", "Key"]

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
    a killed process leaves it behind (its name has the process id). Folder and files are for this
    user alone.
    """

    #: Begins the name that a file has in its header.
    _label = ""
    #: Whether what is read must be this user's (a new folder's files are; not by every server).
    _own = False
    _remedy = "solve again"

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
        path = self.path / name
        arrays = [tensor.detach().contiguous().cpu().numpy() for tensor in tensors]
        header = json.dumps(
            {
                "name": self._label + name,
                "tensors": [[str(t.dtype), list(t.shape)] for t in tensors],
            }
        )
        parts = [array.data.cast("B") for array in arrays if array.size]
        first = f" {header}\n".encode()
        checksum = zlib.crc32(first)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        try:
            private_files.write(
                path, (f"{checksum:08x}".encode(), first, *parts),
                self.path / f"{name}.partial", sync=False,
            )  # fmt: skip
        except OSError as error:
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
            data = private_files.read(path, self._own)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be read ({error}): {self._remedy}"
            ) from error
        try:
            return _parse(data, self._label + name)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged: its contents do not match its checksum "
                f"({error}); {self._remedy}"
            ) from error

    def remove(self, name: str) -> None:
        """Remove a checkpoint, if it is there."""
        with suppress(OSError):  # the folder goes in the end
            (self.path / name).unlink(missing_ok=True)


class Disk:
    """Checkpoints by key in files.

    One is written at a time; until it is written its tensors count as memory. One that was read
    counts as memory until it is dropped; the file before it is read ahead if there is room.

    Parameters
    ----------
    ledger : Ledger
        Where the peak is kept.
    account : Account
        What counts as memory.
    create_folder : callable
        Makes the folder when it is needed.
    """

    def __init__(
        self, ledger: Ledger, account: Account, create_folder: Callable[[], DiskFolder]
    ) -> None:
        self._ledger = ledger
        self._account = account
        self._create_folder = create_folder
        self._folder: DiskFolder | None = None
        self._bytes = 0
        self._sizes: dict[Key, int] = {}
        self._loaded: dict[Key, Tensors] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._process = os.getpid()  # the thread's
        self._writing: tuple[Key, Future[None], Tensors] | None = None
        self._reading: tuple[Key, Future[Tensors], int] | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._sizes

    def put(self, key: Key, tensors: Tensors) -> None:
        """Begin to write a checkpoint, when the one before is written."""
        self._finish_writing()
        self.adopt(key, sum([tensor.nbytes for tensor in tensors]))
        self._account.hold(tensors)
        self._writing = (key, self._submit(self._opened().write, _name(key), tensors), tensors)

    def adopt(self, key: Key, size: int) -> None:
        """Take a file that is in the folder, or will be, as the checkpoint ``key``."""
        self._opened()
        self._sizes[key] = size
        self._bytes += size
        self._ledger.disk_bytes = max(self._ledger.disk_bytes, self._bytes)

    def get(self, key: Key) -> Tensors:
        """Return a checkpoint.

        Raises
        ------
        CheckpointError
            If its file is damaged.
        """
        if key in self._loaded:
            return self._loaded[key]
        if self._writing is not None and self._writing[0] == key:
            return self._writing[2]
        if self._reading is not None and self._reading[0] == key:
            tensors = self._finish_reading()
        else:
            tensors = self._opened().read(_name(key))
        self._account.hold(tensors)
        self._loaded[key] = tensors
        self._read_ahead(key)
        return tensors

    def drop(self, key: Key) -> None:
        """Free a checkpoint."""
        if self._writing is not None and self._writing[0] == key:
            self._finish_writing()
        self.let_go(key)
        self._bytes -= self._sizes.pop(key)
        self._submit(self._opened().remove, _name(key))

    def let_go(self, key: Key) -> None:
        """Let go of what was read of a checkpoint."""
        self._account.release(self._loaded.pop(key, ()))

    def settle(self) -> bool:
        """Wait for something that takes memory on its way, and return whether there was any."""
        if self._reading is not None:
            self._finish_reading()
        elif self._writing is not None:
            self._finish_writing()
        else:
            return False
        return True

    def leave(self) -> None:
        """Finish what is being written, and let go of the folder as it is."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._folder = None

    def close(self) -> None:
        """Free everything, and remove the folder."""
        folder = self._folder
        self.leave()
        self._sizes.clear()
        self._loaded.clear()
        self._bytes = 0
        self._writing = self._reading = None
        if folder is not None:
            folder.close()

    def _opened(self) -> DiskFolder:
        if self._folder is None:
            self._folder = self._create_folder()
        return self._folder

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
            self._account.release(tensors)
            future.result()

    def _read_ahead(self, key: Key) -> None:
        """Begin to read the newest other file, if it fits into memory."""
        others = (other for other in reversed(self._sizes) if other != key)
        following = next(others, None)
        if following is None or self._reading is not None or self._writing is not None:
            return
        size = self._sizes[following]
        if size <= self._account.room():
            self._account.count(size)
            future = self._submit(self._opened().read, _name(following))
            self._reading = (following, future, size)

    def _finish_reading(self) -> Tensors:
        assert self._reading is not None
        self._check_process()
        _, future, size = self._reading
        self._reading = None
        self._account.count(-size)
        return future.result()


def _name(key: Key) -> str:
    """Return the name of a checkpoint's file."""
    return "-".join(map(str, key))


def _parse(data: bytes, name: str) -> Tensors:
    """Return the tensors in a file, whose checksum says that it is as it was written."""
    if int(data[:8], 16) != zlib.crc32(memoryview(data)[8:]):
        raise ValueError("checksum")
    line, _, body = data[8:].partition(b"\n")
    header = json.loads(line)
    if header["name"] != name:
        raise ValueError(f"it is {header['name']!r}")
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
            else torch.empty(shape, dtype=dtype, device="cpu")
        )
        offset += size
    if offset != len(body):
        raise ValueError("length")
    return tuple(tensors)


def _remove_tree(path: Path, process: int) -> None:
    """Remove a folder, unless this is a fork of the process that owns it."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)

"""The lock of a folder that serves one solve at a time.

flock, which the system takes away with the process: no stale lock is left by a kill, process
numbers do not matter (each container counts its own), and file systems that serve several hosts
pass it on (NFS, GPFS, CephFS; Lustre mounted with ``flock``). The holder also writes who it is, for
messages, and so that it notices if another one holds the lock all the same (Lustre with
``localflock``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from pnode.base import private_files
from pnode.base.errors import CheckpointError

__all__ = ["FolderLock"]

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """A lock that is held until :meth:`release`, or the end of the process.

    Parameters
    ----------
    path : Path
        The lock's file; stays where it is.

    Attributes
    ----------
    process : int
        The holder.

    Raises
    ------
    CheckpointError
        If another solve holds it, it is not this user's file, or the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = os.getpid()
        holder = {
            "process": self.process, "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "token": secrets.token_hex(8),
        }  # fmt: skip
        self._content = json.dumps(holder).encode()
        file = self._open()
        while not _is_there(path, file):  # the holder has removed it meanwhile
            os.close(file)
            file = self._open()
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, self._content, 0)
        except OSError as error:
            os.close(file)
            raise CheckpointError(
                f"{path} could not be written ({error}): make room in disk=, or choose another "
                "folder"
            ) from error
        self._file: int | None = file
        _held.add(self)

    def _open(self) -> int:
        """Return a descriptor that has the lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            private_files.check_open_file(self.path, file)
            if os.fstat(file).st_nlink > 1:
                raise private_files.NotPrivate(f"{self.path} is another file, too")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except private_files.NotPrivate as error:
            os.close(file)
            raise self._unusable(error) from error
        except OSError as error:
            holder = _holder(file)
            os.close(file)
            if error.errno in _TAKEN:
                raise CheckpointError(
                    f"the folder {self.path.parent} is in use by {holder}: a resume= name serves "
                    "one solve at a time, until its gradient has been taken"
                ) from None
            raise CheckpointError(
                f"{self.path} cannot be locked ({error}): without locks on this file system two "
                "solves could use the folder at once; choose a disk= folder on one that has them"
            ) from error
        return file

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be used ({error}): remove the folder {self.path.parent} to begin "
            "anew"
        )

    def is_held(self) -> bool:
        """Whether the file is still there, and nobody else has written into it."""
        try:
            return self._file is not None and private_files.read(self.path) == self._content
        except OSError:
            return False

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        _held.discard(self)


def _is_there(path: Path, file: int) -> bool:
    """Whether an open file is the one of this name."""
    own = os.fstat(file)
    with suppress(OSError):
        found = path.lstat()
        return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
    return False


def _holder(file: int) -> str:
    """Return who holds the lock, as far as the file says."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


def _close_in_child() -> None:
    """Give up a fork's copies, which would hold the locks when the solve's process is gone."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)

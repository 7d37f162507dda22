"""Files that nobody else may have put there: own ones, regular, reached through no link.

What is read back decides what a solve computes, or is run as machine code; what is written must not
end up in the target of somebody's link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["NotPrivate", "check_folder", "check_open_file", "make_folder", "read", "write"]

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would wait for its other end
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotPrivate(OSError):
    """A file or folder that others can have put there."""


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, unless there is one, and check it.

    Raises
    ------
    OSError
        If it cannot be made; :class:`NotPrivate` from :func:`check_folder`.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask is
    check_folder(path)


def check_folder(path: Path) -> None:
    """Refuse what is not a folder of this user that nobody else can write to."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise NotPrivate(f"{path} is {kind}, not a folder")
    _check_owner(path, found)


def check_open_file(path: Path, file: int) -> None:
    """Refuse what is not a regular file of this user that nobody else can write to."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise NotPrivate(f"{path} is not a regular file")
    _check_owner(path, found)


def _check_owner(path: Path, found: os.stat_result) -> None:
    own = os.geteuid()
    if found.st_uid != own:
        raise NotPrivate(f"{path} belongs to user {found.st_uid}, and this process to {own}")
    if found.st_mode & _WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        raise NotPrivate(f"{path} can be written to by others (mode {mode:04o})")


def read(path: Path, check: bool = True) -> bytes:
    """Return the contents of a regular file of this user's.

    Raises
    ------
    OSError
        If there is none; :class:`NotPrivate` if it is not this user's alone (with ``check``).
    """
    file = os.open(path, os.O_RDONLY | _SAFE)
    with os.fdopen(file, "rb") as stream:
        if check:
            check_open_file(path, file)
        elif not stat.S_ISREG(os.fstat(file).st_mode):
            raise NotPrivate(f"{path} is not a regular file")
        return stream.read()


def write(path: Path, parts: Iterable[bytes | memoryview], partial: Path, sync: bool) -> None:
    """Write a file that appears whole or not at all, for this user alone.

    Parameters
    ----------
    path : Path
        The file; one that is there is replaced, a link too and not its target.
    parts : iterable of bytes
        Its contents.
    partial : Path
        Its name while it is written, on the same file system.
    sync : bool
        Whether it must not appear before its contents are on the disk.
    """
    try:
        with suppress(FileNotFoundError):  # left by a process that was killed
            partial.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
        with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
            for part in parts:
                file.write(part)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        with suppress(OSError):  # not every file system can
            _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

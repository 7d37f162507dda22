"""A private folder of checkpoint files.

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
from contextlib import suppress
from pathlib import Path

import torch

from pnode import private_files
from pnode.errors import CheckpointError, ConfigurationError

__all__ = ["DiskFolder", "Tensors"]

Tensors = tuple[torch.Tensor, ...]

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

"""Where compiled code is made, and what of it is not kept for ever.

Each new size, version and processor leaves files in the cache, which would grow with the years.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["INDUCTORS", "note_use", "workshop"]

#: Folder in the cache of what torch's inductor keeps.
INDUCTORS = ".inductor"
_BUILDING = ".building-"
_DAY = 86400.0  # seconds
_ABANDONED, _UNUSED = _DAY, 90 * _DAY  # a compilation takes minutes at most
# The folder may have been another's before: nothing that is called otherwise is touched.
_OWN = re.compile(r"[a-z-]*[0-9a-f]{32}\.(?:so|o|pt2)(?:\.lock)?")


@contextlib.contextmanager
def workshop(cache: Path) -> Iterator[Path]:
    """Lend a folder to build in."""
    _tidy(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_BUILDING) as folder:
        yield Path(folder)


def note_use(path: Path) -> None:
    """Let a file of the cache count as used now; once a day, as many processes may read it."""
    with contextlib.suppress(OSError):  # a cache may be read-only
        if _age(path) > _DAY:
            os.utime(path, follow_symlinks=False)


@functools.cache
def _tidy(cache: Path) -> None:
    """Remove folders of processes that were killed, and files that were not used for long.

    Others may be about to read one: they make it again.
    """
    for left in cache.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if _age(left) > _ABANDONED:
                shutil.rmtree(left)
    own = [path for path in cache.iterdir() if _OWN.fullmatch(path.name)]
    for folder, _, names in os.walk(cache / INDUCTORS):
        # A compiler may compare a header's date with that of what was made of it.
        own += [Path(folder, name) for name in names if not name.endswith(".h")]
    for path in own:
        with contextlib.suppress(OSError):
            if _age(path) > _UNUSED:
                path.unlink()


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime

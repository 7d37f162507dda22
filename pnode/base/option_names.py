"""Which PETSc options there are, to tell a misspelt one: the nearest is named."""

from __future__ import annotations

import ctypes
import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["is_known", "nearest"]

# Made up of parts in PETSc's library, of a package that this one lacks, or pnode's own.
_FURTHER = ("pc_python_type", "vec_type", "mat_type", "ts_monitor_solution_interval")
_OPTION = re.compile(rb"\0-([a-z][a-z0-9]*_[a-z0-9_]+)(?=\0)")


class _Place(ctypes.Structure):
    """Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p),
    )  # fmt: skip


def is_known(name: str, petsc: Any) -> bool:
    """Whether PETSc has an option of this name, maybe of an inner solver (``sub_pc_type``).

    True for all of them where its library cannot be read.
    """
    names = _names(petsc)
    parts = name.split("_")
    inner = ("_".join(parts[start:]) for start in range(len(parts) - 1))
    return not names or any(part in names for part in inner)


def nearest(name: str, petsc: Any) -> str:
    """Return ``: did you mean 'snes_rtol'?``, or nothing."""
    found = difflib.get_close_matches(name, sorted(_names(petsc)), 1)
    return f": did you mean {found[0]!r}?" if found else ""


@cache
def _names(petsc: Any) -> frozenset[str]:
    """Return the names of all options, which stand in PETSc's library as ``-name``."""
    try:
        place = _Place()
        function = ctypes.cast(ctypes.CDLL(petsc.__file__).TSCreate, ctypes.c_void_p)
        ctypes.CDLL(None).dladdr(function, ctypes.byref(place))
        found = _OPTION.findall(Path(place.file.decode()).read_bytes())
    except (OSError, AttributeError):
        return frozenset()
    return frozenset([*(name.decode() for name in found), *_FURTHER]) if found else frozenset()

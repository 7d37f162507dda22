"""Paths that users give for files."""

from __future__ import annotations

import os
from typing import Any

from pnode.base.errors import ConfigurationError

__all__ = ["path_of", "target_of"]


def path_of(path: Any) -> str:
    """Return the name of a file.

    Raises
    ------
    ConfigurationError
        If it is none.
    """
    try:
        return os.fsdecode(path)
    except TypeError:
        raise ConfigurationError(f"path={path!r}: give the name of a file, or a Path") from None


def target_of(path: Any) -> str:
    """Return the name of a file that can be written, which may be there already.

    Raises
    ------
    ConfigurationError
        If it is a folder, or there is no folder for it that one may write into.
    """
    name = path_of(path)
    folder = os.path.dirname(os.path.abspath(name))
    if os.path.isdir(name):
        raise ConfigurationError(f"path={name!r} is a folder: give the name of a file in it")
    if not os.path.isdir(folder):
        raise ConfigurationError(
            f"path={name!r}: there is no folder {folder!r}; make it first (os.makedirs)"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"path={name!r}: nothing may be written into {folder!r}")
    return name

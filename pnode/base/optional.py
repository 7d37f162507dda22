"""Packages that pnode can do without: imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from pnode.base.errors import MissingPackage

__all__ = ["need"]


def need(module: str, extra: str, purpose: str) -> Any:
    """Import a package, or say how to install it. Not collective.

    Parameters
    ----------
    module : str
        Its dotted name, ``"matplotlib.pyplot"``.
    extra : str
        Which of pnode's extras it comes with.
    purpose : str
        What it is wanted for.

    Raises
    ------
    MissingPackage
        If it, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackage(
            f"{purpose} needs {package}, which cannot be imported ({error}): "
            f"pip install {package}, or all that comes with pip install 'pnode[{extra}]'"
        ) from error

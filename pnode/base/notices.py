"""What takes long is told: to the log ``pnode``, and to the progress bar that is shown.

Levels: INFO for what is rare and takes seconds (compilations), DEBUG for every sweep. Warnings are
Python's; ``logging.captureWarnings(True)`` brings them into the log, too.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["LOG", "compiling", "outside", "shown_to"]

LOG = logging.getLogger("pnode")
LOG.addHandler(logging.NullHandler())
_COMPILE = logging.getLogger("pnode.compile")
_show: ContextVar[Callable[[str], None] | None] = ContextVar("pnode notices", default=None)


@contextmanager
def shown_to(show: Callable[[str], None]) -> Iterator[None]:
    """Show texts of what is going on, and an empty one when it is over. Not collective."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Tell that something is compiled, and how long it took."""
    show = _show.get()
    _COMPILE.info("compiling %s", what)
    if show is not None:
        show(f"compiling {what}")
    started = time.perf_counter()
    try:
        yield
    finally:
        _COMPILE.info("compiled %s in %.1f s", what, time.perf_counter() - started)
        if show is not None:
            show("")


def outside() -> int:
    """Return the stack level, for a warning by the caller, of the code that uses pnode."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(("pnode.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level

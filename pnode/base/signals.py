"""The process's signal handlers stay what they were before MPI and PETSc were loaded.

Both would replace handlers that a program has set, and what Python has set for it: SIGPIPE, which
Python ignores so that a broken pipe is an exception, would end the program in an abort, and SIGHUP
no longer end it. The defaults of the system are right for the rest: ``faulthandler`` prints where a
crash happened, and ``mpiexec`` ends the other ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["leave_signals", "signals_kept"]

_NAMES = (
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS",
    "SIGPIPE", "SIGTERM",
)  # fmt: skip
_OPTION = "-no_signal_handler"
_ROOM = 512  # bytes, more than a struct sigaction takes anywhere


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put back, at the end, what handlers the signals had that end a process.

    As the system knows them: those of ``faulthandler`` and of other libraries too. MPI's own
    signals (SIGUSR1, SIGALRM) are left to it.
    """
    library = ctypes.CDLL(None)
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {}
    for number in numbers:
        action = ctypes.create_string_buffer(_ROOM)
        if library.sigaction(int(number), None, action) == 0:
            before[int(number)] = action
    try:
        yield
    finally:
        for number, action in before.items():
            library.sigaction(number, action, None)


def leave_signals(arguments: list[str]) -> list[str]:
    """Return PETSc's command line with the option that leaves signals alone.

    Unless the command line or ``PETSC_OPTIONS`` have it, with whatever value.
    """
    if _OPTION in [*arguments, *os.environ.get("PETSC_OPTIONS", "").split()]:
        return arguments
    return [arguments[0], _OPTION, "true", *arguments[1:]]

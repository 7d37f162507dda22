"""What a solve over several ranks sends and reduces, counted.

Messages: PETSc's own counters, those of -log_view. Reductions and other collective calls, PETSc's
and pnode's alike: through MPI's profiling interface (``mpi_calls.c``, preloaded), as PETSc does not
count what it calls by MPI-4's MPI_Allreduce_c.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("mpi_calls.c")


def beside_python(program: str) -> str:
    """Return a program of the MPI that mpi4py uses: beside the interpreter, else on the path."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if not found:
        raise FileNotFoundError(f"{program} is missing: install mpich into this environment")
    return found


def counting_environment(folder: Path) -> dict[str, str]:
    """Compile ``mpi_calls.c`` into a folder; return the environment of a run that counts."""
    library = folder / "mpi_calls.so"
    command = [beside_python("mpicc"), "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return os.environ | threads | {"LD_PRELOAD": str(library)}


def is_counting() -> bool:
    """Return whether this process runs in :func:`counting_environment`."""
    return hasattr(ctypes.CDLL(None), "mpi_calls")


@dataclass(frozen=True)
class Counts:
    """Of one rank.

    Attributes
    ----------
    sends, receives : float
        Messages.
    sent : float
        Their bytes.
    reductions : float
        Collective calls on communicators of more than one rank.
    reduced : float
        Bytes that this rank gave to these.
    """

    sends: float = 0.0
    receives: float = 0.0
    sent: float = 0.0
    reductions: float = 0.0
    reduced: float = 0.0

    def _each(self, other: Counts, operation: Callable[[float, float], float]) -> Counts:
        pairs = ((getattr(self, item.name), getattr(other, item.name)) for item in fields(Counts))
        return Counts(*(operation(a, b) for a, b in pairs))

    def __sub__(self, other: Counts) -> Counts:
        return self._each(other, lambda a, b: a - b)

    def per(self, number: float) -> Counts:
        """Divide all of them."""
        return self._each(self, lambda a, b: a / number)


class Counter:
    """Reads the counters of this process, which must run in :func:`counting_environment`."""

    def __init__(self) -> None:
        from pnode.base.options import PETSc

        petsc = ctypes.CDLL(PETSc.__file__)
        profiled = ctypes.CDLL(None)
        messages = (("isend_ct", "send_ct"), ("irecv_ct", "recv_ct"), ("isend_len", "send_len"))
        self._counters = [
            [ctypes.c_double.in_dll(petsc, f"petsc_{name}") for name in names] for names in messages
        ]
        for name in ("mpi_calls", "mpi_call_bytes"):
            self._counters.append([ctypes.c_double.in_dll(profiled, name)])

    def totals(self) -> Counts:
        """Return everything so far."""
        return Counts(*(sum(part.value for part in parts) for parts in self._counters))

    def count(self, function: Callable[[], Any]) -> tuple[Any, Counts]:
        """Return what a function returns, and what it sent and reduced on this rank."""
        before = self.totals()
        result = function()
        return result, self.totals() - before

"""The exchange of ghost cells as ``exchange.h`` takes it."""

from __future__ import annotations

import ctypes
from typing import Any

from mpi4py import MPI

from pnode.base.options import PETSc

__all__ = ["NO_FOREST", "Exchange", "exchange"]

NO_FOREST = "gather of layout= does more than to copy entries of the state"
_FUNCTIONS = ("BcastBegin", "BcastEnd", "ReduceBegin", "ReduceEnd")  # of PetscSF


class Exchange(ctypes.Structure):
    """Who exchanges ghost cells, in C."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("size", "forest", *_FUNCTIONS, "type", "replace", "sum")
    ]  # fmt: skip


def exchange(forest: Any) -> Exchange:
    """Return it for a star forest, which is to live as long."""
    library = ctypes.CDLL(PETSc.__file__)
    functions = [
        ctypes.cast(getattr(library, f"PetscSF{name}"), ctypes.c_void_p).value
        for name in _FUNCTIONS
    ]  # fmt: skip
    handles = map(MPI._handleof, (MPI.DOUBLE, MPI.REPLACE, MPI.SUM))
    return Exchange(MPI._sizeof(MPI.Comm), forest.handle, *functions, *handles)

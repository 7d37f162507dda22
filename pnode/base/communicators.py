"""Communicators of mpi4py and of petsc4py."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from mpi4py import MPI

from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc

__all__ = ["Reduction", "allreduce", "as_communicator", "clean_up", "own_communicator"]

_keepers: dict[int, Any] = {}


def as_communicator(comm: Any) -> Any:
    """Return a communicator of mpi4py, or of petsc4py, as one of mpi4py.

    Raises
    ------
    ConfigurationError
        If it is neither, or not an intracommunicator.
    """
    if comm is None:
        return MPI.COMM_SELF
    if isinstance(comm, PETSc.Comm):
        comm = comm.tompi4py()
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ConfigurationError(
            f"comm={comm!r} is not a communicator: give one of mpi4py, such as MPI.COMM_WORLD"
        )
    return comm


def own_communicator(comm: Any) -> Any:
    """Return the communicator that PETSc duplicates from ``comm``, which stays as long as we do.

    Messages on it meet none of the user's; as it is never freed, objects on it may be destroyed
    whenever Python collects them, on each rank in its own order.
    """
    key = MPI._handleof(comm)
    if key not in _keepers:
        keeper = PETSc.Vec().createMPI((0, PETSc.DETERMINE), comm=comm)
        _keepers[key] = keeper
    return _keepers[key].getComm().tompi4py()


class Reduction(ctypes.Structure):
    """Sums of float64 numbers over the ranks of a communicator, for machine code; see ``ranks.h``.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator, which must outlive it.
    """

    _fields_ = [(name, ctypes.c_int64) for name in ("function", "size", "type", "sum", "comm")]

    def __init__(self, comm: Any) -> None:
        handles = map(MPI._handleof, (MPI.DOUBLE, MPI.SUM, comm))
        super().__init__(allreduce(), MPI._sizeof(MPI.Comm), *handles)


@cache
def allreduce() -> int | None:
    """Return the address of MPI_Allreduce, the one that mpi4py calls; None if it is not found."""
    for name in (None, MPI.__file__):  # what is preloaded goes first, as for the linker
        try:
            return ctypes.cast(ctypes.CDLL(name).MPI_Allreduce, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def clean_up(comm: Any) -> None:
    """Destroy the PETSc objects that Python has let go of on all ranks. Collective.

    petsc4py keeps those of several ranks, as each collects its garbage when it likes.
    """
    if comm.size > 1:
        PETSc.garbage_cleanup(comm)

"""States distributed over ranks: who owns what, and the exchange of ghost cells.

A layout turns the rank's own (owned) part of a state into the ghosted part, which its neighbours'
cells belong to, and has the exact adjoint of that map. Everything else of pnode sees owned parts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode.base.devices import HOST
from pnode.base.options import PETSc, log_event
from pnode.base.vectors import REAL

__all__ = ["Layout"]


class Layout(ABC):
    """A distributed state.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        Its communicator.
    shape : tuple of int
        Shape of the owned part on this rank, which y0 has.
    ghosted_shape : tuple of int
        Shape that the vector field gets.
    """

    comm: Any
    shape: tuple[int, ...]
    ghosted_shape: tuple[int, ...]
    #: Whether ghosted entries are known to be copies of owned ones, or zero.
    copies = False

    def gather(self, owned: torch.Tensor) -> torch.Tensor:
        """Return the ghosted part. Collective.

        Parameters
        ----------
        owned : Tensor
            Owned part, any shape with its number of entries; not differentiated.

        Returns
        -------
        Tensor
            Shape ``ghosted_shape``, dtype of ``owned``, new.
        """
        with log_event("pnode ghosts"):
            owned = owned.detach().reshape(self.shape)
            forest = self._forest_for(owned)
            if forest is None:
                return self._gather(owned)
            ghosted = owned.new_zeros(self.ghosted_shape)
            given = MPI.DOUBLE, owned.contiguous().numpy(), ghosted.numpy(), MPI.REPLACE
            forest.bcastBegin(*given)
            forest.bcastEnd(*given)
            return ghosted

    def scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        """Return the transpose of :meth:`gather` applied to ``ghosted``, flat. Collective."""
        with log_event("pnode ghosts"):
            ghosted = ghosted.detach().reshape(self.ghosted_shape)
            forest = self._forest_for(ghosted)
            if forest is None:
                return self._scatter(ghosted)
            owned = ghosted.new_zeros(self.size)
            given = MPI.DOUBLE, ghosted.contiguous().numpy(), owned.numpy(), MPI.SUM
            forest.reduceBegin(*given)
            forest.reduceEnd(*given)
            return owned

    def _forest_for(self, values: torch.Tensor) -> Any:
        """Return what exchanges such values in less time, or None. Collective the first time."""
        quick = self.copies and values.dtype is REAL and values.device.type == HOST.device.type
        return self.forest() if quick else None

    @abstractmethod
    def _gather(self, owned: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def pattern(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return where the derivative of owned values by ghosted ones may be non-zero.

        Returns
        -------
        rows, columns : Tensor
            Indices into the flattened owned and ghosted parts. None if it is not known.
        """

    @property
    def size(self) -> int:
        """Number of owned entries."""
        return math.prod(self.shape)

    def forest(self) -> Any:
        """Return PETSc's star forest of :meth:`gather`. Collective the first time.

        Returns
        -------
        petsc4py.PETSc.SF or None
            Leaves are the ghosted entries, flat, roots the owned ones; None if :meth:`gather` is
            more than a choice of entries.
        """
        if not hasattr(self, "_forest"):
            self._forest = self._grown()
        return self._forest

    def _grown(self) -> Any:
        sizes = self.comm.allgather(self.size)
        starts = torch.tensor([0, *sizes], device=HOST.device).cumsum(0)
        columns = self.columns()
        leaves = (columns >= 0).nonzero()[:, 0]
        owners = torch.searchsorted(starts, columns[leaves], right=True) - 1
        places = torch.stack([owners, columns[leaves] - starts[owners]], 1)
        forest = PETSc.SF().create(self.comm)
        forest.setGraph(self.size, *(x.numpy().astype(PETSc.IntType) for x in (leaves, places)))
        forest.setUp()
        generator = torch.Generator(device=HOST.device).manual_seed(self.comm.rank)
        given = torch.randn(self.size, generator=generator, dtype=REAL, device=HOST.device)
        expected = self._gather(given).reshape(-1).numpy()
        found = np.zeros_like(expected)
        for step in (forest.bcastBegin, forest.bcastEnd):
            step(MPI.DOUBLE, given.numpy(), found, MPI.REPLACE)
        same = self.comm.allreduce(bool((found == expected).all()), MPI.LAND)
        return forest if same else None

    def columns(self) -> torch.Tensor:
        """Return the global index of each ghosted entry, flat; -1 for zero. Collective.

        Entries are numbered rank by rank, in the order of the flattened owned parts.
        """
        start = self.comm.exscan(self.size) or 0
        numbers = torch.arange(start + 1, start + 1 + self.size, dtype=REAL, device=HOST.device)
        return self._gather(numbers).reshape(-1).round().to(torch.int64) - 1

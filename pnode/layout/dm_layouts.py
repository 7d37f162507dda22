"""States that a PETSc DM distributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pnode.base import vectors
from pnode.base.communicators import clean_up
from pnode.base.devices import HOST, place_of
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc
from pnode.base.ranks import Ranks
from pnode.layout.layouts import Layout

__all__ = ["DMLayout"]

_ROUND_OFF = 1e-10


class DMLayout(Layout):
    """The distribution of a PETSc DM: y0 is its global vector, f gets its local one.

    Parameters
    ----------
    dm : petsc4py.PETSc.DM
        Set up, and with its local section if it takes one (DMPlex). It is neither changed nor
        given to a TS.

    Attributes
    ----------
    dm : petsc4py.PETSc.DM
        The DM.
    shape, ghosted_shape : tuple of int
        Of a DMDA: its owned and its ghosted box, ``(z, y, x, dof)`` as in PETSc's C arrays
        ``a[k][j][i].field``, without the dimensions it has not, and without dof if that is 1. Of
        others: numbers of entries of the global and of the local vector on this rank.

    Raises
    ------
    ConfigurationError
        If it is no DM, has no vectors (no section?), leaves a rank without entries, or if its
        ``globalToLocal`` is not linear, or ``localToGlobal`` with ADD_VALUES not its transpose.

    Notes
    -----
    Collective on the DM's communicator. Local entries that ``globalToLocal`` does not set are zero:
    ghost points beyond an end of kind GHOSTED, and constrained unknowns, such as boundary values of
    a DMPlex. The vector field puts there what it wants. ``jacobian="sparse"`` takes the entries
    that the DM preallocates in its matrices, and detects them if there are none.
    """

    def __init__(self, dm: Any) -> None:
        if not isinstance(dm, PETSc.DM):
            raise ConfigurationError(f"dm={dm!r} is a {type(dm).__name__}: give a PETSc DM")
        if not dm:  # PETSc would end the process
            raise ConfigurationError(
                f"the {type(dm).__name__} is empty (not created, or destroyed): give one that is "
                "set up, such as PETSc.DMDA().create(...)"
            )
        self.dm, self.comm = dm, dm.getComm().tompi4py()
        clean_up(self.comm)
        try:
            sizes = [make().getLocalSize() for make in (dm.createGlobalVec, dm.createLocalVec)]
        except PETSc.Error as error:
            raise ConfigurationError(
                f"a DM of type {dm.getType()!r} makes no vectors: set it up (dm.setUp()), and give "
                "it a local section where it takes one (dm.setLocalSection)"
            ) from error
        group = Ranks(self.comm)
        group.attempt(_check_sizes, dm, sizes)
        group.compare(("type of the DM",), {"type of the DM": dm.getType()}, sizes[0])
        self.shape, self.ghosted_shape = (sizes[0],), (sizes[1],)
        if isinstance(dm, PETSc.DMDA):
            dof = () if dm.getDof() == 1 else (dm.getDof(),)
            boxes = dm.getCorners()[1], dm.getGhostCorners()[1]
            self.shape, self.ghosted_shape = ((*box[::-1], *dof) for box in boxes)
        self._vectors: dict[torch.device, tuple[Any, Any]] = {}
        self._check_transpose()

    def __repr__(self) -> str:
        """Show the DM's type and the sizes."""
        return f"DMLayout({self.dm.getType()}, {self.shape}, ghosted={self.ghosted_shape})"

    def _vectors_on(self, device: torch.device) -> tuple[Any, Any]:
        """Return a global and a local vector on a device. Collective the first time."""
        if device not in self._vectors:
            place, ghosted = place_of(device), int(np.prod(self.ghosted_shape))
            self._vectors[device] = (
                vectors.create(self.comm, self.size, place),
                vectors.create(PETSc.COMM_SELF, ghosted, place),
            )
        return self._vectors[device]

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        whole, local = self._vectors_on(owned.device)
        vectors.copy_in(whole, owned.reshape(-1))
        self.dm.globalToLocal(whole, local)
        return vectors.copy_out(local, owned.dtype).view(self.ghosted_shape)

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        whole, local = self._vectors_on(ghosted.device)
        vectors.copy_in(local, ghosted.reshape(-1))
        whole.set(0.0)
        self.dm.localToGlobal(local, whole, addv=PETSc.InsertMode.ADD_VALUES)
        vectors.fill(local, 0.0)  # what globalToLocal does not set stays zero
        return vectors.copy_out(whole, ghosted.dtype)

    def _check_transpose(self) -> None:
        """Compare u^T (G^T v) with (G u)^T v, and G 0 with 0. Collective."""
        generator = torch.Generator(device=HOST.device).manual_seed(self.comm.rank)
        u, v = (
            torch.randn(shape, generator=generator, dtype=vectors.REAL, device=HOST.device)
            for shape in (self.shape, self.ghosted_shape)
        )
        nothing = self.gather(torch.zeros_like(u)).abs().sum()
        seen, sent = self.gather(u) * v, self.scatter(v) * u.reshape(-1)
        numbers = torch.stack([nothing, seen.sum() - sent.sum(), seen.abs().sum()])
        moved, left, scale = self.comm.allreduce(numbers.numpy())
        if moved or not abs(left) <= _ROUND_OFF * scale:
            raise ConfigurationError(
                f"globalToLocal and localToGlobal (ADD_VALUES) of a DM of type "
                f"{self.dm.getType()!r} are not linear and transposes of one another (by {left:g} "
                f"of {scale:g}): gradients would be wrong; drop hooks that insert values, and let "
                "the vector field set them"
            )

    def pattern(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return where the DM's matrices have entries. Collective."""
        matrix = self.dm.createMat()
        found = matrix.getValuesCSR()[:2] if "aij" in matrix.getType() else ([0], [])
        matrix.destroy()
        starts, inner = (torch.as_tensor(part).to(torch.int64) for part in found)
        none = self.comm.allreduce(len(inner)) == 0
        seen, order = self.columns().sort()
        if none:
            return None
        # An entry of the state may be seen in several places: all of them.
        first, stop = (torch.searchsorted(seen, inner, right=right) for right in (False, True))
        rows = torch.arange(self.size).repeat_interleave(starts.diff())
        copies = stop - first
        begins = (first - copies.cumsum(0) + copies).repeat_interleave(copies)
        return rows.repeat_interleave(copies), order[begins + torch.arange(len(begins))]


def _check_sizes(dm: Any, sizes: list[int]) -> None:
    if not min(sizes):
        raise ConfigurationError(
            f"a rank owns {sizes[0]} entries of the DM of type {dm.getType()!r} and sees "
            f"{sizes[1]}: every rank needs one or more; give it a local section where it takes one "
            "(dm.setLocalSection), and take fewer ranks or a larger mesh"
        )

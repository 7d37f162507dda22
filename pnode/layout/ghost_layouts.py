"""Distributions of the user's own: meshes and graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pnode.base import vectors
from pnode.base.communicators import as_communicator, clean_up
from pnode.base.devices import HOST, place_of
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc
from pnode.base.ranks import Ranks
from pnode.layout.layouts import Layout

__all__ = ["GhostLayout"]


class GhostLayout(Layout):
    """A distribution of the user's own: each rank owns entries and names those it looks at.

    Parameters
    ----------
    owned : int
        Number of items (cells, nodes) that this rank owns. Items are numbered rank by rank.
    ghosts : Tensor or sequence of int
        Numbers of other ranks' items that the vector field needs, shape ``(G,)``.
    fields : int, optional
        Values per item. The owned part has shape ``(owned, fields)``, or ``(owned,)`` without.
    pattern : tuple of Tensor, optional
        ``(rows, columns)``: where the derivative of the owned items may be non-zero, as indices
        into the owned items and into the ghosted ones (own items first, then ``ghosts``). For
        ``jacobian="sparse"``; detected if None.
    comm : mpi4py.MPI.Intracomm, optional
        Ranks that share the state; this process alone by default.

    Raises
    ------
    ConfigurationError
        For unusable arguments.

    Notes
    -----
    Collective on ``comm``. The vector field gets ``(owned + G, ...)``: first the rank's own items,
    then the ghosts in their order.
    """

    copies = True

    def __init__(
        self,
        owned: int,
        ghosts: Any = (),
        *,
        fields: int | None = None,
        pattern: tuple[torch.Tensor, torch.Tensor] | None = None,
        comm: Any = None,
    ) -> None:
        self.comm = as_communicator(comm)
        group = Ranks(self.comm)
        clean_up(self.comm)
        checked = group.attempt(_check_layout, owned, ghosts, fields, pattern)
        facts = None if checked is None else {"fields": checked[2], "pattern": checked[3] is None}
        group.compare(("fields", "pattern"), facts, 0)
        number, indices, self.fields, self._pattern = checked
        width = self.fields or 1
        self.owned, self.ghosts = number, indices
        total = self.comm.allreduce(number)
        group.attempt(_check_indices, indices, total)
        group.compare((), {}, 0)
        tail = () if self.fields is None else (self.fields,)
        self.shape, self.ghosted_shape = (number, *tail), (number + len(indices), *tail)
        blocks = indices.numpy().astype(PETSc.IntType)
        self._source = PETSc.IS().createBlock(width, blocks, comm=self.comm)
        self._vectors: dict[torch.device, tuple[Any, Any, Any]] = {}
        self._vectors_on(HOST.device)

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"GhostLayout({self.owned}, ghosts={len(self.ghosts)}, fields={self.fields})"

    def _vectors_on(self, device: torch.device) -> tuple[Any, Any, Any]:
        """Return the vectors of own and ghost entries on a device, and what sends one to the other.

        Collective the first time.
        """
        if device not in self._vectors:
            place, width = place_of(device), self.fields or 1
            own = vectors.create(self.comm, self.owned * width, place)
            ghosts = vectors.create(PETSc.COMM_SELF, len(self.ghosts) * width, place)
            exchange = PETSc.Scatter().create(own, self._source, ghosts, None)
            self._vectors[device] = own, ghosts, exchange
        return self._vectors[device]

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        own, beyond, exchange = self._vectors_on(owned.device)
        vectors.copy_in(own, owned.reshape(-1))
        exchange.scatter(own, beyond, addv=False, mode="forward")
        ghosts = vectors.copy_out(beyond, owned.dtype)
        return torch.cat([owned.reshape(-1), ghosts]).view(self.ghosted_shape)

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        flat = ghosted.reshape(-1)
        own, beyond, exchange = self._vectors_on(flat.device)
        vectors.copy_in(own, flat[: self.size])
        vectors.copy_in(beyond, flat[self.size :])
        exchange.scatter(beyond, own, addv=True, mode="reverse")
        return vectors.copy_out(own, ghosted.dtype)

    def pattern(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the user's pattern, for all fields of the items."""
        if self._pattern is None:
            return None
        rows, columns = self._pattern
        width = self.fields or 1
        inner = torch.arange(width, device=HOST.device)
        return (
            (rows[:, None, None] * width + inner[None, :, None]).expand(-1, -1, width).reshape(-1),
            (columns[:, None, None] * width + inner[None, None, :])
            .expand(-1, width, -1)
            .reshape(-1),
        )


def _check_layout(owned: Any, ghosts: Any, fields: Any, pattern: Any) -> tuple[Any, ...]:
    """Return the arguments of a layout in their final form."""
    for name, value in (("owned", owned), ("fields", 1 if fields is None else fields)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
    try:
        indices = torch.as_tensor(ghosts, device=HOST.device)
        if indices.numel() == 0:
            indices = indices.to(torch.int64)
        whole = not indices.is_floating_point() and not indices.is_complex()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"ghosts={ghosts!r}: give the numbers of items") from error
    if not whole or indices.dim() != 1 or indices.dtype is torch.bool:
        raise ConfigurationError(
            f"ghosts has dtype {indices.dtype} and shape {tuple(indices.shape)}: give the numbers "
            "of items, shape (G,)"
        )
    if pattern is not None:
        rows, columns = (
            torch.as_tensor(part, device=HOST.device).to(torch.int64) for part in pattern
        )
        inside = (
            rows.shape == columns.shape
            and rows.dim() == 1
            and bool(((rows >= 0) & (rows < owned)).all())
            and bool(((columns >= 0) & (columns < owned + len(indices))).all())
        )
        if not inside:
            raise ConfigurationError(
                f"pattern has indices that are not those of {owned} rows and "
                f"{owned + len(indices)} columns: give (rows, columns), shape (k,) each"
            )
        pattern = (rows, columns)
    return int(owned), indices.to(torch.int64), None if fields is None else int(fields), pattern


def _check_indices(indices: torch.Tensor, total: int) -> None:
    wrong = (indices < 0) | (indices >= total)
    if bool(wrong.any()):
        raise ConfigurationError(
            f"ghosts contains {int(indices[wrong][0])}, and the ranks own {total} items: give "
            f"numbers from 0 to {total - 1}"
        )

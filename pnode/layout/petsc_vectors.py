"""States that are given, and asked for, as PETSc vectors."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc
from pnode.layout.layouts import Layout

__all__ = ["as_state", "as_vector"]


def as_state(y0: Any, comm: Any, layout: Layout | None) -> Any:
    """Return a copy of a PETSc Vec as a tensor, anything else as it is. Not collective.

    Parameters
    ----------
    y0 : object
        The initial state.
    comm : mpi4py.MPI.Intracomm
        The ranks of the solve.
    layout : Layout or None
        Of the solve, whose shape the tensor gets; one dimension without.

    Raises
    ------
    ConfigurationError
        For a vector that is not set up, of another communicator's size, or another layout.
    """
    if not isinstance(y0, PETSc.Vec):
        return y0
    if not y0 or y0.getType() is None:  # PETSc would end the process, or not say what is wrong
        raise ConfigurationError(
            "y0 is a PETSc Vec without entries (not set up, or destroyed): give one that has "
            "them, such as PETSc.Vec().createSeq(n) or dm.createGlobalVec()"
        )
    size = y0.getLocalSize()
    if y0.comm.size != comm.size:
        raise ConfigurationError(
            f"y0 is a PETSc Vec on {y0.comm.size} ranks, and the solver has {comm.size}: give "
            "comm= or layout= to the solver, or a Vec of its ranks"
        )
    if layout is not None and size != layout.size:
        raise ConfigurationError(
            f"y0 is a PETSc Vec with {size} local entries, and the layout has {layout.size} on "
            "this rank: give a global vector of that layout (dm.createGlobalVec())"
        )
    state = torch.tensor(y0.array_r, dtype=vectors.REAL, device="cpu")
    return state if layout is None else state.view(layout.shape)


def as_vector(rows: list[torch.Tensor], comm: Any, layout: Layout | None) -> Any:
    """Return the parts of a state as a new PETSc Vec, one after the other. Collective.

    The vector is the DM's where the layout has one.

    Raises
    ------
    ConfigurationError
        For complex states.
    """
    if any(row.is_complex() for row in rows):
        raise ConfigurationError(
            "the state is complex, and PETSc's numbers are real here: take solution.ys"
        )
    flat = torch.cat([row.detach().reshape(-1).to("cpu", vectors.REAL) for row in rows])
    dm = getattr(layout, "dm", None)
    vector = vectors.create(comm, len(flat)) if dm is None else dm.createGlobalVec()
    vector.setArray(flat.numpy())
    return vector

"""PETSc vectors as torch tensors. The only module that knows how one becomes the other.

Host vectors only so far. The state lives in PETSc's real type; a vector field that computes in
another precision gets converted copies.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from pnode.options import PETSc

__all__ = ["REAL", "add_to", "copy_in", "copy_out", "create", "is_moderate", "view"]

#: torch dtype of PETSc's real numbers.
REAL: torch.dtype = {
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
}[np.dtype(PETSc.RealType)]


def _accept_read_only_arrays() -> None:
    """Use up torch's once-per-process warning about read-only arrays: our views stay private."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


_accept_read_only_arrays()


def create(comm: Any, local_size: int) -> Any:
    """Create a vector with ``local_size`` entries on this rank. Collective on ``comm``."""
    vector = PETSc.Vec().create(comm=comm)
    vector.setSizes((local_size, PETSc.DETERMINE))
    vector.setType(PETSc.Vec.Type.STANDARD)
    vector.set(0.0)
    return vector


def view(vector: Any) -> torch.Tensor:
    """Local entries as a tensor that shares memory, to read and to drop before PETSc goes on."""
    return torch.from_numpy(vector.array_r)


def copy_out(
    vector: Any, dtype: torch.dtype = REAL, device: torch.device | None = None
) -> torch.Tensor:
    """Local entries as a new tensor of ``dtype`` on ``device``. Not collective."""
    if dtype is REAL and device is None:
        return view(vector).clone()
    return view(vector).to(device=device, dtype=dtype, copy=True)


def copy_in(vector: Any, values: torch.Tensor) -> None:
    """Overwrite the local entries with a tensor of any precision. Not collective."""
    torch.from_numpy(vector.array_w).copy_(values.detach() if values.requires_grad else values)


def add_to(vector: Any, values: torch.Tensor, factor: float) -> None:
    """Add ``factor`` times a tensor of any precision to the local entries. Not collective."""
    torch.from_numpy(vector.array).add_(values.detach(), alpha=factor)


def is_moderate(values: torch.Tensor) -> bool:
    """Whether the entries are finite and their norm is below 1e100. Not collective.

    Larger numbers overflow when an error estimate divides them by a tolerance and squares them.
    """
    flat = values.detach().reshape(-1).to(REAL)
    return float(torch.dot(flat, flat)) < 1e200

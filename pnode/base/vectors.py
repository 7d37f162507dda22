"""PETSc vectors and dense matrices as torch tensors, which share their memory.

The only module that knows how one becomes the other. Host memory is reached through NumPy, device
memory through DLPack, with the access mode that tells PETSc where the newest values are: 'r' for
what is read, 'w' for what is overwritten, 'rw' for both. Neither way copies or waits.

The state lives in PETSc's real type; a vector field that computes in another precision gets
converted copies.
"""

from __future__ import annotations

import cmath
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pnode.base.devices import HOST, Place
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc

__all__ = [
    "REAL",
    "add_to",
    "adopt",
    "are_moderate",
    "copy_in",
    "copy_out",
    "create",
    "create_dense",
    "fill",
    "is_finite",
    "is_moderate",
    "matrix_view",
    "overwrite",
    "view",
]

#: torch dtype of PETSc's real numbers.
REAL: torch.dtype = {
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
}[np.dtype(PETSc.RealType)]

# So many numbers are looked at in Python, in less time than one operation of torch's takes.
_FEW = 32
# Types of the vectors whose memory is reached through DLPack; empty as long as all are on the host.
_through_dlpack: set[str] = set()


def _accept_read_only_arrays() -> None:
    """Use up torch's once-per-process warning about read-only arrays: our views stay private."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


_accept_read_only_arrays()


def create(comm: Any, local_size: int, place: Place = HOST) -> Any:
    """Create a vector with ``local_size`` entries on this rank. Collective on ``comm``.

    Raises
    ------
    ConfigurationError
        If PETSc puts it elsewhere than ``place`` says.
    """
    vector = PETSc.Vec().create(comm=comm)
    vector.setSizes((local_size, PETSc.DETERMINE))
    vector.setType(place.vec_type)
    vector.set(0.0)
    adopt(vector, place)
    return vector


def adopt(vector: Any, place: Place) -> None:
    """Reach a vector, and others of its type, where it lives. Not collective.

    Raises
    ------
    ConfigurationError
        If PETSc has put it elsewhere than ``place`` says.
    """
    if not place.on_host:
        _through_dlpack.add(vector.getType())
        found = view(vector).device
        if found != place.device:
            raise ConfigurationError(
                f"y0 is on {place.device}, and PETSc's vectors of type {vector.getType()} are on "
                f"{found}: start without -vec_bind_below and with -device_select "
                f"{place.device.index}"
            )


def view(vector: Any) -> torch.Tensor:
    """Local entries as a tensor that shares memory, to read and to drop before PETSc goes on."""
    if _through_dlpack and vector.getType() in _through_dlpack:
        return from_dlpack(vector.toDLPack("r"))
    return torch.from_numpy(vector.array_r)


def overwrite(vector: Any) -> torch.Tensor:
    """Do as :func:`view`, to write all entries; what they were is not to be read."""
    if _through_dlpack and vector.getType() in _through_dlpack:
        return from_dlpack(vector.toDLPack("w"))
    return torch.from_numpy(vector.array_w)


def copy_out(
    vector: Any, dtype: torch.dtype = REAL, device: torch.device | None = None
) -> torch.Tensor:
    """Local entries as a new tensor of ``dtype`` on ``device``. Not collective."""
    if dtype is REAL and device is None:
        return (view(vector) if _through_dlpack else torch.from_numpy(vector.array_r)).clone()
    return view(vector).to(device=device, dtype=dtype, copy=True)


def copy_in(vector: Any, values: torch.Tensor) -> None:
    """Overwrite the local entries with a tensor of any precision and device. Not collective."""
    values = values.detach() if values.requires_grad else values
    if _through_dlpack:
        overwrite(vector).copy_(values)
    else:
        torch.from_numpy(vector.array_w).copy_(values)


def fill(vector: Any, value: float) -> None:
    """Overwrite all local entries with one number, unknown to PETSc's cached norms.

    Not collective.
    """
    overwrite(vector).fill_(value)


def add_to(vector: Any, values: torch.Tensor, factor: float) -> None:
    """Add ``factor`` times a tensor of any precision to the local entries. Not collective."""
    if _through_dlpack and vector.getType() in _through_dlpack:
        entries = from_dlpack(vector.toDLPack("rw"))
    else:
        entries = torch.from_numpy(vector.array)
    entries.add_(values.detach(), alpha=factor)


def create_dense(comm: Any, local_size: int, place: Place = HOST) -> Any:
    """Create a square dense matrix with ``local_size`` rows on this rank. Collective on ``comm``.

    Raises
    ------
    ConfigurationError
        If PETSc has no dense matrices there.
    """
    if place.dense_type is None:
        raise ConfigurationError(
            f"the option vec_type={place.vec_type!r} goes with no dense matrix of PETSc's: use "
            "jacobian='block', 'sparse' or 'matrix-free', or another vec_type"
        )
    matrix = PETSc.Mat().create(comm=comm)
    matrix.setSizes(((local_size, PETSc.DETERMINE),) * 2)
    set_dense_type(matrix, place)
    return matrix


def set_dense_type(matrix: Any, place: Place = HOST) -> None:
    """Make a matrix that has no values yet a dense one. Collective."""
    matrix.setType(place.dense_type)
    matrix.setUp()


def matrix_view(matrix: Any, place: Place = HOST) -> torch.Tensor:
    """Local rows of a dense matrix as a tensor that shares memory, to write all entries.

    ``matrix.assemble()`` is to follow.
    """
    if place.on_host:
        return torch.from_numpy(matrix.getDenseArray())
    return from_dlpack(matrix.toDLPack("w"))


def is_finite(values: torch.Tensor) -> bool:
    """Whether all entries are finite: at once if their sum is, which costs a tenth."""
    if values.dim() == 1 and len(values) <= _FEW and not values.is_complex():
        return all(map(math.isfinite, values.tolist()))
    return cmath.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def is_moderate(values: torch.Tensor) -> bool:
    """Whether the entries are finite and their norm is below 1e100. Not collective.

    Larger numbers overflow when an error estimate divides them by a tolerance and squares them.
    """
    flat = values.detach().reshape(-1).to(REAL)
    return float(torch.dot(flat, flat)) < 1e200


def are_moderate(values: torch.Tensor) -> torch.Tensor:
    """Do as :func:`is_moderate`, without waiting for the answer: 0-dim, bool. Not collective."""
    flat = values.detach().reshape(-1).to(REAL)
    return torch.dot(flat, flat) < 1e200

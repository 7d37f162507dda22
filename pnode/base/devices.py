"""Where vectors live: in host memory, or on a device that torch and PETSc share.

The only module that knows the names of PETSc's device types, its streams, and whether MPI takes
device memory. A :class:`Place` goes with everything that holds a state; no other module names a
device.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from pnode.base.errors import ConfigurationError
from pnode.base.launchers import gpu_aware
from pnode.base.options import PETSc

__all__ = ["HOST", "Place", "ordered", "place_of", "random_states", "refuse_unknown"]

#: torch's interface to streams and devices; tests put a recorder in its place.
_cuda: Any = torch.cuda

_library = ctypes.CDLL(PETSc.__file__)


@dataclass(frozen=True)
class Place:
    """Where the state of a solve lives, and PETSc's types for it.

    Attributes
    ----------
    device : torch.device
        Of every tensor that belongs to the state: stages, checkpoints, cost gradients, Jacobians.
    vec_type : str
        PETSc's vector type.
    dense_type : str or None
        Its dense matrix type, None where there is none.
    sparse_type : str
        Its sparse matrix type.
    """

    device: torch.device
    vec_type: str
    dense_type: str | None
    sparse_type: str

    @property
    def on_host(self) -> bool:
        """Whether this is host memory."""
        return self.device.type == "cpu"


#: Host memory.
HOST = Place(torch.device("cpu"), "standard", "dense", "aij")

# PETSc's vector type: the package it needs, its dense and its sparse matrix type.
_TYPES = {
    "cuda": ("cuda", "densecuda", "aijcusparse"),
    "hip": ("hip", "densehip", "aijhipsparse"),
    "kokkos": ("kokkos-kernels", None, "aijkokkos"),
}


def refuse_unknown(device: torch.device) -> None:
    """Raise unless PETSc may have vectors on a device of this kind.

    Raises
    ------
    ConfigurationError
        For anything but the host, CUDA and HIP.
    """
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"y0 is on {device}, and PETSc has vectors on the host, CUDA and HIP only: use "
            "device_state='host' (f computes where y0 is, the state is kept on the host), or "
            "y0.cpu()"
        )


def place_of(device: torch.device, vec_type: str | None = None) -> Place:
    """Return where the state of a y0 on ``device`` lives.

    Parameters
    ----------
    device : torch.device
        The CPU, or a CUDA or HIP device with its index (torch calls both "cuda").
    vec_type : {"cuda", "hip", "kokkos"}, optional
        PETSc's vector type on a device; by default that of torch's platform, or Kokkos's where
        PETSc has only that.

    Raises
    ------
    ConfigurationError
        If this PETSc has no vectors there, or works on another device.
    """
    if device.type == "cpu":
        if vec_type is not None:
            raise ConfigurationError(
                f"the option vec_type={vec_type!r} chooses between PETSc's types on a device, and "
                "the state is on the host: drop it"
            )
        return HOST
    refuse_unknown(device)
    platform = "hip" if torch.version.hip else "cuda"
    built = [
        name
        for name in (platform, "kokkos")
        if PETSc.Sys.hasExternalPackage(platform) and PETSc.Sys.hasExternalPackage(_TYPES[name][0])
    ]
    if not built:
        raise ConfigurationError(
            f"y0 is on {device}, and this PETSc has no vectors there: use a PETSc and petsc4py "
            f"built with --with-{platform} (docs/gpu.md), or Solver(..., device_state='host'): f "
            "then computes on the device, and the state is kept on the host"
        )
    chosen = built[0] if vec_type is None else vec_type
    if chosen not in built:
        raise ConfigurationError(
            f"the option vec_type={vec_type!r} is not for a state on {device} with this PETSc: "
            f"choose from {', '.join(map(repr, built))}"
        )
    _spare_mpi_device_memory()
    _check_device(device)
    return Place(device, chosen, *_TYPES[chosen][1:])


def _check_device(device: torch.device) -> None:
    """Refuse another device than the one on which PETSc's vectors will be."""
    chosen = PETSc.DeviceContext.getCurrent().getDevice().getDeviceId()
    if chosen != device.index:
        raise ConfigurationError(
            f"y0 is on {device}, and PETSc works on device {chosen}: start with -device_select "
            f"{device.index}, or let each process see one device only (CUDA_VISIBLE_DEVICES, "
            "ROCR_VISIBLE_DEVICES), which is cuda:0 then"
        )


# ------------------------------------------------------------------------------------------ MPI


def _spare_mpi_device_memory() -> None:
    """Do as ``-use_gpu_aware_mpi 0`` if MPI does not take device memory and nobody has chosen.

    PETSc would end the process at its first device vector. Must come before that.
    """
    names = ("use_gpu_aware_mpi", "sf_use_gpu_aware_mpi")
    if any(PETSc.Options().hasName(name) for name in names) or gpu_aware():
        return
    flag = ctypes.c_bool.in_dll(_library, "use_gpu_aware_mpi")
    if flag.value:
        flag.value = False
        if MPI.COMM_WORLD.size > 1 and MPI.COMM_WORLD.rank == 0:
            warnings.warn(
                "this MPI does not say that it takes device memory: PETSc copies messages through "
                "the host, as with -use_gpu_aware_mpi 0; if it does take it, start with "
                "-use_gpu_aware_mpi 1 (docs/gpu.md)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip


# -------------------------------------------------------------------------------------- streams


def petsc_stream() -> int:
    """Return the address of the stream that PETSc's current device context works on; 0: default."""
    handle = ctypes.c_void_p()
    error = _library.PetscDeviceContextGetStreamHandle(None, ctypes.byref(handle))
    if error:
        raise PETSc.Error(error)
    if not handle.value:
        return 0
    return ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] or 0


def _stays(*tensors: torch.Tensor | None) -> None:
    """Nothing to do: there is one stream."""


def ordered(place: Place) -> AbstractContextManager[Callable[..., None]]:
    """Return a context in which torch works on PETSc's device and stream; see below."""
    return nullcontext(_stays) if place.on_host else _ordered(place)


@contextmanager
def _ordered(place: Place) -> Iterator[Callable[..., None]]:
    """Let torch work on PETSc's device and stream, in the order of the surrounding program.

    torch's current stream may be another one than PETSc's, and the thread may be autograd's, whose
    current device is its own affair. What was begun on the caller's stream is done before anything
    in here begins, and the other way round at the end; the host does not wait.

    Yields
    ------
    callable
        To be called with the tensors that leave, which torch must not give away while the caller's
        stream still reads them.
    """
    with _cuda.device(place.device):
        address, outer = petsc_stream(), _cuda.current_stream(place.device)
        stream = (
            _cuda.ExternalStream(address, device=place.device)
            if address
            else _cuda.default_stream(place.device)
        )
        if stream == outer:
            yield _stays
            return

        def leave(*tensors: torch.Tensor | None) -> None:
            for tensor in tensors:
                if tensor is not None and tensor.device == place.device:
                    tensor.record_stream(outer)

        stream.wait_stream(outer)
        try:
            with _cuda.stream(stream):
                yield leave
        finally:
            outer.wait_stream(stream)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random number generators that f on ``device`` may use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda" and _cuda.is_available():
        states.append(_cuda.get_rng_state(device))
    return states


def set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Put the generators of :func:`random_states` back."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        _cuda.set_rng_state(states[1], device)

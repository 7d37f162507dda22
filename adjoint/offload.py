"""Copies of checkpoints between a device and the host, beside the computation.

A copy runs on a stream of its own, from or to pinned host memory, while f goes on on another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode.adjoint.slabs import Tensors
from pnode.base import devices

__all__ = ["DeviceLevel", "Offload", "Transfer"]


@dataclass
class Transfer:
    """A copy under way.

    Attributes
    ----------
    tensors : tuple of Tensor
        The copies; their values are there after :meth:`wait`.
    """

    tensors: Tensors
    _wait: Callable[[], Any] | None

    def wait(self) -> Tensors:
        """Return the copies, which what follows may use."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()
        return self.tensors


class Offload:
    """Copies between one device and the host.

    Parameters
    ----------
    device : torch.device
        Where the state lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def resident(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor takes memory of the device."""
        return tensor.device == self._device

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Begin to copy tensors of the device; they may be let go of at once.

        The host waits for the end in ``wait``.
        """
        stream, outer = self._streams()
        stream.wait_stream(outer)
        copies = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            for tensor in tensors
        )
        with devices._cuda.stream(stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(stream)
            event = stream.record_event()
        return Transfer(copies, event.synchronize)

    def to_device(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Begin to copy tensors of the host; the device, not the host, waits in ``wait``."""
        stream, outer = self._streams()
        with devices._cuda.stream(stream):
            copies = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            event = stream.record_event()
        kept = tuple(tensors)  # until they have been read

        def wait() -> None:
            nonlocal kept
            outer.wait_event(event)
            for copy in copies:
                copy.record_stream(outer)
            kept = ()

        return Transfer(copies, wait)

    def _streams(self) -> tuple[Any, Any]:
        """Return the stream of the copies and the current one."""
        if self._stream is None:
            self._stream = devices._cuda.Stream(self._device)
        return self._stream, devices._cuda.current_stream(self._device)


@dataclass(frozen=True)
class DeviceLevel:
    """Device memory as the first level of checkpoints.

    Attributes
    ----------
    limit : int
        Bytes that checkpoints may hold there at any instant.
    offload : Offload
        Copies them to the host and back.
    """

    limit: int
    offload: Offload

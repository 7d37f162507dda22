"""f on a device and the state on the host: ``Solver(device_state="host")``.

The user's functions become functions of host tensors, whose arguments are copied to the device and
whose results are copied back. torch differentiates through the copies. For everything else the
state is on the host.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.devices import HOST, refuse_unknown
from pnode.base.errors import ConfigurationError, VectorFieldError
from pnode.base.ledger import Ledger, Stats
from pnode.problems.problem import StateLayout

__all__ = ["Remote", "carry_once", "move", "on_host", "remote"]


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on another device; differentiable. Nothing else here copies."""
    return tensor.to(device)


def refuse_incapable(device: torch.device) -> None:
    """Raise unless f can compute on a device of this kind while the state is elsewhere.

    Raises
    ------
    ConfigurationError
        For devices without values or without float64.
    """
    if device.type in ("meta", "mps"):
        lacks = "values" if device.type == "meta" else "float64"
        raise ConfigurationError(
            f"y0 is on {device}, which has no {lacks}: give y0.cpu(), and let f move what it "
            "computes with"
        )


class Remote:
    """A function of the user's that computes on a device, called with host tensors.

    Parameters
    ----------
    function : callable or None
        Takes tensors, or tuples of them, on ``device``, and returns such.
    device : torch.device
        Where it computes.
    ledger : Ledger
        Counts copies and their bytes, those of derivatives too.
    strict : bool
        Whether results elsewhere than on ``device``, and writing into arguments, are errors.
    """

    #: Whose backward sweeps the copies of cotangents belong to; None: they are counted as others.
    backward: Stats | None = None

    def __init__(self, function: Any, device: torch.device, ledger: Ledger, strict: bool) -> None:
        self._function = function
        self._device = device
        self.ledger = ledger
        self._strict = strict

    def __call__(self, time: torch.Tensor, *state: Any) -> Any:
        """Call the function, with copies in and out."""
        arguments = [self.carry(argument, self._device) for argument in (time, *state)]
        first = arguments[1] if len(arguments) > 1 else ()
        parts = first if isinstance(first, tuple) else (first,)
        versions = [part._version for part in parts]
        result = self._function(*arguments)
        if self._strict and versions != [part._version for part in parts]:
            raise VectorFieldError(
                "the vector field wrote into its input y; compute on y.clone(), or without "
                "in-place operations",
                time=float(time.detach()),
            )
        return self._carry_back(result, float(time.detach()) if self._strict else 0.0)

    def carry(self, value: Any, device: torch.device) -> Any:
        """Return a tensor, or a tuple of them, on ``device``; anything else as it is."""
        if isinstance(value, (tuple, list)):
            return tuple(self.carry(part, device) for part in value)
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return value
        moved = move(value, device)
        self._count(moved, self.ledger)
        if moved.requires_grad:
            moved.register_hook(self._count_cotangent)
        return moved

    def _carry_back(self, result: Any, time: float) -> Any:
        for part in result if isinstance(result, (tuple, list)) else (result,):
            elsewhere = isinstance(part, torch.Tensor) and part.device != self._device
            if elsewhere and self._strict:
                raise VectorFieldError(
                    f"the vector field returned a tensor on {part.device} for a state on "
                    f"{self._device}",
                    time=time,
                )
        return self.carry(result, HOST.device)

    @staticmethod
    def _count(copied: torch.Tensor, ledger: Ledger) -> None:
        ledger.copies += 1
        ledger.copied_bytes += copied.numel() * copied.element_size()

    def _count_cotangent(self, cotangent: torch.Tensor) -> None:
        """Count the copy of a cotangent, and of those of its own derivatives."""
        ledger = self.ledger if self.backward is None else self.backward.backward
        self._count(cotangent, ledger)
        if cotangent.requires_grad:
            cotangent.register_hook(self._count_cotangent)


def on_host(y0: Any, device_state: str, stats: Stats) -> tuple[Any, torch.device | None]:
    """Return y0 where the state is to be kept, and the device of f if that is another.

    Parameters
    ----------
    y0 : Tensor or tuple of Tensor
        As the user gave it.
    device_state : {"device", "host"}
        Where the state of a y0 on a device is to be.
    stats : Stats
        Counts the copies.

    Raises
    ------
    ConfigurationError
        If f cannot compute there.
    """
    parts = y0 if isinstance(y0, (tuple, list)) else (y0,)
    if not any(isinstance(part, torch.Tensor) and part.device.type != "cpu" for part in parts):
        return y0, None
    device = StateLayout.of(y0).device
    if device_state == "device":
        refuse_unknown(device)
        return y0, None
    refuse_incapable(device)
    return carry_once(y0, HOST.device, stats), device


def carry_once(value: Any, device: torch.device, stats: Stats) -> Any:
    """Return a tensor or a tuple of them on ``device``, differentiably, and count the copies.

    Those of cotangents, in a backward sweep, are counted there.
    """
    carrier = Remote(None, device, stats, strict=False)
    carrier.backward = stats
    return carrier.carry(value, device)


def remote(function: Any, device: torch.device | None, ledger: Ledger, strict: bool = True) -> Any:
    """Return a function for host tensors; the same one if it computes there."""
    return function if device is None else Remote(function, device, ledger, strict)

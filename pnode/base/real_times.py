"""Times as they are given: real numbers, in a tensor or in whatever torch makes one of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pnode.base.errors import ConfigurationError
from pnode.base.transforms import depends

__all__ = ["real_times"]


def real_times(name: str, given: Any, wanted: str) -> torch.Tensor:
    """Return times as a tensor of real numbers: the same one if it is one.

    Parameters
    ----------
    name : str
        Of the argument.
    given : Tensor, array, number or (nested) sequence of numbers
        As the user gave it; what is no tensor becomes one on the CPU, float64 if it is no
        array.
    wanted : str
        What to give instead.

    Raises
    ------
    ConfigurationError
        For what are no numbers, and for sequences with tensors that require grad, whose gradient
        would be lost.
    """
    if not isinstance(given, torch.Tensor):
        dtype = None if hasattr(given, "dtype") else torch.float64  # of an array, its own
        for place, part in _entries(name, given):
            if isinstance(part, torch.Tensor) and depends(part):
                raise ConfigurationError(
                    f"{place} requires grad, whose gradient would be lost: give one tensor, "
                    "torch.stack([...])"
                )
            if isinstance(part, (bool, np.bool_)):
                raise ConfigurationError(f"{place}={part!r}: times are real numbers")
        try:
            given = torch.as_tensor(given, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            text = repr(given)
            text = text if len(text) <= 100 else f"{text[:97]}..."
            raise ConfigurationError(f"{name}={text}: {wanted}") from error
    if given.layout is not torch.strided or given.device.type == "meta":
        raise ConfigurationError(
            f"{name} has shape {tuple(given.shape)} and layout {given.layout} on {given.device}: "
            "give values, densely"
        )
    if given.is_complex() or given.dtype is torch.bool:
        raise ConfigurationError(f"{name} has dtype {given.dtype}: times are real numbers")
    return given


def _entries(name: str, given: Any) -> Iterator[tuple[str, Any]]:
    """Yield what nested sequences have, and where."""
    if not isinstance(given, (list, tuple)):
        yield name, given
        return
    for index, part in enumerate(given):
        yield from _entries(f"{name}[{index}]", part)

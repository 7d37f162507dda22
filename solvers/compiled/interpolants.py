"""Outputs inside of the steps of a compiled sweep: see ``interpolants.h``."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.driver_library import at
from pnode.solvers.compiled.records import numbers
from pnode.solvers.scheme import Rows

__all__ = ["InsideSteps"]


class _Given(ctypes.Structure):
    _fields_ = [
        ("stages", ctypes.c_int64), ("degree", ctypes.c_int64), ("weights", ctypes.c_void_p),
        ("number", ctypes.c_int64), ("times", ctypes.c_void_p), ("rates", ctypes.c_void_p),
    ]  # fmt: skip


class InsideSteps:
    """The outputs of a sweep between the first and the last, which its steps pass over.

    Parameters
    ----------
    library, handle : object, int
        The driver and a sweep that has not begun.
    interpolation : tuple of tuple of float
        How outputs depend on the slopes of a step; see :attr:`Scheme.interpolation`.
    times : tuple of float
        All output times.
    size : int
        Of the state.
    keep : bool
        Whether a backward sweep may follow.

    Attributes
    ----------
    rates : Tensor or None
        y' at each of them, in the user's time, along the interpolant.
    """

    def __init__(
        self, library: Any, handle: Any, interpolation: Rows, times: tuple[float, ...], size: int,
        keep: bool,
    ) -> None:  # fmt: skip
        self._library, self._handle = library, handle
        within = times[1:-1]
        self.number = len(within)
        self.rates = torch.zeros(len(within), size, dtype=REAL) if keep else None
        weights = numbers(tuple(b for row in interpolation for b in row)), numbers(within)
        table, places = (ctypes.cast(one, ctypes.c_void_p) for one in weights)
        given = _Given(
            len(interpolation), len(interpolation[0]), table, len(within), places,
            None if self.rates is None else at(self.rates),
        )  # fmt: skip
        self._alive = weights
        if library.pnode_interpolate(handle, ctypes.byref(given)):
            raise MemoryError("there is no memory for a compiled sweep")

    def places(self) -> tuple[Sequence[int], Sequence[float]]:
        """Return in which steps those that were reached are, and where; NaN: at its end."""
        steps, thetas = array("q", [0] * self.number), array("d", [0.0] * self.number)
        reached = self._library.pnode_inside(
            self._handle, steps.buffer_info()[0], thetas.buffer_info()[0]
        )
        return steps[:reached], thetas[:reached]

    def take(self, cotangents: torch.Tensor) -> None:
        """Let the next backward sweep take their cotangents, a row for each that was reached."""
        self._cotangents = cotangents.to(REAL).contiguous()
        self._library.pnode_take_inside(self._handle, at(self._cotangents))

"""Both parts of a split field in machine code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.programs import ImplicitProgram

__all__ = ["SplitProgram"]


class SplitProgram(Kernel):
    """The steps of an IMEX method, on a program for each part of the field.

    Parameters
    ----------
    implicit, explicit : ImplicitProgram
        With steps of "dirk", and of "explicit".
    """

    dtype = REAL

    def __init__(self, implicit: ImplicitProgram, explicit: ImplicitProgram) -> None:
        self._parts = (implicit, explicit)
        self.size, self.collective = implicit.size, implicit.collective
        explicit.library.pnode_part.restype = ctypes.c_void_p

    @property
    def captured(self) -> Sequence[torch.Tensor]:
        """What both parts read besides t and y."""
        return [tensor for part in self._parts for tensor in part.captured]

    def inputs(self) -> list[torch.Tensor]:
        """Return it as the programs take it."""
        return [tensor for part in self._parts for tensor in part.inputs()]

    def sums(self) -> list[torch.Tensor]:
        """Return zeros for the mu of each part."""
        return [zeros for part in self._parts for zeros in part.sums()]

    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return their sum."""
        found: dict[int, torch.Tensor] = {}
        for part, own in zip(self._parts, sums, strict=True):
            for index, gradient in part.gradients([own]):
                found[index] = gradient if index not in found else found[index] + gradient
        return list(found.items())

    def stand_at(self, settings: ctypes.Structure, y0: torch.Tensor) -> int:
        """Return a kernel at a state, for settings in C."""
        implicit, explicit = self._parts
        handle = implicit.stand_at(settings, y0)
        part, first = explicit.library.pnode_part(), len(implicit.inputs())
        implicit.library.pnode_split(
            ctypes.c_void_p(handle), ctypes.c_void_p(part), ctypes.c_int64(first)
        )
        return handle

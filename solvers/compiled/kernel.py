"""The Python side of ``kernel.h``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

__all__ = ["Kernel"]


class Kernel(ABC):
    """Steps in machine code, of one field and kind of state; see ``kernel.h``.

    Attributes
    ----------
    size : int
        Entries of the state.
    dtype : torch.dtype
        The user's precision.
    """

    size: int
    dtype: torch.dtype

    @property
    @abstractmethod
    def captured(self) -> Sequence[torch.Tensor]:
        """What f reads besides t and y."""

    @abstractmethod
    def inputs(self) -> list[torch.Tensor]:
        """Return it as the code takes it."""

    @abstractmethod
    def sums(self) -> list[torch.Tensor]:
        """Return zeros for mu."""

    def takes_tangents(self, of_parameters: bool) -> bool:
        """Whether there is code for tangents of y0, or ``of_parameters`` too."""
        return False

    def directions(self, moving: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Return tangents of the parameters as the code takes them."""
        raise NotImplementedError

    @abstractmethod
    def gradients(self, sums: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """Return mu from its sums: the index of each parameter that f uses, and its gradient."""

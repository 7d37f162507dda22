"""What the checkpoints of a compiled sweep may take; see ``checkpoints.h``."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol

__all__ = ["Budget", "Orders"]


class Orders(Protocol):
    """What a sweep keeps, as the numbers that ``checkpoints.h`` takes."""

    def forward(self) -> Iterator[array[int]]:
        """Yield orders for the steps of a forward sweep, as long as it wants more."""

    def reverse(self, steps: int) -> Iterator[array[int]]:
        """Yield orders for its backward sweep."""


class Budget(NamedTuple):
    """What checkpoints may take.

    Attributes
    ----------
    orders : Orders or None
        What is kept, if that is not every step.
    limit : int or None
        Otherwise the bytes that there are for all of them; None: any number.
    fresh : bool
        Whether each step begins without what the last one has left.
    """

    orders: Orders | None = None
    limit: int | None = None
    fresh: bool = False

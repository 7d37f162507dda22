"""A flat state with what it drives, its tangents or integrals, as one flat state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["PairLayout", "RowPairs"]


@dataclass(frozen=True)
class PairLayout:
    """How a flat state and what it drives make one flat state.

    Of a symplectic method, positions come first in either: (q, Z_q, p, Z_p).

    Attributes
    ----------
    size : int
        Entries of the state.
    tangents : int
        How many there are.
    split : int
        Entries of the positions; 0 for a state that is not split.
    integrals : int
        Entries of integrals, which come last, and which nothing depends on.
    """

    size: int
    tangents: int = 1
    split: int = 0
    integrals: int = 0

    @property
    def total(self) -> int:
        """Entries of all of it."""
        return self.size * (self.tangents + 1) + self.integrals

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the pair of a state and its tangents, each of shape ``(..., size)``.

        Integrals, if there are any, are the last of the parts.
        """
        if not self.split:
            return torch.cat(list(parts), dim=-1)
        halves = [part[..., : self.split] for part in parts]
        return torch.cat([*halves, *(part[..., self.split :] for part in parts)], dim=-1)

    def parts(self, pair: torch.Tensor) -> list[torch.Tensor]:
        """Return the state and its tangents, each of shape ``(..., size)``, without integrals."""
        number = self.tangents + 1
        if not (self.split or self.tangents):
            return [pair.narrow(-1, 0, self.size)]
        if not self.split:
            return [pair.narrow(-1, k * self.size, self.size) for k in range(number)]
        rest, offset = self.size - self.split, number * self.split
        return [
            torch.cat([
                pair.narrow(-1, k * self.split, self.split),
                pair.narrow(-1, offset + k * rest, rest),
            ], dim=-1)
            for k in range(number)
        ]  # fmt: skip

    def integral(self, pair: torch.Tensor) -> torch.Tensor:
        """Return the integrals, shape ``(..., integrals)``."""
        return pair.narrow(-1, self.size * (self.tangents + 1), self.integrals)

    def corrected(self, pair: torch.Tensor, residual: torch.Tensor, step: float) -> torch.Tensor:
        """Return a pair whose integrals satisfy their equations, linear with slope ``step``."""
        own = pair.narrow(-1, 0, self.total - self.integrals)
        return torch.cat([own, self.integral(pair) - self.integral(residual) / step], dim=-1)


@dataclass(frozen=True)
class RowPairs(PairLayout):
    """Of independent samples: each row of a state, of ``size`` entries, with its tangents.

    Attributes
    ----------
    rows : int
        How many there are in a flat state.
    """

    rows: int = 1

    @property
    def of_row(self) -> PairLayout:
        """That of one."""
        return PairLayout(self.size, self.tangents)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the pair of a state and its tangents, each of shape ``(..., rows * size)``."""
        return super().join([part.unflatten(-1, (self.rows, -1)) for part in parts]).flatten(-2)

    def parts(self, pair: torch.Tensor) -> list[torch.Tensor]:
        """Return the state and its tangents, each of shape ``(..., rows * size)``."""
        parts = super().parts(pair.unflatten(-1, (self.rows, -1)))
        return [part.flatten(-2) for part in parts]

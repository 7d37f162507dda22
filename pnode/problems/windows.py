"""The times at which f is evaluated, in a part of a solve between two breaks."""

from __future__ import annotations

import torch

from pnode.base.transforms import outside

__all__ = ["Window"]


class Window:
    """First and last time at which f is evaluated: it gets that for those beyond.

    Parameters
    ----------
    low, high : float
        The integrator's, infinite where there is no break.
    direction : float
        1.0, or -1.0 where that is the user's reflected.

    Attributes
    ----------
    ends : Tensor
        The user's, the lower one first, float64: what graphs of f read.
    """

    def __init__(self, low: float, high: float, direction: float) -> None:
        self._low, self._high = low, high
        ends = sorted((direction * low, direction * high))
        with outside():  # of torch.func's transforms, which are over before it is read last
            self.ends = torch.tensor(ends, dtype=torch.float64, device="cpu")

    def nearest(self, s: float) -> float:
        """Return the time within it for one of the integrator's."""
        return min(max(s, self._low), self._high)

    def recorded(self, t: torch.Tensor) -> torch.Tensor:
        """Return the time within it for one of the user's, in a graph that reads the ends."""
        low, high = self.ends.to(t.dtype)
        return torch.minimum(torch.maximum(t, low), high)

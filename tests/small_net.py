"""The small network that several tests differentiate."""

from __future__ import annotations

import torch

__all__ = ["SmallNet"]


class SmallNet(torch.nn.Module):
    """A network 3-4-3 in float64, the same each time, as ``net``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        first, last = (torch.nn.Linear(*sizes, dtype=torch.float64) for sizes in ((3, 4), (4, 3)))
        self.net = torch.nn.Sequential(first, torch.nn.Tanh(), last)

"""Digits classified by ODE blocks: memory and time of every way to the gradient.

A convolution lifts 8 x 8 images to @CHANNELS@ channels; two ODE blocks, y' = conv(tanh(conv(y))) from t = 0 to
1, follow, the second on 4 x 4 pixels; then the mean over the pixels and a linear layer. This is the
classifier of ANODE (A. Gholami, K. Keutzer & G. Biros, 2019), ACA (J. Zhuang et al., 2020) and
PNODE (H. Zhang & W. Zhao, 2022), small enough for the digits that scikit-learn brings along (1797
images of handwritten digits, 8 x 8 pixels, of E. Alpaydin & C. Kaynak, 1998).
@TEXT@
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gallery_common import (
    Measured,
    Outcome,
    UsageError,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    peer,
    train,
)
from torch.utils.checkpoint import checkpoint

import pnode

CHANNELS, BATCH = 8, 64
SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
Solve = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

# Coefficients of the methods as pnode has them, for the peers that are written out in torch.
TABLEAUS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": (((),), (1,)),
    "midpoint": (((), (1 / 2,)), (0, 1)),
    "bosh3": (((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "rk4": (((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "dopri5": (
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}


# ------------------------------------------------------------------------------------- the model


class Field(torch.nn.Module):
    """y' = conv(tanh(conv(y))), the same at all times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(y)))


class Classifier(torch.nn.Module):
    """Two ODE blocks between convolutions; ``solve`` takes a state through a block."""

    def __init__(self, channels: int, solve: Callable[[Field], Solve]) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(1, channels, 3, padding=1, dtype=torch.float64)
        self.down = torch.nn.Conv2d(channels, channels, 2, stride=2, dtype=torch.float64)
        self.head = torch.nn.Linear(channels, 10, dtype=torch.float64)
        self.fields = torch.nn.ModuleList([Field(channels), Field(channels)])
        self.solves = [solve(field) for field in (self.fields[0], self.fields[1])]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.solves[0](self.fields[0], torch.tanh(self.stem(images)))
        y = self.solves[1](self.fields[1], torch.tanh(self.down(y)))
        return self.head(y.mean((2, 3)))


def rk_step(field: torch.nn.Module, y: torch.Tensor, h: float, method: str) -> torch.Tensor:
    """One step of a Runge-Kutta method, for autograd."""
    slopes: list[torch.Tensor] = []
    rows, weights = TABLEAUS[method]
    for row in rows:
        stage = y
        for a, slope in zip(row, slopes, strict=True):
            if a:
                stage = stage + (h * a) * slope
        slopes.append(field(None, stage))
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            y = y + (h * weight) * slope
    return y


def in_torch(method: str, steps: int, where: str) -> Callable[[Field], Solve]:
    """Return a solve by plain torch; checkpoints before each ``where``: block, step or nothing."""

    def step(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        return rk_step(field, y, 1 / steps, method)

    def solve(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            if where == "step":
                y = checkpoint(step, field, y, use_reentrant=False)
            else:
                y = step(field, y)
        return y

    def block(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(solve, field, y, use_reentrant=False)
        return found

    return lambda field: block if where == "block" else solve


def by_pnode(method: str, steps: int, **more: Any) -> Callable[[Field], Solve]:
    """Return a solve by pnode."""

    def make(field: Field) -> Solve:
        solver = pnode.Solver(field, method=method, step_size=1 / steps, **{"compile": False, **more})
        return lambda _, y: solver(y, SPAN).ys[-1]

    return make

"""Outputs inside of steps that the driver of a compiled sweep makes, and their adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from pnode.base.interpolation import polynomial
from pnode.base.vectors import REAL
from pnode.field.rates import Rates
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.interpolants import InsideSteps
from pnode.solvers.methods import Method
from pnode.solvers.scheme import Rows, Scheme
from pnode.solvers.stepping import Step
from pnode.sweeping.dense import own_extension, own_interpolant

__all__ = ["DrivenOutputs", "interpolant"]


@lru_cache(maxsize=32)
def interpolant(method: Method) -> Scheme | None:
    """Return an explicit method as one whose outputs inside of steps are made of slopes alone.

    The slope at the end, which Hermite's cubic takes, is a stage of its own, and the next step's
    first. None of others, and of those with slopes inside of their steps.
    """
    scheme, own = method.scheme, own_interpolant(method)
    if scheme is None or method.implicit or not scheme.explicit or own_extension(method):
        return None
    weights: list[list[float]] = [] if own is None else [[*row] for row in own.interpolation or ()]
    if not scheme.fsal:
        embedded = scheme.b_embedded
        scheme = Scheme(
            (*((*row, 0.0) for row in scheme.A), (*scheme.b, 0.0)), (*scheme.b, 0.0),
            scheme.reference, None if embedded is None else (*embedded, 0.0),
        )  # fmt: skip
        weights += [[0.0] * len(row) for row in weights[:1]]
    if own is None:  # u' is u + h sum b_i k_i in (1 - d) u + d u' + h (c k_1 + e k_s)
        weights = [[0.0, 3.0 * b, -2.0 * b] for b in scheme.b]
        for row, slope in ((weights[0], (1.0, -2.0, 1.0)), (weights[-1], (0.0, -1.0, 1.0))):
            row[:] = [a + b for a, b in zip(row, slope, strict=True)]
    return replace(scheme, interpolation=tuple(map(tuple, weights)))


class DrivenOutputs:
    """The outputs of a sweep between the first and the last, which it has made.

    Parameters
    ----------
    inside : InsideSteps
        They.
    interpolation : tuple of tuple of float
        What they are made with.
    steps : sequence of Step
        The sweep's.
    end : Tensor
        The state at its end, flat, PETSc's precision.
    direction : float
        That of the user's time.

    Attributes
    ----------
    nodes : list of int
        How many steps come before each of them, -1 where it is interpolated.
    interpolated : set of int
        Indices of these among all outputs.
    parameters : list of Tensor or None
        What the parameters get through the slope at the end of a sweep.
    times : dict
        Derivative of the loss with respect to the time of each interpolated output.
    """

    def __init__(
        self, inside: InsideSteps, interpolation: Rows, steps: Sequence[Step], end: torch.Tensor,
        direction: float,
    ) -> None:  # fmt: skip
        self._inside, self._interpolation, self._direction = inside, interpolation, direction
        self._end, self._number = end, len(steps)
        self._last = steps[-1] if steps else None
        where = list(zip(*inside.places(), strict=True))
        self.nodes = [step + 1 if math.isnan(theta) else -1 for step, theta in where]
        self.interpolated = {i for i, node in enumerate(self.nodes, 1) if node < 0}
        self._behind = [  # those that the slope at the end has a say in
            (i, theta) for i, (step, theta) in enumerate(where, 1)
            if step == len(steps) - 1 and not math.isnan(theta)
        ]  # fmt: skip

    def pull_back(
        self, field: VectorField, cotangents: torch.Tensor, wants_times: bool,
        rows: dict[int, torch.Tensor],
    ) -> None:  # fmt: skip
        """Let the sweep's adjoint take their cotangents; add that of its end to ``rows``.

        Parameters
        ----------
        field : VectorField
            For products with its derivatives.
        cotangents : Tensor
            Derivatives of the loss with respect to all outputs, shape ``(T, size)``.
        wants_times : bool
            Whether :attr:`times` is wanted.
        rows : dict
            Cotangents of states, by the number of steps before.
        """
        own = cotangents[1 : 1 + len(self.nodes)].to(REAL)
        self._inside.take(own)
        self.parameters: list[torch.Tensor | None] = [None] * len(field.parameters)
        slope = torch.zeros_like(self._end)
        for i, theta in self._behind:
            assert self._last is not None
            weight = polynomial(self._interpolation, theta)[-1]
            slope.add_(own[i - 1], alpha=weight * self._last.length)
        if self._last is not None and bool(slope.ne(0.0).any()):
            rate = Rates(field).at(self._last.end, self._end)
            rows[self._number] = rate.product(slope, self.parameters)
        self.times: dict[int, float] = {}
        if wants_times and self._inside.rates is not None:
            found = (own * self._inside.rates[: len(own)]).sum(1) * self._direction
            self.times = {i: float(found[i - 1]) for i in self.interpolated}

"""Cost integrals of symplectic methods: averages of the integrand along momentum updates.

A symplectic step composes the flows of q' = g(p) and of p' = f(q). With I' = r(q, p) in the second,
whose q is constant, the two still make up the whole system, so that a composition of order k for
any two vector fields is of order k for I too. The second flow is known but for the integral of r
along a line, which a Gauss rule of order k or more takes: over a length h d

    I += h d sum_i w_i r(q, p + x_i h d f(q)).

(E. Hairer, C. Lubich & G. Wanner, Geometric Numerical Integration, sections II.5 and III.5.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["MomentumFlow"]


class MomentumFlow:
    """How far the update under way goes.

    Parameters
    ----------
    order : int
        Of the method.
    """

    def __init__(self, order: int) -> None:
        nodes, weights = np.polynomial.legendre.leggauss((order + 1) // 2)
        self._rule = np.stack([0.5 * (nodes + 1.0), 0.5 * weights], 1).tolist()
        self._length: float | None = 0.0

    @contextmanager
    def over(self, length: float | None) -> Iterator[None]:
        """Evaluate for an update of the momenta by h d, or for one of the positions (None)."""
        before, self._length = self._length, length
        try:
            yield
        finally:
            self._length = before

    def average(
        self, integrand: Callable[[torch.Tensor], torch.Tensor], p: torch.Tensor,
        force: torch.Tensor, like: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return that of ``integrand(p)`` along the update; outside of updates, its value at p.

        ``like`` has its shape: updates of the positions take zeros.
        """
        if self._length is None:
            return torch.zeros_like(like)
        if not self._length:
            return integrand(p)
        terms = [w * integrand(p + (x * self._length) * force) for x, w in self._rule]
        return torch.stack(terms).sum(0)

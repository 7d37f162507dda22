"""What an assembled Jacobian is, and how it is tested against single products.

An :class:`Assembly` evaluates dg/du (and dF/du_dot) at a point and forms the matrix
``shift dF/du_dot - dg/du`` for a shift. A file for each kind: :mod:`~pnode.solvers.linear.dense`,
:mod:`~pnode.solvers.linear.block`, :mod:`~pnode.solvers.linear.sparse` and
:mod:`~pnode.solvers.linear.given`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from pnode.base.devices import HOST, Place
from pnode.base.noise import noise
from pnode.base.vectors import is_finite
from pnode.field.linearization import Linearization
from pnode.solvers.linear.linearizer import Linearizer, Point

__all__ = ["Assembly", "differ", "finite", "probe"]


class Assembly(ABC):
    """One kind of assembled Jacobian.

    Parameters
    ----------
    place : Place
        Where the matrix lives.
    """

    def __init__(self, place: Place = HOST) -> None:
        self._place = place

    @abstractmethod
    def create(self, size: int, comm: Any) -> Any:
        """Return a new PETSc matrix, ``size`` rows and columns on this rank. Collective."""

    @abstractmethod
    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return what :meth:`form` needs of the derivatives at ``point``.

        The graph there is made on first use: not every assembly has use for it.
        With ``check``, compare with a product of the true Jacobian where that can differ.
        """

    @abstractmethod
    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Fill ``matrix`` for a shift; with ``shift`` times the identity if ``values`` is None."""


def probe(linearization: Linearization) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a random w and its products w^T dg/du (and w^T dF/du_dot, for a residual)."""
    like = linearization.flat_value()
    w = noise(like.shape, torch.Generator(HOST.device).manual_seed(0)).to(like)
    return w, [product[0] for product in linearization.rows(w[None])]


def differ(exact: torch.Tensor, found: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two products differ by more than round-off of ``scale``, their absolute sum."""
    tolerance = math.sqrt(torch.finfo(exact.dtype).eps)
    return bool(((exact - found).abs() > tolerance * (scale + exact.abs())).any())


def finite(values: Any) -> bool:
    """Whether the tensors of an evaluation, in tuples, are."""
    if isinstance(values, torch.Tensor):
        return is_finite(values)
    return not isinstance(values, tuple) or all(map(finite, values))

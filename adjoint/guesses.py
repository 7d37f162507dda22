"""Transposed solves with a matrix that may not be the right one, checked by a product."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pnode.linearization import Products
from pnode.vectors import REAL

__all__ = ["correction"]

# Residuals that are taken for round-off, in units of it.
_ROUND_OFF = 1e3


def correction(
    b: torch.Tensor,
    x: torch.Tensor,
    shift: float,
    products: Products,
    norm: Callable[[torch.Tensor], float],
) -> torch.Tensor | None:
    """Return what remains of b after ``(F_u + shift F_u_dot)^T x``, if it is small. Collective.

    Parameters
    ----------
    b, x : Tensor
        Right-hand side and solution, PETSc's precision.
    shift : float
        Of the matrix.
    products : Products
        Those of g = -F with x.
    norm : callable
        Norm of a vector.

    Returns
    -------
    Tensor or None
        Zero if it is round-off; another right-hand side if one more solve brings it down to that;
        None if the matrix is another one.
    """
    eps = torch.finfo(products.state.dtype).eps
    moved = x if products.rate is None else products.rate.to(REAL)
    left = b - shift * moved + products.state.to(REAL)
    scale = norm(b) + shift * norm(moved) + norm(products.state)
    size = norm(left)
    if size <= _ROUND_OFF * eps * scale:
        return torch.zeros_like(left)
    return left if size <= math.sqrt(eps) * scale else None

"""GMRES for the coupled stages, on tensors that ranks share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pnode.base.ranks import Ranks

__all__ = ["gmres"]


def gmres(
    apply: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    ranks: Ranks,
    rtol: float,
    restart: int = 100,
    limit: int = 10_000,
) -> tuple[torch.Tensor | None, int]:
    """Solve A x = b from x = 0. Collective.

    Parameters
    ----------
    apply : callable
        Returns A v of a tensor like b.
    b : Tensor
        Right-hand side, any shape: this rank's part.
    ranks : Ranks
        Who have the others.
    rtol : float
        Norm of the residual to be reached, relative to that of b.
    restart, limit : int
        Iterations until a restart, and in all.

    Returns
    -------
    x : Tensor or None
        The solution, None where it was not found.
    iterations : int
        Products taken.
    """
    x, residual, taken = torch.zeros_like(b), b, 0
    norm = ranks.norm(b)
    target = rtol * norm
    while norm > target:
        before = norm
        change, count = _cycle(apply, residual, norm, ranks, target, min(restart, limit - taken))
        taken += count
        x = x + change
        residual = b - apply(x)
        norm = ranks.norm(residual)
        # Round-off may keep the true residual from what the recurrence promised.
        if not norm < 1e300 or taken >= limit or norm > 0.9 * before:
            return (x if norm <= 10.0 * target else None), taken
    return (x, taken) if norm < 1e300 else (None, taken)


def _cycle(
    apply: Callable[[torch.Tensor], torch.Tensor],
    residual: torch.Tensor,
    norm: float,
    ranks: Ranks,
    target: float,
    most: int,
) -> tuple[torch.Tensor, int]:
    """Return what at most so many iterations add to x, and their number."""
    shape = residual.shape
    basis = [residual.reshape(-1) / norm]
    # The least-squares problem by Givens rotations, in numbers: LAPACK's round-off depends on where
    # its workspace lies, and a repeated step has to have the same bits.
    R: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    rotated = [norm]
    for k in range(most):
        w = apply(basis[k].view(shape)).reshape(-1)
        V = torch.stack(basis)
        length = ranks.norm(w)
        column = torch.zeros(k + 1, dtype=torch.float64, device=w.device)
        for _ in range(2):  # once more for what round-off has left
            part = ranks.sum(V @ w)
            w = w - part @ V
            column = column + part
        size = ranks.norm(w)
        entries = [*column.tolist(), size]
        for i, (c, s) in enumerate(rotations):
            entries[i : i + 2] = (
                c * entries[i] + s * entries[i + 1], c * entries[i + 1] - s * entries[i]
            )  # fmt: skip
        last, below = entries[k:]
        pivot = math.hypot(last, below)
        if pivot == 0.0:  # A is singular on this space: x stays in the one before
            break
        rotations.append((last / pivot, below / pivot))
        R.append([*entries[:k], pivot])
        rotated[k:] = [rotated[k] * last / pivot, -rotated[k] * below / pivot]
        left = abs(rotated[k + 1])
        if left <= target or not size > 1e-15 * length or k + 1 == most:
            break
        basis.append(w / size)
    y = [0.0] * len(R)
    for i in reversed(range(len(R))):
        known = sum(R[j][i] * y[j] for j in range(i + 1, len(R)))
        y[i] = (rotated[i] - known) / R[i][i]
    weights = torch.tensor(y, dtype=V.dtype, device=V.device)
    return (weights @ V[: len(R)]).view(shape), k + 1

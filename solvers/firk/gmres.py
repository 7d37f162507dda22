"""GMRES for the coupled stages, on tensors that ranks share."""

from __future__ import annotations

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
    H = torch.zeros(most + 1, most, dtype=torch.float64, device="cpu")
    unit = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    unit[0] = norm
    for k in range(most):
        w = apply(basis[k].view(shape)).reshape(-1)
        V = torch.stack(basis)
        length = ranks.norm(w)
        for _ in range(2):  # once more for what round-off has left
            part = ranks.sum(V @ w)
            w = w - part @ V
            H[: k + 1, k] += part.cpu()
        H[k + 1, k] = size = ranks.norm(w)
        y = torch.linalg.lstsq(H[: k + 2, : k + 1], unit[: k + 2, None]).solution[:, 0]
        left = float((unit[: k + 2] - H[: k + 2, : k + 1] @ y).norm())
        if left <= target or not size > 1e-15 * length or k + 1 == most:
            break
        basis.append(w / size)
    return (y.to(V) @ V).view(shape), k + 1

"""Checks of gradients for users and for pnode's own tests.

>>> import torch, pnode
>>> from pnode.testing import taylor_test
>>> solver = pnode.Solver(lambda t, y: -(y**3), method="rk4", step_size=0.1)
>>> y0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
>>> result = taylor_test(lambda: solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum(), [y0])
>>> result.order > 1.95
True
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode.base.ledger import Ledger
from pnode.errors import ConfigurationError
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem, collect_parameters

__all__ = ["TaylorResult", "dot_product_test", "taylor_test"]


@dataclass(frozen=True)
class TaylorResult:
    """Remainders of a Taylor test.

    Attributes
    ----------
    sizes : tuple of float
        Sizes h of the perturbation.
    remainders : tuple of float
        ``|J(x + h d) - J(x) - h J'(x) d|``; falls as h^2 if the gradient is right, as h if not.
    rates : tuple of float
        Observed orders between consecutive sizes.
    order : float
        The smallest rate; 2 for an exact gradient, 1 for a wrong one. Infinite if the loss is
        linear along d, where the remainders are round-off.
    """

    sizes: tuple[float, ...]
    remainders: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def order(self) -> float:
        """The smallest observed order."""
        return min(self.rates)


def taylor_test(
    loss: Callable[[], torch.Tensor],
    inputs: Iterable[torch.Tensor],
    *,
    size: float = 1e-3,
    halvings: int = 4,
    seed: int = 0,
) -> TaylorResult:
    """Check the gradient of a loss against the loss itself by its Taylor remainder.

    Parameters
    ----------
    loss : callable
        Computes a scalar tensor from the inputs, without arguments.
    inputs : iterable of Tensor
        Leaf tensors that require grad, all perturbed at once along one random direction; they are
        put back afterwards.
    size : float
        Largest perturbation, relative to the norm of the inputs (or to 1 if that is smaller).
    halvings : int
        How often it is halved, at least 1.
    seed : int
        Of the direction.

    Returns
    -------
    TaylorResult

    Raises
    ------
    ConfigurationError
        If an input is not a leaf that requires grad, or the loss is not a scalar.

    Notes
    -----
    Not collective. With adaptive steps the loss is not smooth: steps change with the input while
    the gradient holds them fixed. Use fixed steps, or tight tolerances and large perturbations.
    """
    tensors = list(inputs)
    for index, tensor in enumerate(tensors):
        if not (isinstance(tensor, torch.Tensor) and tensor.is_leaf and tensor.requires_grad):
            raise ConfigurationError(
                f"inputs[{index}] is not a leaf tensor that requires grad: call requires_grad_()"
            )
    value = loss()
    if value.numel() != 1:
        raise ConfigurationError(f"the loss has shape {tuple(value.shape)}: reduce it to a scalar")
    gradients = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
    norm = math.hypot(*(float(torch.linalg.vector_norm(d)) for d in directions))
    lengths = (float(torch.linalg.vector_norm(t.detach())) for t in tensors)
    scale = max(1.0, math.hypot(*lengths)) / norm
    directions = [direction * scale for direction in directions]
    slope = sum(
        float((gradient.conj() * direction).sum().real)
        for gradient, direction in zip(gradients, directions, strict=True)
        if gradient is not None
    )
    start = float(value.detach())
    sizes = tuple(size * 0.5**k for k in range(halvings + 1))
    remainders = tuple(
        abs(_perturbed(loss, tensors, directions, h) - start - h * slope) for h in sizes
    )
    # What round-off leaves of the difference of two losses.
    noise = 64.0 * torch.finfo(value.dtype).eps * max(abs(start), abs(slope) * size)
    rates = tuple(
        math.inf if coarse <= noise else math.log2(coarse / max(fine, 1e-300))
        for coarse, fine in itertools.pairwise(remainders)
    )
    return TaylorResult(sizes, remainders, rates)


def _perturbed(
    loss: Callable[[], torch.Tensor],
    tensors: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    h: float,
) -> float:
    """Loss at inputs + h * directions; the inputs are restored bit for bit."""
    saved = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        try:
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.add_(direction, alpha=h)
            return float(loss())
        finally:
            for tensor, original in zip(tensors, saved, strict=True):
                tensor.copy_(original)


def dot_product_test(
    func: Callable[..., Any],
    t: float,
    y: Any,
    *,
    params: Iterable[torch.Tensor] | None = None,
    seed: int = 0,
) -> float:
    """Check that JVPs and VJPs of a vector field are transposes: <J v, w> = <v, J^T w>.

    Parameters
    ----------
    func : callable
        The vector field ``f(t, y)``.
    t : float
        Time.
    y : Tensor or tuple of Tensor
        State.
    params : iterable of Tensor, optional
        As for :class:`pnode.Solver`.
    seed : int
        Of v and w.

    Returns
    -------
    float
        ``|<J v, w> - <v, J^T w>|`` relative to ``|J v| |w|``: round-off if all is well.

    Notes
    -----
    Not collective.
    """
    problem = InitialValueProblem.create(
        func, y, torch.tensor([float(t)], dtype=torch.float64), collect_parameters([func], params)
    )
    field = VectorField(problem, Ledger())
    u = problem.layout.flatten(y).detach().clone()
    generator = torch.Generator().manual_seed(seed)
    v, w = (torch.randn(u.shape, generator=generator, dtype=u.dtype) for _ in range(2))
    linearization = field.linearize(float(t), u)
    forward, backward = linearization.jvp(v), linearization.vjp(w).state
    left, right = float(torch.dot(forward, w)), float(torch.dot(v, backward))
    return abs(left - right) / max(float(forward.norm() * w.norm()), 1e-300)

"""Normalizations written out, where torch's third derivatives of its own are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["PlainNorms"]


class PlainNorms(TorchFunctionMode):
    """A context in which ``layer_norm`` and ``batch_norm`` of running statistics are plain sums."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, or what stands for it."""
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    off = input - input.mean(dims, keepdim=True)
    return _affine(off / (off.square().mean(dims, keepdim=True) + eps).sqrt(), weight, bias)


def _batch_norm(
    input: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    if training or running_mean is None or running_var is None:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    tail = (-1, *(1 for _ in input.shape[2:]))
    own = (None if one is None else one.view(tail) for one in (weight, bias))
    off = input - running_mean.view(tail)
    return _affine(off / (running_var.view(tail) + eps).sqrt(), *own)


def _affine(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_PLAIN: dict[Any, Any] = {
    functional.layer_norm: _layer_norm, functional.batch_norm: _batch_norm
}  # fmt: skip

"""Tensors as flat real numbers, which is what ranks add up."""

from __future__ import annotations

import torch

__all__ = ["as_reals", "count_reals", "from_reals"]


def count_reals(tensor: torch.Tensor) -> int:
    """Return how many real numbers a tensor holds: two per entry of a complex one."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor, flat."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def from_reals(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return such numbers as a new tensor of the shape of ``like``, complex if that is."""
    own = numbers.clone()  # at the start of its memory, where torch wants complex numbers
    if like.is_complex():
        return torch.view_as_complex(own.reshape(*like.shape, 2))
    return own.reshape(like.shape)

"""What programs of scalars read besides t and y."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.trace import Untraceable

__all__ = ["Numbers"]


class Numbers:
    """Tensors that a graph has captured, of which a program of scalars is to be written.

    Parameters
    ----------
    captured : sequence of Tensor
        The tensors.

    Raises
    ------
    Untraceable
        If there is one that such programs do not read.
    """

    def __init__(self, captured: Sequence[torch.Tensor]) -> None:
        for tensor in captured:
            number = tensor.is_floating_point() or tensor.is_complex()
            if (number and tensor.dtype is not REAL) or tensor.device.type != "cpu":
                raise Untraceable(f"it reads a tensor of type {tensor.dtype} on {tensor.device}")
        # Integers, which are part of the text, and what they were.
        self._written = [(x, x.clone()) for x in captured if x.dtype is not REAL]

    def are_out_of_date(self) -> bool:
        """Whether what is part of the text has changed."""
        return not all(torch.equal(x, before) for x, before in self._written)

    @staticmethod
    def present(captured: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors as the program takes them."""
        return [
            x
            if x.dtype is REAL and x.is_contiguous() and not x.is_neg()
            else x.detach().to(REAL).resolve_neg().contiguous()
            for x in captured
        ]

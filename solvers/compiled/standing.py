"""What a solve keeps of a Module that is known to be unchanged, made once for all its solves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pnode.base.surroundings import Surroundings
from pnode.field.held import Held, bare_copy

__all__ = ["Standing"]


class Standing:
    """Stands for a Module whose code :mod:`pnode.solvers.compiled.unchanged` has looked through.

    That reads the tensors of its graph, values that cannot change, and other Modules: nothing else
    of it need be kept for backward sweeps, nor looked at in each solve.

    Parameters
    ----------
    function : Module
        f.
    tensors : iterable of Tensor
        What its graph reads, and what it is differentiated by.
    device : torch.device
        Where f computes.
    """

    def __init__(
        self, function: torch.nn.Module, tensors: Iterable[torch.Tensor], device: torch.device
    ) -> None:
        among = frozenset(map(id, tensors))
        self._surroundings = Surroundings((function,), device, among)
        #: f, as a node may hold it.
        self.held = Held(function, function, bare_copy(function, among))

    def surroundings(self) -> Surroundings:
        """Return what f sees besides its arguments now."""
        return self._surroundings.again()

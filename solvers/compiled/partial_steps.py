"""Parts of steps in machine code, each from a step's start, and their adjoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import byref, c_double
from typing import Any

import torch

from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.solvers.compiled.driver_library import at, library
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.records import Counts, add_counts, failure, pointers
from pnode.solvers.stepping import Step

__all__ = ["CompiledParts"]


class CompiledParts:
    """Parts of a sweep's steps, which a kernel of their own takes.

    Parameters
    ----------
    kernel : Kernel
        What the steps are.
    handle : int
        A kernel of ``kernel.h`` without error control; it is taken over.
    direction : float
        That of the user's time.
    """

    _handle: Any = None

    def __init__(self, kernel: Kernel, handle: int, direction: float) -> None:
        self._kernel, self._direction = kernel, direction
        self._library = library()
        self._handle = self._library.pnode_partial(handle)
        if not self._handle:
            raise MemoryError("there is no memory for compiled partial steps")

    def __del__(self) -> None:
        """Free the kernel, but not when Python ends."""
        if self._handle and not sys.is_finalizing():
            self._library.pnode_free_partial(self._handle)

    def begin(self) -> None:
        """Begin a pass over the steps, with the tensors that f reads as they are now."""
        self._pulled = False
        self._inputs, self._sums = self._kernel.inputs(), self._kernel.sums()
        self._read, self._places = pointers(self._inputs), pointers(self._sums)

    def end(self, ledger: Ledger) -> None:
        """End it, which a ledger counts."""
        counts = Counts()
        self._library.pnode_partial_counts(self._handle, byref(counts))
        add_counts(counts, ledger)

    def take(
        self, step: Step, lengths: Sequence[float], start: torch.Tensor, keep: bool
    ) -> torch.Tensor | None:
        """Take parts of a step.

        Parameters
        ----------
        step : Step
            The step.
        lengths : sequence of float
            Theirs.
        start : Tensor
            The state that they begin at, shape ``(size,)``, float64.
        keep : bool
            Whether :meth:`pull_back` follows.

        Returns
        -------
        Tensor or None
            The states that they lead to, shape ``(number, size)``; None if one of them fails.
        """
        ends = torch.empty((len(lengths), len(start)), dtype=REAL)
        begun = start.contiguous()
        status = self._library.pnode_partial_take(
            self._handle, self._read, *self._placed(step, lengths), len(lengths), keep, at(begun),
            at(ends),
        )  # fmt: skip
        return None if status else ends

    def pull_back(
        self, step: Step, lengths: Sequence[float], cotangents: torch.Tensor
    ) -> torch.Tensor:
        """Return what the start of the parts that were taken gets from cotangents of their ends.

        Raises
        ------
        LinearSolveFailed
            If a matrix is singular.
        """
        rows = cotangents.clone(memory_format=torch.contiguous_format)
        status = self._library.pnode_partial_adjoint(
            self._handle, self._read, *self._placed(step, lengths), self._places, at(rows)
        )
        if status:
            raise failure("adjoint", status)
        self._pulled = True
        return rows.sum(0)

    def gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return what the parameters got in this pass, of so many; None for those f never used."""
        found = dict(self._kernel.gradients(self._sums) if self._pulled else ())
        return [found.get(index) for index in range(count)]

    def _placed(self, step: Step, lengths: Sequence[float]) -> tuple[float, Any]:
        d = self._direction
        return d * step.start, (c_double * len(lengths))(*[d * length for length in lengths])

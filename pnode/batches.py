"""Batches of tangents and cotangents, of torch.func.vmap, taken one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.errors import BackwardError
from pnode.run import Run
from pnode.transforms import stacked

__all__ = ["Runs", "Times", "one_by_one"]


class Times(dict[int, float]):
    """Derivatives by the times of interpolated outputs; torch.func would copy a plain dict."""


class Runs:
    """The sweeps behind one node: one, or one for each entry of a batch of tangents."""

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        self._runs = list(runs)

    def append(self, run: Run) -> None:
        """Add one."""
        self._runs.append(run)

    def all(self) -> list[Run]:
        """Return all of them."""
        return self._runs

    def __getitem__(self, index: int) -> Run:
        return self._runs[index if len(self._runs) > 1 else 0]

    def only(self) -> Run:
        """Return the one, to be differentiated once more.

        Raises
        ------
        BackwardError
            If there are several.
        """
        if len(self._runs) != 1:
            raise BackwardError(
                "a batch of tangents (torch.func.vmap) inside of what is differentiated once more "
                "cannot pass through a solve: take vmap outermost, or a loop"
            )
        return self._runs[0]


def one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Apply a function to one entry of a batch after the other.

    A solve among its inputs is that of the entry, and is added to what there is if it is new.
    """
    results = []
    place = next(i for i, value in enumerate(inputs) if isinstance(value, Runs))
    runs = inputs[place]
    is_new = not runs.all()
    for index in range(info.batch_size):
        one = [
            value if dim is None else value.select(dim, index)
            for value, dim in zip(inputs, in_dims, strict=True)
        ]
        one[place] = own = Runs() if is_new else Runs([runs[index]])
        results.append(function.apply(*one))
        if is_new:
            runs.append(own[0])
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    columns = [stacked(column) for column in zip(*results, strict=True)]
    return tuple(columns), tuple(None if column is None else 0 for column in columns)

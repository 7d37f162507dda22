"""The accepted steps of a sweep, in columns: 32 bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from pnode.solvers.stepping import Step

__all__ = ["Steps"]


class Steps(Sequence[Step]):
    """Accepted steps from the first on, without the memory of an object for each.

    Parameters
    ----------
    steps : iterable of Step
        To begin with.
    """

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self._starts, self._lengths, self._ends = array("d"), array("d"), array("d")
        self._orders = array("q")
        self._taken: dict[int, int] = {}  # orders that are more than a number
        for step in steps:
            self.append(step)

    def append(self, step: Step) -> None:
        """Add the next step."""
        if type(step.order) is not int:
            self._taken[len(self)] = step.order
        self._starts.append(step.start)
        self._lengths.append(step.length)
        self._ends.append(step.end)
        self._orders.append(step.order)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        """Return a step, or a list of them."""
        found = range(len(self))[index]
        return self._step(found) if isinstance(found, int) else [self._step(i) for i in found]

    def _step(self, index: int) -> Step:
        order = self._taken.get(index, self._orders[index])
        return Step(index, self._starts[index], self._lengths[index], self._ends[index], order)

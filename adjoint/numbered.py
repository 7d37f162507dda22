"""A schedule's actions as numbers, many at a time, for sweeps that follow them in machine code."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from pnode.adjoint.schedule import (
    Action,
    Adjoint,
    Advance,
    DiscardSolution,
    DiscardStages,
    KeepEnd,
    RestoreEnd,
    RestoreSolution,
    RestoreStages,
    Schedule,
    StoreSolution,
    StoreStages,
)

__all__ = ["NumberedSchedule"]

# Of checkpoints.h, where ACCEPTED, 2, ends what follows a step.
_ACTIONS: dict[type[Action], int] = {
    Advance: 0, Adjoint: 1, StoreSolution: 3, RestoreSolution: 4, DiscardSolution: 5,
    StoreStages: 6, RestoreStages: 7, DiscardStages: 8, RestoreEnd: 9, KeepEnd: 10,
}  # fmt: skip
_ADVANCE, _ACCEPTED = 0, 2
# Steps that orders are made for before it is known whether they are taken, at first and at most.
_FIRST, _MOST = 32, 4096


class NumberedSchedule:
    """The orders of a schedule, of one level of memory, for one sweep.

    Parameters
    ----------
    schedule : Schedule
        Belongs to it from now on.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def forward(self) -> Iterator[array[int]]:
        """Yield the orders of a forward sweep: before each step, the step, and after it."""
        step, number = 0, _FIRST
        while True:
            orders = array("q")
            for index in range(step, step + number):
                _extend(orders, self._schedule.before_step(index))
                orders.extend((_ADVANCE, index))
                _extend(orders, self._schedule.after_step(index))
                orders.extend((_ACCEPTED, index))
            yield orders
            step, number = step + number, min(2 * number, _MOST)

    def reverse(self, steps: int) -> Iterator[array[int]]:
        """Yield the orders of the backward sweep over so many steps."""
        schedule = self._schedule
        for index in range(steps):  # it may have been asked for more of them
            deque(schedule.before_step(index), 0)
            deque(schedule.after_step(index), 0)
        actions = schedule.reverse(steps)
        while True:
            orders = array("q")
            _extend(orders, islice(actions, _MOST))
            yield orders


def _extend(orders: array[int], actions: Iterable[Action]) -> None:
    for action in actions:
        orders.extend((_ACTIONS[type(action)], action.step))

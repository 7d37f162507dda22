"""What a solve is to look for: functions of time and state whose zeros are events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode.base.errors import ConfigurationError, EventError
from pnode.problems.problem import StateLayout

__all__ = ["Event", "Events", "call_event"]


@dataclass(frozen=True, eq=False)
class Event:
    """A function whose zeros along a solution are events; one or a list of them is ``event_fn=``.

    Parameters
    ----------
    fn : callable
        ``fn(t, y)`` returns a real tensor of one or several numbers, each of which is looked at.
        A Module's or a closure's parameters get gradients through times and states of its events.
    direction : {0, 1, -1}
        1: only where a number becomes positive, or zero from below, as the solve goes on; -1: only
        where it becomes negative, or zero from above; 0: both.
    terminal : bool
        Whether the solve ends there. If not, the step is cut in two at the event, and the solve
        goes on.

    Raises
    ------
    ConfigurationError
        For an unusable value.

    Examples
    --------
    >>> import torch
    >>> top = Event(lambda t, y: y[1], direction=-1, terminal=False)
    """

    fn: Callable[..., Any]
    direction: int = 0
    terminal: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if not callable(self.fn):
            raise ConfigurationError(f"fn is {self.fn!r}: give a callable (t, y)")
        given = self.direction
        if isinstance(given, (bool, str)) or given not in (-1, 0, 1):
            raise ConfigurationError(f"direction={given!r}: give 0, 1 (rising) or -1 (falling)")
        if not isinstance(self.terminal, bool):
            raise ConfigurationError(f"terminal={self.terminal!r}: give True or False")


class Events(tuple[Event, ...]):
    """The events of one solve, in the order given.

    Attributes
    ----------
    listed : bool
        Whether they were given as a list, for error messages.
    sizes : tuple of int
        How many numbers each function returned when they were last called.
    given : tuple of callable
        The user's functions.
    """

    listed: bool
    sizes: tuple[int, ...]
    given: tuple[Callable[..., Any], ...]

    @staticmethod
    def of(given: Any) -> Events:
        """Return ``event_fn=`` as events.

        Raises
        ------
        ConfigurationError
            If it is neither a callable, an :class:`Event`, nor a list or tuple of these.
        """
        listed = isinstance(given, (list, tuple))
        if listed and not given:
            raise ConfigurationError("event_fn is empty: give at least one event, or None")
        for index, each in enumerate(given if listed else [given]):
            if not isinstance(each, Event) and not callable(each):
                name = f"event_fn[{index}]" if listed else "event_fn"
                raise ConfigurationError(
                    f"{name} is {each!r}: give a callable (t, y), a pnode.Event, or a list of these"
                )
        found = [each if isinstance(each, Event) else Event(each) for each in
                 (given if listed else [given])]  # fmt: skip
        return Events._made(found, listed, tuple(one.fn for one in found))

    @staticmethod
    def _made(found: Sequence[Event], listed: bool, given: tuple[Any, ...]) -> Events:
        events = Events(found)
        events.listed, events.sizes, events.given = listed, (), given
        return events

    def mapped(self, change: Callable[[Any], Any]) -> Events:
        """Return them with functions changed."""
        changed = [replace(one, fn=change(one.fn)) for one in self]
        return Events._made(changed, self.listed, self.given)

    @staticmethod
    def modules(given: Any) -> torch.nn.ModuleList | None:
        """Return those of the functions that are Modules, unless that is what is given."""
        if given is None or isinstance(given, torch.nn.Module):
            return None
        found = [one.fn for one in Events.of(given) if isinstance(one.fn, torch.nn.Module)]
        return torch.nn.ModuleList(found) if found else None

    @staticmethod
    def may_end(given: Any) -> bool:
        """Tell whether one of them may end the solve."""
        return given is not None and any(one.terminal for one in Events.of(given))

    @property
    def cut(self) -> bool:
        """Whether one of them may cut a step in two."""
        return not all(one.terminal for one in self)

    def owner(self, entry: int) -> int:
        """Return the index of the event that an entry of all numbers belongs to."""
        for index, size in enumerate(self.sizes):
            if entry < size:
                return index
            entry -= size
        raise IndexError(entry)

    def name(self, index: int) -> str:
        """Return how an event is called in error messages."""
        return f"event_fn[{index}]" if self.listed else "event_fn"


def call_event(
    events: Events,
    layout: StateLayout,
    time: torch.Tensor,
    u: torch.Tensor,
    where: dict[str, Any],
) -> torch.Tensor:
    """Call the functions of all events, check what kind of thing comes back, and return it flat.

    Parameters
    ----------
    events : Events
        Each with ``fn(t, y)``.
    layout : StateLayout
        Of the state.
    time : Tensor
        The user's time, 0-dim.
    u : Tensor
        Flat state, the user's precision; not written into by anybody else.
    where : dict
        Time, step and method, for error messages.
    """
    parts = []
    for index, event in enumerate(events):
        # Each has a state of its own, which it may write into.
        result = event.fn(time, layout.unflatten(u if len(events) == 1 else u.clone()))
        wrong = None
        if not isinstance(result, torch.Tensor):
            wrong = f"a {type(result).__name__}, not a tensor"
        elif not result.dtype.is_floating_point:
            wrong = f"a tensor of dtype {result.dtype}: an event is a sign change of real numbers"
        elif result.numel() == 0:
            wrong = "an empty tensor"
        if wrong is not None:
            raise EventError(f"{events.name(index)} returned {wrong}", **where)
        parts.append(result.reshape(-1))
    sizes = tuple(len(part) for part in parts)
    if events.sizes and sizes != events.sizes:
        index = next(i for i, size in enumerate(sizes) if size != events.sizes[i])
        raise EventError(
            f"{events.name(index)} returned {sizes[index]} numbers after {events.sizes[index]} "
            "the time before",
            **where,
        )
    events.sizes = sizes
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(parts[0].dtype) for part in parts])

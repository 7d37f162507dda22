"""What changes the derivatives of f alone, and not its operations."""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = ["APPLIED", "entrances"]

APPLIED = "an autograd function of the user's"
_lock = threading.Lock()
_looking: list[entrances] = []


class entrances:
    """Take down, besides operations, what changes derivatives alone in an evaluation.

    No mode is told of autograd functions of the user's, and a dispatch mode neither of blocks
    without a graph nor of hooks: their entrances in torch are others meanwhile. None of these is
    what function modes are told of.

    Parameters
    ----------
    facts, notes : list
        What has been taken down so far, and where to, each with its place among those.
    """

    _places = (
        (torch.autograd.Function, "apply"), (torch.set_grad_enabled, "__init__"),
        (torch.enable_grad, "__enter__"), (torch._C, "_InferenceMode"),
        (torch.utils.hooks.RemovableHandle, "__init__"),
    )  # fmt: skip
    _originals: tuple[Any, ...] = ()

    def __init__(self, facts: list[Any], notes: list[Any]) -> None:
        self._facts, self._notes, self._thread = facts, notes, threading.get_ident()

    def __enter__(self) -> None:
        with _lock:
            if not _looking:
                originals = tuple(vars(place)[name] for place, name in self._places)
                entrances._originals = originals
                for (place, name), original in zip(self._places, originals, strict=True):
                    setattr(place, name, _noted(place, name, original))
            _looking.append(self)

    def __exit__(self, *error: object) -> None:
        with _lock:
            _looking.remove(self)
            if not _looking:
                for (place, name), original in zip(self._places, self._originals, strict=True):
                    setattr(place, name, original)

    @staticmethod
    def note(*facts: Any) -> None:
        """Take down what the present thread does, if someone wants to know."""
        thread = threading.get_ident()
        for one in tuple(_looking):
            if one._thread == thread:
                one._notes.extend((len(one._facts), *facts))


def _noted(place: Any, name: str, original: Any) -> Any:
    """Return what takes a call down and makes it."""

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        # A class that f makes anew each time has the code that it had.
        codes = [getattr(f, "__code__", f) for f in (kind.forward, kind.backward)]
        entrances.note(APPLIED, *codes)
        return original.__get__(None, kind)(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        entrances.note(place, name, *(x for x in args if type(x) is bool))
        return original(*args, **kwargs)

    return classmethod(apply) if name == "apply" else call

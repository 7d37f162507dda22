"""The user's functions as a node of the graph holds them: without keeping alive what owns them.

A Module that keeps a result of its own solve, or anything made of it, is part of a circle: Module,
tensor, torch's nodes, ours, the function, Module. Python's collector does not see through nodes, so
nothing of it would ever be freed. Our node therefore refers to a Module weakly. A backward sweep of
a Module that is gone takes a copy of it, made after the forward sweep: other Modules and containers
with the same parameters, buffers and values in them, without graphs.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from pnode.base.surroundings import modules_within
from pnode.solutions.solution import Solution

__all__ = ["Held", "bare_copy", "held", "is_plain", "now"]

# A Module's own book-keeping.
_OWN = frozenset(vars(torch.nn.Module()))
_TENSORS = frozenset(("_parameters", "_buffers", "_modules"))
_PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype))
#: Containers with more entries are shared with the copy, not looked through.
_MOST_ENTRIES = 1000
_MOST_LEVELS = 8


class Held:
    """A function that belongs to a Module, or is one, held weakly.

    Parameters
    ----------
    owner : Module
        The Module.
    function : callable
        Itself, or a method bound to it.
    copy : Module
        Stands for a Module that is gone.
    """

    def __init__(self, owner: torch.nn.Module, function: Any, copy: torch.nn.Module) -> None:
        self._owner = weakref.ref(owner)
        self._method = None if function is owner else function.__func__
        self._copy = copy

    def now(self) -> Any:
        """Return the function; of the copy if nothing else keeps its Module."""
        owner = self._owner()
        owner = self._copy if owner is None else owner
        return owner if self._method is None else types.MethodType(self._method, owner)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self.now()(*arguments)


def held(function: Any, declared: Iterable[torch.Tensor]) -> Any:
    """Return a function as a node may hold it.

    The same one if it is of no Module, or of one that a copy might not stand for: what closures,
    other objects and Modules with a finaliser or with slots refer to stays alive with the node.
    """
    is_method = isinstance(function, types.MethodType)
    owner = function.__self__ if is_method else function
    if not isinstance(owner, torch.nn.Module):
        return function
    modules = modules_within([owner])
    if not all(map(_may_be_copied, map(type, modules))):
        return function
    return Held(owner, function, _Copies(modules, declared).of(owner))


def bare_copy(module: torch.nn.Module, tensors: Collection[int]) -> torch.nn.Module:
    """Return a copy of a Module that has these tensors, by their identity, and plain values alone.

    For code that reads nothing else.
    """
    modules = modules_within([module])
    copies = _Copies(modules, ())
    for each in modules:
        own = vars(copies.of(each))
        for name in ("_parameters", "_buffers"):
            found = getattr(each, name).items()
            own[name] = {k: x for k, x in found if x is None or id(x) in tensors}
        for name in own.keys() - _OWN:
            if not is_plain(own[name]):
                del own[name]
    return copies.of(module)


def is_plain(value: Any) -> bool:
    """Whether a value cannot change."""
    if type(value) in (tuple, torch.Size):
        return all(map(is_plain, value))
    return type(value) in _PLAIN


def now(function: Any) -> Any:
    """Return a function that may be held, to be called often."""
    return function.now() if isinstance(function, Held) else function


@lru_cache(maxsize=256)
def _may_be_copied(kind: Any) -> bool:
    """Whether instances of a class may be copied."""
    return not (
        issubclass(kind, torch.jit.ScriptModule)
        or hasattr(kind, "__del__")
        or any(vars(base).get("__slots__") for base in kind.__mro__)
    )


class _Copies:
    """Copies of the Modules of one tree, without graphs of their tensors.

    Parameters
    ----------
    modules : sequence of Module
        All of them.
    declared : iterable of Tensor
        What gradients are wanted for, which the copies have as it is.
    """

    def __init__(
        self, modules: Sequence[torch.nn.Module], declared: Iterable[torch.Tensor]
    ) -> None:
        self._declared = frozenset(map(id, declared))
        self._made = {id(module): object.__new__(type(module)) for module in modules}
        for module in modules:
            given, own = vars(module), vars(self.of(module))
            own.update(given)
            for name in _TENSORS:
                found = given[name]
                own[name] = {k: self._light(each) for k, each in found.items()} if found else {}
            for name in given.keys() - _OWN:
                if not is_plain(value := given[name]):
                    own[name] = self._light(value)

    def of(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return the copy of a Module."""
        return self._made[id(module)]

    def _light(self, value: Any, level: int = 0) -> Any:
        """Return a value without graphs, in containers of its own."""
        kind = type(value)
        if kind is torch.nn.Parameter or isinstance(value, torch.Tensor):
            plain = value.grad_fn is None or id(value) in self._declared
            return value if plain else value.detach()
        if isinstance(value, torch.nn.Module):
            return self._made.get(id(value), value)
        if kind is types.MethodType and id(value.__self__) in self._made:
            return types.MethodType(value.__func__, self._made[id(value.__self__)])
        if level == _MOST_LEVELS:
            return value
        if kind in (list, tuple, set) and len(value) <= _MOST_ENTRIES:
            return kind(self._light(item, level + 1) for item in value)
        if kind is dict and len(value) <= _MOST_ENTRIES:
            return {key: self._light(item, level + 1) for key, item in value.items()}
        if kind is Solution:
            kept = {each.name for each in fields(value)} - {"stage_sweep", "path"}
            return Solution(**{name: self._light(getattr(value, name), level + 1) for name in kept})
        return value

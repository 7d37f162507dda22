"""Hooks on parameters, kept away from the single products of a sweep.

A backward sweep takes a parameter's gradient as a sum of products, each by autograd, and torch
calls the hooks of a tensor on whatever it captures for that tensor. They are to act once, on the
whole gradient, as they do when a solve's gradient leaves it for the graph outside. While products
are taken the dictionaries of hooks are therefore empty: torch looks at them at each call.

Nor may a product go through a parameter to another one that it was made of: the graph outside of
the solve takes that way with the whole gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["ParameterHooks", "hooks_of"]


@dataclass
class _Stash:
    """What was taken off a tensor, and by how many products that are under way."""

    tensor: torch.Tensor
    users: int = 0
    hooks: dict[int, Callable[..., Any]] = field(default_factory=dict)
    gradient: torch.Tensor | None = None
    barrier: Any = None


_lock = threading.Lock()
_stashed: dict[int, _Stash] = {}


class ParameterHooks:
    """The parameters of a field that have hooks, or stand between others and the field.

    Parameters
    ----------
    observed : sequence of Tensor
        Those with hooks, or whose gradient is retained.
    derived : sequence of Tensor
        Those that were made of other parameters.
    """

    def __init__(self, observed: Sequence[torch.Tensor], derived: Sequence[torch.Tensor]) -> None:
        chosen = {id(tensor): tensor for tensor in (*observed, *derived)}
        self._tensors = tuple(chosen.values())
        self._derived = frozenset(map(id, derived))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take products that no hook sees; may be nested, and used by several threads at once."""
        with _lock:
            for tensor in self._tensors:
                stash = _stashed.setdefault(id(tensor), _Stash(tensor))
                stash.users += 1
                if stash.users == 1:
                    _take_off(stash, id(tensor) in self._derived)
        try:
            yield
        finally:
            with _lock:
                for tensor in self._tensors:
                    stash = _stashed[id(tensor)]
                    stash.users -= 1
                    if not stash.users:
                        del _stashed[id(tensor)]
                        _put_back(stash)


def hooks_of(parameters: Sequence[torch.Tensor]) -> ParameterHooks | None:
    """Return what has to be kept away from products, or None."""
    observed = [tensor for tensor in parameters if tensor._backward_hooks or tensor.retains_grad]
    derived = [tensor for tensor in parameters if tensor.grad_fn is not None]
    if derived and len(parameters) > 1:
        derived = [tensor for tensor in derived if _is_made_of(tensor, parameters)]
    else:
        derived = []
    return ParameterHooks(observed, derived) if observed or derived else None


def _is_made_of(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the graph of a parameter leads to another one."""
    leaves = {id(other) for other in parameters if other.grad_fn is None}
    edges = {(other.grad_fn, other.output_nr) for other in parameters if other.grad_fn is not None}
    assert tensor.grad_fn is not None
    pending, seen = list(tensor.grad_fn.next_functions), set()
    while pending:
        edge = pending.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in edges or id(getattr(edge[0], "variable", None)) in leaves:
            return True
        pending.extend(edge[0].next_functions)
    return False


def _take_off(stash: _Stash, derived: bool) -> None:
    tensor = stash.tensor
    if tensor._backward_hooks:
        stash.hooks = dict(tensor._backward_hooks)
        tensor._backward_hooks.clear()
    if tensor.retains_grad:
        stash.gradient, tensor.grad = tensor.grad, None
    if derived:
        # torch captures the gradient of a tensor that it goes on from before it calls hooks.
        stash.barrier = tensor.register_hook(torch.zeros_like)


def _put_back(stash: _Stash) -> None:
    tensor = stash.tensor
    if stash.barrier is not None:
        stash.barrier.remove()
    if stash.hooks:
        assert tensor._backward_hooks is not None
        added = dict(tensor._backward_hooks)
        tensor._backward_hooks.clear()
        tensor._backward_hooks.update({**stash.hooks, **added})
    if tensor.retains_grad:
        tensor.grad = stash.gradient

"""Hooks on parameters, which are not to act on the single products of a sweep.

A backward sweep takes a parameter's gradient as a sum of products, each by autograd, and torch
calls the hooks of a tensor on whatever it captures for that tensor. They are to act once, on the
whole gradient, as they do when a solve's gradient leaves it for the graph outside. They are
therefore replaced, where torch keeps them, by functions that do nothing while products are taken.

Nor may a product go through a parameter to another one that it was made of: the graph outside of
the solve takes that way with the whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["ParameterHooks", "hooks_of"]

# Of one thread; torch takes it along into the threads that its engine has for devices.
_PRODUCTS = "pnode takes products"


class ParameterHooks:
    """That there are hooks on a field's parameters, and what is to be done about them.

    Parameters
    ----------
    retaining : sequence of Tensor
        The parameters that retain their gradient.
    made : sequence of Tensor
        Those that were made of others.
    """

    def __init__(self, retaining: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        self._retaining = tuple(retaining)
        #: Where products are to end.
        self.ends = frozenset(map(id, made))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take products that no hook acts on; may be nested."""
        before = _products()
        retained = [tensor.grad for tensor in self._retaining]
        for tensor in self._retaining:
            tensor.grad = None
        torch._C._stash_obj_in_tls(_PRODUCTS, self)
        try:
            yield
        finally:
            torch._C._stash_obj_in_tls(_PRODUCTS, before)
            for tensor, gradient in zip(self._retaining, retained, strict=True):
                tensor.grad = gradient


def hooks_of(parameters: Sequence[torch.Tensor]) -> ParameterHooks | None:
    """Make the hooks on parameters keep away from products; None if there are none.

    Parameters
    ----------
    parameters : sequence of Tensor
        Leaves or not. Those that were made of other ones get a hook more.
    """
    inner = [tensor for tensor in parameters if tensor.grad_fn is not None]
    retaining = [tensor for tensor in inner if tensor.retains_grad]
    made = _made_of_others(inner, parameters) if inner and len(parameters) > 1 else []
    for tensor in made:
        _bar(tensor)
    hooked = False
    for tensor in parameters:
        if tensor._backward_hooks:
            hooked = True
            _guard(tensor._backward_hooks)
    return ParameterHooks(retaining, made) if hooked or retaining else None


def _products() -> ParameterHooks | None:
    """Return on whose behalf this thread takes products, if it does."""
    found = torch._C._is_key_in_tls(_PRODUCTS) and torch._C._get_obj_in_tls(_PRODUCTS)
    return found if isinstance(found, ParameterHooks) else None


class _Guarded:
    """A hook that does nothing while products are taken."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        mark = "__torch_unserializable__"
        if getattr(hook, mark, False) is True:  # torch need not warn about it
            setattr(self, mark, True)

    def __call__(self, gradient: torch.Tensor) -> Any:
        return self.hook(gradient) if _products() is None else None

    def __repr__(self) -> str:
        return repr(self.hook)


class _End(_Guarded):
    """Ends the products that are to end at a tensor.

    torch calls hooks on the gradient of a tensor that it goes on from after it has captured it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(torch.zeros_like)
        self._key = id(tensor)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        products = _products()
        if products is None or self._key not in products.ends:
            return None
        return torch.zeros_like(gradient)


def _guard(hooks: dict[int, Callable[..., Any]]) -> None:
    for key, hook in list(hooks.items()):
        if not isinstance(hook, _Guarded):
            hooks[key] = _Guarded(hook)


def _bar(tensor: torch.Tensor) -> None:
    if not any(isinstance(hook, _End) for hook in (tensor._backward_hooks or {}).values()):
        tensor.register_hook(_End(tensor))


def _made_of_others(
    inner: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return those of ``inner``, parameters that are not leaves, whose graph leads to another."""
    leaves = {id(other) for other in parameters if other.grad_fn is None}
    edges = {(other.grad_fn, other.output_nr) for other in inner}
    leads_nowhere: set[Any] = set()

    def is_made_of_another(tensor: torch.Tensor) -> bool:
        assert tensor.grad_fn is not None
        pending, seen = list(tensor.grad_fn.next_functions), set()
        while pending:
            edge = pending.pop()
            if edge[0] is None or edge in seen or edge in leads_nowhere:
                continue
            seen.add(edge)
            if edge in edges or id(getattr(edge[0], "variable", None)) in leaves:
                return True
            pending.extend(edge[0].next_functions)
        leads_nowhere.update(seen)
        return False

    return [tensor for tensor in inner if is_made_of_another(tensor)]

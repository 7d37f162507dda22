"""Functions of the user's whose results may not have tangents that nobody declared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pnode.base.errors import ConfigurationError
from pnode.base.transforms import (
    has_tangent,
    in_forward_mode,
    is_wrapped,
    lowered,
    refuse_batched,
    tensors_of,
    transforms_active,
)
from pnode.field.products import derivatives

__all__ = ["Numbers", "of_numbers", "unwatched", "watched"]

_NUMBERS = {
    torch.Tensor.item: ".item()", torch.Tensor.tolist: ".tolist()",
    torch.Tensor.__float__: "float()",
}  # fmt: skip


# Evaluations of a solve that are looked at inside of torch.func, operation by operation: as for
# tensors that require grad, the first ones tell what f uses.
_LOOKS = 2


def watched(function: Any, declared: Sequence[torch.Tensor] = ()) -> Any:
    """Return a function of the user's that refuses results with unknown tangents, if there are any.

    Parameters
    ----------
    function : callable or None
        The function.
    declared : sequence of Tensor
        What its results may depend on.
    """
    if function is None or not (in_forward_mode() or transforms_active()):
        return function
    return _Watched(function, [tensor for tensor in declared if has_tangent(tensor)])


def unwatched(function: Any) -> Any:
    """Return the function that :func:`watched` was given."""
    return function.function if isinstance(function, _Watched) else function


def of_numbers(function: Any) -> Any:
    """Return a function that takes tensors of transforms, which it holds, for their numbers.

    For those whose derivatives are taken by another call of the function itself.
    """
    if not transforms_active():
        return function

    def call(*arguments: Any) -> Any:
        with _Lowered():
            return function(*arguments)

    return call


class _Watched(torch.nn.Module):
    """A function whose results may not have tangents but those of declared tensors.

    A Module, as it may stand for one.
    """

    def __init__(self, function: Any, declared: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self._declared = [declared]  # not as something of this Module
        self._transformed = transforms_active()
        self._looks = _LOOKS

    def forward(self, *arguments: Any) -> Any:
        if self._transformed:
            if not self._looks:
                return self.function(*arguments)
            self._looks -= 1
            if any(is_wrapped(tensor) for one in arguments for tensor in tensors_of(one)):
                return self.function(*arguments)  # at the level of the transform
            with _RefuseWrapped():
                return self.function(*arguments)
        if any(has_tangent(tensor) for one in arguments for tensor in tensors_of(one)):
            return self.function(*arguments)  # not a solve asks
        # torch switches tangents off inside of autograd functions, of which a solve is one.
        with forward_ad._set_fwd_grad_enabled(True):
            result = self.function(*arguments)
            parts = [
                forward_ad.unpack_dual(tensor) if has_tangent(tensor) else (tensor, None)
                for tensor in tensors_of(result)
            ]
        if any(tangent is not None for _, tangent in parts):
            self._compare(parts)
            return self.function(*arguments)
        return result

    def _compare(self, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """Refuse tangents that declared tensors do not explain."""
        declared = [tensor for tensor in self._declared[0] if tensor.requires_grad]
        with forward_ad._set_fwd_grad_enabled(True):
            tangents = [forward_ad.unpack_dual(tensor).tangent for tensor in declared]
        for value, tangent in parts:
            known = torch.zeros_like(value)
            if declared and value.requires_grad:
                (known,) = derivatives(value, declared, [tangents], record=False)
            found = torch.zeros_like(value) if tangent is None else tangent.detach()
            if not torch.allclose(found, known, rtol=1e-3, atol=1e-6 * float(found.abs().max())):
                raise ConfigurationError(
                    "what the vector field returned has a tangent of forward-mode AD "
                    "of a tensor that it uses and nobody declared (or that does not require "
                    "grad), which a solve cannot carry on: declare it with params=, with "
                    "requires_grad=True"
                )


class _RefuseWrapped(TorchFunctionMode):
    """Refuses tensors of a transform, which torch takes for numbers below it."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        wrapped = _first_wrapped((*args, *kwargs.values()) if kwargs else args)
        if wrapped is not None:
            refuse_batched("a tensor that the vector field uses", wrapped)
            raise ConfigurationError(
                "the vector field uses a tensor that belongs to a transform of torch.func and that "
                "nobody declared: write it as a torch.nn.Module that holds the tensor, and use "
                "torch.func.functional_call"
            )
        return function(*args, **(kwargs or {}))


class Numbers(TorchFunctionMode):
    """Notes whether f makes a number of a tensor that needs grad: torch loses its derivative.

    Where that is meant, ``.detach()`` comes first. Control flow (``if``, ``int``) has none to lose.
    """

    name = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _NUMBERS and args[0].requires_grad:
            self.name = f"{_NUMBERS[function]} of a tensor of shape {tuple(args[0].shape)}"
        return function(*args, **(kwargs or {}))


class _Lowered(TorchFunctionMode):
    """Takes tensors of transforms for their numbers. Of a batch there would be too many."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in tensors_of((args, kwargs)):
            refuse_batched("a tensor that event_fn uses", tensor)
        args, kwargs = tree_map_only(torch.Tensor, lowered, (args, kwargs or {}))
        return function(*args, **kwargs)


def _first_wrapped(values: Iterable[Any]) -> torch.Tensor | None:
    for value in values:
        found = None
        if isinstance(value, torch.Tensor):
            found = value if is_wrapped(value) else None
        elif isinstance(value, (tuple, list)):
            found = _first_wrapped(value)
        if found is not None:
            return found
    return None

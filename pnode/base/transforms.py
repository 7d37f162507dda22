"""What of torch may not go through a solve, refused before it gives other numbers.

PETSc sees numbers alone. What pnode.derivatives.autograd knows derivatives of goes on; tensors that
stand for batches, for fake values or for the variables of a trace hold no numbers, and tangents of
tensors that nobody declared would end silently. See docs/derivatives.md.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from pnode.base.errors import BackwardError, ConfigurationError

__all__ = [
    "applied", "batch_is_innermost", "batch_level", "depends", "differentiable", "has_tangent",
    "in_forward_mode", "is_legacy_batch", "is_wrapped", "legacy_batch", "lowered", "moves",
    "no_tangents", "only_forward_mode", "outside", "outside_compiler", "outside_inference",
    "plain", "recorded_by_autograd", "refuse_batched", "refuse_moving", "refuse_traced",
    "refuse_transforms", "signed", "stacked", "tensors_of", "transforms_active", "unbatched",
    "unmoved", "unwrapped",
]  # fmt: skip

_Function = TypeVar("_Function", bound=Callable[..., Any])

_functorch = torch._C._functorch
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_is_transformed = _functorch.is_functorch_wrapped_tensor
_is_legacy_batch = _functorch.is_legacy_batchedtensor


def refuse_transforms(
    named: Iterable[tuple[str, Any]], parameters: Sequence[torch.Tensor] = ()
) -> None:
    """Refuse a solve that a transform of torch's would differentiate, batch or trace.

    Parameters
    ----------
    named : iterable of (str, object)
        What the solve is given: those that are tensors, or tuples of tensors, are looked at.
    parameters : sequence of Tensor
        What else its result depends on.

    Raises
    ------
    ConfigurationError
        Naming the transform, or the tensor, and what to use instead.
    """
    given = [(name, tensor) for name, value in named for tensor in tensors_of(value)]
    for name, tensor in given:
        if isinstance(tensor, FakeTensor):
            raise ConfigurationError(
                f"{name} is a fake tensor, of torch.export or another trace, and a solve needs "
                "numbers: leave the solver out of what is exported, or use torch.compile, which "
                "passes around it"
            )
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        raise ConfigurationError(
            "the solve is being traced (make_fx, torch.export), and would be a constant of the "
            "graph: leave it out of what is traced"
        )
    if torch.jit.is_tracing():
        raise ConfigurationError(
            "the solve is being traced by torch.jit.trace, and would be a constant of the trace: "
            "leave it out, and trace the vector field instead"
        )
    for name, tensor in given:
        refuse_batched(name, tensor)
    for tensor in parameters:
        refuse_batched("a parameter", tensor)
    if transforms_active() and _functorch.peek_interpreter_stack().key().name == "Functionalize":
        raise ConfigurationError(
            "torch.func.functionalize cannot pass through a solve: solve outside of it"
        )


def refuse_moving(named: Iterable[tuple[str, Any]], why: str) -> None:
    """Refuse tensors that forward mode or torch.func differentiate by.

    Raises
    ------
    ConfigurationError
        Naming the tensor, and saying ``why``.
    """
    for name, value in named:
        for tensor in tensors_of(value):
            if has_tangent(tensor) or is_wrapped(tensor):
                raise ConfigurationError(
                    f"{name} has a tangent of forward-mode AD, or belongs to a transform of "
                    f"torch.func, {why}"
                )


def refuse_batched(name: str, tensor: torch.Tensor) -> None:
    """Refuse a batch of solves: a tensor that is one, or is made of one."""
    while is_wrapped(tensor):
        if _functorch.is_batchedtensor(tensor) or is_legacy_batch(tensor):
            raise ConfigurationError(
                f"{name} is a batch of torch.func.vmap, which cannot pass through a solve: give "
                "all samples as one state of shape (B, ...), which the vector field treats row by "
                "row, or solve in a loop"
            )
        tensor = unwrapped(tensor)


def refuse_traced(cotangent: torch.Tensor) -> None:
    """Refuse a backward sweep that is being traced.

    Raises
    ------
    BackwardError
        Saying what to use instead.
    """
    if isinstance(cotangent, FakeTensor):
        raise BackwardError(
            "the backward sweep is being traced (compiled autograd), and needs numbers: call "
            "backward() without it"
        )


def is_legacy_batch(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch of gradients of ``torch.autograd.grad``."""
    return bool(_is_legacy_batch(tensor))


def legacy_batch(
    function: Callable[..., Sequence[Any]], *arguments: Any, together: bool = False
) -> tuple[Any, ...]:
    """Apply a function to the entries of batches of gradients, and return batches of results.

    ``together``: as ``torch.func.vmap`` does.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batches = {
        index: torch._remove_batch_dim(one, level, 1, 0)
        for index, one in enumerate(arguments)
        if isinstance(one, torch.Tensor) and is_legacy_batch(one)
    }
    for _ in range(level):  # one entry after the other is no batch, in which nothing is random
        torch._C._vmapmode_decrement_nesting()
    columns: Iterable[torch.Tensor | None]
    given = [batches.get(i, one) for i, one in enumerate(arguments)]
    try:
        if together:
            dims = tuple(0 if i in batches else None for i in range(len(given)))
            columns = _in_vmap(function, dims, given)
        else:
            found = [
                function(*(one[k] if i in batches else one for i, one in enumerate(given)))
                for k in range(len(next(iter(batches.values()))))
            ]
            columns = map(stacked, zip(*found, strict=True))
    finally:
        for _ in range(level):
            torch._C._vmapmode_increment_nesting()
    return tuple(None if one is None else torch._add_batch_dim(one, 0, level) for one in columns)


def _in_vmap(
    function: Callable[..., Sequence[Any]], dims: tuple[int | None, ...], arguments: Sequence[Any]
) -> list[torch.Tensor | None]:
    """Apply ``torch.func.vmap`` of a function whose results may be None."""
    known: list[bool] = []

    def tensors(*given: Any) -> tuple[torch.Tensor, ...]:
        found = function(*given)
        known[:] = [one is not None for one in found]
        return tuple(one for one in found if one is not None)

    results = iter(torch.func.vmap(tensors, dims)(*arguments))
    return [next(results) if one else None for one in known]


def stacked(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return tensors in one, None being zero; None if all are."""
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    return torch.stack([torch.zeros_like(known) if part is None else part for part in parts])


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor, without what transforms and graphs know of it."""
    return cast(torch.Tensor, lowered(tensor).detach())


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor of a transform is one level below."""
    found: torch.Tensor = _functorch.get_unwrapped(tensor)
    return found


def transforms_active() -> bool:
    """Whether transforms of torch.func are."""
    return bool(torch._C._are_functorch_transforms_active())


def batch_is_innermost(own: bool) -> bool:
    """Whether the innermost transform of torch.func is a batch (``vmap``).

    ``own`` tells that a forward mode's own rule asks, which is inside of that transform.
    """
    stack = _functorch.get_interpreter_stack() or []
    names = [interpreter.key().name for interpreter in stack]
    if own and names[-1:] == ["Jvp"]:
        names.pop()
    return names[-1:] == ["Vmap"]


def only_forward_mode(own: bool) -> bool:
    """Whether no transform of torch.func is active but the forward mode whose own rule asks."""
    stack = _functorch.get_interpreter_stack() or []
    return not stack or (own and [one.key().name for one in stack] == ["Jvp"])


def batch_level() -> int | None:
    """Return the level of the batch that a forward mode, whose own rule asks, is just inside of.

    None if there is none, or if that is within another transform.
    """
    names = [(one.key().name, one.level()) for one in _functorch.get_interpreter_stack() or []]
    if names and names[-1][0] == "Jvp":
        names.pop()
    return names[0][1] if len(names) == 1 and names[0][0] == "Vmap" else None


def unbatched(tensor: Any, level: int, number: int) -> Any:
    """Return the entries of a batch, or ``number`` of the same, without tangents; None for None."""
    tensor = unmoved(tensor)
    while tensor is not None and _functorch.maybe_get_level(tensor) > level:
        tensor = unwrapped(tensor)
    return None if tensor is None else _functorch._remove_batch_dim(tensor, level, number, 0)


@contextmanager
def outside(level: int = 1) -> Iterator[None]:
    """Be outside of the transforms of torch.func from a level on: of all of them."""
    saved = []
    while transforms_active() and _functorch.peek_interpreter_stack().level() >= level:
        saved.append(_functorch.pop_dynamic_layer_stack())
    try:
        yield
    finally:
        while saved:
            _functorch.push_dynamic_layer_stack(saved.pop())


def lowered(tensor: Any) -> Any:
    """Return a tensor without its transforms; None for None."""
    while tensor is not None and is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor


def recorded_by_autograd(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a graph of what is computed with these tensors is wanted."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def differentiable() -> bool:
    """Whether a backward sweep may be differentiated itself, or is part of a transform."""
    return torch.is_grad_enabled() or transforms_active() or in_forward_mode()


def no_tangents() -> AbstractContextManager[Any]:
    """Return a context without forward mode; of torch.func's, the levels below go on."""
    return forward_ad._set_fwd_grad_enabled(transforms_active())


def unmoved(tensor: Any) -> Any:
    """Return a tensor without its tangent of forward mode, in the same graph; None for None."""
    if tensor is None or not has_tangent(tensor):
        return tensor
    return forward_ad.unpack_dual(tensor).primal


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a tangent of forward-mode AD."""
    if not in_forward_mode() or tensor.layout is not torch.strided:  # those cannot have one
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def in_forward_mode() -> bool:
    """Whether there may be tangents at all."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def outside_inference(differentiate: bool) -> AbstractContextManager[Any]:
    """Return a context outside of inference mode, with the grad mode that was asked for there.

    Of tensors made in inference mode there are no derivatives, nor transposes if sparse.
    """
    return _outside_inference(differentiate) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _outside_inference(differentiate: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(differentiate):
        yield


def outside_compiler(function: _Function) -> _Function:
    """Decorate a function that torch.compile is to call as it is, between two graphs.

    ``torch.compiler.disable`` alone would import the compiler at once, which takes seconds.
    """
    disabled: Any = None

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal disabled
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:  # no difference
            return function(*arguments, **keywords)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments, **keywords)

    # What torch.compiler.disable marks its results with.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "a solve by PETSc"  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


class _Bound:
    """Positional arguments as they were given."""

    kwargs: Mapping[str, Any] = {}

    def __init__(self, *args: Any) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        """Do nothing: there are none."""


class _Positional(inspect.Signature):
    """Of a function whose arguments are given by position, all of them."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the arguments as they are."""
        return _Bound(*args)


def signed(function: _Function) -> _Function:
    """Decorate ``forward`` of an ``autograd.Function``, which is called by position alone.

    torch binds the arguments to its signature in each call, which costs as much as a small f.
    """
    known: Any = function
    known.__signature__ = _Positional()
    return function


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Do as ``function.apply``, which looks for transforms and signatures besides."""
    if transforms_active() or any([is_wrapped(x) for x in inputs if isinstance(x, torch.Tensor)]):
        return function.apply(*inputs)
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func, or to a batch of gradients."""
    return bool(_is_transformed(tensor) or _is_legacy_batch(tensor))


def moves(tensor: torch.Tensor) -> bool:
    """Whether something is to be differentiated by a tensor."""
    return tensor.requires_grad or is_wrapped(tensor) or has_tangent(tensor)


def depends(tensor: torch.Tensor) -> bool:
    """Whether a tensor depends on what is differentiated by, or is a batch of ``vmap``.

    One that was only made inside of a transform of torch.func does not.
    """
    while is_wrapped(tensor):
        if _is_legacy_batch(tensor) or _functorch.is_batchedtensor(tensor):
            return True
        with outside(_functorch.maybe_get_level(tensor) + 1):
            if tensor.requires_grad or has_tangent(tensor):
                return True
        tensor = unwrapped(tensor)
    with outside():
        return tensor.requires_grad or has_tangent(tensor)


def tensors_of(value: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a structure, or a tensor in a tuple."""
    values = (value,) if isinstance(value, torch.Tensor) else tree_leaves(value)
    return tuple(each for each in values if isinstance(each, torch.Tensor))

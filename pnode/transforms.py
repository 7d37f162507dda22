"""What of torch may not go through a solve, refused before it gives other numbers.

A solve is one node of the graph that reverse mode walks. PETSc sees numbers alone: tangents of
forward mode would end there silently, and tensors that stand for batches, for fake values or for
the variables of a trace hold no numbers. See docs/derivatives.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from pnode.errors import BackwardError, ConfigurationError

__all__ = ["outside_compiler", "refuse_batched", "refuse_transforms", "watched"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_functorch = torch._C._functorch
_REVERSE = (
    "use reverse mode: backward(), torch.autograd.grad, or torch.autograd.functional.jacobian "
    "with strategy='reverse-mode'"
)
_PLAIN = (
    "use backward(), torch.autograd.grad or torch.autograd.functional.jacobian, which take the "
    "solve as it is"
)
_REFUSED = {
    "Grad": (
        "torch.func.grad, vjp and jacrev (and hessian)",
        f"{_PLAIN}; inside of the vector field torch.func may be used",
    ),
    "Vmap": (
        "torch.func.vmap",
        "give all samples as one state of shape (B, ...), which the vector field treats row by "
        "row, or solve in a loop; a solve that is the same for all of them, before",
    ),
    "Jvp": ("torch.func.jvp and jacfwd (forward mode)", _REVERSE),
    "Functionalize": ("torch.func.functionalize", "solve outside of it"),
}


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
    given = [(name, tensor) for name, value in named for tensor in _tensors(value)]
    for name, tensor in given:
        if isinstance(tensor, FakeTensor):
            raise ConfigurationError(
                f"{name} is a fake tensor, of torch.export or another trace, and a solve needs "
                "numbers: leave the solver out of what is exported, or use torch.compile, which "
                "passes around it"
            )
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise ConfigurationError(
            "the solve is being traced (make_fx, torch.export), and would be a constant of the "
            "graph: leave it out of what is traced"
        )
    if torch.jit.is_tracing():
        raise ConfigurationError(
            "the solve is being traced by torch.jit.trace, and would be a constant of the trace: "
            "leave it out, and trace the vector field instead"
        )
    if in_forward_mode():
        for name, tensor in (*given, *(("a parameter", tensor) for tensor in parameters)):
            if has_tangent(tensor):
                raise ConfigurationError(
                    f"{name} has a tangent of forward-mode AD (torch.autograd.forward_ad, "
                    "torch.func.jvp, jacfwd, strategy='forward-mode'), which a solve cannot carry "
                    f"on: {_REVERSE}"
                )
    if torch._C._are_functorch_transforms_active():
        transform, remedy = _REFUSED[_functorch.peek_interpreter_stack().key().name]
        raise ConfigurationError(f"{transform} cannot pass through a solve: {remedy}")
    for name, tensor in given:
        if _is_wrapped(tensor):
            raise ConfigurationError(
                f"{name} belongs to a transform of torch.func or to a batch of gradients, which "
                f"cannot pass through a solve: {_PLAIN}"
            )


def refuse_batched(cotangent: torch.Tensor) -> None:
    """Refuse a backward sweep of several cotangents at once, or of one that has a tangent.

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
    if torch._C._are_functorch_transforms_active() or _is_wrapped(cotangent):
        raise BackwardError(
            "gradients in batches (is_grads_batched=True, vectorize=True, torch.func.vmap) cannot "
            "pass through a solve: take them one by one, such as "
            "torch.autograd.functional.jacobian with vectorize=False"
        )
    if has_tangent(cotangent):
        raise BackwardError(
            "the derivative of the loss has a tangent of forward-mode AD, which a backward sweep "
            "cannot carry on: second derivatives through a solve are not supported"
        )


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a tangent of forward-mode AD."""
    if not in_forward_mode() or tensor.layout is not torch.strided:  # those cannot have one
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def in_forward_mode() -> bool:
    """Whether there may be tangents at all."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def watched(function: Any) -> Any:
    """Return a function of the user's that refuses results with tangents, while there are any."""
    return _Watched(function) if function is not None and in_forward_mode() else function


class _Watched(torch.nn.Module):
    """A function whose results may not have tangents; a Module, as it may stand for one."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        # torch switches tangents off inside of autograd functions, of which a solve is one.
        with forward_ad._set_fwd_grad_enabled(True):
            result = self.function(*arguments)
            found = any(has_tangent(tensor) for tensor in _tensors(result))
        if found:
            raise ConfigurationError(
                "what the vector field or event_fn returned has a tangent of forward-mode AD (of a "
                f"tensor that it uses), which a solve cannot carry on: {_REVERSE}"
            )
        return result


def outside_compiler(function: _Function) -> _Function:
    """Decorate a function that torch.compile is to call as it is, between two graphs.

    ``torch.compiler.disable`` alone would import the compiler at once, which takes seconds.
    """
    disabled: Any = None

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*arguments, **keywords)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments, **keywords)

    # What torch.compiler.disable marks its results with.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "a solve by PETSc"  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _is_wrapped(tensor: torch.Tensor) -> bool:
    return bool(
        _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
    )


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(each for each in values if isinstance(each, torch.Tensor))

"""What f calls in an evaluation: torch's operations, or its functions.

Tensors are numbered as they come; those that f brings along are told by identity or by value. See
:mod:`pnode.solvers.compiled.guards`.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pnode.solvers.compiled.entrances import entrances

__all__ = [
    "Compared",
    "Facts",
    "Followed",
    "Functions",
    "Kind",
    "Known",
    "Operations",
    "Ref",
    "Taking",
    "copies",
]

Facts: TypeAlias = list[Any]
#: By identity, tensors that f brings along, and what stands for them.
Known: TypeAlias = "dict[int, tuple[torch.Tensor, Ref]]"


class Kind(NamedTuple):
    """What decides about operations besides f: how torch splits some of them.

    ``functions`` tells that torch's functions were followed, not operations.
    """

    grad: bool
    leaf: bool
    inference: bool
    functions: bool = False


class Ref:
    """A tensor of the sequence, by number."""

    __slots__ = ()


# The n-th tensor of any sequence; longer sequences make further ones.
_REFS = [Ref() for _ in range(256)]
_MADE = len(_REFS)
_END = Ref()
_PLAIN = frozenset((int, str, type(None), torch.dtype, torch.device, torch.layout,
                    torch.memory_format))  # fmt: skip
# Functions of torch's that call nothing of the user's: built in, and those of these modules.
_BUILT_IN = frozenset((
    types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType,
    types.WrapperDescriptorType,
))  # fmt: skip
_IN_PYTHON = frozenset(("torch._tensor", "torch.functional", "torch.nn.functional"))


class Taking:
    """Takes down what is called in one evaluation.

    Parameters
    ----------
    given : sequence of Tensor
        The arguments of f.
    known : dict
        Tensors that f brings along and that are told by identity.
    """

    #: Whether arguments that are neither numbers nor tensors are told by identity: they may change.
    trusts_objects = True
    #: Whether that is followed which decides besides about the operations of torch's functions:
    #: autocast, the default dtype, and that tensors were written into by what is none of them.
    watches = False

    def __init__(self, given: Sequence[torch.Tensor], known: Known) -> None:
        super().__init__()
        self._dtype = torch.get_default_dtype()  # that of tensors which f makes
        self.facts: Facts = [self._dtype]
        #: Tensors that f brings along besides those known.
        self.brought: list[torch.Tensor] = []
        # Nothing may go meanwhile: another object could get its identity.
        self._alive: list[Any] = list(given)
        self._refs: dict[int, Ref] = {each: ref for each, (_, ref) in known.items()}
        # How often tensors were written into, where that is to be followed.
        self._versions: dict[int, int] = {}
        self._count = 0
        for tensor in given:
            self._number(tensor)

    def take(self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Take down a call, and make it."""
        facts, refs, versions, watches = self.facts, self._refs, self._versions, self.watches
        if watches:
            if torch.is_autocast_enabled("cpu"):
                facts.append(torch.get_autocast_dtype("cpu"))
            if torch.get_default_dtype() is not self._dtype:  # f has set another one
                facts.append(torch.get_default_dtype())
        facts.append(func)
        for item in args:
            key = id(item)
            ref = refs.get(key)
            if ref is not None:
                facts.append(ref)
                before = versions.get(key)
                if before is not None and before != item._version:
                    self._note_written(item)
            elif type(item) in _PLAIN:
                facts.append(item)
            else:
                self._add(item)
        if kwargs:
            for name, item in kwargs.items():
                facts.append(name)
                self._add(item)
            result = func(*args, **kwargs)
        else:
            result = func(*args)
        self._alive.append(result)
        if type(result) is torch.Tensor:  # as _number does, in less time
            key, number = id(result), self._count
            refs[key] = _REFS[number] if number < _MADE else _ref(number)
            self._count = number + 1
            if watches:
                try:
                    versions[key] = result._version
                except RuntimeError:  # one of inference mode does not count
                    pass
        elif result is not None:
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    self._number(item)
        return result

    def _number(self, tensor: torch.Tensor) -> None:
        """Let a tensor be the next one."""
        self._refs[id(tensor)] = _ref(self._count)
        self._count += 1
        self._watch(tensor)

    def _watch(self, tensor: torch.Tensor) -> None:
        """Follow whether a tensor is written into."""
        if self.watches and not tensor.is_inference():  # those do not count
            self._versions[id(tensor)] = tensor._version

    def _add(self, item: Any) -> None:
        """Take down an argument."""
        kind = type(item)
        if kind in _PLAIN:
            self.facts.append(item)
        elif isinstance(item, torch.Tensor):
            self._add_tensor(item)
        elif isinstance(item, (tuple, list)):
            for part in item:
                self._add(part)
            self.facts.append(_END)
        elif kind is bool:  # equal to a number otherwise
            self.facts.append("true" if item else "false")
        elif isinstance(item, float):  # with the sign of zero; NaN is itself
            self.facts.append(item.hex())
        elif isinstance(item, complex):
            self.facts.append((item.real.hex(), item.imag.hex()))
        elif kind is slice:
            self._add((slice, item.start, item.stop, item.step))
        elif item is ... or item is slice or self.trusts_objects:  # a generator...
            self.facts.append(item)
        elif kind is np.ndarray and item.dtype.kind in "biufc":
            self.facts.append((item.dtype, item.shape, item.tobytes()))
        else:
            self.facts.append(object())  # which nothing equals

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        ref = self._refs.get(key)
        if ref is not None:
            self.facts.append(ref)
            before = self._versions.get(key)
            if before is not None and before != tensor._version:
                self._note_written(tensor)
            return
        self.brought.append(tensor)
        self.facts.append(_content(tensor))
        self._number(tensor)

    def _note_written(self, tensor: torch.Tensor) -> None:
        """Take down that a tensor was written into by what was not followed."""
        version = tensor._version
        self.facts.append(("written", version - self._versions[id(tensor)]))
        self._versions[id(tensor)] = version


def _ref(number: int) -> Ref:
    """Return what stands for the tensor of that number."""
    while number >= len(_REFS):
        _REFS.append(Ref())
    return _REFS[number]


def _content(tensor: torch.Tensor) -> Any:
    """Return what tells a tensor from others by its values; nothing equals what has none."""
    try:
        values = tensor.detach().reshape(-1).contiguous()
        data = bytes(values.view(torch.uint8).numpy())
    except (RuntimeError, TypeError, NotImplementedError):
        return object()
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), data


class Operations(Taking, TorchDispatchMode):
    """Follows the operations."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import its compiler here, which takes seconds

    __torch_dispatch__ = Taking.take


class Functions(Taking, TorchFunctionMode):
    """Follows the calls of torch's functions."""

    trusts_objects, watches = False, True

    def __init__(self, given: Sequence[torch.Tensor], known: Known) -> None:
        super().__init__(given, known)
        own = [tensor for tensor, _ in known.values() if not tensor.is_inference()]
        self._versions.update([(id(tensor), tensor._version) for tensor in own])

    __torch_function__ = Taking.take


class Compared(Functions):
    """Looks besides whether functions of torch's tell all operations and all tensors.

    Attributes
    ----------
    complete : bool
        Whether they do.
    """

    def __init__(self, given: Sequence[torch.Tensor], known: Known) -> None:
        super().__init__(given, known)
        self._operations = Operations(given, known)
        self.complete, self._told = True, len(self._operations.facts)

    def _is_complete(self) -> bool:
        """Whether there was no operation since the last function."""
        return len(self._operations.facts) == self._told

    def tells(self, facts: Facts) -> bool:
        """Whether the operations are those of another evaluation."""
        return facts[: self._told] == self._operations.facts

    def __enter__(self) -> Any:
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)
        self.complete &= self._is_complete()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take down a call, and make it."""
        self.complete &= self._is_complete() and (
            type(func) in _BUILT_IN
            or (getattr(func, "__module__", "") in _IN_PYTHON and func.__name__ != "backward")
        )
        result = super().__torch_function__(func, kinds, args, kwargs)
        self._told = len(self._operations.facts)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):  # ``x.data`` is no operation
                self.complete &= id(item) in self._operations._refs
        return result


class Followed:
    """Stands for f in one evaluation, and takes down what it calls in its first call.

    Parameters
    ----------
    function : callable
        f.
    known : dict
        Tensors to be told by identity.
    mode : type
        What follows: operations, or, where there is no graph, torch's functions.
    """

    def __init__(self, function: Any, known: Known, mode: type[Taking] = Operations) -> None:
        self.function, self._mode = function, mode
        self._known = known
        #: What has followed.
        self.mode: Any = None
        self.facts: Facts | None = None
        self.kind = Kind(False, False, False)
        self.given: tuple[Any, ...] = ()
        self.result: Any = None
        self.brought: list[torch.Tensor] = []

    def __call__(self, *given: Any) -> Any:
        """Call f."""
        if self.facts is not None:
            return self.function(*given)
        tensors = _flat(given)
        grad, leaf = torch.is_grad_enabled(), any(x.requires_grad for x in tensors)
        inference = torch.is_inference_mode_enabled()
        functions = self._mode is not Operations and not (
            grad or leaf or inference
            or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        )  # fmt: skip
        kind = Kind(grad, leaf, inference, functions)
        mode: Any = (self._mode if functions else Operations)(tensors, self._known)
        # Casts that autocast has kept of an earlier evaluation would be missing here.
        notes: Facts = []
        cached = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        if cached:
            torch.set_autocast_cache_enabled(False)
        try:
            with entrances(mode.facts, notes), mode:
                result = self.function(*given)
        finally:
            if cached:
                torch.set_autocast_cache_enabled(True)
        self.kind, self.facts, self.given, self.brought = kind, mode.facts, given, mode.brought
        self.result, self.mode = result, mode
        for item in result if isinstance(result, (tuple, list)) else (result,):
            mode._add(item)  # which of them it is
        mode.facts.extend(notes)
        return result

    def repeated(self, kind: Kind, mode: type[Taking] = Operations) -> Followed:
        """Call f once more at the same arguments, in another way."""
        again = Followed(self.function, self._known, mode)
        with torch.inference_mode(kind.inference), torch.set_grad_enabled(kind.grad):
            again(*copies(self.given, kind))
        return again


def _flat(given: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for item in given:
        found.extend((item,) if isinstance(item, torch.Tensor) else item)
    return found


def copies(given: Sequence[Any], kind: Kind) -> list[Any]:
    """Return f's arguments anew."""

    def copy(item: torch.Tensor) -> torch.Tensor:
        made = item.detach().clone()
        return made.requires_grad_().clone() if kind.leaf else made

    time, *states = given
    return [
        time.detach().clone(),
        *(copy(x) if isinstance(x, torch.Tensor) else tuple(map(copy, x)) for x in states),
    ]

"""Whether f still is what it was when it was traced: the operations that it calls.

A graph holds Python numbers and the course of Python's control flow as constants. A change of
these need not show in the value of f where a solve begins. What shows it is the sequence of torch's
operations with all their arguments, which a dispatch mode follows in one evaluation: numbers,
shapes, dtypes, and which tensor is which: an argument of f, the result of an earlier operation, or
one that f brings along. Of the latter those that were there before are told by identity, as graphs
read their values anew; those that f makes in each evaluation (``torch.tensor(self.k)``) by value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pnode.field.vectorfield import VectorField

__all__ = ["Followed", "Guard", "followed"]

_Facts: TypeAlias = list[Any]
#: By identity, tensors that f brings along, and what stands for them.
_Known: TypeAlias = "dict[int, tuple[torch.Tensor, _Ref]]"


class _Kind(NamedTuple):
    """What decides about operations besides f: how torch splits some of them."""

    grad: bool
    leaf: bool
    inference: bool


class _Ref:
    """A tensor of the sequence, by number."""

    __slots__ = ()


# The n-th tensor of any sequence; longer sequences make further ones.
_REFS = [_Ref() for _ in range(256)]
_END = _Ref()
_PLAIN = frozenset((int, str, type(None), torch.dtype, torch.device, torch.layout,
                    torch.memory_format))  # fmt: skip


class _Mode(TorchDispatchMode):
    """Follows the operations of one evaluation.

    Parameters
    ----------
    given : sequence of Tensor
        The arguments of f.
    known : dict
        Tensors that f brings along and that are told by identity.
    """

    supports_higher_order_operators = True

    def __init__(self, given: Sequence[torch.Tensor], known: _Known) -> None:
        super().__init__()
        self.facts: _Facts = []
        #: Tensors that f brings along besides those known.
        self.brought: list[torch.Tensor] = []
        # Nothing may go meanwhile: another object could get its identity.
        self._alive: list[Any] = []
        self._refs: dict[int, _Ref] = {each: ref for each, (_, ref) in known.items()}
        for tensor in given:
            self._refs[id(tensor)] = _ref(len(self._alive))
            self._alive.append(tensor)
        self._count = len(given)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import its compiler here, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take down an operation, and call it."""
        facts, refs = self.facts, self._refs
        facts.append(func)
        for item in args:
            ref = refs.get(id(item))
            if ref is not None:
                facts.append(ref)
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
        if type(result) is torch.Tensor:
            refs[id(result)] = _ref(self._count)
            self._count += 1
        elif result is not None:
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    self._number(item)
        return result

    def _number(self, tensor: torch.Tensor) -> None:
        """Let a tensor be the next one."""
        self._refs[id(tensor)] = _ref(self._count)
        self._count += 1

    def _add(self, item: Any) -> None:
        """Take down an argument."""
        kind = type(item)
        if kind in _PLAIN:
            self.facts.append(item)
        elif kind is bool:  # equal to a number otherwise
            self.facts.append("true" if item else "false")
        elif isinstance(item, float):  # with the sign of zero; NaN is itself
            self.facts.append(item.hex())
        elif isinstance(item, complex):
            self.facts.append((item.real.hex(), item.imag.hex()))
        elif isinstance(item, torch.Tensor):
            self._add_tensor(item)
        elif isinstance(item, (tuple, list)):
            for part in item:
                self._add(part)
            self.facts.append(_END)
        else:  # a generator...: the same object
            self.facts.append(item)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        ref = self._refs.get(id(tensor))
        if ref is not None:
            self.facts.append(ref)
            return
        self.brought.append(tensor)
        self.facts.append(_content(tensor))
        self._number(tensor)


def _ref(number: int) -> _Ref:
    """Return what stands for the tensor of that number."""
    while number >= len(_REFS):
        _REFS.append(_Ref())
    return _REFS[number]


def _content(tensor: torch.Tensor) -> Any:
    """Return what tells a tensor from others by its values; nothing equals what has none."""
    try:
        values = tensor.detach().reshape(-1).contiguous()
        data = bytes(values.view(torch.uint8).numpy())
    except (RuntimeError, TypeError, NotImplementedError):
        return object()
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), data


class Followed:
    """Stands for f in one evaluation, and takes down the operations of its first call.

    Parameters
    ----------
    function : callable
        f.
    known : dict
        Tensors to be told by identity.
    """

    def __init__(self, function: Any, known: _Known) -> None:
        self.function = function
        self._known = known
        self.facts: _Facts | None = None
        self.kind = _Kind(False, False, False)
        self.given: tuple[Any, ...] = ()
        self.result: Any = None
        self.brought: list[torch.Tensor] = []

    def __call__(self, *given: Any) -> Any:
        """Call f."""
        if self.facts is not None:
            return self.function(*given)
        tensors = _flat(given)
        kind = _Kind(
            torch.is_grad_enabled(), any(x.requires_grad for x in tensors),
            torch.is_inference_mode_enabled(),
        )  # fmt: skip
        mode = _Mode(tensors, self._known)
        # Casts that autocast has kept of an earlier evaluation would be missing here.
        cached = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        if cached:
            torch.set_autocast_cache_enabled(False)
        try:
            with mode:
                result = self.function(*given)
        finally:
            if cached:
                torch.set_autocast_cache_enabled(True)
        self.kind, self.facts, self.given, self.brought = kind, mode.facts, given, mode.brought
        self.result = result
        for item in result if isinstance(result, (tuple, list)) else (result,):
            mode._add(item)  # which of them it is
        return result

    @property
    def has_own_derivatives(self) -> bool:
        """Whether an autograd function of the user's is in the graph of the result."""
        results = self.result if isinstance(self.result, (tuple, list)) else (self.result,)
        pending, seen = [x.grad_fn for x in results], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            if hasattr(node, "_forward_cls"):
                return True
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
        return False

    def repeated(self, kind: _Kind) -> Followed:
        """Call f once more at the same arguments, in another way."""
        again = Followed(self.function, self._known)
        with torch.inference_mode(kind.inference), torch.set_grad_enabled(kind.grad):
            again(*_copies(self.given, kind))
        return again


def _flat(given: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for item in given:
        found.extend((item,) if isinstance(item, torch.Tensor) else item)
    return found


def _copies(given: Sequence[Any], kind: _Kind) -> list[Any]:
    """Return f's arguments anew."""

    def copy(item: torch.Tensor) -> torch.Tensor:
        made = item.detach().clone()
        return made.requires_grad_().clone() if kind.leaf else made

    time, *states = given
    return [
        time.detach().clone(),
        *(copy(x) if isinstance(x, torch.Tensor) else tuple(map(copy, x)) for x in states),
    ]


@contextmanager
def followed(part: VectorField, guard: Guard) -> Iterator[Followed]:
    """Follow the next evaluation of a field."""
    original = part.callee
    part.callee = seen = Followed(original, guard.known)
    try:
        yield seen
    finally:
        part.callee = original


class Guard:
    """The operations of a field when it was traced.

    Attributes
    ----------
    known : dict
        Tensors that f brings along and that are the same ones each time, by their identity, and
        what stands for them.
    """

    def __init__(self) -> None:
        self.known: _Known = {}
        self._facts: dict[_Kind, _Facts] = {}

    def learn(self, first: Followed) -> None:
        """Take down what f does, from a first evaluation and one more."""
        self.known = {id(tensor): (tensor, _Ref()) for tensor in first.brought}
        second = Followed(first.function, self.known)
        with torch.inference_mode(first.kind.inference), torch.set_grad_enabled(first.kind.grad):
            second(*_copies(first.given, first.kind))
        assert second.facts is not None
        used = {id(each) for each in second.facts}
        self.known = {each: one for each, one in self.known.items() if id(one[1]) in used}
        self._facts[first.kind] = second.facts

    def bound(self, new: Mapping[int, torch.Tensor]) -> Guard:
        """Return it for f with other tensors, given by the identity of those in whose place."""
        made = Guard()
        for each, (tensor, ref) in self.known.items():
            other = new.get(each, tensor)
            made.known[id(other)] = other, ref
        made._facts = self._facts
        return made

    def holds(self, seen: Followed) -> bool:
        """Whether f does what it did."""
        if seen.facts is None:  # it has not been called
            return False
        expected = self._facts.get(seen.kind)
        if expected is not None:
            return seen.facts == expected
        # Without a graph other operations may be called than with one, for the same f.
        kind, expected = next(iter(self._facts.items()))
        if seen.repeated(kind).facts != expected:
            return False
        self._facts[seen.kind] = seen.facts
        return True

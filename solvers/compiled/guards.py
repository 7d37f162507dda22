"""Whether f still is what it was when it was traced: the operations that it calls.

A graph holds Python numbers and the course of Python's control flow as constants. A change of
these need not show in the value of f where a solve begins. What shows it is the sequence of torch's
operations with all their arguments, which a dispatch mode follows in one evaluation: numbers,
shapes, dtypes, and which tensor is which: an argument of f, the result of an earlier operation, or
one that f brings along. Of the latter those that were there before are told by identity, as graphs
read their values anew; those that f makes in each evaluation (``torch.tensor(self.k)``) by value.

A dispatch mode takes more time than a small f. Where operations are called by torch's own functions
alone, these and their arguments decide about the operations, and a function mode follows them in
0.6 of that time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.entrances import APPLIED
from pnode.solvers.compiled.following import (
    Compared,
    Facts,
    Followed,
    Functions,
    Kind,
    Known,
    Operations,
    Ref,
    Taking,
    copies,
)

__all__ = ["Asks", "Guard", "followed", "has_own_derivatives"]

_NUMBER = torch.ops.aten._local_scalar_dense.default
_HOOKS = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
_ABOUT_GRAPHS = frozenset(("requires_grad", "grad_fn", "is_leaf", "_set_grad_enabled")) | _HOOKS


class followed:
    """Follow the next evaluation of a field."""

    def __init__(self, part: VectorField, guard: Guard) -> None:
        self._part, self._guard = part, guard

    def __enter__(self) -> Followed:
        self._original = self._part.callee
        self._part.callee = seen = Followed(self._original, self._guard.known, self._guard.mode)
        return seen

    def __exit__(self, *error: object) -> None:
        self._part.callee = self._original


class Guard:
    """The operations of a field when it was traced.

    Attributes
    ----------
    known : dict
        Tensors that f brings along and that are the same ones each time, by their identity, and
        what stands for them.
    mode : type
        What follows an evaluation.
    recorded : bool
        Whether it needs a graph to tell what becomes of graphs, where operations are followed.
    reads_numbers : bool
        Whether tensors become numbers, which graphs hold: ``torch.add(x, y, alpha=self.a)``.
    """

    def __init__(self) -> None:
        self.known: Known = {}
        self.mode: type[Taking] = Operations
        self.recorded = False
        self.reads_numbers = False
        self._facts: dict[Kind, Facts] = {}

    def learn(self, first: Followed) -> None:
        """Take down what f does, from a first evaluation and one more."""
        self.known = {id(tensor): (tensor, Ref()) for tensor in first.brought}
        second = Followed(first.function, self.known)
        with torch.inference_mode(first.kind.inference), torch.set_grad_enabled(first.kind.grad):
            second(*copies(first.given, first.kind))
        assert second.facts is not None
        used = {id(each) for each in second.facts}
        self.known = {each: one for each, one in self.known.items() if id(one[1]) in used}
        self._facts[first.kind] = second.facts
        self.reads_numbers = any(one is _NUMBER for one in second.facts)

    def bound(self, new: Mapping[int, torch.Tensor]) -> Guard:
        """Return it for f with other tensors, given by the identity of those in whose place."""
        made = Guard()
        for each, (tensor, ref) in self.known.items():
            other = new.get(each, tensor)
            made.known[id(other)] = other, ref
        made._facts, made.recorded, made.reads_numbers = self._facts, True, self.reads_numbers
        return made

    def holds(self, seen: Followed) -> bool:
        """Whether f does what it did."""
        if seen.facts is None:  # it has not been called
            return False
        expected = self._facts.get(seen.kind)
        if seen.kind.functions:
            # Where functions differ, operations may not and graphs may: no_grad is none of them.
            return seen.facts == expected
        if expected is not None:
            return seen.facts == expected
        # Without a graph other operations may be called than with one, for the same f.
        kind, expected = next(iter(self._facts.items()))
        if seen.repeated(kind).facts != expected:
            return False
        self._facts[seen.kind] = seen.facts
        self._learn_functions(seen)
        return True

    def _learn_functions(self, seen: Followed) -> None:
        """Follow torch's functions from now on, if they tell what f does."""
        self.recorded = True
        try:
            first = seen.repeated(seen.kind, Compared)
            second = seen.repeated(seen.kind, Functions)
        except Exception:  # whatever f does in a function mode
            return
        if (
            first.kind.functions and second.kind.functions and first.facts == second.facts
            and first.mode.complete and first.mode.tells(seen.facts)
            and len(second.brought) <= len(seen.brought)  # whose values are compared
        ):  # fmt: skip
            assert second.facts is not None
            self.mode, self._facts[second.kind] = Functions, second.facts
            self.recorded = False


class Asks(TorchFunctionMode):
    """Looks whether f puts hooks on tensors, or does something about graphs at all."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a function's name, or that of the attribute which it reads, and call it."""
        attribute = getattr(func, "__self__", func)
        self._names |= {getattr(one, "__name__", "") for one in (func, attribute)}
        return func(*args, **(kwargs or {}))

    @property
    def for_hooks(self) -> bool:
        """Whether it puts hooks on tensors."""
        return not self._names.isdisjoint(_HOOKS)

    @property
    def for_graphs(self) -> bool:
        """Whether what it does may depend on there being a graph, or change that alone."""
        return not self._names.isdisjoint(_ABOUT_GRAPHS)


def has_own_derivatives(seen: Followed) -> bool:
    """Whether derivatives of f may change where its operations without a graph do not.

    It applies an autograd function of the user's, or asks for the graph.
    """
    with torch.inference_mode(seen.kind.inference), torch.set_grad_enabled(seen.kind.grad):
        given = copies(seen.given, seen.kind)
        with Asks() as asks:
            seen.function(*given)
    return asks.for_graphs or APPLIED in (seen.facts or ())

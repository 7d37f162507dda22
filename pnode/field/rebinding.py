"""A vector field with other tensors in the place of its parameters.

``torch.func.functional_call`` and forward mode put tensors into a Module that stand for its
parameters at one level of a transform. A sweep computes with numbers, below all transforms, and may
run when the Module has its own parameters again: it lends f what it was given itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.surroundings import modules_within, owner
from pnode.base.transforms import has_tangent, is_wrapped, plain, unwrapped
from pnode.field.held import now
from pnode.problems.problem import InitialValueProblem

__all__ = ["Rebound", "below", "bound", "rebound"]


class Rebound:
    """A function of a Module, with other tensors in it whenever it is called.

    Parameters
    ----------
    function : callable
        The function.
    slots : sequence of (dict, str, Tensor)
        Where which tensor belongs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        slots: Sequence[tuple[dict[str, Any], str, torch.Tensor]],
    ) -> None:
        self._function = function
        self._slots = slots
        self.__self__ = owner(function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        found = [tensors[name] for tensors, name, _ in self._slots]
        try:
            for tensors, name, tensor in self._slots:
                tensors[name] = tensor
            return self._function(*arguments)
        finally:
            for (tensors, name, _), tensor in zip(self._slots, found, strict=True):
                tensors[name] = tensor

    def rebound(self, tensors: Mapping[int, torch.Tensor]) -> tuple[Any, set[int]]:
        """Return it with other tensors again; see :func:`rebound`."""
        slots = [
            (place, name, tensors.get(id(tensor), tensor)) for place, name, tensor in self._slots
        ]
        found = {id(tensor) for _, _, tensor in self._slots} & set(tensors)
        return Rebound(self._function, slots), found


def rebound(function: Any, tensors: Mapping[int, torch.Tensor]) -> tuple[Any, set[int]]:
    """Return a function with tensors in the place of others, and the identities of those found.

    Parameters
    ----------
    function : callable
        A Module, a method of one, what can do so itself, or anything else, where none is found.
    tensors : dict
        New tensors by the identity of old ones.
    """
    function = now(function)
    if hasattr(function, "rebound"):
        result: tuple[Any, set[int]] = function.rebound(tensors)
        return result
    slots = [
        (place, name, tensors[id(tensor)])
        for module in modules_within([owner(function)])
        for place in (module._parameters, module._buffers, vars(module))
        for name, tensor in place.items()
        if isinstance(tensor, torch.Tensor) and id(tensor) in tensors
    ]
    found = {id(place[name]) for place, name, _ in slots}
    return (Rebound(function, slots) if slots else function), found


def bound(
    problem: InitialValueProblem, parameters: Sequence[torch.Tensor], leaves: bool = True
) -> InitialValueProblem:
    """Return a problem with other tensors as its parameters.

    Parameters
    ----------
    problem : InitialValueProblem
        The problem.
    parameters : sequence of Tensor
        One for each of its own. What has the same numbers in the same place is taken for the same.
    leaves : bool
        Whether they are to be leaves of graphs to come.

    Raises
    ------
    ConfigurationError
        If f does not take one of them from a Module.
    """
    new = {
        id(old): tensor.detach().requires_grad_() if leaves else tensor
        for old, tensor in zip(problem.parameters, parameters, strict=True)
        if not (old is tensor and old.requires_grad) and not _same(old, tensor)
    }
    if not new:
        return problem
    result, found = _with(problem, new)
    if len(found) < len(new):
        raise ConfigurationError(
            f"{len(new) - len(found)} of the parameters belong to a transform of torch.func, or "
            "have a tangent without requires_grad, and the vector field is no Module that holds "
            "them: write it as a torch.nn.Module, and use torch.func.functional_call"
        )
    return result


def below(problem: InitialValueProblem) -> InitialValueProblem:
    """Return a problem with the numbers of its parameters, below all transforms of torch.func.

    Those that f does not take from a Module may be of a cost or an event: the solve tells.
    """
    return _with(problem, {id(p): plain(p) for p in problem.parameters if is_wrapped(p)})[0]


def _with(
    problem: InitialValueProblem, new: Mapping[int, torch.Tensor]
) -> tuple[InitialValueProblem, set[int]]:
    """Return a problem with tensors in the place of others, and the identities of those found."""
    function, found = rebound(problem.function, new)
    explicit = problem.explicit
    if explicit is not None:
        explicit, more = rebound(explicit, new)
        found = found | more
    base = problem.base
    if base is not None:
        base = _with(base, new)[0]
    own = tuple(new.get(id(old), old) for old in problem.parameters)
    result = replace(problem, function=function, explicit=explicit, parameters=own, base=base)
    return result, found


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether f may go on with the old tensor where the new one is meant."""
    if old is new and (old.requires_grad or not is_wrapped(new)):
        return old.requires_grad
    while is_wrapped(new) and not new.requires_grad and not has_tangent(new):
        new = unwrapped(new)  # a constant at this level
    if is_wrapped(old) or is_wrapped(new):
        return old is new
    if not old.requires_grad:
        return False
    return old is new or (
        old.data_ptr() == new.data_ptr() and old.shape == new.shape and old.dtype == new.dtype
    )

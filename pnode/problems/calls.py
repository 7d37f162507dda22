"""One call of a solver: what it brings along, and the structure of its state.

The user's functions get both; everything else of a solve knows neither.
"""

from __future__ import annotations

import copy
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pnode.base.errors import ConfigurationError, VectorFieldError
from pnode.base.ranks import Ranks
from pnode.base.transforms import moves, refuse_moving
from pnode.problems.user_state import RowParts, Structure

__all__ = ["Call", "UserFunction", "brings_tensors"]


class UserFunction(torch.nn.Module):
    """A function of the user's as a solve calls it.

    A Module, as it may stand for one; tensors of ``args`` are attributes of it, where transforms
    put others in their place (see :mod:`pnode.field.rebinding`).

    Parameters
    ----------
    function : callable
        The user's ``f(t, y)``, or ``f(t, y, args)``.
    call : Call
        What it is to get.
    what : str or None
        How its result is called if that is a state; None of one that is not.
    """

    def __init__(self, function: Any, call: Call, what: str | None) -> None:
        super().__init__()
        self.function = function
        if isinstance(function, types.MethodType) and isinstance(
            function.__self__, torch.nn.Module
        ):
            self.owner = function.__self__
        self._structure, self._what, self._spec = call.structure, what, call.spec
        self._constants = [None if _is_tensor(leaf) else leaf for leaf in call.leaves]
        self._places = [index for index, leaf in enumerate(call.leaves) if _is_tensor(leaf)]
        for index in self._places:
            setattr(self, f"args_{index}", call.leaves[index])

    @property
    def tensors(self) -> dict[int, torch.Tensor]:
        """Those of ``args``, by their places."""
        return {index: getattr(self, f"args_{index}") for index in self._places}

    def with_tensors(self, tensors: dict[int, torch.Tensor]) -> UserFunction:
        """Return the function with other tensors in some places of ``args``."""
        made = copy.copy(self)
        made._parameters, made._buffers = dict(self._parameters), dict(self._buffers)
        for index, tensor in tensors.items():
            delattr(made, f"args_{index}")
            setattr(made, f"args_{index}", tensor)
        return made

    def forward(self, t: torch.Tensor, y: Any, *rates: Any) -> Any:
        """Call the function with the user's state and ``args``."""
        structure = self._structure
        if structure is not None:
            t, y, rates = (
                structure.time(t),
                structure.restore(y),
                tuple(map(structure.restore, rates)),
            )
        if self._spec is not None:
            leaves = list(self._constants)
            for index in self._places:
                leaves[index] = getattr(self, f"args_{index}")
            rates = (*rates, pytree.tree_unflatten(leaves, self._spec))
        result = self.function(t, y, *rates)
        if structure is None or self._what is None:
            return result
        return structure.lower_like(result, VectorFieldError, self._what)


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a solver brings along.

    Attributes
    ----------
    structure : Structure, RowParts or None
        Of a state that is no real tensor or tuple of such; of a tuple of independent samples.
    spec : TreeSpec or None
        Structure of ``args``; None without.
    leaves : tuple
        Their tensors and numbers.
    """

    structure: Structure | RowParts | None = None
    spec: Any = None
    leaves: tuple[Any, ...] = ()

    @classmethod
    def of(cls, y0: Any, args: Any, ranks: Ranks, mass: Any, exchange: Any, jacobian: Any) -> Call:
        """Look at the arguments of a call. Not collective.

        Raises
        ------
        ConfigurationError
            For ``args`` with other things than tensors and numbers in them, or whose gradient
            several ranks would have to share, and for a state whose structure or complex numbers
            ``mass``, ``exchange`` or a ``preconditioner`` cannot deal with.
        """
        if mass is not None:
            refuse_moving([("mass", mass)], "and a mass matrix is constant here")
        structure = Structure.of(y0)
        if structure is not None and exchange is not None:
            raise ConfigurationError(
                f"y0 is a {type(y0).__name__} or complex, and layout= is given: give this rank's "
                "cells as one real tensor"
            )
        if structure is not None and getattr(jacobian.preconditioner, "varies", False):
            raise ConfigurationError(
                "preconditioner is a callable (t, y), and y0 is complex or no tuple of tensors: "
                "give a matrix for the flattened state, 'dense', 'block' or 'sparse'"
            )
        if structure is not None and structure.is_complex and mass is not None:
            raise ConfigurationError(
                "mass is given and y0 is complex: give y0 as torch.view_as_real(y0), and the "
                "matrix for its entries"
            )
        if args is None:
            return cls(structure)
        found, spec = pytree.tree_flatten_with_path(args)
        for path, leaf in found:
            name = f"args{pytree.keystr(path)}"
            if not _is_tensor(leaf) and not isinstance(leaf, (numbers.Number, str, type(None))):
                raise ConfigurationError(
                    f"{name} is a {type(leaf).__name__}: give tensors and numbers, in tuples, "
                    "lists, dicts or NamedTuples; what else f needs belongs to f itself"
                )
            if ranks.parallel and _is_tensor(leaf) and moves(leaf):
                raise ConfigurationError(
                    f"{name} requires grad, and {ranks.comm.size} ranks share the state: gradients "
                    "of what all of them have are summed up for params=[...] alone; detach it, or "
                    "declare it there"
                )
        return cls(structure, spec, tuple(leaf for _, leaf in found))

    def by_rows(self, y0: Any) -> Call:
        """Return the call whose state inside, of independent samples, is one tensor.

        Parameters
        ----------
        y0 : Tensor or tuple of Tensor
            The state inside so far.

        Raises
        ------
        ConfigurationError
            If its tensors do not have as many rows.
        """
        parts = tuple(y0) if isinstance(y0, (tuple, list)) else (y0,)
        lengths = [part.shape[:1] for part in parts]
        own = [
            part.dim() > pair
            for part, pair in zip(parts, self.pairs or [0] * len(parts), strict=True)
        ]
        if not all(own) or lengths != lengths[:1] * len(parts):
            raise ConfigurationError(
                f"y0 has the shapes {[tuple(part.shape) for part in parts]}: with "
                "samples='independent' give tensors of shape (B, ...), whose rows are the samples"
            )
        if isinstance(y0, torch.Tensor):
            return self
        shapes = tuple(part.shape[1:] for part in parts)
        assert not isinstance(self.structure, RowParts)
        return replace(self, structure=RowParts(self.structure, shapes))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of ``args``."""
        return tuple(leaf for leaf in self.leaves if _is_tensor(leaf))

    @property
    def pairs(self) -> tuple[bool, ...]:
        """Which parts of the state inside are pairs of real numbers."""
        return () if self.structure is None else self.structure.pairs

    def state(self, y0: Any) -> Any:
        """Return the state inside; differentiable."""
        return y0 if self.structure is None else self.structure.lower(y0)

    def restored(self, inside: Any) -> Any:
        """Return the user's state of one inside; differentiable."""
        return inside if self.structure is None else self.structure.restore(inside)

    def function(self, function: Any, what: str | None = "what the vector field returned") -> Any:
        """Return a function of the user's as the solve is to call it; None for None."""
        if function is None or (self.structure is None and self.spec is None):
            return function
        return UserFunction(function, self, what)

    def observer(self, function: Any) -> Any:
        """Return one of the user's functions whose result is no state."""
        return self.function(function, None)

    def monitor(self, monitor: Callable[[Any, float, Any], None] | None) -> Any:
        """Return the user's monitor for states inside; None for None."""
        if monitor is None or self.structure is None:
            return monitor
        structure = self.structure
        return lambda step, t, inside: monitor(step, t, structure.restore(inside))


def brings_tensors(function: Any) -> bool:
    """Whether a function of a solve gets tensors by ``args``."""
    return isinstance(function, UserFunction) and bool(function._places)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)

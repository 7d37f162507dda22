"""States of any structure, and complex ones, as the real tensors that are integrated.

A state inside is one real tensor or a tuple of them. A dict, a NamedTuple or a nested structure of
tensors (``torch.utils._pytree``) is the tuple of its leaves, a complex tensor the real one of the
pairs (Re z, Im z), in a last dimension. Gradients of these pairs are torch's of complex tensors,
dL/d Re z + i dL/d Im z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pnode.base.errors import ConfigurationError

__all__ = ["RowParts", "Structure"]

_COMPLEX = (torch.complex128, torch.complex64)


@dataclass(frozen=True)
class Structure:
    """How the user's state maps to the one inside.

    Attributes
    ----------
    spec : TreeSpec
        The user's structure.
    names : tuple of str
        How its leaves are called in messages: ``"['a']"``.
    pairs : tuple of bool
        Which of them are complex.
    """

    spec: Any
    names: tuple[str, ...]
    pairs: tuple[bool, ...]

    @classmethod
    def of(cls, y0: Any) -> Structure | None:
        """Return that of y0; None where y0 is a real tensor or a tuple or list of such.

        Raises
        ------
        ConfigurationError
            If a leaf is no tensor, or of half precision.
        """
        if type(y0) is torch.Tensor and not y0.is_complex():
            return None
        parts = y0 if type(y0) in (tuple, list) else (y0,)
        if all(pytree.tree_is_leaf(part) and not _is_complex(part) for part in parts):
            return None
        found, spec = pytree.tree_flatten_with_path(y0)
        names = tuple(pytree.keystr(path) for path, _ in found)
        for name, (_, leaf) in zip(names, found, strict=True):
            if not isinstance(leaf, torch.Tensor):
                raise ConfigurationError(
                    f"y0{name} is a {type(leaf).__name__}: give torch tensors, in tuples, lists, "
                    "dicts or NamedTuples"
                )
            if leaf.is_complex() and leaf.dtype not in _COMPLEX:
                raise ConfigurationError(
                    f"y0{name} has dtype {leaf.dtype}: use torch.complex128 or torch.complex64"
                )
        if not found:
            raise ConfigurationError(
                f"y0 is an empty {type(y0).__name__}: give at least one tensor"
            )
        return cls(spec, names, tuple(leaf.is_complex() for _, leaf in found))

    @property
    def is_complex(self) -> bool:
        """Whether there are complex leaves."""
        return any(self.pairs)

    def lower(self, state: Any) -> Any:
        """Return the tensor or tuple inside of such a state; differentiable."""
        return self._inside(pytree.tree_leaves(state))

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """Return the time as the user's functions get it."""
        return t

    def restore(self, inside: Any) -> Any:
        """Return the user's state of tensors inside, whose leading dimensions stay."""
        parts = (inside,) if self.spec.is_leaf() else inside
        leaves = [
            torch.complex(part[..., 0], part[..., 1]) if pair else part
            for part, pair in zip(parts, self.pairs, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)

    def lower_like(self, value: Any, error: type[Exception], what: str) -> Any:
        """Return the inside of what someone else has made in this structure.

        Raises
        ------
        error
            If ``value``, called ``what``, has another structure, or if what is complex differs. A
            plain tuple may stand for a NamedTuple, and keys may come in any order.
        """
        try:
            leaves = self.spec.flatten_up_to(value)
        except ValueError:
            plain = type(value) in (tuple, list) and len(value) == len(self.pairs)
            if not (plain and self.spec.type not in (dict, tuple, list) and self._is_flat()):
                raise error(
                    f"{what} is a {_described(value)}, and the state is a "
                    f"{self._named()}: return the same structure"
                ) from None
            leaves = list(value)
        for name, leaf, pair in zip(self.names, leaves, self.pairs, strict=True):
            if not isinstance(leaf, torch.Tensor):
                raise error(f"{what} has a {type(leaf).__name__} at y{name}, not a tensor")
            if leaf.is_complex() != pair:
                kinds = "real", "complex"
                raise error(
                    f"{what} is {kinds[not pair]} ({leaf.dtype}) at y{name}, and the state is "
                    f"{kinds[pair]} there: return {kinds[pair]} numbers"
                )
        return self._inside(leaves)

    def _inside(self, leaves: Sequence[torch.Tensor]) -> Any:
        # Not view_as_real, whose cotangents have to be aligned as complex numbers are.
        parts = tuple(
            torch.stack([leaf.real, leaf.imag], -1) if pair else leaf
            for leaf, pair in zip(leaves, self.pairs, strict=True)
        )
        return parts[0] if self.spec.is_leaf() else parts

    def _is_flat(self) -> bool:
        return bool(self.spec.num_children == len(self.pairs))

    def _named(self) -> str:
        if self.spec.is_leaf():
            return "tensor"
        return f"{self.spec.type.__name__} of {', '.join(self.names)}"


@dataclass(frozen=True)
class RowParts:
    """How a tuple of tensors of shape ``(B, ...)`` maps to one of shape ``(B, n)``.

    Attributes
    ----------
    inner : Structure or None
        How the user's state maps to that tuple; None where it is one.
    shapes : tuple of torch.Size
        The tensors' shapes of one row.
    """

    inner: Structure | None
    shapes: tuple[torch.Size, ...]
    pairs: tuple[bool, ...] = ()
    is_complex: bool = False

    @property
    def dimensions(self) -> int:
        """How many dimensions a row of the user's largest part has."""
        pairs = self.inner.pairs if self.inner is not None else [False] * len(self.shapes)
        return max(len(shape) - pair for shape, pair in zip(self.shapes, pairs, strict=True))

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """Return times, ``(B, 1)``, with as many dimensions as the largest part."""
        return t.reshape(t.shape[:1] + (1,) * self.dimensions)

    def lower(self, state: Any) -> torch.Tensor:
        """Return the tensor inside of such a state; differentiable."""
        parts = state if self.inner is None else self.inner.lower(state)
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def restore(self, inside: torch.Tensor) -> Any:
        """Return the user's state of a tensor inside, whose leading dimensions stay."""
        parts, offset = [], 0
        for shape in self.shapes:
            part = inside.narrow(-1, offset, shape.numel())
            parts.append(part.reshape(inside.shape[:-1] + shape))
            offset += shape.numel()
        return tuple(parts) if self.inner is None else self.inner.restore(tuple(parts))

    def lower_like(self, value: Any, error: type[Exception], what: str) -> torch.Tensor:
        """Return the inside of what someone else has made in this structure.

        Raises
        ------
        error
            If ``value``, called ``what``, has another structure, or other shapes.
        """
        if self.inner is not None:
            value = self.inner.lower_like(value, error, what)
        parts = value if type(value) in (tuple, list) else ()
        found = [tuple(getattr(part, "shape", ())) for part in parts]
        rows = found[0][:1] if found else ()
        if not rows or found != [rows + shape for shape in self.shapes]:
            raise error(
                f"{what} is a {_described(value)} of shapes {found}, and the rows of the state "
                f"have {[tuple(shape) for shape in self.shapes]}: return the same"
            )
        kinds = [part.dtype for part in value]
        if len(set(kinds)) > 1:  # one would take on the precision of another
            raise error(f"{what} has parts of types {kinds}: return that of the state in all")
        return torch.cat([part.reshape(len(part), -1) for part in value], dim=1)


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _described(value: Any) -> str:
    if pytree.tree_is_leaf(value):
        return type(value).__name__
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    return f"{type(value).__name__} of {', '.join(paths) or 'nothing'}"

"""Graphs of torch operations on small tensors as expressions of scalars.

A tensor is a tensor of the numbers of its entries' expressions, so that operations that only move
entries act on these numbers as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch

from pnode.solvers.compiled.scalars import CODE, Scalars, Symbols
from pnode.solvers.compiled.trace import Untraceable

__all__ = ["Operations"]

_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything
# They move entries, or set them to zero, whose number is 0.
_MOVES = {
    "broadcast_in_dim", "collapse_view", "rev", "split_dim",  # prims
    "alias", "cat", "clone", "constant_pad_nd",
    "detach", "diag_embed", "diagonal", "diagonal_scatter", "expand", "flip", "gather", "index",
    "index_select", "lift_fresh_copy", "narrow", "permute", "repeat", "roll", "select",
    "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack",
    "t", "take", "transpose", "tril", "triu", "unbind", "unfold", "unsqueeze",
}  # fmt: skip
# By indices.
_CHOICES = {"gather", "index", "index_select", "take"}
# Entries among which an index that depends on values may choose.
_MOST_CHOICES = 1024
_TYPES = {torch.float64, torch.int64, torch.int32, torch.bool}
_SAME = {"_to_copy", "convert_element_type", "lift", "to", "device_put"}
_SYNONYMS = {
    "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not",
    "sgn": "sign", "true_divide": "div",
}  # fmt: skip


class Operations:
    """Evaluates graphs on expressions.

    Parameters
    ----------
    scalars : Scalars
        Where the expressions are kept.
    """

    def __init__(self, scalars: Scalars) -> None:
        self._scalars = scalars

    def evaluate(
        self, graph: torch.fx.GraphModule, *inputs: Symbols | torch.Tensor
    ) -> list[Symbols]:
        """Return the results of a graph; inputs that are tensors are constants.

        Raises
        ------
        Untraceable
            For an operation that is not known here.
        """
        values: dict[_Node, Any] = {}
        given = iter(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(graph)
            elif node.op == "output":
                results = torch.fx.node.map_arg(node.args[0], lambda source: values[source])
                return [self._symbols(result) for result in results]
            else:
                arguments, keywords = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda source: values[source]
                )
                try:
                    values[node] = self._call(node, arguments, dict(keywords))
                except Untraceable:
                    raise
                except Exception as error:  # whatever torch says to numbers in place of values
                    raise Untraceable(
                        "implicit methods are compiled as programs of scalars, in which "
                        f"{node.target} does not occur ({type(error).__name__}: {str(error)[:80]})"
                    ) from error
        raise AssertionError("a graph without output")

    def _symbols(self, value: Any) -> Symbols:
        if isinstance(value, Symbols):
            return value
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        return self._constants(value)

    def _constants(self, values: torch.Tensor) -> Symbols:
        return self._scalars.constants(values)

    def _each(
        self, combine: Callable[[list[int]], int], rows: torch.Tensor, name: str
    ) -> torch.Tensor:
        """Return what an operation makes of the numbers in each row."""
        return torch.tensor([combine(row) for row in rows.tolist()], dtype=torch.int64)

    def _call(self, node: _Node, arguments: Any, keywords: dict[str, Any]) -> Any:
        flat = torch.utils._pytree.tree_leaves((arguments, keywords))
        if not any(isinstance(value, Symbols) for value in flat):
            return node.target(*arguments, **keywords)
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float64
        if dtype not in _TYPES:
            raise NotImplementedError(f"numbers of type {dtype}")
        name = node.target.overloadpacket.__name__
        if name.startswith("bitwise") and dtype is not torch.bool:
            raise NotImplementedError(f"{name} of integers")
        name = _SYNONYMS.get(name.rstrip("_"), name)
        if name == "add" and dtype is torch.bool:
            name = "logical_or"
        if name in _SAME:
            before = node.args[0].meta["val"].dtype
            if dtype is torch.bool and before is not torch.bool:
                return self._pointwise("ne", arguments[0], 0.0)
            rounded = before.is_floating_point and not dtype.is_floating_point
            return self._pointwise("trunc", arguments[0]) if rounded else arguments[0]
        if name in _MOVES:
            if name in _CHOICES and any(isinstance(x, Symbols) for x in flat[1:]):
                if name != "index":
                    raise NotImplementedError(f"{name} by what depends on values")
                return self._choose(*arguments)
            ids = torch.utils._pytree.tree_map(self._moved, (arguments, keywords))
            moved = node.target(*ids[0], **ids[1])
            if isinstance(moved, torch.Tensor):
                return Symbols(moved.clone())
            return [Symbols(part.clone()) for part in moved]
        special = getattr(self, f"_do_{name}", None)
        if special is not None:
            return special(*arguments, **keywords)
        if name not in CODE or any(keywords.values()):
            raise NotImplementedError(f"{name} {keywords or ''}")
        return self._pointwise(name, *arguments)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Symbols):
            return value.ids
        if isinstance(value, float):  # what constant_pad_nd fills with
            return self._symbols(value).ids.item()
        if isinstance(value, torch.Tensor) and value.dtype is torch.float64:
            return self._constants(value).ids
        return value

    def _pointwise(self, name: str, *arguments: Any) -> Symbols:
        ids = torch.broadcast_tensors(*(self._symbols(value).ids for value in arguments))
        rows = torch.stack([part.reshape(-1) for part in ids], dim=1)
        done = self._each(lambda row: self._scalars.apply(name, *row), rows, name)
        return Symbols(done.reshape(ids[0].shape))

    def _do_view(self, a: Symbols, shape: Sequence[int], *_: Any) -> Symbols:
        return Symbols(a.ids.reshape(tuple(shape)))

    _do_reshape = _do__unsafe_view = _do__reshape_alias = _do_view

    def _do_add(self, a: Any, b: Any, alpha: float = 1.0) -> Symbols:
        return self._pointwise("add", a, b if alpha == 1 else self._pointwise("mul", alpha, b))

    def _do_sub(self, a: Any, b: Any, alpha: float = 1.0) -> Symbols:
        return self._pointwise("sub", a, b if alpha == 1 else self._pointwise("mul", alpha, b))

    def _do_rsub(self, a: Any, b: Any, alpha: float = 1.0) -> Symbols:
        return self._do_sub(b, a, alpha)

    def _do_reciprocal(self, a: Any) -> Symbols:
        return self._pointwise("div", 1.0, a)

    def _do_rsqrt(self, a: Any) -> Symbols:
        return self._pointwise("div", 1.0, self._pointwise("sqrt", a))

    def _do_hypot(self, a: Any, b: Any) -> Symbols:
        squares = (self._pointwise("mul", x, x) for x in (a, b))
        return self._pointwise("sqrt", self._pointwise("add", *squares))

    def _do_square(self, a: Any) -> Symbols:
        return self._pointwise("mul", a, a)

    def _do_sigmoid(self, a: Any) -> Symbols:
        growth = self._pointwise("exp", self._pointwise("neg", a))
        return self._pointwise("div", 1.0, self._pointwise("add", 1.0, growth))

    # Choices, whose derivatives where two numbers are equal are torch's; NaN is below nothing.

    def _do_relu(self, a: Any) -> Symbols:
        return self._pointwise("where", self._pointwise("le", a, 0.0), 0.0, a)

    def _do_clamp(self, a: Any, least: Any = None, largest: Any = None) -> Symbols:
        for name, bound in (("lt", least), ("gt", largest)):
            if bound is not None:
                a = self._pointwise("where", self._pointwise(name, a, bound), bound, a)
        return a

    def _do_clamp_min(self, a: Any, least: Any) -> Symbols:
        return self._do_clamp(a, least)

    def _do_clamp_max(self, a: Any, largest: Any) -> Symbols:
        return self._do_clamp(a, None, largest)

    def _do_full_like(self, a: Symbols, value: float, **_: Any) -> Symbols:
        return self._constants(torch.full(a.ids.shape, value, dtype=torch.float64))

    def _do_zeros_like(self, a: Symbols, **_: Any) -> Symbols:
        return self._do_full_like(a, 0.0)

    def _do_ones_like(self, a: Symbols, **_: Any) -> Symbols:
        return self._do_full_like(a, 1.0)

    def _do_new_zeros(self, a: Symbols, size: Sequence[int], **_: Any) -> Symbols:
        return self._constants(torch.zeros(*size, dtype=torch.float64))

    def _do_new_ones(self, a: Symbols, size: Sequence[int], **_: Any) -> Symbols:
        return self._constants(torch.ones(*size, dtype=torch.float64))

    def _do_new_full(self, a: Symbols, size: Sequence[int], value: float, **_: Any) -> Symbols:
        return self._constants(torch.full(tuple(size), value, dtype=torch.float64))

    def _reduce(
        self, name: str, combine: Callable[[list[int]], int], a: Symbols, axes: Any, keep: bool
    ) -> Symbols:
        number = a.ids.dim()
        axes = [axes] if isinstance(axes, int) else list(axes or range(number))
        axes = [axis % number if number else 0 for axis in axes]
        kept = [axis for axis in range(number) if axis not in axes]
        shape = [1 if axis in axes else size for axis, size in enumerate(a.ids.shape)]
        if not keep:
            shape = [a.ids.shape[axis] for axis in kept]
        order = [*kept, *(axes if number else [])]
        moved = a.ids.permute(order).reshape(math.prod(a.ids.shape[axis] for axis in kept), -1)
        return Symbols(self._each(combine, moved, name).reshape(shape))

    def _do_sum(self, a: Symbols, axes: Any = None, keep: bool = False, **_: Any) -> Symbols:
        return self._reduce("sum", self._scalars.total, a, axes, keep)

    def _do_mean(self, a: Symbols, axes: Any = None, keep: bool = False, **_: Any) -> Symbols:
        total = self._reduce("sum", self._scalars.total, a, axes, keep)
        return self._pointwise("div", total, a.ids.numel() / max(total.ids.numel(), 1))

    def _do_var(
        self, a: Symbols, axes: Any = None, correction: float | None = None, keepdim: bool = False
    ) -> Symbols:
        mean = self._do_mean(a, axes, True)
        away = self._pointwise("sub", a, mean)
        total = self._do_sum(self._pointwise("mul", away, away), axes, keepdim)
        number = a.ids.numel() / max(total.ids.numel(), 1)
        return self._pointwise("div", total, number - (1.0 if correction is None else correction))

    def _do_var_mean(self, a: Symbols, axes: Any = None, **how: Any) -> tuple[Symbols, Symbols]:
        return self._do_var(a, axes, **how), self._do_mean(a, axes, how.get("keepdim", False))

    def _do_amax(self, a: Symbols, axes: Any = (), keep: bool = False) -> Symbols:
        return self._chain("maximum", a, axes, keep)

    def _do_amin(self, a: Symbols, axes: Any = (), keep: bool = False) -> Symbols:
        return self._chain("minimum", a, axes, keep)

    def _do_prod(self, a: Symbols, axes: Any = None, keep: bool = False, **_: Any) -> Symbols:
        return self._chain("mul", a, axes, keep)

    def _chain(self, name: str, a: Symbols, axes: Any, keep: bool) -> Symbols:
        def combine(row: list[int]) -> int:
            return reduce(lambda x, y: self._scalars.apply(name, x, y), row)

        return self._reduce(name, combine, a, axes, keep)

    def matrix_product(self, a: Any, b: Any) -> Symbols:
        """Return the product of two matrices."""
        rows, columns = self._symbols(a).ids.tolist(), self._symbols(b).ids.t().tolist()
        done = [[self._scalars.product_sum(row, column) for column in columns] for row in rows]
        return Symbols(torch.tensor(done, dtype=torch.int64).reshape(len(rows), len(columns)))

    _do_mm = matrix_product

    def _do_bmm(self, a: Any, b: Any) -> Symbols:
        pairs = zip(self._symbols(a).ids, self._symbols(b).ids, strict=True)
        return Symbols(torch.stack([self._do_mm(Symbols(x), Symbols(y)).ids for x, y in pairs]))

    def _do_mv(self, a: Any, b: Any) -> Symbols:
        column = Symbols(self._symbols(b).ids.unsqueeze(1))
        return Symbols(self._do_mm(a, column).ids.squeeze(1))

    def _do_dot(self, a: Any, b: Any) -> Symbols:
        return self._do_sum(self._pointwise("mul", a, b))

    def _do_addmm(self, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Symbols:
        product: Any = self._do_mm(a, b)
        return self._do_add(c if beta == 1 else self._pointwise("mul", beta, c), product, alpha)

    def _do_addcmul(self, c: Any, a: Any, b: Any, value: float = 1) -> Symbols:
        return self._do_add(c, self._pointwise("mul", a, b), value)

    def _do_fma(self, a: Any, b: Any, c: Any) -> Symbols:
        return self._pointwise("add", self._pointwise("mul", a, b), c)

    def _do_addcdiv(self, c: Any, a: Any, b: Any, value: float = 1) -> Symbols:
        return self._do_add(c, self._pointwise("div", a, b), value)

    def _do_cumsum(self, a: Symbols, axis: int, **_: Any) -> Symbols:
        return self._accumulate("add", a, axis)

    def _do_cumprod(self, a: Symbols, axis: int, **_: Any) -> Symbols:
        return self._accumulate("mul", a, axis)

    def _accumulate(self, name: str, a: Symbols, axis: int) -> Symbols:
        rows = [Symbols(row) for row in a.ids.movedim(axis, 0)]
        done = [rows[0]]
        for row in rows[1:]:
            done.append(self._pointwise(name, done[-1], row))
        return Symbols(torch.stack([row.ids for row in done]).movedim(0, axis))

    def _do_searchsorted(
        self, rising: Any, a: Any, right: bool = False, side: str | None = None, **how: Any
    ) -> Symbols:
        """Return how many of rising numbers are before each value; NaN comes after all."""
        if self._symbols(rising).ids.dim() != 1 or how.get("sorter") is not None:
            raise NotImplementedError("searchsorted in several rows, or with a sorter")
        at = Symbols(self._symbols(a).ids.unsqueeze(-1))
        after = self._pointwise("lt" if right or side == "right" else "le", at, rising)
        return self._do_sum(self._pointwise("logical_not", after), [-1])

    def _place(self, a: Any, indices: Sequence[Any]) -> tuple[torch.Tensor, Symbols]:
        """Return rows, and an index of them that depends on values."""
        ids = self._symbols(a).ids
        if any(index is not None for index in indices[1:]) or ids.numel() > _MOST_CHOICES:
            raise NotImplementedError("an index that depends on values, of many entries or axes")
        at = Symbols(indices[0].ids.reshape(*indices[0].ids.shape, *[1] * (ids.dim() - 1)))
        back = self._pointwise("add", at, float(len(ids)))
        return ids, self._pointwise("where", self._pointwise("lt", at, 0.0), back, at)

    def _choose(self, a: Any, indices: Sequence[Any]) -> Symbols:
        """Return the rows that such an index chooses; NaN where there is none."""
        ids, at = self._place(a, indices)

        def among(rows: list[Symbols], first: int) -> Symbols:
            if len(rows) == 1:
                return rows[0]
            half = len(rows) // 2
            below = self._pointwise("lt", at, float(first + half))
            left, right = among(rows[:half], first), among(rows[half:], first + half)
            return self._pointwise("where", below, left, right)

        none = self._symbols(math.nan)
        return among([none, *map(Symbols, ids), none], -1)

    def _add_at(self, a: Any, indices: Sequence[Any], values: Any) -> Symbols:
        """Add to the rows that such an index chooses; NaN where there is none."""
        ids, at = self._place(a, indices)
        axes = list(range(at.ids.dim() - ids.dim() + 1))
        shape = (*at.ids.shape[: len(axes)], *ids.shape[1:])
        value, rows = Symbols(self._symbols(values).ids.expand(shape)), []
        inside = [self._pointwise("ge", at, 0.0), self._pointwise("lt", at, float(len(ids)))]
        known = self._pointwise("logical_and", *inside)
        for k, row in enumerate(ids):
            own = self._pointwise("where", self._pointwise("eq", at, float(k)), value, 0.0)
            own = self._do_sum(self._pointwise("where", known, own, math.nan), axes)
            rows.append(self._pointwise("add", Symbols(row), own).ids)
        return Symbols(torch.stack(rows))

    def _do_index_put(
        self, a: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
    ) -> Symbols:
        if any(isinstance(index, Symbols) for index in indices):
            if not accumulate:
                raise NotImplementedError("index_put by what depends on values")
            return self._add_at(a, indices, values)
        chosen = tuple(slice(None) if index is None else index for index in indices)
        return self._put(a, lambda places: places[chosen], values, accumulate)

    def _do_scatter_add(self, a: Any, axis: int, index: torch.Tensor, values: Any) -> Symbols:
        part = self._symbols(values).ids[tuple(map(slice, index.shape))]
        return self._put(a, lambda places: places.gather(axis, index), Symbols(part), True)

    def _put(
        self, a: Any, choose: Callable[[torch.Tensor], torch.Tensor], values: Any, accumulate: bool
    ) -> Symbols:
        """Write values, or add them, at the places that are chosen of all."""
        ids = self._symbols(a).ids
        places = choose(torch.arange(ids.numel()).reshape(ids.shape))
        entries = self._symbols(values).ids.expand(places.shape).reshape(-1)
        flat, places = ids.reshape(-1).clone(), places.reshape(-1)
        if accumulate and len(places.unique()) == len(places):
            entries, accumulate = (
                self._pointwise("add", *map(Symbols, (flat[places], entries))).ids,
                False,
            )
        for place, entry in zip(places.tolist(), entries, strict=True):
            if accumulate:
                entry = self._pointwise("add", *map(Symbols, (flat[place], entry))).ids
            flat[place] = entry
        return Symbols(flat.reshape(ids.shape))

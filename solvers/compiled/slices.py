"""Gradients of slices in graphs, written in the form in which they take least time.

A slice's gradient is a tensor of zeros with the slice's own in it. Inductor asks for each entry of
a sum of such tensors which slices it lies in. Instead, what differs in the index along a dimension
alone is stacked, and the sum of the others reads tensors that are padded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = ["arrange_slices"]

_aten = torch.ops.aten
_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything
_ZEROS = (
    _aten.full.default, _aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default,
)  # fmt: skip
_MULTIPLES = (_aten.neg.default, _aten.mul.Tensor, _aten.div.Tensor)
#: Rows of fewer entries are no faster for being padded.
_ROW = 32


def arrange_slices(graph: torch.fx.GraphModule) -> None:
    """Write the sums of gradients of slices anew, which stay what they are but for round-off."""
    if any(_is_entry(node) or _is_slice(node) for node in graph.graph.nodes):
        _stack_entries(graph.graph)
        _pad_slices(graph.graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()


def _shape(node: _Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _is_tensor(node: _Node) -> bool:
    """Whether a shape is known of it."""
    return isinstance(node, torch.fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def _is_zero(node: _Node) -> bool:
    """Whether it is a tensor of zeros."""
    filled = node.args[1] if node.target is _aten.full.default else 0
    return node.target in _ZEROS and filled == 0


def _is_entry(node: _Node) -> bool:
    """Whether it is the gradient of ``x.select(dim, index)``."""
    if node.target is _aten.select_scatter.default:
        return len(node.args) == 4 and _is_zero(node.args[0])
    return node.target is _aten.select_backward.default and len(node.args) == 4


def _entry(node: _Node) -> tuple[_Node, int, int]:
    """Return what is in it, the dimension and the index."""
    given, _, dim, index = node.args
    if node.target is _aten.select_scatter.default:
        _, given, dim, index = node.args
    shape = _shape(node)
    return given, dim % len(shape), index % shape[dim]


def _is_slice(node: _Node) -> bool:
    """Whether it is the gradient of ``x[a:b]`` along one dimension."""
    if node.target is _aten.slice_scatter.default:
        return len(node.args) > 2 and node.args[5:] in ((), (1,)) and _is_zero(node.args[0])
    return node.target is _aten.slice_backward.default and node.args[5:] == (1,)


def _slice(node: _Node) -> tuple[_Node, int, int]:
    """Return what is in it, the dimension and where that begins."""
    if node.target is _aten.slice_scatter.default:
        _, given, dim, start = (*node.args, None)[:4]
    else:
        given, _, dim, start = node.args[:4]
    shape = _shape(node)
    length, start = shape[dim], start or 0
    return given, dim % len(shape), min(max(start + length if start < 0 else start, 0), length)


def _is_sum(node: _Node) -> bool:
    """Whether it is a sum of two tensors like it."""
    if node.target is not _aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    kinds = {(x.meta["val"].dtype, _shape(x)) for x in (node, *node.args) if _is_tensor(x)}
    return len(kinds) == 1 and all(map(_is_tensor, node.args))


def _terms(node: _Node) -> list[_Node]:
    """Return the terms of a sum, in which other sums are that nobody else reads."""
    found, pending = [], [*reversed(node.args)]
    while pending:
        part = pending.pop()
        if _is_sum(part) and len(part.users) == 1:
            pending += reversed(part.args)
        else:
            found.append(part)
    return found


def _stack_entries(nodes: torch.fx.Graph) -> None:
    """Stack what sums have for each index along a dimension."""
    within: set[_Node] = set()
    for node in reversed(list(nodes.nodes)):
        if not _is_sum(node):
            continue
        within.update(x for x in node.args if _is_sum(x) and len(x.users) == 1)
        if node in within:
            continue
        terms = _terms(node)
        for dim, size in enumerate(_shape(node)):
            rows: list[list[_Node]] = [[] for _ in range(size)]
            others = []
            for term in terms:
                given, along, index = _entry(term) if _is_entry(term) else (term, None, 0)
                if along == dim:
                    rows[index].append(given)
                else:
                    others.append(term)
            if size < 2 or not all(rows):
                continue
            with nodes.inserting_before(node):
                parts = [_sum(nodes, row) for row in rows]
                whole = _made(nodes, _aten.stack.default, (parts, dim))
                total = _sum(nodes, [whole, *others])
            node.replace_all_uses_with(total)
            break


def _sum(nodes: torch.fx.Graph, terms: Sequence[_Node]) -> _Node:
    return functools.reduce(lambda x, y: _made(nodes, _aten.add.Tensor, (x, y)), terms)


def _made(nodes: torch.fx.Graph, target: Any, args: tuple[Any, ...]) -> _Node:
    """Return a new node, with an example of its result."""
    node = nodes.call_function(target, args)
    given = torch.fx.node.map_arg(args, lambda x: x.meta["val"])
    node.meta["val"] = target(*given)
    return node


def _is_multiple(node: _Node) -> bool:
    """Whether it is a number times a tensor like it."""
    inside, number = (*node.args, 1.0)[:2] if node.args else (None, None)
    if node.target not in _MULTIPLES or node.kwargs or not isinstance(number, float | int):
        return False
    if not (math.isfinite(number) and number):  # zeros are to stay zeros
        return False
    return _is_tensor(inside) and inside.meta["val"].dtype == node.meta["val"].dtype


@dataclass(frozen=True)
class _Place:
    """Where a tensor, or a multiple of it, lies in one of zeros: ``factors`` make that of it."""

    node: _Node
    inside: _Node
    begin: tuple[int, ...]
    factors: tuple[_Node, ...]

    @classmethod
    def of(cls, node: _Node) -> _Place:
        """Return that of slices of slices."""
        begin, inside = [0] * len(_shape(node)), node
        while _is_slice(inside) and (inside is node or len(inside.users) == 1):
            inside, dim, start = _slice(inside)
            begin[dim] += start
        factors: list[_Node] = []
        while _is_multiple(inside):
            factors.insert(0, inside)
            inside = inside.args[0]
        return cls(node, inside, tuple(begin), tuple(factors))


def _pad_slices(nodes: torch.fx.Graph) -> None:
    """Let sums read tensors that are padded once, for all places where they lie in the sums."""
    places: dict[Any, list[_Place]] = {}
    for node in nodes.nodes:
        summed = any(map(_is_sum, node.users))
        if _is_slice(node) and summed and node.meta["val"].is_floating_point():
            place = _Place.of(node)
            places.setdefault((place.inside, _shape(node)), []).append(place)
    for (inside, shape), found in places.items():
        # The same entry is at the last begin's place of what is padded, in all of them.
        first, last = (
            [choice(along) for along in zip(*(x.begin for x in found), strict=True)]
            for choice in (min, max)
        )
        sizes = [n + b - a for n, a, b in zip(shape, first, last, strict=True)]
        ends = zip(sizes, last, _shape(inside), strict=True)
        around = [(before, size - before - own) for size, before, own in ends]
        inner = max(dim for dim, amounts in enumerate(around) if any(amounts) or not dim)
        if len(found) < 2 or math.prod(shape[inner:]) < _ROW:
            continue
        with nodes.inserting_before(found[0].node):
            amounts = [amount for pair in reversed(around) for amount in pair]
            padded = _made(nodes, _aten.constant_pad_nd.default, (inside, amounts, 0.0))
            if not padded.meta["val"].is_contiguous():
                continue
            strides = padded.meta["val"].stride()
            for place in found:
                moved = zip(last, place.begin, strides, strict=True)
                start = sum((b - a) * stride for b, a, stride in moved)
                # A view that inductor cannot look through: it makes what is padded first.
                look = _made(
                    nodes, _aten.as_strided.default, (padded, list(shape), list(strides), start)
                )
                for factor in place.factors:
                    look = _made(nodes, factor.target, (look, *factor.args[1:]))
                place.node.replace_all_uses_with(look)

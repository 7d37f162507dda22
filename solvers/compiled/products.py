"""Matrix products in graphs, written in the form in which they take least time."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

__all__ = ["SMALL_PRODUCT", "VECTOR", "apart", "arrange_products", "packet", "sums_of_products"]

_aten = torch.ops.aten
_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything
#: Below so many multiplications a matrix product costs less as a loop, fused with what is around
# it, than as a call of the BLAS.
SMALL_PRODUCT = 20_000
#: Entries that such a loop takes at once, in any case.
VECTOR = 8
# Entries of a factor that are worth another matrix product to leave where they are.
_LARGE = 32_768
# Into so many sums the entries along a row are added up first.
_LANES = 16


def packet(node: _Node) -> Any:
    """Return the operation of a node, whatever its overload; None for what is none."""
    return getattr(node.target, "overloadpacket", None)


def arrange_products(
    graph: torch.fx.GraphModule, captured: tuple[torch.Tensor, ...]
) -> tuple[int, ...]:
    """Write products with a matrix that f reads in the form in which they take least time.

    Small ones are sums, which fuse with their neighbours. That pays if entries next to each other
    in memory are taken at once: those of a row where there are enough columns, else those that are
    summed. Large ones (float64) are given the matrix with the summed entries next to each other,
    which the BLAS likes best. Where the matrix lies the other way round, its transpose becomes an
    input too; returns the indices of these matrices.
    """
    nodes = graph.graph
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    order = {node: index for index, node in enumerate(placeholders[3:])}
    copies: dict[int, _Node] = {}
    last = placeholders[-1]

    def transposed(index: int) -> _Node:
        nonlocal last
        if index not in copies:
            with nodes.inserting_after(last):
                last = copies[index] = nodes.placeholder(f"transposed_{index}")
            last.meta["val"] = captured[index].detach().t().contiguous()
        return copies[index]

    for node in list(nodes.nodes):
        if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        base, flipped = b, False
        while packet(base) in (_aten.t, _aten.detach):
            flipped ^= packet(base) is _aten.t
            base = base.args[0]
        if base not in order or not captured[order[base]].is_contiguous():
            continue
        index = order[base]
        (rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
        if rows * inner * columns > SMALL_PRODUCT:
            wide = rows >= VECTOR and captured[index].dtype is torch.float64
            if wide and not flipped and min(captured[index].shape) > 1:
                with nodes.inserting_before(node):
                    right = nodes.call_function(_aten.t.default, (transposed(index),))
                right.meta["val"] = b.meta["val"]
                node.args = (*bias, a, right)
            continue
        if flipped == (columns >= VECTOR) and min(captured[index].shape) > 1:
            base, flipped = transposed(index), not flipped
        with nodes.inserting_before(node):
            # Without a copy, as of a single row or column, the transpose is a look at the same.
            other = b if flipped else nodes.call_function(_aten.t.default, (base,))
            along, by_rows = (base, other) if flipped else (other, base)
            _write_as_sum(nodes, node, along, by_rows)
    nodes.eliminate_dead_code()
    return tuple(copies)


def _write_as_sum(nodes: torch.fx.Graph, node: _Node, base: _Node, by_rows: _Node) -> None:
    """Replace a product by a sum: over rows of ``by_rows``, or along those of its transpose."""
    *bias, a, b = node.args
    call = nodes.call_function
    (_, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
    if columns >= VECTOR:
        right = call(_aten.unsqueeze.default, (by_rows, 0))
        left = call(_aten.unsqueeze.default, (a, 2))
        total = call(_aten.sum.dim_IntList, (call(_aten.mul.Tensor, (left, right)), [1]))
    elif inner >= 2 * _LANES:
        total = _sum_in_lanes(call, a, base, inner)
    else:
        right = call(_aten.unsqueeze.default, (base, 0))
        left = call(_aten.unsqueeze.default, (a, 1))
        total = call(_aten.sum.dim_IntList, (call(_aten.mul.Tensor, (left, right)), [2]))
    for tensor in bias:
        total = call(_aten.add.Tensor, (total, tensor))
    total.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(total)
    nodes.erase_node(node)


def _sum_in_lanes(call: Any, a: _Node, base: _Node, inner: int) -> _Node:
    """Return a base^T, summed lane by lane first.

    To add up the entries of one vector costs as much as some ten additions of vectors.
    """
    blocks = inner // _LANES
    whole = blocks * _LANES

    def block(matrix: _Node, place: int) -> _Node:
        part = call(_aten.slice.Tensor, (matrix, 1, 0, whole))
        parts = call(_aten.view.default, (part, [len_of(matrix), blocks, _LANES]))
        return call(_aten.unsqueeze.default, (parts, place))

    def len_of(matrix: _Node) -> int:
        return int(matrix.meta["val"].shape[0])

    products = call(_aten.mul.Tensor, (block(a, 1), block(base, 0)))
    lanes = call(_aten.sum.dim_IntList, (products, [2]))
    terms = [call(_aten.select.int, (lanes, 2, index)) for index in range(_LANES)]
    for index in range(whole, inner):
        left = call(_aten.slice.Tensor, (a, 1, index, index + 1))
        right = call(_aten.select.int, (base, 1, index))
        terms.append(call(_aten.mul.Tensor, (left, right)))
    while len(terms) > 1:
        last = terms[len(terms) // 2 * 2 :]
        pairs = zip(terms[0::2], terms[1::2], strict=False)
        terms = [call(_aten.add.Tensor, pair) for pair in pairs] + last
    return terms[0]


def sums_of_products(pairs: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Return terms whose sum is the sum of a^T b over pairs (a, b), or its transpose if wider."""
    # One product for all stages, but: b is what f evaluates, and the first stage's does not lie
    # next to those of the others; a lies where it was computed.
    (computed, evaluated), result = pairs[0], pairs[0][0].shape[1] * pairs[0][1].shape[1]
    groups = [pairs]
    if computed.numel() > max(_LARGE, 2 * result):
        groups = [[pair] for pair in pairs]
    elif evaluated.numel() > _LARGE:
        groups = [pairs[:1], pairs[1:]]
    if computed.shape[1] > evaluated.shape[1]:
        groups = [[(b, a) for a, b in group] for group in groups]
    columns = max(computed.shape[1], evaluated.shape[1])
    if sum(len(a) for a, _ in pairs) * result <= SMALL_PRODUCT and columns >= VECTOR:
        return [(a.unsqueeze(2) * b.unsqueeze(1)).sum(0) for group in groups for a, b in group]
    return [
        torch.cat([a for a, _ in group]).t() @ torch.cat([b for _, b in group])
        for group in groups
        if group
    ]


def apart(
    tensors: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Copy tensors that share memory with others, or one another: results of a graph must not.

    An activation at the end of f saves f's own value. The adjoint takes all for contiguous.
    """
    known = {other.untyped_storage()._cdata for other in others}
    result = []
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        copied = tensor.clone() if storage in known else tensor
        result.append(copied.contiguous())
        known.add(storage)
    return tuple(result)

"""What a traced graph holds becomes its input; what has effects is refused."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch.fx.node import map_arg

from pnode.solvers.compiled.products import packet

__all__ = [
    "Untraceable", "close_slices", "differentiable", "is_mutation", "is_pending", "is_view",
    "lift_captured", "refuse_effects",
]  # fmt: skip

_aten = torch.ops.aten
_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything
# Copies are views too where nothing is written in place.
_COPIES = {_aten.clone, _aten.lift_fresh_copy}
_VIEWS = {_aten.detach, _aten.alias, *_COPIES}


class Untraceable(Exception):
    """Why there are no graphs of a field."""


def lift_captured(graph: torch.fx.GraphModule) -> tuple[torch.Tensor, ...]:
    """Make inputs of the tensors that the graph holds, each once."""
    nodes = graph.graph
    captured: list[torch.Tensor] = []
    inputs: dict[int, _Node] = {}
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    for node in list(nodes.nodes):
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(node.target)(graph)
        if id(tensor) not in inputs:
            with nodes.inserting_after(last):
                last = nodes.placeholder(f"captured_{len(captured)}")
            last.meta["val"] = tensor
            inputs[id(tensor)] = last
            captured.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        nodes.erase_node(node)
    for node in nodes.nodes:
        if packet(node) is _aten.mul and node.meta["val"].is_floating_point():
            # Inductor takes x * 0 for zero whatever x is, and not x * 0.0.
            node.args = tuple(0.0 if isinstance(x, int) and x == 0 else x for x in node.args)
    graph.recompile()
    return tuple(captured)


def refuse_effects(graph: torch.fx.GraphModule) -> None:
    """Refuse what has effects besides its result, and results whose sizes depend on values."""
    given = {node for node in graph.graph.nodes if node.op == "placeholder"}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(not isinstance(n, int) for n in value.shape):
            raise Untraceable(
                f"in the vector field values decide how many entries a result has ({node.target}), "
                "such as those that a boolean mask chooses: use torch.where, or a tensor of indices"
            )
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _without_dropout(node):
            raise Untraceable(f"the vector field draws random numbers ({node.target})")
        for argument, declared in zip(node.args, node.target._schema.arguments, strict=False):
            info = declared.alias_info
            if info is not None and info.is_write and _base(argument) in given:
                raise Untraceable(
                    f"the vector field writes into a tensor that it was given ({node.target})"
                )


def close_slices(graph: torch.fx.GraphModule) -> None:
    """End slices that are written into at the last entry: vmap adds to an end of 2^63 - 1."""
    for node in graph.graph.nodes:
        if node.target is _aten.slice_scatter.default and len(node.args) > 4:
            x, part, dim, start, end, *step = node.args
            node.args = (x, part, dim, start, min(end, x.meta["val"].shape[dim]), *step)


def differentiable(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a graph that torch can differentiate.

    There complex slices that are written into are put together of their parts.
    """
    if not any(_is_complex_slice(node) for node in graph.graph.nodes):
        return graph
    nodes = torch.fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    for node in filter(_is_complex_slice, list(nodes.nodes)):
        given: Any = node.args
        x, part, dim, start, end, step = given + (0, None, None, 1)[len(given) - 2 :]
        size = x.meta["val"].shape[dim]
        start, end = start or 0, size if end is None else min(end, size)
        if step != 1 or not 0 <= start < end:
            continue
        with nodes.inserting_before(node):
            parts = [
                part if own else _new(nodes, _aten.slice.Tensor, x, dim, first, last)
                for first, last, own in ((0, start, False), (start, end, True), (end, size, False))
                if first < last
            ]
            made = _new(nodes, _aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]
        node.replace_all_uses_with(made)
        nodes.erase_node(node)
    return torch.fx.GraphModule(graph, nodes)


def _is_complex_slice(node: _Node) -> bool:
    return node.target is _aten.slice_scatter.default and node.args[0].meta["val"].is_complex()


def _new(nodes: torch.fx.Graph, target: Any, *arguments: Any) -> _Node:
    """Return a new node, and note what it is like."""
    node = nodes.call_function(target, arguments)
    node.meta["val"] = target(*map_arg(arguments, lambda one: one.meta["val"]))
    return node


def _without_dropout(node: _Node) -> bool:
    """Whether an operation that may draw random numbers, such as fused attention, draws none."""
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    given |= node.kwargs
    chances = [
        given.get(argument.name, argument.default_value)
        for argument in arguments
        if argument.name in ("dropout_p", "dropout")
    ]
    return bool(chances) and not any(chances)


def is_mutation(node: _Node) -> bool:
    """Whether an operation writes into an operand."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_pending(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds other numbers than its own."""
    return tensor.is_neg() or tensor.is_conj()


def is_view(node: _Node) -> bool:
    """Whether a result shares its operand's memory, or may as nothing is written in place."""
    return node.op == "call_function" and (
        packet(node) in _VIEWS or bool(getattr(node.target, "is_view", False))
    )


def _base(node: Any) -> Any:
    while isinstance(node, torch.fx.Node) and is_view(node) and packet(node) not in _COPIES:
        node = node.args[0]
    return node

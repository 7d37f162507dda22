"""The vector field as graphs of torch operations: its value and its vector-Jacobian product.

Traced once, with autograd, at fake tensors. What f reads besides t and y (parameters, buffers,
tensors of a closure) becomes an input of the graphs, by identity: a change of its values takes
effect. Python numbers and the course of Python's control flow are constants of a graph; see
``Compiler`` for how a change is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pnode.field.stacked import StackedResidual
from pnode.field.vectorfield import VectorField
from pnode.problems.windows import Window
from pnode.solvers.compiled.lifting import (
    Untraceable,
    close_slices,
    is_mutation,
    is_pending,
    is_view,
    lift_captured,
    refuse_effects,
)
from pnode.solvers.compiled.products import arrange_products, packet

__all__ = [
    "FieldGraph", "ParameterPart", "Untraceable", "compose", "dependent", "lifted", "trace_field",
]  # fmt: skip

_aten = torch.ops.aten
_Node: TypeAlias = Any  # torch.fx.Node, whose arguments are typed as a union of everything
# Cheaper to repeat from their operands than to keep.
_CHEAP = {
    _aten.add, _aten.sub, _aten.mul, _aten.neg, _aten.rsub, _aten.relu, _aten.square, _aten.abs,
    _aten.clamp, _aten.clamp_min, _aten.clamp_max, _aten.maximum, _aten.minimum, _aten.where,
    _aten.ge, _aten.gt, _aten.le, _aten.lt, _aten.eq, _aten.ne, _aten.sign, _aten._to_copy,
}  # fmt: skip

# What in-place operations become, which few know how to go on with.
_WITHOUT_COPIES = {_aten.copy.default: lambda x, y, *_: y.expand(x.shape).to(x.dtype, copy=True)}


@dataclass(frozen=True, eq=False)
class FieldGraph:
    """Graphs of f(t, y) and of its product with a cotangent, in the user's precision.

    Attributes
    ----------
    value : GraphModule
        ``(t, y, *inputs) -> (f, *saved)``; t is 0-dim, y has ``shape``.
    product : GraphModule
        ``(w, t, y, *inputs, *saved) -> (w^T f_y, *parts)``.
    shape : tuple of int
        The user's, or ``(size,)`` for a tuple; of points (y, y') of a residual twice that.
    returned : tuple of int
        That of f: a state's, of one with ghost cells without these.
    captured : tuple of Tensor
        What f reads besides t and y, parameters among them.
    layouts : tuple
        Their shapes, strides and dtypes.
    transposed : tuple of int
        Which of them are wanted transposed too, see :meth:`inputs`.
    saved : int
        How many intermediate results of ``value`` the product needs.
    saved_bytes : int
        Their size.
    parameters : tuple of ParameterPart
        How the gradients with respect to the parameters follow from ``parts``.
    code : str
        Everything that the graphs depend on, as text.
    ends : int or None
        Which of ``captured`` are those of a :class:`Window`, if f reads the time in one.
    """

    value: torch.fx.GraphModule
    product: torch.fx.GraphModule
    shape: tuple[int, ...]
    returned: tuple[int, ...]
    captured: tuple[torch.Tensor, ...]
    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    transposed: tuple[int, ...]
    saved: int
    saved_bytes: int
    parameters: tuple[ParameterPart, ...]
    code: str
    ends: int | None = None
    #: Where ``captured`` were last, views of them without a graph, and which have other strides.
    _views: list[Any] = field(default_factory=list, init=False)

    def fits(self) -> bool:
        """Whether ``captured`` have the shapes and dtypes that they had (``net.double()``...).

        And their strides, where these let entries share memory: :meth:`inputs` cannot copy there.
        """
        return all(
            x.shape == shape and x.dtype is dtype and not is_pending(x)
            and (x.stride() == stride or _apart(shape, stride))
            for x, (shape, stride, dtype) in zip(self.captured, self.layouts, strict=True)
        )  # fmt: skip

    def within(self, window: Window | None) -> FieldGraph:
        """Return it for times within another window, as it was traced in one."""
        if self.ends is None or window is None or self.captured[self.ends] is window.ends:
            return self
        captured = (*self.captured[: self.ends], window.ends, *self.captured[self.ends + 1 :])
        return replace(self, captured=captured)

    def saved_examples(self) -> list[torch.Tensor]:
        """Return tensors as ``value`` saves them; f is not evaluated, which may fail somewhere."""
        output: _Node = self.value.graph.output_node()
        values = [node.meta["val"] for node in output.args[0][1:]]
        return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in values]

    def inputs(self) -> list[torch.Tensor]:
        """Return what the graphs take for ``inputs``, from the present values of ``captured``.

        Compiled graphs rely on strides, which ``parameter.data = other`` can change.
        """
        places = [(tensor.data_ptr(), tensor.stride()) for tensor in self.captured]
        if not self._views or self._views[0] != places:  # else these views keep that memory
            layouts = zip(places, self.layouts, strict=True)
            others = [i for i, ((_, now), (_, stride, _)) in enumerate(layouts) if now != stride]
            self._views[:] = places, tuple(tensor.detach() for tensor in self.captured), others
        _, views, others = self._views
        present = list(views)
        for index in others:
            shape, stride, dtype = self.layouts[index]
            other = torch.empty_strided(shape, stride, dtype=dtype)
            present[index] = other.copy_(present[index])
        return present + [present[index].t().contiguous() for index in self.transposed]


@dataclass(frozen=True)
class ParameterPart:
    """One parameter's share of the results of ``FieldGraph.product``.

    Attributes
    ----------
    index : int
        Which parameter.
    shape : tuple of int
        Its shape.
    first : int
        Position of its result, or of the first of its two factors.
    factors : bool
        Whether the result is given as factors (a, b) of the matrix product a^T b. Those of several
        evaluations are one product then: ``[a_1; a_2]^T [b_1; b_2] = a_1^T b_1 + a_2^T b_2``.
    transposed : bool
        Whether the gradient is the transpose of that product.
    """

    index: int
    shape: tuple[int, ...]
    first: int
    factors: bool = False
    transposed: bool = False

    def gradient(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the product with df/dp, from what the graph gives after that with df/dy."""
        gradient = results[self.first]
        if self.factors:
            gradient = gradient.t() @ results[self.first + 1]
        return gradient.t() if self.transposed else gradient


def _apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether each entry of a tensor has memory of its own, unlike those of ``expand``."""
    reach = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += (size - 1) * step
    return True


def trace_field(field: VectorField, arranged: bool = True) -> FieldGraph:
    """Trace a field and its vector-Jacobian product.

    ``arranged``: let :mod:`pnode.solvers.compiled.products` write matrix products in other forms.

    Raises
    ------
    Untraceable
        With the reason.
    """
    if any(parameter.is_complex() for parameter in field.parameters):
        raise Untraceable("a parameter is complex, for which torch's compiler writes no code")
    layout = field.problem.layout
    if layout.pairs:
        raise Untraceable("the state is complex, for which torch's compiler writes no code")
    returned = (layout.size,) if layout.is_tuple else tuple(layout.shapes[0])
    shape = (2, *returned) if isinstance(field, StackedResidual) else returned
    like = torch.empty(0, dtype=layout.dtype, device=layout.device)
    examples = [like.new_zeros(x) for x in ((), shape, field.problem.owned or returned)]
    try:
        graph = compose(partial(_products, field), examples)
        used = _tidy(graph)
        if any(packet(node) is _aten._local_scalar_dense for node in graph.graph.nodes):
            raise RuntimeError("item() became a symbol, of which no code is written")
    except Exception as error:
        raise Untraceable(_reason(error)) from error
    graph, captured = lifted(graph)
    transposed = arrange_products(graph, captured) if arranged else ()
    made, window = _split(graph, captured, transposed, used), field.problem.window
    ends = [i for i, x in enumerate(captured) if window is not None and x is window.ends]
    return replace(made, ends=ends[0]) if ends else made


def _products(
    field: VectorField, time: torch.Tensor, u: torch.Tensor, w: torch.Tensor
) -> list[torch.Tensor | None]:
    """Return f, w^T df/dy and w^T df/dp for each parameter, None for those that are not used."""
    window = field.problem.window
    time = time.detach() if window is None else window.recorded(time.detach())
    leaf, value = field.recorded(time, u)
    inputs = (leaf, *field.parameters)
    found: Sequence[torch.Tensor | None] = (None,) * len(inputs)
    if value.requires_grad:
        with torch.enable_grad(), field.shared.hooks_away():
            # Part of the graph may be the user's, of parameters made of others.
            found = torch.autograd.grad(value, inputs, w, retain_graph=True, allow_unused=True)
    state = torch.zeros_like(leaf) if found[0] is None else found[0]
    return [value.detach(), state, *found[1:]]


def lifted(graph: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
    """Return a graph that takes what it holds, and that; Untraceable if it has effects."""
    captured = lift_captured(graph)
    refuse_effects(graph)
    if any(is_mutation(node) for node in graph.graph.nodes):
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        examples = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in values
        ]
        graph = compose(torch.func.functionalize(graph), examples, _WITHOUT_COPIES)
        close_slices(graph)
        graph.graph.eliminate_dead_code()
    return graph, captured


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if "DataDependent" in name or "_local_scalar_dense" in text or "item()" in text:
        return (
            "the vector field's Python code depends on values of tensors (an if, float() or item() "
            "on t or y): use torch.where, and tensors instead of numbers"
        )
    return f"torch cannot trace the vector field ({name}: {text[:200]})"


def _tidy(graph: torch.fx.GraphModule) -> list[int]:
    """Drop results that are None; return the indices of the parameters that are left."""
    output: _Node = graph.graph.output_node()
    value, state, *products = output.args[0]
    used = [index for index, product in enumerate(products) if product is not None]
    output.args = ((value, state, *(products[index] for index in used)),)
    graph.graph.eliminate_dead_code()
    return used


def _size(node: _Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _split(
    graph: torch.fx.GraphModule,
    captured: tuple[torch.Tensor, ...],
    transposed: tuple[int, ...],
    used: list[int],
) -> FieldGraph:
    """Part the graph in what does not depend on the cotangent, and the rest.

    What the second half needs of the first is kept, or repeated if that is cheap: views, results
    that do not depend on the state, arithmetic on what is at hand.
    """
    nodes = list(graph.graph.nodes)
    t, y, w, *inputs = [node for node in nodes if node.op == "placeholder"]
    output: _Node = graph.graph.output_node()
    value, state, *products = output.args[0]
    late = dependent(nodes, w)
    early = [node for node in nodes if node.op == "call_function" and node not in late]
    saved = _saved(nodes, late, (t, y, *inputs), [x for x in (state, *products) if x not in late])
    first = _extract(nodes, (t, y, *inputs), (value, *saved), set(early))
    parts, factors = _factors(products, used)
    repeated = {*early, *late} - {w} - set(saved)
    second = _extract(nodes, (w, t, y, *inputs, *saved), (state, *parts), repeated)
    if any(map(is_pending, captured)):
        raise Untraceable("it reads a view with a pending minus or conjugate: see resolve_neg()")
    layouts = tuple((x.shape, x.stride(), x.dtype) for x in captured)
    shapes = [tuple(node.meta["val"].shape) for node in (y, w)]
    return FieldGraph(
        first, second, shapes[0], shapes[1], captured, layouts, transposed,
        len(saved), sum(_size(node) * node.meta["val"].element_size() for node in saved),
        tuple(factors), "\n".join((first.code, second.code, repr(layouts), repr(factors))),
    )  # fmt: skip


def dependent(nodes: list[_Node], on: _Node) -> set[_Node]:
    """Return a node, and all that depend on it."""
    found = {on}
    for node in nodes:
        if node.op == "call_function" and found & set(node.all_input_nodes):
            found.add(node)
    return found


def _saved(
    nodes: list[_Node], late: set[_Node], given: tuple[_Node, ...], wanted: list[_Node]
) -> list[_Node]:
    """Return what ``late`` and ``wanted`` need and is neither given nor cheap to repeat."""
    time, y, *_ = given
    moving, timed = dependent(nodes, y), dependent(nodes, time)
    at_hand: set[_Node] = set(given)

    def repeatable(node: _Node) -> bool:
        if node in at_hand:
            return True
        if node not in moving and (node not in timed or _size(node) <= 1):
            return True
        power = packet(node) is _aten.pow and isinstance(node.args[1], (int, float))
        cheap = power or is_view(node) or packet(node) in _CHEAP
        return cheap and all(map(repeatable, node.all_input_nodes))

    saved: list[_Node] = []

    def need(node: _Node) -> None:
        if repeatable(node):
            return
        if is_view(node):
            need(node.args[0])
        else:
            saved.append(node)
            at_hand.add(node)

    for node in nodes:
        if node in late:
            for source in node.all_input_nodes:
                if source not in late:
                    need(source)
    for node in wanted:
        need(node)
    return saved


def _factors(products: list[_Node], used: list[int]) -> tuple[list[_Node], list[ParameterPart]]:
    """Return the results that the product graph is to have, matrix products as their factors."""
    results: list[_Node] = []
    parts = []
    for index, product in zip(used, products, strict=True):
        node, transposed = product, False
        shape = tuple(product.meta["val"].shape)
        while packet(node) in (_aten.t, _aten.detach):
            transposed ^= packet(node) is _aten.t
            node = node.args[0]
        if packet(node) is _aten.mm and packet(node.args[0]) is _aten.t:
            parts.append(ParameterPart(index, shape, len(results), True, transposed))
            results.extend((node.args[0].args[0], node.args[1]))
        else:
            parts.append(ParameterPart(index, shape, len(results)))
            results.append(product)
    return results, parts


def _extract(
    nodes: list[_Node],
    inputs: tuple[_Node, ...],
    outputs: tuple[_Node, ...],
    inner: set[_Node],
) -> torch.fx.GraphModule:
    """Return the graph from inputs to outputs, made of the nodes that it needs out of ``inner``."""
    graph = torch.fx.Graph()
    copies = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"x{index}")
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if node in inner and node not in copies:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in outputs))
    graph.eliminate_dead_code()
    graph.lint()
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def compose(
    function: Any, examples: Sequence[torch.Tensor], decompositions: Any = None
) -> torch.fx.GraphModule:
    """Trace a function that calls graphs, at tensors of the given shapes and dtypes."""
    trace = make_fx(function, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
    with torch.no_grad():
        return trace(*examples)

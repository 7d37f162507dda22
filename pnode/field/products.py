"""Vector-Jacobian products by torch's autograd engine, their sums, and transposed linear maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import BackwardError
from pnode.base.graphs import nodes
from pnode.base.vectors import REAL

__all__ = [
    "accumulate",
    "along_rows",
    "batched",
    "derivatives",
    "directional_derivative",
    "directional_derivatives",
    "edges_work",
    "gradients",
    "joined_edges",
    "pull_back",
    "pull_back_rows",
    "refuse_single",
    "refused",
    "transposed",
]


# Entries of a value beyond which several products are faster one by one than in a batch.
_LARGE = 1 << 12
# Entries of which a copy in another precision stays in a core's cache.
_PIECE = 1 << 16


def gradients(
    value: torch.Tensor | Sequence[torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    cotangent: torch.Tensor | Sequence[torch.Tensor],
    record: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Return the VJPs of a cotangent of value's shape, None for unused inputs; keep the graph.

    ``record`` tells whether they have graphs themselves.
    """
    return torch.autograd.grad(
        value, inputs, cotangent, create_graph=record, retain_graph=True, allow_unused=True
    )


def _engine_gradients(
    value: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    cotangent: torch.Tensor,
    record: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Do as :func:`gradients`, without its checks, which cost a third of a small product."""
    return _engine((value,), (cotangent,), True, record, inputs, True, accumulate_grad=False)


def _engine_works() -> bool:
    """Whether torch's own way into its autograd engine, which is not public, is the known one."""
    try:
        with torch.enable_grad():
            x, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
            y = 2.0 * x
        for _ in range(2):  # the graph is kept
            first, other = _engine_gradients(y, (x, unused), torch.ones(2))
            if first is None or first.tolist() != [2.0, 2.0] or other is not None:
                return False
        return True
    except Exception:
        return False


_engine: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
pull_back: Any = _engine_gradients if _engine_works() else gradients


def _find_edges_work() -> bool:
    """Whether products can begin at the edge of a graph, without the value at its end."""
    try:
        with torch.enable_grad():
            x = torch.ones(2, requires_grad=True)
            edge = torch.autograd.graph.get_gradient_edge(2.0 * x)
        return bool(pull_back(edge, (x,), torch.ones(2))[0].tolist() == [2.0, 2.0])
    except Exception:
        return False


edges_work = _find_edges_work()


def joined_edges(end: Any) -> list[Any]:
    """Return where the graphs of the parts end that a value was joined of, None without a graph.

    ``end`` is the value, or the end of its graph; there are none where it was made otherwise.
    """
    node = end.grad_fn if isinstance(end, torch.Tensor) else end.node
    if node is None or node.name() != "CatBackward0":
        return []
    make = torch.autograd.graph.GradientEdge
    return [None if edge[0] is None else make(*edge) for edge in node.next_functions]


def pull_back_rows(
    end: Any, inputs: tuple[torch.Tensor, ...], cotangents: torch.Tensor, record: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """Return the VJPs of several cotangents, rows of a tensor, as rows; keep the graph.

    ``end`` is a value with its graph, or the end of that; ``record`` is as in :func:`gradients`.
    """
    if 1 < len(cotangents) and cotangents[0].numel() <= _LARGE:
        found = batched((end,), inputs, (cotangents,), record)
        if found is not None:
            return found
    rows = zip(*(pull_back(end, inputs, row, record) for row in cotangents), strict=True)
    return tuple(
        None if parts[0] is None else torch.stack(parts)  # all of them are None, or none is
        for parts in rows
    )


def batched(
    ends: Sequence[Any], inputs: tuple[torch.Tensor, ...], rows: Sequence[torch.Tensor],
    record: bool = False,
) -> tuple[torch.Tensor | None, ...] | None:  # fmt: skip
    """Return the VJPs of several values at once, or None if torch cannot batch them."""
    try:
        return torch.autograd.grad(
            ends, inputs, rows, retain_graph=True, create_graph=record, allow_unused=True,
            is_grads_batched=True,
        )  # fmt: skip
    except RuntimeError:  # no batching rule for an operation of this field
        return None


def along_rows(
    ends: tuple[torch.Tensor, ...], rows: Sequence[torch.Tensor], seed: torch.Tensor
) -> torch.Tensor | None:
    """Return the VJPs of several values with one input, for rows of cotangents; keep the graph.

    Shape ``(m, *seed)``, None being zero.
    """
    number = len(rows[0])
    if 1 < number and seed.numel() <= _LARGE:
        found = batched(ends, (seed,), rows)
        if found is not None:
            return found[0]
    single = [_backward(ends, tuple(row[k] for row in rows), seed) for k in range(number)]
    known = [row for row in single if row is not None]  # all of them, or none
    if not known:
        return None
    return known[0][None] if number == 1 else torch.stack(known)


def transposed(
    linear: Callable[[torch.Tensor], Any], *v: torch.Tensor, at: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply the transpose of a linear map to v; may be traced.

    The map takes a tensor like ``at``, or else like the first v, and returns one like each of them,
    in any precision: a tensor, or a tuple.
    """
    found, pull_back = torch.func.vjp(linear, torch.ones_like(v[0] if at is None else at))[:2]
    several = isinstance(found, tuple)
    like = [x.to(y.dtype) for x, y in zip(v, found if several else (found,), strict=True)]
    result: torch.Tensor = pull_back(tuple(like) if several else like[0])[0]
    return result


def directional_derivative(
    value: torch.Tensor, leaves: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]
) -> float:
    """Return the derivative of a scalar with respect to leaves of its graph, along directions."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return sum(
        float((gradient * direction).sum())
        for gradient, direction in zip(gradients, directions, strict=True)
        if gradient is not None
    )


# Of every backward() that is marked so.
_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def refuse_single(end: Any, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse a graph that can be differentiated once only, where products are to be: see above.

    torch takes what such a product depends on for nothing, and its derivatives would be zero.

    Raises
    ------
    BackwardError
        Naming the operation.
    """
    for node in nodes(end, inputs):
        made = getattr(type(node), "_forward_cls", None)
        if made is not None and getattr(made.backward, "__code__", None) is _ONCE:
            raise BackwardError(
                "tangents and second derivatives of a solve, and Rosenbrock methods, differentiate "
                f"the vector field's products again, and {made.__name__}.backward is marked "
                "once_differentiable: write it with operations of torch, without that mark"
            )


def derivatives(
    value: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    tangents: Sequence[Sequence[torch.Tensor | None]],
    record: bool,
) -> list[torch.Tensor]:
    """Return the derivatives of ``value`` along tangents of the leaves or nodes of its graph.

    The VJP w -> w^T J is linear in w, so its own VJP with v is J v, at any w; at zero that of
    ``logcumsumexp`` is NaN.

    Parameters
    ----------
    value : Tensor
        With its graph.
    inputs : sequence of Tensor
        What it is differentiated by; each requires grad.
    tangents : sequence of sequence of (Tensor or None)
        For each derivative, one per input, of its shape; None being zero.
    record : bool
        Whether the results are to have a graph.
    """
    if not value.requires_grad:
        return [torch.zeros_like(value) for _ in tangents]
    refuse_single(value, inputs)
    with torch.enable_grad():
        seed = torch.ones_like(value, requires_grad=True)
        products = torch.autograd.grad(value, inputs, seed, create_graph=True, allow_unused=True)
        found = []
        for number, one in enumerate(tangents, start=1):
            chosen = [
                (product, tangent.reshape(product.shape))
                for product, tangent in zip(products, one, strict=True)
                if product is not None and product.requires_grad and tangent is not None
            ]
            result = None
            if chosen:
                (result,) = torch.autograd.grad(
                    [product for product, _ in chosen], seed, [tangent for _, tangent in chosen],
                    create_graph=record, retain_graph=record or number < len(tangents),
                    allow_unused=True,
                )  # fmt: skip
            found.append(torch.zeros_like(value) if result is None else result)
    return found


def directional_derivatives(
    value: torch.Tensor, end: Any, inputs: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
) -> torch.Tensor | None:  # fmt: skip
    """Return the derivatives of ``value`` along several tangents; see above.

    Its graph is kept.

    Parameters
    ----------
    value : Tensor
        A value, or another tensor of its shape and dtype.
    end : Tensor or GradientEdge
        The value with its graph, or the end of that.
    inputs : sequence of Tensor
        What it is differentiated by; each requires grad.
    tangents : sequence of Tensor
        For each input its tangents, shape ``(m, *input)``.

    Returns
    -------
    Tensor or None
        Shape ``(m, *value)``; None if the graph has none of the inputs.
    """
    number = len(tangents[0])
    nothing = value.new_zeros(()).expand(number, *value.shape)
    if isinstance(end, torch.Tensor) and not end.requires_grad:
        return None
    refuse_single(end, inputs)
    with torch.enable_grad():
        seed = torch.ones_like(value, requires_grad=True)
        products = pull_back(end, tuple(inputs), seed, True)
    chosen = [
        (product, rows.reshape(number, *product.shape))
        for product, rows in zip(products, tangents, strict=True)
        if product is not None and product.requires_grad
    ]
    if not chosen:
        return None
    found = along_rows(tuple(end for end, _ in chosen), [rows for _, rows in chosen], seed)
    return nothing if found is None else found


def _backward(ends: Any, cotangents: Any, seed: torch.Tensor) -> torch.Tensor | None:
    """Return the VJP of several values with one input; keep the graph."""
    if pull_back is _engine_gradients:
        found = _engine(ends, cotangents, True, False, (seed,), True, accumulate_grad=False)
    else:
        found = torch.autograd.grad(ends, seed, cotangents, retain_graph=True, allow_unused=True)
    one: torch.Tensor | None = found[0]
    return one


def accumulate(sums: list[torch.Tensor | None], terms: Sequence[torch.Tensor | None]) -> None:
    """Add ``terms`` (any precision) to ``sums`` (PETSc's), None being zero.

    Those of complex parameters are complex: torch's convention dL/d Re p + i dL/d Im p is linear
    over the reals, and so are the sums.
    """
    totals, addends = [], []
    for index, term in enumerate(terms):
        if term is None:
            continue
        total = sums[index]
        if total is None:
            sums[index] = term.to(_of_sums(term.dtype), copy=True)
        elif term.dtype is total.dtype:
            totals.append(total)
            addends.append(term)
        else:
            for part, addend in _parts(total, term):
                totals.append(part)
                addends.append(addend)
    if totals:
        torch._foreach_add_(totals, addends)


@lru_cache(maxsize=16)
def _of_sums(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of sums of such terms."""
    return torch.promote_types(dtype, REAL)


def _parts(total: torch.Tensor, term: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return a sum and what is to be added in other precision: in pieces, or all is converted."""
    large = term.numel() > _PIECE and term.device == HOST.device
    if not large or not (total.is_contiguous() and term.is_contiguous()):
        return ((total, term),)
    return zip(total.view(-1).split(_PIECE), term.view(-1).split(_PIECE), strict=True)


def refused(given: torch.Tensor, like: torch.Tensor, text: str) -> torch.Tensor:
    """Return zeros whose derivatives by a tensor raise BackwardError."""
    result: torch.Tensor = _Refused.apply(given, like, text)
    return result


class _Refused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(given: torch.Tensor, like: torch.Tensor, text: str) -> torch.Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.text = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        raise BackwardError(ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        raise BackwardError(ctx.text)

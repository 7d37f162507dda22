"""What is looked at when f is called: its result, and, the first time, what it uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from types import CellType, FunctionType
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from pnode.base.devices import random_states, set_random_states
from pnode.base.errors import ConfigurationError, FieldChanged, VectorFieldError
from pnode.base.evidence import LET_NOTHING_CHANGE
from pnode.base.surroundings import modules_within, owner
from pnode.base.transforms import is_wrapped
from pnode.field.watching import Numbers
from pnode.problems.problem import StateLayout

__all__ = [
    "changed", "find_parameters", "first_call", "hidden_state", "hides_time",
    "refuse_hidden_state", "refuse_unrecorded", "undisturbed", "wrong_result", "wrote_into_input",
]  # fmt: skip

# Of functions in functions; of a buffer.
_MOST_LEVELS, _MOST_ENTRIES = 3, 1 << 16
_HiddenState = tuple[list[torch.Tensor], list[int]]
_Edge = tuple[Any, int]  # a node of a graph, and which of its results


def _kind_of_leaves() -> type:
    """Return the class of the nodes where graphs begin."""
    with torch.enable_grad(), torch.inference_mode(False):
        node: Any = torch.ones(1, device="cpu", requires_grad=True).neg().grad_fn
    return type(node.next_functions[0][0])


_LEAF: Any = _kind_of_leaves()


def wrong_result(
    layout: StateLayout, parts: tuple[Any, ...], owned: torch.Size | None = None
) -> str | None:
    """Say what is wrong with what f returned, None if nothing is; see InitialValueProblem.owned."""
    if len(parts) != len(layout.shapes):
        return f"returned {len(parts)} tensors for a state of {len(layout.shapes)}"
    shapes = layout.shapes if owned is None else (owned,)
    for index, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        where = f" (part {index})" if layout.is_tuple else ""
        if not isinstance(part, torch.Tensor):
            return (
                f"returned a {type(part).__name__}{where}, not a tensor: return one of shape "
                f"{tuple(shape)}, with torch.stack([...]) of entries"
            )
        if part.layout is not torch.strided:
            return f"returned a tensor of layout {part.layout}{where}; use to_dense()"
        if part.shape != shape:
            found = f"returned shape {tuple(part.shape)}{where} for a state of {tuple(shape)}"
            return found if part.shape else f"{found}; it is called as f(t, y)"
        if part.dtype is not layout.dtype:
            return (
                f"returned {part.dtype}{where} for a state of {layout.dtype}; give the module "
                "and the state the same precision (module.double() or y0.float()), or within "
                "autocast let f return result.to(y.dtype)"
            )
        if part.device != layout.device:
            return f"returned a tensor on {part.device}{where} for a state on {layout.device}"
    return None


def wrote_into_input(who: str, time: float, or_what: str = "") -> VectorFieldError:
    """Return the error for an f that writes into what it was given."""
    return VectorFieldError(
        f"{who} wrote into its input y{or_what}; compute on y.clone(), or without "
        "in-place operations",
        time=time,
    )


def changed(who: str, time: float, what: str, by: float, suspects: str) -> FieldChanged:
    """Return the error for an f that is not the one of the forward sweep."""
    return FieldChanged(
        f"{who} is not the one of the forward sweep: {what} differs by {by:.1e} of its "
        f"norm{suspects}. {LET_NOTHING_CHANGE}; if nothing has, round-off grows in repeated steps: "
        "checkpointing=pnode.Checkpointing(memory=...) with more repeats fewer, and "
        "reproducible=True gives those of FSAL and DIRK methods the same bits",
        time=time,
    )


def hides_time(
    field: Any, s: float, graph: Any, span: float, evaluate: Callable[[float], torch.Tensor]
) -> bool:
    """Whether a field depends on t and torch does not record it.

    By one evaluation at a later time, which does not count, unless the graph has t.

    Parameters
    ----------
    field : VectorField
        Of one process, without ghost cells.
    s : float
        When, the integrator's time.
    graph : Linearization
        Then, with t a leaf of it.
    span : float
        Of the solve.
    evaluate : callable
        Returns the value at another time.
    """
    if graph.records_time():
        return False
    double = field.dtype is torch.float64
    resolution = torch.finfo(field.dtype).eps * max(abs(s), span if math.isfinite(span) else 0.0)
    # So small that what is constant in pieces seldom jumps, and no zero of df/dt is mistaken.
    small = (1e-4 if double else 1e-2) * (span if math.isfinite(span) else 1.0)
    evaluations = field.ledger.rhs
    try:
        with undisturbed(field.function, field.problem.compute or field.problem.layout.device):
            value = evaluate(s + max(small, 64.0 * resolution))
    except Exception:  # it is not defined there, which is nothing to complain of
        return False
    finally:
        field.ledger.rhs = evaluations  # nobody makes use of it
    before = graph.flat_value()
    return bool((value.isfinite() & before.isfinite() & (value != before)).any())


def hidden_state(function: Any, device: torch.device) -> _HiddenState:
    """Return torch's random states and the versions of a Module's floating-point buffers."""
    versions = [
        buffer._version
        for module in modules_within([function])
        for buffer in module._buffers.values()
        if buffer is not None and buffer.is_floating_point()
    ]
    return random_states(device), versions


def _modules_of(item: Any, levels: int) -> list[torch.nn.Module]:
    """Return the Modules that a function is, belongs to, encloses, holds or names."""
    item = owner(item)
    if isinstance(item, torch.nn.Module):
        return [item]
    parts: list[Any] = []
    if isinstance(item, FunctionType):
        cells = [cell for cell in item.__closure__ or () if cell != CellType()]
        parts += [cell.cell_contents for cell in cells]
        parts += [item.__globals__.get(name) for name in item.__code__.co_names]
    elif isinstance(item, partial):
        parts += [item.func, *item.args, *item.keywords.values()]
    elif not isinstance(item, type):
        parts += getattr(item, "__dict__", {}).values()
    inner = (part for part in parts if callable(part)) if levels else ()
    return [module for part in inner for module in _modules_of(part, levels - 1)]


def _is_small(buffer: torch.Tensor) -> bool:
    """Whether a buffer has values of its own, and few."""
    if is_lazy(buffer) or is_wrapped(buffer) or buffer.is_nested or buffer.is_meta:
        return False
    return buffer.numel() <= _MOST_ENTRIES


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether values are; versions do not tell of what normalization over a batch writes."""
    if one.layout is not torch.strided:
        return all(map(_same, _stored(one), _stored(other)))
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    compressed = tensor.layout is not torch.sparse_coo
    return [tensor.values()] if compressed else [tensor._indices(), tensor._values()]


@contextmanager
def undisturbed(function: Any, device: torch.device) -> Iterator[None]:
    """Undo what evaluations of f that only look at it write into buffers, and draw at random.

    Large buffers are not looked at: to copy them takes longer than f, which mostly reads them.
    """
    states = random_states(device)
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modules_within(_modules_of(function, _MOST_LEVELS))
        for name, buffer in module._buffers.items()
        if buffer is not None and _is_small(buffer)
    ]
    try:
        yield
    finally:
        for place, name, buffer, before in kept:
            if not _same(buffer, before):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)
            if place[name] is not buffer:
                place[name] = buffer
        if not all(map(torch.equal, states, random_states(device))):
            set_random_states(states, device)


@contextmanager
def first_call(field: Any, time: float, first: bool = True) -> Iterator[None]:
    """Refuse a first call of f that uses hidden state; tell of derivatives that it loses."""
    if not first:
        yield
        return
    device = field.problem.compute or field.problem.layout.device
    before = hidden_state(field.function, device)
    with Numbers() if field.recording else nullcontext() as numbers:
        yield
    refuse_hidden_state(field.who, before, hidden_state(field.function, device), time)
    if numbers is not None and numbers.name:
        warnings.warn(
            f"{field.who} takes {numbers.name} that requires grad (t = {time!r}): no derivative "
            "goes through the number. Compute with the tensor, or with .detach() if that is meant",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip


def refuse_hidden_state(who: str, before: _HiddenState, now: _HiddenState, time: float) -> None:
    """Refuse a field that is not a function of t and y: its adjoint would be another's.

    Raises
    ------
    VectorFieldError
        If f drew random numbers or wrote into a buffer.
    """
    if not all(map(torch.equal, before[0], now[0])):
        raise VectorFieldError(
            f"{who} draws random numbers (dropout in training mode?), so that its "
            "value cannot be had again for the gradient: call .eval() on it, or draw them "
            "once before the solve",
            time=time,
        )
    if before[1] != now[1]:
        raise VectorFieldError(
            f"{who} writes into one of its buffers, so that its value cannot be had "
            "again for the gradient: call .eval() on it, or keep what it counts outside",
            time=time,
        )


def _unrecorded(field: Any, leaf: torch.Tensor, value: torch.Tensor) -> list[tuple[str, slice]]:
    """Return whose entries no graph joins with y, and which of the last dimension they are."""
    layout, integrals = field.problem.layout, field.problem.integrals
    stops = _outer_edges(field.parameters)

    def reaches_leaf(edge: _Edge) -> bool:
        ends = _ends(edge, stops)
        return any(end not in stops and end[0].variable is leaf for end in ends)

    if field.returned is None:
        sizes = [shape.numel() for shape in layout.shapes]
    elif integrals:
        sizes = [value.shape[-1] - integrals, integrals]
    else:
        return [] if reaches_leaf(_edge(value)) else [(field.who, slice(None))]
    edges: Any = ((None, 0),) * len(sizes)
    if value.requires_grad:
        node = value.grad_fn  # that of torch.cat, unless the value has come from another device
        while node is not None and len(node.next_functions) == 1 < len(sizes):
            node = node.next_functions[0][0]
        edges = () if node is None else node.next_functions
    if len(edges) != len(sizes):
        return []
    several = len(sizes) - (integrals > 0) > 1
    names = [f"the vector field{f' (part {i})' * several}" for i in range(len(sizes))]
    if integrals:
        names[-1] = "cost"
    found = zip(names, edges, sizes, accumulate(sizes), strict=True)
    lost = [
        (who, slice(end - size, end)) for who, edge, size, end in found if not reaches_leaf(edge)
    ]
    # The implicit part of a split right-hand side does not drive the integrals.
    return [one for one in lost if one[0] != "cost" or field.explicit is None]


def refuse_unrecorded(
    field: Any, call: Callable[[torch.Tensor], torch.Tensor], leaf: torch.Tensor,
    value: torch.Tensor, time: float,
) -> None:  # fmt: skip
    """Refuse a part of a value that depends on y and has no graph of it: derivatives would be zero.

    It has to differ on both sides of y, so that a field that switches at y may pass.

    Parameters
    ----------
    field : VectorField
        Whose value it is.
    call : callable
        f at this time.
    leaf, value : Tensor
        y, and what f returned there.
    time : float
        The user's.

    Raises
    ------
    VectorFieldError
        If it does.
    """
    lost = _unrecorded(field, leaf, value)
    for sign in (1.0, -1.0):
        if not lost:
            return
        with torch.no_grad():
            near = leaf + sign * 1e-6 * (1.0 + leaf.abs())
        try:
            other = call(near.requires_grad_(True))
        except Exception:  # outside of where f is defined: nothing is known
            return
        lost = [one for one in lost if not torch.equal(_entries(other, one), _entries(value, one))]
    if lost:
        raise VectorFieldError(
            f"the value of {lost[0][0]} depends on y and torch has not recorded how (numpy, "
            ".detach(), .item(), autograd.grad without create_graph=True?), so that every "
            "derivative by y would be zero: compute it with torch operations, or solve under "
            "torch.no_grad()",
            time=time,
        )


def _entries(value: torch.Tensor, part: tuple[str, slice]) -> torch.Tensor:
    return value.detach()[..., part[1]] if value.dim() else value.detach()


def find_parameters(
    who: str,
    result: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    used: list[bool],
    states: Sequence[torch.Tensor],
) -> None:
    """Walk the graph of the first evaluation: every trainable leaf must be declared.

    Parameters
    ----------
    who : str
        Whose result it is.
    result : Tensor
        What f returned.
    parameters : sequence of Tensor
        Those declared.
    used : list of bool
        Is set to True for each that is found.
    states : sequence of Tensor
        Leaves that are f's arguments.

    Raises
    ------
    ConfigurationError
        If there is another leaf.
    """
    leaves = {id(tensor): index for index, tensor in enumerate(parameters)}
    edges, arguments = _outer_edges(parameters), {id(state) for state in states}
    for edge in _ends(_edge(result), edges):
        if edge in edges:
            used[edges[edge]] = True
            continue
        leaf = edge[0].variable
        if id(leaf) in arguments:
            continue
        if id(leaf) not in leaves:
            raise ConfigurationError(
                f"{who} uses a tensor of shape {tuple(leaf.shape)} that "
                "requires grad and was not declared: pass it in params=[...], make "
                f"{who} a torch.nn.Module that owns it, or detach it"
            )
        used[leaves[id(leaf)]] = True


def _edge(tensor: torch.Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def _outer_edges(parameters: Sequence[torch.Tensor]) -> dict[_Edge, int]:
    """Return where graphs of parameters end that are made of others, and whose they are."""
    return {_edge(p): index for index, p in enumerate(parameters) if p.grad_fn is not None}


def _ends(edge: _Edge, stops: Container[_Edge]) -> Iterator[_Edge]:
    """Yield the edges at which a graph begins: its leaves, and those of ``stops``."""
    pending, seen = [edge], set()
    while pending:
        edge = pending.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in stops or type(edge[0]) is _LEAF:
            yield edge
        else:
            pending.extend(edge[0].next_functions)

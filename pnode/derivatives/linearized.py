"""``torch.func.linearize`` of a solve: its tangents as one operation of the graph that is traced.

torch traces the operations on tangents, with the primal numbers as constants. A solve is taken once
then, outside of the trace; in the graph there is one operation, linear in the tangents of y0 and of
the parameters, which goes through the stages of that solve whenever it is called.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pnode.base.errors import ConfigurationError
from pnode.base.transforms import (
    has_tangent,
    is_wrapped,
    lowered,
    outside,
    outside_compiler,
    stacked,
)
from pnode.derivatives.autograd import AdjointFunction, SolveFunction
from pnode.derivatives.batches import AdjointsFunction, Runs, Times, takes_batches
from pnode.derivatives.stages import StageSweep
from pnode.derivatives.tangent_solves import tangent
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Run

__all__ = ["linearized"]

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def linearized(function: Callable[..., Any]) -> Any:
    """Decorate ``forward`` of a Solver: torch.func.linearize traces its tangents.

    torch.compile calls it as it is.
    """

    @outside_compiler
    @functools.wraps(function)
    def forward(
        self: Any, y0: Any, t: Any, args: Any = None, breakpoints: Any = None, at: str = "times"
    ) -> Any:
        mode = torch._C._get_dispatch_mode(_PROXY)
        if mode is None:
            return function(self, y0, t, args, breakpoints, at)
        given = (*tree_leaves((y0, t, args)), *self.parameters(), *(self._params or ()))
        if not any(map(_moves, given)) or _is_traced(mode.tracer, given):
            return function(self, y0, t, args, breakpoints, at)  # which refuses it
        _refuse(self, y0, t, args, breakpoints, at)
        return _linearized(function, self, y0, t, args)

    return forward


def _moves(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and has_tangent(value)


def _is_traced(tracer: Any, tensors: Sequence[Any]) -> bool:
    """Whether the numbers of some tensors depend on an input of the trace."""
    known, waiting = set(), []
    for tensor in tensors:
        found = tracer.tensor_tracker.get(tensor) if isinstance(tensor, torch.Tensor) else None
        waiting += [] if found is None else [found.proxy.node]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in known:
            known.add(node)
            waiting += node.all_input_nodes
    return False


def _refuse(solver: Any, y0: Any, t: Any, args: Any, breakpoints: Any, at: str) -> None:
    """Refuse what would need tangents of other things."""
    reasons = {
        "event_fn is given: an event moves with what is differentiated": solver.event_fn,
        'samples="independent" is given': solver._requests.independent is not None,
        'gradient="continuous" is given': solver._requests.continuous,
        "breakpoints= are given": breakpoints is not None,
        "at='steps' is given": at == "steps",
        "t has a tangent": any(map(_moves, tree_leaves(t))),
        "args= has a tangent": any(map(_moves, tree_leaves(args))),
        "a tensor in params= has a tangent": any(map(_moves, solver._params or ())),
        "y0 is complex": any(
            isinstance(each, torch.Tensor) and each.is_complex() for each in tree_leaves(y0)
        ),
    }
    for reason in (reason for reason, given in reasons.items() if given):
        raise ConfigurationError(
            f"torch.func.linearize cannot pass through this solve: {reason}. Take torch.func.jvp"
        )


@dataclass(frozen=True, eq=False)
class _Solved:
    """A solve whose tangents are wanted.

    Attributes
    ----------
    sweep : StageSweep
        Knows the solve, and whether what it depends on has been written into.
    t : Tensor
        Its output times.
    places : tuple of (int, Size)
        Where each tangent of a part of y0 begins in it, and its shape.
    parameters : tuple of int
        Which parameter each of the other tangents is one of.
    keys : tuple
        torch's dispatch keys that were included and excluded: an operation of its own is called
        without autograd, which f's derivatives need.
    """

    sweep: StageSweep
    t: torch.Tensor
    places: tuple[tuple[int, torch.Size], ...]
    parameters: tuple[int, ...]
    keys: tuple[Any, Any]

    def tangents(self, rows: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return the tangents of the outputs, shape ``(m, T, size)``, for each of m rows."""
        engine, run, y0 = self._unwritten()
        own = run.problem.parameters
        starts = y0.new_zeros(len(rows), len(y0))
        directions: list[list[torch.Tensor | None]] = [[None] * len(own) for _ in rows]
        for k, row in enumerate(rows):
            for (first, shape), one in zip(self.places, row, strict=False):
                starts[k, first : first + shape.numel()] = one.reshape(-1)
            for index, one in zip(self.parameters, row[len(self.places) :], strict=True):
                directions[k][index] = one
        with torch._C._ForceDispatchKeyGuard(*self.keys), torch.no_grad():
            pair, _, xs, _ = tangent(
                SolveFunction, engine, run, y0, self.t, own, starts, directions, reverse=False
            )
        return torch.stack(pair.parts(xs)[1:])

    def transposed(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the transpose of :meth:`tangents` for each of k cotangents, ``(k, T, size)``."""
        engine, run, y0 = self._unwritten()
        own, runs = run.problem.parameters, Runs([run])
        if takes_batches(runs):
            state, _, *gradients = AdjointsFunction.forward(
                AdjointFunction, engine, runs, y0, self.t, rows, *own
            )
        else:
            found = [
                AdjointFunction.forward(engine, runs, False, Times(), y0, self.t, row, *own)
                for row in rows
            ]
            state, _, *gradients = map(stacked, zip(*found, strict=True))
        assert state is not None
        parts = [
            state[:, first : first + shape.numel()].reshape(len(rows), *shape)
            for first, shape in self.places
        ]
        for index in self.parameters:
            one = gradients[index]
            parts.append(own[index].new_zeros(len(rows), *own[index].shape) if one is None else one)
        return parts

    def _unwritten(self) -> tuple[Engine, Run, torch.Tensor]:
        self.sweep.refuse_written("linearize anew")
        return self.sweep.solved()


_solved: dict[int, _Solved] = {}
_numbers = itertools.count()
_tracing = False


def _linearized(function: Callable[..., Any], solver: Any, y0: Any, t: Any, args: Any) -> Any:
    """Solve outside of the trace, and give the result tangents that are in it."""
    leaves, structure = tree_flatten(y0)
    tangents = [forward_ad.unpack_dual(leaf).tangent for leaf in leaves]
    with _disable_current_modes(), _without_tangents(solver) as moved, torch.enable_grad():
        plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        solution = function(solver, tree_unflatten(plain, structure), t, args)
        sweep = solution.stage_sweep
        run = sweep.solved()[1]
    numbers = [leaf.numel() for leaf in leaves]
    starts = itertools.accumulate(numbers, initial=0)
    places = [(first, leaf.shape, one)
              for first, leaf, one in zip(starts, leaves, tangents, strict=False)
              if one is not None]  # fmt: skip
    known = {id(one): index for index, one in enumerate(run.problem.parameters)}
    moving = [(known[id(new)], old) for new, old in moved if id(new) in known]
    own = _Solved(
        sweep, torch.as_tensor(t).detach().clone(), tuple(place[:2] for place in places),
        tuple(index for index, _ in moving), keys,
    )  # fmt: skip
    with _disable_current_modes():
        ticket = torch.tensor(next(_numbers))
        _solved[int(ticket)] = own
        weakref.finalize(ticket, _solved.pop, int(ticket), None)
    along = [place[2] for place in places]
    along += [forward_ad.unpack_dual(old).tangent for _, old in moving]
    global _tracing
    _tracing = True
    try:
        Z = _operation()[0](ticket, along)
    finally:
        _tracing = False
    return _moved(solution, Z)


@contextmanager
def _without_tangents(
    solver: torch.nn.Module,
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Give the modules parameters without tangents; yields them with what they stand for."""
    found: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
    new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in solver.modules():
        slots: dict[str, Any] = module._parameters
        for name, old in slots.items():
            if old is not None and _moves(old):
                one = new.setdefault(id(old), (old.detach().requires_grad_(), old))[0]
                found.append((slots, name, old, one))
    for place, name, _, one in found:
        place[name] = one
    try:
        yield list(new.values())
    finally:
        for place, name, old, _ in found:
            place[name] = old


def _moved(solution: Any, Z: torch.Tensor) -> Any:
    """Return a solution whose outputs have tangents, rows of Z."""
    leaves, structure = tree_flatten(solution.ys)
    leaves += [] if solution.costs is None else [solution.costs]
    duals, first = [], 0
    for leaf in leaves:
        number = leaf[0].numel()
        part = Z.narrow(1, first, number).reshape(leaf.shape)
        duals.append(forward_ad.make_dual(leaf.detach(), part))
        first += number
    if solution.costs is not None:
        solution.costs = duals.pop()
    solution.ys = tree_unflatten(duals, structure)
    solution.stage_sweep = solution.path = None
    return solution


def _of(ticket: torch.Tensor) -> _Solved:
    found = _solved.get(int(lowered(ticket)))
    if found is None:
        raise ConfigurationError(
            "this function of torch.func.linearize is a copy, and the solve in it is not: call "
            "the original"
        )
    return found


def _in_batch(number: int, in_dims: Sequence[int | None], given: Sequence[Any]) -> list[Any]:
    """Return tensors with their batch first."""
    return [
        one.expand(number, *one.shape) if dim is None else one.movedim(dim, 0)
        for one, dim in zip(given, in_dims, strict=True)
    ]


class _Tangent(torch.autograd.Function):
    """(ticket, *tangents) -> tangents of the outputs: linear, and the transpose of _Transpose."""

    @staticmethod
    def forward(ticket: torch.Tensor, *tangents: torch.Tensor) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            found: torch.Tensor = _operation()[0](ticket, list(tangents))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ticket, *ctx.tangents = inputs

    @staticmethod
    def vmap(info: Any, in_dims: Any, ticket: torch.Tensor, *tangents: torch.Tensor) -> Any:
        columns = _in_batch(info.batch_size, in_dims[1:], tangents)
        rows = list(zip(*columns, strict=True))
        if any(map(is_wrapped, columns)):
            return torch.stack([_Tangent.apply(ticket, *row) for row in rows]), 0
        with outside():
            return _of(ticket).tangents(rows), 0

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return None, *_Transpose.apply(ctx.ticket, cotangent)

    @staticmethod
    def jvp(ctx: Any, _: Any, *along: torch.Tensor | None) -> Any:
        return _Tangent.apply(ctx.ticket, *map(_or_zero, along, ctx.tangents))


class _Transpose(torch.autograd.Function):
    """(ticket, cotangent of the outputs) -> those of y0's parts and of parameters."""

    @staticmethod
    def forward(ticket: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one[0] for one in _of(ticket).transposed(cotangent[None].contiguous()))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ticket, ctx.cotangent = inputs

    @staticmethod
    def vmap(info: Any, in_dims: Any, ticket: torch.Tensor, cotangent: torch.Tensor) -> Any:
        (rows,) = _in_batch(info.batch_size, in_dims[1:], (cotangent,))
        if is_wrapped(rows):
            each = [_Transpose.apply(ticket, row) for row in rows]
            found = [torch.stack(one) for one in zip(*each, strict=True)]
        else:
            with outside():
                found = _of(ticket).transposed(rows.contiguous())
        return tuple(found), (0,) * len(found)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        return None, _Tangent.apply(ctx.ticket, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: Any, along: torch.Tensor | None) -> Any:
        return _Transpose.apply(ctx.ticket, _or_zero(along, ctx.cotangent))


def _or_zero(along: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if along is None else along


def _below(ticket: torch.Tensor, tangents: list[torch.Tensor]) -> torch.Tensor:
    """Return tangents of the outputs, below autograd and transforms."""
    own = _of(ticket)
    if _tracing:  # with numbers that mean nothing
        _, run, y0 = own.sweep.solved()
        return y0.new_zeros(len(run.problem.times), len(y0))
    return own.tangents([tangents])[0]


@functools.lru_cache(maxsize=1)
def _operation() -> tuple[Any, torch.library.Library]:
    """Return pnode::tangent(ticket, tangents) -> tangents of the outputs, and what keeps it."""
    library = torch.library.Library("pnode", "FRAGMENT")
    library.define("tangent(Tensor ticket, Tensor[] tangents) -> Tensor")
    library.impl("tangent", _below, "CompositeExplicitAutograd")
    for key in ("Autograd", "FuncTorchDynamicLayerFrontMode"):
        library.impl("tangent", lambda ticket, rows: _Tangent.apply(ticket, *rows), key)
    return torch.ops.pnode.tangent.default, library

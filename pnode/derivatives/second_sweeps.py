"""Backward sweeps of pairs that wait for what else comes to their solve in a pass over the graph.

The derivative of a solve's backward sweep is the adjoint of the pair of the state and a tangent.
The cotangents of the sweep may depend on the solve's outputs, so that these get cotangents in the
same pass, and the solve's own backward sweep would be next: it is part of the pair's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pnode.base.transforms import in_forward_mode, is_legacy_batch, moves, transforms_active
from pnode.derivatives.batches import Runs, Times
from pnode.derivatives.tangent_solves import after_first, tangent
from pnode.derivatives.tangents import unique
from pnode.layout.pair_layout import PairLayout
from pnode.sweeping.engine import Engine

__all__ = ["SecondSweep", "due", "may_wait", "solved_for", "taken_with", "wait"]


def _task() -> int:
    """Return the number of the pass over the graph that is under way."""
    return int(torch._C._current_graph_task_id())


@dataclass(frozen=True, eq=False)
class SecondSweep:
    """The adjoint of a pair that was solved for the derivative of a backward sweep.

    Attributes
    ----------
    engine : Engine
        What solved.
    pair : PairLayout
        How a state and its tangent make one.
    runs : object
        The pair's solve.
    x0, t, cotangents : Tensor
        Where the pair starts, its output times, and the cotangents of the tangent.
    parameters : tuple of Tensor
        Of the pair, those of the state first.
    task : int
        In which pass over the graph.
    """

    engine: Engine
    pair: PairLayout
    runs: Any
    x0: torch.Tensor
    t: torch.Tensor
    cotangents: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    task: int = field(default_factory=_task)

    def take(
        self, adjoint: Callable[..., Any], wants_times: bool, times: dict[int, float],
        more: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:  # fmt: skip
        """Take the sweep.

        Parameters
        ----------
        adjoint : callable
            ``forward`` of ``AdjointFunction``, or its ``apply``.
        wants_times, times : bool, dict
            As there.
        more : Tensor or None
            Cotangents of the state's outputs, shape ``(T, size)``.

        Returns
        -------
        seeds, state, initial : Tensor
            Cotangents of the pair's outputs, and what the adjoint returns.
        gradients : list of (Tensor or None)
            By the pair's parameters.
        """
        own = torch.zeros_like(self.cotangents) if more is None else more
        # The tangent's start is constant.
        seeds = self.pair.join([own, after_first(self.cotangents)])
        state, initial, *gradients = adjoint(
            self.engine, self.runs, wants_times, times, self.x0, self.t, seeds, *self.parameters
        )
        return seeds, state, initial, gradients


def wait(waiting: list[SecondSweep], sweep: SecondSweep) -> None:
    """Put a sweep among those that wait; others are of a pass that has ended in an error."""
    waiting[:] = [other for other in waiting if other.task == sweep.task]
    waiting.append(sweep)


def due(waiting: list[SecondSweep]) -> list[SecondSweep]:
    """Return the sweeps that have waited in this pass; none waits any more."""
    if not waiting:
        return []
    now = _task()
    found = [sweep for sweep in waiting if sweep.task == now]
    waiting.clear()
    return found


def may_wait(runs: Runs, wants_times: bool) -> bool:
    """Whether second derivatives of a solve may be taken in its own backward pass."""
    if wants_times or transforms_active() or in_forward_mode() or len(runs.all()) != 1:
        return False
    return not runs[0].roots


def solved_for(
    node: Any, ctx: Any, outputs: Sequence[torch.Tensor | None], reverse: bool
) -> tuple[SecondSweep, torch.Tensor, torch.Tensor]:
    """Solve for the tangent of a solve along the cotangents of its backward sweep's results.

    Parameters
    ----------
    node : type
        The solve as a node of torch's graphs: ``SolveFunction``.
    ctx, outputs : object, sequence of (Tensor or None)
        Context of ``AdjointFunction``, and what its ``backward`` gets.
    reverse : bool
        Whether the adjoint is to be taken.

    Returns
    -------
    sweep : SecondSweep
        Its adjoint.
    xs, along : Tensor
        The pair at the outputs, and the derivatives by the sweep's cotangents.
    """
    state, initial, *directions = outputs
    y0, t, cotangents, *parameters = ctx.saved_tensors
    start = torch.zeros_like(y0)
    for part in (state, initial):
        start = start if part is None else start + part
    pair, x0, xs, runs = tangent(
        node, ctx.engine, ctx.runs.only(), y0, t, parameters, start[None], [directions],
        reverse=reverse,
    )  # fmt: skip
    of_both = (*parameters, *filter(moves, unique(directions)))
    sweep = SecondSweep(ctx.engine, pair, runs, x0, t, cotangents, of_both)
    # The first output's adds to lambda, but not to ``initial``.
    first = torch.zeros_like(y0) if state is None else state
    return sweep, xs, torch.cat([first.reshape(1, -1), pair.parts(xs)[1][1:]])


def taken_with(
    waiting: Sequence[SecondSweep], ctx: Any, cotangents: torch.Tensor | None,
    backward: Callable[..., Any], adjoint: Callable[..., Any],
) -> tuple[Any, ...]:  # fmt: skip
    """Take the backward sweep of a solve with those of second derivatives that wait for it.

    Parameters
    ----------
    waiting : sequence of SecondSweep
        These.
    ctx, cotangents : object, Tensor or None
        Context of ``SolveFunction``, and what its ``backward`` gets.
    backward, adjoint : callable
        That ``backward``, without context, and ``forward`` of ``AdjointFunction``.
    """
    found: list[torch.Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
    number = len(found) - 3
    if cotangents is not None and is_legacy_batch(cotangents):
        found = list(backward(cotangents)[4:])
        cotangents = None
    more = None if cotangents is None else cotangents.reshape(ctx.shape[0], -1)
    if more is not None and more.any():
        ctx.saved_tensors  # noqa: B018  torch's check that nobody has written into them
    for sweep in waiting:
        _, both, _, gradients = sweep.take(adjoint, False, Times(), more)
        terms = [sweep.pair.parts(both)[0], None, None, *gradients[:number]]
        found = [a if b is None else b if a is None else a + b
                 for a, b in zip(found, terms, strict=True)]  # fmt: skip
        more = None
    wanted = zip(found, ctx.needs_input_grad[4:], strict=True)
    return None, None, None, None, *(one if wants else None for one, wants in wanted)

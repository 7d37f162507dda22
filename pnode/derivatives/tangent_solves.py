"""The solve of a state with its tangents: what it needs to know, and batches of them in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pnode.adjoint.nonfinite import check_tangents
from pnode.base.devices import ordered, place_of
from pnode.base.transforms import (
    batch_is_innermost,
    lowered,
    moves,
    only_forward_mode,
    outside,
    recorded_by_autograd,
    transforms_active,
)
from pnode.derivatives.batches import Runs
from pnode.derivatives.stage_tangents import of_stages
from pnode.derivatives.tangents import pair_problem, pair_settings, unique
from pnode.layout.pair_layout import PairLayout, RowPairs
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.petsc.settings import without_structure
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.row_sweep import PassSweep
from pnode.sweeping.run import Directions, Recorded, Requests, Run, Tangents
from pnode.sweeping.sameness import refuse_another

__all__ = [
    "after_first",
    "batched",
    "joined",
    "may_merge",
    "tangent",
    "tangents_of",
    "with_tangents",
    "zeros_for_none",
]


def with_tangents(
    engine: Engine, run: Run, directions: Directions, reverse: bool, own: bool
) -> tuple[PairLayout, InitialValueProblem, Requests]:
    """Return how a state and its tangents make one, their problem, and what to do for it.

    Parameters
    ----------
    engine, run : Engine, Run
        What solved, and the solve.
    directions : sequence of sequence of (Tensor or None)
        For each tangent, that of each parameter.
    reverse : bool
        Whether the adjoint of the solve is to be taken: then a batch of such solves is not one.
    own : bool
        Whether it is the rule of forward mode that wants it.
    """
    problem, sweep = run.problem, run.sweep
    assert sweep is not None and run.surroundings is not None
    pair, settings, samples = PairLayout(
        problem.layout.size, len(directions), split=run.settings.split
    ), run.settings, None  # fmt: skip
    steps, outputs = sweep.recorded()
    if isinstance(sweep, PassSweep):
        samples, rows = sweep.samples, problem.layout.shapes[0][0]
        pair = RowPairs(problem.layout.size // rows, len(directions), rows=rows)
    else:
        options = {}
        if engine.method.implicit:
            options = engine.solver_options(without_structure(settings), adjoint=True).values
        settings = pair_settings(settings, pair, options)
    moving = tuple(filter(moves, unique([v for one in directions for v in one])))
    mergeable = not reverse and batch_is_innermost(own)
    recorded = Recorded(
        steps, outputs, settings, run.surroundings,
        Tangents(pair, run, directions, moving, mergeable), sweep.pieces,
    )  # fmt: skip
    requests = Requests(dense=sweep.dense is not None, recorded=recorded, samples=samples)
    return pair, pair_problem(problem, pair, directions), requests


def tangent(
    node: Any,
    engine: Engine,
    run: Run,
    y0: torch.Tensor,
    t: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    start: torch.Tensor,
    directions: Directions,
    reverse: bool,
    own: bool = False,
) -> tuple[PairLayout, torch.Tensor, torch.Tensor, Runs]:
    """Solve for the derivatives of a solve's outputs along directions. Collective.

    Parameters
    ----------
    node : type
        The solve as a node of torch's graphs: ``SolveFunction``.
    engine, run : Engine, Run
        What solved, and the solve.
    y0, t : Tensor
        Its flat initial state and its output times.
    parameters : sequence of Tensor
        Its parameters.
    start, directions : Tensor, sequence of sequence of (Tensor or None)
        Directions of y0, shape ``(m, size)``; for each those of parameters, None being zero.
    reverse : bool
        Whether the caller takes the adjoint of the sweep.
    own : bool
        Whether the caller is the rule of forward mode.

    Returns
    -------
    pair : PairLayout
        How states and tangents make one state.
    x0, xs, runs : Tensor, Tensor, Runs
        Of both, at the start and at the outputs.

    Raises
    ------
    BackwardError
        If events have cut steps that would have to be taken again.
    """
    pair, of_both, requests = with_tangents(engine, run, directions, reverse, own)
    number, taken = len(run.problem.times), Runs()
    assert run.surroundings is not None
    inputs = (*parameters, *tangents_of(requests).moving)
    x0 = pair.join([y0, *start])
    recorded = recorded_by_autograd(map(lowered, (y0, t, start, *inputs)))
    if not reverse and only_forward_mode(own):
        known = of_stages(engine, run, pair, y0, start, directions)
        if known is not None and not recorded:
            _check(run, pair, known, (start, *inputs[len(parameters) :]))
            return pair, x0, known, taken
        requests = replace(requests, known=known)
        kept = recorded
    else:
        kept = reverse or recorded or transforms_active()
    with run.surroundings.restored():
        if not own and not transforms_active():
            with run.problem.ranks.together():
                refuse_another(run, lowered(y0))
        if kept:
            xs = node.apply(engine, of_both, requests, taken, y0, t[:number], start, *inputs)
        else:
            along = [[lowered(v) for v in one] for one in directions]
            with outside(), torch.no_grad(), ordered(place_of(of_both.layout.device)) as leave:
                pair, of_both, requests = with_tangents(engine, run, along, reverse, own)
                xs, one = sweeps.forward(engine, of_both, lowered(x0).clone(), False, requests)
                leave(xs)
            taken.append(one)
    xs = xs.reshape(number, -1)
    _check(run, pair, xs, (start, *inputs[len(parameters) :]))
    for one in taken.all():
        one.roots, one.last = run.roots, run.last
        run.stats.tangents.add(one.stats)
        one.stats.backward, one.stats.tangents = run.stats.backward, run.stats.tangents
    return pair, x0, xs, taken


def _check(run: Run, pair: PairLayout, xs: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
    """Refuse tangents that are not finite; see :func:`check_tangents`. Collective."""
    problem, parts = run.problem, pair.parts(xs.detach())  # before transforms are taken off
    times = [problem.direction * time for time in problem.times]
    with outside(), torch.no_grad(), problem.ranks.together():
        state, *tangents = map(lowered, parts)
        along = [lowered(one).detach() for one in given]
        method = run.settings.method.name
        problem.ranks.attempt(check_tangents, state, tangents, along, times, method)


def joined(requests: Requests, y0: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return what is solved for: a state and its tangents, rows of ``start``, in one."""
    return tangents_of(requests).pair.join([y0, *start])


def tangents_of(requests: Requests) -> Tangents:
    """Return the tangents that are solved for."""
    assert requests.recorded is not None and requests.recorded.tangents is not None
    return requests.recorded.tangents


def zeros_for_none(
    y0: torch.Tensor, along_y0: torch.Tensor | None,
    start: torch.Tensor, along_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return two tangents, zeros for those that are None."""
    return (
        torch.zeros_like(y0) if along_y0 is None else along_y0,
        torch.zeros_like(start) if along_start is None else along_start,
    )


def may_merge(in_dims: Sequence[int | None], inputs: Sequence[Any]) -> bool:
    """Whether a batch of solves is one of tangents of the same solve, which may be taken at once.

    Parameters
    ----------
    in_dims, inputs : sequence
        Of ``SolveFunction``.
    """
    recorded = inputs[2].recorded
    if recorded is None or recorded.tangents is None or not recorded.tangents.mergeable:
        return False
    number = len(recorded.tangents.run.problem.parameters)
    return all(dim is None for dim in (*in_dims[4:6], *in_dims[7 : 7 + number]))


def batched(
    number: int, tangents: Tangents, in_dims: Sequence[int | None], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[list[torch.Tensor | None]]]:
    """Return the starts and the directions of a batch of tangents, one after the other.

    Parameters
    ----------
    number : int
        Of the batch.
    tangents : Tangents
        Of one of them.
    in_dims, inputs : sequence
        Of the starts, the parameters and the directions that move.
    """
    rows = [
        value.expand(number, *value.shape) if dim is None else value.movedim(dim, 0)
        for dim, value in zip(in_dims, inputs, strict=True)
    ]
    moving = dict(zip(map(id, tangents.moving), rows[-len(tangents.moving) :], strict=False))
    directions = [
        [v if v is None or id(v) not in moving else moving[id(v)][k] for v in one]
        for k in range(number)
        for one in tangents.directions
    ]
    return rows[0].reshape(-1, rows[0].shape[-1]), directions


def in_tuple(function: Any, *arguments: Any) -> tuple[Any]:
    """Return what a function returns, in a tuple."""
    return (function(*arguments),)


def after_first(rows: torch.Tensor) -> torch.Tensor:
    """Return rows with zeros instead of the first."""
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])

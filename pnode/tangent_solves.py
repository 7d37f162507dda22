"""The solve of a state with its tangents: what it needs to know, and batches of them in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from pnode import sweeps
from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.tangents import Moving, create_tangents, has_tangents
from pnode.devices import ordered, place_of
from pnode.engine import Engine
from pnode.errors import BackwardError
from pnode.held import now
from pnode.pair_layout import PairLayout
from pnode.problem import InitialValueProblem
from pnode.run import Recorded, Requests, Run, Sweep, Tangents
from pnode.solution import Ledger, Stats
from pnode.solvers.stepping import Step
from pnode.stages import uncompiled
from pnode.sweeps import SteppedSweep
from pnode.tangents import pair_problem, pair_settings, unique
from pnode.transforms import (
    batch_is_innermost,
    lowered,
    moves,
    outside,
    unwatched,
)

__all__ = [
    "Directions",
    "after_first",
    "as_parameter",
    "batched",
    "joined",
    "later",
    "may_merge",
    "of_stages",
    "tangents_of",
    "with_tangents",
    "zeros_for_none",
]

#: For each tangent, that of each parameter; None being zero.
Directions: TypeAlias = Sequence[Sequence[torch.Tensor | None]]


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

    Raises
    ------
    BackwardError
        If the ranks share a state with ghost cells.
    """
    problem, sweep = run.problem, run.sweep
    assert sweep is not None and run.surroundings is not None
    if problem.exchange is not None:
        raise BackwardError(
            "second derivatives through a solve with layout= are not supported: solve without a "
            "layout, or differentiate the gradient by finite differences"
        )
    pair = PairLayout(problem.layout.size, len(directions), split=run.settings.split)
    steps, outputs = sweep.recorded()
    options = {}
    if engine.method.implicit:
        options = engine.solver_options(run.settings, adjoint=True).values
    moving = tuple(filter(moves, unique([v for one in directions for v in one])))
    mergeable = not reverse and batch_is_innermost(own)
    recorded = Recorded(
        steps, outputs, pair_settings(run.settings, pair, options), run.surroundings,
        Tangents(pair, run, directions, moving, mergeable),
    )  # fmt: skip
    requests = Requests(dense=bool(sweep.interpolated), recorded=recorded)
    return pair, pair_problem(problem, pair, directions), requests


def of_stages(
    engine: Engine,
    run: Run,
    pair: PairLayout,
    y0: torch.Tensor,
    start: torch.Tensor,
    directions: Directions,
) -> torch.Tensor | None:
    """Return a solve's outputs with their tangents, from the stages of its steps. Collective.

    Nothing is recorded; transforms of torch.func that are active are the caller's.

    Parameters
    ----------
    engine, run : Engine, Run
        What solved, and the solve.
    pair : PairLayout
        How a state and its tangents make one.
    y0 : Tensor
        Its initial state, flat.
    start : Tensor
        Directions of y0, shape ``(m, size)``.
    directions : sequence of sequence of (Tensor or None)
        For each, that of each parameter, None being zero.

    Returns
    -------
    Tensor or None
        Shape ``(T, total)``, y0's dtype. None if the stages are not all in memory, or the method
        has no such tangents.
    """
    along = [[lowered(v) for v in one] for one in directions]
    with outside():
        found = _of_stages(engine, run, lowered(y0), lowered(start), along)
        if found is None:
            return None
        assert run.ys is not None
        return pair.join([run.ys, *found.unbind(1)])


class _LaterSweep(Sweep):
    """Recorded steps that are taken once their adjoint is wanted."""

    interpolated: frozenset[int] = frozenset()

    def __init__(self, engine: Engine, requests: Requests) -> None:
        self._engine, self._requests = engine, replace(requests, known=None)
        self._run: Run | None = None

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and how many come before each output."""
        assert self._requests.recorded is not None
        return self._requests.recorded.steps, self._requests.recorded.outputs

    def noted(self, output: int) -> Sequence[float]:
        """Return what was noted of f where a step begins: nothing before it is taken."""
        sweep = None if self._run is None else self._run.sweep
        return () if sweep is None else sweep.noted(output)

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the steps if they were not, and their discrete adjoint; see :class:`Sweep`."""
        own = self._run
        if own is None:
            problem = replace(
                run.problem, function=now(run.problem.function), explicit=now(run.problem.explicit)
            )
            _, own = sweeps.forward(self._engine, problem, y0, True, self._requests)
            own.stats.backward = run.stats.backward
            own.let_go()
            run.stats.tangents.add(own.stats)
            self._run = own
        run.used[:] = own.used
        assert own.sweep is not None
        return own.sweep.reverse(own, y0, cotangents, wants_times)


def later(
    engine: Engine, problem: InitialValueProblem, requests: Requests
) -> tuple[torch.Tensor, Run]:
    """Return known outputs, and the run of a sweep that is taken for its adjoint."""
    assert requests.recorded is not None and requests.known is not None
    run = Run(problem, Stats(), requests.recorded.settings, [False] * len(problem.parameters))
    run.surroundings = requests.recorded.surroundings
    run.sweep = _LaterSweep(engine, requests)
    return requests.known, run


def _of_stages(
    engine: Engine, run: Run, y0: torch.Tensor, start: torch.Tensor, directions: Directions
) -> torch.Tensor | None:
    """Return the tangents, shape ``(T, m, size)``, y0's dtype. Collective."""
    problem, ledger = run.problem, run.stats.tangents
    if run.event is not None:
        return None
    taken = run
    if not isinstance(run.sweep, SteppedSweep) or run.settings.graphs is not None:
        if engine.checkpointing.bytes is not None:
            return None
        if not has_tangents(replace(run.settings, graphs=None), problem.mass is not None):
            return None
        taken = uncompiled(engine, run, y0)
        ledger.add(taken.stats)
    sweep = taken.sweep
    assert isinstance(sweep, SteppedSweep) and sweep.trajectory is not None
    has = has_tangents(taken.settings, problem.mass is not None)
    if not (has and sweep.trajectory.at_hand) or sweep.dense is not None:
        return None
    function, explicit = unwatched(problem.function), unwatched(problem.explicit)
    taken = replace(taken, problem=replace(problem, function=function, explicit=explicit), codes=())
    assert run.surroundings is not None
    place = ordered(place_of(problem.layout.device))
    with run.surroundings.restored(), problem.ranks.together(), place as leave:
        found = _tangents(engine, taken, sweep, start, _moving(problem, directions), ledger)
        leave(found)
    return found


def _tangents(
    engine: Engine, run: Run, sweep: SteppedSweep, start: torch.Tensor, moving: Moving,
    ledger: Ledger,
) -> torch.Tensor:  # fmt: skip
    """Take the tangents of all steps."""
    trajectory, dtype = sweep.trajectory, run.problem.layout.dtype
    assert trajectory is not None
    field, ranks = run.field(ledger), run.problem.ranks
    found = start.new_empty((len(trajectory.outputs), *start.shape), dtype=dtype)
    hits: dict[int, list[int]] = {}
    for output, node in enumerate(trajectory.outputs):
        hits.setdefault(node, []).append(output)
    with engine.adjoint(run.settings, bool(field.parameters)) as adjoint, torch.enable_grad():
        adjoint.begin(field)
        stepper = create_tangents(adjoint, start, moving)
        for node in range(len(trajectory.steps) + 1):
            for output in hits.get(node, ()):
                found[output] = stepper.tangents.to(dtype)
            if node == len(trajectory.steps):
                break
            step = trajectory.steps[node]
            checkpoint = trajectory.peek(node)
            assert checkpoint is not None
            ranks.where = {
                "time": run.problem.direction * step.start,
                "step": node, "method": run.settings.method.name,
            }  # fmt: skip
            adjoint.load(checkpoint, trajectory.tape(node), trajectory.evidence[node])
            stepper.step(step, ledger)
    return found


def _moving(problem: InitialValueProblem, directions: Directions) -> Moving:
    """Return the tangents of the parameters that have some, in one tensor for each."""
    found = []
    for index, column in enumerate(zip(*directions, strict=True)):
        if any(v is not None for v in column):
            zero = torch.zeros_like(problem.parameters[index])
            rows = [zero if v is None else v.detach() for v in column]
            found.append((index, torch.stack(rows)))
    return found


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


def as_parameter(
    gradient: torch.Tensor | None, parameter: torch.Tensor, used: bool
) -> torch.Tensor | None:
    """Gradient in the parameter's dtype: zeros if it is used in vain, None if not at all."""
    if gradient is None:
        return torch.zeros_like(parameter) if used else None
    return gradient.to(parameter)

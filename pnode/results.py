"""What a solve has found, as its user gets it."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.ledger import Stats
from pnode.derivatives.stages import StageSweep
from pnode.parts import Solved
from pnode.path import Path
from pnode.problems.calls import Call
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import carry_once
from pnode.solutions.solution import Occurrences, Solution
from pnode.sweeping.engine import Engine
from pnode.sweeping.event_functions import Events
from pnode.sweeping.integrals import parted
from pnode.sweeping.run import Requests

__all__ = ["result"]


def result(
    engine: Engine, problem: InitialValueProblem, requests: Requests, solved: Solved,
    flat: torch.Tensor, start: Stats, call: Call, events: Events | None, trainable: bool, at: str,
) -> Solution[Any]:  # fmt: skip
    """Return a solution. Collective if ``at`` is "steps".

    Parameters
    ----------
    engine, problem, requests : Engine, InitialValueProblem, Requests
        What has solved what, and what else was to be done.
    solved : Solved
        What was found.
    flat : Tensor
        The flat initial state.
    start : Stats
        What was counted before the solve.
    call : Call
        How the user's state maps to the one inside.
    events : Events or None
        What was looked for.
    trainable : bool
        Whether it may be differentiated.
    at : {"times", "steps"}
        Which outputs are wanted.
    """
    path = Path(engine, problem, solved, trainable, call) if requests.steps else None
    if path is not None and at == "steps":
        solved = path.at_steps(solved)
    layout, compute, run = problem.layout, problem.compute, solved.run
    times, ys, found = solved.times, solved.ys, solved.found
    if compute is not None:
        ys = carry_once(ys, compute, start)
        found = [(when, carry_once(rows, compute, start)) for when, rows in found]
        start.backward = run.stats.backward
    run.stats.add(start)
    states = ys if solved.whole else layout.unflatten(ys)
    states, costs = parted(problem, states)
    states = call.restored(states)
    kept = trainable and not requests.continuous
    stages = StageSweep.of(engine, run, flat, call) if kept else None
    occurrences = tuple(
        Occurrences(when, call.restored(parted(problem, layout.unflatten(rows))[0]))
        for when, rows in found
    )
    solution = Solution(times, states, run.stats, "t_end", None, costs, stages, occurrences)
    solution.path = path if requests.dense else None
    solution.home = engine.comm, engine.exchange
    if run.last is not None and events is not None:
        solution.reason, solution.event_time = "event", times[-1]
        solution.event = events.owner(run.last.entry)
    return solution

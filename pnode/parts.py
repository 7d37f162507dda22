"""A solve in parts, from break to break (:mod:`pnode.breakpoints`), each a node of the graph.

Every part is solved as if by itself: a multistep method, the controller and what a method carries
from step to step begin anew. The derivative with respect to a break time is that of one part's end,
lambda^T f(t-), minus that of the next one's start, lambda^T f(t+).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from pnode.base.ledger import Stats
from pnode.base.ranks import ALONE, Ranks
from pnode.base.transforms import depends, outside, plain
from pnode.derivatives import autograd
from pnode.errors import ConfigurationError
from pnode.events.event_derivatives import Vanishing
from pnode.events.events import split
from pnode.field.consistency import check_consistency, consistent_state
from pnode.problems.problem import InitialValueProblem
from pnode.problems.windows import Window
from pnode.sweeping.engine import Engine
from pnode.sweeping.event_functions import Events
from pnode.sweeping.output_times import flow_slope
from pnode.sweeping.run import Requests, Run, Sweep

__all__ = ["Solved", "Taken", "consistent", "solve"]


class Taken(NamedTuple):
    """What a sweep was given, and what it left."""

    problem: InitialValueProblem
    run: Run
    flat: torch.Tensor
    times: torch.Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """What a solve has found.

    Attributes
    ----------
    times : Tensor
        Output times, and last that of the event which has ended the solve.
    ys : Tensor
        States there: flat, shape ``(T, size)``, or of the user's shape.
    found : list of (Tensor, Tensor)
        Times and flat states of each event.
    run : Run
        The solve; that of the last part, with the ledger of all.
    whole : bool
        Whether ``ys`` is of the user's shape.
    taken : list of Taken
        The sweeps.
    """

    times: torch.Tensor
    ys: torch.Tensor
    found: list[tuple[torch.Tensor, torch.Tensor]]
    run: Run
    whole: bool
    taken: list[Taken]


@dataclass(frozen=True, eq=False)
class _Part:
    """One part: its problem, its times, and the outputs inside of it and at its end."""

    problem: InitialValueProblem
    times: torch.Tensor
    inside: list[int]
    at_end: list[int]


def solve(
    engine: Engine, problem: InitialValueProblem, requests: Requests, flat: torch.Tensor,
    times: torch.Tensor, trainable: bool, differentiable: Events | None, solves_start: bool,
) -> Solved:  # fmt: skip
    """Solve, in parts where there are breaks. Collective.

    Parameters
    ----------
    engine, problem, requests : Engine, InitialValueProblem, Requests
        As for :func:`pnode.derivatives.autograd.solve`.
    flat, times : Tensor
        Flat initial state, and the output times.
    trainable : bool
        Whether anything requires grad.
    differentiable : Events or None
        The events of ``requests`` as functions to be differentiated.
    solves_start : bool
        Whether algebraic unknowns are solved for where a part begins.
    """
    method = engine.method.name
    if problem.breaks is None:
        ys, run = autograd.solve(engine, problem, requests, flat, times, trainable)
        whole = trainable and not run.roots and not problem.layout.is_tuple  # see SolveFunction
        taken = [Taken(problem, run, flat, times)]
        times, ys, found = split(requests.events, differentiable, problem, run, times, ys, method)
        return Solved(times, ys, found, run, whole, taken)
    parts = list(_parts(problem, times))
    _refuse_unsplit(problem, times, parts)
    kept = _Kept(engine)
    wanted = replace(requests, steps_before=0, progress=requests.progress and len(parts) == 1)
    stats, rows, taken = Stats(), [flat], []
    events: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for number, part in enumerate(parts):
        if number:
            flat = _begun(part.problem, flat, solves_start, stats, part.times[0].detach())
        ys, run = autograd.solve(engine, part.problem, wanted, flat, part.times, trainable)
        taken.append(Taken(part.problem, run, flat, part.times))
        ended, ys, found = split(
            requests.events, differentiable, part.problem, run, part.times, ys, method
        )
        stats.add(run.stats)
        stats.tangents.add(run.stats.tangents)
        kept.add(run, stats)
        states = list(ys.reshape(len(ended), -1))
        events.append(found)
        if number == 0:
            rows = states[:1]
        reached = len(states) - (run.last is not None)
        rows += states[1 : min(reached, len(part.inside) + 1)]
        if reached == len(part.times):
            at_end = states[reached - 1]
            outputs, flat = _ends(part, times, at_end)
            rows += outputs
        if run.last is not None:
            rows.append(states[-1])
            times = _ended(times, len(rows) - 1, ended[-1])
            break
        if number + 1 < len(parts):
            memory = kept.left(problem.ranks)
            wanted = replace(wanted, steps_before=stats.steps, memory=memory, sides=run.sides)
    run = replace(run, stats=stats, problem=replace(run.problem, breaks=problem.breaks))
    return Solved(times, torch.stack(rows), _joined(events, times), run, False, taken)


def _parts(problem: InitialValueProblem, t: torch.Tensor) -> Iterator[_Part]:
    """Cut a solve at its breaks."""
    breaks, d = problem.breaks, problem.direction
    given, cuts = t.to(torch.float64), breaks.times
    inner = [d * s for s in breaks.times.detach().tolist()]
    first, *between, last = [problem.times[0], *inner, problem.times[-1]]
    marks = [first, *between, last]
    position = 1
    ends = [given[:1], *(cuts[i : i + 1] for i in range(len(inner))), given[-1:]]
    for k, (low, high) in enumerate(itertools.pairwise(marks)):
        final = k == len(marks) - 2
        inside, at_end = [], []
        while position < len(problem.times) - 1:
            s, reach = problem.times[position], breaks.reach[k + 1]
            if not final and abs(s - high) <= reach:
                at_end.append(position)
            elif s < high:
                inside.append(position)
            else:
                break
            position += 1
        if final:
            at_end = [len(problem.times) - 1]
        margins = breaks.margins[k : k + 2]
        window = Window(
            low + margins[0] if math.isfinite(margins[0]) else -math.inf,
            high - margins[1] if math.isfinite(margins[1]) else math.inf,
            d,
        )
        floats = (low, *(problem.times[i] for i in inside), high)
        own = replace(problem, times=floats, window=window, breaks=None)
        if own.base is not None:
            own = replace(own, base=replace(own.base, times=floats, window=window, breaks=None))
        chosen = [given[i : i + 1] for i in inside]
        yield _Part(own, torch.cat([ends[k], *chosen, ends[k + 1]]), inside, at_end)


def _begun(
    problem: InitialValueProblem, flat: torch.Tensor, solves_start: bool, stats: Stats,
    time: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return where a part begins: the algebraic unknowns may jump."""
    own = problem if problem.base is None else problem.base
    if own.gives_rate or own.exchange is not None:
        return flat
    size = own.layout.size

    def begin() -> torch.Tensor:
        return torch.cat([consistent(own, flat[:size], solves_start, stats, time), flat[size:]])

    with problem.ranks.together():
        try:
            begun: torch.Tensor = problem.ranks.attempt(begin)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"after the break at t = {own.direction * own.times[0]!r} the state is no start "
                f"of the equations: {error} (consistent_start=True solves at breaks, too)"
            ) from error
    return begun


def consistent(
    problem: InitialValueProblem, flat: torch.Tensor, solves_start: bool, stats: Stats,
    time: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Check, or solve for, the algebraic unknowns of a state that a solve is to begin with.

    With ghost cells f is collective, and what belongs together is not one rank's to see.
    """
    if problem.gives_rate or problem.exchange is not None:
        return flat
    own = replace(problem, ranks=ALONE)
    if solves_start:
        return consistent_state(own, flat, stats, time)
    with outside():
        check_consistency(own, plain(flat).detach(), stats)
    return flat


def _ends(
    part: _Part, t: torch.Tensor, state: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the outputs at the end of a part, and where the next one begins.

    The state is a function of the break time. An output there is one of its own time instead.
    """
    end = part.times[-1]
    outputs = []
    for index in part.at_end:
        shift = t[index].to(torch.float64) - end
        shift = shift - shift.detach()
        if not (depends(t) or depends(part.times)) or t.numel() - 1 == index:
            outputs.append(state)
            continue
        # A step of Heun's method, of length zero: derivatives by it are right up to the second.
        time = end.to(state)
        shift = (shift + Vanishing.apply(shift, 0)).to(state)
        first = flow_slope(part.problem, time, state)
        second = flow_slope(part.problem, time + shift, state + shift * first)
        outputs.append(state + shift * (0.5 * (first + second)))
    return outputs, state


def _refuse_unsplit(problem: InitialValueProblem, t: torch.Tensor, parts: list[_Part]) -> None:
    """Refuse derivatives by a time that is a break and an output, where f is not at hand."""
    moving = depends(t) or depends(problem.breaks.times)
    both = any(part.at_end for part in parts[:-1])
    if moving and both and (problem.ranks.parallel or problem.exchange is not None):
        raise ConfigurationError(
            "t or breakpoints requires grad, an output is at a break, and several ranks share the "
            "state: detach them, or leave outputs at breaks away"
        )


class _Kept:
    """Checkpoints of the parts so far, which together stay within the limit of memory.

    A part that would have less than half of it lets those before go: their sweeps are repeated when
    a backward sweep comes to them, one by one, as all later ones are used up by then. One that
    cannot repeat steps from the middle always gets all of it.

    Parameters
    ----------
    engine : Engine
        Its method and limit.
    """

    _PEAKS = ("ram_bytes", "disk_bytes", "device_bytes", "tape_bytes")

    def __init__(self, engine: Engine) -> None:
        self._limit = engine.checkpointing.bytes
        device = engine.checkpointing.device_bytes is not None
        self._alone = device or (self._limit is not None and not engine.method.restarts)
        self._sweeps: list[Sweep] = []
        self._bytes = dict.fromkeys(self._PEAKS, 0)
        self._peaks = dict(self._bytes)

    def add(self, run: Run, stats: Stats) -> None:
        """Add a part, and put the peaks of all into the ledger of all."""
        for name in self._PEAKS:
            self._bytes[name] += getattr(run.stats, name)
            self._peaks[name] = max(self._peaks[name], self._bytes[name])
            setattr(stats, name, self._peaks[name])
        run.stats.backward, run.stats.tangents = stats.backward, stats.tangents
        if run.sweep is not None:
            self._sweeps.append(run.sweep)

    def left(self, ranks: Ranks) -> int | None:
        """Make room for the next part, and return what it may take; None for no limit.

        Collective if there is a limit: what all do is decided by the rank that keeps most.
        """
        limit, used = self._limit, self._bytes["ram_bytes"] + self._bytes["tape_bytes"]
        if limit is not None and ranks.parallel:
            used = ranks.compare((), {}, used)[0]
        if self._alone or (limit is not None and 2 * used > limit):
            for sweep in self._sweeps:
                sweep.let_checkpoints_go()
            self._sweeps.clear()
            self._bytes, used = dict.fromkeys(self._PEAKS, 0), 0
        return None if limit is None else limit - used


def _ended(times: torch.Tensor, number: int, event: torch.Tensor) -> torch.Tensor:
    """Return the output times before an event, and its own."""
    times = times if times.is_floating_point() else times.to(torch.float64)
    return torch.cat([times[:number], event.to(times).reshape(1)])


def _joined(
    found: list[list[tuple[torch.Tensor, torch.Tensor]]], times: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the events of all parts, each by itself."""
    dtype = times.dtype if times.is_floating_point() else torch.float64
    return [
        (
            torch.cat([when for when, _ in parts]).to(dtype),
            torch.cat([states for _, states in parts]),
        )
        for parts in zip(*found, strict=True)
    ]

"""A solution as a function of time: its steps are taken again where it is asked for.

The coefficients of the interpolants of the steps in question, or the states at the ends of steps,
are outputs of a sweep that takes the recorded steps (:mod:`pnode.sweeping.dense`), a node of
torch's graphs like any solve. What is made of them is plain torch, so that all derivatives pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from pnode.base.ledger import Stats
from pnode.base.rank_sums import replicated
from pnode.base.real_times import real_times
from pnode.base.transforms import (
    moves,
    outside_compiler,
    plain,
    refuse_transforms,
)
from pnode.errors import ConfigurationError
from pnode.parts import Solved
from pnode.path_parts import PathPart
from pnode.problems.arguments import choice
from pnode.problems.calls import Call
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import carry_once
from pnode.sweeping.dense import behind, coefficients
from pnode.sweeping.engine import Engine
from pnode.sweeping.integrals import parted
from pnode.sweeping.run import Requests
from pnode.sweeping.stepped_sweep import SteppedSweep

__all__ = ["At", "Path", "check_at"]

# How far beyond an end a time may be that is meant to be it, in spacings of its numbers.
_SPACINGS = 4.0

At: TypeAlias = Literal["times", "steps"]
_USUAL = "times"  # the same object wherever it is written


def check_at(at: str, engine: Engine, requests: Requests) -> None:
    """Check which outputs are wanted, and refuse ends of steps where there is no taking them again.

    Raises
    ------
    ConfigurationError
        Naming what ``at="steps"`` does not go with.
    """
    if at is _USUAL or choice("at", at, get_args(At)) == _USUAL:
        return
    resume = engine.checkpointing.resume
    for text, refused in (
        ("gradient='continuous': take gradient='discrete'", requests.continuous),
        (f"resume={resume!r}: take it without at=, or drop resume=", resume),
    ):  # fmt: skip
        if refused:
            raise ConfigurationError(f"at='steps' does not go with {text}")


def _nothing() -> None:
    return None


class Path:
    """What a solution is asked with; see :meth:`pnode.Solution.__call__`.

    Parameters
    ----------
    engine : Engine
        What solved.
    problem : InitialValueProblem
        All of it.
    solved : Solved
        What was found.
    trainable : bool
        Whether it may be differentiated.
    call : Call
        How the user's state maps to the one inside.
    """

    def __init__(
        self, engine: Engine, problem: InitialValueProblem, solved: Solved, trainable: bool,
        call: Call,
    ) -> None:  # fmt: skip
        self._engine, self._problem, self._call = engine, problem, call
        self._stats: Stats = solved.run.stats
        self._parts = [PathPart.of(taken, trainable) for taken in solved.taken]
        for part in self._parts:
            part.run.stats = self._stats
        times = problem.direction * plain(solved.times).to(torch.float64)
        self._outputs = {s: i for i, s in enumerate(times.tolist())}
        self._ys = solved.ys.detach()
        steps = [step for part in self._parts for step in (*part.steps[:1], *part.steps[-1:])]
        self._ends = problem.times[0], steps[-1].end if steps else problem.times[0]

    def __reduce__(self) -> Any:
        """Copies and pickles of a solution have numbers alone."""
        return _nothing, ()

    @outside_compiler
    def at(self, t: Any, order: int, side: str = "after") -> Any:
        """Return the solution, or its derivative of an order, at any times. Collective."""
        problem, ranks = self._problem, self._problem.ranks
        asked = ranks.attempt(self._asked, t, order, side)
        if ranks.parallel:
            facts = None if asked is None else {"t": (*asked[1], tuple(asked[0].shape), side)}
            ranks.compare(("t",), facts, problem.layout.size)
        t, numbers = asked
        s = problem.direction * t.to(problem.layout.device, torch.float64).reshape(-1)
        if ranks.parallel and torch.is_grad_enabled() and moves(s):
            (s,) = replicated(ranks.comm, (s,))
        rows = self._rows(s, np.array(numbers), order, side).reshape(*t.shape, problem.layout.size)
        states = problem.layout.unflatten(rows)
        if problem.compute is not None:
            states = carry_once(states, problem.compute, self._stats)
        return self._call.restored(parted(problem, states)[0])

    def _asked(self, t: Any, order: int, side: str) -> tuple[torch.Tensor, list[float]]:
        """Check times; return them, and the integrator's."""
        choice("side", side, ("after", "before"))
        refuse_transforms([("t", t)])
        t = real_times("t", t, "give a time, or a tensor of times of any shape")
        d, (low, high) = self._problem.direction, self._ends
        numbers = d * plain(t).reshape(-1).to("cpu", torch.float64)
        eps = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
        slack = _SPACINGS * eps * max(abs(low), abs(high))
        outside = ~((numbers >= low - slack) & (numbers <= high + slack))  # NaN too
        if bool(outside.any()):
            index = int(outside.nonzero()[0, 0])
            raise ConfigurationError(
                f"t = {d * float(numbers[index])!r} is not in the interval of this solution, from "
                f"{d * low!r} to {d * high!r}: solve further, or ask within it"
            )
        if order and low == high:
            raise ConfigurationError(
                f"the solution has no step, only its start at t = {d * low!r}: give an output time "
                "behind it"
            )
        return t, numbers.clamp(low, high).tolist()

    def _rows(self, s: torch.Tensor, numbers: Any, order: int, side: str) -> torch.Tensor:
        """Return flat states, or derivatives, at times ``(n,)``. Collective."""
        layout, found = self._problem.layout, []
        ends = [part.steps[-1].end for part in self._parts[:-1]]
        which = np.searchsorted(ends, numbers, "right" if side == "after" else "left")
        for number, part in enumerate(self._parts):
            chosen = np.flatnonzero(which == number)
            if len(chosen):
                index = torch.as_tensor(chosen, device=s.device)
                rows = self._in_part(part, s[index], numbers[chosen], order, side)
                found.append((chosen, rows))
        if not found:
            return torch.zeros(0, layout.size, dtype=layout.dtype, device=layout.device)
        back = np.argsort(np.concatenate([chosen for chosen, _ in found]))
        result = torch.cat([rows for _, rows in found])[torch.as_tensor(back, device=s.device)]
        result = result.to(layout.dtype)
        return result if order else self._as_before(result, numbers)

    def _in_part(
        self, part: PathPart, s: torch.Tensor, numbers: Any, order: int, side: str
    ) -> torch.Tensor:
        """Return flat states, or derivatives, at times in one part, in double precision."""
        steps = part.steps
        if not len(steps):
            return part.flat.expand(len(s), -1).double()
        starts = np.array([step.start for step in steps])
        where = np.searchsorted(starts, numbers, "right" if side == "after" else "left") - 1
        where = np.maximum(where, 0)
        pieces, index = np.unique(where, return_inverse=True)
        # A solve in machine code takes an eighth of the time of steps taken again, or less.
        if part.driven and not order and not moves(s) and 8 * (int(pieces[-1]) + 1) > len(steps):
            found: torch.Tensor | None = part.outputs(self._engine, numbers)
            if found is not None:
                return found
        C = self._coefficients(part, tuple(pieces.tolist()))
        first, length = (
            torch.tensor([getattr(steps[i], name) for i in where], dtype=s.dtype, device=s.device)
            for name in ("start", "length")
        )
        inside = torch.as_tensor(numbers, device=s.device)
        s = s + (inside - plain(s))  # within the interval
        theta = ((s - first) / length)[:, None]
        C = C[torch.as_tensor(index, device=s.device)].double()
        result = torch.zeros_like(C[:, 0])
        for j in reversed(range(order, C.shape[1])):
            factor = float(np.prod([j - k for k in range(order)]))
            result = result * theta + factor * C[:, j]
        return result * (self._problem.direction / length[:, None]) ** order

    def _coefficients(self, part: PathPart, pieces: tuple[int, ...]) -> torch.Tensor:
        """Return those of steps' interpolants, shape ``(K, width, size)``. Collective."""
        method = self._engine.method
        width = coefficients(method)
        last = max(piece + behind(method, part.steps[piece]) for piece in pieces)
        steps = part.steps[: last + 1]
        starts = [steps[piece].start for piece in pieces for _ in range(width)]
        times = (steps[0].start, *starts, steps[-1].end)
        _, ys, _ = part.again(self._engine, steps, (0, len(steps)), times, pieces)
        found = ys[1:-1].reshape(len(pieces), width, -1)
        with self._problem.ranks.together():
            self._problem.ranks.attempt(part.check, self._engine.method, pieces, found[:, 0])
        return found

    def _as_before(self, rows: torch.Tensor, numbers: Any) -> torch.Tensor:
        """Return states with the numbers that the solve has returned at its output times."""
        known = [
            (i, self._outputs[s]) for i, s in enumerate(numbers.tolist()) if s in self._outputs
        ]
        if not known:
            return rows
        ys = plain(self._ys).reshape(len(self._outputs), -1)
        here, there = zip(*known, strict=True)
        expected = plain(rows).clone()
        expected[list(here)] = ys[list(there)]
        return rows + (expected - plain(rows))

    def at_steps(self, solved: Solved) -> Solved:
        """Return what was found at the ends of all steps, instead of the output times. Collective.

        The checkpoints of the solve are given back first.
        """
        times: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        run = solved.run
        for taken, part in zip(solved.taken, self._parts, strict=True):
            sweep = taken.run.sweep
            assert isinstance(sweep, SteppedSweep)
            sweep.let_checkpoints_go()
            ends = (part.problem.times[0], *(step.end for step in part.steps))
            hits = tuple(range(len(ends)))
            t, ys, run = part.again(self._engine, part.steps, hits, ends, None)
            first = 1 if times else 0
            times.append(t[first:])
            rows.append(ys[first:])
        t, ys = torch.cat(times), torch.cat(rows)
        if solved.run.last is not None:  # its time and state move
            event = solved.ys.reshape(len(solved.times), -1)[-1:]
            t, ys = torch.cat([t[:-1], solved.times[-1:].to(t)]), torch.cat([ys[:-1], event])
        old = solved.run
        if len(self._parts) == 1:
            old = replace(run, stats=old.stats, roots=old.roots, last=old.last)
        return replace(solved, times=t, ys=ys, run=old, whole=False)

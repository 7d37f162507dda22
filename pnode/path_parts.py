"""The steps of a solution that is asked at other times, taken once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pnode.adjoint.steps import Steps
from pnode.base.transforms import in_forward_mode, moves, plain, transforms_active
from pnode.derivatives import autograd
from pnode.derivatives.stages import refuse_written, written
from pnode.errors import FieldChanged, SolveError
from pnode.field.held import held, now
from pnode.parts import Taken
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.methods import Method
from pnode.solvers.stepping import Step
from pnode.sweeping.driven_outputs import DrivenOutputs
from pnode.sweeping.engine import Engine
from pnode.sweeping.recording import Noted
from pnode.sweeping.run import Recorded, Requests, Run

__all__ = ["PathPart"]

# How far a step taken again may be off, relative to the state: by the tolerance of Newton's method.
_OFF, _OFF_IMPLICIT = 1e-6, 1e-3


@dataclass(eq=False)
class PathPart:
    """The steps from one break to the next: what was solved, from where, and what was taken."""

    problem: InitialValueProblem
    run: Run
    flat: torch.Tensor
    times: torch.Tensor
    noted: Noted
    versions: list[int]
    #: Whether the driver makes outputs inside of its steps, and whether it had a gradient.
    driven: bool
    kept: bool

    @property
    def steps(self) -> Steps:
        """The steps, in their order."""
        return self.noted.steps

    @classmethod
    def of(cls, taken: Taken, trainable: bool) -> PathPart:
        """Return that of a sweep, without its checkpoints."""
        own, run, flat, times = taken
        sweep = run.sweep
        assert sweep is not None and sweep.noted_steps is not None
        declared = (*own.parameters, *own.frozen)
        problem = own.but(
            function=held(own.function, declared), explicit=held(own.explicit, declared),
            check_undeclared=False,
        )  # fmt: skip
        bare = Run(problem, run.stats, run.settings, surroundings=run.surroundings)
        flat = flat if trainable else flat.detach()
        driven = isinstance(sweep.dense, DrivenOutputs) and run.sides is None  # without events
        return cls(
            problem, bare, flat, times, sweep.noted_steps, written(problem, flat), driven,
            trainable,
        )  # fmt: skip

    def check(self, method: Method, pieces: Sequence[int], states: torch.Tensor) -> None:
        """Compare where steps begin with where they have begun before."""
        off, surroundings = _OFF_IMPLICIT if method.implicit else _OFF, self.run.surroundings
        assert surroundings is not None
        for piece, state in zip(pieces, plain(states).double(), strict=True):
            if piece == 0:
                continue
            before = self.noted.sums[piece - 1]
            if not abs(float(state.sum()) - before) <= off * float(state.abs().sum()):
                raise FieldChanged(
                    "the vector field is not the one that was solved with, as the steps taken "
                    f"again lead elsewhere{surroundings.differences()}: ask for the "
                    "solution before it changes, or solve again; fields with random numbers have "
                    "no solution to be asked for",
                    time=self.problem.direction * self.steps[piece].start,
                    method=method.name,
                )

    def again(
        self, engine: Engine, steps: Sequence[Step], hits: tuple[int, ...],
        times: tuple[float, ...], pieces: tuple[int, ...] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Run]:  # fmt: skip
        """Take steps again. Collective.

        Parameters
        ----------
        engine : Engine
            What took them.
        steps : sequence of Step
            The first ones.
        hits : tuple of int
            How many come before each output that one hits.
        times : tuple of float
            A time for each output.
        pieces : tuple of int or None
            Steps whose interpolants are wanted.

        Returns
        -------
        times, ys, run : Tensor, Tensor, Run
            Output times that move where those of the solve did, flat states, and the sweep.
        """
        run, surroundings = self.run, self.run.surroundings
        assert surroundings is not None
        adaptive = run.settings.adaptive and engine.method.solves_to_tolerance
        settings = replace(run.settings, graphs=None, adaptive=adaptive)
        recorded = Recorded(steps, hits, settings, surroundings, pieces=pieces)
        requests = Requests(dense=pieces is not None, recorded=recorded, plain=True)
        return self._taken(engine, requests, times)

    def outputs(self, engine: Engine, numbers: Any) -> torch.Tensor | None:
        """Return flat states at times by the solve itself, all of it, once more.

        None where it takes other steps, or machine code does not take them, that of the solve.
        """
        moving = any(map(moves, (self.flat, *self.problem.parameters)))
        enabled = torch.is_grad_enabled()
        if transforms_active() or in_forward_mode() or (enabled and moving and not self.kept):
            return None
        first, last = self.problem.times[0], self.steps[-1].end
        within = np.unique(numbers)
        if within[0] <= first and moves(self.times):  # here y0 moves along with t[0]
            return None
        within = within[(within > first) & (within < last)]
        times = (first, *within.tolist(), last)
        self.driven = False  # unless this comes to its end: steps taken again tell why
        try:
            with torch.set_grad_enabled(self.kept):
                _, ys, run = self._taken(engine, Requests(dense=True, steps=True), times)
        except SolveError:
            return None
        sweep = run.sweep
        if sweep is None or not isinstance(sweep.dense, DrivenOutputs):
            return None
        found = sweep.noted_steps
        if found.sums != self.noted.sums or [*found.steps] != [*self.steps]:
            return None
        self.driven = True
        ys = ys if enabled else ys.detach()
        return ys[torch.as_tensor(np.searchsorted(times, numbers))].double()

    def _taken(
        self, engine: Engine, requests: Requests, times: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, Run]:
        """Solve once more; see :meth:`again`."""
        run, surroundings = self.run, self.run.surroundings
        assert surroundings is not None
        refuse_written(
            run, self.flat, self.versions, engine.method,
            "ask for the solution before that, or solve again",
        )  # fmt: skip
        own, base = self.problem, self.problem.base
        problem = own.but(
            function=now(own.function), explicit=now(own.explicit), times=times,
            base=None if base is None else base.but(times=times),
        )  # fmt: skip
        given = dict(zip((own.direction * plain(self.times).double()).tolist(), self.times.double(),
                         strict=True))  # fmt: skip
        fixed = own.direction * torch.tensor(times, dtype=torch.float64, device=self.times.device)
        t = torch.stack([
            given.get(s, one) if i == 0 or not requests.dense else one
            for i, (s, one) in enumerate(zip(times, fixed, strict=True))
        ])  # fmt: skip
        moving = [one for one in (self.flat, t, *problem.parameters) if moves(one)]
        enabled = torch.is_grad_enabled()
        trainable = any(enabled or not one.requires_grad for one in moving)
        with surroundings.restored():
            ys, taken = autograd.solve(engine, problem, requests, self.flat, t, trainable)
        own_stats, stats = run.stats, taken.stats
        repeated = replace(stats, recomputed=stats.recomputed + stats.steps, steps=0, rejected=0)
        own_stats.add(repeated)
        taken.stats.backward, taken.stats.tangents = own_stats.backward, own_stats.tangents
        return t, ys.reshape(len(times), -1), taken

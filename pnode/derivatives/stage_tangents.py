"""Tangents of a solve's outputs from the stages of its steps, which are taken once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.tangent_stepper import Moving
from pnode.adjoint.tangents import create_tangents, has_tangents
from pnode.base.devices import ordered, place_of
from pnode.base.ledger import Ledger, Stats
from pnode.base.transforms import lowered, outside
from pnode.derivatives.stages import uncompiled
from pnode.field.held import now
from pnode.field.watching import unwatched
from pnode.layout.pair_layout import PairLayout
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.petsc.settings import without_structure
from pnode.solvers.stepping import Step
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.row_sweep import PassSweep
from pnode.sweeping.run import Directions, Requests, Run, Sweep
from pnode.sweeping.stepped_sweep import SteppedSweep

__all__ = ["later", "of_stages"]


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
        return _of_stages(engine, run, pair, lowered(y0), lowered(start), along)


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
    engine: Engine, run: Run, pair: PairLayout, y0: torch.Tensor, start: torch.Tensor,
    directions: Directions,
) -> torch.Tensor | None:  # fmt: skip
    """Do as :func:`of_stages`, outside of transforms. Collective."""
    problem, ledger = run.problem, run.stats.tangents
    if isinstance(run.sweep, PassSweep) or (run.sweep is not None and run.sweep.dense is not None):
        return None
    moving = _moving(problem, directions)
    compiled = sweeps.compiled_tangents(engine, run, start, moving)
    if compiled is not None:
        assert run.ys is not None
        return pair.join([run.ys, *compiled.unbind(1)])
    taken = run
    if not isinstance(run.sweep, SteppedSweep) or run.settings.graphs is not None:
        if engine.checkpointing.bytes is not None:
            return None
        if not has_tangents(replace(run.settings, graphs=None), problem.mass is not None):
            return None
        taken = uncompiled(engine, run, y0)
        ledger.add(taken.stats)
    sweep = taken.sweep
    assert isinstance(sweep, SteppedSweep)
    has = has_tangents(taken.settings, problem.mass is not None)
    if not (has and sweep.at_hand):
        return None
    function, explicit = unwatched(problem.function), unwatched(problem.explicit)
    taken = replace(taken, problem=replace(problem, function=function, explicit=explicit), codes=())
    assert run.surroundings is not None
    place = ordered(place_of(problem.layout.device))
    with run.surroundings.restored(), problem.ranks.together(), place as leave:
        found = _tangents(engine, taken, sweep, start, moving, ledger)
        leave(found)
    assert taken.ys is not None
    return pair.join([taken.ys, *found.unbind(1)])


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
    settings = without_structure(run.settings)
    with engine.adjoint(settings, bool(field.parameters)) as adjoint, torch.enable_grad():
        adjoint.begin(field)
        stepper = create_tangents(adjoint, start, moving)
        known = [
            (step, one, trajectory.evidence[step.index])
            for step in trajectory.steps
            if (one := trajectory.peek(step.index)) is not None
        ]
        stepper.look_ahead(known, ledger)
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
            adjoint.load(checkpoint, trajectory.graphs(node), trajectory.evidence[node])
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

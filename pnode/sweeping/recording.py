"""How a forward sweep is recorded: the schedule, the store and what it is taken up again from."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from pnode.adjoint.choose import choose_schedule, memory_limit
from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.identity import fingerprint
from pnode.adjoint.numbered import NumberedSchedule
from pnode.adjoint.offload import DeviceLevel, Offload
from pnode.adjoint.resume import Progress
from pnode.adjoint.schedule import StoreEverything
from pnode.adjoint.steps import Steps
from pnode.adjoint.store import CheckpointStore
from pnode.adjoint.trajectory import Trajectory
from pnode.base import vectors
from pnode.base.errors import ConfigurationError
from pnode.base.vectors import REAL
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.budgets import Budget
from pnode.solvers.methods import Method
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.step_control import StepControl, fixed_grid
from pnode.solvers.stepping import Observer, Step
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Requests, Run

__all__ = ["Noted", "Outputs", "Recorder", "new_budget", "new_trajectory"]


def _itself(folder: DiskFolder) -> DiskFolder:
    return folder


def new_trajectory(engine: Engine, run: Run, requests: Requests, y0: torch.Tensor) -> Trajectory:
    """Return an empty trajectory with the schedule that the memory allows.

    Raises
    ------
    ConfigurationError
        If the checkpointing that was asked for is not to be had for this solve.
    """
    chosen, control = _chosen(engine, requests), engine.control
    times = run.problem.times
    times = (times[0], *times[1:][-1:]) if requests.dense else times
    grid = fixed_grid(times, control, run.problem.resolution)
    steps = None if grid is None or requests.events is not None else grid.total
    if requests.recorded is not None:
        steps = len(requests.recorded.steps)
    state_bytes = run.problem.largest * REAL.itemsize
    schedule = choose_schedule(
        engine.method, steps, state_bytes, memory_limit(chosen, engine.method, state_bytes),
        chosen.store, chosen.disk is not None,
    )  # fmt: skip
    folder: Callable[[], DiskFolder] | None = None
    progress = None
    if chosen.resume is not None and requests.recorded is None:
        assert chosen.disk is not None
        history = not engine.method.restarts or (engine.method.coupled and run.settings.adaptive)
        if history or requests.events is not None or requests.dense:
            raise ConfigurationError(
                f"resume={chosen.resume!r} is not for BDF, adaptive radau5, event_fn and "
                "dense=True: they go on from more than one state"
            )
        progress = Progress(chosen.disk, chosen.resume, _identity(engine, run, y0))
        folder = partial(_itself, progress)
    elif chosen.disk is not None:
        folder = partial(DiskFolder, chosen.disk)
    level = None
    if chosen.device_bytes is not None:
        if run.settings.place.on_host:
            raise ConfigurationError(
                f"device_memory={chosen.device_bytes} is for a state on a device, and this one "
                "is on the host: use memory=, or y0.cuda() without device_state='host'"
            )
        level = DeviceLevel(chosen.device_bytes, Offload(run.settings.place.device))
    graphs_limit = _graphs_limit(engine)
    store = CheckpointStore(run.stats, chosen.bytes, folder, level, graphs_limit)
    return Trajectory(
        schedule, store, progress, graphs_limit > 0, steps, engine.method.multistep,
        only_repeated=chosen.store == "solutions",
    )  # fmt: skip


def new_budget(
    engine: Engine, requests: Requests
) -> Callable[[InitialValueProblem], Budget] | None:  # fmt: skip
    """Return what tells the budget of a problem's compiled sweep; None where there is no limit."""
    chosen = _chosen(engine, requests)
    if chosen == Checkpointing():
        return None
    known = requests.events is None  # else nobody knows how many fixed steps there will be
    return partial(_budget, engine.method, engine.control, chosen, requests.dense, known)


def _chosen(engine: Engine, requests: Requests) -> Checkpointing:
    chosen, memory = engine.checkpointing, requests.memory
    return chosen if memory is None else replace(chosen, memory=memory)


def _budget(
    method: Method, control: StepControl, chosen: Checkpointing, dense: bool, known: bool,
    problem: InitialValueProblem,
) -> Budget:  # fmt: skip
    times = problem.times[:: len(problem.times) - 1] if dense else problem.times
    grid = fixed_grid(times, control, problem.resolution)
    state_bytes = problem.largest * REAL.itemsize
    schedule = choose_schedule(
        method, grid.total if grid is not None and known else None, state_bytes,
        memory_limit(chosen, method, state_bytes), chosen.store, False,
    )  # fmt: skip
    limited = method.coupled and chosen.may_repeat
    fresh = (chosen.reproducible or limited) and method.restarts and not method.same_bits
    if isinstance(schedule, StoreEverything):
        return Budget(None, chosen.bytes, fresh)
    return Budget(NumberedSchedule(schedule), None, fresh)


def _graphs_limit(engine: Engine) -> float:
    """Return how many bytes of graphs may be kept.

    None beside device_memory, which they would fill and cannot be moved from. Where ghost cells
    are exchanged, a step's graphs are kept on all ranks or none: evaluating f again is
    collective. Their sizes differ between the ranks, so no limit must count.
    """
    chosen = engine.checkpointing
    if not engine.method.keeps_graphs or chosen.device_bytes is not None:
        return 0
    if engine.exchange is None or chosen.graphs_limit == 0:
        return chosen.graphs_limit
    if chosen.store == "tape" and chosen.bytes is not None:
        raise ConfigurationError(
            f"store='tape' with memory={chosen.memory!r} is not supported for layout=: the "
            "ranks would keep different graphs; drop memory=, or use store='auto'"
        )
    return math.inf if chosen.store == "tape" else 0


def _identity(engine: Engine, run: Run, y0: torch.Tensor) -> dict[str, str]:
    """Return what tells one sweep from another."""
    problem, options = run.problem, engine.jacobian_options
    preconditioner = options.preconditioner
    facts = {
        "method": repr(engine.method.own or engine.method.name),
        "steps": vars(engine.control), "times": problem.times, "direction": problem.direction,
        "form": problem.form, "jacobian": engine.jacobian,
        "reproducible": engine.checkpointing.reproducible,
        "shapes": problem.layout.shapes, "f": problem.function, "explicit": problem.explicit,
        "mass": None if problem.mass is None else dict(
            zip(("rows", "columns", "values"), problem.mass.entries(), strict=True)
        ),
        "jacobian_reuse": options.reuse,
        "preconditioner": getattr(preconditioner, "__dict__", preconditioner),
        "petsc_options": engine.petsc_options, "petsc_setup": engine.setup,
        "PETSc options": engine.solver_options(run.settings).values,
    }  # fmt: skip
    return fingerprint(facts, (y0, *problem.parameters, *problem.frozen))


class Outputs(Observer):
    """The states at the output times, as they are reached.

    Parameters
    ----------
    run : Run
        Whose outputs.
    trajectory : Trajectory or None
        Told of each.
    """

    def __init__(self, run: Run, trajectory: Trajectory | None) -> None:
        layout, number = run.problem.layout, len(run.problem.times)
        self._ys = torch.empty((number, layout.size), dtype=layout.dtype, device=layout.device)
        self._trajectory = trajectory
        self.number = self._taken_up = 0

    def add(self, state: torch.Tensor, after: int | None = None) -> None:
        """Take the next output; so many steps come before it, or those so far."""
        row = self._ys[self.number]
        row.copy_(state)
        self.number += 1
        if self._trajectory is not None:
            self._trajectory.mark_output(row, after)

    def output(self, index: int, integrator: TimeIntegrator) -> None:
        """Take an output from the solution, unless it was reached in another process."""
        if index >= self._taken_up:
            self.add(vectors.view(integrator.solution))

    def extend(self, states: Sequence[torch.Tensor], nodes: Sequence[int]) -> None:
        """Add states that are not outputs behind those that are; so many steps come before each."""
        rows = [self._ys[: self.number], torch.stack([*states]).to(self._ys)]
        self._ys = torch.cat(rows)
        self.number = len(self._ys)
        if self._trajectory is not None:
            self._trajectory.outputs.extend(nodes)

    def take_up(self, progress: Progress) -> None:
        """Begin with what was done in another process."""
        for _, state in progress.outputs:
            self._ys[self.number] = state
            self.number += 1
        self._taken_up = self.number

    def states(self) -> torch.Tensor:
        """Return the outputs, shape ``(T, size)``."""
        whole = self.number == len(self._ys)
        return self._ys if whole else self._ys[: self.number].clone()


class Noted(Observer):
    """Notes the steps, how many come before each output, and the sum of each step's end state."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.outputs: list[int] = []
        self.sums = array("d")

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Note a step."""
        self.take(step, vectors.view(integrator.solution))

    def take(self, step: Step, state: torch.Tensor) -> None:
        """Note a step to a state."""
        self.steps.append(step)
        self.sums.append(float(state.sum()))

    def output(self, index: int, integrator: TimeIntegrator) -> None:
        """Note an output."""
        self.outputs.append(len(self.steps))


class Recorder(Observer):
    """Records steps in a trajectory.

    Parameters
    ----------
    trajectory : Trajectory
        Where.
    attempt : callable
        ``Ranks.attempt``.
    reproducible : bool
        Whether every step starts afresh.
    """

    def __init__(
        self, trajectory: Trajectory, attempt: Callable[..., object], reproducible: bool
    ) -> None:
        self._trajectory = trajectory
        self._attempt = attempt
        self._reproducible = reproducible

    def before_step(self, index: int, integrator: TimeIntegrator) -> None:
        """Store the start of a step, if it is wanted."""
        self._main = integrator
        self._attempt(self._trajectory.before_step, index, integrator)
        if self._reproducible:
            integrator.restart_step()

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Note an accepted step, and store what is wanted of it."""
        self._attempt(self._trajectory.record, step, integrator)
        if integrator is not self._main and not last:  # whose own last step was another one
            self._attempt(self._trajectory.keep, step.index, integrator)

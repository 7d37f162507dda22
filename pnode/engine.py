"""Forward and backward sweeps on pooled PETSc objects; no autograd graph here.

A sweep takes an integrator from the pool and gives it back, so solves may nest, and several
forwards may be alive at once: what belongs to one forward lives in its :class:`Run`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from mpi4py import MPI

from pnode import tolerances, vectors
from pnode.adjoint.choose import choose_schedule, memory_limit
from pnode.adjoint.create import create_adjoint
from pnode.adjoint.disk import DiskFolder
from pnode.adjoint.identity import fingerprint
from pnode.adjoint.nonfinite import check_parameters, refuse_state
from pnode.adjoint.offload import DeviceLevel, Offload
from pnode.adjoint.resume import Progress
from pnode.adjoint.schedule import Adjoint, Advance, RestoreEnd, RestoreSolution
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.store import CheckpointStore
from pnode.adjoint.trajectory import Trajectory
from pnode.checkpointing import Checkpointing
from pnode.dense import DenseAdjoint, DenseOutput
from pnode.devices import place_of
from pnode.errors import ConfigurationError, FieldChanged
from pnode.events import Event, EventLocator
from pnode.evidence import Reads
from pnode.layouts import Layout
from pnode.options import SolverOptions, next_prefix
from pnode.problem import InitialValueProblem
from pnode.ranks import clean_up
from pnode.solution import Ledger, Stats
from pnode.solvers.assemblies import SparsityPattern
from pnode.solvers.bridge import accumulate
from pnode.solvers.compiled import new_compiler
from pnode.solvers.compiled.compiler import Compiler, Wanted
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.fields import FieldCode, compiled_field
from pnode.solvers.compiled.integrator import CompiledIntegrator, Start
from pnode.solvers.create import create_integrator
from pnode.solvers.integrator import (
    DENSE_LIMIT,
    IntegratorSettings,
    TimeIntegrator,
    default_options,
)
from pnode.solvers.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.multistep import TakenOrder
from pnode.solvers.stepping import Step, StepControl, fixed_grid, forward_sweep
from pnode.solvers.symplectic import split_size
from pnode.surroundings import Surroundings
from pnode.vectorfield import VectorField, note_kept, record_all, vector_field
from pnode.vectors import REAL, is_finite

__all__ = ["Engine", "Requests", "Run"]

# Idle integrators kept per solver; a solver called with ever new sizes must not hoard them.
_IDLE_LIMIT = 4


class _Pool:
    """Idle PETSc-owning objects by key."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, Any]] = []

    @contextmanager
    def lease(self, key: Hashable, create: Callable[[], Any]) -> Iterator[Any]:
        """Lend an idle object of this key, or a new one, for one sweep that the caller begins.

        After a failed sweep it is destroyed: PETSc may have left it half way.
        """
        item = self._take(key) or create()
        try:
            yield item
        except BaseException:
            item.end()
            item.destroy()
            raise
        item.end()
        self._idle.append((key, item))
        if len(self._idle) > _IDLE_LIMIT:
            self._idle.pop(0)[1].destroy()

    def _take(self, key: Hashable) -> Any:
        for index, (known, item) in enumerate(self._idle):
            if known == key:
                del self._idle[index]
                return item
        return None

    def close(self) -> None:
        """Destroy all idle objects."""
        while self._idle:
            self._idle.pop()[1].destroy()


@dataclass(frozen=True)
class Requests:
    """What a forward sweep is to do besides integrating.

    Attributes
    ----------
    monitor : callable or None
        ``monitor(step, t, y)`` after every accepted step.
    dense : bool
        Whether steps pass over output times, which are interpolated then.
    event_fn : callable or None
        ``event_fn(t, y)``; the sweep ends where it changes sign.
    event_tol : float
        Tolerance of that root, relative to the length of the step.
    """

    monitor: Callable[[int, float, Any], None] | None = None
    dense: bool = False
    event_fn: Callable[..., Any] | None = None
    event_tol: float = 1e-12


@dataclass
class Run:
    """One forward sweep: what its backward sweeps need.

    Attributes
    ----------
    problem : InitialValueProblem
        The problem solved.
    stats : Stats
        Its ledger.
    settings : IntegratorSettings
        Of the integrator that did it.
    trajectory : Trajectory or None
        Steps and checkpoints; None without gradients.
    used : list of bool
        For each parameter, whether the vector field's first evaluation used it.
    dense : DenseOutput or None
        Outputs inside of steps.
    event : Event or None
        What ended the sweep early; ``problem`` then has the times of the outputs it returned.
    reproducible : bool
        Whether every step starts afresh.
    sweep : CompiledSweep or None
        The whole sweep with its checkpoints, compiled, instead of a trajectory.
    codes : tuple of FieldCode
        Of the field and its explicit part, where these are compiled and nothing else.
    surroundings : Surroundings or None
        What f saw besides its arguments; None without gradients.
    reads : Reads or None
        What the compiled graphs of this sweep read, if there are any.
    """

    problem: InitialValueProblem
    stats: Stats
    settings: IntegratorSettings
    trajectory: Trajectory | None = None
    used: list[bool] = field(default_factory=list)
    dense: DenseOutput | None = None
    event: Event | None = None
    reproducible: bool = False
    sweep: CompiledSweep | None = None
    codes: tuple[FieldCode, ...] = ()
    surroundings: Surroundings | None = None
    reads: Reads | None = None

    def field(self, ledger: Ledger) -> VectorField:
        """Return the field for another sweep, without checks of what it uses."""
        problem = replace(self.problem, check_undeclared=False)
        field_ = (
            compiled_field(problem, ledger, self.codes)
            if self.codes
            else vector_field(problem, ledger)
        )
        record_all(field_)
        if self.surroundings is not None:
            for part in (field_, field_.explicit):
                if part is not None:
                    part.suspects = self.surroundings.differences
        return field_


class _Record:
    """Takes down what a forward sweep comes to: outputs, checkpoints, the event.

    Parameters
    ----------
    run : Run
        What to fill in.
    monitor : callable or None
        The user's.
    integrator : TimeIntegrator
        Whose solution is the sweep's.
    locator : EventLocator or None
        Has looked at a step before.
    """

    def __init__(
        self, run: Run, monitor: Any, integrator: TimeIntegrator, locator: EventLocator | None
    ) -> None:
        layout = run.problem.layout
        self._run = run
        self._monitor = monitor
        self._integrator = integrator
        self._locator = locator
        self._layout = layout
        self._attempt = run.problem.ranks.attempt
        self._ys = torch.empty(
            (len(run.problem.times), layout.size), dtype=layout.dtype, device=layout.device
        )
        self._reached = self._taken_up = 0

    @property
    def last(self) -> TimeIntegrator:
        """The integrator that took the last step."""
        return self._integrator if self._locator is None else self._locator.integrator

    def outputs(self) -> torch.Tensor:
        """Return the outputs, shape ``(T, size)``."""
        whole = self._reached == len(self._ys)
        return self._ys if whole else self._ys[: self._reached].clone()

    def output(self, state: torch.Tensor | None = None) -> None:
        """Take the next output: a state given, or the solution as it stands."""
        self._ys[self._reached] = (
            vectors.view(self._integrator.solution) if state is None else state
        )
        self._reached += 1
        if self._run.trajectory is not None:
            self._run.trajectory.mark_output(self._ys[self._reached - 1])

    def output_at(self, index: int) -> None:
        """Take output ``index`` from the solution, unless it was reached in another process."""
        if index >= self._taken_up:
            self.output()

    def take_up(self, progress: Progress) -> None:
        """Begin with what was done in another process."""
        for _, state in progress.outputs:
            self._ys[self._reached] = state
            self._reached += 1
        self._taken_up = self._reached

    def before_step(self, index: int) -> None:
        """Store the start of a step, if it is wanted."""
        if self._run.trajectory is not None:
            self._attempt(self._run.trajectory.before_step, index, self._integrator)
        if self._run.reproducible:
            self._integrator.restart_step()

    def on_step(self, step: Step) -> None:
        """Note an accepted step."""
        run, problem = self._run, self._run.problem
        event = None if self._locator is None else self._locator.event
        if run.trajectory is not None:
            self._attempt(run.trajectory.record, step, self.last)
        if run.dense is not None:
            for state in run.dense.after_step(step, self.last, event is not None):
                self.output(state)
        if event is not None:
            run.event = event
            run.problem = replace(problem, times=(*problem.times[: self._reached], event.time))
            self.output()
        if self._monitor is not None:
            state = vectors.copy_out(self._integrator.solution, self._layout.dtype)
            self._attempt(
                self._monitor,
                step.index + 1, problem.direction * step.end, self._layout.unflatten(state),
            )  # fmt: skip


def _itself(folder: DiskFolder) -> DiskFolder:
    return folder


class _Repeated:
    """Repeats recorded steps, on an integrator leased when the first is wanted.

    Parameters
    ----------
    engine : Engine
        Lends the integrator.
    run : Run
        Whose steps.
    y0 : Tensor
        Flat initial state.

    Attributes
    ----------
    integrator : TimeIntegrator or None
        Once there is one.
    """

    def __init__(self, engine: Engine, run: Run, y0: torch.Tensor) -> None:
        self._engine = engine
        self._run = run
        self._y0 = y0
        self._lease = ExitStack()
        self.integrator: TimeIntegrator | None = None

    def __enter__(self) -> _Repeated:
        return self

    def __exit__(self, *error: Any) -> Any:
        self._count()
        return self._lease.__exit__(*error)

    def _count(self) -> None:
        if self.integrator is not None:
            newton, krylov = self.integrator.iterations()
            self._run.stats.backward.newton += newton
            self._run.stats.backward.krylov += krylov

    def restart(self, step: int, state: torch.Tensor) -> None:
        """Stand at the start of a step."""
        run = self._run
        assert run.trajectory is not None
        if self.integrator is None:
            field_ = run.field(run.stats.backward)
            # BDF's Newton method aims at the tolerances of adaptive steps.
            adaptive = run.settings.adaptive and run.settings.method.ts_type == "python"
            self._take(adaptive, field_)
            if step == 0:
                return
        assert self.integrator is not None
        self.integrator.restore((state,))

    def _take(self, adaptive: bool, field_: VectorField) -> None:
        settings = replace(self._run.settings, adaptive=adaptive)
        lease = self._engine.integrator(settings, field_, self._y0)
        self.integrator = self._lease.enter_context(lease)

    def advance(self, step: int) -> None:
        """Repeat a step from where the integrator stands."""
        run = self._run
        assert run.trajectory is not None and self.integrator is not None
        recorded = run.trajectory.steps[step]
        order = recorded.order
        if isinstance(order, TakenOrder) and order.length != recorded.length:
            # Shortened to an event, on an integrator without error control.
            history = self.integrator.history
            self._count()
            self._take(False, run.field(run.stats.backward))
            self.integrator.restore(history)
        if run.reproducible:
            self.integrator.restart_step()
        with torch.no_grad():
            outcome = self.integrator.attempt(
                recorded.start, recorded.length, step, recorded.order, recorded.end
            )
        if outcome.error is not None:
            raise outcome.error
        run.stats.backward.recomputed += 1


@dataclass(frozen=True, eq=False)
class Engine:
    """Method, tolerances and options of a solver, and its pool of PETSc objects.

    Attributes
    ----------
    method : Method
        Row of the table.
    control : StepControl
        How steps are chosen.
    jacobian : {"auto", "matrix-free", "dense", "block", "sparse"}
        How implicit methods get Jacobians.
    jacobian_options : JacobianOptions
        How these are preconditioned and reused.
    petsc_options : dict
        The user's options.
    checkpointing : Checkpointing
        What checkpoints may take.
    comm : mpi4py.MPI.Intracomm
        Ranks that share the state.
    exchange : Layout or None
        Of a state with ghost cells.
    prefix : str
        Options prefix of all its PETSc objects.
    compile : bool
        Whether steps are compiled where that is possible.
    compiler : Compiler
        Compiles, and keeps what it has made.
    """

    method: Method
    control: StepControl
    jacobian: str
    petsc_options: dict[str, Any]
    jacobian_options: JacobianOptions = field(default_factory=JacobianOptions)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    comm: Any = field(default_factory=lambda: MPI.COMM_SELF)
    exchange: Layout | None = None
    prefix: str = field(default_factory=next_prefix)
    compile: bool = False
    _pool: _Pool = field(default_factory=_Pool, init=False)
    compiler: Compiler = field(default_factory=new_compiler, init=False)
    _known_settings: dict[Hashable, IntegratorSettings] = field(default_factory=dict, init=False)
    _options: dict[Hashable, SolverOptions] = field(default_factory=dict, init=False)
    _patterns: dict[Hashable, SparsityPattern] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Destroy the pooled PETSc objects with the engine, not whenever they are collected."""
        weakref.finalize(self, self._pool.close)

    def __reduce__(self) -> Any:
        """Copies and pickles take the configuration along, not the PETSc objects.

        They are solvers of their own, numbered where and when they come to be.
        """
        return _another, (
            self.method, self.control, self.jacobian, self.petsc_options, self.jacobian_options,
            self.checkpointing, self.comm, self.exchange, self.compile,
        )  # fmt: skip

    def __deepcopy__(self, memo: Any) -> Engine:
        """Copies share the communicator and the layout, which belong to the process."""
        make, (*settings, comm, exchange, compiled) = self.__reduce__()
        return make(*deepcopy(settings, memo), comm, exchange, compiled)

    @property
    def color_count(self) -> int:
        """Products per sparse Jacobian, 0 as long as there is none."""
        given = [self.jacobian_options.pattern] if self.jacobian_options.pattern else []
        patterns = [*given, *self._patterns.values()]
        return max((pattern.color_count for pattern in patterns), default=0)

    def forward(
        self,
        problem: InitialValueProblem,
        y0: torch.Tensor,
        keep: bool,
        requests: Requests = Requests(),
    ) -> tuple[torch.Tensor, Run]:
        """Integrate. Collective.

        Parameters
        ----------
        problem : InitialValueProblem
            What to solve.
        y0 : Tensor
            Flat initial state.
        keep : bool
            Whether a backward sweep may follow.
        requests : Requests
            Monitor, dense output, event.

        Returns
        -------
        ys : Tensor
            Shape ``(T, size)``, y0's dtype; fewer rows after an event, whose state is the last.
        run : Run
            For the backward sweep.
        """
        run = Run(problem, Stats(), self._settings(problem))
        if keep:
            run.surroundings = Surroundings(
                (problem.function, problem.explicit), problem.compute or problem.layout.device
            )
        with problem.ranks.together():
            outputs = self._forward(run, y0, keep, requests)
        note_kept(run.stats.ram_bytes + run.stats.tape_bytes)
        return outputs, run

    def _forward(self, run: Run, y0: torch.Tensor, keep: bool, requests: Requests) -> torch.Tensor:
        problem = run.problem
        field_ = vector_field(problem, run.stats)
        if keep:
            record_all(field_)
        start: Start | None = None
        alone = not problem.ranks.parallel and self.exchange is None
        if self.compile and alone and len(problem.times) > 1:
            found = self.compiler.begin(field_, y0, self._wanted(run, y0, field_, keep, requests))
            if keep:
                run.reads = Reads(found.captured)
            if found.sweep is not None:
                outputs = found.sweep.forward(run.stats)
                if outputs is not None:
                    if found.start is not None:
                        self.solver_options(run.settings).warn_unused()
                    run.sweep, run.used = found.sweep, field_.used
                    return outputs
            start, run.codes = found.start, found.codes
            if start is not None:
                run.settings = replace(run.settings, graphs=start.graphs)
            if run.codes:
                used, field_ = field_.used, compiled_field(problem, run.stats, run.codes)
                field_.used[:] = used
                if keep:
                    record_all(field_)
        if keep:
            run.trajectory = self._trajectory(run, requests, y0)
            # What one-step methods carry over from the step before; the others have the same bits.
            fresh = self.method.ts_type in ("rk", "dirk") and not self.method.same_bits
            run.reproducible = self.checkpointing.reproducible and fresh
        with ExitStack() as leases, self.integrator(run.settings, field_, y0) as integrator:
            if start is not None:
                assert isinstance(integrator, CompiledIntegrator)
                integrator.know_slope(start)
            if run.trajectory is not None:
                leases.enter_context(run.trajectory.forward())
                run.trajectory.tapes &= start is None
                if run.settings.place.on_host:  # numbers, which a device would have to wait for
                    integrator.note_values()
                integrator.make_graphs(run.trajectory.tapes)
            locator: EventLocator | None = None
            if requests.event_fn is not None:
                trial = replace(run.settings, adaptive=False)
                locator = EventLocator(
                    requests.event_fn, problem, requests.event_tol, integrator,
                    lambda: leases.enter_context(self.integrator(trial, field_, y0)), field_,
                )  # fmt: skip
            times = problem.times
            if requests.dense:
                run.dense = DenseOutput(times, integrator, field_, keep)
                times = (times[0], *times[1:][-1:])  # those that steps are to hit
            record = _Record(run, requests.monitor, integrator, locator)
            done: list[Step] = []
            progress = None if run.trajectory is None else run.trajectory.progress
            if progress is not None and progress.start is not None:
                done = progress.steps
                run.stats.steps = len(done)
                record.take_up(progress)
                integrator.restore((progress.start,))
            forward_sweep(
                integrator, field_, times, self.control, run.stats, record.on_step,
                record.output_at, locator.after_step if locator is not None else None,
                record.before_step, done,
            )  # fmt: skip
            if run.trajectory is not None:
                problem.ranks.attempt(run.trajectory.finish, record.last)
            for newton, krylov in (each.iterations() for each in {integrator, record.last}):
                run.stats.newton += newton
                run.stats.krylov += krylov
            run.used = field_.used
        integrator.options.warn_unused()
        return record.outputs()

    def _wanted(
        self, run: Run, y0: torch.Tensor, field_: VectorField, keep: bool, requests: Requests
    ) -> Wanted:
        """Return what decides about machine code."""
        watched = requests.event_fn is not None or requests.monitor is not None
        return Wanted(
            run.settings, self.solver_options(run.settings), self.control, self.checkpointing,
            keep, requests.dense, requests.dense or watched,
            lambda settings: self.integrator(settings, field_, y0),
        )  # fmt: skip

    def backward(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor, dict[int, float]]:
        """Take the discrete adjoint of a forward sweep. Collective.

        Parameters
        ----------
        run : Run
            The forward sweep.
        y0 : Tensor
            Its initial state, flat, to repeat it from when its checkpoints are gone.
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``.
        wants_times : bool
            Whether the derivatives with respect to interpolated outputs' times are wanted.

        Returns
        -------
        state : Tensor
            Derivative with respect to y0, shape ``(size,)``, PETSc's precision.
        parameters : list of Tensor or None
            One per parameter, PETSc's precision.
        initial : Tensor
            The part of ``state`` that came through the flow, without the first output's own
            cotangent: what the derivative with respect to t_0 needs.
        times : dict
            For each interpolated output, the derivative with respect to its time.
        """
        assert run.surroundings is not None
        changed = None if run.reads is None else run.reads.changed()
        if changed is not None:
            raise FieldChanged(
                f"a tensor of shape {tuple(changed.shape)} that the vector field uses was written "
                f"into after the forward sweep{run.surroundings.differences()}: take the gradient "
                "before it changes, or let the solve use a copy",
                method=self.method.name,
            )
        with run.surroundings.restored():
            if run.sweep is not None:
                return *run.sweep.reverse(cotangents, run.stats.backward), {}
            return self._backward(run, y0, cotangents, wants_times)

    def _backward(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor, dict[int, float]]:
        """Take the adjoint of recorded steps; see :meth:`backward`."""
        problem, ledger = run.problem, run.stats.backward
        field_ = run.field(ledger)
        with problem.ranks.together(agree=False):
            state, parameters, initial, times = self._sweep_back(
                run, field_, y0, cotangents, wants_times
            )
        # The one reduction of a backward sweep, which also tells whether a rank has failed.
        parameters = problem.ranks.sum_gradients(parameters, field_.parameters)
        return state, parameters, initial, times

    def _sweep_back(
        self,
        run: Run,
        field_: VectorField,
        y0: torch.Tensor,
        cotangents: torch.Tensor,
        wants_times: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor, dict[int, float]]:
        trajectory, problem = run.trajectory, run.problem
        assert trajectory is not None
        if not trajectory.ready:
            self._repeat(run, y0)
        trajectory.ready = False
        wanted = bool(field_.parameters)

        with self.adjoint(run.settings, wanted) as adjoint:
            adjoint.begin(field_)
            dense = DenseAdjoint(run.dense, trajectory.steps, field_, cotangents, wants_times)
            with torch.enable_grad():  # here once, instead of at each stage
                initial = self._reverse(run, adjoint, cotangents, dense, y0)
            state = adjoint.state_gradient()
            parameters = adjoint.parameter_gradients(len(field_.parameters))
            accumulate(parameters, tuple(dense.parameters), 1.0)
            if run.settings.place.on_host and is_finite(cotangents):
                first = trajectory.steps[:1] or [Step(0, problem.times[0], 0.0, problem.times[0])]
                problem.ranks.attempt(
                    check_parameters, parameters, self.method.name, problem.direction, first[0]
                )
        return state, parameters, initial, dense.times

    def _reverse(
        self,
        run: Run,
        adjoint: AdjointStepper,
        cotangents: torch.Tensor,
        dense: DenseAdjoint,
        y0: torch.Tensor,
    ) -> torch.Tensor:
        """Execute the schedule's reverse actions, adding cotangents where outputs were."""
        trajectory, ledger = run.trajectory, run.stats.backward
        assert trajectory is not None
        waiting = list(enumerate(trajectory.outputs))
        finite = run.settings.place.on_host and is_finite(cotangents)
        active = False  # until the first non-zero cotangent, lambda is zero and stays it
        ranks = run.problem.ranks
        attempt = ranks.attempt
        nonzero = cotangents.ne(0).any(dim=1).tolist()
        if ranks.parallel:  # what one rank needs all take part in
            nonzero = [True] * len(nonzero)
        for index in run.dense.interpolated if run.dense is not None else ():
            nonzero[index] = False  # not a state at the end of a step

        def add_outputs(after: int) -> None:
            nonlocal active
            while waiting and waiting[-1][1] == after and waiting[-1][0] > 0:
                index, _ = waiting.pop()
                if nonzero[index]:
                    active = True
                    adjoint.add(cotangents[index])
            inside = dense.at(after, stages, trajectory.tape)
            if inside is not None:
                active = True
                adjoint.add(inside)

        def restored(restore: Callable[..., Any], *arguments: Any) -> Any:
            """Return a state; y0 for one that cannot be had, in a sweep that is lost anyway."""
            state = attempt(restore, *arguments)
            return y0.to(REAL) if state is None else state

        def stages(step: int) -> tuple[torch.Tensor, ...]:
            found = attempt(trajectory.stages, step, repeated.integrator)
            if found is None:
                return adjoint.placeholder(trajectory.steps[step], y0.to(REAL))
            return found

        with _Repeated(self, run, y0) as repeated:
            add_outputs(len(trajectory.steps))
            number = len(trajectory.steps)
            for action in trajectory.schedule.reverse(number) if number else ():
                match action:
                    case Advance(step):
                        repeated.advance(step)
                    case RestoreSolution(step):
                        state = y0 if step == 0 else restored(trajectory.solution, step)
                        repeated.restart(step, state)
                    case RestoreEnd(step):
                        repeated.restart(step + 1, restored(trajectory.end, step))
                    case Adjoint(step):
                        if active:
                            ranks.where = {
                                "time": run.problem.direction * trajectory.steps[step].start,
                                "step": step, "method": run.settings.method.name,
                            }  # fmt: skip
                            adjoint.load(
                                stages(step), trajectory.tape(step), trajectory.evidence[step]
                            )
                            adjoint.step(trajectory.steps[step], ledger)
                            if finite and not adjoint.is_finite():
                                attempt(
                                    refuse_state, run.field(Ledger()), trajectory.steps[step],
                                    stages(step), ranks.where,
                                )  # fmt: skip
                        add_outputs(step)
                        trajectory.forget_live(step)
                    case _:
                        attempt(trajectory.execute, action, repeated.integrator)
        trajectory.clear()
        initial = adjoint.state_gradient()
        if nonzero[0]:
            adjoint.add(cotangents[0])
        return initial

    def _repeat(self, run: Run, y0: torch.Tensor) -> None:
        """Repeat the forward sweep with the recorded steps, to store its checkpoints again."""
        trajectory = run.trajectory
        assert trajectory is not None
        trajectory.clear()
        with _Repeated(self, run, y0) as repeated:
            repeated.restart(0, y0)
            assert repeated.integrator is not None
            attempt = run.problem.ranks.attempt
            for step in trajectory.steps:
                attempt(trajectory.before_step, step.index, repeated.integrator)
                repeated.advance(step.index)
                attempt(trajectory.record, step, repeated.integrator)
            attempt(trajectory.finish, repeated.integrator)

    def _trajectory(self, run: Run, requests: Requests, y0: torch.Tensor) -> Trajectory:
        """Return an empty trajectory with the schedule that the memory allows."""
        chosen, control = self.checkpointing, self.control
        times = run.problem.times
        times = (times[0], *times[1:][-1:]) if requests.dense else times
        grid = fixed_grid(times, control, run.problem.resolution)
        steps = None if grid is None or requests.event_fn is not None else grid.total
        state_bytes = run.problem.largest * REAL.itemsize
        schedule = choose_schedule(
            self.method, steps, state_bytes, memory_limit(chosen, self.method, state_bytes),
            chosen.store, chosen.disk is not None,
        )  # fmt: skip
        folder: Callable[[], DiskFolder] | None = None
        progress = None
        if chosen.resume is not None:
            assert chosen.disk is not None
            if not self.method.restarts or requests.event_fn is not None or requests.dense:
                raise ConfigurationError(
                    f"resume={chosen.resume!r} is not for BDF, event_fn and dense=True: they go "
                    "on from more than one state"
                )
            progress = Progress(chosen.disk, chosen.resume, self._identity(run, y0))
            folder = partial(_itself, progress)
        elif chosen.disk is not None:
            folder = partial(DiskFolder, chosen.disk)
        level = None
        if chosen.device_bytes is not None:
            device = run.settings.place.device
            if run.settings.place.on_host:
                raise ConfigurationError(
                    f"device_memory={chosen.device_bytes} is for a state on a device, and this one "
                    "is on the host: use memory=, or y0.cuda() without device_state='host'"
                )
            level = DeviceLevel(chosen.device_bytes, Offload(device))
        tape_limit = self._tape_limit()
        store = CheckpointStore(run.stats, chosen.bytes, folder, level, tape_limit)
        return Trajectory(schedule, store, progress, tape_limit > 0, steps)

    def _tape_limit(self) -> float:
        """Return how many bytes of graphs may be kept.

        None beside device_memory, which they would fill and cannot be moved from. Where ghost cells
        are exchanged, a step's graphs are kept on all ranks or none: evaluating f again is
        collective. Their sizes differ between the ranks, so no limit must count.
        """
        chosen = self.checkpointing
        if not self.method.tapes or chosen.device_bytes is not None:
            return 0
        if self.exchange is None or chosen.tape_limit == 0:
            return chosen.tape_limit
        if chosen.store == "tape" and chosen.bytes is not None:
            raise ConfigurationError(
                f"store='tape' with memory={chosen.memory!r} is not supported for layout=: the "
                "ranks would keep different graphs; drop memory=, or use store='auto'"
            )
        return math.inf if chosen.store == "tape" else 0

    def _identity(self, run: Run, y0: torch.Tensor) -> dict[str, str]:
        """Return what tells one sweep from another."""
        problem, options = run.problem, self.jacobian_options
        preconditioner = options.preconditioner
        facts = {
            "method": self.method.name, "steps": vars(self.control), "times": problem.times,
            "direction": problem.direction, "form": problem.form, "jacobian": self.jacobian,
            "reproducible": self.checkpointing.reproducible,
            "shapes": problem.layout.shapes, "f": problem.function, "explicit": problem.explicit,
            "mass": None if problem.mass is None else vars(problem.mass),
            "jacobian_reuse": options.reuse,
            "preconditioner": getattr(preconditioner, "__dict__", preconditioner),
            "petsc_options": self.petsc_options,
            "PETSc options": self.solver_options(run.settings).values,
        }  # fmt: skip
        return fingerprint(facts, (y0, *problem.parameters, *problem.frozen))

    @contextmanager
    def adjoint(self, settings: IntegratorSettings, parameters: bool) -> Iterator[AdjointStepper]:
        """Lend an adjoint."""

        def create() -> AdjointStepper:
            clean_up(self.comm)
            options = self.solver_options(settings, adjoint=True)
            return create_adjoint(settings, options, parameters)

        with self._pool.lease(("adjoint", settings, parameters), create) as adjoint:
            yield adjoint

    @contextmanager
    def integrator(
        self, settings: IntegratorSettings, field_: VectorField, y0: torch.Tensor
    ) -> Iterator[TimeIntegrator]:
        """Lease a forward integrator that stands at the initial state."""

        def create() -> TimeIntegrator:
            clean_up(self.comm)  # all ranks create together
            return create_integrator(settings, self.solver_options(settings))

        with self._pool.lease(("forward", settings), create) as integrator:
            integrator.begin(field_, y0.detach(), field_.problem.times[0])
            yield integrator

    def _settings(self, problem: InitialValueProblem) -> IntegratorSettings:
        key = (problem.layout, problem.form, problem.largest, problem.distribution)
        known = self._known_settings.get(key)
        return self._new_settings(problem, key) if known is None else known

    def _new_settings(self, problem: InitialValueProblem, key: Hashable) -> IntegratorSettings:
        layout, jacobian = problem.layout, self.jacobian
        if jacobian == "auto":
            small = problem.largest <= DENSE_LIMIT and self.exchange is None
            jacobian = "dense" if small else "matrix-free"
        rtol, atol = tolerances.resolve(self.control.rtol, self.control.atol, layout)
        settings = IntegratorSettings(
            self.method, layout.size, layout.dtype,
            adaptive=self.control.step_size is None,
            rtol=rtol, atol=atol, max_step=self.control.max_step,
            jacobian=jacobian, controller=self.control.controller, form=problem.form,
            split=split_size(self.method, layout),
            jacobian_options=replace(
                self.jacobian_options, by_rank=problem.ranks.parallel
            ).for_layout(jacobian, layout, self._patterns, self.exchange),
            distribution=problem.distribution, comm=self.comm,
        )  # fmt: skip
        # The option vec_type chooses between PETSc's types on a device.
        vec_type = self.solver_options(settings).take("vec_type")
        settings = replace(settings, place=place_of(layout.device, vec_type))
        # What is detected during a solve, and the values of tensors, may be others next time.
        if jacobian == "dense" and isinstance(rtol, float) and isinstance(atol, float):
            self._known_settings[key] = settings
        return settings

    def solver_options(self, settings: IntegratorSettings, adjoint: bool = False) -> SolverOptions:
        """Return the PETSc options of an integrator or an adjoint."""
        key = (settings.adaptive, settings.jacobian, settings.dtype, adjoint)
        if key not in self._options:
            defaults = default_options(
                settings.method, settings.adaptive, settings.jacobian, settings.dtype, adjoint,
                settings.controller, settings.jacobian_options, settings.comm.size,
            )  # fmt: skip
            # Adaptive solvers repeat steps, and look for events, on an integrator without control.
            forward = not adjoint and settings.adaptive == (self.control.step_size is None)
            self._options[key] = SolverOptions(self.prefix, self.petsc_options, defaults, forward)
        return self._options[key]


def _another(*settings: Any) -> Engine:
    """Return an engine of the same settings, with the next number."""
    *others, compiled = settings
    make: Any = Engine
    return make(*others, next_prefix(), compiled)

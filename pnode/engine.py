"""Forward and backward sweeps on pooled PETSc objects; no autograd graph here.

A sweep takes an integrator from the pool and gives it back, so solves may nest, and several
forwards may be alive at once: what belongs to one forward lives in its :class:`Run`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pnode import vectors
from pnode.adjoint.create import create_adjoint
from pnode.adjoint.schedule import Adjoint, DiscardStages, RestoreStages, StoreEverything
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.trajectory import Trajectory
from pnode.options import SolverOptions, next_prefix
from pnode.problem import InitialValueProblem
from pnode.solution import Stats
from pnode.solvers.create import create_integrator
from pnode.solvers.integrator import (
    DENSE_LIMIT,
    IntegratorSettings,
    TimeIntegrator,
    default_options,
)
from pnode.solvers.methods import Method
from pnode.solvers.stepping import Step, StepControl, forward_sweep
from pnode.vectorfield import VectorField, vector_field

__all__ = ["Engine", "Run"]

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
    """

    problem: InitialValueProblem
    stats: Stats
    settings: IntegratorSettings
    trajectory: Trajectory | None = None
    used: list[bool] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Engine:
    """Method, tolerances and options of a solver, and its pool of PETSc objects.

    Attributes
    ----------
    method : Method
        Row of the table.
    control : StepControl
        How steps are chosen.
    jacobian : {"auto", "matrix-free", "dense"}
        How implicit methods get Jacobians.
    petsc_options : dict
        The user's options.
    prefix : str
        Options prefix of all its PETSc objects.
    """

    method: Method
    control: StepControl
    jacobian: str
    petsc_options: dict[str, Any]
    prefix: str = field(default_factory=next_prefix)
    _pool: _Pool = field(default_factory=_Pool, init=False)
    _options: dict[Hashable, SolverOptions] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Destroy the pooled PETSc objects with the engine, not whenever they are collected."""
        weakref.finalize(self, self._pool.close)

    def __reduce__(self) -> Any:
        """Copies and pickles take the configuration along, not the PETSc objects."""
        return Engine, (self.method, self.control, self.jacobian, self.petsc_options)

    def forward(
        self,
        problem: InitialValueProblem,
        y0: torch.Tensor,
        keep: bool,
        monitor: Callable[[int, float, Any], None] | None = None,
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
        monitor : callable, optional
            ``monitor(step, t, y)`` after every accepted step.

        Returns
        -------
        ys : Tensor
            Shape ``(T, size)``, y0's dtype.
        run : Run
            For the backward sweep.
        """
        layout = problem.layout
        run = Run(problem, Stats(), self._settings(layout.size, layout.dtype, problem.form))
        ys = torch.empty(
            (len(problem.times), layout.size), dtype=layout.dtype, device=layout.device
        )
        field_ = vector_field(problem, run.stats)
        if keep:
            run.trajectory = Trajectory(StoreEverything(), run.stats)
        with self._integrator(run.settings, field_, y0) as integrator:

            def on_output(index: int) -> None:
                ys[index] = vectors.view(integrator.solution)
                if run.trajectory is not None:
                    run.trajectory.mark_output()

            def on_step(step: Step) -> None:
                if run.trajectory is not None:
                    run.trajectory.record(step, integrator)
                if monitor is not None:
                    state = layout.unflatten(vectors.copy_out(integrator.solution, layout.dtype))
                    monitor(step.index + 1, problem.direction * step.end, state)

            forward_sweep(
                integrator, field_, problem.times, self.control, run.stats, on_step, on_output
            )
            run.stats.newton, run.stats.krylov = integrator.iterations()
            run.used = field_.used
        integrator.options.warn_unused()
        return ys, run

    def backward(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
        """Take the discrete adjoint of a forward sweep. Collective.

        Parameters
        ----------
        run : Run
            The forward sweep.
        y0 : Tensor
            Its initial state, flat, to repeat it from when its checkpoints are gone.
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``.

        Returns
        -------
        state : Tensor
            Derivative with respect to y0, shape ``(size,)``, PETSc's precision.
        parameters : list of Tensor or None
            One per parameter, PETSc's precision.
        initial : Tensor
            The part of ``state`` that came through the flow, without the first output's own
            cotangent: what the derivative with respect to t_0 needs.
        """
        trajectory = run.trajectory
        assert trajectory is not None
        ledger = run.stats.backward
        problem = replace(run.problem, check_undeclared=False)
        field_ = vector_field(problem, ledger)
        if not trajectory.complete:
            self._repeat(run, vector_field(problem, ledger), y0)
        wanted = bool(field_.parameters)

        def create() -> AdjointStepper:
            options = self._solver_options(run.settings, adjoint=True)
            return create_adjoint(run.settings, options, wanted)

        with self._pool.lease(("adjoint", run.settings, wanted), create) as adjoint:
            adjoint.begin(field_)
            with torch.enable_grad():  # here once, instead of at each stage
                initial = self._reverse(run, adjoint, cotangents)
            state = adjoint.state_gradient()
            parameters = adjoint.parameter_gradients(len(field_.parameters))
        return state, parameters, initial

    def _reverse(self, run: Run, adjoint: AdjointStepper, cotangents: torch.Tensor) -> torch.Tensor:
        """Execute the schedule's reverse actions, adding cotangents where outputs were."""
        trajectory, ledger = run.trajectory, run.stats.backward
        assert trajectory is not None
        waiting = list(enumerate(trajectory.outputs))
        active = False  # until the first non-zero cotangent, lambda is zero and stays it
        nonzero = cotangents.ne(0).any(dim=1).tolist()

        def add_outputs(after: int) -> None:
            nonlocal active
            while waiting and waiting[-1][1] == after and waiting[-1][0] > 0:
                index, _ = waiting.pop()
                if nonzero[index]:
                    active = True
                    adjoint.add(cotangents[index])

        add_outputs(len(trajectory.steps))
        for action in trajectory.schedule.reverse(len(trajectory.steps)):
            if isinstance(action, RestoreStages) and active:
                adjoint.load(trajectory.restore(action.step))
            elif isinstance(action, Adjoint):
                if active:
                    adjoint.step(trajectory.steps[action.step], ledger)
                add_outputs(action.step)
            elif isinstance(action, DiscardStages):
                trajectory.discard(action.step)
        initial = adjoint.state_gradient()
        if nonzero[0]:
            adjoint.add(cotangents[0])
        return initial

    def _repeat(self, run: Run, field_: VectorField, y0: torch.Tensor) -> None:
        """Repeat the forward sweep with the recorded steps, to store its checkpoints again."""
        trajectory = run.trajectory
        assert trajectory is not None
        trajectory.clear()
        settings = replace(run.settings, adaptive=False)
        with self._integrator(settings, field_, y0) as integrator:
            for step in trajectory.steps:
                outcome = integrator.attempt(step.start, step.length, step.index)
                if outcome.error is not None:
                    raise outcome.error
                trajectory.record(step, integrator)
                run.stats.backward.recomputed += 1
            newton, krylov = integrator.iterations()
            run.stats.backward.newton += newton
            run.stats.backward.krylov += krylov

    @contextmanager
    def _integrator(
        self, settings: IntegratorSettings, field_: VectorField, y0: torch.Tensor
    ) -> Iterator[TimeIntegrator]:
        """Lease a forward integrator that stands at the initial state."""

        def create() -> TimeIntegrator:
            return create_integrator(settings, self._solver_options(settings))

        with self._pool.lease(("forward", settings), create) as integrator:
            integrator.begin(field_, y0.detach(), field_.problem.times[0])
            yield integrator

    def _settings(self, size: int, dtype: torch.dtype, form: str) -> IntegratorSettings:
        jacobian = self.jacobian
        if jacobian == "auto":
            jacobian = "dense" if size <= DENSE_LIMIT else "matrix-free"
        return IntegratorSettings(
            self.method, size, dtype,
            adaptive=self.control.step_size is None,
            rtol=self.control.rtol, atol=self.control.atol, max_step=self.control.max_step,
            jacobian=jacobian, form=form,
        )  # fmt: skip

    def _solver_options(self, settings: IntegratorSettings, adjoint: bool = False) -> SolverOptions:
        key = (settings.adaptive, settings.jacobian, settings.dtype, adjoint)
        if key not in self._options:
            defaults = default_options(
                settings.method, settings.adaptive, settings.jacobian, settings.dtype, adjoint
            )
            self._options[key] = SolverOptions(self.prefix, self.petsc_options, defaults)
        return self._options[key]

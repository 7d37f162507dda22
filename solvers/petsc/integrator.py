"""One PETSc TS, driven step by step."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import NonlinearSolveFailed, SolveError
from pnode.base.evidence import project
from pnode.base.options import PETSc, SolverOptions, log_stage
from pnode.base.ranks import ALONE, CURABLE
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc import failures
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.guesses import GuessedSteps
from pnode.solvers.petsc.judgement import Judge
from pnode.solvers.petsc.library import before_each_stage, stage_vectors
from pnode.solvers.petsc.outcomes import StepOutcome
from pnode.solvers.petsc.second_attempts import backtracks, with_backtracking, with_new_jacobians
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.petsc.tolerances import Rejection
from pnode.solvers.petsc.ts import build_ts

__all__ = ["StepOutcome", "TimeIntegrator"]


class TimeIntegrator:
    """A forward TS, reused from sweep to sweep.

    Parameters
    ----------
    settings : IntegratorSettings
        Method, size and tolerances.
    options : SolverOptions
        PETSc options.

    Attributes
    ----------
    proposes_absolute : bool
        Whether proposed steps do not depend on the length of the last one.
    failure_factor : float
        What a step is shortened by after a failed nonlinear solve or a non-finite vector field,
        which leave no error estimate to go by.
    first_order : int
        Order of the first step.
    whole_graphs : bool
        Whether :meth:`kept_graphs` has those of slopes that only interpolants need; until the next
        sweep.
    """

    proposes_absolute = False
    failure_factor = 0.25
    whole_graphs = False
    interpolates = True  # and evaluates nothing for it

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        self.first_order = settings.method.first_order
        self.settings = settings
        self.options = options
        method = settings.method
        self.bridge = self._create_bridge()
        self.ts = build_ts(settings, options, self.bridge, forward=True)
        self.solution = self.ts.getSolution()
        kept = method.implicit and method.keeps_stages and not method.coupled
        self._kept = stage_vectors(self.ts) if kept else []
        self._start = self.solution.duplicate() if settings.adaptive else None
        self._guesses = GuessedSteps(self.ts, self.bridge.jacobian, options)
        self._verdict = Judge.of(self.ts, settings, options, self.bridge)
        self._rolled_back = False
        self._starts = method.carries_slope
        self._stage_callback = (
            before_each_stage(self.ts, self.bridge.stage_begins)
            if method.ts_type in ("dirk", "arkimex")
            else None
        )
        if self._starts or settings.form == "imex_mass":
            # PETSc solves for DIRK's initial slope from whatever slope it had last.
            self.ts.getSNES().setInitialGuess(self._guess_slope)
        self._backtracks = backtracks(settings, options)
        #: Where stages are between the ends of a step, in units of its length.
        scheme = method.scheme
        nodes = () if scheme is None else scheme.c if method.linearly_implicit else scheme.nodes
        self._inner = tuple(c for c in nodes if c not in (0.0, 1.0))
        self._iterations = (0, 0)
        self._direction = 1.0
        self.ranks = ALONE
        self._rejection = Rejection(self.ts, settings)
        if settings.parallel and settings.adaptive:
            self.bridge.reject = weakref.WeakMethod(self._rejection.ask)

    def _create_bridge(self) -> Bridge:
        method = self.settings.method
        return Bridge(
            keep=0 if method.implicit else method.stages,
            check=self.settings.adaptive,
        )

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep, or go on, from state ``u`` at time ``s``. Collective."""
        log_stage("pnode forward").push()
        self.options.begin_sweep(self)
        self.bridge.attach(field)
        self.ranks = field.problem.ranks
        self._direction = field.problem.direction
        vectors.copy_in(self.solution, u)
        self.ts.setTime(s)
        self.ts.setStepNumber(step_index)
        self.ts.restartStep()
        if self._verdict is not None:
            self._verdict.begin()
        self._rolled_back = self.whole_graphs = False
        self._iterations = (self.ts.getSNESIterations(), self.ts.getKSPIterations())

    def check_structure(self) -> None:
        """Compare this sweep's first assembled Jacobian with a product; see ``Jacobian``."""
        if self.bridge.jacobian is not None:
            self.bridge.jacobian.check_structure()

    @property
    def history(self) -> Any:
        """What the next step needs: the solution (see :meth:`restore`)."""
        return (vectors.copy_out(self.solution),)

    def restore(self, history: Any) -> None:
        """Go on from a history, which an integrator of the same method had. Collective."""
        vectors.copy_in(self.solution, history[0])
        TimeIntegrator.restart_step(self)
        self._rolled_back = False

    def restart_step(self) -> None:
        """Let the next step start afresh, without what the last one has left."""
        self.ts.restartStep()
        if self._verdict is not None:
            self._verdict.restart()

    def interpolate(self, s: float) -> torch.Tensor:
        """Return the state at a time in the last step by PETSc's interpolant. Collective."""
        result = self.solution.duplicate()
        self.ts.interpolate(min(s, self.ts.getTime()), result)
        return vectors.copy_out(result)

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self.options.end_sweep(self)
        self.bridge.detach()
        log_stage("pnode forward").pop()

    def _guess_slope(self, snes: Any, guess: Any) -> None:
        """Begin the solve for the initial slope, which PETSc takes for one of a stage."""
        self.bridge.guess_slope(self.solution, guess)

    def iterations(self) -> tuple[int, int]:
        """Newton and Krylov iterations since :meth:`begin`."""
        newton, krylov = self._iterations
        return self.ts.getSNESIterations() - newton, self.ts.getKSPIterations() - krylov

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``. Collective.

        ``order`` is that of the :class:`Step` to be repeated, if any; of one-step methods, whether
        its Jacobian was taken for constant.
        ``end`` is where the step ends, if that is not ``s + step`` rounded.

        Returns
        -------
        StepOutcome
            A rejected attempt leaves the solution as it was (adaptive settings only).

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        ts, bridge = self.ts, self.bridge
        ts.setTime(s)
        ts.setTimeStep(step)
        end = s + step if end is None else end
        bridge.begin_stages((s, *(s + c * step for c in self._inner), end))
        if self._start is not None:
            self.solution.copy(self._start)
        name = self.settings.method.name
        where: dict[str, Any] = {"time": self._direction * s, "step": index, "method": name}
        self.ranks.where = where
        self._forget_notes(s)
        self._guesses.begin(order)
        self._step(where)
        if self._guesses.mistaken:
            self._step_without_guess(s, step, index, where)
        error = self._failure(where)
        if self.ranks.parallel and (error is not None or ts.getConvergedReason() < 0):
            error = self._settle(error)
        if error is not None and bridge.jacobian is not None:
            bridge.jacobian.renew()
            if bridge.jacobian.reused and self._may_repeat(error):
                error = self._try_newton(s, step, where)
        if self._backtracks and isinstance(error, NonlinearSolveFailed):
            again = partial(self._repeat, s, step, where)
            error = with_backtracking(ts.getSNES(), bridge.jacobian, again)
        if error is None and ts.getConvergedReason() >= 0:
            self._rolled_back = False
            if self._rejection.wanted:
                self.ranks.fail(SolveError("a step that failed on one rank was accepted", **where))
            return StepOutcome(True, ts.getTimeStep(), order=self._guesses.taken())
        proposed = ts.getTimeStep()
        bridge.nonfinite_time = None
        if self._start is not None:
            # Tell PETSc that its last stage and its history are not to be carried on; it allows
            # that once until a step succeeds.
            if ts.getConvergedReason() >= 0 or not self._rolled_back:
                ts.rollBack()
                self._rolled_back = True
            ts.setStepNumber(index)
            self._start.copy(self.solution)
        elif error is None:
            error = SolveError("PETSc rejected a step whose length is given", **where)
        return StepOutcome(False, proposed, error)

    def _settle(self, error: SolveError | None) -> SolveError | None:
        """Agree on why a step failed: all ranks know that it did. Collective.

        Returns
        -------
        SolveError or None
            What a smaller step may cure; None for a step that was only too long.

        Raises
        ------
        PnodeError
            For anything else that failed on one of the ranks.
        """
        self._rejection.withdraw()
        own = failures.own_error(self.bridge, self.ranks.where)
        if own is not None:
            self.ranks.fail(own)
        found = self.ranks.settle(error)
        if found is None or isinstance(found, CURABLE):
            return found
        raise found from found.__cause__

    def _step_without_guess(self, s: float, step: float, index: int, where: dict[str, Any]) -> None:
        """Repeat a step whose Jacobian was taken for constant, and is not."""
        self._guesses.back(s, step, index)
        self._forget_notes(s)
        self._step(where)

    def _forget_notes(self, s: float) -> None:
        """Forget what was noted before a step at ``s``; its first stage may be the last one."""
        if self.bridge.noted:
            self.bridge.noted = [note for note in self.bridge.noted if note.s == s]

    def _may_repeat(self, error: SolveError) -> bool:
        """Whether a step that has failed may be tried again with new Jacobians."""
        if self._start is None:
            return bool(self.ts.getConvergedReason() < 0)
        # Whether to shorten it is agreed on by all ranks.
        return isinstance(error, NonlinearSolveFailed) and not self.ranks.parallel

    def _try_newton(self, s: float, step: float, where: dict[str, Any]) -> SolveError | None:
        """Repeat a failed step with a new Jacobian at each iterate."""
        jacobian, again = self.bridge.jacobian, partial(self._repeat, s, step, where)
        assert jacobian is not None
        return with_new_jacobians(self.ts.getSNES(), jacobian, self.options, again)

    def _repeat(self, s: float, step: float, where: dict[str, Any]) -> SolveError | None:
        self.ts.setTime(s)
        self.ts.setTimeStep(step)
        self._step(where)
        error = self._failure(where)
        return self._settle(error) if self.ranks.parallel and error is not None else error

    def _step(self, where: dict[str, Any]) -> None:
        if self._starts:
            self.bridge.start_time = self.ts.getTime()
        failure: PETSc.Error | None = None
        try:
            self.ts.step()
        except PETSc.Error as error:
            failure = error
        failures.raise_stored(self.bridge, failure, where)
        if failure is not None:
            raise failures.step_error(failure, where, self.bridge) from failure
        if self._verdict is not None and self.ts.getConvergedReason() >= 0:
            self._rolled_back = False
            self._verdict.look(self._start)

    def _failure(self, where: dict[str, Any]) -> SolveError | None:
        """Look for the failures that PETSc reports and for those that it passes over."""
        method = self.settings.method
        if method.implicit and self.ts.getConvergedReason() < 0:
            snes = self.ts.getSNES()
            if snes.getConvergedReason() < 0:
                return failures.newton_error(snes, where, self.bridge)
        at = self.bridge.first_nonfinite()
        if not self.ranks.parallel:
            finite = math.isfinite(self.solution.norm())
            return (
                failures.nonfinite_error(at, where, self.bridge)
                if at is not None or not finite
                else None
            )
        # What only this rank knows must not change what it does next.
        if not self.settings.adaptive:
            if at is not None or not vectors.is_moderate(vectors.view(self.solution)):
                self.ranks.fail(failures.nonfinite_error(at, where, self.bridge))
            self.bridge.nonfinite_time = None
        return None

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        """Return what the adjoint of the last step needs. Not collective.

        Explicit Runge-Kutta: the stages at which f was evaluated, those very tensors, without the
        last where it is the next step's first. Endpoint theta methods: the states at both ends,
        the first of which is the second of ``previous``, the checkpoint of the step before, if
        there is one. Midpoint form: the stage. DIRK and IMEX: the stages, of which the first and
        last are the states at both ends for some.
        """
        method = self.settings.method
        if not method.implicit:
            stages = tuple(self.bridge.evaluated)
            return Checkpoint(stages[:-1] if method.fsal else stages)
        start, *rest = self._kept
        if previous is not None and method.shares_ends:
            first = previous.stages[-1]
        else:
            first = vectors.copy_out(start)
        return Checkpoint((first, *(vectors.copy_out(vector) for vector in rest)))

    def evidence(self) -> tuple[float, ...]:
        """Return what a backward sweep can tell f by, of the last step. Not collective.

        After :meth:`note_values`. Explicit methods: the projections of the values at the stages of
        :meth:`checkpoint`. Rosenbrock methods, which have no stages there: that of the step's end.
        Others: part, time, and the projections of state and value, at each stage.
        """
        method, bridge = self.settings.method, self.bridge
        if method.linearly_implicit:
            return (project(vectors.view(self.solution)),)
        if not method.implicit:
            found = tuple(bridge.projections or ())
            found = found if len(found) == bridge.evaluated.maxlen else ()
            return found[:-1] if method.fsal else found
        return tuple(number for note in bridge.noted or () for number in note)

    def note_values(self) -> None:
        """From now on note what :meth:`evidence` needs."""
        kind = self.options.values.get("snes_type", "newtonls")
        self.bridge.note_values(ends_evaluated=kind == "newtonls")

    def monitor(self, number: int, s: float) -> None:
        """Let PETSc's monitors look at the solution after ``number`` steps. Collective.

        Raises
        ------
        SolveError
            If one of them fails, as where it cannot write.
        """
        try:
            self.ts.monitor(number, s, self.solution)
        except PETSc.Error as failure:
            time, name = self._direction * s, self.settings.method.name
            error = failures.monitor_error(failure, time=time, step=max(number - 1, 0), method=name)
            if not self.ranks.parallel:
                raise error from failure
            self.ranks.fail(error)  # only the rank that writes may know

    def make_graphs(self, wanted: bool) -> None:
        """Say whether f is evaluated with its graph from now on, for :meth:`kept_graphs`."""
        if wanted and self.bridge.graphs is None:
            self.bridge.keep_graphs()
        elif not wanted:
            self.bridge.graphs = None

    def kept_graphs(self) -> tuple[tuple[Linearization, ...], int] | None:
        """Return the graphs at the stages of :meth:`checkpoint`, and the bytes they keep.

        With ``whole_graphs`` also that at the end, which may be the next step's first. None if they
        were not made at all of them.
        """
        kept = list(self.bridge.graphs or ())
        if len(kept) < self.settings.method.stages:
            return None
        if self.settings.method.fsal and not self.whole_graphs:
            kept = kept[:-1]
        return tuple(kept), len(kept) * self.bridge.graph_bytes

    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""
        self.ts.destroy()

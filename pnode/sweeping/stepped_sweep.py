"""A sweep whose steps are taken one by one, and its discrete adjoint."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import replace

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.nonfinite import check_parameters
from pnode.adjoint.reverse import Repeated, Reverse, store_again, take_again
from pnode.adjoint.trajectory import Trajectory
from pnode.base import vectors
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.integrator import CompiledIntegrator, Start
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step, forward_sweep
from pnode.sweeping.dense import DenseOutput
from pnode.sweeping.dense_adjoint import DenseAdjoint
from pnode.sweeping.engine import Engine
from pnode.sweeping.event_locator import EventLocator
from pnode.sweeping.monitor import backward_bar, onlookers
from pnode.sweeping.partial_steps import PartialSteps
from pnode.sweeping.quadrature import DrivenCotangents, Quadrature
from pnode.sweeping.recording import Noted, Outputs, Recorder, new_trajectory
from pnode.sweeping.run import Requests, Run, Sweep

__all__ = ["SteppedSweep"]


class SteppedSweep(Sweep):
    """A sweep whose steps are taken one by one.

    Parameters
    ----------
    engine : Engine
        Lends integrators and adjoints.

    Attributes
    ----------
    trajectory : Trajectory or None
        Steps and checkpoints; None without gradients.
    dense : DenseOutput or None
        Outputs inside of steps.
    noted_steps : Noted or None
        The steps, if they were to be known.
    quadrature : Quadrature or None
        Of integrals that the state drives.
    driven : DrivenCotangents or None
        Theirs, in a backward sweep.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reproducible = False
        self.trajectory: Trajectory | None = None
        self.dense: DenseOutput | None = None
        self.noted_steps: Noted | None = None
        self.quadrature: Quadrature | None = None
        self.driven: DrivenCotangents | None = None

    @property
    def interpolated(self) -> Set[int]:
        """Indices of the outputs that are interpolated."""
        return frozenset() if self.dense is None else self.dense.interpolated

    @property
    def at_hand(self) -> bool:  # type: ignore[override]
        """Whether the stages of all steps are in memory; they go with a backward sweep."""
        return self.trajectory is not None and self.trajectory.at_hand

    def takes_batches(self, run: Run) -> bool:
        """Whether :meth:`reverse` takes several cotangents at once; see :class:`Sweep`."""
        problem = run.problem
        together = problem.ranks.parallel or problem.exchange is not None
        return not (run.settings.graphs or together or self.dense)

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and for each output that one hits how many come before it."""
        trajectory = self.trajectory
        assert trajectory is not None
        inside = self.interpolated
        hits = [steps for i, steps in enumerate(trajectory.outputs) if i not in inside]
        if self.dense is not None:  # which has those between the first and the last
            hits = hits[:1] + hits[1:][-1:]
        return trajectory.steps, tuple(hits)

    def noted(self, output: int) -> Sequence[float]:
        """Return what was noted of f in the step that begins at an output, if one does."""
        trajectory = self.trajectory
        return () if trajectory is None else trajectory.evidence[trajectory.outputs[output]]

    def let_checkpoints_go(self) -> None:
        """Free the checkpoints; see :class:`Sweep`."""
        if self.trajectory is not None:
            self.trajectory.clear()

    def forward(
        self,
        run: Run,
        field: VectorField,
        y0: torch.Tensor,
        keep: bool,
        requests: Requests,
        start: Start | None = None,
    ) -> torch.Tensor:
        """Integrate, and return the outputs. Collective.

        ``start`` is that of compiled steps; see :func:`forward` for the rest.
        """
        engine = self._engine
        problem, method = run.problem, engine.method
        self._progress = requests.progress
        if keep:
            self.trajectory = new_trajectory(engine, run, requests, y0)
            # What one-step methods carry over from the step before; the others have the same bits.
            fresh = method.restarts and not method.same_bits
            cut = requests.events is not None and requests.events.cut and method.carries_slope
            # What is repeated from the middle starts without what the steps before have left.
            limited = method.coupled and engine.checkpointing.may_repeat
            self._reproducible = (engine.checkpointing.reproducible or cut or limited) and fresh
        with engine.integrator(run.settings, field, y0) as integrator, ExitStack() as leases:
            if run.settings.jacobian_options.found:
                integrator.check_structure()
            if start is not None:
                assert isinstance(integrator, CompiledIntegrator)
                integrator.know_slope(start)
            if self.trajectory is not None:
                leases.enter_context(self.trajectory.forward())
                self.trajectory.keeps_graphs &= start is None
                if run.settings.place.on_host:  # numbers, which a device would have to wait for
                    integrator.note_values()
                integrator.make_graphs(self.trajectory.keeps_graphs)
            locator: EventLocator | None = None
            if requests.events is not None:
                trial = replace(run.settings, adaptive=False)
                locator = EventLocator(
                    requests.events, problem, requests.event_tol, integrator,
                    lambda: leases.enter_context(engine.integrator(trial, field, y0)), field,
                    requests.sides,
                )  # fmt: skip
            repeated: Repeated | None = None
            if requests.recorded is not None:
                repeated = leases.enter_context(Repeated(
                    lambda adaptive: engine.integrator(
                        replace(run.settings, adaptive=adaptive), field, y0
                    ),
                    run.settings, requests.recorded.steps, run.stats, self._reproducible,
                    integrator,
                ))  # fmt: skip
            beside = locator, repeated, PartialSteps.of(engine, run.settings, field, y0, leases)
            taker, outputs = self._sweep(run, integrator, field, keep, requests, *beside)
            if repeated is None:  # which counts them itself
                each_one = {integrator, taker, *([] if locator is None else locator.trials)}
                for newton, krylov in (each.iterations() for each in each_one):
                    run.stats.newton += newton
                    run.stats.krylov += krylov
            run.used = field.used
        if requests.recorded is None:
            integrator.options.warn_unused()
        return outputs.states()

    def _sweep(
        self,
        run: Run,
        integrator: TimeIntegrator,
        field: VectorField,
        keep: bool,
        requests: Requests,
        locator: EventLocator | None,
        repeated: Repeated | None,
        partial: PartialSteps | None,
    ) -> tuple[TimeIntegrator, Outputs]:
        """Take all steps; return the integrator that took the last one, and the outputs."""
        trajectory = self.trajectory
        problem, times = run.problem, run.problem.times
        outputs = Outputs(run, trajectory)
        observers: list[Observer] = [] if locator is None else [locator]
        if trajectory is not None:
            observers.append(Recorder(trajectory, problem.ranks.attempt, self._reproducible))
        if self.quadrature is not None:
            observers.append(self.quadrature.beside(trajectory))
        if requests.steps:
            self.noted_steps = Noted()
            observers.append(self.noted_steps)
        if requests.dense:
            pieces = None if requests.recorded is None else requests.recorded.pieces
            self.pieces = pieces
            begun = vectors.copy_out(integrator.solution)
            self.dense = DenseOutput(
                times, run.settings.method, begun, field, outputs.add, keep, partial, pieces
            )  # fmt: skip
            observers.append(self.dense)
            integrator.whole_graphs = self.dense.scheme is not None
            times = (times[0], *times[1:][-1:])  # those that steps are to hit
        observers.append(outputs)  # behind those that come before the last one
        observers += onlookers(requests, problem)
        done: list[Step] = []
        progress = None if trajectory is None else trajectory.progress
        if progress is not None and progress.start is not None:
            done = progress.steps
            run.stats.steps = len(done)
            outputs.take_up(progress)
            integrator.restore((progress.start,))
        control, stats = self._engine.control, run.stats
        control = replace(control, steps_before=requests.steps_before or 0)
        if requests.recorded is None or repeated is None:
            taker = forward_sweep(integrator, field, times, control, stats, observers, done)
        else:
            taker = take_again(repeated, requests.recorded.outputs, stats, observers)
        if self.dense is not None:
            self.dense.end()
        if locator is not None:
            run.sides = locator.sides
        if locator is not None and locator.roots:
            run.roots, run.last = locator.roots, locator.last
            before, found = problem.times[: outputs.number], [root.time for root in run.roots]
            run.problem = replace(problem, times=(*before, *found))
            nodes = [root.node for root in run.roots]
            outputs.extend([root.state for root in run.roots], nodes)
        if trajectory is not None:
            problem.ranks.attempt(trajectory.finish, taker)
        return taker, outputs

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint; see :class:`Sweep`. Collective."""
        field = run.field(run.stats.backward)
        ranks = run.problem.ranks
        with ranks.together(agree=False):
            if ranks.parallel:
                ranks.attempt(run.refuse_written)
            found = self._reverse(run, field, y0, cotangents, wants_times)
        # The one reduction of a backward sweep, which also tells whether a rank has failed.
        parameters = ranks.sum_gradients(found.parameters, field.parameters)
        return CostGradients(found.state, parameters, found.initial, found.times)

    def _reverse(
        self,
        run: Run,
        field: VectorField,
        y0: torch.Tensor,
        cotangents: torch.Tensor,
        wants_times: bool,
    ) -> CostGradients:
        engine, trajectory = self._engine, self.trajectory
        assert trajectory is not None
        problem, ledger = run.problem, run.stats.backward
        if not trajectory.ready:
            store_again(trajectory, self._repeated(run, y0), y0, problem.ranks.attempt)
        trajectory.ready = False
        run.ys = None  # the node of the graph, and this run, may stay longer than what it saved

        with (
            engine.adjoint(run.settings, bool(field.parameters)) as adjoint,
            backward_bar(len(trajectory.steps), self._progress) as told,
            ExitStack() as leases,
        ):
            adjoint.begin(field, cotangents.shape[1:-1])
            dense: DenseAdjoint | None = None
            if self.dense is not None:
                dense = DenseAdjoint(
                    self.dense, trajectory.steps, field, cotangents, wants_times,
                    PartialSteps.of(
                        engine, run.settings, run.field(ledger), y0, leases, lambda: adjoint
                    ),
                )  # fmt: skip
            reverse = Reverse(
                trajectory, adjoint, self._repeated(run, y0), problem, y0, run.settings, run.field,
                ledger, told,
            )  # fmt: skip
            with torch.enable_grad():  # here once, instead of at each stage
                initial = reverse.run(cotangents, dense or self.driven, self.interpolated)
            state = adjoint.state_gradient()
            parameters = adjoint.parameter_gradients(len(field.parameters))
            inside = dense or self.driven
            if inside is not None:
                accumulate(parameters, tuple(inside.parameters))
            if run.settings.place.on_host and reverse.finite:
                first = trajectory.steps[:1] or [Step(0, problem.times[0], 0.0, problem.times[0])]
                name = engine.method.name
                problem.ranks.attempt(
                    check_parameters, parameters, name, problem.direction, first[0]
                )
        return CostGradients(state, parameters, initial, {} if dense is None else dense.times)

    def _repeated(self, run: Run, y0: torch.Tensor) -> Repeated:
        """Return what repeats steps of this sweep."""
        engine, trajectory = self._engine, self.trajectory
        assert trajectory is not None
        ledger = run.stats.backward
        return Repeated(
            lambda adaptive: engine.integrator(
                replace(run.settings, adaptive=adaptive), run.field(ledger), y0
            ),
            run.settings, trajectory.steps, ledger, self._reproducible,
        )  # fmt: skip

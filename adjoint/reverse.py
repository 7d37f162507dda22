"""The backward sweep: execute a schedule's reverse actions, from the last step to the first.

It knows trajectories, adjoints and integrators that are lent to it, and nothing of solvers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from itertools import chain, pairwise
from typing import Any

import torch

from pnode.adjoint.multistep import MultistepAdjoint
from pnode.adjoint.nonfinite import refuse_state
from pnode.adjoint.schedule import Adjoint, Advance, RestoreEnd, RestoreSolution, StoreStages
from pnode.adjoint.stages import ExplicitAdjoint, StageAdjoint
from pnode.adjoint.stepper import AdjointStepper, StageCotangents
from pnode.adjoint.trajectory import Trajectory
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.multistep import TakenOrder
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Observer, Step

__all__ = ["NodeCotangents", "Repeated", "Reverse", "store_again", "take_again"]

_NOTHING = Checkpoint(())


class NodeCotangents(ABC):
    """Cotangents of the states at the ends of steps that do not come from outputs there."""

    @abstractmethod
    def at(
        self,
        node: int,
        restore: Callable[[int], Checkpoint],
        graphs: Callable[[int], Sequence[Linearization] | None],
    ) -> torch.Tensor | None:
        """Return the cotangent of the state after ``node`` steps, None if it is zero.

        Called from the last node to the first, when the adjoints of the later steps are done.

        Parameters
        ----------
        node : int
            Number of steps before.
        restore : callable
            Returns the checkpoint of a step; called with ``node`` only.
        graphs : callable
            Returns the graphs at its stages, if they are kept.
        """

    def within(self, step: Step, checkpoint: Checkpoint) -> StageCotangents | None:
        """Return further cotangents of a step's stages, None if there are none.

        Called before the step's adjoint is taken, which those of others are added to.
        """
        return None


class Repeated:
    """Repeats recorded steps, on an integrator lent when the first is wanted.

    Parameters
    ----------
    lend : callable
        Lends an integrator that stands at the initial state, for a ``with`` block; called with
        whether it controls errors.
    settings : IntegratorSettings
        Of the forward sweep.
    steps : sequence of Step
        The steps.
    ledger : Ledger
        Counts them.
    reproducible : bool
        Whether every step starts afresh.
    integrator : TimeIntegrator, optional
        The first one, which stands at the initial state.

    Attributes
    ----------
    steps : sequence of Step
        As given.
    integrator : TimeIntegrator or None
        Once there is one.
    """

    def __init__(
        self,
        lend: Callable[[bool], AbstractContextManager[TimeIntegrator]],
        settings: IntegratorSettings,
        steps: Sequence[Step],
        ledger: Ledger,
        reproducible: bool,
        integrator: TimeIntegrator | None = None,
    ) -> None:
        self._lend = lend
        # Newton's method may aim at the tolerances of adaptive steps.
        self._adaptive = settings.adaptive and settings.method.solves_to_tolerance
        self.steps = steps
        self._ledger = ledger
        self._reproducible = reproducible
        self._lease = ExitStack()
        self.integrator = integrator
        self._main: TimeIntegrator | None = None  # while another one has taken a step
        self._trial: TimeIntegrator | None = None

    def __enter__(self) -> Repeated:
        return self

    def __exit__(self, *error: Any) -> Any:
        if error[0] is None:  # otherwise the integrator may be gone
            self._count()
        return self._lease.__exit__(*error)

    def _count(self) -> None:
        for one in {self.integrator, self._main, self._trial}:
            if one is None:
                continue
            newton, krylov = one.iterations()
            self._ledger.newton += newton
            self._ledger.krylov += krylov

    def restart(self, step: int, state: torch.Tensor) -> TimeIntegrator:
        """Stand at the start of a step."""
        if self.integrator is None:
            self.integrator = self._lease.enter_context(self._lend(self._adaptive))
            if step == 0:
                return self.integrator
        self.integrator, self._main = self._main or self.integrator, None
        self.integrator.restore((state,))
        return self.integrator

    def advance(self, step: int) -> None:
        """Repeat a step from where the integrator stands, and count it as repeated."""
        self.take(step)
        self._ledger.recomputed += 1

    def take(self, step: int) -> None:
        """Take a step from where the integrator stands."""
        assert self.integrator is not None
        recorded = self.steps[step]
        order = recorded.order
        if self._main is not None:  # the step before was cut by an event
            self._main.restore(self.integrator.history)
            self.integrator, self._main = self._main, None
        if isinstance(order, TakenOrder) and order.length != recorded.length:
            # Shortened to an event, on an integrator without error control.
            if self._trial is None:
                self._trial = self._lease.enter_context(self._lend(False))
            self._trial.restore(self.integrator.history)
            self._main, self.integrator = self.integrator, self._trial
        if self._reproducible:
            self.integrator.restart_step()
        with torch.no_grad():
            outcome = self.integrator.attempt(
                recorded.start, recorded.length, step, recorded.order, recorded.end
            )
        if outcome.error is not None:
            raise outcome.error


def store_again(
    trajectory: Trajectory, repeated: Repeated, y0: torch.Tensor, attempt: Callable[..., Any]
) -> None:
    """Repeat a forward sweep with the recorded steps, to store its checkpoints. Collective."""
    trajectory.clear()
    with repeated:
        integrator = repeated.restart(0, y0)
        for step in trajectory.steps:
            attempt(trajectory.before_step, step.index, integrator)
            repeated.advance(step.index)
            integrator = repeated.integrator or integrator
            attempt(trajectory.record, step, integrator)
        attempt(trajectory.finish, integrator)


def take_again(
    repeated: Repeated, outputs: Sequence[int], ledger: Ledger, observers: Sequence[Observer]
) -> TimeIntegrator:
    """Take recorded steps as a forward sweep, and return the integrator that took the last one.

    ``outputs`` tells how many steps come before each output that one hits.
    """
    hits = Counter(outputs)
    assert repeated.integrator is not None
    output = 0
    for taken in range(len(repeated.steps) + 1):
        for _ in range(hits[taken]):
            for observer in observers:
                observer.output(output, repeated.integrator)
            output += 1
        if taken < len(repeated.steps):
            for observer in observers:
                observer.before_step(taken, repeated.integrator)
            repeated.take(taken)
            ledger.steps += 1
            for observer in observers:
                observer.after_step(repeated.steps[taken], repeated.integrator, False)
    return repeated.integrator


class Reverse:
    """One backward sweep over recorded steps.

    Parameters
    ----------
    trajectory : Trajectory
        Steps and checkpoints.
    adjoint : AdjointStepper
        Has begun.
    repeated : Repeated
        For steps whose checkpoints are not stored.
    problem : InitialValueProblem
        What was solved.
    y0 : Tensor
        Its initial state, flat.
    settings : IntegratorSettings
        Of the forward sweep.
    field : callable
        Returns the field once more, to look where a derivative is not finite.
    ledger : Ledger
        Of backward sweeps.
    told : callable, optional
        Told of every step that is done, by its index.

    Attributes
    ----------
    finite : bool
        Whether all cotangents given to :meth:`run` were finite.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        adjoint: AdjointStepper,
        repeated: Repeated,
        problem: InitialValueProblem,
        y0: torch.Tensor,
        settings: IntegratorSettings,
        field: Callable[[Ledger], VectorField],
        ledger: Ledger,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self._told = told
        self._trajectory = trajectory
        self._adjoint = adjoint
        self._repeated = repeated
        self._problem = problem
        self._y0 = y0
        self._settings = settings
        self._field = field
        self._ledger = ledger
        self._attempt = problem.ranks.attempt
        self._graphs = True  # of repeated steps, while f is seen to be the same
        self._active = False  # until the first non-zero cotangent, lambda is zero and stays it

    def run(
        self, cotangents: torch.Tensor, inside: NodeCotangents | None, interpolated: Set[int]
    ) -> torch.Tensor:
        """Take the adjoints of all steps. Collective.

        Parameters
        ----------
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``, or of k losses
            ``(T, k, size)``.
        inside : NodeCotangents or None
            Of what the loss depends on besides.
        interpolated : set of int
            Outputs that are part of that: not states at the end of a step.

        Returns
        -------
        Tensor
            The adjoint at the start without the first output's own cotangent.
        """
        trajectory = self._trajectory
        self._cotangents, self._inside = cotangents, inside
        # NaN is neither zero nor finite.
        largest = torch.linalg.vector_norm(cotangents.flatten(1), math.inf, dim=1).tolist()
        self.finite = all(map(math.isfinite, largest))
        self._check = self._settings.place.on_host and self.finite
        wanted = [entry != 0.0 for entry in largest]
        if self._problem.ranks.parallel:  # what one rank needs all take part in
            wanted = [True] * len(wanted)
        for index in interpolated:
            wanted[index] = False
        self._wanted = wanted
        # States at events come behind the outputs.
        self._waiting = sorted(enumerate(trajectory.outputs), key=lambda each: each[1])
        with self._repeated:
            number = len(trajectory.steps)
            self._add_outputs(number)
            actions = trajectory.schedule.reverse(number) if number else ()
            for action, following in pairwise(chain(actions, (None,))):
                match action:
                    case Advance(step) if isinstance(following, (Adjoint, StoreStages)):
                        self._repeat(step)
                    case Advance(step):
                        self._repeated.advance(step)
                    case RestoreSolution(step):
                        state = self._restored(trajectory.solution, step) if step else self._y0
                        self._repeated.restart(step, state)
                    case RestoreEnd(step):
                        self._repeated.restart(step + 1, self._restored(trajectory.end, step))
                    case Adjoint(step):
                        if self._active:
                            self._step(trajectory.steps[step])
                        self._add_outputs(step)
                        trajectory.forget_live(step)
                        if self._told is not None:
                            self._told(step)
                    case _:
                        self._attempt(trajectory.execute, action, self._repeated.integrator)
        trajectory.clear()
        initial = self._adjoint.state_gradient()
        if wanted[0]:
            self._adjoint.add(cotangents[0])
        return initial

    def _repeat(self, step: int) -> None:
        """Repeat a step whose adjoint will be taken, with its graphs where there is room."""
        repeated, trajectory = self._repeated, self._trajectory
        wanted = self._graphs and trajectory.wants_graphs(step)
        integrator = repeated.integrator
        if wanted and integrator is not None:
            if trajectory.evidence[step]:
                integrator.note_values()
            integrator.make_graphs(True)
        repeated.advance(step)
        if wanted and integrator is not None:
            self._graphs = trajectory.keep_repeated(step, integrator)
            integrator.make_graphs(False)

    def _add_outputs(self, after: int) -> None:
        """Add the cotangents of the state after so many steps."""
        waiting = self._waiting
        while waiting and waiting[-1][1] == after and waiting[-1][0] > 0:
            index, _ = waiting.pop()
            if self._wanted[index]:
                self._active = True
                self._adjoint.add(self._cotangents[index])
        if self._inside is not None:
            more = self._inside.at(after, self._stages, self._trajectory.graphs)
            if more is not None:
                self._active = True
                self._adjoint.add(more)

    def _step(self, step: Step) -> None:
        """Take the adjoint of a step."""
        trajectory, adjoint, index = self._trajectory, self._adjoint, step.index
        ranks = self._problem.ranks
        ranks.where = {
            "time": self._problem.direction * step.start,
            "step": index, "method": self._settings.method.name,
        }  # fmt: skip
        adjoint.load(self._stages(index), trajectory.graphs(index), trajectory.evidence[index])
        inside = None if self._inside is None else self._inside.within(step, adjoint.checkpoint)
        if inside is None:
            adjoint.step(step, self._ledger)
        else:
            assert isinstance(adjoint, (ExplicitAdjoint, StageAdjoint, MultistepAdjoint))
            adjoint.step(step, self._ledger, inside)
        if self._check and not adjoint.is_finite():
            states = self._stages(index).stages
            self._attempt(refuse_state, self._field(Ledger()), step, states, ranks.where)
        adjoint.checkpoint = _NOTHING  # the step before may be repeated first, in this memory

    def _stages(self, index: int) -> Checkpoint:
        trajectory = self._trajectory
        found = self._attempt(trajectory.stages, index, self._repeated.integrator)
        if found is None:
            return self._adjoint.placeholder(trajectory.steps[index], self._y0.to(REAL))
        return found

    def _restored(self, restore: Callable[[int], torch.Tensor], index: int) -> torch.Tensor:
        """Return a state; y0 for one that cannot be had, in a sweep that is lost anyway."""
        state = self._attempt(restore, index)
        return self._y0.to(REAL) if state is None else state

"""Steps taken again, to points inside of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch

from pnode.adjoint.stepper import AdjointStepper, TorchAdjointStepper
from pnode.base import vectors
from pnode.base.interpolation import lobatto
from pnode.base.ledger import Ledger
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.partial_steps import CompiledParts
from pnode.solvers.methods import Method
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step
from pnode.sweeping.engine import Engine

__all__ = ["PartialSteps", "inner_points"]


class PartialSteps:
    """Takes steps again from their starts, to points inside of them.

    Parameters
    ----------
    points : tuple of float
        Where to, in lengths of the step.
    lease : callable
        Returns an integrator without error control, which begins a sweep; called if it is wanted.
    ledger : Ledger
        Counts what is done.
    lease_adjoint : callable, optional
        Returns an adjoint of these steps, which has begun; called if it is wanted.
    compiled : CompiledParts, optional
        Takes them where it can.
    """

    def __init__(
        self, points: tuple[float, ...], lease: Callable[[], TimeIntegrator], ledger: Ledger,
        lease_adjoint: Callable[[], AdjointStepper] | None = None,
        compiled: CompiledParts | None = None,
    ) -> None:  # fmt: skip
        self.points = points
        self._lease, self._lease_adjoint, self._compiled = lease, lease_adjoint, compiled
        self._ledger = ledger
        self._trial: TimeIntegrator | None = None
        self._adjoint: AdjointStepper | None = None

    @classmethod
    def of(
        cls, engine: Engine, settings: IntegratorSettings, field: VectorField, y0: torch.Tensor,
        leases: ExitStack, lease_adjoint: Callable[[], AdjointStepper] | None = None,
        compiled: CompiledParts | None = None,
    ) -> PartialSteps | None:  # fmt: skip
        """Return those of a sweep; None for a method that is interpolated otherwise."""
        points = inner_points(settings.method)
        if not points:
            return None

        def lease() -> TimeIntegrator:
            trial = replace(settings, adaptive=False)
            integrator = leases.enter_context(engine.integrator(trial, field, y0))
            leases.callback(_count, integrator, field.ledger)
            return integrator

        if compiled is not None:
            compiled.begin()
            leases.callback(compiled.end, field.ledger)
        return cls(points, lease, field.ledger, lease_adjoint, compiled)

    def states(self, step: Step, start: torch.Tensor) -> list[torch.Tensor]:
        """Return the states that the partial steps lead to; see :meth:`taken`. Collective."""
        found = None
        if self._compiled is not None:
            found = self._compiled.take(step, self._lengths(step), start, keep=False)
        if found is not None:
            return list(found)
        return [vectors.copy_out(trial.solution) for _, trial in self.taken(step, start)]

    def pull_back(
        self, step: Step, start: torch.Tensor, cotangents: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Take cotangents of the states that the partial steps lead to back. Collective.

        Returns
        -------
        states : list of Tensor
            As :meth:`states` has them.
        start : Tensor
            What the cotangent of the step's start gets; the parameters get theirs besides.
        """
        if self._compiled is not None:
            lengths = self._lengths(step)
            found = self._compiled.take(step, lengths, start, keep=True)
            if found is not None:
                return list(found), self._compiled.pull_back(step, lengths, cotangents)
        if self._adjoint is None:
            assert self._lease_adjoint is not None
            self._adjoint = self._lease_adjoint()
        adjoint, states, total = self._adjoint, [], torch.zeros_like(start)
        assert isinstance(adjoint, TorchAdjointStepper)
        before = adjoint.state
        for (part, trial), w in zip(self.taken(step, start), cotangents, strict=True):
            states.append(vectors.copy_out(trial.solution))
            adjoint.load(trial.checkpoint(None))
            adjoint.state = w.clone()
            adjoint.step(part, self._ledger)
            total.add_(adjoint.state)
        adjoint.state = before
        return states, total

    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return what so many parameters got, where no other adjoint has that too."""
        sums: list[torch.Tensor | None] = [None] * count
        if self._compiled is not None:
            accumulate(sums, tuple(self._compiled.gradients(count)))
        if self._adjoint is not None:
            accumulate(sums, tuple(self._adjoint.parameter_gradients(count)))
        return sums

    def _lengths(self, step: Step) -> list[float]:
        return [step.start + point * step.length - step.start for point in self.points]

    def taken(self, step: Step, start: torch.Tensor) -> Iterator[tuple[Step, TimeIntegrator]]:
        """Yield the partial steps, with the integrator that stands at their ends. Collective.

        Raises
        ------
        SolveError
            If one fails.
        """
        trial = self._trial = self._trial or self._lease()
        for point, length in zip(self.points, self._lengths(step), strict=True):
            part = replace(step, length=length, end=step.start + point * step.length, order=0)
            trial.restore((start,))
            with torch.no_grad():
                outcome = trial.attempt(part.start, part.length, step.index, 0, part.end)
            error = outcome.error
            if error is not None:
                raise type(error)(
                    f"{error.message} (in {point:.3g} of a step, taken again for outputs inside of "
                    "it: max_step= makes steps shorter, dense=False takes none again)",
                    time=error.time, step=error.step, method=error.method, reason=error.reason,
                    rank=error.rank,
                ) from error  # fmt: skip
            yield part, trial


def _count(integrator: TimeIntegrator, ledger: Ledger) -> None:
    newton, krylov = integrator.iterations()
    ledger.newton += newton
    ledger.krylov += krylov


def inner_points(method: Method) -> tuple[float, ...]:
    """Return where partial steps lead to that a method is interpolated through, if it is.

    Slopes at the ends of stiff steps are no use: f magnifies what is left there of the error, if
    stages are not solved for, or to a tolerance; and of stages that are, the error of slopes is of
    the order of a stage, which shows from a method's order 3 on. Steps of theta h by the same
    method have its stability and its order. The polynomial's error is of order h^(p + 1) up to
    order 4, as stiff steps are longer than their outputs' accuracy would have them, and of order
    h^p at least.
    """
    scheme, order = method.scheme, method.order
    if not method.implicit or scheme is None:
        return ()
    solved = scheme.stiffly_accurate and not method.coupled and method.kind != "imex"
    if solved and order <= 2:
        return ()
    return lobatto(max(2, min(3, order), order - 2))

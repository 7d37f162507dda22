"""Steps taken again, to points inside of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch

from pnode.base.interpolation import lobatto
from pnode.base.ledger import Ledger
from pnode.field.vectorfield import VectorField
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
    """

    def __init__(self, points: tuple[float, ...], lease: Callable[[], TimeIntegrator]) -> None:
        self.points = points
        self._lease = lease
        self._trial: TimeIntegrator | None = None

    @classmethod
    def of(
        cls, engine: Engine, settings: IntegratorSettings, field: VectorField, y0: torch.Tensor,
        leases: ExitStack,
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

        return cls(points, lease)

    def taken(self, step: Step, start: torch.Tensor) -> Iterator[tuple[Step, TimeIntegrator]]:
        """Yield the partial steps, with the integrator that stands at their ends. Collective.

        Raises
        ------
        SolveError
            If one fails.
        """
        trial = self._trial = self._trial or self._lease()
        for point in self.points:
            end = step.start + point * step.length
            part = replace(step, length=end - step.start, end=end, order=0)
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

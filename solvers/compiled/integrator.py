"""Explicit Runge-Kutta steps as compiled graphs, behind the interface of an integrator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pnode.base.devices import HOST
from pnode.base.errors import NonFiniteVectorField, SolveError
from pnode.base.interpolation import polynomial
from pnode.base.options import PETSc, SolverOptions
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.problems import tolerances
from pnode.problems.step_controllers import ErrorMemory
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.compiled.inductor import Compiled
from pnode.solvers.compiled.steps import StepGraphs, Tensors
from pnode.solvers.petsc.integrator import StepOutcome, TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["CompiledIntegrator", "Start", "step_tolerances"]

# What an adaptive step may square and divide by a tolerance; see vectors.is_moderate.
_MODERATE = 1e200


@dataclass(frozen=True, eq=False)
class Start:
    """The graphs for one solve, and the first slope, which is known from checking them.

    Attributes
    ----------
    graphs : StepGraphs
        The graphs.
    slope : Tensor or None
        f at the initial state, flat, PETSc's precision; None where that was not evaluated.
    saved : tuple of Tensor
        What is saved of it.
    """

    graphs: StepGraphs
    slope: torch.Tensor | None
    saved: tuple[torch.Tensor, ...]


def step_tolerances(settings: IntegratorSettings) -> Tensors:
    """Return what the graph of an adaptive step takes for rtol and atol; nothing of a fixed one."""
    if not settings.adaptive:
        return ()
    return _tensors(settings.rtol, settings.atol)


@lru_cache(maxsize=8)
def _tensors(*given: tolerances.Resolved) -> Tensors:
    found = map(tolerances.values, given)
    return tuple(torch.as_tensor(value, dtype=REAL, device=HOST.device) for value in found)


class CompiledIntegrator(TimeIntegrator):
    """Takes each step by one call of a compiled graph.

    The TS of the base class only carries options and monitors.

    Parameters
    ----------
    settings : IntegratorSettings
        With ``graphs``.
    options : SolverOptions
        PETSc options.
    """

    interpolates = False

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        super().__init__(settings, options)
        graphs = settings.graphs
        assert graphs is not None
        self._graphs: StepGraphs = graphs
        self._tolerances = step_tolerances(settings)
        self._run: Compiled = graphs.compile_step(self._tolerances)
        memory = np.zeros(settings.size)
        self._memory = torch.from_numpy(memory)
        self.solution = PETSc.Vec().createWithArray(memory, comm=settings.comm)
        #: Longest adaptive step.
        self.longest = self.ts.getStepLimits()[1] if settings.adaptive else math.inf
        self._errors = ErrorMemory(settings.rule, settings.method.order)
        self._slope: torch.Tensor | None = None
        self._saved: tuple[torch.Tensor, ...] = ()
        self._number: tuple[float, torch.Tensor] = (0.0, torch.zeros((), dtype=REAL))

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep, or go on, from state ``u`` at time ``s``. Collective."""
        super().begin(field, u, s, step_index)
        self._field = field
        self._errors.restart()
        self._inputs = self._graphs.traced.inputs()
        self._stand_at(u.detach().to(REAL, copy=True))

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        super().end()
        del self._field, self._last
        self._inputs = []
        self.restart_step()

    def know_slope(self, start: Start) -> None:
        """Take the slope at the state it stands at."""
        if self._graphs.fsal:
            self._slope, self._saved = start.slope, start.saved

    def restart_step(self) -> None:
        """Forget the slope that the last step has left."""
        self._slope = None
        self._saved = ()

    def _stand_at(self, u: torch.Tensor) -> None:
        self._u = u = u.contiguous()
        self._memory.copy_(u)
        self.solution.stateIncrease()
        self._last: tuple[Any, ...] = ()
        self.restart_step()

    @property
    def history(self) -> Any:
        """What the next step needs: the solution (see :meth:`restore`)."""
        return (self._u,)

    def restore(self, history: Any) -> None:
        """Go on from a history, which an integrator of the same method had. Collective."""
        self._stand_at(history[0].detach().to(REAL))

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``. Collective.

        Returns
        -------
        StepOutcome
            A rejected attempt leaves the solution as it was.
        """
        graphs, ledger = self._graphs, self._field.ledger
        # The graphs are in the user's time.
        t = torch.scalar_tensor(self._direction * s, dtype=REAL)
        length = self._direction * step
        if self._number[0] != length:
            self._number = (length, torch.scalar_tensor(length, dtype=REAL))
        inputs = [t, self._number[1], self._u, *self._tolerances]
        saved = self._saved
        if graphs.fsal:
            slope = self._slope
            if slope is None:
                slope, saved = graphs.start(t, self._u)
                self._slope, self._saved = slope, saved
                ledger.rhs += 1
            inputs.append(slope)
        results = self._run(inputs + self._inputs)
        ledger.rhs += graphs.stages
        looks = results[0].tolist()
        proposed = step
        if self.settings.adaptive:
            accepted, proposed = self._choose(step, looks)
            error = self._look(looks, results[1], s, index)
            if error is not None or not accepted:
                return StepOutcome(False, proposed, error)
        else:
            error = self._look(looks, results[1], s, index)
            if error is not None:
                return StepOutcome(False, proposed, error)
        self._last, self._begin = (self._u, saved, results), self._direction * s
        self._u = results[1]
        self._memory.copy_(self._u)
        self.solution.stateIncrease()
        if graphs.fsal:
            self._slope = results[2]
            self._saved = tuple(results[-graphs.saved :]) if graphs.saved else ()
        return StepOutcome(True, proposed)

    def _choose(self, step: float, looks: list[float]) -> tuple[bool, float]:
        """Return whether to accept the step, and the next length."""
        error = looks[1]
        if not math.isfinite(error):
            return False, step
        proposed = self._errors.propose(step, error, error <= 1.0)
        return error <= 1.0, min(proposed, self.longest)

    def _look(
        self, looks: list[float], end: torch.Tensor, s: float, index: int
    ) -> SolveError | None:
        """Look for values that are not finite; as PETSc's own steps, see the base class."""
        if looks[0] < _MODERATE and (len(looks) == 1 or looks[2] < _MODERATE):
            return None
        if len(looks) == 1 and bool(end.isfinite().all()):
            return None
        return NonFiniteVectorField(
            f"{self._field.who} returned NaN or infinity: check it there, or take smaller steps",
            time=self._direction * s, step=index, method=self.settings.method.name,
        )  # fmt: skip

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        """Return what the adjoint of the last step needs. Not collective.

        The stages at which f was evaluated, as other explicit methods do, and what was saved of
        each (see :class:`StepGraphs`).
        """
        # Matrix products write into what they return, which is not the user's doing: .data has a
        # version of its own.
        kept = self._graphs.checkpoint(*self._last)
        return Checkpoint(tuple(tensor.data for tensor in kept))

    def evidence(self) -> tuple[float, ...]:
        """Return nothing: what the graphs compute cannot change but through their inputs."""
        return ()

    def interpolate(self, s: float) -> torch.Tensor:
        """Return the state at a time in the last step by the method's interpolant. Collective."""
        graphs = self._graphs
        (start, _, results), scheme = self._last, self.settings.method.scheme
        assert scheme is not None
        stages = self.checkpoint(None).stages[: graphs.stages]
        begin, h = self._begin, self._number[0]
        slopes = []
        for c, stage in zip(graphs.scheme.c, stages, strict=False):
            slopes.append(graphs.start(torch.scalar_tensor(begin + c * h, dtype=REAL), stage)[0])
            self._field.ledger.rhs += 1
        if graphs.fsal:
            slopes.append(results[2])
        theta = (self._direction * s - begin) / h
        weights = polynomial(scheme.interpolation, theta)
        state = start.clone()
        for weight, slope in zip(weights, slopes, strict=True):
            state.add_(slope, alpha=float(weight) * h)
        return state

"""Steps that PETSc takes without a controller, judged by pnode: own norms, own controllers."""

from __future__ import annotations

import math
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc, SolverOptions
from pnode.problems import tolerances
from pnode.problems.step_controllers import ErrorMemory
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.library import evaluate_step
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["Judge"]

_REJECTED = PETSc.TS.ConvergedReason.DIVERGED_STEP_REJECTED


class Judge:
    """Says of each step of a TS whether it is accepted, and how long the next one is.

    PETSc's estimates: the difference to the embedded solution; of theta methods, which have none,
    that to the extrapolation of the steps before, of which the first step is accepted unseen.

    Parameters
    ----------
    ts : TS
        Set up, without a controller.
    settings : IntegratorSettings
        Method, tolerances and controller.
    options : SolverOptions
        PETSc options; those of its controllers are refused.
    bridge : Bridge
        Knows of values that are not finite.

    Raises
    ------
    ConfigurationError
        For an option that would have no effect.
    """

    def __init__(
        self, ts: Any, settings: IntegratorSettings, options: SolverOptions, bridge: Bridge
    ) -> None:
        for name in options.given:
            if name.startswith("ts_adapt"):
                raise ConfigurationError(
                    f"petsc_options[{name!r}] has no effect where pnode controls the steps (norm= "
                    "or controller=pnode.PID(...)): give controller=pnode.PID(safety=..., "
                    "factormin=..., factormax=...) instead"
                )
        method, device = settings.method, settings.place.device
        self._embedded = not method.extrapolates
        # PETSc takes its extrapolated Euler method for one of order 2.
        extrapolated = not self._embedded or method.subtype == "1bee"
        self._order = 2 if extrapolated else method.order
        self._memory = ErrorMemory(settings.rule, self._order)
        self._ts, self._bridge = ts, bridge
        self._rtol, self._atol = (
            tolerances.values(value, device) for value in (settings.rtol, settings.atol)
        )
        self._other = ts.getSolution().duplicate()
        self._longest = ts.getStepLimits()[1]
        self.begin()

    @classmethod
    def of(
        cls, ts: Any, settings: IntegratorSettings, options: SolverOptions, bridge: Bridge
    ) -> Judge | None:
        """Return one for a TS whose steps are to be judged; None for others."""
        method = settings.method
        wanted = settings.judged and not (method.multistep or method.coupled)
        return cls(ts, settings, options, bridge) if wanted else None

    def begin(self) -> None:
        """Know of no step before."""
        self._memory.restart()
        self.restart()

    def restart(self) -> None:
        """Know of no states before, as where another integrator has taken a step."""
        self._before: tuple[torch.Tensor, float] | None = None

    def look(self, start: Any) -> None:
        """Judge the step that the TS has taken from a state ``start``. Collective.

        The TS then has the length proposed, and says whether the step is rejected.
        """
        ts, bridge = self._ts, self._bridge
        step = ts.getTimeStep()  # which a TS without a controller leaves as it is
        failed = bridge.first_nonfinite() is not None or bridge.ranks.failed
        error = self._error(start, step)
        if error is None and not failed:
            size, proposed = 0.0, step
        else:
            size = bridge.field.problem.measure(
                self._units(error) if not failed else torch.full_like(self._state(), math.inf)
            )
            proposed = step
            if math.isfinite(size):
                proposed = self._memory.propose(step, size, size <= 1.0)
        accepted = size <= 1.0
        if accepted and not self._embedded:
            self._before = vectors.copy_out(start), step
        ts.setTimeStep(min(proposed, self._longest))
        if not accepted:
            ts.setConvergedReason(_REJECTED)

    def _state(self) -> torch.Tensor:
        return vectors.copy_out(self._ts.getSolution())

    def _error(self, start: Any, step: float) -> torch.Tensor | None:
        """Return the other solution; None where there is none yet."""
        if self._embedded:
            evaluate_step(self._ts, self._order - 1, self._other)
            return vectors.copy_out(self._other)
        if self._before is None:
            return None
        before, length = self._before
        a = 1.0 + length / step
        new, old = self._state(), vectors.copy_out(start)
        return new - new / a + old / (a - 1.0) - before / (a * (a - 1.0))

    def _units(self, other: torch.Tensor | None) -> torch.Tensor:
        """Return the error in units of the tolerances."""
        new = self._state()
        assert other is not None
        error = other - new
        scale = self._atol + self._rtol * torch.maximum(new.abs(), other.abs())
        return tolerances.in_units(error, scale)

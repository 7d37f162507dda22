"""TSROSW: one linear solve per stage, with the Jacobian at the start of the step.

PETSc's own way with Jacobian and time loses the order of some of its types: it keeps the matrix of
the first stage even where the stages differ in their shifts, does not build it anew for the next
step where the last stage is explicit, and leaves out the derivative of f with respect to t, as it
says ("only works with autonomous ODE"). Here the callbacks see to it that every type takes the
step of its paper; see :class:`~pnode.solvers.scheme.Scheme`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.options import SolverOptions
from pnode.base.vectors import REAL, copy_in, copy_out, is_moderate
from pnode.field.field_checks import hides_time
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.linear.linearizer import Point
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.library import (
    before_each_stage,
    restart_jacobian_lag,
    set_recompute_jacobian,
)
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.solvers.scheme import Scheme

__all__ = ["RosenbrockBridge", "RosenbrockIntegrator", "warn_of_hidden_time"]

# Options that would make the steps those of another method.
_FIXED = (
    "snes_type",
    "snes_lag_jacobian",
    "snes_lag_preconditioner",
    "ts_rosw_recompute_jacobian",
)


class RosenbrockBridge(Bridge):
    """Callbacks of a Rosenbrock step.

    Parameters
    ----------
    scheme : Scheme
        Of the method.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self._scheme = scheme
        self._step = 0.0
        self._stage = -1
        self._base: Point | None = None
        self._time_slope: torch.Tensor | None = None
        self._knows_time = self._needs_time_slope = False

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        super().attach(field)
        self._needs_time_slope = self._scheme.needs_slope_of(field.mass)

    def detach(self) -> None:
        """End the sweep and drop everything that belongs to the user."""
        super().detach()
        self._base = self._time_slope = None

    def begin_step(self, step: float) -> None:
        """Say that a step of this length follows."""
        self._step, self._stage = step, -1
        self._base = self._time_slope = None

    def stage_begins(self) -> None:
        """Count PETSc's stages."""
        self._stage += 1

    def implicit_function(self, ts: Any, s: float, u: Any, u_dot: Any, f: Any) -> None:
        """f = M u_dot - g(s, u) - gamma_i h g_t (PETSc's IFunction).

        The first evaluation of a step is at its start, and its graph is kept for the Jacobian.
        """
        s = self.stage_time(s)
        value = self.guarded("rhs", self._evaluate_stage, s, u)
        if value is not None and is_moderate(value):
            copy_in(f, value)
        else:
            if value is not None and self.nonfinite_time is None:
                self.nonfinite_time = s
            self.fill(ts, u, f)
        if self.field.mass is None:
            f.aypx(-1.0, u_dot)
        else:
            copy_in(f, self.field.mass.apply(copy_out(u_dot)) - copy_out(f))

    def jacobian_point(self, s: float, u: Any, u_dot: Any) -> Point:
        """Return the start of the step."""
        return super().jacobian_point(s, u, u_dot) if self._base is None else self._base

    def _evaluate_stage(self, s: float, u: Any) -> torch.Tensor:
        own = copy_out(u, self.field.dtype)
        if self._base is None:
            wanted = self._needs_time_slope
            linearization = self.field.linearize(s, own, differentiate_time=wanted)
            self._base = Point(s, own, (0, -1), self.field, linearization=linearization)
            if wanted:
                self._time_slope = linearization.time_derivative()
                if not self._knows_time:
                    self._look_at_time(s, linearization)
            value = linearization.flat_value()
        else:
            value = self.field.rhs(s, own)
        if self._time_slope is None:
            return value
        return value + self._step * self._scheme.gamma[self._stage] * self._time_slope

    def _look_at_time(self, s: float, linearization: Linearization) -> None:
        """Warn, once, of a field that depends on t and hides it: the method needs df/dt.

        By one evaluation at a later time, unless torch records t. Among several ranks it would be
        collective, and is left out.
        """
        assert self._base is not None
        self._knows_time, field = True, self.field
        problem = field.problem
        if problem.ranks.parallel or field.exchange is not None:
            return
        start, *rest = problem.times
        span = rest[0] - start if rest and math.isfinite(rest[0]) else abs(self._step)
        u = self._base.u.detach().clone()
        if hides_time(field, s, linearization, span, lambda later: field.rhs(later, u)):
            warn_of_hidden_time(2)


def warn_of_hidden_time(level: int) -> None:
    """Warn that f depends on t and hides it; ``level`` is that of ``warnings.warn``, from here."""
    warnings.warn(
        "the vector field depends on t through a number that torch does not record "
        "(float(t), t.item(), t.detach(), numpy?), and this Rosenbrock method needs df/dt: "
        "without it it is of order 1, and takes far more steps. Compute with the tensor t, "
        "or take a method such as 'es325' or 'bdf'",
        RuntimeWarning, stacklevel=level + 1,
    )  # fmt: skip


class RosenbrockIntegrator(TimeIntegrator):
    """A forward TSROSW.

    Raises
    ------
    ConfigurationError
        For options with which the steps are no longer those of a Rosenbrock method.
    """

    bridge: RosenbrockBridge

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        for name in _FIXED:
            value = options.values.get(name)
            if value is not None and (name, value) != ("snes_type", "ksponly"):
                raise ConfigurationError(
                    f"the option {name}={value!r} is not for method={settings.method.name!r}, "
                    "which solves one linear system per stage with the Jacobian at the start of "
                    "the step: drop it, or take an implicit method such as 'es325'"
                )
        super().__init__(settings, options)
        set_recompute_jacobian(self.ts, not ROSENBROCK[settings.method.subtype].one_matrix)
        self._before = torch.empty(0, dtype=REAL, device=settings.place.device)
        self._count_stages = before_each_stage(self.ts, self.bridge.stage_begins)

    def _create_bridge(self) -> RosenbrockBridge:
        return RosenbrockBridge(ROSENBROCK[self.settings.method.subtype])

    def _step(self, where: dict[str, Any]) -> None:
        self.bridge.begin_step(self.ts.getTimeStep())
        self._before = copy_out(self.solution)
        # After a failed stage, or a step with an explicit last one, PETSc would keep its matrix.
        restart_jacobian_lag(self.ts.getSNES())
        super()._step(where)

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        """Return the state at the start of the last step. Not collective."""
        return Checkpoint((self._before,))

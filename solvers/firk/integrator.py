"""Steps of fully implicit Runge-Kutta methods, taken by pnode.

PETSc's TSIRK has no adjoint and wants Kronecker products of an assembled Jacobian. A TS of type
"python" carries options and monitors, as for BDF.

An adaptive step keeps the Jacobian while Newton's method converges fast, starts from the last
step's collocation polynomial, and ends Newton's method where what is left is small beside the
tolerances (the rules of SciPy's Radau, which are those of RADAU5 but for details). A fixed step
knows nothing of the one before, and solves its equations to round-off.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import ConfigurationError, LinearSolveFailed, SolveError
from pnode.base.evidence import project
from pnode.base.options import SolverOptions
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.problems import tolerances
from pnode.problems.step_controllers import PID
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.firk.control import PredictiveControl, RememberedControl
from pnode.solvers.firk.stage_newton import StageNewton, Stages
from pnode.solvers.firk.systems import AnyJacobian, SimplifiedSystem
from pnode.solvers.firk.tableaus import transformation
from pnode.solvers.multistep import FailedAttempt, TakenOrder
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import nonfinite_error, raise_stored
from pnode.solvers.petsc.integrator import StepOutcome, TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["ERROR_WEIGHTS", "CoupledIntegrator", "refuse_options"]

_REFUSED = ("ts_adapt", "ts_irk", "ts_python", "pc_", "snes_linesearch", "snes_type", "snes_lag")
_HEARD = ("ksp_rtol", "ksp_gmres_restart", "ksp_max_it")
_ROOT6 = 6.0**0.5
#: Weights of the stages in RADAU5's error estimate.
ERROR_WEIGHTS = ((-13 - 7 * _ROOT6) / 3, (-13 + 7 * _ROOT6) / 3, -1 / 3)
# More iterations, or slower convergence, ask for a new Jacobian.
_FEW, _FAST = 2, 1e-3


def refuse_options(settings: IntegratorSettings, options: SolverOptions) -> None:
    """Refuse PETSc options that would have no effect.

    Raises
    ------
    ConfigurationError
        If there are some.
    """
    for name in options.given:
        if name.startswith(_REFUSED) or (name.startswith("ksp_") and name not in _HEARD):
            raise ConfigurationError(
                f"petsc_options[{name!r}] (linear_solver=?) has no effect on "
                f"method={settings.method.name!r}, whose coupled stages pnode solves: choose "
                "jacobian='dense', 'block', 'sparse' or 'matrix-free' (GMRES, which hears "
                f"{', '.join(map(repr, _HEARD))})"
            )


class CoupledIntegrator(TimeIntegrator):
    """A forward integrator of a fully implicit Runge-Kutta method, reused from sweep to sweep.

    Parameters
    ----------
    settings : IntegratorSettings
        Method, size and tolerances.
    options : SolverOptions
        PETSc options; those that would have no effect are refused.

    Raises
    ------
    ConfigurationError
        For an option that would have no effect.
    """

    failure_factor = 0.5

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        refuse_options(settings, options)
        super().__init__(settings, options)
        scheme = settings.method.scheme
        assert scheme is not None
        self._scheme, self._transformation = scheme, transformation(scheme)
        device = settings.place.device
        self._rtol, self._atol = (
            tolerances.values(value, device) for value in (settings.rtol, settings.atol)
        )
        self._end = torch.as_tensor(self._transformation.end, device=device)
        self._newton = StageNewton(settings, options, self.bridge, scheme)
        rule = settings.controller
        self._control: PredictiveControl | RememberedControl = (
            RememberedControl(rule, self.first_order + 1)
            if isinstance(rule, PID)
            else PredictiveControl(self._newton.limit)
        )
        self._forget()
        self._failed: list[FailedAttempt] = []
        self._stages: Stages | None = None
        self._state = torch.empty(0)
        self._notes = False

    def _create_bridge(self) -> Bridge:
        return Bridge(points=self.settings.method.stages + 1)

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep from state ``u`` at time ``s``. Collective."""
        super().begin(field, u, s, step_index)
        self._newton.begin()
        self._control.restart()
        self._failed = []
        self._stand(vectors.copy_out(self.solution))

    def restore(self, history: Any) -> None:
        """Go on from a history, without what the steps before have left. Collective."""
        super().restore(history)
        self._stand(history[0])

    def restart_step(self) -> None:
        """Let the next step start afresh, without what the last one has left."""
        self._forget()

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self._forget()
        self._stages, self._state, self._notes = None, torch.empty(0), False
        super().end()

    def iterations(self) -> tuple[int, int]:
        """Newton and Krylov iterations since :meth:`begin`."""
        return self._newton.iterations, self._newton.krylov.iterations

    def _stand(self, u: torch.Tensor) -> None:
        self._state = u
        self._forget()

    def _forget(self) -> None:
        """Know no Jacobian, no polynomial, and no value of f."""
        self._jacobian: AnyJacobian | None = None
        self._current = False
        self._system: SimplifiedSystem | None = None
        self._slope: torch.Tensor | None = None
        self._before: tuple[float, torch.Tensor] | None = None

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``; see ``TimeIntegrator``. Collective.

        An ``order`` that tells of the attempts before it repeats an accepted adaptive step with
        these.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        end = s + step if end is None else end
        adaptive, accepts = self.settings.adaptive, None
        if adaptive and isinstance(order, TakenOrder):
            accepts = True
            for start, length, number, _, stop in order.failed:
                self._try(start, length, number, stop, False)
        outcome = self._try(s, step, index, end, accepts)
        if not outcome.accepted:
            self._failed.append((s, step, index, 0, end))
        elif adaptive:
            if accepts is None:
                outcome.order = TakenOrder.of(self.settings.method.order, step, self._failed)
            self._failed = []
        return outcome

    def _try(
        self, s: float, step: float, index: int, end: float, accepts: bool | None
    ) -> StepOutcome:
        """Try one step; ``accepts`` is the verdict on its error, if that is known."""
        where: dict[str, Any] = {
            "time": self._direction * s, "step": index, "method": self.settings.method.name,
        }  # fmt: skip
        self.ts.setTime(s)
        self.ts.setTimeStep(step)
        self.ts.setStepNumber(index)
        self.ranks.where = where
        if not self.settings.adaptive:
            self._forget()
        found = self._solve(s, step, end, where)
        if isinstance(found, SolveError):
            self._system = None
            if self.ranks.parallel:
                settled = self._settle(found)
                return StepOutcome(False, step, settled)
            return StepOutcome(False, step, found)
        if not self.settings.adaptive:
            if self.ranks.parallel and self.ranks.failed:
                return StepOutcome(False, step, self._settle(None))
            self._accept(step, found)
            return StepOutcome(True, step)
        return self._judge(s, step, found, where, accepts)

    def _solve(
        self, s: float, step: float, end: float, where: dict[str, Any]
    ) -> Stages | SolveError:
        """Solve for the stages, with the Jacobian at hand or, where that fails, a new one."""
        u, newton = self._state, self._newton
        size = self._size(u, u, self.ranks.rms) if self.settings.adaptive else None
        while True:
            self.bridge.nonfinite_time = self.bridge.infinite_at = None
            if self._jacobian is None:
                error = self._renew(s, where)
                if error is not None:
                    return error
            if self._system is None or self._system.h != step:
                assert self._jacobian is not None
                self._system = newton.factor(self._jacobian, step)
            found = newton.solve(s, step, end, u, self._guess(step), self._system, size, where)
            if not isinstance(found, SolveError) or self._current:
                return found
            self._jacobian = None

    def _renew(self, s: float, where: dict[str, Any]) -> SolveError | None:
        """Evaluate the Jacobian, and f, at the start of a step."""
        bridge = self.bridge
        point = bridge.point_at(s, self._state)
        graph = bridge.guarded("rhs", bridge.linearize, point)
        self._jacobian = bridge.guarded("jacobian", self._newton.jacobian, point, graph)
        raise_stored(bridge, None, where)
        self._system, self._current = None, True
        value = torch.full_like(self._state, torch.nan) if graph is None else graph.flat_value()
        self._slope = value.to(vectors.REAL)
        found = self._jacobian
        whole = self.ranks.norm(self._slope) < 1e150
        values = None
        if found is None:
            whole = False
        elif not isinstance(found, Linearization):
            values = found if isinstance(found, torch.Tensor) else found.fixed
            whole = whole and self.ranks.norm(values) < 1e150
        if whole:
            return None
        self._jacobian = None
        if not vectors.is_finite(self._slope):
            bridge.nonfinite_time = s
            return nonfinite_error(s, where, bridge)
        if values is not None and not vectors.is_moderate(values):
            bridge.infinite_at = s
        return nonfinite_error(None, where, bridge)

    def _guess(self, step: float) -> torch.Tensor:
        """Return Z on the last step's polynomial; zero if there is none."""
        if self._before is None:
            return self._state.new_zeros((self._scheme.stages, len(self._state)))
        length, Z = self._before
        nodes = (0.0, *self._scheme.c)
        weights = [
            [
                math.prod((1.0 + c * step / length - x) / (own - x) for x in nodes if x != own)
                for own in self._scheme.c
            ]
            for c in self._scheme.c
        ]
        return torch.tensor(weights, dtype=Z.dtype, device=Z.device) @ Z - self._end @ Z

    def _judge(
        self, s: float, step: float, found: Stages, where: dict[str, Any], accepts: bool | None
    ) -> StepOutcome:
        """Estimate the error of an adaptive step, and accept or reject it."""
        error = self._error(s, step, found, where)
        if isinstance(error, SolveError):
            settled = self._settle(error) if self.ranks.parallel else error
            return StepOutcome(False, step, settled)
        if not math.isfinite(error):
            raise SolveError(
                "the error norm overflows: rtol * |y| + atol is zero or tiny for an entry of y",
                **where,
            )
        iterations = found.iterations
        rejected = error > 1.0 if accepts is None else not accepts
        if rejected:
            return StepOutcome(False, self._control.reject(step, error, iterations))
        if self.ranks.parallel and self.ranks.failed:
            return StepOutcome(False, step, self._settle(None))
        renews = iterations > _FEW and found.rate > _FAST
        proposed = self._control.accept(step, error, iterations, renews)
        self._accept(step, found)
        self._current = False
        if renews:
            self._jacobian = None
        return StepOutcome(True, proposed)

    def _error(
        self, s: float, step: float, found: Stages, where: dict[str, Any]
    ) -> float | SolveError:
        """Return the norm of RADAU5's estimate, in units of the tolerances.

        (gamma M / h - J) e = g(t, u) + M sum E_i Z_i / h; a step that would be rejected is given
        another look, with g(t, u + e), if it follows an attempt that failed.
        """
        assert self._system is not None
        mass, u = self.bridge.field.mass, self._state
        moved = torch.tensor(ERROR_WEIGHTS, dtype=u.dtype, device=u.device) @ found.Z / step
        moved = moved if mass is None else mass.apply(moved)
        if self._slope is None:
            self._slope = self._newton.value(s, u, where)
        size = self._size(u, found.end, self.bridge.field.problem.measure)
        slope, norm = self._slope, math.inf
        for look in range(2):
            e = self._system.solve_real(slope + moved)
            if e is None:
                return LinearSolveFailed(
                    "the linear solve of an error estimate failed: use jacobian='dense'", **where
                )
            norm = size(e)
            if norm <= 1.0 or look or not self._failed or not math.isfinite(norm):
                break
            slope = self._newton.value(s, u + e, where)
            if not self.ranks.norm(slope) < 1e150:
                break
        return norm

    def _accept(self, step: float, found: Stages) -> None:
        self._stages, self._state = found, found.end
        self._slope = None
        self._before = (step, found.Z)
        vectors.copy_in(self.solution, found.end)

    def _size(self, u: torch.Tensor, new: torch.Tensor, measure: Any) -> Any:
        """Return the norm in units of atol + rtol max(|u|, |new|)."""
        scale = self._atol + self._rtol * torch.maximum(u.abs(), new.abs())

        def size(v: torch.Tensor) -> float:
            return float(measure(tolerances.in_units(v, scale)))

        return size

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        """Return the stages of the last step. Not collective."""
        assert self._stages is not None
        return Checkpoint(tuple(row.clone() for row in self._stages.Y))

    def note_values(self) -> None:
        """From now on note what :meth:`evidence` needs."""
        self._notes = True

    def evidence(self) -> tuple[float, ...]:
        """Return what a backward sweep can tell f by, of the last step. Not collective.

        For each stage: the projection of the value that f should have there, and what Newton's
        iteration leaves of a difference.
        """
        if not self._notes or self._stages is None:
            return ()
        found = self._stages
        return tuple(
            number
            for expected, doubt in zip(found.slopes, found.doubts, strict=True)
            for number in (project(expected), doubt)
        )

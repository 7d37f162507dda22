"""Newton's method for the coupled stages of a step.

Simplified: one Jacobian for all stages, by its eigenvalue transformation. Fixed steps that defeat
it are solved by Newton's method itself, with each stage's own Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import LinearSolveFailed, NonlinearSolveFailed, SolveError
from pnode.base.options import SolverOptions
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.problems.tolerances import values
from pnode.solvers.firk.systems import AnyJacobian, Blocks, CoupledSystem, Krylov, SimplifiedSystem
from pnode.solvers.firk.tableaus import transformation
from pnode.solvers.linear.linearizer import Point
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import nonfinite_error, raise_stored
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Scheme

__all__ = ["StageNewton", "Stages"]


@dataclass(frozen=True, eq=False)
class Stages:
    """The stages of a step that has been solved.

    Attributes
    ----------
    Z, Y : Tensor
        Y_i - u and Y_i, shape ``(s, size)``.
    end : Tensor
        Where the step ends.
    slopes : Tensor
        What f should be at the stages, M Y_i' of the collocation polynomial.
    doubts : tuple of float
        What Newton's method leaves of a difference of the projections of these.
    iterations : int
        Of Newton's method.
    rate : float
        Of convergence, as last observed; 0 if it was not.
    """

    Z: torch.Tensor
    Y: torch.Tensor
    end: torch.Tensor
    slopes: torch.Tensor
    doubts: tuple[float, ...]
    iterations: int
    rate: float


class StageNewton:
    """Solves the equations of a step; reused from step to step.

    Parameters
    ----------
    settings : IntegratorSettings
        Kind of Jacobian, precision, tolerances.
    options : SolverOptions
        ``snes_stol`` and ``snes_max_it``, and GMRES's options.
    bridge : Bridge
        Has the field.
    scheme : Scheme
        The method.

    Attributes
    ----------
    limit : int
        Most iterations.
    iterations : int
        So far.
    krylov : Krylov
        GMRES.
    """

    #: So many, unless someone has set ``snes_max_it``, where a step can be made smaller.
    MOST_ITERATIONS = 6
    # A fixed step whose iteration converges more slowly gets Newton's method itself.
    _SLOW = 0.3

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, bridge: Bridge, scheme: Scheme
    ) -> None:
        self._settings, self._bridge, self._scheme = settings, bridge, scheme
        self._transformation = transformation(scheme)
        device = settings.place.device
        self._inverse = torch.as_tensor(self._transformation.inverse, device=device)
        self._end = torch.as_tensor(self._transformation.end, device=device)
        self._separated = torch.as_tensor(self._transformation.separated, device=device)
        given = options.values
        self._eps = torch.finfo(settings.dtype).eps
        stol = given.get("snes_stol")
        self._stol = None if stol is None else float(stol)
        most = self.MOST_ITERATIONS if self._stol is None else 50
        self.limit = int(given.get("snes_max_it", most))
        self._kappa = self.content(settings)
        loose = 1e-5 if settings.jacobian == "matrix-free" else 1e-10
        self.krylov = Krylov(given, loose)
        self._blocks = Blocks(settings)
        pair = settings.jacobian_options.pair
        self._parts = None if pair is None else pair.layout
        self._mass: torch.Tensor | None = None
        self.iterations = 0

    @staticmethod
    def content(settings: IntegratorSettings) -> float:
        """Return what may be left of the stages of an adaptive step, in units of the tolerances."""
        rtol = float(torch.as_tensor(values(settings.rtol), device=HOST.device).min())
        return max(10.0 * torch.finfo(settings.dtype).eps / max(rtol, 1e-300), min(0.03, rtol**0.5))

    def begin(self) -> None:
        """Begin a sweep."""
        self.iterations = self.krylov.iterations = 0
        self._mass = None

    def jacobian(self, point: Point, graph: Linearization) -> AnyJacobian:
        """Return J at a point: blocks, entries, or what has its products."""
        return self._blocks.jacobian(self._bridge, point) if self._blocks.assembles else graph

    def factor(self, jacobian: AnyJacobian, step: float) -> SimplifiedSystem:
        """Return the systems with this Jacobian for a step of this length."""
        made = SimplifiedSystem(
            self._transformation, step, jacobian, self._bridge.field.mass, self._mass_blocks(),
            self.krylov, self._bridge.ranks,
        )  # fmt: skip
        self._bridge.field.ledger.factorizations += made.factored
        return made

    def _mass_blocks(self) -> torch.Tensor | None:
        if self._blocks.assembles and self._mass is None:
            self._mass = self._blocks.mass(self._bridge.field.mass)
        return self._mass

    def value(self, s: float, u: torch.Tensor, where: dict[str, Any]) -> torch.Tensor:
        """Return g(s, u), PETSc's precision; NaN where f failed among several ranks."""
        field = self._bridge.field
        found = self._bridge.guarded("rhs", field.rhs, s, u.to(field.dtype, copy=True))
        raise_stored(self._bridge, None, where)
        return torch.full_like(u, torch.nan) if found is None else found.to(REAL)

    def solve(
        self, s: float, step: float, end: float, u: torch.Tensor, guess: torch.Tensor,
        system: SimplifiedSystem, size: Any, where: dict[str, Any],
    ) -> Stages | SolveError:  # fmt: skip
        """Return the stages of a step, or why there are none. Collective.

        Parameters
        ----------
        s, step, end : float
            Where it begins, its length, and where it ends.
        u, guess : Tensor
            The state at its start, and first Z.
        system : SimplifiedSystem
            With the Jacobian to be used.
        size : callable or None
            Norm in units of the tolerances; None for fixed steps.
        where : dict
            Time, step and method, for errors.
        """
        times = [end if c == 1.0 else s + c * step for c in self._scheme.c]
        u, guess = u.to(REAL), guess.to(REAL)  # a state of single precision may have been restored
        found = self._iterate(times, step, u, guess, system, size, where)
        if isinstance(found, NonlinearSolveFailed) and size is None:
            found = self._iterate(times, step, u, guess, None, None, where)
        return found

    def _residual(
        self, times: list[float], step: float, u: torch.Tensor, Z: torch.Tensor,
        where: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """Return G - (A^-1 x M) Z / h."""
        G = torch.stack([self.value(s, u + z, where) for s, z in zip(times, Z, strict=True)])
        return G - self._slopes(Z, step)

    def _slopes(self, Z: torch.Tensor, step: float) -> torch.Tensor:
        mass, rates = self._bridge.field.mass, (self._inverse / step) @ Z
        return rates if mass is None else mass.apply(rates)

    def _iterate(
        self, times: list[float], step: float, u: torch.Tensor, Z: torch.Tensor,
        system: SimplifiedSystem | None, size: Any, where: dict[str, Any],
    ) -> Stages | SolveError:  # fmt: skip
        """Iterate with one Jacobian, or with each stage's own at each iterate if there is none."""
        ranks, before, rate, allowed = self._bridge.ranks, 0.0, 0.0, 0.0
        tight = self._stol is not None
        for iteration in range(self.limit):
            residual = self._residual(times, step, u, Z, where)
            if not ranks.norm(residual) < 1e150:
                self._bridge.nonfinite_time = at = self._not_finite(times, residual)
                return nonfinite_error(at, where, self._bridge)
            solves = system or self._coupled(times, step, u, Z, where)
            update = solves.solve(residual)
            if update is None:
                return LinearSolveFailed(
                    "a linear solve of the coupled stages failed: take smaller steps, or use "
                    "jacobian='dense'", reason="DIVERGED_LINEAR_SOLVE", **where,
                )  # fmt: skip
            self.iterations += 1
            Z = Z + update
            length, moved = self._lengths(update, u + Z)
            noise = self._eps * length
            norm = moved if tight or size is None else size(self._separated @ update)
            if not norm < 1e150:
                return self._failed(iteration, residual, where)
            if iteration:
                rate = norm / before if before else 0.0
            if tight or not iteration:
                allowed = self._allowed(length, noise, size, u)
            if norm <= 0.0 or (iteration and rate < 1.0 and rate / (1.0 - rate) * norm < allowed):
                return self._done(Z, u, step, residual, update, iteration + 1, rate)
            if iteration and rate >= 1.0 and moved <= 1e3 * noise:  # round-off is all that is left
                return self._done(Z, u, step, residual, update, iteration + 1, rate)
            left = self.limit - 1 - iteration
            if iteration and system is not None and self._hopeless(rate, norm, left, allowed):
                return self._failed(iteration, residual, where)
            before = norm
        return self._failed(self.limit, residual, where)

    def _allowed(self, length: float, noise: float, size: Any, u: torch.Tensor) -> float:
        """Return what may be left of the norm of an update."""
        if self._stol is not None or size is None:
            return max((self._stol or 0.0) * length, 2.0 * noise)
        return max(self._kappa, 4.0 * size(self._eps * u))

    def _hopeless(self, rate: float, norm: float, left: int, allowed: float) -> bool:
        """Whether an iteration does not come to its end in time, or is better left to another."""
        if rate >= 1.0:
            return True
        if self._stol is not None:
            return rate > self._SLOW
        # What is left of this update after it, rate / (1 - rate) of it, after so many more.
        return bool(rate ** (left + 1) / (1.0 - rate) * norm > allowed)

    def _coupled(
        self, times: list[float], step: float, u: torch.Tensor, Z: torch.Tensor,
        where: dict[str, Any],
    ) -> CoupledSystem:  # fmt: skip
        """Return the system with each stage's own Jacobian."""
        bridge, found = self._bridge, []
        for s, z in zip(times, Z, strict=True):
            point = bridge.point_at(s, u + z)
            graph = bridge.guarded("rhs", bridge.linearize, point)
            found.append(bridge.guarded("jacobian", self.jacobian, point, graph))
            raise_stored(bridge, None, where)
        return CoupledSystem(
            self._transformation, step, found, bridge.field.mass, self._mass_blocks(), self.krylov,
            bridge.ranks,
        )  # fmt: skip

    def _lengths(self, update: torch.Tensor, Y: torch.Tensor) -> tuple[float, float]:
        """Return the norms of the stages, and of an update: that of the part that moves most."""
        ranks, whole = self._bridge.ranks, self._bridge.ranks.norm(Y)
        if self._parts is None:
            return whole, ranks.norm(update)
        most = 0.0
        rows = [list(map(self._parts.parts, each)) for each in (update, Y)]
        for moved, own in zip(*(zip(*each, strict=True) for each in rows), strict=True):
            size = ranks.norm(torch.cat(own))
            most = max(most, ranks.norm(torch.cat(moved)) / size if size else 0.0)
        return whole, whole * most

    def _done(
        self, Z: torch.Tensor, u: torch.Tensor, step: float, residual: torch.Tensor,
        update: torch.Tensor, iterations: int, rate: float,
    ) -> Stages:  # fmt: skip
        Y = u + Z
        # Of all stages: one's own residual may have passed through zero just there.
        left = self._bridge.ranks.norm(residual)
        moved = float(torch.linalg.vector_norm(update))
        scale = float(torch.linalg.vector_norm(Y)) / moved if moved else 0.0
        doubts = (4.0 * left + 1e3 * self._eps * left * scale,) * len(Z)
        end = Y[-1].clone() if self._scheme.stiffly_accurate else u + self._end @ Z
        return Stages(Z, Y, end, self._slopes(Z, step), doubts, iterations, rate)

    def _not_finite(self, times: list[float], residual: torch.Tensor) -> float | None:
        """Return the first stage time where f was not finite, if this rank knows."""
        rows = zip(times, residual, strict=True)
        return next((s for s, row in rows if not bool(row.isfinite().all())), None)

    def _failed(
        self, iterations: int, residual: torch.Tensor, where: dict[str, Any]
    ) -> NonlinearSolveFailed:
        norm = self._bridge.ranks.norm(residual)
        return NonlinearSolveFailed(
            f"Newton's method failed after {iterations} iterations with a residual of {norm:.2e}: "
            "take smaller steps, or allow more iterations with petsc_options={'snes_max_it': ...}",
            reason="DIVERGED_MAX_IT", **where,
        )  # fmt: skip

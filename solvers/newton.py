"""Modified Newton iteration for F(s, u, shift u + psi) = 0 on PETSc's linear solvers.

The derivative F_u is evaluated rarely and kept. What changes from step to step is the shift: the
matrix F_u + shift I is formed anew from it, and factored by PETSc's PC, without an evaluation
(with a mass matrix, or for a residual, with one).
PETSc's SNES evaluates F once more after its last update, for its residual test; here the size of
the update and the observed rate of convergence decide, which saves an evaluation each solve.

References
----------
E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, section IV.8.
A. C. Hindmarsh et al., SUNDIALS, ACM Trans. Math. Softw. 31 (2005), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import NonFiniteVectorField, NonlinearSolveFailed, SolveError
from pnode.base.options import PETSc, SolverOptions
from pnode.layout.pair_layout import PairLayout
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import newton_error, raise_stored
from pnode.solvers.petsc.library import total_krylov_iterations
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["ModifiedNewton"]

_REASON = PETSc.SNES.ConvergedReason


class ModifiedNewton:
    """Solves one step's equations; reused from step to step.

    Parameters
    ----------
    ts : TS
        Its IFunction and IJacobian are F and its derivative, its SNES has tolerances and KSP.
    bridge : Bridge
        Behind those callbacks.
    settings : IntegratorSettings
        Precision of the vector field, and whether errors are measured by the tolerances.
    options : SolverOptions
        Which of SNES's tolerances someone has set.

    Attributes
    ----------
    newton : int
        Iterations so far.

    Notes
    -----
    The iteration stops when the estimated error of u is below ``KAPPA`` in the weighted norm, in
    which local errors are at most 1. With fixed steps it must be below ``snes_stol`` times the norm
    of u instead; of adaptive ones both, once ``snes_stol`` is set. ``snes_rtol`` and ``snes_atol``
    stop it by the residual, as in PETSc. None can ask for more than round-off of f leaves.

    The derivative F_u_dot must be the identity, which is what the shift is added to.
    """

    KAPPA = 0.05
    #: So many, unless someone has set ``snes_max_it``, where a step can be made smaller.
    MOST_ITERATIONS = 4
    # An iteration that converges more slowly gets a new Jacobian next time, or now if it fails.
    _SLOW = 0.1
    # The observed rate of convergence is remembered: it falls at most, and grows while it is not
    # observed, by these factors.
    _MEMORY, _DOUBT = 0.2, 1.5
    # What a rate of convergence that was not observed in this solve is at least.
    _LEAST = 0.02
    # Allowed relative change of the shift before the matrix is formed anew.
    _SHIFT_CHANGE = 0.1

    def __init__(
        self, ts: Any, bridge: Bridge, settings: IntegratorSettings, options: SolverOptions
    ) -> None:
        self._ts, self._bridge = ts, bridge
        self._snes = ts.getSNES()
        self._ksp = self._snes.getKSP()
        self._operator, self._matrix = ts.getIJacobian()[:2]
        self._kept: Any = None
        self._u, self._u_dot, self._f, self._update = (
            vectors.create(settings.comm, settings.size, settings.place) for _ in range(4)
        )
        self._snes.setSolution(self._u)  # what monitors look at
        self._equations = Equations()
        ts.setPythonContext(self._equations)
        #: Norm of the last residual, and about how much F changes for a change of u.
        self._last = (0.0, 0.0)
        self._searches = "snes_linesearch_type" in options.given
        self._given = options.values
        self._adaptive = settings.adaptive
        pair = settings.jacobian_options.pair
        self._parts: PairLayout | None = None if pair is None else pair.layout
        #: Whose integrals, which change nothing.
        self._driver = None if self._parts is None or self._parts.tangents else self._parts
        self._own = self._operator, self._matrix
        kind = settings.jacobian_options.assembled(settings.jacobian)
        if self._driver is not None:
            kind = pair.options.assembled(pair.jacobian)
            self._own = self._matrix.getPythonContext().ksp.getOperators()
        # Of a matrix that is the operator too, or of products alone.
        shells = [matrix.getType() == "python" for matrix in self._own]
        self._blocks = kind == "block" and self._own[0] == self._own[1]
        alike = shells[0] == shells[1] and (self._blocks or kind not in ("block", "pair"))
        self._reforms = settings.form == "rhs" and alike
        self._eps = torch.finfo(settings.dtype).eps
        self.begin()

    def begin(self) -> None:
        """Forget the Jacobian: a new problem begins."""
        self.newton = 0
        self.forget()
        self._krylov = total_krylov_iterations(self._ksp)

    def forget(self) -> None:
        """Evaluate the Jacobian anew next time, and know nothing of how it converges."""
        self._refresh = True
        self._shift = 0.0
        self._rate = 1.0

    def doubt(self, u: torch.Tensor) -> float:
        """Return how far the projection of F at the last solution may be from zero.

        The last residual was evaluated before the last update, which made it smaller. How steep F
        is, and with it its round-off, follows from that update too.
        """
        residual, steepness = self._last
        return 4.0 * residual + 1e3 * self._eps * steepness * float(torch.linalg.vector_norm(u))

    @property
    def krylov(self) -> int:
        """Krylov iterations since :meth:`begin`."""
        return total_krylov_iterations(self._ksp) - self._krylov

    def solve(
        self,
        s: float,
        guess: torch.Tensor,
        shift: float,
        psi: torch.Tensor,
        size: Callable[[torch.Tensor], float],
        where: dict[str, Any],
    ) -> torch.Tensor | SolveError:
        """Return u with F(s, u, shift u + psi) = 0, or why there is none. Collective.

        Parameters
        ----------
        s : float
            Time.
        guess : Tensor
            First iterate.
        shift, psi : float, Tensor
            u_dot = shift u + psi.
        size : callable
            Weighted norm.
        where : dict
            Time, step and method, for errors.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        stale = not self._refresh
        result = self._iterate(s, guess, shift, psi, size, where)
        bad_guess = isinstance(result, NonFiniteVectorField) and not self._snes.getIterationNumber()
        if stale and isinstance(result, SolveError) and not bad_guess:
            self._refresh = True
            result = self._iterate(s, guess, shift, psi, size, where)
        if isinstance(result, NonlinearSolveFailed) and not self._adaptive:
            result = self._full_newton(s, guess, shift, psi, where)
        if isinstance(result, SolveError):
            self._refresh = True
        return result

    def _full_newton(
        self, s: float, guess: torch.Tensor, shift: float, psi: torch.Tensor,
        where: dict[str, Any],
    ) -> torch.Tensor | SolveError:  # fmt: skip
        """Solve with SNES: a fixed step cannot be made smaller.

        With full steps first, then with backtracking, unless the user has chosen.
        """
        self._bridge.records = True
        self._equations.stand(s, shift, psi)
        search, ranks = self._snes.getLineSearch(), self._bridge.ranks
        chosen = search.getType()
        self._snes.setConvergenceHistory(reset=True)
        try:
            for kind in (chosen,) if self._searches else (chosen, "bt"):
                search.setType(kind)
                vectors.copy_in(self._u, guess)
                failure: PETSc.Error | None = None
                try:
                    self._snes.solve(None, self._u)
                except PETSc.Error as error:
                    failure = error
                raise_stored(self._bridge, failure, where)
                self.newton += self._snes.getIterationNumber()
                if failure is None and self._snes.getConvergedReason() > 0:
                    moved = ranks.norm(vectors.copy_out(self._u) - guess)
                    before = self._snes.getConvergenceHistory()[0][0]
                    self._last = self._snes.getFunctionNorm(), before / moved if moved else 0.0
                    self._refresh = True  # SNES has used the matrix for its own
                    return vectors.copy_out(self._u)
        finally:
            search.setType(chosen)
        return newton_error(self._snes, where, self._bridge)

    def slope(self, s: float, u: torch.Tensor, where: dict[str, Any]) -> torch.Tensor:
        """Return u' of F(s, u, u') = u' - g(s, u). Collective."""
        self._residual(s, u, 0.0, torch.zeros_like(u), where, False)
        return -vectors.copy_out(self._f)

    def _iterate(
        self, s: float, guess: torch.Tensor, shift: float, psi: torch.Tensor,
        size: Callable[[torch.Tensor], float], where: dict[str, Any],
    ) -> torch.Tensor | SolveError:  # fmt: skip
        """Iterate with one Jacobian."""
        rtol, atol, stol, limit = self._snes.getTolerances()
        given, ranks = self._given, self._bridge.ranks
        # A state and its tangents have scales of their own.
        one = self._parts is None or self._driver is not None
        by_residual = one and ("snes_rtol" in given or "snes_atol" in given)
        rtol = rtol if "snes_rtol" in given else 0.0
        by_norm = "snes_stol" in given
        limit = limit if "snes_max_it" in given or not self._adaptive else self.MOST_ITERATIONS
        u, norm, first, fresh = guess, 0.0, 0.0, self._refresh
        self._snes.setConvergedReason(_REASON.CONVERGED_ITERATING)
        for iteration in range(limit):
            self._snes.setIterationNumber(iteration)
            residual = self._residual(s, u, shift, psi, where, self._refresh)
            self._snes.setFunctionNorm(residual)
            self._snes.monitor(iteration, residual)
            if not residual < 1e300:
                return self._failed(_REASON.DIVERGED_FUNCTION_NANORINF, where)
            if self._driver is not None:
                residual = ranks.norm(self._driver.parts(vectors.view(self._f))[0])
            first, self._last = first or residual, (residual, self._last[1])
            if by_residual and ((residual <= rtol * first and iteration) or residual <= atol):
                u = self._converged(u if iteration else u.clone())  # not the caller's
                return self._with_integrals(u, s, shift, psi, where)
            update = self._correction(s, shift, where)
            if update is None:
                return self._failed(_REASON.DIVERGED_LINEAR_SOLVE, where)
            u = u - update
            before, length, absolute = norm, ranks.norm(u), self._length(update, u)
            noise = self._eps * length
            self._last = residual, residual / absolute if absolute else self._last[1]
            error = content = 0.0
            if self._adaptive or not by_norm:
                error, content = size(update), max(self.KAPPA, 4.0 * size(self._eps * u))
            norm, tolerance = error, content
            if by_norm:  # which can but ask for more where errors are judged
                norm, tolerance = absolute, max(stol * length, 2.0 * noise)
            if not norm < 1e300:
                return self._failed(_REASON.DIVERGED_FUNCTION_NANORINF, where)
            if iteration:
                observed = norm / before
                if observed >= 1.0 and absolute <= 1e3 * noise:  # round-off is all that is left
                    return self._with_integrals(self._converged(u), s, shift, psi, where)
                if observed >= 2.0 or (observed >= 1.0 and iteration > 1):
                    return self._failed(_REASON.DIVERGED_DTOL, where)
                self._rate = observed if fresh else max(self._MEMORY * self._rate, observed)
                fresh = False
            rate = min(self._rate, 0.999)
            if not iteration:
                rate = 0.5 if by_norm else max(rate, self._LEAST)
            left = rate / (1.0 - rate)
            if norm == 0.0 or (left * norm <= tolerance and left * error <= content):
                self._refresh = self._rate > self._SLOW and iteration > 0
                if not iteration:  # not measured: trust the old rate less and less
                    self._rate = min(1.0, self._DOUBT * self._rate)
                return self._with_integrals(self._converged(u), s, shift, psi, where)
        return self._failed(_REASON.DIVERGED_MAX_IT, where)

    def _length(self, update: torch.Tensor, u: torch.Tensor) -> float:
        """Return the norm of an update of u; in relation to u that of the part that moves most."""
        ranks = self._bridge.ranks
        if self._parts is None:
            return ranks.norm(update)
        sizes = [(ranks.norm(v), ranks.norm(x)) for v, x in zip(
            self._parts.parts(update), self._parts.parts(u), strict=True
        )]  # fmt: skip
        return ranks.norm(u) * max(moved / size if size else 0.0 for moved, size in sizes)

    def _residual(
        self, s: float, u: torch.Tensor, shift: float, psi: torch.Tensor,
        where: dict[str, Any], graph: bool,
    ) -> float:  # fmt: skip
        """Evaluate F into ``self._f`` and return its norm."""
        vectors.copy_in(self._u, u)
        vectors.copy_in(self._u_dot, torch.add(psi, u, alpha=shift))
        self._bridge.records = graph
        self._ts.computeIFunction(s, self._u, self._u_dot, self._f)
        raise_stored(self._bridge, None, where)
        return float(self._f.norm())

    def _correction(self, s: float, shift: float, where: dict[str, Any]) -> torch.Tensor | None:
        """Return what the last residual takes from u, or None where the linear solve fails.

        The matrix is brought to this shift, with a new Jacobian at the last residual if wanted.
        """
        if self._refresh or not abs(shift / self._shift - 1.0) <= self._SHIFT_CHANGE:
            if self._reforms and not self._refresh:
                self._reshift(shift)
            else:
                self._evaluate(s, shift, where)
            if self._refresh:
                self._refresh, self._rate = False, 1.0
            self._shift = shift
            self._ksp.setOperators(self._operator, self._matrix)
        self._ksp.solve(self._f, self._update)
        raise_stored(self._bridge, None, where)
        if self._ksp.getConvergedReason() < 0:
            return None
        self.newton += 1
        update = vectors.copy_out(self._update)
        if shift != self._shift:  # between u_dot alone (factor ratio) and F_u alone (1)
            update *= 2.0 / (1.0 + shift / self._shift)
        return update

    def _evaluate(self, s: float, shift: float, where: dict[str, Any]) -> None:
        """Evaluate the Jacobian at the last residual."""
        self._ts.computeIJacobian(s, self._u, self._u_dot, shift, self._operator, self._matrix)
        raise_stored(self._bridge, None, where)
        self._keep(shift)

    def _keep(self, shift: float) -> None:
        """Keep F_u of an assembled F_u + shift I."""
        matrix = self._own[1]
        if not self._reforms or (matrix.getType() == "python" and not self._blocks):
            return
        if not self._blocks:
            self._kept = matrix.copy(self._kept)
            self._kept.shift(-shift)
        else:
            self._kept = matrix.getPythonContext().shifted(-shift)

    def _reshift(self, shift: float) -> None:
        """Form F_u + shift I from the kept Jacobian."""
        operator, matrix = self._own
        if self._blocks:
            matrix.getPythonContext().blocks = self._kept.shifted(shift).blocks
            matrix.stateIncrease()
        elif operator.getType() == "python":
            operator.getPythonContext().rate_factor = shift
            operator.assemble()
        elif self._kept is not None:
            self._kept.copy(matrix)
            matrix.shift(shift)
        if self._kept is not None:
            self._bridge.field.ledger.factorizations += 1
        if self._driver is not None:
            self._matrix.getPythonContext().stand_at(shift)
            self._matrix.stateIncrease()

    def _converged(self, u: torch.Tensor) -> torch.Tensor:
        self._snes.setConvergedReason(_REASON.CONVERGED_SNORM_RELATIVE)
        return u

    def _with_integrals(
        self, u: torch.Tensor, s: float, shift: float, psi: torch.Tensor, where: dict[str, Any]
    ) -> torch.Tensor:
        """Let the integrals be those of the state as it is now: their equations are linear."""
        if self._parts is not None and self._parts.integrals:
            self._residual(s, u, shift, psi, where, False)
            u = self._parts.corrected(u, vectors.view(self._f), shift)
        return u

    def _failed(self, reason: int, where: dict[str, Any]) -> SolveError:
        self._snes.setConvergedReason(reason)
        return newton_error(self._snes, where, self._bridge)


class Equations:
    """Python context of the TS: gives its SNES the equations of the step, F = 0 as above."""

    def stand(self, s: float, shift: float, psi: torch.Tensor) -> None:
        """Set time, shift and psi."""
        self._s, self._shift, self._psi = s, shift, psi

    def formSNESFunction(self, snes: Any, u: Any, f: Any, ts: Any) -> None:
        """f = F(s, u, shift u + psi)."""
        ts.computeIFunction(self._s, u, self._rate(u), f)

    def formSNESJacobian(self, snes: Any, u: Any, a: Any, p: Any, ts: Any) -> None:
        """p (and a) = F_u + shift F_udot."""
        ts.computeIJacobian(self._s, u, self._rate(u), self._shift, a, p)

    def _rate(self, u: Any) -> Any:
        u_dot = u.duplicate()
        vectors.copy_in(u_dot, torch.add(self._psi, vectors.view(u), alpha=self._shift))
        return u_dot

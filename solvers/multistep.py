"""BDF with variable coefficients, step size and order, driven step by step.

PETSc's TSBDF keeps its history to itself, so that it can neither be restored nor replayed, and
has no adjoint. Here the history belongs to pnode. A PETSc TS of type "python" carries the
callbacks, options and monitors, and its SNES the linear solver. It does not take the steps itself:
``TSStep`` would have to tell a rejected step from a failed one through its convergence reason
alone, and SNES evaluates one more residual per step than :mod:`pnode.solvers.newton`.

Fixed steps need k - 1 of them before order k has its history. These are taken by implicit Euler
with 1, 2... k - 1 substeps, extrapolated to a local error of order k: the start then does not
spoil the order, and needs nothing but the same kind of nonlinear solves. Adaptive steps begin at
order 1 with a step as short as its error estimate demands.

To go on from a checkpoint, a multistep method needs its history: what the integrator's ``history``
was before a step goes back in with ``restore``; the orders of the steps are in the trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from pnode.base import vectors
from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError, SolveError
from pnode.base.evidence import project
from pnode.base.options import SolverOptions
from pnode.field.vectorfield import VectorField
from pnode.problems import tolerances
from pnode.solvers import bdf
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.newton import ModifiedNewton
from pnode.solvers.petsc.integrator import StepOutcome, TimeIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["MultistepIntegrator", "TakenOrder", "combine"]

#: States before the new one, and the lengths of the steps between them, newest first.
History = tuple[tuple[torch.Tensor, ...], tuple[float, ...]]


#: Start, length, index, order and end.
FailedAttempt: TypeAlias = tuple[float, float, int, int, float]


class TakenOrder(int):
    """The order of an accepted adaptive step, with what it takes to repeat it bit by bit.

    Attempts that fail change what Newton's method and the history are at the next one.

    Attributes
    ----------
    length : float
        Length of the step.
    failed : tuple
        Arguments of the attempts before it that failed.
    """

    length = 0.0
    failed: tuple[FailedAttempt, ...] = ()

    @classmethod
    def of(cls, order: int, length: float, failed: Sequence[FailedAttempt]) -> TakenOrder:
        """Return the order with these attributes."""
        taken = cls(order)
        taken.length, taken.failed = length, tuple(failed)
        return taken


_REFUSED_OPTIONS = ("ts_adapt", "ts_bdf", "ts_python")


class MultistepIntegrator(TimeIntegrator):
    """A forward BDF integrator, reused from sweep to sweep.

    Parameters
    ----------
    settings : IntegratorSettings
        Method, size and tolerances.
    options : SolverOptions
        PETSc options; those of PETSc's step-size controllers and of TSBDF are refused.

    Raises
    ------
    ConfigurationError
        For an option that would have no effect.
    """

    proposes_absolute = True

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        for name in options.given:
            if name.startswith(_REFUSED_OPTIONS):
                raise ConfigurationError(
                    f"petsc_options[{name!r}] has no effect on method={settings.method.name!r}, "
                    "whose steps and orders pnode chooses: use rtol, atol, min_step, max_step or "
                    "'bdf1' to 'bdf6' for a fixed order"
                )
        super().__init__(settings, options)
        self._highest = highest = settings.method.order
        self._control = bdf.OrderControl(1 if settings.method.name == "bdf" else highest, highest)
        self._newton: ModifiedNewton | None = None
        atol = torch.as_tensor(tolerances.values(settings.atol), device=HOST.device)
        self._relative = bool((atol == 0.0).any())
        self._states: tuple[torch.Tensor, ...] = ()
        self._lengths: tuple[float, ...] = ()
        self._slope: torch.Tensor | None = None
        self._checkpoint = Checkpoint(())
        self._failed: list[FailedAttempt] = []
        self._notes = False
        self._evidence: list[float] = []

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep from state ``u`` at time ``s``, without history. Collective."""
        super().begin(field, u, s, step_index)
        if self._newton is None:
            self._newton = ModifiedNewton(self.ts, self.bridge, self.settings, self.options)
        self._newton.begin()
        self._control.restart()
        self._failed = []
        self.restore(((vectors.copy_out(self.solution),), ()))

    @property
    def history(self) -> History:
        """What the next step needs, beside its order."""
        return self._states, self._lengths

    def restore(self, history: History) -> None:
        """Go on from this history; the next attempt starts where its first state stands.

        Nothing of what was solved before changes its bits.
        """
        self._states, self._lengths = history
        self._slope = None
        if self._newton is not None:
            self._newton.forget()
        vectors.copy_in(self.solution, self._states[0])

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self._states, self._lengths, self._slope = (), (), None
        self._checkpoint = Checkpoint(())
        self._notes, self._evidence = False, []
        super().end()

    def iterations(self) -> tuple[int, int]:
        """Newton and Krylov iterations since :meth:`begin`."""
        assert self._newton is not None
        return self._newton.newton, self._newton.krylov

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``. Collective.

        Parameters
        ----------
        s, step, index, end : float, float, int, float or None
            As in :meth:`TimeIntegrator.attempt`.
        order : int
            0: this integrator's choice. k > 0: BDF of order k. -p: extrapolated implicit Euler of
            order p. Anything but 0 repeats a recorded step, with the attempts that failed before
            it where the order tells of them: the bits are the same again.

        Returns
        -------
        StepOutcome
            With the order taken, coded in the same way.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        adaptive, accepts = self.settings.adaptive, None
        end = s + step if end is None else end
        if adaptive and isinstance(order, TakenOrder):
            accepts = True
            for start, length, number, tried, stop in order.failed:
                self._try(start, length, number, tried, False, stop)
        outcome = self._try(s, step, index, order, accepts, end)
        if not outcome.accepted:
            self._failed.append((s, step, index, outcome.order, end))
        elif adaptive and not accepts:
            outcome.order = TakenOrder.of(outcome.order, step, self._failed)
            self._failed = []
        return outcome

    def _try(
        self, s: float, step: float, index: int, order: int, accepts: bool | None, end: float
    ) -> StepOutcome:
        """Try one step; ``accepts`` is the verdict on its error, if that is known."""
        where = {
            "time": self._direction * s, "step": index, "method": self.settings.method.name,
        }  # fmt: skip
        self.ts.setTime(s)
        self.ts.setTimeStep(step)
        self.ts.setStepNumber(index)
        if not order:
            if self.settings.adaptive:
                order = self._control.order
            elif len(self._states) < self._highest:
                order = -(self._highest - 1)
            else:
                order = self._highest
        self.ranks.where = where
        self._evidence = []
        if order < 0:
            outcome = self._extrapolate(s, step, -order, where)
        else:
            outcome = self._differentiate(step, end, order, where, accepts)
        if not outcome.accepted and self.ranks.parallel:
            outcome.error = self._settle(outcome.error)
        outcome.order = order
        return outcome

    def _extrapolate(self, s: float, step: float, order: int, where: dict[str, Any]) -> StepOutcome:
        """Take one step of extrapolated implicit Euler."""
        assert self._newton is not None
        size = self._size(self._states[0], newton=True)
        residual = self.settings.form == "residual"
        kept = [self._states[0]] if residual else []
        ends = []
        for number in range(1, order + 1):
            h, u = step / number, self._states[0]
            for i in range(1, number + 1):
                result = self._solve(s + i * h, u, 1.0 / h, u * (-1.0 / h), size, where)
                if isinstance(result, SolveError):
                    return StepOutcome(False, step, result)
                u = result
                kept.append(u)
            ends.append(u)
        new = combine(bdf.start_weights(order), ends)
        self._accept(new, step)
        self._checkpoint = Checkpoint((torch.stack(kept),))
        return StepOutcome(True, step)

    def _differentiate(
        self, step: float, end: float, order: int, where: dict[str, Any], accepts: bool | None
    ) -> StepOutcome:
        """Take one step of BDF, to the time ``end``."""
        assert self._newton is not None
        adaptive = self.settings.adaptive
        states = self._states
        lengths = (step, *self._lengths)
        distances = _cumulative(lengths)
        d = bdf.derivative_weights(distances[:order])
        psi = combine(d[1:], states)
        known = min(order + 1, len(states))
        guess = combine(bdf.extrapolation_weights(distances[:known]), states)
        first = adaptive and len(states) == 1
        if first:
            guess = torch.add(guess, self._initial_slope(end - step, where), alpha=step)
        size = self._size(states[0], guess, newton=True)
        new = self._solve(end, guess, d[0], psi, size, where)
        if isinstance(new, SolveError):
            self._control.fail()
            return StepOutcome(False, step, new)
        if not adaptive:
            self._accept(new, step)
            self._store(new, d, psi)
            return StepOutcome(True, step)
        points = (new, *states)

        def difference(m: int) -> torch.Tensor:
            if first and m == 2:  # the slope makes the first node a double one
                return new - guess
            return combine(bdf.difference_weights(distances[:m]), points)

        size = self._size(states[0], guess, new)
        error = bdf.error_constant(distances[:order]) * size(difference(order + 1))
        if not math.isfinite(error):
            raise SolveError(
                "the error norm overflows: rtol * |y| + atol is zero or tiny for an entry of y",
                **where,
            )
        if not accepts if accepts is not None else error > 1.0:
            proposed = self._control.reject(step, lengths, lambda m: size(difference(m)), error)
            if self._control.lost:
                self._control.restart()
                self._states, self._lengths, self._slope = states[:1], (), None
            return StepOutcome(False, proposed)
        self._accept(new, step)
        self._store(new, d, psi)
        size = self._size(new)
        if first:
            lengths = (step, 0.0)
        proposed = self._control.accept(step, lengths, lambda m: size(difference(m)))
        return StepOutcome(True, proposed)

    def _solve(
        self, s: float, guess: torch.Tensor, shift: float, psi: torch.Tensor, size: Any,
        where: dict[str, Any],
    ) -> torch.Tensor | SolveError:  # fmt: skip
        """Solve for a state, and note what f should be there and how closely that is known."""
        assert self._newton is not None
        found = self._newton.solve(s, guess, shift, psi, size, where)
        if self._notes and not isinstance(found, SolveError):
            rate = torch.add(psi, found, alpha=shift)
            if self.bridge.field.has_rhs:
                mass = self.bridge.field.mass
                expected = project(rate if mass is None else mass.apply(rate))
            else:
                expected = 0.0  # of F itself
            self._evidence += [expected, self._newton.doubt(found)]
        return found

    def note_values(self) -> None:
        """From now on note what :meth:`evidence` needs."""
        self._notes = True

    def evidence(self) -> tuple[float, ...]:
        """Return what a backward sweep can tell f by, of the last step. Not collective.

        For each system solved: the projection of the value that f should have, and what Newton's
        iteration leaves of a difference.
        """
        return tuple(self._evidence)

    def _store(self, new: torch.Tensor, d: Sequence[float], psi: torch.Tensor) -> None:
        rate = torch.add(psi, new, alpha=d[0]) if self.settings.form == "residual" else None
        weights = torch.tensor(d, dtype=vectors.REAL, device=HOST.device)
        self._checkpoint = Checkpoint((new,), weights, rate)

    def _accept(self, new: torch.Tensor, step: float) -> None:
        """Move on.

        Order k uses k states before the new one, its predictor one more, and the estimate at
        order k + 1 another.
        """
        most = self._highest + 2
        self._states = (new, *self._states)[:most]
        self._lengths = (step, *self._lengths)[: most - 1]
        self._slope = None
        vectors.copy_in(self.solution, new)

    def _size(self, u: torch.Tensor, *others: torch.Tensor, newton: bool = False) -> Any:
        """Return the norm in units of atol + rtol |u|; Newton's is a root mean square.

        Where that is zero, u is measured by the others, and where all of them are zero by the first
        vector that is not: what the norm then says is that there is something to measure.
        """
        rtol, atol = (
            tolerances.values(value, u.device) for value in (self.settings.rtol, self.settings.atol)
        )
        scale = atol + rtol * u.abs()
        for other in others:
            if not self._relative:
                break
            scale = torch.where(scale == 0.0, rtol * other.abs(), scale)
        measure = self.ranks.rms if newton else self.bridge.field.problem.measure

        def size(v: torch.Tensor) -> float:
            nonlocal scale
            if self._relative:
                scale = torch.where(scale == 0.0, rtol * v.abs(), scale)
                return measure(tolerances.in_units(v, scale))
            return measure(v / scale)

        return size

    def _initial_slope(self, s: float, where: dict[str, Any]) -> torch.Tensor:
        """Return u' where the history is a single state: -F(s, u, 0).

        Zero where that is not u': the first step is then judged by all that u moves.
        """
        if self.settings.form != "rhs":
            return torch.zeros_like(self._states[0])
        if self._slope is None:
            assert self._newton is not None
            self._slope = self._newton.slope(s, self._states[0], where)
        return self._slope

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        """Return what the adjoint of the last step needs. Not collective.

        BDF: the new state and the coefficients d_0..d_k, and for a residual u_dot. Extrapolated
        implicit Euler: all substeps' states, stacked, for a residual behind the start.
        """
        return self._checkpoint


def combine(weights: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of weight times tensor over the shorter of both."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=False):
        total.add_(tensor, alpha=weight)
    return total


def _cumulative(lengths: Sequence[float]) -> list[float]:
    distances, total = [], 0.0
    for length in lengths:
        total += length
        distances.append(total)
    return distances

"""PETSc's callbacks into the vector field.

A callback must not raise: PETSc would leave its stage vectors locked. The bridge keeps the first
exception, answers with finite filler until the step is over, and the integrator raises it then.
For the same reason the user's code gets copies: a view that lives on in a traceback, a graph or a
user's list would keep PETSc's vector locked, or change under its owner.

The bridge refers to no PETSc object, and PETSc's objects refer to the bridge: no cycle keeps a TS
alive. Its field is set for the duration of one sweep.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError
from pnode.base.evidence import Note, project, projector
from pnode.base.vectors import REAL, are_moderate, copy_in, copy_out, fill, is_moderate, view
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.solvers.linear.jacobians import Jacobian
from pnode.solvers.linear.linearizer import Linearizer
from pnode.solvers.petsc.library import forget_step_norm

__all__ = ["Bridge"]

# Difference of two times of the same stage, relative to the larger end of the step, and to its
# length: PETSc's abscissae are sums of coefficients.
_ROUND_OFF = 4.0 * float(torch.finfo(torch.float64).eps)
_ROUND_OFF_OF_SUMS = 1e-13


class Bridge(Linearizer):
    """State shared by the callbacks of one TS.

    Parameters
    ----------
    points : int
        How many linearizations to keep.
    keep : int
        How many of the last evaluated states to keep.
    check : bool
        Whether to look at every value of the right-hand side for NaN and overflow.

    Attributes
    ----------
    nonfinite_time : float or None
        Stage time at which f was NaN or infinite.
    evaluated : deque of Tensor
        The last states that the right-hand side was evaluated at, oldest first: the stages of an
        explicit step.
    projections : deque of float or None
        Of the values there, in a sweep that notes them; see :mod:`pnode.base.evidence`.
    jacobian : Jacobian or None
        What fills the matrices of an implicit method, from :mod:`pnode.solvers.linear.jacobians`.
    """

    jacobian: Jacobian | None = None

    def __init__(self, points: int = 1, keep: int = 0, check: bool = False) -> None:
        super().__init__(points)
        #: What PETSc calls the right-hand side: the explicit part of a split one, or all of it.
        self._explicit: Any = None
        self.evaluated: deque[torch.Tensor] = deque(maxlen=keep)
        self.projections: deque[float] | None = None
        self._projected: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._times: list[float] = []
        self._round_off = 0.0
        self._solve_begins = self._notes_stages = True
        #: Time, state and value of the last evaluation of an implicit part without a graph.
        self._last: tuple[float, torch.Tensor, torch.Tensor] | None = None
        #: Graphs of f at these states, if a sweep asks for them, and the bytes that each keeps.
        self.graphs: deque[Linearization] | None = None
        self.graph_bytes = -1
        self._check = check
        self.nonfinite_time: float | None = None
        self._screened: list[tuple[float, torch.Tensor]] = []
        #: Makes this rank reject the attempt under way, in a solve of several with a controller.
        self.reject: weakref.WeakMethod[Callable[[], None]] | None = None
        self._fillers = 0
        #: With a mass matrix: the slope that a DIRK method's first step begins with.
        self._first_slope: torch.Tensor | None = None
        #: Of an IMEX method with one: whether no solve has begun in the stage under way.
        self._stage_is_explicit = False
        #: Whether residuals keep their graph for a Jacobian that is asked for next.
        self.records = True

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        super().attach(field)
        self._explicit = field.explicit or field
        self.projections = self._projected = None
        self._times = []
        self.nonfinite_time = None
        if self.jacobian is not None:
            self.jacobian.forget()

    def detach(self) -> None:
        """End the sweep and drop everything that belongs to the user."""
        super().detach()
        self._explicit = None
        if self.jacobian is not None:
            self.jacobian.forget()
        self._screened.clear()
        self.evaluated.clear()
        self._last = self._first_slope = None
        self.projections = self._projected = None
        self._times = []
        self.graphs = None
        self.graph_bytes = -1

    def keep_graphs(self) -> None:
        """From now on keep the graphs of f at the last evaluated states."""
        self.graphs = deque(maxlen=self.evaluated.maxlen)

    def note_values(self, ends_evaluated: bool) -> None:
        """From now on note what f returns.

        Parameters
        ----------
        ends_evaluated : bool
            Whether implicit stages are solved in a way that evaluates f last where it ends.
        """
        self.projections = deque(maxlen=self.evaluated.maxlen)
        self.noted = []
        self._notes_stages = ends_evaluated

    def begin_stages(self, times: tuple[float, ...]) -> None:
        """Say at which times the stages of a step are, its start and end among them.

        PETSc's own times differ from these by round-off.
        """
        self._times = list(times)
        self.infinite_at = None
        self._solve_begins = True
        low, high = min(times), max(times)
        self._round_off = _ROUND_OFF * max(-low, high) + _ROUND_OFF_OF_SUMS * (high - low)

    def stage_time(self, s: float) -> float:
        """Return the stage time that PETSc's differs from by round-off."""
        if s in self._times or not self._times:
            return s
        nearest = min(self._times, key=lambda time: abs(s - time))
        if abs(s - nearest) <= self._round_off:
            return nearest
        self._times.append(s)
        return s

    def stage_begins(self) -> None:
        """From now on PETSc passes the right times, and evaluates for another stage."""
        self.start_time = None
        self._solve_begins = self._stage_is_explicit = True

    def set_rhs_function(self, ts: Any, solution: Any) -> None:
        """Make this the right-hand side of an explicit TS, for states as this. Not collective."""
        ts.setRHSFunction(self.rhs_function)

    def rhs_function(self, ts: Any, s: float, u: Any, f: Any) -> None:
        """f = g(s, u) (PETSc's RHSFunction)."""
        if s not in self._times:
            s = self.stage_time(s)
        value = self.guarded("rhs", self._evaluate, s, u)
        if value is None:
            self.fill(ts, u, f)
            return
        if self._check and self._defers(value):
            copy_in(f, self._screen(s, value))
        elif (self._check or self.ranks.parallel) and not is_moderate(value):
            # PETSc's error norm would end the step with an error of its own.
            if self.nonfinite_time is None:
                self.nonfinite_time = s
            self.fill(ts, u, f)
        else:
            copy_in(f, value)

    def _defers(self, value: torch.Tensor) -> bool:
        """Whether the host looks at values after the step only, instead of waiting for each."""
        return value.device != HOST.device and not self.ranks.parallel

    def _screen(self, s: float, value: torch.Tensor) -> torch.Tensor:
        """Return a value, or zero if PETSc's error norm would not take it."""
        moderate = are_moderate(value)
        self._screened.append((s, moderate))
        return torch.where(moderate, value, 0.0)

    def first_nonfinite(self) -> float | None:
        """Return the first stage time since the last call at which f was NaN or infinite."""
        if self._screened:
            fine = torch.stack([moderate for _, moderate in self._screened]).tolist()
            times = [s for (s, _), good in zip(self._screened, fine, strict=True) if not good]
            if times and self.nonfinite_time is None:
                self.nonfinite_time = times[0]
            self._screened.clear()
        return self.nonfinite_time

    def fill(self, ts: Any, u: Any, f: Any) -> None:
        """Fill f with finite numbers, instead of a value at u that is not to be had.

        Among several ranks with a controller, such that the error estimate is not zero whatever
        its weights and however short the step, and it is too large on this rank. Norms that PETSc
        caches must be cached on all ranks or none: no ``f.set``.
        """
        value = 0.0
        reject = None if self.reject is None else self.reject()
        if reject is not None and self.ranks.parallel:
            self._fillers += 1
            scale = (1.0 + float(view(u).abs().max())) / abs(ts.getTimeStep())
            value = scale * (1.0 + self._fillers * 0.6180339887498949 % 1.0)
            reject()
        fill(f, value)

    def implicit_function(self, ts: Any, s: float, u: Any, u_dot: Any, f: Any) -> None:
        """f = M u_dot - g(s, u), or the residual (PETSc's IFunction).

        The graph is kept if the Jacobian is to be evaluated at the same point next.
        """
        if self.start_time is not None and self._first_slope is not None:
            copy_in(f, copy_out(u_dot) - self._first_slope)
            return
        if self._stage_is_explicit and self.field.problem.form == "imex_mass":
            slope = self.guarded("rhs", self._slope, self.stage_time(s), u)
            copy_in(f, torch.zeros_like(view(u)) if slope is None else -slope)
            return
        s = self.stage_time(s if self.start_time is None else self.start_time)
        value = self.guarded("rhs", self._implicit_value, s, u, u_dot)
        if value is None:
            if self.ranks.parallel:  # stops the iteration on all ranks
                fill(f, torch.nan)
            else:
                u_dot.copy(f)
        else:
            if self.ranks.parallel and self.nonfinite_time is None and not is_moderate(value):
                self.nonfinite_time = s
            copy_in(f, value)
            if self.field.mass is None and self.field.has_rhs:
                f.axpy(1.0, u_dot)

    def implicit_jacobian(
        self, ts: Any, s: float, u: Any, u_dot: Any, shift: float, a: Any, p: Any
    ) -> None:
        """Fill p (and a) with shift dF/du_dot - dg/du (PETSc's IJacobian)."""
        s = self.stage_time(s if self.start_time is None else self.start_time)
        assert self.jacobian is not None
        if not self.jacobian.constant:
            forget_step_norm(ts.getSNES())
        self.jacobian.compute(self, ts, s, u, u_dot, shift, a, p)

    def _evaluate(self, s: float, u: Any) -> torch.Tensor:
        field = self._explicit
        own = copy_out(u, field.dtype)
        self.evaluated.append(own)
        if self.graphs is None:
            value = field.rhs(s, own)
        else:
            if self.graph_bytes < 0:  # measured once: every evaluation keeps as much
                linearization, self.graph_bytes = field.measure(s, own)
            else:
                linearization = field.linearize(s, own)
            self.graphs.append(linearization)
            value = linearization.flat_value()
            linearization.drop_value()
        if self.projections is not None and self.noted is not None:
            if self._projected is None:
                self._projected = projector(value)
            projection = float(self._projected(value))
            self.projections.append(projection)
            if field is not self._attached:  # the explicit part of a split one
                self.noted.append(Note(1, s, project(own), projection))
        return value if field.mass is None else explicit_slope(field, s, own, value)

    def guess_slope(self, u: Any, guess: Any) -> None:
        """Guess the slope that DIRK's first step begins with, for which PETSc solves F = 0.

        Zero, for the same bits whatever came before; with a mass matrix, which may be singular, the
        slope itself.
        """
        self._first_slope, self._stage_is_explicit = None, False
        if self.start_time is None:
            return
        if self.field.mass is None:
            guess.set(0.0)
            return
        slope = self.guarded("rhs", self._slope, self.stage_time(self.start_time), u)
        self._first_slope = torch.zeros_like(view(u)) if slope is None else slope
        copy_in(guess, self._first_slope)

    def _slope(self, s: float, u: Any) -> torch.Tensor:
        """Return K with M K = g(s, u); see :meth:`MassMatrix.solve` for a singular M."""
        mass = self.field.mass
        assert mass is not None
        return mass.solve(self._noted_value(s, u).to(REAL))

    def _implicit_value(self, s: float, u: Any, u_dot: Any) -> torch.Tensor:
        """Return F(s, u, u_dot), without the term u_dot where M is the identity."""
        value, mass = -self._noted_value(s, u, u_dot), self.field.mass
        return value if mass is None else mass.apply(copy_out(u_dot)) + value

    def _noted_value(self, s: float, u: Any, u_dot: Any = None) -> torch.Tensor:
        """Return g(s, u), or minus the residual, and note it."""
        field = self.field
        wanted = self.records and (self.jacobian is None or self.jacobian.records)
        last, self._last = self._last, None
        if last is not None and last[0] == s and torch.equal(last[1], view(u)):
            _, own, value = last  # a step begins where the last one has ended
        elif wanted or not field.has_rhs:
            point = self.point(s, u, u_dot)
            own, value = point.u, self.linearize(point).flat_value()
        else:
            own = copy_out(u, field.dtype)
            value = field.rhs(s, own)
            if not self.ranks.parallel:  # evaluating it may be collective
                self._last = (s, own, value.clone())  # it may be the user's own
        if self.noted is not None and self._notes_stages:
            self._note(Note(0, s, project(own), project(value)))
        return value

    def note_again(self, u: torch.Tensor) -> None:
        """Let the last note, and the last value, be of this state too."""
        super().note_again(u)
        if self._last is not None:  # where the next step begins
            s, own, value = self._last
            self._last = s, u.to(own.dtype, copy=True), value

    def _note(self, note: Note) -> None:
        """Take down an evaluation, instead of the last one if that was of the same solve."""
        assert self.noted is not None
        if self.noted and not self._solve_begins and self.noted[-1][:2] == note[:2]:
            self.noted.pop()
        self.noted.append(note)
        self._solve_begins = False


def explicit_slope(
    part: VectorField, s: float, u: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return K with M K = value, that of the explicit part at (s, u), M being the mass matrix.

    Raises
    ------
    ConfigurationError
        If the value reaches into the algebraic equations of a singular M.
    """
    mass = part.mass
    assert mass is not None
    value = value.to(REAL)
    if mass.singular:
        equations = mass.null_spaces()[0].T @ value.unsqueeze(1)
        small, times = 1e-9 if part.dtype is REAL else 1e-4, part.problem.times
        change = float(mass.apply(u.to(REAL)).abs().max()) / (times[-1] - times[0] or math.inf)
        noise = small * float(value.abs().max()) + 1e-3 * small * change
        largest = float(equations.abs().max())
        if largest > noise:
            raise ConfigurationError(
                f"explicit={part.function!r} is {largest:.2e} in an algebraic equation of a "
                f"singular mass at t = {part.problem.direction * s!r}: algebraic equations belong "
                "into implicit= as a whole"
            )
    return mass.solve(value)

"""Where the field of a sweep is linearized for PETSc, and what was raised there.

A callback must not raise: PETSc would leave its stage vectors locked. What the user's code raises
is kept here, and callbacks answer with finite filler until the step is over.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pnode.base.evidence import Note, differs, project
from pnode.base.options import log_event
from pnode.base.ranks import ALONE, Ranks
from pnode.base.vectors import copy_out, is_finite
from pnode.field.linearization import Linearization, Products
from pnode.field.vectorfield import VectorField

__all__ = ["Linearizer", "Point"]

_EVENTS = ("rhs", "jvp", "vjp", "jacobian")


@dataclass
class Point:
    """A state at which the field is or will be linearized.

    Attributes
    ----------
    s : float
        Time.
    u : Tensor
        Flat state, a copy in the user's precision.
    key : tuple
        PETSc vector and object state that u was copied from.
    field : VectorField
        Which field, of a split one.
    u_dot : Tensor or None
        Rate of the state, for residuals.
    linearization : Linearization or None
        The graph, once something asked for it.
    source : Tensor or None
        What u is a copy of.
    ghosted : Tensor or None
        u with the ghost cells that f looks at: exchanged when the point is made, so that whether
        its graph is made, or shared with another point, is each rank's to decide.
    """

    s: float
    u: torch.Tensor
    key: tuple[int, int]
    field: VectorField
    u_dot: torch.Tensor | None = None
    linearization: Linearization | None = None
    source: torch.Tensor | None = None
    ghosted: torch.Tensor | None = None


class Located(Protocol):
    """What stands at a point during a sweep."""

    point: Point | None


class Linearizer:
    """Linearizes the field of a sweep for one TS, and keeps the last points.

    Parameters
    ----------
    points : int
        How many linearizations to keep. A point is also recognised by its values: PETSc hands the
        same state over in another vector, from the line search to the Jacobian and from step to
        step. One serves most; the adjoint of a theta method needs those at both ends of a step, and
        meets one of them again in the next.

    Attributes
    ----------
    exception : BaseException or None
        What the user's code raised.
    start_time : float or None
        Time of the evaluations before the first stage, instead of the one PETSc passes: TSDIRK
        solves for its initial slope with the stage time of whatever it did before.
    noted : list of Note or None
        Of an implicit method, in a sweep that notes its values: of each stage of the step under
        way; see :mod:`pnode.base.evidence`.
    expected : list of Note or None
        What a backward sweep should find.
    infinite_at : float or None
        Where an assembled Jacobian of the step under way was not finite.
    shells : set
        What stands at a point and has to leave it when the sweep ends.
    """

    def __init__(self, points: int = 1) -> None:
        self._attached: VectorField | None = None
        self._limit = points
        self._points: deque[Point] = deque()
        self.start_time: float | None = None
        self.noted: list[Note] | None = None
        self.expected: list[Note] | None = None
        self.infinite_at: float | None = None
        self.exception: BaseException | None = None
        self.ranks: Ranks = ALONE
        self.shells: weakref.WeakSet[Located] = weakref.WeakSet()
        self._events = {name: log_event(f"pnode {name}") for name in _EVENTS}

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        self._attached = field
        self.ranks = field.problem.ranks
        self.exception = self.noted = self.expected = None

    def detach(self) -> None:
        """End the sweep and drop everything that belongs to the user."""
        self._attached = self.exception = self.noted = self.expected = None
        self._points.clear()
        if len(self.shells):  # to iterate over none of them takes microseconds
            for shell in self.shells:
                shell.point = None

    @property
    def field(self) -> VectorField:
        """The field of this sweep."""
        if self._attached is None:
            raise RuntimeError("a PETSc callback was called outside of a sweep")
        return self._attached

    def take_exception(self) -> BaseException | None:
        """Return the stored exception and forget it."""
        exception, self.exception = self.exception, None
        return exception

    def guarded(self, event: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function`` unless something has failed before; None if it fails."""
        if self.exception is not None:
            return None
        logged = self._events[event]
        logged.begin()
        try:
            return function(*arguments)
        except BaseException as exception:
            if self.ranks.parallel:  # the others must not be left alone in what follows
                self.ranks.fail(exception)
            else:
                self.exception = exception
            return None
        finally:
            logged.end()

    def jacobian_point(self, s: float, u: Any, u_dot: Any) -> Point:
        """Return where the Jacobian that PETSc asks for at (s, u, u_dot) is taken."""
        return self.point(s, u, u_dot)

    def point(self, s: float, u: Any, u_dot: Any = None) -> Point:
        """Return the point (s, u, u_dot), a recent one where it is the same."""
        return self._point(self.field, s, u, u_dot)

    def _point(self, field: VectorField, s: float, u: Any, u_dot: Any) -> Point:
        key = (u.handle, u.stateGet())
        rate = None if field.has_rhs else copy_out(u_dot, field.dtype)
        if rate is None:
            for known in self._points:
                if known.s == s and known.key == key and known.field is field:
                    return known
        own = copy_out(u, field.dtype)
        ghosted = _gathered(field, own)
        point = self._same_values(field, s, own, rate, ghosted)
        if point is not None:
            point.key = key
            return point
        return self._new_point(field, s, own, rate, key, ghosted)

    def point_at(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        part: VectorField | None = None,
    ) -> Point:
        """Return the point (s, u, u_dot) of tensors, a recent one where it is the same.

        ``part`` is the explicit part of a split field, for a point of that.
        """
        field = self.field if part is None else part
        own = u.to(field.dtype, copy=True)
        rate = None if field.has_rhs or u_dot is None else u_dot.to(field.dtype, copy=True)
        for known in self._points:
            if known.field is field and known.s == s and known.source is u and rate is None:
                return known
        ghosted = _gathered(field, own)
        point = self._same_values(field, s, own, rate, ghosted) or self._new_point(
            field, s, own, rate, (0, -1), ghosted
        )
        point.source = u
        return point

    def forget_tensors(self) -> None:
        """Know recent points by their values alone, for which ghost cells are exchanged."""
        for known in self._points:
            known.source = None

    def _same_values(
        self,
        field: VectorField,
        s: float,
        u: torch.Tensor,
        rate: torch.Tensor | None,
        ghosted: torch.Tensor | None,
    ) -> Point | None:
        """Return a recent point with these values. Not collective."""
        for known in self._points:
            if (
                known.field is field
                and known.s == s
                and torch.equal(known.u, u)
                and (rate is None or (known.u_dot is not None and torch.equal(known.u_dot, rate)))
                and (
                    ghosted is None
                    or (known.ghosted is not None and torch.equal(known.ghosted, ghosted))
                )
            ):
                return known
        return None

    def _new_point(
        self,
        field: VectorField,
        s: float,
        own: torch.Tensor,
        rate: torch.Tensor | None,
        key: tuple[int, int],
        ghosted: torch.Tensor | None = None,
    ) -> Point:
        while len(self._points) >= self._limit:
            self._points.popleft()  # before the next graph is built, so that memory is reused
        point = Point(s, own, key, field, rate, ghosted=ghosted)
        self._points.append(point)
        return point

    def vjp(self, point: Point, w: Any) -> Products | None:
        """Return the products of w at ``point``, or None once something has failed."""
        return self.guarded("vjp", self._vjp_at, point, w)

    def jvp(self, point: Point, v: Any, state: float, rate: float) -> torch.Tensor | None:
        """Return ``state dg/du v + rate dF/du_dot v``, or None once something has failed."""
        return self.guarded("jvp", self._jvp_at, point, v, state, rate)

    def linearize(self, point: Point) -> Linearization:
        """Return the linearization at ``point``, made on first use."""
        if point.linearization is None:
            if point.ghosted is not None:
                point.linearization = point.field.linearize_gathered(
                    point.s, point.u, point.ghosted
                )
            else:
                point.linearization = point.field.linearize(point.s, point.u, point.u_dot)
            if self.expected is not None:
                self._verify(point, point.linearization.flat_value())
        return point.linearization

    def _verify(self, point: Point, value: torch.Tensor) -> None:
        """Compare a value with what the forward sweep noted there, if it did.

        Where a repeated step has led to a state that is the same but for round-off, the value may
        differ by as much as f is stiff.
        """
        assert self.expected is not None
        part = int(point.field is not self._attached)
        found = [note for note in self.expected if note.part == part and note.s == point.s]
        if not found:
            return  # nothing was noted there
        state = project(point.u)
        note = min(found, key=lambda note: abs(note.state - state))
        if state != note.state:
            by, what = differs(point.u, note.state), "a repeated step's state"
        else:
            by, what = differs(value, note.value), "its value"
        if by:
            self.ranks.refuse(point.field.changed(point.s, by, what))

    def _vjp_at(self, point: Point, w: Any) -> Products:
        cotangent = copy_out(w, self.field.dtype)
        return self.linearize(point).vjp(cotangent)

    def _jvp_at(self, point: Point, v: Any, state: float, rate: float) -> torch.Tensor:
        return self.linearize(point).jvp(copy_out(v, self.field.dtype), state, rate)

    def note_again(self, u: torch.Tensor) -> None:
        """Let the last note be of this state, which f has the same value at."""
        if self.noted and self.start_time is None:  # then what is solved for is no state
            self.noted[-1] = self.noted[-1]._replace(state=project(u.to(self.field.dtype)))

    def note_infinite(self, point: Point) -> None:
        """Note that the Jacobian at a point is not finite, unless f itself is not."""
        if point.linearization is not None and is_finite(point.linearization.flat_value()):
            self.infinite_at = point.s

    def infinite_derivative(self) -> float | None:
        """Return a time in this step at which f was finite and its Jacobian was not."""
        if self.infinite_at is not None:
            return self.infinite_at
        for point in self._points:
            graph = point.linearization
            if graph is not None and is_finite(graph.flat_value()):
                product = graph.vjp(torch.ones_like(graph.flat_value())).state
                if not is_finite(product):
                    return point.s
        return None


def _gathered(field: VectorField, u: torch.Tensor) -> torch.Tensor | None:
    """Return u with its ghost cells, flat, if there are any. Collective then."""
    return None if field.exchange is None else field.exchange.gather(u).reshape(-1)

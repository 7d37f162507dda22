"""PETSc's callbacks into the vector field.

A callback must not raise: PETSc would leave its stage vectors locked. The bridge keeps the first
exception, answers with finite filler until the step is over, and the integrator raises it then.
For the same reason the user's code gets copies: a view that lives on in a traceback, a graph or a
user's list would keep PETSc's vector locked, or change under its owner.

The bridge refers to no PETSc object, and PETSc's objects refer to the bridge: no cycle keeps a TS
alive. Its field is set for the duration of one sweep.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pnode.devices import HOST, Place
from pnode.evidence import Note, differs, project, projection_weights
from pnode.linearization import Linearization, Products
from pnode.options import PETSc, log_event
from pnode.ranks import ALONE, Ranks
from pnode.vectorfield import VectorField
from pnode.vectors import (
    REAL,
    add_to,
    are_moderate,
    copy_in,
    copy_out,
    fill,
    is_finite,
    is_moderate,
    view,
)

if TYPE_CHECKING:
    from pnode.solvers.linear.jacobians import Jacobian

__all__ = [
    "Bridge",
    "JacobianShell",
    "Point",
    "accumulate",
    "shell_matrix",
]

_EVENTS = ("rhs", "jvp", "vjp", "jacobian")
# Difference of two times of the same stage, relative to the larger end of the step, and to its
# length: PETSc's abscissae are sums of coefficients.
_ROUND_OFF = 4.0 * float(torch.finfo(torch.float64).eps)
_ROUND_OFF_OF_SUMS = 1e-13


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
    field : VectorField or None
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
    field: VectorField | None = None
    u_dot: torch.Tensor | None = None
    linearization: Linearization | None = None
    source: torch.Tensor | None = None
    ghosted: torch.Tensor | None = None


_NOWHERE = Point(0.0, torch.empty(0, device=HOST.device), (0, -1))


class Bridge:
    """State shared by the callbacks of one TS.

    Parameters
    ----------
    points : int
        How many linearizations to keep. A point is also recognised by its values: PETSc hands the
        same state over in another vector, from the line search to the Jacobian and from step to
        step. One serves most; the adjoint of a theta method needs those at both ends of a step, and
        meets one of them again in the next.
    keep : int
        How many of the last evaluated states to keep.
    check : bool
        Whether to look at every value of the right-hand side for NaN and overflow.

    Attributes
    ----------
    exception : BaseException or None
        What the user's code raised.
    nonfinite_time : float or None
        Stage time at which f was NaN or infinite.
    start_time : float or None
        Time of the evaluations before the first stage, instead of the one PETSc passes: TSDIRK
        solves for its initial slope with the stage time of whatever it did before.
    evaluated : deque of Tensor
        The last states that the right-hand side was evaluated at, oldest first: the stages of an
        explicit step.
    projections : deque of float or None
        Of the values there, in a sweep that notes them; see :mod:`pnode.evidence`.
    noted : list of Note or None
        Of an implicit method, in such a sweep: of each stage of the step under way.
    expected : list of Note or None
        What a backward sweep should find.
    jacobian : Jacobian or None
        What fills the matrices of an implicit method, from :mod:`pnode.solvers.linear.jacobians`.
    """

    jacobian: Jacobian | None = None

    def __init__(self, points: int = 1, keep: int = 0, check: bool = False) -> None:
        self._attached: VectorField | None = None
        #: What PETSc calls the right-hand side: the explicit part of a split one, or all of it.
        self._explicit: Any = None
        self.evaluated: deque[torch.Tensor] = deque(maxlen=keep)
        self.projections: deque[float] | None = None
        self._weights: torch.Tensor | None = None
        self.noted: list[Note] | None = None
        self.expected: list[Note] | None = None
        self._times: list[float] = []
        self._round_off = 0.0
        self._solve_begins = self._notes_stages = True
        #: Where an assembled Jacobian of the step under way was not finite.
        self.infinite_at: float | None = None
        #: Graphs of f at these states, if a sweep asks for them, and the bytes that each keeps.
        self.graphs: deque[Linearization] | None = None
        self.graph_bytes = -1
        self._check = check
        self.exception: BaseException | None = None
        self.nonfinite_time: float | None = None
        self._screened: list[tuple[float, torch.Tensor]] = []
        self.ranks: Ranks = ALONE
        #: Makes this rank reject the attempt under way, in a solve of several with a controller.
        self.reject: weakref.WeakMethod[Callable[[], None]] | None = None
        self._fillers = 0
        self.start_time: float | None = None
        #: Whether residuals keep their graph for a Jacobian that is asked for next.
        self.records = True
        self._limit = points
        self._points: deque[Point] = deque()
        self.shells: weakref.WeakSet[JacobianShell] = weakref.WeakSet()
        self._events = {name: log_event(f"pnode {name}") for name in _EVENTS}

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        self._attached = field
        self._explicit = field.explicit or field
        self.projections = self.noted = self.expected = self._weights = None
        self._times = []
        self.ranks = field.problem.ranks
        self.exception = None
        self.nonfinite_time = None
        if self.jacobian is not None:
            self.jacobian.forget()

    def detach(self) -> None:
        """End the sweep and drop everything that belongs to the user."""
        self._attached = None
        self._explicit = None
        self.exception = None
        if self.jacobian is not None:
            self.jacobian.forget()
        self._points.clear()
        self._screened.clear()
        for shell in self.shells:
            shell.point = _NOWHERE
        self.evaluated.clear()
        self.projections = self.noted = self.expected = self._weights = None
        self._times = []
        self.graphs = None
        self.graph_bytes = -1

    def keep_graphs(self) -> None:
        """From now on keep the graphs of f at the last evaluated states."""
        self.graphs = deque(maxlen=self.evaluated.maxlen)

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

        PETSc's own times differ from these by round-off. Those that are not among them, of a
        Rosenbrock method, are as PETSc gives them.
        """
        self._times = list(times)
        self.infinite_at = None
        self._solve_begins = True
        low, high = min(times), max(times)
        self._round_off = _ROUND_OFF * max(-low, high) + _ROUND_OFF_OF_SUMS * (high - low)

    def stage_time(self, s: float) -> float:
        """Return the stage time that PETSc's differs from by round-off."""
        if not self._times:
            return s
        nearest = min(self._times, key=lambda time: abs(s - time))
        if abs(s - nearest) <= self._round_off:
            return nearest
        self._times.append(s)
        return s

    def stage_begins(self) -> None:
        """From now on PETSc passes the right times, and evaluates for another stage."""
        self.start_time = None
        self._solve_begins = True

    def set_rhs_function(self, ts: Any, work: Any) -> None:
        """Make this the right-hand side of an explicit TS. Not collective."""
        ts.setRHSFunction(self.rhs_function, work)

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
        self.jacobian.compute(self, ts, s, u, u_dot, shift, a, p)

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
            if self._weights is None:
                self._weights = projection_weights(value)
            projection = float(torch.dot(self._weights, value))
            self.projections.append(projection)
            if field is not self._attached:  # the explicit part of a split one
                self.noted.append(Note(1, s, project(own), projection))
        return value

    def linearize(self, point: Point) -> Linearization:
        """Return the linearization at ``point``, made on first use."""
        if point.linearization is None:
            assert point.field is not None
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
        assert point.field is not None
        state = project(point.u)
        note = min(found, key=lambda note: abs(note.state - state))
        if state != note.state:
            by, what = differs(point.u, note.state), "a repeated step's state"
        else:
            by, what = differs(value, note.value), "its value"
        if by:
            self.ranks.refuse(point.field.changed(point.s, by, what))

    def _implicit_value(self, s: float, u: Any, u_dot: Any) -> torch.Tensor:
        """Return F(s, u, u_dot), without the term u_dot where M is the identity."""
        field = self.field
        wanted = self.records and (self.jacobian is None or self.jacobian.records)
        if wanted or not field.has_rhs:
            point = self.point(s, u, u_dot)
            own, value = point.u, self.linearize(point).flat_value()
        else:
            own = copy_out(u, field.dtype)
            value = field.rhs(s, own)
        if self.noted is not None and self._notes_stages:
            self._note(Note(0, s, project(own), project(value)))
        value = -value
        mass = field.mass
        return value if mass is None else mass.apply(copy_out(u_dot)) + value

    def _note(self, note: Note) -> None:
        """Take down an evaluation, instead of the last one if that was of the same solve."""
        assert self.noted is not None
        if self.noted and not self._solve_begins and self.noted[-1][:2] == note[:2]:
            self.noted.pop()
        self.noted.append(note)
        self._solve_begins = False

    def note_again(self, u: torch.Tensor) -> None:
        """Let the last note be of this state, which f has the same value at."""
        if self.noted and self.start_time is None:  # then what is solved for is no state
            self.noted[-1] = self.noted[-1]._replace(state=project(u.to(self.field.dtype)))

    def _vjp_at(self, point: Point, w: Any) -> Products:
        cotangent = copy_out(w, self.field.dtype)
        return self.linearize(point).vjp(cotangent)

    def _jvp_at(self, point: Point, v: Any, state: float, rate: float) -> torch.Tensor:
        return self.linearize(point).jvp(copy_out(v, self.field.dtype), state, rate)


def _gathered(field: VectorField, u: torch.Tensor) -> torch.Tensor | None:
    """Return u with its ghost cells, flat, if there are any. Collective then."""
    return None if field.exchange is None else field.exchange.gather(u).reshape(-1)


class JacobianShell:
    """Python context of the matrix ``rate_factor dF/du_dot + jacobian_factor dg/du``."""

    rate_factor = 0.0
    jacobian_factor = 1.0

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.point = _NOWHERE
        bridge.shells.add(self)

    def move_to(self, point: Point, rate_factor: float, jacobian_factor: float) -> None:
        """Stand at a point; nothing is evaluated until the first product."""
        self.point = point
        self.rate_factor = rate_factor
        self.jacobian_factor = jacobian_factor

    def scale(self, mat: Any, factor: float) -> None:
        """A = factor A, which TSDIRK does for its initial slope."""
        self.rate_factor *= factor
        self.jacobian_factor *= factor

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        product = self.bridge.jvp(self.point, x, self.jacobian_factor, self.rate_factor)
        if product is None:  # filler: keep Krylov methods going until the step is over
            copy_in(y, view(x))
        else:
            copy_in(y, product)

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        product = self.bridge.vjp(self.point, x)
        if product is None:
            copy_in(y, view(x))
            return
        copy_in(y, product.state)
        if self.jacobian_factor != 1.0:
            y.scale(self.jacobian_factor)
        if self.rate_factor:
            if product.rate is None:
                y.axpy(self.rate_factor, x)
            else:
                add_to(y, product.rate, self.rate_factor)


def accumulate(
    sums: list[torch.Tensor | None], terms: tuple[torch.Tensor | None, ...], weight: float
) -> None:
    """Add ``weight`` times ``terms`` (any precision) to ``sums`` (PETSc's), None being zero.

    Those of complex parameters are complex: torch's convention dL/d Re p + i dL/d Im p is linear
    over the reals, and so are the sums.
    """
    totals, addends = [], []
    for index, term in enumerate(terms):
        if term is None:
            continue
        total = sums[index]
        if total is None:
            sums[index] = term.to(torch.promote_types(term.dtype, REAL)) * weight
        else:
            totals.append(total)
            addends.append(term)
    if totals:
        torch._foreach_add_(totals, addends, alpha=weight)


def shell_matrix(context: Any, rows: int, columns: int, comm: Any, place: Place = HOST) -> Any:
    """Create the PETSc matrix of a shell, local sizes given. Collective on ``comm``.

    Vectors that PETSc makes to fit it live at ``place``.
    """
    matrix = PETSc.Mat().create(comm=comm)
    matrix.setSizes(((rows, PETSc.DETERMINE), (columns, PETSc.DETERMINE)))
    matrix.setType("python")
    matrix.setPythonContext(context)
    if not place.on_host:
        matrix.setVecType(place.vec_type)
    matrix.setUp()
    matrix.assemble()
    return matrix

"""The vector field as the integrators see it: values and linearizations on flat states.

It exchanges ghost cells before f is called. Everything is in the integrator's time
s = direction * t, for the field g(s, y) = direction * f(direction * s, y), and in PETSc's precision
outside, the user's precision inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pnode.base.errors import FieldChanged, VectorFieldError
from pnode.base.graphs import no_graph
from pnode.base.hooks import hooks_of
from pnode.base.ledger import Ledger
from pnode.field import field_checks as checks
from pnode.field.distributed import Cells, DistributedLinearization
from pnode.field.linearization import Linearization, Shared
from pnode.layout.layouts import Layout
from pnode.problems.mass import MassMatrix
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import Remote, remote

__all__ = [
    "DistributedField", "Residual", "VectorField", "note_kept", "record_all", "vector_field",
]  # fmt: skip


class VectorField:
    """Evaluate the user's f on flat states.

    Parameters
    ----------
    problem : InitialValueProblem
        Whose f, layout, direction and parameters are used.
    ledger : Ledger
        Where evaluations are counted.
    function : callable, optional
        Another f than the problem's.

    Attributes
    ----------
    mass : MassMatrix or None
        M of M y' = f; None for the identity.
    shared : Shared
        What its linearizations have in common.
    explicit : VectorField or None
        The explicit part of a split right-hand side, of which this one is the implicit part.
    """

    explicit: VectorField | None = None
    #: Whether there is a g(s, u); a residual has none.
    has_rhs = True
    #: Of a state with ghost cells.
    exchange: Layout | None = None
    #: Whether f is evaluated with grad enabled and y requiring grad, always: in sweeps of a solve
    #: that is differentiated, so that f is the same in all of them. Without, where f asks for it.
    recording = False
    known: Any = None  # the trace of an f that is known to be what it was then
    #: Says what of f's surroundings has changed since the forward sweep, for an error.
    suspects: Callable[[], str] | None = None
    #: Told by adjoints of each stage's (s, Y, cotangent of f there, weight, which part of f).
    look: Callable[[float, torch.Tensor, torch.Tensor, float, str], None] | None = None

    def __init__(self, problem: InitialValueProblem, ledger: Ledger, function: Any = None) -> None:
        self.problem, self.ledger = problem, ledger
        self.function = problem.function if function is None else function
        self.callee = remote(self.function, problem.compute, ledger)
        self.mass: MassMatrix | None = problem.mass
        self.parameters = problem.parameters
        self.shared = Shared(
            self.parameters, self.mass, ledger, hooks_of(self.parameters),
            self.callee if isinstance(self.callee, Remote) else None,
        )  # fmt: skip
        self.dtype = problem.layout.dtype
        #: Who is called, for errors.
        self.who = "the vector field or cost" if problem.integrals else "the vector field"
        #: Whether the first evaluation (of one part or the other) used each parameter.
        self.used = [False] * len(problem.parameters)
        self._layout = layout = problem.layout
        #: The state's, unless that is a tuple, and that of what f returns.
        self._shape = None if layout.is_tuple else layout.shapes[0]
        self.returned = self._shape if problem.owned is None else problem.owned
        self._direction, self._window = problem.direction, problem.window
        self._check_first, self._copied = True, 0

    def rhs(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return g(s, u), flat, in the user's precision.

        Parameters
        ----------
        s : float
            Time.
        u : Tensor
            Flat state, shape ``(size,)``, the user's precision. f gets it as it is, so it must not
            share memory with anything that will change.

        Raises
        ------
        VectorFieldError
            If f returns the wrong type, shape, dtype or device, or writes into its input.
        """
        if self._check_first and self.problem.check_undeclared:
            return VectorField.linearize(self, s, u).flat_value()
        self.ledger.rhs += 1
        if not self.recording:
            state = u if self._shape is None or u.shape == self._shape else self._shaped(u)
            try:
                with no_graph():
                    value = _flat(self._call(s, state, self._time(s)))
                return value if self._direction > 0 else -value
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.recording = True  # f differentiates something itself
                u = u.detach()
        leaf = u if self._shape is None else self._shaped(u)
        leaf.requires_grad_(True)
        with torch.enable_grad():
            call = self._call_first if self._check_first else self._call
            value = call(s, leaf, self._time(s)).detach().reshape(-1)
        return value if self._direction > 0 else -value

    def _shaped(self, u: torch.Tensor) -> Any:
        """Return the state as f gets it."""
        return self._layout.unflatten(u) if self._shape is None else u.view(self._shape)

    def recorded(self, time: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return u as a leaf, and f there at the user's time with its graph, to be traced.

        u and f have y's shape (flat for a tuple). Without direction, and not counted.
        """
        leaf = u.detach().requires_grad_(True)
        with torch.enable_grad():
            # A copy, so that writing into y is reported by _call and not by torch.
            return leaf, self._call(float("nan"), leaf.clone(), time)

    def changed(self, s: float, by: float, what: str = "its value") -> FieldChanged:
        """Return the error for an f of which something at s differs, relative to its norm."""
        at = self._direction * s
        suspects = "" if self.suspects is None else self.suspects()
        return checks.changed(self.who, at, f"{what} at t = {at!r}", by, suspects)

    def trust(self, used: list[bool] | None) -> None:
        """Take over which parameters f uses, instead of finding out at the first evaluation.

        Parameters
        ----------
        used : list of bool or None
            What :attr:`used` was in an earlier solve; None: find out after all.
        """
        self._check_first = used is None
        self.used[:] = used or [False] * len(self.parameters)

    def slope(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return du/ds, both parts of a split right-hand side; arguments as for :meth:`rhs`."""
        own = self.rhs(s, u)
        return own if self.explicit is None else own + self.explicit.rhs(s, u.clone())

    def linearize(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        differentiate_time: bool = False,
    ) -> Linearization:
        """Evaluate f at (s, u) with its graph, for products with the Jacobian.

        Parameters
        ----------
        s : float
            Time.
        u : Tensor
            Flat state as in :meth:`rhs`.
        u_dot : Tensor, optional
            Its rate; matters to residuals alone.
        differentiate_time : bool
            Whether the derivative with respect to time is wanted too.
        """
        self.ledger.rhs += 1
        # A single tensor becomes a leaf in its own shape: no reshaping in the graph.
        leaf = u if self._shape is None else self._shaped(u)
        leaf.requires_grad_(True)
        time = self._time(s)
        if differentiate_time:
            time.requires_grad_(True)
        call = self._call_first if self._check_first else self._call
        if torch.is_grad_enabled():
            value = call(s, leaf, time)
        else:
            with torch.enable_grad():
                value = call(s, leaf, time)
        return self._wrap(self.shared, (leaf,), value, self._direction, time)

    def measure(self, s: float, u: torch.Tensor) -> tuple[Linearization, int]:
        """Do as :meth:`linearize`, and return how many bytes the graph keeps besides u.

        A solve inside f counts with its checkpoints.
        """
        before, self._copied = _kept_by_solves, 0
        made = self.linearize(s, u)
        return made, made.kept_bytes(self._copied) + _kept_by_solves - before

    def linearize_gathered(self, s: float, u: torch.Tensor, ghosted: torch.Tensor) -> Linearization:
        """Do as :meth:`linearize`, with ``gather(u)`` at hand. Not collective."""
        raise NotImplementedError("only a state with ghost cells is gathered")

    def _wrap(self, *arguments: Any) -> Linearization:
        return Linearization(*arguments)

    def _time(self, s: float) -> torch.Tensor:
        """Return the user's time as f gets it."""
        layout, window = self._layout, self._window
        time = self._direction * (s if window is None else window.nearest(s))
        return torch.scalar_tensor(time, dtype=layout.dtype, device=layout.device)

    def _call_first(self, s: float, leaf: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Call f on a leaf, under grad, for the first time: look at what it uses."""
        # torch has an error of its own for writing into a leaf, before _call can see it.
        self._check_first, own = False, leaf.clone()
        self._copied = own.data_ptr()
        if not self.problem.check_undeclared:
            return self._call(s, own, time)
        at = self._direction * s
        with checks.first_call(self, at):
            value = self._call(s, own, time)
        checks.find_parameters(self.who, value, self.parameters, self.used, (leaf, time))
        if self.recording:
            call = partial(self._call, s, time=self._time(s))
            checks.refuse_unrecorded(self, call, leaf, value, at)
        return value

    def _call(self, s: float, own: torch.Tensor, time: torch.Tensor, *rate: Any) -> torch.Tensor:
        """Call f in the user's time on ``own``, and check what comes back.

        ``own`` has the user's shape, flat for a tuple; ``time`` is the user's; for a residual,
        ``rate`` is y'.

        Returns
        -------
        Tensor
            f's result in its own shape; flat for a tuple. Not yet in the integrator's direction.
        """
        layout, version = self._layout, own._version
        state = own if self._shape is not None else layout.unflatten(own)
        try:
            result = self.callee(time, state, *rate)
        except RuntimeError as error:
            if "leaf Variable" in str(error) or "created in no_grad mode" in str(error):
                raise checks.wrote_into_input(
                    self.who, self._direction * s, " (or into a parameter)"
                ) from error
            raise
        if own._version != version:
            raise checks.wrote_into_input(self.who, self._direction * s)
        if (
            type(result) is torch.Tensor
            and result.shape == self.returned
            and result.dtype is layout.dtype
            and result.device == layout.device
            and result.layout is torch.strided
        ):
            return result
        return self._accepted(result, self._direction * s)

    def _accepted(self, result: Any, time: float) -> torch.Tensor:
        """Return what is no plain tensor of the right kind, flat, or refuse it."""
        layout = self._layout
        is_tuple = layout.is_tuple and isinstance(result, (tuple, list))
        parts = tuple(result) if is_tuple else (result,)
        wrong = checks.wrong_result(layout, parts, self.problem.owned)
        if wrong:
            raise VectorFieldError(f"the vector field {wrong}", time=time)
        return torch.cat([part.reshape(-1) for part in parts]) if layout.is_tuple else result


class Residual(VectorField):
    """F(t, y, y') = 0 as g = -F: the state may not be solved for its rate."""

    has_rhs = False

    def rhs(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Not available: a residual gives no rate."""
        raise NotImplementedError("a residual has no right-hand side")

    def linearize(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        differentiate_time: bool = False,
    ) -> Linearization:
        """Evaluate F at (s, u, u_dot) with its graph."""
        assert u_dot is not None
        self.ledger.rhs += 1
        time = self._time(s).requires_grad_(differentiate_time)
        layout = self._layout
        leaves: tuple[torch.Tensor, ...] = (u, u_dot * self._direction)
        if not layout.is_tuple:
            leaves = tuple(leaf.view(layout.shapes[0]) for leaf in leaves)
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_(True)
            first = self._check_first and self.problem.check_undeclared
            self._check_first, at = False, self._direction * s
            own, flat = (leaf.clone() for leaf in leaves)
            rate = layout.unflatten(flat) if layout.is_tuple else flat
            with checks.first_call(self, at, first):
                value = self._call(s, own, time, rate)
            if first:
                checks.find_parameters(self.who, value, self.parameters, self.used, (*leaves, time))
                if self.recording:  # how F depends on y, whatever it does on y'
                    fixed = leaves[1].detach()
                    fixed = layout.unflatten(fixed) if layout.is_tuple else fixed
                    call = lambda y: self._call(s, y, self._time(s), fixed)  # noqa: E731
                    here = call(leaves[0].clone())
                    checks.refuse_unrecorded(self, call, leaves[0], here, at)
        return Linearization(self.shared, leaves, value, -1.0, time, self._direction)


class DistributedField(VectorField):
    """A vector field on the ranks of a communicator, which may look at ghost cells.

    Its methods are collective where the state's layout has ghost cells, and they never raise: a
    failure is remembered (see :mod:`pnode.base.ranks`), and the result is NaN.
    """

    def __init__(self, problem: InitialValueProblem, *arguments: Any, **more: Any) -> None:
        super().__init__(problem, *arguments, **more)
        self.ranks, self.exchange = problem.ranks, problem.exchange
        self._cells = Cells(self.ranks, self.exchange)
        self.gather, self.scatter = self._cells.gather, self._cells.scatter

    def rhs(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return g(s, u), flat, or NaN. Collective with ghost cells."""
        value = self.ranks.attempt(super().rhs, s, self.gather(u))
        return torch.full_like(u, torch.nan) if value is None else value

    def linearize(
        self, s: float, u: torch.Tensor, u_dot: torch.Tensor | None = None,
        differentiate_time: bool = False,
    ) -> Linearization:  # fmt: skip
        """Evaluate f at (s, u) with its graph. Collective with ghost cells."""
        return self._attempt(s, u, self.gather(u), differentiate_time)

    def linearize_gathered(self, s: float, u: torch.Tensor, ghosted: torch.Tensor) -> Linearization:
        """Do as :meth:`linearize`, with ``gather(u)`` at hand. Not collective."""
        return self._attempt(s, u, ghosted, False)

    def _attempt(
        self, s: float, u: torch.Tensor, state: torch.Tensor, differentiate_time: bool
    ) -> Linearization:
        made = self.ranks.attempt(super().linearize, s, state, None, differentiate_time)
        if made is not None:
            return made
        nothing = torch.full_like(u, torch.nan).view(self._layout.shapes[0])
        return self._wrap(self.shared, (state.detach(),), nothing, self._direction, self._time(s))

    def _shaped(self, u: torch.Tensor) -> Any:
        return super()._shaped(u) if self.exchange is None else u.view(self.exchange.ghosted_shape)

    def _wrap(self, *arguments: Any) -> Linearization:
        return DistributedLinearization(self._cells, *arguments)


def _flat(value: torch.Tensor) -> torch.Tensor:
    """Return a value without its graph, flat."""
    return value if value.dim() == 1 and not value.requires_grad else value.reshape(-1)


def vector_field(problem: InitialValueProblem, ledger: Ledger) -> VectorField:
    """Return the field of a problem: its right-hand side, its two parts, or its residual."""
    if problem.form == "residual":
        return Residual(problem, ledger)
    kind = DistributedField if problem.distributed else VectorField
    field = kind(problem, ledger)
    if problem.explicit is not None:
        field.explicit = kind(problem, ledger, problem.explicit)
        field.explicit.used = field.used
    return field


def record_all(field: VectorField) -> None:
    """Evaluate both parts of a field with grad enabled from now on: the solve is differentiated."""
    field.recording = True
    if field.explicit is not None:
        field.explicit.recording = True


_kept_by_solves = 0


def note_kept(size: int) -> None:
    """Note that a solve has kept so many bytes for its gradient: it may be one inside of f."""
    global _kept_by_solves
    _kept_by_solves += size

"""Cost integrals: q' = r(t, y) with q(t_0) = 0, driven by a solve and never feeding back into it.

q is integrated with the state, by the method's own quadrature: of order p where the method is, and
with the discrete adjoint that the state has. It chooses nothing: the error norm, Newton's method
and events look at the state alone (SUNDIALS' partial error control).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pnode.base.errors import ConfigurationError, SolveError, VectorFieldError
from pnode.base.transforms import is_wrapped, tensors_of
from pnode.base.vectors import REAL
from pnode.field.field_checks import wrong_result
from pnode.layout.ghost_cells import DrivenCells
from pnode.layout.pair_layout import PairLayout
from pnode.problems.momentum_flow import MomentumFlow
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.problems.tolerances import EntrywiseTolerance, Resolved, values
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.pairs import PairOptions
from pnode.solvers.petsc.integrator import IntegratorSettings

__all__ = [
    "Integrand", "check_cost", "integral_settings", "of_state", "parted", "with_integral",
    "with_row_integrals",
]  # fmt: skip


class Integrand(torch.nn.Module):
    """(f, r) at (y, q): a vector field of a tuple; a Module, as it may stand for some.

    Parameters
    ----------
    function : callable
        The user's ``f(t, y)``, one part of it, or ``F(t, y, y')``.
    cost : callable or None
        The user's ``r(t, y)``; None for a part of f that q does not change by.
    layout : StateLayout
        Of y.
    shape : torch.Size
        Of r.
    direction : float
        Sign of the times' order: a residual's row for q is 1 in the slope that the integrator has.
    flow : MomentumFlow or None
        Of a symplectic method.
    """

    def __init__(
        self, function: Any, cost: Any, layout: StateLayout, shape: torch.Size, direction: float,
        flow: MomentumFlow | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.function, self.cost = function, cost
        self._layout, self.shape, self._direction = layout, shape, direction
        self._flow = flow

    def forward(self, t: torch.Tensor, x: Any, *rate: Any) -> Any:
        """Return both, in one tuple."""
        y, *rates = (self._own(part) for part in (x, *rate))
        result = self.function(t, y, *rates)
        parts = result if self._layout.is_tuple and isinstance(result, (tuple, list)) else (result,)
        if self.cost is None:
            change = torch.zeros_like(x[-1])
        elif self._flow is not None:
            change = self._flow.average(
                lambda p: self._integrand(t, (y[0], p)), y[1], self._direction * parts[1], x[-1]
            )
        else:
            change = self._integrand(t, y)
        if rate:
            change = self._direction * (rate[0][-1] - change)
        return (*parts, change)

    def _integrand(self, t: torch.Tensor, y: Any) -> torch.Tensor:
        return checked(self.cost(t, y), self._layout, self.shape)

    def _own(self, x: Any) -> Any:
        return x[:-1] if self._layout.is_tuple else x[0]


class IntegrandOfRows(Integrand):
    """(f, r) of independent samples, rows of one tensor: ``layout`` is that of y's rows."""

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return both, shape ``(k, n + m)``, of any k rows."""
        shape, number = self._layout.shapes[0], len(x)
        of_row = shape[1:]
        y = x[:, : of_row.numel()].reshape(number, *of_row)
        t = t.view(-1, *[1] * (len(of_row) - any(self._layout.pairs)))
        layout = StateLayout((y.shape,), False, y.dtype, y.device)
        value = self.function(t, y)
        if wrong := wrong_result(layout, (value,)):
            raise VectorFieldError(f"the vector field {wrong}")
        if self.cost is None:
            change = value.new_zeros(number, self.shape.numel())
        else:
            change = checked(self.cost(t, y), layout, torch.Size((number, *self.shape)))
        return torch.cat([value.reshape(number, -1), change.reshape(number, -1)], dim=1)


class IntegrandOfCells(torch.nn.Module):
    """(f, r) at (y, q) in one flat tensor, with the ghost cells of y.

    Parameters
    ----------
    function, cost, layout
        Those of an :class:`Integrand`.
    cells : DrivenCells
        Of (y, q).
    """

    def __init__(self, function: Any, cost: Any, layout: StateLayout, cells: DrivenCells) -> None:
        super().__init__()
        self.function, self.cost = function, cost
        self._layout, self._cells = layout, cells

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return both, in one flat tensor."""
        cells = self._cells
        y = cells.seen.parts(x)[0].view(cells.base.ghosted_shape)
        value = self.function(t, y)
        wrong = wrong_result(self._layout, (value,))
        if wrong:
            raise VectorFieldError(f"the vector field {wrong}", time=float(t))
        if self.cost is None:
            change = torch.zeros_like(cells.seen.integral(x))
        else:
            assert cells.integral is not None
            change = checked(self.cost(t, y), self._layout, torch.Size(cells.integral))
        return torch.cat([value.reshape(-1), change.reshape(-1)])


def check_cost(value: Any) -> Any:
    """Return ``cost``, which is None or a callable."""
    if value is None or callable(value):
        return value
    raise ConfigurationError(
        f"cost is {value!r}: give a callable r(t, y) (or a torch Module) that returns a tensor"
    )


def checked(value: Any, layout: StateLayout, shape: torch.Size | None = None) -> torch.Tensor:
    """Return what ``cost`` returned.

    Raises
    ------
    VectorFieldError
        If it is no tensor of the state's dtype and device, complex, or of another shape than
        before.
    """
    if not isinstance(value, torch.Tensor):
        raise VectorFieldError(f"cost returned a {type(value).__name__}: return a tensor r(t, y)")
    if value.layout is not torch.strided:
        raise VectorFieldError(f"cost returned a tensor of layout {value.layout}: use to_dense()")
    if value.is_complex():
        raise VectorFieldError(
            f"cost returned {value.dtype}, and cost integrals are real, of complex states too: "
            "return r.real, r.abs() or, for both parts, torch.view_as_real(r)"
        )
    if value.dtype is not layout.dtype or value.device != layout.device:
        raise VectorFieldError(
            f"cost returned {value.dtype} on {value.device}, and the state has {layout.dtype} on "
            f"{layout.device}: compute it from y"
        )
    if shape is not None and value.shape != shape:
        raise VectorFieldError(
            f"cost returned shape {tuple(value.shape)}, and {tuple(shape)} at the start: it must "
            "not change"
        )
    return value


def with_integral(
    problem: InitialValueProblem, cost: Callable[..., Any], y0: torch.Tensor, method: Method
) -> tuple[InitialValueProblem, torch.Tensor]:
    """Return the problem of a state and its integral, and where both start.

    Parameters
    ----------
    problem : InitialValueProblem
        Of the state; its parameters contain those of ``cost``.
    cost : callable
        ``r(t, y)``, of any fixed shape.
    y0 : Tensor
        Flat initial state.
    method : Method
        What integrates both.
    """
    layout = problem.layout
    flow = MomentumFlow(method.order) if method.symplectic else None
    shape = _shape(problem, cost, y0)
    size, cells = math.prod(shape), problem.exchange
    whole: Callable[..., Any]
    if cells is None:
        both = StateLayout((*layout.shapes, shape), True, layout.dtype, layout.device)
        whole = partial(
            Integrand, layout=layout, shape=shape, direction=problem.direction, flow=flow
        )
    else:
        cells = DrivenCells(cells, integral=shape)
        both = StateLayout((torch.Size(cells.shape),), False, layout.dtype, layout.device)
        whole = partial(IntegrandOfCells, layout=layout, cells=cells)
    split = problem.explicit is not None
    problem = replace(
        problem, function=whole(problem.function, None if split else cost),
        explicit=whole(problem.explicit, cost) if split else None,
        layout=both, largest=both.size, exchange=cells,
        mass=None if problem.mass is None else problem.mass.with_identity(both),
        base=replace(problem, check_undeclared=False), integrals=size, flow=flow,
    )  # fmt: skip
    return problem, torch.cat([y0, y0.new_zeros(size)])


def with_row_integrals(
    problem: InitialValueProblem, cost: Callable[..., Any], y0: torch.Tensor, t: torch.Tensor
) -> tuple[InitialValueProblem, torch.Tensor, torch.Size]:
    """Return the problem of independent samples and their integrals, and where it starts.

    Parameters
    ----------
    problem : InitialValueProblem
        Of the samples.
    cost : callable
        ``r(t, y)`` of all rows, shape ``(B, ...)``.
    y0 : Tensor
        Shape ``(B, ...)``.
    t : Tensor
        First time of each row, shape ``(B,)``.

    Returns
    -------
    problem : InitialValueProblem
        Each of whose rows is a row of y0, and its integrals.
    start : Tensor
        Shape ``(B, n + m)``.
    shape : torch.Size
        Of the integrals of a row.
    """
    layout, rows = problem.layout, len(y0)
    first = t.to(layout.dtype).view(-1, *[1] * (y0.dim() - 1 - any(layout.pairs)))
    shape = _first_shape(cost, first, y0.detach().clone(), layout)
    if shape[:1] != (rows,) or not shape.numel():
        raise ConfigurationError(
            f"cost returned shape {tuple(shape)}, of {rows} independent samples: return a tensor "
            f"of shape ({rows}, ...), something for each"
        )
    size = shape[1:].numel()
    whole = partial(IntegrandOfRows, layout=layout, shape=shape[1:], direction=problem.direction)
    split = problem.explicit is not None
    flat = y0.reshape(rows, -1)
    both = StateLayout((torch.Size((rows, flat.shape[1] + size)),), False, y0.dtype, y0.device)
    problem = replace(
        problem, function=whole(problem.function, None if split else cost),
        explicit=whole(problem.explicit, cost) if split else None, layout=both, integrals=size,
        base=replace(problem, check_undeclared=False),
    )  # fmt: skip
    return problem, torch.cat([flat, flat.new_zeros(rows, size)], dim=1), shape[1:]


def _shape(problem: InitialValueProblem, cost: Callable[..., Any], y0: torch.Tensor) -> torch.Size:
    """Return the shape of what ``cost`` returns. Not collective."""
    layout, own = problem.layout, y0.detach()
    if problem.exchange is None:
        state = layout.unflatten(own.clone())
    else:  # the values do not matter, but should be possible
        seen = problem.exchange.ghosted_shape
        number = math.prod(seen)
        state = own.repeat(-(-number // len(own)))[:number].view(seen)
    time = torch.tensor(problem.direction * problem.times[0], dtype=layout.dtype).to(layout.device)
    shape = _first_shape(cost, time, state, layout)
    if not math.prod(shape):
        raise ConfigurationError(f"cost returned shape {tuple(shape)}: return at least one number")
    return shape


def _first_shape(
    cost: Callable[..., Any], t: torch.Tensor, y: Any, layout: StateLayout
) -> torch.Size:
    """Return the shape of what ``cost`` returns; inside of torch.func its errors are told."""
    try:
        with torch.no_grad():
            value = cost(t, y)
    except RuntimeError as error:
        if isinstance(error, SolveError) or not any(map(is_wrapped, tensors_of(y))):
            raise
        raise VectorFieldError(
            f"cost cannot be called inside of a transform of torch.func ({error}): there it may "
            "not read values of y (numpy, .item()); use operations of torch"
        ) from error
    return checked(value, layout).shape


def integral_settings(
    own: IntegratorSettings, problem: InitialValueProblem, linear_solver: dict[str, Any]
) -> IntegratorSettings:
    """Return the settings of an integrator of a state and its integral. Collective.

    Parameters
    ----------
    own : IntegratorSettings
        Of the state's integrator.
    problem : InitialValueProblem
        Of both.
    linear_solver : dict
        PETSc's options of the state's own systems.

    Notes
    -----
    PETSc's error norm is a root mean square over all entries, and those of the integral have an
    infinite tolerance: with tolerances smaller by the root of what they make the number of entries
    grow by, it is that of the state.
    """
    layout = PairLayout(own.size, 0, integrals=problem.integrals)
    reuse = own.jacobian_options.reuse
    if reuse == "constant" and own.form != "imex":
        reuse = "solve"  # r need not be linear
    elif own.jacobian_options.assembled(own.jacobian) is None:
        reuse = "iteration"  # as products alone have it
    options = JacobianOptions(reuse, pair=PairOptions.of(layout, own, linear_solver))
    entries = float(own.size)
    if problem.ranks.parallel:
        entries = float(problem.ranks.sum(torch.tensor(entries, dtype=REAL)))
    number = problem.integrals * problem.ranks.comm.size
    factor = math.sqrt(entries / (entries + number)) if own.norm == "rms" else 1.0
    return replace(
        own, size=layout.total, jacobian="pair", jacobian_options=options,
        rtol=_lengthened(own, own.rtol, factor, problem.integrals, 0.0),
        atol=_lengthened(own, own.atol, factor, problem.integrals, math.inf),
        distribution=problem.distribution, integrals=problem.integrals,
    )  # fmt: skip


def _lengthened(
    own: IntegratorSettings, tolerance: Resolved, factor: float, number: int, last: float
) -> Resolved:
    state = torch.as_tensor(values(tolerance), dtype=REAL).expand(own.size) * factor
    return EntrywiseTolerance.of(torch.cat([state, state.new_full((number,), last)]))


def of_state(problem: InitialValueProblem, function: Any) -> Any:
    """Return a function of times and the state, to be called with the integral too."""
    if function is None or not problem.integrals:
        return function

    def call(*arguments: Any) -> Any:
        *times, x = arguments
        return function(*times, parted(problem, x)[0])

    return call


def parted(problem: InitialValueProblem, x: Any) -> tuple[Any, torch.Tensor | None]:
    """Return a state and its integral; None where there is none."""
    if not problem.integrals:
        return x, None
    assert problem.base is not None
    cells = problem.exchange
    if isinstance(cells, DrivenCells):  # one flat tensor
        assert cells.integral is not None
        integral = cells.owned.integral(x)
        own = problem.base.layout.unflatten(cells.owned.parts(x)[0])
        return own, integral.reshape((*x.shape[:-1], *cells.integral))
    return (tuple(x[:-1]) if problem.base.layout.is_tuple else x[0]), x[-1]

"""The rate y' at a state of a solution, for every form of a problem, and the products it passes on.

With M y' = f it is M^-1 f. A singular M, or dF/dy' of F(t, y, y') = 0, with left and right null
spaces L and R leaves algebraic equations L^T g(t, y) = 0 (g = f, or -F). Their derivative along the
solution,

    L^T (g_y y' + g_t) = 0,

is what M y' = f does not say of y': of index 1, it determines the part along R (Hairer & Wanner,
Solving Ordinary Differential Equations II, section VI.1). Time here is the integrator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError, NonlinearSolveFailed
from pnode.base.noise import noise
from pnode.base.vectors import REAL
from pnode.field.field_checks import hides_time
from pnode.field.linearization import Linearization, Products
from pnode.field.products import accumulate, refused
from pnode.field.vectorfield import VectorField
from pnode.problems.nullspaces import DENSE_ENTRIES, Bordered, null_spaces

__all__ = ["Rate", "Rates", "as_function"]

_MAX_ITERATIONS = 20
_LARGEST_RESIDUAL = 2048
_DEGENERATE = 1e-13
_REFUSAL = (
    "second derivatives through the time of an event or an output are not supported for "
    "residual= and a singular mass=, whose y' is known as a number only: take first "
    "derivatives, or solve to a fixed time (t.detach(), no event_fn)"
)


class _Solves(Protocol):
    def solve(self, v: torch.Tensor) -> torch.Tensor: ...

    def solve_transpose(self, w: torch.Tensor) -> torch.Tensor: ...


class _Constraints:
    """The algebraic equations of one state, differentiated along the solution.

    Parameters
    ----------
    graph : Linearization
        g with its graph, with the derivative by time.
    left, right : Tensor
        L and R.
    time_sign : float
        dg/ds is this times what the graph calls its derivative by time.
    where : dict
        For error messages.
    """

    def __init__(
        self, graph: Linearization, left: torch.Tensor, right: torch.Tensor, time_sign: float,
        where: dict[str, Any],
    ) -> None:  # fmt: skip
        if left.numel() > DENSE_ENTRIES:
            raise ConfigurationError(
                f"y' at t = {where['time']!r} of {left.shape[0]} equations, of which "
                f"{left.shape[1]} are algebraic: it needs a dense matrix, up to "
                f"{DENSE_ENTRIES} entries; drop dense=, and pass t.detach()"
            )
        self._graph, self._time_sign = graph, time_sign
        self._left, self._right = (one.to_dense() for one in (left, right))
        self._rows = graph.vjps(self._left.T.to(graph.dtype)).to(REAL)
        inverse, failed = torch.linalg.inv_ex(self._rows @ self._right)
        small = not bool(failed) and float(torch.linalg.cond(self._rows @ self._right, 1))
        if bool(failed) or not small < 1.0 / _DEGENERATE:
            raise ConfigurationError(
                f"y' is not determined at t = {where['time']!r}: the problem has an index above 1 "
                "there, or its equations are not independent: differentiate its constraints with "
                "respect to time"
            )
        self._inverse = inverse

    def complete(self, rate: torch.Tensor) -> torch.Tensor:
        """Return a rate with the part along R that keeps the equations."""
        drift = self._time_sign * self._graph.time_derivative().to(REAL)
        change = self._rows @ rate + self._left.T @ drift
        return rate - self._right @ (self._inverse @ change)

    def pull_back(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cotangents of the rate before, and of the equations' change."""
        along = self._inverse.T @ (self._right.T @ w)
        return w - self._rows.T @ along, -(self._left @ along)

    def products(self, w: torch.Tensor, rate: torch.Tensor) -> Products:
        """Return w^T d(g_y y' + g_t) by the state and the parameters, y' held."""
        dtype = self._graph.dtype
        time = torch.tensor([self._time_sign], dtype=dtype, device=w.device)
        return self._graph.second_vjp(w[None].to(dtype), rate[None].to(dtype), time)


@dataclass(frozen=True, eq=False)
class Rate:
    """The rate at one state.

    Attributes
    ----------
    value : Tensor
        du/ds, flat, PETSc's precision.
    parts : sequence of Linearization
        Whose values add up to the right-hand side.
    mass : object or None
        Solves with M or dF/dy'; None for the identity.
    constraints : object or None
        Algebraic equations, if there are any.
    """

    value: torch.Tensor
    parts: Sequence[Linearization]
    mass: _Solves | None = None
    constraints: _Constraints | None = None

    def product(self, w: torch.Tensor, parameters: list[torch.Tensor | None]) -> torch.Tensor:
        """Return w^T d(du/ds)/du, PETSc's precision, and add up w^T d(du/ds)/dp."""
        result, change = torch.zeros_like(w), None
        if self.constraints is not None:
            w, change = self.constraints.pull_back(w)
        if self.mass is not None:
            w = self.mass.solve_transpose(w)
        for part in self.parts:
            products = part.vjp(w.to(part.dtype))
            accumulate(parameters, products.parameters)
            result.add_(products.state)
        if self.constraints is not None and change is not None:
            products = self.constraints.products(change, self.value)
            accumulate(parameters, products.parameters)
            result.add_(products.state)
        return result


class Rates:
    """Rates along the solutions of a field.

    Parameters
    ----------
    field : VectorField
        Of the problem.
    """

    def __init__(self, field: VectorField) -> None:
        self._field = field
        self._guess: torch.Tensor | None = None
        self._looked = self._compared = False

    def value(self, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return du/ds at (s, u), flat, PETSc's precision. Collective where f is."""
        field, mass = self._field, self._field.mass
        if not field.has_rhs:
            with torch.inference_mode(False), torch.enable_grad():
                return self._of_residual(s, u.detach().clone()).value
        if mass is not None and mass.singular:
            return self.at(s, u).value
        slope = field.slope(s, u.to(field.dtype, copy=True)).to(REAL)
        return slope if mass is None else mass.solve(slope)

    def at(self, s: float, u: torch.Tensor) -> Rate:
        """Return du/ds at (s, u) with its products. Collective where f is.

        Raises
        ------
        ConfigurationError
            If it is not determined (index above 1), or the equations depend on t in a way that
            torch does not record.
        """
        field, mass = self._field, self._field.mass
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone()
            if not field.has_rhs:
                found = self._of_residual(s, u)
                if not self._compared and found.constraints is not None:
                    self._compare_spaces(s, u, found)
                return found
            singular = mass is not None and mass.singular
            if singular and field.problem.exchange is not None:
                raise ConfigurationError(
                    "y' of a problem with a singular mass is not at hand where ghost cells "
                    "(layout=) make up the state: let steps hit the output times (dense=False), "
                    "and pass t.detach()"
                )
            parts = [field.linearize(s, self._own(u), differentiate_time=singular)]
            if field.explicit is not None:
                parts.append(field.explicit.linearize(s, self._own(u)))
            value = sum((part.flat_value() for part in parts[1:]), start=parts[0].flat_value())
            value = value.detach().to(REAL)
            if mass is None:
                return Rate(value, parts)
            rate = mass.solve(value)
            # A rank's own equations are all in its own part of the state.
            constraints: _Constraints | None = None
            if singular:  # a rank's equations are all in its own part of the state
                found = field.problem.ranks.attempt(self._constrained, s, u, parts[0], rate)
                rate, constraints = (rate, None) if found is None else found
            return Rate(rate, parts, mass, constraints)

    def _constrained(
        self, s: float, u: torch.Tensor, graph: Linearization, rate: torch.Tensor
    ) -> tuple[torch.Tensor, _Constraints]:
        """Return M y' = f's rate with its algebraic part, and the constraints of a singular M."""
        mass = self._field.mass
        assert mass is not None
        self._look_at_time(s, graph, lambda later: self._field.rhs(later, self._own(u)))
        constraints = _Constraints(graph, *mass.null_spaces(), 1.0, self._where(s))
        return constraints.complete(rate), constraints

    def _own(self, u: torch.Tensor) -> torch.Tensor:
        return u.to(self._field.dtype, copy=True)

    def _where(self, s: float) -> dict[str, Any]:
        return {"time": self._field.problem.direction * s}

    def _look_at_time(
        self, s: float, graph: Linearization, evaluate: Callable[[float], torch.Tensor]
    ) -> None:
        """Refuse, once, a field that depends on t and hides it: the constraints move with t."""
        if self._looked:
            return
        self._looked, problem = True, self._field.problem
        span = problem.times[-1] - problem.times[0]
        if hides_time(self._field, s, graph, span, evaluate):
            raise ConfigurationError(
                "the vector field depends on t through a number that torch does not record "
                "(float(t), t.item(), t.detach(), numpy?), and y' of algebraic unknowns needs its "
                "derivative by t: compute with the tensor t"
            )

    def _compare_spaces(self, s: float, u: torch.Tensor, rate: Rate) -> None:
        """Refuse, once, derivatives of a rate where the null space of dF/dy' moves with y."""
        self._compared = True
        generator = torch.Generator(HOST.device).manual_seed(3)
        signs = noise(u.shape, generator).to(u)
        moved = u + 1e-2 * (1.0 + u.abs()) * signs
        matrix = self._field.linearize(s, self._own(moved), self._own(rate.value)).rate_jacobian()
        assert matrix is not None and isinstance(rate.mass, _Factors)
        off = rate.mass.left.T @ matrix.detach().to(REAL)
        small = 1e-9 if self._field.dtype is REAL else 1e-4
        if float(off.abs().max()) > small * float(matrix.abs().max()):
            raise ConfigurationError(
                "residual: the null space of dF/dy' depends on y, and derivatives of y' (of "
                "outputs between steps, dense=True) are not supported for it: combine the "
                "equations so that the algebraic ones do not contain y', or let steps hit the "
                "output times (dense=False)"
            )

    def _of_residual(self, s: float, u: torch.Tensor) -> Rate:
        """Solve F(t, y, y') = 0 and the constraints' derivative for y', by Newton's method."""
        field = self._field
        if len(u) > _LARGEST_RESIDUAL:
            raise ConfigurationError(
                f"y' of a residual of {len(u)} equations: up to {_LARGEST_RESIDUAL} are solved for "
                "it; write the problem with mass=, or drop dense= and pass t.detach()"
            )
        rate = torch.zeros_like(u, dtype=REAL) if self._guess is None else self._guess
        small = 1e-12 if field.dtype is REAL else 1e-5
        before = torch.inf
        for _ in range(_MAX_ITERATIONS):
            graph = field.linearize(s, self._own(u), self._own(rate), differentiate_time=True)
            matrix = graph.rate_jacobian()
            assert matrix is not None
            solves = _Factors(matrix.detach().to(REAL), field.dtype)
            new = rate + solves.solve(graph.flat_value().detach().to(REAL))
            constraints = None
            if solves.singular:
                sign = -field.problem.direction
                constraints = _Constraints(graph, solves.left, solves.right, sign, self._where(s))
                new = constraints.complete(new)
            change, size = float((new - rate).abs().max()), float(new.abs().max())
            if change <= small * size or (change <= 1e3 * small * size and change >= before):
                self._guess = rate.detach()
                if constraints is not None:
                    self._look_at_time(s, graph, partial(self._residual_at, u, rate))
                return Rate(rate, [graph], solves, constraints)
            rate, before = new, change
        raise NonlinearSolveFailed(
            f"y' was not found from the residual in {_MAX_ITERATIONS} Newton iterations",
            **self._where(s),
        )

    def _residual_at(self, u: torch.Tensor, rate: torch.Tensor, s: float) -> torch.Tensor:
        return self._field.linearize(s, self._own(u), self._own(rate)).flat_value()


class _Factors:
    """Solves with dF/dy', as a mass matrix does."""

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype) -> None:
        self.left, self.right = null_spaces(matrix)
        self.singular = self.left.shape[1] > 0
        self._factors = Bordered(matrix, self.left, self.right)

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        return self._factors.solve(v[None], transposed=False)[0]

    def solve_transpose(self, w: torch.Tensor) -> torch.Tensor:
        return self._factors.solve(w[None], transposed=True)[0]


def as_function(
    rate: torch.Tensor, inputs: Sequence[torch.Tensor], vanishing: bool
) -> torch.Tensor:
    """Return a rate as a function of what it depends on, whose derivatives are refused.

    Parameters
    ----------
    rate : Tensor
        Its value.
    inputs : sequence of Tensor
        What it depends on.
    vanishing : bool
        Whether it stands beside a factor that is zero as a number: the first derivative of the
        product needs none of the rate, and passes.
    """
    if vanishing:
        result: torch.Tensor = _Known.apply(rate, *inputs)
        return result
    for one in inputs:
        rate = rate + refused(one, rate, _REFUSAL)
    return rate


class _Known(torch.autograd.Function):
    """A number in place of a function of the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rate: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return rate.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        _, *inputs = ctx.saved_tensors
        return None, *(refused(outputs[0], one, _REFUSAL) for one in inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        rate, *_ = ctx.saved_tensors
        given = [one for one in tangents[1:] if one is not None]
        result = refused(given[0], rate, _REFUSAL) if given else rate.new_zeros(())
        return result.expand_as(rate)

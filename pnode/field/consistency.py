"""Consistent initial states of differential-algebraic equations of index 1.

Where dF/dy' is singular, some equations hold at one time, without y'. An initial state that
violates them is moved along the null space of dF/dy', the algebraic unknowns: Brenan, Campbell &
Petzold, Numerical Solution of Initial-Value Problems in Differential-Algebraic Equations, 5.3.4.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError, NonFiniteVectorField, NonlinearSolveFailed
from pnode.base.ledger import Ledger
from pnode.base.noise import noise
from pnode.base.transforms import outside, plain
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.rebinding import below
from pnode.field.vectorfield import VectorField, vector_field
from pnode.problems.mass import Solve
from pnode.problems.nullspaces import (
    DENSE_ENTRIES,
    SquareOperator,
    cond,
    null_spaces,
    times,
    unit_vectors,
)
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import remote

__all__ = ["check_consistency", "consistent_state"]

# The whole dF/dy' of a residual is evaluated at once up to this size; above, unless its rows and
# columns of zeros say all, up to the second.
_SMALL_RESIDUAL, _LARGEST_RESIDUAL = 256, 2048
_MAX_ITERATIONS = 20
# Of a consistent state by what it depends on, as many as there may be through a solve.
_DERIVATIVES = 4
_INDEX = (
    "the problem has an index above 1 there, or its equations are not independent: differentiate "
    "its constraints with respect to time")  # fmt: skip


def check_consistency(problem: InitialValueProblem, u: torch.Tensor, ledger: Ledger) -> None:
    """Raise unless the initial state satisfies the algebraic equations. Not collective.

    Parameters
    ----------
    problem : InitialValueProblem
        Given by a mass matrix or a residual.
    u : Tensor
        Flat initial state, the user's precision.
    ledger : Ledger
        Counts evaluations.

    Raises
    ------
    ConfigurationError
        If a Newton correction of the algebraic unknowns is larger than 1e-6 (float32: 1e-4) of
        the largest entry of the state, or of what the equation of that unknown adds up; or if the
        equations do not determine these unknowns (index above 1).
    NonFiniteVectorField
        If the vector field or a derivative of it is not finite.

    Warns
    -----
    RuntimeWarning
        Where neither can be told.
    """
    field = vector_field(replace(below(problem), check_undeclared=False), ledger)
    with torch.inference_mode(False):
        start = _Start(field, u := u.clone())
        if not start.count:
            return
        equations = _Algebraic(start, u)
        equations.require_index_one()
        correction = equations.correction()
    tolerance, noise = (1e-6, 1e-12) if u.dtype is torch.float64 else (1e-4, 1e-5)
    largest = max(float(u.abs().max()), 1e-300)
    if not bool((correction.abs() > noise * largest).any()):
        return
    # Large entries that have nothing to do with an equation must not hide that it is violated.
    limit = (tolerance * equations.terms()).clamp(noise * largest, tolerance * largest)
    excess = correction.abs() > limit
    if bool(excess.any()):
        entry = int(torch.where(excess, correction.abs() / limit, 0.0).argmax())
        raise ConfigurationError(
            f"y0 does not satisfy the algebraic equations at t = "
            f"{problem.direction * problem.times[0]!r}: entry {entry} of the flattened state is "
            f"off by about {float(correction[entry].abs()):.2e}; correct it, or let "
            "consistent_start=True do so"
        )


def consistent_state(
    problem: InitialValueProblem, u: torch.Tensor, ledger: Ledger, time: torch.Tensor
) -> torch.Tensor:
    """Solve the algebraic equations for the algebraic unknowns. Differentiable. Not collective.

    Parameters
    ----------
    problem : InitialValueProblem
        Given by a mass matrix or a residual.
    u : Tensor
        Flat initial state, the user's precision.
    ledger : Ledger
        Counts evaluations.
    time : Tensor
        The user's, 0-dim, where the solve begins.

    Returns
    -------
    Tensor
        The nearest along the algebraic unknowns, with four derivatives of the implicit function.

    Raises
    ------
    ConfigurationError
        If the algebraic equations do not determine the algebraic unknowns (index above 1).
    NonFiniteVectorField
        If the vector field or a derivative of it is not finite.
    NonlinearSolveFailed
        If Newton's method does not converge.
    """
    with outside():
        found = _solved(problem, plain(u), ledger)
    if found is None:
        return u
    start, solution, equations = found
    # More Newton steps with the matrix there: each makes one more derivative that of the implicit
    # function, as what it leaves of an error that vanishes to some order vanishes to the next one.
    layout = problem.layout
    moved = u + (solution - plain(u))
    rate = (layout.unflatten(start.rate * problem.direction),) * (problem.form == "residual")
    seen = problem.seen(time.to(layout.device, layout.dtype))
    function = remote(problem.function, problem.compute, ledger)
    # g is the user's function up to its sign.
    sign = -1.0 if problem.form == "residual" else problem.direction
    for _ in range(_DERIVATIVES):
        value = layout.flatten(function(seen, layout.unflatten(moved), *rate))
        moved = moved + Solve.apply(sign * (value - value.detach()), equations, False)
    return moved


def _solved(
    problem: InitialValueProblem, u: torch.Tensor, ledger: Ledger
) -> tuple[_Start, torch.Tensor, _Algebraic] | None:
    """Return the nearest consistent state, and the equations next to it; None without any."""
    start = _Start(vector_field(replace(below(problem), check_undeclared=False), ledger), u.clone())
    if not start.count:
        return None
    solution, small = u, 1e-13 if u.dtype is torch.float64 else 1e-5
    for _ in range(_MAX_ITERATIONS):
        equations = _Algebraic(start, solution)
        equations.require_index_one()
        correction = equations.correction()
        solution = solution + correction
        if float(correction.abs().max()) <= small * float(solution.abs().max()):
            return start, solution, equations
    raise NonlinearSolveFailed(
        f"no consistent initial state was found in {_MAX_ITERATIONS} Newton iterations: start "
        "from a better guess of the algebraic unknowns",
        time=problem.direction * problem.times[0],
    )


class _Start:
    """Which equations and unknowns are algebraic at the start.

    Attributes
    ----------
    field : VectorField
        The field.
    left, right : Tensor
        Bases of the left and right null space of dF/dy', shape ``(size, count)``.
    count : int
        How many algebraic equations there are.
    rate : Tensor
        A rate at which to evaluate a residual: its algebraic equations do not depend on it.
    """

    def __init__(self, field: VectorField, u: torch.Tensor) -> None:
        self.field = field
        self.rate = torch.zeros_like(u)
        self.where: dict[str, Any] = {"time": field.problem.direction * field.problem.times[0]}
        if field.mass is not None:
            self.left, self.right = field.mass.null_spaces()
        else:
            self.left, self.right = self._of_residual(u)
        self.count = self.left.shape[1]

    def at(self, u: torch.Tensor) -> Linearization:
        """Evaluate the field, or the residual at :attr:`rate`, with its graph."""
        return self.field.linearize(self.field.problem.times[0], u.clone(), self.rate.clone())

    def _of_residual(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Null spaces at the rate where there are fewest: an equation in (y')^2 is not algebraic.

        At zero, and at random rates, the first of them at which F and its derivative are finite.
        """
        generator = torch.Generator(HOST.device).manual_seed(0)
        scale = max(float(u.abs().max()), 1e-3)
        random = scale * noise(u.shape, generator).to(REAL)
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for rate in (torch.zeros_like(random), random, random.abs(), -random.abs()):
            if len(found) == 2:
                break
            self.rate = rate.to(u)
            linearization = self.at(u)
            value = linearization.flat_value().to(REAL)
            spaces = self._rate_null_spaces(linearization, len(u))
            if bool(torch.isfinite(value).all()) and spaces is not None:
                found.append((*spaces, value, self.rate))
        if not found:
            raise NonFiniteVectorField(
                "the residual F(t, y, y') or its derivative with respect to y' is NaN or infinite "
                "at y0, whatever y': check it there",
                **self.where,
            )
        left, right, value, self.rate = min(found, key=lambda each: each[0].shape[1])
        if left.shape[1] and len(found) == 2:
            values = [times(left.T, each[2]) for each in found]
            size = times(left.T.abs(), found[0][2].abs() + found[1][2].abs())
            limit = (1e-10 if u.dtype is torch.float64 else 1e-4) * size
            if bool(((values[0] - values[1]).abs() > limit).any()):
                raise ConfigurationError(
                    "residual: dF/dy' is singular at y0, and its null space depends on y', so that "
                    "no equation is algebraic as it stands: combine the equations so that the "
                    "algebraic ones do not contain y'"
                )
        return left, right

    def _rate_null_spaces(
        self, linearization: Linearization, size: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the null spaces of dF/dy', None if it is not finite."""
        dtype = linearization.flat_value().dtype
        if size > _SMALL_RESIDUAL:

            def rate_product(w: torch.Tensor) -> torch.Tensor:
                product = linearization.vjp(w.to(dtype)).rate
                assert product is not None
                return product.to(REAL)

            operator = SquareOperator(
                lambda v: linearization.jvp(v.to(dtype), 0.0, 1.0).to(REAL), rate_product,
                size, dtype is not REAL, linearization.flat_value().device,
            )  # fmt: skip
            if not operator.finite:
                return None
            rows, columns = operator.zero_rows, operator.zero_columns
            alike = int(rows.sum()) == int(columns.sum())
            test = operator.test() if alike else None
            if test is not None and not test.singular:
                if not test.converged:
                    _warn("whether all algebraic equations of the residual have been found")
                return unit_vectors(rows), unit_vectors(columns)
            if size > _LARGEST_RESIDUAL:
                raise ConfigurationError(
                    f"residual: dF/dy' of {size} equations is singular beyond its rows and columns "
                    "of zeros: combine the equations, or unknowns, so that the algebraic ones are "
                    "entries of the state, or write the problem with mass="
                )
        rate = linearization.rate_jacobian()
        assert rate is not None
        rate = rate.to(REAL)
        return null_spaces(rate) if bool(torch.isfinite(rate).all()) else None


class _Algebraic:
    """The algebraic equations at one state: left^T g = 0 for the unknowns along ``right``.

    Their Jacobian is factored up to a size, known by its products beyond.
    """

    def __init__(self, start: _Start, u: torch.Tensor) -> None:
        self._start, self._u = start, u
        self._left, self._right = start.left, start.right
        self._linearization = start.at(u)
        self._dtype = u.dtype
        self.value = times(self._left.T, self._linearization.flat_value().to(REAL))
        if not bool(torch.isfinite(self.value).all()):
            raise NonFiniteVectorField(
                "the vector field returned NaN or infinity at y0 in an algebraic equation: check "
                "it there", **start.where,
            )  # fmt: skip
        self._rows: torch.Tensor | None = None
        if start.count * len(u) <= DENSE_ENTRIES:
            self._rows = self._linearization.vjps(self._left.T.to(u.dtype)).to(REAL)
            self._matrix = self._rows @ self._right
            finite = bool(torch.isfinite(self._matrix).all())
        else:
            self._operator = SquareOperator(
                self._product, self._transposed, start.count, u.dtype is not REAL, u.device
            )
            finite = self._operator.finite
        if not finite:
            raise NonFiniteVectorField(
                "the derivative of an algebraic equation with respect to an algebraic unknown is "
                "NaN or infinite at y0: check it there", **start.where,
            )  # fmt: skip

    def _product(self, v: torch.Tensor) -> torch.Tensor:
        moved = times(self._right, v).to(self._dtype)
        return times(self._left.T, self._linearization.jvp(moved).to(REAL))

    def _transposed(self, w: torch.Tensor) -> torch.Tensor:
        cotangent = times(self._left, w).to(self._dtype)
        return times(self._right.T, self._linearization.vjp(cotangent).state.to(REAL))

    def require_index_one(self) -> None:
        """Raise unless the equations determine the unknowns."""
        if self._rows is not None:
            self._inverse, failed = torch.linalg.inv_ex(self._matrix)
            missing = self._matrix.eq(0.0).all(dim=0)
            singular = bool(failed) or cond(self._matrix) > 0.1 / torch.finfo(self._dtype).eps
        else:
            missing = self._operator.zero_columns
            singular = bool(missing.any() | self._operator.zero_rows.any())
            if not singular:
                test = self._operator.test()
                singular = test.singular
                if not (singular or test.converged):
                    _warn("whether the algebraic equations determine the algebraic unknowns")
        if singular:
            which = ""
            if bool(missing.any()):
                entry = int(times(self._right, missing.to(REAL)).abs().argmax())
                which = f" (entry {entry} of the flattened state is in none of them)"
            raise ConfigurationError(
                "the algebraic equations do not determine the algebraic unknowns at y0"
                f"{which}: {_INDEX}"
            )

    def correction(self) -> torch.Tensor:
        """Return a Newton correction of the state, the user's precision."""
        return -self.move(self.value).to(self._dtype)

    def move(self, equations: torch.Tensor) -> torch.Tensor:
        """Return the change of the state that changes the equations by these, and nothing else."""
        if self._rows is not None:
            return times(self._right, self._inverse @ equations)
        if not bool(equations.any()):
            return torch.zeros(len(self._u), dtype=REAL, device=self._u.device)
        found = self._operator.solve(equations)
        if not found.converged:
            _warn("how far y0 is from satisfying the algebraic equations")
        return times(self._right, found.x)

    def _pull_back(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of :meth:`move`, and of the choice of the algebraic equations."""
        along = times(self._right.T, cotangent.to(REAL))
        if self._rows is not None:
            return times(self._left, self._inverse.T @ along)
        operator = SquareOperator(
            self._transposed, self._product, self._start.count, self._dtype is not REAL,
            self._u.device,
        )  # fmt: skip
        return times(self._left, operator.solve(along).x)

    def solve(self, values: torch.Tensor) -> torch.Tensor:
        """Return minus :meth:`move` of the algebraic equations of flat values, ``(..., size)``."""
        rows = values.to(REAL).reshape(-1, len(self._u))
        found = [-self.move(times(self._left.T, row)) for row in rows]
        return torch.stack(found).view(values.shape).to(values)

    def solve_transpose(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Return the transpose of :meth:`solve` times cotangents, ``(..., size)``."""
        found = [-self._pull_back(row) for row in cotangents.reshape(-1, len(self._u))]
        return torch.stack(found).view(cotangents.shape).to(cotangents)

    def terms(self) -> torch.Tensor:
        """Return how much the state moves if all others move by a whole: absolute values added.

        For many equations, root mean squares over random signs.
        """
        u = self._u.to(REAL)
        if self._rows is not None:
            return times(self._right.abs(), self._inverse.abs() @ (self._rows.abs() @ u.abs()))
        total, generator = torch.zeros_like(u), torch.Generator(HOST.device).manual_seed(2)
        for _ in range(3):
            signs = noise(u.shape, generator).sign().to(u)
            products = self._linearization.jvp((signs * u).to(self._dtype)).to(REAL)
            total += self.move(times(self._left.T, products)).square()
        return total.sqrt()


def _warn(what: str) -> None:
    warnings.warn(
        f"{what} at y0 could not be told by products with the Jacobian: the system is badly "
        "conditioned; check the start and the index of the problem",
        RuntimeWarning, stacklevel=2)  # fmt: skip

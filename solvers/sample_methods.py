"""One step of each row of independent samples: Runge-Kutta and Rosenbrock methods.

Rows that do not step have length 0 and stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.solvers.linear.block import Factors
from pnode.solvers.methods import Method
from pnode.solvers.petsc.rosenbrock import warn_of_hidden_time
from pnode.solvers.petsc.settings import default_options
from pnode.solvers.sample_field import RowsField
from pnode.solvers.scheme import combine

__all__ = ["Attempt", "RosenbrockRows", "RowMethod", "RungeKuttaRows", "create"]

# SNES's defaults.
_MOST_ITERATIONS, _DIVERGENCE, _LEAST_NORM = 50, 1e4, 1e-50
# Of a slope that a step carries on, by round-off: far below what tells one f from another.
_MOST_NOISE = 1e-9


@dataclass(eq=False)
class Attempt:
    """A step of each row that moves.

    Attributes
    ----------
    kept : tuple of Tensor
        What the adjoint needs, shape ``(B, n)`` each.
    state, other : Tensor, Tensor or None
        The states after it, and those of the embedded method, ``(B, n)``, double precision.
    first, last : Tensor or None
        The slopes at its start and, where the next step begins with it, at its end.
    value : Tensor
        f where the adjoint evaluates it last, to tell whether it is the same there.
    nonfinite, failed : Tensor
        Rows in which f was not finite, and those whose systems were not solved, ``(B,)``.
    """

    kept: tuple[torch.Tensor, ...]
    state: torch.Tensor
    other: torch.Tensor | None
    first: torch.Tensor | None
    last: torch.Tensor | None
    value: torch.Tensor
    nonfinite: torch.Tensor
    failed: torch.Tensor


class RungeKuttaRows:
    """Explicit, diagonally implicit and IMEX Runge-Kutta methods; systems by Newton's method.

    What is kept of a step are its stages.

    Each row has its own convergence, by the tests of SNES on the row alone, with a new Jacobian at
    each iterate.

    Parameters
    ----------
    method : Method
        A row of the table.
    adaptive : bool
        Whether the embedded solution is wanted.
    dtype : torch.dtype
        Precision of f.
    """

    keeps_states = False

    def __init__(self, method: Method, adaptive: bool, dtype: torch.dtype) -> None:
        scheme = method.scheme
        assert scheme is not None
        whole = adaptive or scheme.A_explicit is not None
        self.scheme = scheme if whole else scheme.without_idle_stages(scheme.fsal)
        self._adaptive, self._dtype = adaptive and not method.extrapolates, dtype
        self._carries = self.scheme.explicit_first and method.carries_slope
        if method.implicit:
            options = default_options(method, adaptive, "block", dtype)
            self._rtol, self._stol = options["snes_rtol"], options["snes_stol"]

    def attempt(
        self, field: RowsField, t: torch.Tensor, u: torch.Tensor, length: torch.Tensor,
        slope: torch.Tensor | None = None,
    ) -> Attempt:  # fmt: skip
        """Step by ``length``, shape ``(B,)``, in the user's time; ``slope`` is f there if known."""
        scheme, h, moving = self.scheme, length[:, None], length != 0.0
        nonfinite, failed = torch.zeros_like(moving), torch.zeros_like(moving)
        kept: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        others: list[torch.Tensor] = []  # of the explicit part
        value, guess = u, u
        for i in range(scheme.stages):
            s = t + scheme.c[i] * length
            Y = _moved(u, h, scheme.A[i][:i], slopes) if i else u
            if scheme.A_explicit is not None:
                Y = _moved(Y, h, scheme.A_explicit[i][:i], others)
            if scheme.A[i][i]:
                Y, K, value_here, own = self._solve(field, s, Y, guess, h * scheme.A[i][i])
                failed |= own
            else:
                known = slope if i == 0 else None
                K = value_here = field.rate(s, Y) if known is None else known
            nonfinite |= moving & ~_finite(value_here)
            value = value_here if i == 0 else value
            kept.append(Y.to(self._dtype))
            slopes.append(K)
            if field.explicit is not None:
                others.append(field.explicit.rate(t + scheme.c_explicit[i] * length, Y))
                nonfinite |= moving & ~_finite(others[-1])
            guess = Y
        state = _moved(u, h, scheme.b, slopes)
        if scheme.b_explicit is not None:
            state = _moved(state, h, scheme.b_explicit, others)
        if scheme.stiffly_accurate and not scheme.explicit:
            state = torch.where(moving[:, None], guess, u)
        other = _moved(u, h, scheme.b_embedded or (), slopes) if self._adaptive else None
        if other is not None and others:
            other = _moved(other, h, scheme.b_explicit_embedded or scheme.b_embedded or (), others)
        last = slopes[-1] if scheme.fsal or self._carries else None
        if self._carries and scheme.A[-1][-1]:
            last = _carried(slopes[-1], value_here, Y, h * scheme.A[-1][-1])
        stages = tuple(kept[: scheme.stages - scheme.fsal])
        first = slopes[0] if scheme.explicit_first else None
        return Attempt(stages, state, other, first, last, value, nonfinite, failed)

    def _solve(
        self, field: RowsField, t: torch.Tensor, z: torch.Tensor, guess: torch.Tensor,
        h: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Solve y = z + h f(t, y); return y, the slopes, f at the last iterate and the failures."""
        moving = h[:, 0] != 0.0
        shift, own = 1.0 / torch.where(h == 0.0, 1.0, h), slice(field.width)
        first = slice(field.own)  # tangents follow once the state is known
        y, wanted = torch.where(moving[:, None], guess, z), moving.clone()
        failed = torch.zeros_like(moving)
        before, update = torch.zeros_like(shift[:, 0]), torch.zeros_like(y[:, first])
        for iteration in range(_MOST_ITERATIONS + 1):
            graph = field.graph(t, y)
            value = graph.flat_value().to(REAL).view_as(y)
            residual = shift * (y - z) - value
            norm = residual[:, own].norm(dim=1)
            done = norm < _LEAST_NORM
            if iteration:
                size = y[:, own].norm(dim=1)
                small = update[:, own].norm(dim=1) < self._stol * size
                done |= (norm <= self._rtol * before) | small
            else:
                before = norm
            wrong = wanted & ~done & ~((norm <= _DIVERGENCE * before) & norm.isfinite())
            failed |= wrong
            wanted = wanted & ~done & ~wrong
            if not bool(wanted.any()):
                break
            if iteration == _MOST_ITERATIONS:
                failed |= wanted
                break
            factors = factored(field, shift, field.blocks(graph), wanted)
            update = factors.solve(residual[:, first])
            singular = wanted & factors.singular
            failed |= singular
            wanted &= ~singular
            y[:, first] = torch.where(wanted[:, None], y[:, first] - update, y[:, first])
            field.ledger.newton += 1
        # Integrals are what their rate is at the solution, not what the last iteration made of it.
        driven = slice(field.width, field.own)
        y[:, driven] = (z + h * value)[:, driven]
        if field.own < field.whole:
            factors = factored(field, shift, field.blocks(graph), moving, graph)
            residual[:, first] = 0.0
            y = torch.where(moving[:, None], y - factors.solve(residual), y)
            value = torch.cat([value[:, first], (shift * (y - z))[:, field.own :]], dim=1)
        return y, shift * (y - z), value, failed


class RosenbrockRows:
    """Rosenbrock-W methods; ``RosenbrockAdjoint`` has the equations of their stages.

    What is kept of a step is the state at its start.
    """

    keeps_states = True

    def __init__(self, method: Method, adaptive: bool, dtype: torch.dtype) -> None:
        scheme = method.scheme
        assert scheme is not None
        self.scheme, self._dtype, self._knows_time = scheme, dtype, not scheme.needs_time_slope
        self.At, self.Ginv, self.corr, self.bt = scheme.transformed()
        self._embedded = None
        if adaptive:
            self._embedded = np.array(scheme.b_embedded) @ self.Ginv

    def attempt(
        self, field: RowsField, t: torch.Tensor, u: torch.Tensor, length: torch.Tensor,
        slope: torch.Tensor | None = None,
    ) -> Attempt:  # fmt: skip
        """Step by ``length``, shape ``(B,)``, in the user's time."""
        moving = length != 0.0
        found = self.stages(field, t, u, length)
        Y = [stage for _, stage, _ in found.stages]
        state, other = u + combine(self.bt, Y, u), None
        if self._embedded is not None:
            other = torch.where(moving[:, None], u + combine(self._embedded, Y, u), u)
        state = torch.where(moving[:, None], state, u)
        nonfinite = moving & ~torch.stack([_finite(value) for value in found.values]).all(dim=0)
        failed = moving & found.singular
        return Attempt((u,), state, other, None, None, found.values[0], nonfinite, failed)

    def stages(
        self, field: RowsField, t: torch.Tensor, u: torch.Tensor, length: torch.Tensor,
        graphs: bool = False,
    ) -> RosenbrockStages:  # fmt: skip
        """Compute the stages; with ``graphs``, those of f there come with them."""
        scheme, moving = self.scheme, length != 0.0
        h, own = torch.where(moving, length, 1.0)[:, None], moving[:, None]
        base = field.graph(t, u, by_time=scheme.needs_time_slope)
        J, by_time = field.blocks(base), None
        if scheme.needs_time_slope:
            by_time = base.time_derivative().to(REAL).view_as(u)
            self._look_at_time(field, base, t, u, length)
        found = RosenbrockStages(base, J, [], [], torch.zeros_like(moving), h, [])
        for i, alpha in enumerate(scheme.c):
            Y = [stage for _, stage, _ in found.stages]
            # Rows that do not step have stages of zeros: others could leave f's domain.
            Z = torch.where(own, u + combine(self.At[i], Y, u), u)
            s, point = t + alpha * length, base
            if i == 0:
                value = base.flat_value().to(REAL).view_as(u)
            elif graphs:
                point = field.graph(s, Z)
                value = point.flat_value().to(REAL).view_as(u)
            else:
                value = field.rate(s, Z)
            b = value - combine(self.Ginv[i], Y, u) / h
            if by_time is not None:
                b = b + scheme.gamma[i] * h * by_time
            b = torch.where(own, b, 0.0)
            if scheme.gamma_diagonal[i] == 0.0:
                v = combine(self.corr[i], Y, u)
                stage = torch.where(own, h * (b + field.product(base, J, v)), 0.0)
            else:
                if i == 0 or not scheme.one_matrix:
                    shift = 1.0 / (h * scheme.gamma_diagonal[i])
                    found.factors.append(factored(field, shift, J, moving, base))
                    found.singular |= found.factors[-1].singular
                v = stage = found.factors[-1].solve(b)
            found.stages.append((point, stage, v))
            found.values.append(value)
        return found

    def _look_at_time(
        self, field: RowsField, base: Linearization, t: torch.Tensor, u: torch.Tensor,
        length: torch.Tensor,
    ) -> None:  # fmt: skip
        """Warn, once, of a field that depends on t and hides it; see ``RosenbrockBridge``."""
        if self._knows_time:
            return
        self._knows_time = True
        if not base.records_time():
            before = base.flat_value().to(REAL)
            later = field.rate(t + 0.1 * length, u).reshape(-1)
            if bool((later.isfinite() & before.isfinite() & (later != before)).any()):
                warn_of_hidden_time(2)


@dataclass(eq=False)
class RosenbrockStages:
    """Stages of Rosenbrock steps: f's graphs, Y_i, and what J multiplies; values of f; factors.

    ``length`` has shape ``(B, 1)``, 1 for rows that do not step.
    """

    base: Linearization
    jacobian: torch.Tensor
    stages: list[tuple[Linearization, torch.Tensor, torch.Tensor]]
    values: list[torch.Tensor]
    singular: torch.Tensor
    length: torch.Tensor
    factors: list[Any]


RowMethod: TypeAlias = RungeKuttaRows | RosenbrockRows


def create(method: Method, adaptive: bool, dtype: torch.dtype) -> RowMethod:
    """Return the steps of a method."""
    kind: Any = RosenbrockRows if method.linearly_implicit else RungeKuttaRows
    made: RowMethod = kind(method, adaptive, dtype)
    return made


def factored(
    field: RowsField, shift: torch.Tensor, blocks: torch.Tensor, wanted: torch.Tensor,
    graph: Linearization | None = None,
) -> Any:  # fmt: skip
    """Factor ``shift I - J`` of the rows that are wanted; of others the identity.

    Of states with tangents the whole systems, if ``graph`` is given.
    """
    unit = torch.eye(blocks.shape[1], dtype=REAL, device=blocks.device)
    matrices = torch.where(wanted[:, None, None], shift[..., None] * unit - blocks, unit)
    field.ledger.factorizations += 1
    made = Factors(matrices)
    return made if graph is None or field.own == field.whole else _PairFactors(
        made, field, graph, wanted
    )  # fmt: skip


class _PairFactors:
    """Systems of states and tangents: ``A`` for each, and what tangents have of the state.

    A (y, Z) = b is A_0 y = b_y and A_0 Z_k = b_k + K_k y, K_k being the derivative of f_y Z_k by y.
    """

    def __init__(
        self, factors: Factors, field: RowsField, graph: Linearization, wanted: torch.Tensor
    ) -> None:
        self._factors, self._field, self._graph = factors, field, graph
        self._wanted, self.singular = wanted[:, None], factors.singular

    def solve(self, b: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return the solutions for right-hand sides ``(B, n)``."""
        own, base = self._field.own, self._factors
        y, Z = b[:, :own], b[:, own:]
        if not transposed:
            y = base.solve(y)
            Z = Z + self._coupling(torch.cat([y, torch.zeros_like(Z)], dim=1), False)[:, own:]
        columns = Z.reshape(len(b), -1, own).mT
        Z = base.solve_columns(columns.contiguous(), transposed).mT.reshape(Z.shape)
        if transposed:
            through = self._coupling(torch.cat([torch.zeros_like(y), Z], dim=1), True)
            y = base.solve(y + through[:, :own], True)
        return torch.cat([y, Z], dim=1)

    def _coupling(self, v: torch.Tensor, transposed: bool) -> torch.Tensor:
        found = self._field.product(self._graph, None, v, transposed)
        return torch.where(self._wanted, found, 0.0)


def _carried(
    slope: torch.Tensor, value: torch.Tensor, y: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """Return f at y: the slope (y - z) / h, or where round-off of y is more of that, the value.

    The slope is what stiff f has less of Newton's error in. Before a row fails its steps are short.
    """
    noise = torch.finfo(y.dtype).eps * y.norm(dim=1)
    lost = noise > _MOST_NOISE * h[:, 0].abs() * slope.norm(dim=1)
    return torch.where(lost[:, None], value, slope)


def _moved(
    u: torch.Tensor, h: torch.Tensor, row: Sequence[float], slopes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return u + h sum_j row_j K_j; exactly u where h is 0, whatever the slopes."""
    return torch.where(h == 0.0, u, u + h * combine(row, slopes, u))


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.isfinite().all(dim=1)

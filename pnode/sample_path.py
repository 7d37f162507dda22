"""Independent samples between the ends of their steps: each row on the interpolants of its own.

The ends of all steps are outputs of the sweep. What is made of them and of slopes of f is plain
torch: the interpolants are those of :mod:`pnode.sweeping.dense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pnode.base.interpolation import Extension, lagrange_polynomials
from pnode.base.ledger import Stats
from pnode.base.rank_sums import replicated
from pnode.base.real_times import real_times
from pnode.base.transforms import moves
from pnode.base.vectors import REAL
from pnode.derivatives.row_slopes import RowSlopes
from pnode.derivatives.stages import written
from pnode.errors import ConfigurationError, FieldChanged, NonFiniteVectorField
from pnode.problems.arguments import choice
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.methods import Method
from pnode.solvers.scheme import Scheme, combine
from pnode.sweeping.dense import own_extension, own_interpolant
from pnode.sweeping.partial_steps import inner_points

__all__ = ["SamplePath"]

# How far a step taken again may be off, relative to the state.
_OFF = 1e-6
# How far beyond an end a time may be that is meant to be it, in spacings of its numbers.
_SPACINGS = 4.0


@dataclass(eq=False)
class SamplePath:
    """The steps of each row; see :meth:`pnode.Solution.__call__`.

    Attributes
    ----------
    problem : InitialValueProblem
        Of all rows.
    method : Method
        What has solved it.
    stats : Stats
        Counts.
    times : Tensor
        What steps have hit, shape ``(T, B)``; the derivatives by them pass.
    ends : Tensor
        Where steps end, shape ``(K + 1, B)``, NaN behind the last of a row.
    nodes : Tensor
        The states there, shape ``(K + 1, B, n)``, double precision.
    start : Tensor
        y0.
    parameters : sequence of Tensor
        Those of the problem, in the graph.
    again : callable
        Takes one step of each row, for times ``(2, B)``, from states ``(B, n)``.
    restored : callable
        From states inside, shape ``(..., B, n)``, to the user's.
    on_failure : {"raise", "nan"}
        What becomes of a row whose f is not finite where an interpolant asks for it.
    """

    problem: InitialValueProblem
    method: Method
    stats: Stats
    times: torch.Tensor
    ends: torch.Tensor
    nodes: torch.Tensor
    start: torch.Tensor
    parameters: Sequence[torch.Tensor]
    again: Any
    restored: Any
    on_failure: str

    def __post_init__(self) -> None:
        """Find out how many steps each row has, and which way it goes."""
        known = self.ends.isfinite()
        self.count = known.sum(dim=0) - 1
        given = self.times.detach().to(self.ends)
        self.direction = torch.where(given[-1] >= given[0], 1.0, -1.0).to(REAL)
        self.s = torch.where(known, self.direction * self.ends, torch.inf)
        number = torch.arange(len(self.ends), device=self.ends.device)[:, None]
        #: Those of the last node for what is behind it.
        self.safe = torch.minimum(number, self.count)
        self.states = _at(self.nodes, self.safe)
        self.versions = written(self.problem, self.start)
        self.rates = RowSlopes(self.problem, self.stats, self.parameters)

    def __reduce__(self) -> Any:
        """Copies and pickles of a solution have numbers alone."""
        return _nothing, ()

    def keep(self) -> None:
        """Evaluate f where interpolants ask for it, in the solve's graph, as it is now."""
        if own_interpolant(self.method) is None and not inner_points(self.method):
            _ = self.slopes

    # ------------------------------------------------------------------------ ends of steps

    def at_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends of all steps and the states there, which move where ``times`` do."""
        times, numbers = self.times.to(REAL), self.times.detach().to(REAL)
        # The first is y0, which does not move by t[0]; what is interpolated from it does.
        first = self.start.reshape(1, *self.nodes.shape[1:]).to(REAL)
        nodes = torch.cat([first, self.nodes[1:]])
        if not moves(self.times):
            return self.ends.clone(), nodes
        index, hit = self._hits(numbers)
        change = torch.zeros_like(self.ends).scatter_add(
            0, index, torch.where(hit, times - numbers, 0.0)
        )
        slopes = torch.zeros_like(self.nodes.detach())
        with torch.no_grad(), self.rates.surroundings.restored():
            for number in range(1, len(times)):
                at, rows = index[number], hit[number].nonzero()[:, 0]
                state = _at(self.states, at[None])[0]
                slopes[at[rows], rows] = self.rates.field.total_rate(numbers[number], state)[rows]
        return self.ends + change, nodes + change[..., None] * slopes

    def _hits(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which ends of steps are at times or follow them, and whether they are at them."""
        columns = (self.s.t().contiguous(), (self.direction * numbers).t().contiguous())
        index = torch.searchsorted(*columns).t().clamp(max=len(self.s) - 1)
        return index, _at(self.ends, index) == numbers

    def outputs(self) -> torch.Tensor:
        """Return the states at ``times``, shape ``(T, B, n)``, the inner ones interpolated."""
        _, ends = self.at_steps()
        arrived = _at(self.ends, self.count[None])[0] == self.times[-1].detach().to(REAL)
        last = torch.where(arrived[:, None], _at(ends, self.count[None])[0], torch.nan)
        times = self.times[1:-1].to(REAL)
        index, hit = self._hits(times.detach())
        inside = self._between(self.direction * times, 0, True)
        inside = torch.where(hit[..., None], _at(ends, index).to(inside), inside)
        inside = self._finite(inside, self.direction * times)
        return torch.cat([ends[:1], inside, last[None]])[: len(self.times)]

    # ----------------------------------------------------------------------- at other times

    def at(self, t: Any, order: int, side: str = "after") -> Any:
        """Return the states, or their derivatives, at any times: shape ``(T, B, ...)``."""
        choice("side", side, ("after", "before"))
        if written(self.problem, self.start) != self.versions:
            raise FieldChanged(
                "y0 or a parameter was written into since the solve: ask for the solution before "
                "that, or solve again",
                method=self.method.name,
            )
        t = self._asked(t)
        if self.problem.ranks.parallel and t.dim() < 2 and moves(t):
            (t,) = replicated(self.problem.ranks.comm, (t,))
        rows = len(self.count)
        given = t.t() if t.dim() == 2 else t.reshape(-1, 1).expand(-1, rows)
        s = self.direction * given.to(REAL)
        low, high = self.s[0], self.direction * self.times[-1].detach().to(REAL)
        s = s + (torch.maximum(torch.minimum(s.detach(), high), low) - s.detach())
        found = self._finite(self._between(s, order, side == "after"), s)
        return self.restored(found if t.dim() else found[0])

    def _asked(self, t: Any) -> torch.Tensor:
        """Check times."""
        t = real_times("t", t, "give times of shape (T,) or (B, T)")
        rows, numbers = len(self.count), self.times.detach().to(REAL)
        if t.dim() > 2 or (t.dim() == 2 and len(t) != rows):
            raise ConfigurationError(
                f"t has shape {tuple(t.shape)}: give times of shape (T,), or (B, T) = ({rows}, T) "
                "for times of each row's own"
            )
        t = t.to(self.ends.device)
        s = self.direction[:, None] * t.detach().to(REAL).reshape(*t.shape[: t.dim() - 1], -1)
        low, high = (self.direction * numbers[end] for end in (0, -1))
        eps = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
        slack = _SPACINGS * eps * torch.maximum(low.abs(), high.abs())
        outside = ~((s >= (low - slack)[:, None]) & (s <= (high + slack)[:, None]))  # NaN too
        if bool(outside.any()):
            row, index = outside.nonzero()[0].tolist()
            raise ConfigurationError(
                f"t = {float(self.direction[row] * s[row, index])!r} is not in the interval of row "
                f"{row}, from {float(numbers[0, row])!r} to {float(numbers[-1, row])!r}: solve "
                "further, or ask within it"
            )
        return t

    def _between(self, s: torch.Tensor, order: int, after: bool) -> torch.Tensor:
        """Return states, or derivatives by t, at times ``(Q, B)`` of the rows' clocks."""
        numbers, columns = s.detach(), self.s.t().contiguous()
        k = torch.searchsorted(columns, numbers.t().contiguous(), right=after).t() - 1
        k = torch.minimum(k, self.count - 1).clamp(min=0)
        first, last = (_at(self.s, torch.minimum(k + i, self.count)) for i in (0, 1))
        h = torch.where(self.count > 0, last - first, 1.0)
        theta = (s - first) / h
        at_end = (numbers == last) & (self.count > 0)
        theta = theta + (torch.where(at_end, 1.0, theta.detach()) - theta.detach())
        scheme, more = own_interpolant(self.method), own_extension(self.method)
        points = inner_points(self.method)
        found = (
            self._through_states(points, k, h, theta, order) if points else
            self._own(scheme, k, h, theta, order) if scheme is not None
            else self._hermite(k, h, theta, order) if more is None
            else self._extended(more, k, h, theta, order)
        )  # fmt: skip
        # A row that has failed is not known beyond its last step.
        known = (numbers <= last)[..., None]
        return torch.where(known, found, torch.nan).to(self.problem.layout.dtype)

    def _finite(self, found: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Return what was found at the rows' clocks; f may not be finite where it was asked for."""
        fine = found.detach().isfinite()
        if self.on_failure == "raise" and not bool(fine.all()):
            at, row = (~fine).nonzero()[0, :2].tolist()
            raise NonFiniteVectorField(
                f"row {row} of y0: the vector field returned NaN or infinity at an end of the step "
                "that an output lies in: end the solve before, or let steps hit the outputs, "
                "without dense",
                time=float(self.direction[row] * s[at, row]), method=self.method.name,
            )  # fmt: skip
        return found

    @cached_property
    def slopes(self) -> torch.Tensor:
        """f at all nodes."""
        return self.rates(self.direction * _at(self.s, self.safe), self.states)

    def _hermite(
        self, k: torch.Tensor, h: torch.Tensor, theta: torch.Tensor, order: int
    ) -> torch.Tensor:
        """Interpolate between states and slopes at both ends of steps ``k``."""
        end, user = torch.minimum(k + 1, self.count), (self.direction * h)[..., None]
        x, rest = theta[..., None], 1.0 - theta[..., None]
        u, change = _at(self.states, k), _at(self.states, end) - _at(self.states, k)
        before, after = _at(self.slopes, k), _at(self.slopes, end)
        if order:
            by_slopes = rest * (1.0 - 3.0 * x) * before + x * (3.0 * x - 2.0) * after
            return 6.0 * x * rest * change / user + by_slopes
        by_slopes = user * x * rest * (rest * before - x * after)
        return self._to_the_end(u + x * x * (3.0 - 2.0 * x) * change + by_slopes, k, theta)

    def _own(
        self, scheme: Scheme, k: torch.Tensor, h: torch.Tensor, theta: torch.Tensor, order: int
    ) -> torch.Tensor:
        """Interpolate between the stages' slopes, which are computed again, once for a step."""
        assert scheme.interpolation is not None
        steps, slot = _distinct(k)
        u, s = _at(self.states, steps), _at(self.s, steps)
        end = torch.minimum(steps + 1, self.count)
        length = self.direction * (_at(self.s, end) - s)
        slopes: list[torch.Tensor] = []
        Y = u
        for i, c in enumerate(scheme.c):
            Y = u + length[..., None] * combine(scheme.A[i][:i], slopes, u) if i else u
            slopes.append(self.rates(self.direction * s + c * length, Y))
        self._compare(Y, _at(self.states, end), s)
        rows = scheme.interpolation
        result = _combined(rows, [_at(slope, slot) for slope in slopes], theta, order)
        if order:
            return result
        return self._to_the_end(_at(u, slot) + (self.direction * h)[..., None] * result, k, theta)

    def _extended(
        self, more: Extension, k: torch.Tensor, h: torch.Tensor, theta: torch.Tensor, order: int
    ) -> torch.Tensor:
        """Interpolate with slopes inside of the steps, which are taken once for a step."""
        steps, slot = _distinct(k)
        end = torch.minimum(steps + 1, self.count)
        s, u, change = _at(self.s, steps), _at(self.states, steps), _at(self.states, end)
        change, length = change - u, self.direction * (_at(self.s, end) - s)
        slopes = [_at(self.slopes, steps), _at(self.slopes, end)]
        again = self.rates(self.direction * s, u)
        self._compare(u + length[..., None] * again, u + length[..., None] * slopes[0], s)
        for c, weights in zip(more.c[2:], more.weights, strict=True):
            by_slopes = length[..., None] * combine(weights.slope, slopes, u)
            Y = u + weights.state[1] * change + by_slopes
            slopes.append(self.rates(self.direction * s + c * length, Y))
        rows, user, x = more.coefficients, (self.direction * h)[..., None], theta[..., None]
        used = [0, 1, *range(more.last, len(more.c))]
        result = _combined(rows[used], [_at(slopes[j], slot) for j in used], theta, order)
        u, change = _at(u, slot), _at(change, slot)
        if order:
            return result + 6.0 * x * (1.0 - x) * change / user
        return self._to_the_end(u + x * x * (3.0 - 2.0 * x) * change + user * result, k, theta)

    def _through_states(
        self, points: Sequence[float], k: torch.Tensor, h: torch.Tensor, theta: torch.Tensor,
        order: int,
    ) -> torch.Tensor:  # fmt: skip
        """Interpolate between what partial steps lead to; whole ones tell if f is as it was."""
        steps, slot = _distinct(k)
        end = torch.minimum(steps + 1, self.count)
        s, u, last = _at(self.s, steps), _at(self.states, steps), _at(self.states, end)
        length = torch.where(end > steps, _at(self.s, end) - s, 1.0)
        found = []
        with self.rates.surroundings.restored():
            for c in (*points, 1.0):
                times = self.direction * torch.stack([s, s + c * length])
                each_one = [self.again(times[:, q], u[q]) for q in range(len(u))]
                found.append(torch.stack(each_one) if each_one else u)
        self._compare(found[-1], last, s)
        rows = lagrange_polynomials((0.0, *points, 1.0))[:, 1:]
        u, *states = (_at(state, slot) for state in (u, *found[:-1], last))
        result = _combined(rows, [u, *states], theta, order)
        if order:
            return result / (self.direction * h)[..., None]
        return self._to_the_end(u + result, k, theta)

    def _to_the_end(self, found: torch.Tensor, k: torch.Tensor, theta: torch.Tensor) -> Any:
        """Return states with the bits of those that the steps end at."""
        last = _at(self.states, torch.minimum(k + 1, self.count))
        return found + torch.where(theta[..., None] == 1.0, last - found, 0.0).detach()

    def _compare(self, found: torch.Tensor, expected: torch.Tensor, s: torch.Tensor) -> None:
        """See to it that steps taken again, whose last stage is their end, end where they did."""
        off = (found - expected).detach().abs().amax(dim=2)
        wrong = (off > _OFF * expected.detach().abs().sum(dim=2)) & (self.count > 0)
        if bool(wrong.any()):
            at, row = wrong.nonzero()[0].tolist()
            raise FieldChanged(
                "the vector field is not the one that was solved with, as the steps taken again "
                f"lead elsewhere in row {row}{self.rates.surroundings.differences()}: ask for the "
                "solution before it changes, or solve again",
                time=float(self.direction[row] * s[at, row]), method=self.method.name,
            )  # fmt: skip


def _at(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return entries ``index``, shape ``(Q, B)``, of ``(K, B)`` or ``(K, B, n)``, of each row."""
    if rows.dim() == 2:
        return rows.gather(0, index)
    return rows.gather(0, index[..., None].expand(-1, -1, rows.shape[2]))


def _combined(
    rows: Any, slopes: Sequence[torch.Tensor], theta: torch.Tensor, order: int
) -> torch.Tensor:
    """Return the sum of b_i(theta) k_i, or of the rates of the b_i, of which ``rows`` are."""
    result = torch.zeros_like(slopes[0])
    for row, slope in zip(rows, slopes, strict=True):
        weight = torch.zeros_like(theta)
        for power in reversed(range(len(row))):
            factor = float(row[power]) * (power + 1 if order else 1)
            weight = weight * theta + factor
        result = result + (weight if order else weight * theta)[..., None] * slope
    return result


def _distinct(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct entries of each column, filled up with its last, and where each is."""
    if not len(k):
        return k, k
    ordered, order = k.sort(dim=0)
    slot = torch.cat([torch.zeros_like(k[:1]), ordered.diff(dim=0).ne(0).cumsum(dim=0)])
    steps = ordered[-1:].repeat(int(slot.max()) + 1, 1).scatter(0, slot, ordered)
    return steps, torch.empty_like(slot).scatter(0, order, slot)


def _nothing() -> None:
    return None

"""The adjoint of outputs inside steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from pnode.adjoint.reverse import NodeCotangents
from pnode.base.interpolation import Hermite, polynomial_rate
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.products import accumulate
from pnode.field.rates import Rate, Rates
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.stepping import Step
from pnode.sweeping.dense import DenseOutput, Inside, combined, own_weights
from pnode.sweeping.partial_steps import PartialSteps

__all__ = ["DenseAdjoint"]


class DenseAdjoint(NodeCotangents):
    """Takes the cotangents of interpolated outputs back to the states at the ends of steps.

    Parameters
    ----------
    dense : DenseOutput
        Of the forward sweep.
    steps : sequence of Step
        Its steps.
    field : VectorField
        For products with its derivatives.
    cotangents : Tensor
        Derivatives of the loss with respect to all outputs, shape ``(T, size)``.
    wants_times : bool
        Whether ``times`` is wanted, for which values are needed, not only their graphs.
    partial : PartialSteps or None
        Of the method.

    Attributes
    ----------
    parameters : list of Tensor or None
        What the parameters get through the interpolants, PETSc's precision.
    times : dict
        Derivative of the loss with respect to the time of each interpolated output, along the
        interpolant.
    """

    def __init__(
        self,
        dense: DenseOutput,
        steps: Sequence[Step],
        field: VectorField,
        cotangents: torch.Tensor,
        wants_times: bool,
        partial: PartialSteps | None,
    ) -> None:
        self._dense = dense
        self._partial = partial
        self._wants_times = wants_times
        self._steps = steps
        self._field, self._rates = field, Rates(field)
        self.parameters: list[torch.Tensor | None] = [None] * len(field.parameters)
        self.times: dict[int, float] = defaultdict(float)
        # Outputs that the loss depends on, with their cotangents.
        self._wanted: dict[int, list[tuple[Inside, torch.Tensor]]] = {}
        for step, found in dense.inside.items():
            rows = [(inside, cotangents[inside.index].to(REAL)) for inside in found]
            if not field.problem.ranks.parallel:  # what one rank needs all take part in
                rows = [(inside, row) for inside, row in rows if bool(row.ne(0.0).any())]
            if rows:
                self._wanted[step] = rows
        # For each node, the steps whose interpolants use it, and as which of theirs.
        self._users: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for step in self._wanted:
            for node, i in dense.windows[step].ends if step in dense.windows else []:
                self._users[node].append((step, i))
        self._ends: dict[int, Rate] = {}  # known already, of nodes that are still to come
        self._shares: dict[int, torch.Tensor] = {}  # of steps with partial ones
        # What the states and slopes at both ends of a step get through those inside of it.
        self._pulled: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def at(
        self,
        node: int,
        restore: Callable[[int], Checkpoint],
        graphs: Callable[[int], Sequence[Linearization] | None],
    ) -> torch.Tensor | None:
        """Return the cotangent of the state after ``node`` steps; see :class:`NodeCotangents`."""
        if self._dense.scheme is not None:
            if node not in self._wanted:
                return None
            kept = None if self._wants_times else graphs(node)
            return self._through_stages(node, restore, kept)
        return self._through_ends(node) if self._partial is None else self._through_states(node)

    def _through_states(self, node: int) -> torch.Tensor | None:
        """Collect from the steps at either side, and from the partial ones that begin here."""
        if node not in self._users:
            return None
        total = torch.zeros_like(self._dense.states[node])
        for user, i in self._users[node]:
            if user not in self._shares:
                self._shares[user] = self._shared(user)
            total.add_(self._shares[user][i])
        if node not in self._wanted:
            return total
        step, window, start = self._steps[node], self._dense.windows[node], self._dense.states[node]
        wanted = self._wanted[node]
        assert self._partial is not None
        states, through = self._partial.pull_back(step, start, self._shares.pop(node)[1:-1])
        total.add_(through)
        states = [start, *states, self._dense.states[node + 1]]
        for inside, w in wanted if self._wants_times else ():
            if inside.theta is not None:
                change = combined(window.rates(inside.theta), states, [], 1.0)
                self.times[inside.index] += float(torch.dot(w, change)) / step.length
        return total

    def _shared(self, step: int) -> torch.Tensor:
        """Return the cotangents of the states that a step's polynomial goes through."""
        wanted, window = self._wanted[step], self._dense.windows[step]
        rows = torch.stack([w for _, w in wanted])
        weights = torch.tensor([window.weights(inside).state for inside, _ in wanted], dtype=REAL)
        return weights.T.to(rows) @ rows

    def _through_ends(self, node: int) -> torch.Tensor | None:
        """Collect from the steps around, of whose interpolants this state is a node.

        For y = sum_i (a_i u_i + h b_i f_i) and its cotangent w, u_i gets a_i w, f_i gets h b_i w,
        and what f_i gets goes on to u_i and the parameters by one product.
        """
        if node not in self._users:
            return None
        u, slope = self._dense.states[node], None
        state, there = torch.zeros_like(u), None
        if any(self._dense.windows[step].slopes for step, _ in self._users[node]):
            there, slope = self._end(node), torch.zeros_like(u)
            del self._ends[node]
        for step, i in self._users[node]:
            h, window = self._steps[step].length, self._dense.windows[step]
            if window.extension is not None:
                assert there is not None and slope is not None
                if step not in self._pulled:  # its end comes before its start
                    self._pulled[step] = self._through_slopes(step, (self._end(step), there))
                states, slopes = self._pulled[step]
                state.add_(states[i])
                slope.add_(slopes[i])
                if i == 0:
                    del self._pulled[step]
                continue
            for inside, w in self._wanted[step]:
                weights, theta = window.weights(inside), inside.theta
                rates = window.rates(theta) if self._wants_times and theta is not None else None
                state.add_(w, alpha=weights.state[i])
                if rates is not None:
                    self.times[inside.index] += rates.state[i] / h * float(torch.dot(w, u))
                if window.slopes:
                    assert there is not None and slope is not None
                    slope.add_(w, alpha=weights.slope[i] * h)
                    if rates is not None:
                        change = float(torch.dot(w, there.value))
                        self.times[inside.index] += rates.slope[i] * change
        if there is None or slope is None:
            return state
        return state.add_(there.product(slope, self.parameters))

    def _end(self, node: int) -> Rate:
        """Return the rate after ``node`` steps."""
        if node not in self._ends:
            s = self._steps[node].start if node < len(self._steps) else self._steps[-1].end
            self._ends[node] = self._rates.at(s, self._dense.states[node])
        return self._ends[node]

    def _through_slopes(
        self, step_index: int, ends: tuple[Rate, Rate]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Take the cotangents of a continuous extension back through the slopes inside of a step.

        Returns
        -------
        states, slopes : list of Tensor
            What those at both ends of the step get.
        """
        step, more = self._steps[step_index], self._dense.windows[step_index].extension
        assert more is not None
        known = [self._dense.states[step_index + i] for i in (0, 1)]
        values, inner = [end.value for end in ends], []
        for j, (c, weights) in enumerate(zip(more.c[2:], more.weights, strict=True), 2):
            inner.append(combined(weights, known, values, step.length))
            if j < more.last:
                values.append(self._rates.value(step.at(c), inner[-1]))
        states = [torch.zeros_like(u) for u in known]
        slopes = [torch.zeros_like(known[0]) for _ in more.c]

        def add(weights: Hermite, w: torch.Tensor) -> None:
            for state, weight in zip(states, weights.state, strict=True):
                state.add_(w, alpha=weight)
            for slope, weight in zip(slopes, weights.slope, strict=False):
                slope.add_(w, alpha=weight * step.length)

        wanted = self._wanted[step_index]
        for inside, w in wanted:
            add(self._dense.windows[step_index].weights(inside), w)
        for j in reversed(range(2, len(more.c))):
            rate = self._rates.at(step.at(more.c[j]), inner[j - 2])
            if j >= more.last:
                values.insert(more.last, rate.value)
            add(more.weights[j - 2], rate.product(slopes[j], self.parameters))
        for inside, w in wanted:
            if inside.theta is not None:
                change = combined(more.rate(inside.theta), known, values, step.length)
                self.times[inside.index] += float(torch.dot(w, change)) / step.length
        return states, slopes[:2]

    def _through_stages(
        self,
        step_index: int,
        restore: Callable[[int], Checkpoint],
        graphs: Sequence[Linearization] | None,
    ) -> torch.Tensor:
        """Take the cotangents of u + h sum_i b_i(theta) k_i back through the stages.

        As in the adjoint of the step itself, with cotangents of the slopes instead of one of the
        end: w_i = h (sum b_i(theta) w + sum_{j>i} a_ji l_j), l_i = f_y(Y_i)^T w_i.
        """
        assert self._dense.scheme is not None
        scheme, step = self._dense.scheme, self._steps[step_index]
        wanted = self._wanted[step_index]
        weights = [own_weights(scheme, inside) for inside, _ in wanted]
        rates = [
            None if inside.theta is None else polynomial_rate(scheme.interpolation, inside.theta)
            for inside, _ in wanted
        ]
        stages = list(restore(step_index).stages)
        if len(stages) < scheme.stages:  # FSAL: the last stage is the end
            stages.append(self._dense.states[step_index + 1])
        total = torch.zeros_like(wanted[0][1])
        for (weight, _), (_, w) in zip(weights, wanted, strict=True):
            total.add_(w, alpha=weight)
        below: list[tuple[int, torch.Tensor]] = []
        for i in reversed(range(len(stages))):
            if graphs is not None and i < len(graphs):
                graphs[i].adopt(self._field.shared)
                value, parts = None, [graphs[i]]
            else:
                s = step.at(scheme.c[i])
                value, parts = self._linearize(s, stages[i])
            slope = torch.zeros_like(total)
            for (_, row), rate, (inside, w) in zip(weights, rates, wanted, strict=True):
                slope.add_(w, alpha=row[i])
                if value is not None and rate is not None:
                    self.times[inside.index] += rate[i] * float(torch.dot(w, value))
            for j, product in below:
                slope.add_(product, alpha=scheme.A[j][i])
            below.append((i, self._product(parts, step.length * slope)))
        return sum((product for _, product in below), start=total)

    def _linearize(self, s: float, u: torch.Tensor) -> tuple[torch.Tensor, list[Linearization]]:
        """Return g(s, u), PETSc's precision, and the linearizations of its parts."""
        field = self._field
        parts = [part for part in (field, field.explicit) if part is not None]
        made = [part.linearize(s, u.to(field.dtype, copy=True)) for part in parts]
        value = sum((part.flat_value() for part in made[1:]), start=made[0].flat_value())
        return value.to(REAL), made

    def _product(self, parts: list[Linearization], w: torch.Tensor) -> torch.Tensor:
        """Return w^T g_u, PETSc's precision, and add up w^T g_p."""
        result = torch.zeros_like(w)
        for part in parts:
            products = part.vjp(w.to(self._field.dtype))
            accumulate(self.parameters, products.parameters)
            result.add_(products.state)
        return result

"""Outputs inside steps: the forward interpolation of one sweep and its adjoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pnode import vectors
from pnode.adjoint.reverse import NodeCotangents
from pnode.interpolation import hermite, hermite_rate, polynomial, polynomial_rate
from pnode.linearization import Linearization
from pnode.products import accumulate
from pnode.rates import Rates
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.scheme import Scheme
from pnode.solvers.stepping import Observer, Step
from pnode.vectorfield import VectorField
from pnode.vectors import REAL

__all__ = ["DenseAdjoint", "DenseOutput"]

# A method's own interpolant is used if it is of higher degree than the Hermite cubic.
_OWN_DEGREE = 4


@dataclass(frozen=True)
class Inside:
    """Output ``index`` lies at ``start + theta * length`` of its step."""

    index: int
    theta: float


class DenseOutput(Observer):
    """Interpolates outputs after each step of a forward sweep.

    Parameters
    ----------
    times : tuple of float
        Output times; the first is the start, the last is hit by a step.
    integrator : TimeIntegrator
        Stands at the start.
    field : VectorField
        For the slopes of the Hermite interpolant: one evaluation at either end of a step with
        outputs inside, shared between neighbours.
    emit : callable
        Takes the outputs in their order, the first and the last of the sweep excepted: states,
        flat, PETSc's precision; None for one at the end of a step.
    keep : bool
        Whether a backward sweep may follow: the states at the ends of such steps are then kept.

    Attributes
    ----------
    inside : dict
        The interpolated outputs of each step, by the step's index.
    states : dict
        States at the ends of these steps, by the number of steps before.
    scheme : Scheme or None
        Of a Runge-Kutta method with an interpolant of its own.
    interpolated : set of int
        Indices of all interpolated outputs.
    """

    def __init__(
        self,
        times: tuple[float, ...],
        integrator: TimeIntegrator,
        field: VectorField,
        emit: Callable[[torch.Tensor | None], None],
        keep: bool,
    ) -> None:
        self._times = times
        self._rates = Rates(field)
        self._emit = emit
        self._keep = keep
        self._next = 1
        self._state = vectors.copy_out(integrator.solution)
        self._slope: tuple[int, torch.Tensor] | None = None
        self.inside: dict[int, list[Inside]] = defaultdict(list)
        self.states: dict[int, torch.Tensor] = {}
        self.interpolated: set[int] = set()
        scheme = integrator.settings.method.scheme
        own = scheme is not None and scheme.interpolation_degree >= _OWN_DEGREE
        self.scheme: Scheme | None = scheme if own else None

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Emit the outputs in a step; the last one of a sweep that ends here has its own."""
        start, self._state = self._state, vectors.copy_out(integrator.solution)
        while self._next < len(self._times) - 1 and self._times[self._next] < step.end:
            theta = (self._times[self._next] - step.start) / step.length
            self.inside[step.index].append(Inside(self._next, theta))
            self.interpolated.add(self._next)
            self._next += 1
        if step.index in self.inside:
            if self._keep:
                self.states[step.index] = start
                self.states[step.index + 1] = self._state
            evaluate = self._hermite if self.scheme is None else self._interpolate
            for inside in self.inside[step.index]:
                self._emit(evaluate(step, inside, start, integrator))
        if self._next < len(self._times) - 1 and self._times[self._next] == step.end and not last:
            self._next += 1
            self._emit(None)

    def end(self) -> None:
        """Let go of f."""
        del self._rates, self._emit

    def _hermite(
        self, step: Step, inside: Inside, start: torch.Tensor, integrator: TimeIntegrator
    ) -> torch.Tensor:
        weights = hermite(inside.theta)
        if inside is self.inside[step.index][0]:
            first = self._slope_at(step.index, step.start, start)
            self._slopes = first, self._slope_at(step.index + 1, step.end, self._state)
        result = weights.state[0] * start + weights.state[1] * self._state
        for weight, slope in zip(weights.slope, self._slopes, strict=True):
            result.add_(slope, alpha=weight * step.length)
        return result

    def _slope_at(self, node: int, s: float, u: torch.Tensor) -> torch.Tensor:
        """Return g after ``node`` steps, from the step before if it was evaluated there."""
        if self._slope is None or self._slope[0] != node:
            self._slope = node, self._rates.value(s, u)
        return self._slope[1]

    def _interpolate(
        self, step: Step, inside: Inside, start: torch.Tensor, integrator: TimeIntegrator
    ) -> torch.Tensor:
        """Let PETSc combine the stage slopes it has at hand."""
        return integrator.interpolate(self._times[inside.index])


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
    ) -> None:
        self._dense = dense
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
        return self._hermite(node)

    def _hermite(self, node: int) -> torch.Tensor | None:
        """Collect from the steps on both sides, of which this state is one end.

        For y = a u_0 + b u_1 + h (c f_0 + d f_1) and its cotangent w, u_0 gets a w, f_0 gets
        h c w, and what f_0 gets goes on to u_0 and the parameters by one product.
        """
        sides = [(node - 1, 1), (node, 0)]  # (step, which of its ends this is)
        rows = [(step, end, row) for step, end in sides for row in self._wanted.get(step, ())]
        if not rows:
            return None
        u = self._dense.states[node]
        s = self._steps[node].start if node < len(self._steps) else self._steps[-1].end
        rate_there = self._rates.at(s, u)
        value = rate_there.value
        state, slope = torch.zeros_like(u), torch.zeros_like(u)
        for step, end, (inside, w) in rows:
            h = self._steps[step].length
            weights, rates = hermite(inside.theta), hermite_rate(inside.theta)
            state.add_(w, alpha=weights.state[end])
            slope.add_(w, alpha=weights.slope[end] * h)
            rate = rates.state[end] / h * torch.dot(w, u) + rates.slope[end] * torch.dot(w, value)
            self.times[inside.index] += float(rate)
        return state.add_(rate_there.product(slope, self.parameters))

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
        weights = [polynomial(scheme.interpolation, inside.theta) for inside, _ in wanted]
        rates = [polynomial_rate(scheme.interpolation, inside.theta) for inside, _ in wanted]
        stages = list(restore(step_index).stages)
        if len(stages) < scheme.stages:  # FSAL: the last stage is the end
            stages.append(self._dense.states[step_index + 1])
        total = sum((w for _, w in wanted), start=torch.zeros_like(wanted[0][1]))
        below: list[tuple[int, torch.Tensor]] = []
        for i in reversed(range(len(stages))):
            if graphs is not None and i < len(graphs):
                graphs[i].adopt(self._field.shared)
                value, parts = None, [graphs[i]]
            else:
                s = step.at(scheme.c[i])
                value, parts = self._linearize(s, stages[i])
            slope = torch.zeros_like(total)
            for row, rate, (inside, w) in zip(weights, rates, wanted, strict=True):
                slope.add_(w, alpha=row[i])
                if value is not None:
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

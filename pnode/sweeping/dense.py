"""Outputs inside steps: the interpolants of a forward sweep; their adjoint is dense_adjoint."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial.polynomial import polyder, polyval

from pnode.base import vectors
from pnode.base.errors import NonFiniteVectorField
from pnode.base.interpolation import (
    Extension,
    Hermite,
    extension,
    hermite,
    hermite_polynomials,
    hermite_rate,
    lagrange_polynomials,
    polynomial,
)
from pnode.field.rates import Rates
from pnode.field.vectorfield import VectorField
from pnode.solvers.methods import Method
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.scheme import Scheme
from pnode.solvers.stepping import Observer, Step
from pnode.sweeping.partial_steps import PartialSteps, inner_points

__all__ = [
    "DenseOutput", "Inside", "Window", "behind", "coefficients", "combined", "own_extension",
    "own_interpolant", "own_weights",
]  # fmt: skip

# A method's own interpolant is used if it is of higher degree than the Hermite cubic.
_OWN_DEGREE = 4


@dataclass(frozen=True)
class Inside:
    """Output ``index``: the interpolant at ``theta``, or its coefficient of theta^``power``."""

    index: int
    theta: float | None
    power: int = 0


@dataclass
class _Node:
    """The end of a step: so many steps come before it. Its slope is evaluated if it is wanted."""

    number: int
    s: float
    state: torch.Tensor
    slope: torch.Tensor | None = None


@dataclass(frozen=True)
class Window:
    """Nodes of a step's interpolant.

    Attributes
    ----------
    first : int
        How many steps come before the first.
    nodes : tuple of float
        Where they are, in lengths of the step from its start.
    extension : Extension or None
        With slopes inside of the step besides.
    slopes : bool
        Whether slopes are taken, not states alone.
    partial : bool
        Whether partial steps lead to all but the first and the last.
    """

    first: int
    nodes: tuple[float, ...]
    extension: Extension | None = None
    slopes: bool = True
    partial: bool = False

    @property
    def ends(self) -> list[tuple[int, int]]:
        """How many steps come before the nodes that are ends of steps, and which they are."""
        chosen = (0, len(self.nodes) - 1) if self.partial else range(len(self.nodes))
        return [(self.first + number, i) for number, i in enumerate(chosen)]

    def weights(self, inside: Inside) -> Hermite:
        """Return the weights of the states and slopes there in an output."""
        more, theta = self.extension, inside.theta
        if theta is None and more is None and inside.power >= (1 + self.slopes) * len(self.nodes):
            zeros = (0.0,) * len(self.nodes)
            return Hermite(zeros, zeros)
        if not self.slopes:
            *powers, found = lagrange_polynomials(self.nodes).T.tolist()
            if theta is None:
                found = [*powers, found][inside.power]
            else:
                for row in reversed(powers):  # Horner's rule, faster than numpy's on few numbers
                    found = [a + theta * b for a, b in zip(row, found, strict=True)]
            return Hermite(tuple(found), ())
        if more is not None:
            return more.power(inside.power) if theta is None else more.at(theta)
        if theta is not None:
            return hermite(theta, self.nodes)
        state, slope = hermite_polynomials(self.nodes)[..., inside.power].tolist()
        return Hermite(tuple(state), tuple(slope))

    def rates(self, theta: float) -> Hermite:
        """Return the derivatives of these weights with respect to theta."""
        if self.extension is not None:
            return self.extension.rate(theta)
        if self.slopes:
            return hermite_rate(theta, self.nodes)
        found: Any = polyval(theta, polyder(lagrange_polynomials(self.nodes).T))
        return Hermite(tuple(found.tolist()), ())


def combined(
    weights: Hermite, states: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor], h: float
) -> torch.Tensor:
    """Return the sum of weighted states and slopes of a step of length h, as many as there are."""
    result = torch.zeros_like(states[0])
    for weight, state in zip(weights.state, states, strict=True):
        result.add_(state, alpha=weight)
    for weight, slope in zip(weights.slope, slopes, strict=False):
        if weight:
            result.add_(slope, alpha=weight * h)
    return result


def own_weights(scheme: Scheme, inside: Inside) -> tuple[float, list[float]]:
    """Return the weights of the start and of the stages' slopes in an output."""
    if inside.theta is not None:
        return 1.0, polynomial(scheme.interpolation, inside.theta)
    if inside.power == 0:
        return 1.0, [0.0] * scheme.stages
    return 0.0, np.asarray(scheme.interpolation)[:, inside.power - 1].tolist()


class DenseOutput(Observer):
    """Interpolates outputs after each step of a forward sweep.

    Parameters
    ----------
    times : tuple of float
        Output times; the first is the start, the last is hit by a step.
    method : Method
        That of the steps.
    start : Tensor
        The state there, flat, PETSc's precision.
    field : VectorField
        For the slopes of Hermite interpolants: one evaluation at each end of a step that one
        needs, shared between neighbours.
    emit : callable
        Takes the outputs in their order, the first and the last of the sweep excepted: states,
        flat, PETSc's precision; and for one at the end of a step the number of steps before.
    keep : bool
        Whether a backward sweep may follow: the states at the ends of such steps are then kept.
    partial : PartialSteps or None
        For methods that are interpolated through states alone, at :func:`inner_points`.
    pieces : sequence of int, optional
        Steps whose interpolants are wanted instead of outputs: by their coefficients of the powers
        of theta.

    Attributes
    ----------
    inside : dict
        The interpolated outputs of each step, by the step's index.
    windows : dict
        The nodes of its interpolant; none of a method with its own.
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
        method: Method,
        start: torch.Tensor,
        field: VectorField,
        emit: Callable[[torch.Tensor, int | None], None],
        keep: bool,
        partial: PartialSteps | None,
        pieces: Sequence[int] | None = None,
    ) -> None:
        self._times = times
        self._partial = partial
        # Not the problem itself: a backward sweep that may come would keep the user's Module by it.
        self._rates, self._ranks = Rates(field), field.problem.ranks
        self._direction = field.problem.direction
        self._emit = emit
        self._keep = keep
        self.pieces = pieces
        self._next = 1
        self.inside: dict[int, list[Inside]] = defaultdict(list)
        self.windows: dict[int, Window] = {}
        self.states: dict[int, torch.Tensor] = {}
        self.interpolated: set[int] = set()
        self.scheme = own_interpolant(method)
        self.width = coefficients(method)
        self._method = method
        self._extension = own_extension(method)
        most = method.order + 1 if method.multistep else 2
        self._nodes = deque([_Node(0, times[0], start)], maxlen=most)
        self._waiting: deque[Step | _Node] = deque()  # and ends of steps that are outputs

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Emit the outputs in a step; the last one of a sweep that ends here has its own."""
        self.take(step, vectors.copy_out(integrator.solution), last, integrator)

    def take(
        self, step: Step, state: torch.Tensor, last: bool = False,
        integrator: TimeIntegrator | None = None,
    ) -> None:  # fmt: skip
        """Emit the outputs in a step to a state; a method's own interpolant is the integrator's."""
        start = self._nodes[-1]
        end = _Node(step.index + 1, step.end, state)
        self._nodes.append(end)
        found = self._in_step(step)
        if found:
            self.inside[step.index] = found
            self.interpolated.update(inside.index for inside in found)
            if self.scheme is None:
                self._waiting.append(step)
            else:
                assert integrator is not None
                self._note([start, end])
                self._interpolate(step, found, start.state, integrator)
        hit = self.pieces is None and self._next < len(self._times) - 1
        if hit and self._times[self._next] == step.end and not last:
            self._next += 1
            self._waiting.append(end)
        self._settle(step.index)

    def output(self, index: int, integrator: TimeIntegrator) -> None:
        """Emit what comes before an output that the sweep itself has."""
        self._settle()

    def end(self) -> None:
        """Emit what is left, and let go of f."""
        self._settle()
        del self._rates, self._emit, self._partial

    def _in_step(self, step: Step) -> list[Inside]:
        """Return what is wanted of a step."""
        found = []
        if self.pieces is None:
            while self._next < len(self._times) - 1 and self._times[self._next] < step.end:
                theta = (self._times[self._next] - step.start) / step.length
                found.append(Inside(self._next, theta))
                self._next += 1
        elif len(self.interpolated) < self.width * len(self.pieces):
            if self.pieces[len(self.interpolated) // self.width] == step.index:
                found = [Inside(self._next + k, None, k) for k in range(self.width)]
                self._next += self.width
        return found

    def _note(self, nodes: Sequence[_Node]) -> None:
        if self._keep:
            self.states.update((node.number, node.state) for node in nodes)

    def _inside(self, step: Step) -> None:
        """Emit the outputs in a step, whose neighbours are known."""
        if self._partial is None:
            self._between_ends(step)
            return
        start, end = self._nodes
        self._note([start, end])
        partial = self._partial
        window = self.windows[step.index] = Window(
            step.index, (0.0, *partial.points, 1.0), slopes=False, partial=True
        )
        states = [start.state, *partial.states(step, start.state), end.state]
        for inside in self.inside[step.index]:
            self._emit(combined(window.weights(inside), states, [], step.length), None)

    def _settle(self, last: int | None = None) -> None:
        """Emit all that waits, as far as the steps up to ``last`` tell; all of it without it."""
        while self._waiting:
            item = self._waiting[0]
            if isinstance(item, _Node):
                self._emit(item.state, item.number)
            elif last is None or item.index + behind(self._method, item) <= last:
                self._inside(item)
            else:
                break
            self._waiting.popleft()

    def _between_ends(self, step: Step) -> None:
        nodes, taken = self._around(step)
        self._note(nodes)
        ends = {step.index: 0.0, step.index + 1: 1.0}  # to the last bit
        where = [
            ends.get(node.number, (node.s - step.start) / step.length) for node in nodes
        ]  # fmt: skip
        more = self._extension
        window = self.windows[step.index] = Window(nodes[0].number, tuple(where), more, taken)
        states, slopes = [node.state for node in nodes], []
        for node in nodes if taken else ():
            if node.slope is None:
                node.slope = self._slope(step, node.s, node.state)
            slopes.append(node.slope)
        if more is not None:
            for c, weights in zip(more.c[2:], more.weights, strict=True):
                state = combined(weights, states, slopes, step.length)
                slopes.append(self._slope(step, step.at(c), state))
        for inside in self.inside[step.index]:
            self._emit(combined(window.weights(inside), states, slopes, step.length), None)

    def _slope(self, step: Step, s: float, state: torch.Tensor) -> torch.Tensor:
        """Return y' there; no step may have evaluated f there before."""
        found = self._rates.value(s, state)
        if not vectors.is_finite(found):
            self._ranks.refuse(NonFiniteVectorField(
                "the vector field returned NaN or infinity at an end of this step, that an output "
                "lies in: end the solve before, or let steps hit the outputs, without dense",
                time=self._direction * s, step=step.index, method=self._method.name,
            ))  # fmt: skip
        return found

    def _around(self, step: Step) -> tuple[list[_Node], bool]:
        """Return the nodes of a step's interpolant, and whether slopes there are wanted.

        Those of BDF's polynomial of order k are the k + 1 states that the step goes through; of the
        steps that start fixed ones those of the first step of order k, if it gets there.
        """
        known = list(self._nodes)
        low = next(i for i, node in enumerate(known) if node.number == step.index)
        if self._method.multistep:
            end = low + 2 if step.order > 0 else self._method.order + 1
            first = end - 1 - (step.order if step.order > 0 else self._method.order)
            if end <= len(known):
                return known[first:end], False
        return known[low : low + 2], True

    def _interpolate(
        self, step: Step, found: list[Inside], start: torch.Tensor, integrator: TimeIntegrator
    ) -> None:
        """Let PETSc combine the stage slopes it has at hand."""
        if self.pieces is None:
            for inside in found:
                self._emit(integrator.interpolate(self._times[inside.index]), None)
            return
        degree = self.width - 1
        thetas = np.arange(1, degree + 1) / degree
        values = torch.stack([
            integrator.interpolate(step.at(theta)) - start for theta in thetas.tolist()
        ])  # fmt: skip
        solved = np.linalg.inv(thetas[:, None] ** np.arange(1, degree + 1))
        self._emit(start, None)
        for row in torch.as_tensor(solved).to(values) @ values:
            self._emit(row, None)


def own_interpolant(method: Method) -> Scheme | None:
    """Return the scheme of a method that is interpolated by its stages, None of others."""
    scheme = method.scheme
    return scheme if scheme is not None and scheme.interpolation_degree >= _OWN_DEGREE else None


def own_extension(method: Method) -> Extension | None:
    """Return how a method is interpolated with slopes inside of its steps, None of others.

    Of explicit ones of order p > 4 without an interpolant of their own: the error is of order h^p
    at least. Implicit ones are for stiff problems, where a slope magnifies the error of the state
    that it is taken at.
    """
    if method.implicit or method.order <= 4 or own_interpolant(method) is not None:
        return None
    return extension(max(method.order // 2 + 1, method.order - 3))


def behind(method: Method, step: Step) -> int:
    """Return how many steps behind a step have a say in its interpolant."""
    return max(0, method.order - 1 - step.index) if method.multistep and step.order < 0 else 0


def coefficients(method: Method) -> int:
    """Return how many coefficients a method's interpolants have, at most."""
    scheme, more = own_interpolant(method), own_extension(method)
    if scheme is not None:
        return 1 + scheme.interpolation_degree
    if more is not None:
        return 1 + int(more.coefficients.shape[1])
    if inner_points(method):
        return 2 + len(inner_points(method))
    return max(4, method.order + 1) if method.multistep else 4

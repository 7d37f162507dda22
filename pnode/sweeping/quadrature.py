"""Cost integrals by a method's own quadrature, from the stages of a state that is solved alone.

A step of a Runge-Kutta method adds h sum_i b_i r(t_i, Y_i) to q; one of BDF solves
sum_j d_j q_{n-j} = r(t_n, y_n), and its start is Euler's method, extrapolated. The numbers are
those of q as one more part of the state (:mod:`pnode.sweeping.integrals`), for one evaluation of r
at each stage and one product with its derivatives backwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from pnode.adjoint.reverse import NodeCotangents
from pnode.adjoint.stepper import StageCotangents
from pnode.adjoint.trajectory import Trajectory
from pnode.base.errors import NonFiniteDerivative, NonFiniteVectorField, SolveError
from pnode.base.evidence import Evidence, differs, project
from pnode.base.vectors import REAL, is_finite
from pnode.field.linearization import Linearization
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.bdf import start_weights
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.methods import Method
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.stepping import Observer, Step
from pnode.sweeping.integrals import checked

__all__ = ["CostField", "DrivenCotangents", "Quadrature"]

#: Index among a step's states, and time.
Place: TypeAlias = tuple[int, float]


class CostField(VectorField):
    """r(t, y), evaluated as f is: of any fixed shape instead of the state's."""

    def __init__(self, problem: Any, ledger: Any, shape: torch.Size) -> None:
        super().__init__(problem, ledger)
        self.size, self.returned, self.who = shape.numel(), shape, "cost"

    def _accepted(self, result: Any, time: float) -> torch.Tensor:
        return checked(result, self._layout, self.returned)


class _Rule(ABC):
    """Quadrature of the steps of a sweep, forwards or backwards, and where it looks at r."""

    @abstractmethod
    def places(self, step: Step) -> list[Place]:
        """Return the states of a step's checkpoint at which r counts."""

    @abstractmethod
    def advance(self, q: np.ndarray, step: Step, d: Any, rates: list[np.ndarray]) -> np.ndarray:
        """Return q after a step; d are the coefficients in its checkpoint."""

    @abstractmethod
    def pull_back(
        self, cotangent: torch.Tensor, step: Step, d: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the cotangents of q before a step and of r at its places."""

    #: Whether the first place of a step is the last one of the step before.
    shares = False


class _Stages(_Rule):
    """Of a Runge-Kutta method; what drives q is the explicit part of one with two."""

    def __init__(self, method: Method) -> None:
        scheme = method.scheme
        assert scheme is not None
        split = scheme.b_explicit is not None
        b, c = (scheme.b_explicit, scheme.c_explicit) if split else (scheme.b, scheme.c)
        assert b is not None
        self._nodes = [(i, c[i]) for i, weight in enumerate(b) if weight]
        self._b = [weight for weight in b if weight]
        self.shares = scheme.explicit_first and scheme.stiffly_accurate and bool(b[0] and b[-1])

    def places(self, step: Step) -> list[Place]:
        return [(i, step.at(c)) for i, c in self._nodes]

    def advance(self, q: np.ndarray, step: Step, d: Any, rates: list[np.ndarray]) -> np.ndarray:
        return sum([(step.length * b) * r for b, r in zip(self._b, rates, strict=True)], q)

    def pull_back(
        self, cotangent: torch.Tensor, step: Step, d: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return cotangent, [(step.length * b) * cotangent for b in self._b]


class _History(_Rule):
    """Of BDF."""

    def __init__(self) -> None:
        self._before: list[np.ndarray] = []
        self._waiting: list[torch.Tensor] = []

    @staticmethod
    def _chains(step: Step) -> list[tuple[int, int, float, float]]:
        """Return number and index of each substep of a start, its length and weight."""
        return [
            (number, i, step.length / number, weight)
            for number, weight in enumerate(start_weights(-step.order), start=1)
            for i in range(1, number + 1)
        ]

    def places(self, step: Step) -> list[Place]:
        if step.order >= 0:
            return [(0, step.end)]
        chains = self._chains(step)
        return [(k, step.start + i * h) for k, (_, i, h, _) in enumerate(chains)]

    def advance(self, q: np.ndarray, step: Step, d: Any, rates: list[np.ndarray]) -> np.ndarray:
        self._before = [q, *self._before[:6]]
        if step.order < 0:
            chains = self._chains(step)
            return q + sum(w * h * r for (_, _, h, w), r in zip(chains, rates, strict=True))
        first, *others = d.tolist()
        past = sum(weight * old for weight, old in zip(others, self._before, strict=False))
        return (rates[0] - past) / first

    def pull_back(
        self, cotangent: torch.Tensor, step: Step, d: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if step.order < 0:
            found = [(w * h) * cotangent for _, _, h, w in self._chains(step)]
            parts = [cotangent]
        else:
            first, *others = d.tolist()
            found = [cotangent / first]
            parts = [found[0] * -weight for weight in others]
        for index, waiting in enumerate(self._waiting):
            if index < len(parts):
                parts[index] = parts[index] + waiting
            else:
                parts.append(waiting)
        own, *self._waiting = parts
        return own, found


def _rule(method: Method) -> _Rule:
    return _History() if method.multistep else _Stages(method)


class Quadrature(Observer):
    """The integrals of a forward sweep, at its outputs.

    Parameters
    ----------
    field : CostField
        r.
    method : Method
        What integrates the state.
    start : Tensor
        q where the sweep begins: zero, unless it goes on from a break.
    note : bool
        Whether a backward sweep is to find the same r.

    Attributes
    ----------
    outputs : list of ndarray
        q at each output.
    noted : Evidence
        Of each step, the projections of r where it was evaluated.
    """

    def __init__(
        self, field: CostField, method: Method, start: torch.Tensor, note: bool
    ) -> None:  # fmt: skip
        self._field, self._note, self._name = field, note, method.name
        self._rule, self._q = _rule(method), start.detach().numpy().astype(np.float64)
        self._last: np.ndarray | None = None
        self.outputs: list[np.ndarray] = []
        self.noted = Evidence()
        self._trajectory: Trajectory | None = None

    def beside(self, trajectory: Trajectory | None) -> Quadrature:
        """Look for stages in a trajectory first."""
        self._trajectory = trajectory
        return self

    def after_step(self, step: Step, integrator: TimeIntegrator, last: bool) -> None:
        """Add what the integrals change by."""
        trajectory = self._trajectory
        checkpoint = None if trajectory is None else trajectory.peek(step.index)
        if checkpoint is None:
            checkpoint = integrator.checkpoint(None)
        states, rule = _states(checkpoint, step), self._rule
        known = self._last if rule.shares else None
        rates, notes = [] if known is None else [known], []
        for i, s in rule.places(step)[len(rates) :]:
            try:
                value = self._field.rhs(s, states[i].detach().to(self._field.dtype))
            except SolveError as error:
                raise error.located(**_where(self._field, self._name, step)) from error.__cause__
            notes.append(project(value))
            rates.append(value.detach().numpy().astype(np.float64))
        self._last = rates[-1]
        self._q = rule.advance(self._q, step, checkpoint.weights, rates)
        if not np.isfinite(self._q).all():
            where = _where(self._field, self._name, step)
            raise NonFiniteVectorField("cost returned NaN or infinity", **where)
        if self._note:
            self.noted.append(notes)

    def output(self, index: int, integrator: TimeIntegrator) -> None:
        """Note an output."""
        self.outputs.append(self._q)


class DrivenCotangents(NodeCotangents):
    """What the adjoint of the state gets from the integrals that it drives.

    Parameters
    ----------
    noted : Evidence
        What the forward sweep's quadrature has noted.
    field : CostField
        r.
    method : Method
        What has integrated.
    cotangents : Tensor
        Of the integrals at the outputs, shape ``(T, m)``, or of k losses ``(T, k, m)``.
    outputs : sequence of int
        How many steps come before each output.

    Attributes
    ----------
    parameters : list of (Tensor or None)
        With respect to each parameter, so far.
    """

    def __init__(
        self, noted: Evidence, field: CostField, method: Method, cotangents: torch.Tensor,
        outputs: Sequence[int],
    ) -> None:  # fmt: skip
        self._noted, self._field, self._name = noted, field, method.name
        self._rule = _rule(method)
        self._cotangents = cotangents.to(REAL)
        self._total, self._active = torch.zeros_like(self._cotangents[0]), False
        self._carried: torch.Tensor | None = None  # of r where the next step begins
        self._hits: dict[int, list[int]] = {}
        for index, node in enumerate(outputs):
            if index and bool(cotangents[index].any()):
                self._hits.setdefault(node, []).append(index)
        self._zero = self._total.new_zeros((*self._total.shape[:-1], field.problem.layout.size))
        self.parameters: list[torch.Tensor | None] = [None] * len(field.parameters)

    def at(
        self,
        node: int,
        restore: Callable[[int], Checkpoint],
        graphs: Callable[[int], Sequence[Linearization] | None],
    ) -> torch.Tensor | None:
        """Take the cotangents of the outputs at a node; see :class:`NodeCotangents`."""
        hits = self._hits.get(node, ())
        for index in hits:
            self._total = self._total + self._cotangents[index]
        began, self._active = self._active, self._active or bool(hits)
        return None if began or not hits else self._zero  # lambda is not zero any more

    def within(self, step: Step, checkpoint: Checkpoint) -> StageCotangents | None:
        """Return the cotangents of a step's stages; see :class:`NodeCotangents`."""
        if not self._active:
            return None
        rule, states = self._rule, _states(checkpoint, step)
        self._total, weights = rule.pull_back(self._total, step, checkpoint.weights)
        places = rule.places(step)
        if rule.shares:
            if self._carried is not None:
                weights[-1] = weights[-1] + self._carried
            if step.index:
                self._carried, weights, places = weights[0], weights[1:], places[1:]
        found: list[torch.Tensor | None] = [None] * len(states)
        noted = self._noted[step.index]
        for k in reversed(range(len(places))):
            i, s = places[k]
            found[i] = self._pulled_back(s, states[i], weights[k], noted[k], step)
        return StageCotangents(found)

    def _pulled_back(
        self, s: float, state: torch.Tensor, weight: torch.Tensor, noted: float, step: Step
    ) -> torch.Tensor:
        """Return the product of a cotangent of r with its derivative by the state."""
        field, where = self._field, _where(self._field, self._name, step)
        try:
            graph = field.linearize(s, state.detach().to(field.dtype))
        except SolveError as error:
            raise error.located(**where) from error.__cause__
        by = differs(graph.flat_value(), noted)
        if by:
            raise field.changed(s, by, "its value").located(**where)
        products = graph.vjp(weight.to(field.dtype))
        accumulate(self.parameters, products.parameters)
        found = products.state.to(REAL)
        if not is_finite(found) and is_finite(weight):
            raise NonFiniteDerivative(
                "a derivative of cost with respect to y is NaN or infinite where its value is not: "
                "keep the state away from there, or write cost so that its derivative exists",
                **where,
            )
        return found


def _states(checkpoint: Checkpoint, step: Step) -> Sequence[torch.Tensor]:
    """Return the states of a step by their index: a start of BDF has them in one tensor."""
    return checkpoint.stages[0].unbind(0) if step.order < 0 else checkpoint.stages


def _where(field: VectorField, method: str, step: Step) -> dict[str, Any]:
    time = field.problem.direction * step.start
    return {"time": time, "step": step.index, "method": method}

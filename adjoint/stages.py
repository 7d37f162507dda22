"""Discrete adjoints of explicit methods, from the states that f was evaluated at.

One product with the transposed Jacobian per evaluation, and no PETSc: it has no TSAdjoint for most
of the methods here, and for TSRK one that enters the interpreter four times a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.adjoint.trajectory import Checkpoint
from pnode.evidence import projection_weights
from pnode.options import log_event
from pnode.solution import Ledger
from pnode.solvers.bridge import accumulate
from pnode.solvers.integrator import IntegratorSettings
from pnode.solvers.stepping import Step
from pnode.vectorfield import Linearization, VectorField
from pnode.vectors import REAL

__all__ = ["ExplicitAdjoint", "SymplecticAdjoint"]


class ExplicitAdjoint(TorchAdjointStepper):
    """Adjoint of an explicit Runge-Kutta step, from its Butcher tableau.

    Parameters
    ----------
    settings : IntegratorSettings
        Those of the forward integrator.
    parameters : bool
        Whether gradients with respect to parameters are wanted.

    Notes
    -----
    Checkpoints hold the stages U_1, ..., U_s; the last one may be missing where nothing depends on
    its slope (FSAL). With lambda' the cotangent of the step's end u' = u + h sum_i b_i k_i,
    backwards through the stages::

        w_i = h (b_i lambda' + sum_{j>i} a_ji l_j),   l_i = g_u(U_i)^T w_i,
        lambda = lambda' + sum_i l_i,                  mu += sum_i g_p(U_i)^T w_i

    (E. Hairer, C. Lubich & G. Wanner, Geometric Numerical Integration, section VI.9; A. Sandu, On
    the properties of Runge-Kutta discrete adjoints, ICCS 2006). These are the numbers of PETSc's
    TSAdjoint, which calls back four times a stage where one call does.
    """

    def __init__(self, settings: IntegratorSettings, parameters: bool) -> None:
        super().__init__(settings, parameters)
        scheme = settings.method.scheme
        assert scheme is not None
        self._nodes = scheme.c
        device = settings.place.device
        stages = range(scheme.stages)
        # lambda' and, from the last stage to the first, the l_i, as rows. Those that stage i looks
        # at come first: w_i is the product of its weights with that many of them.
        self._products = torch.zeros((len(stages) + 1, settings.size), dtype=REAL, device=device)
        self._rows = list(self._products)
        self._columns = [self._products[: i + 1].t() for i in range(len(self._rows))]
        weights = [
            [scheme.b[i], *(scheme.A[j][i] for j in reversed(stages[i + 1 :]))]
            for i in reversed(stages)
        ]
        self._counts = [len(row) for row in weights]
        self._weights = torch.tensor([x for row in weights for x in row], dtype=REAL, device=device)
        self._ones = torch.ones(len(self._rows), dtype=REAL, device=device)
        self._vjp_event = log_event("pnode vjp")
        self._length = math.nan
        self._scaled: tuple[torch.Tensor, ...] = ()
        # The rows of stages that u' does not depend on stay zero.
        self._needed = scheme.live_stages()

    def begin(self, field: VectorField) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field)
        self._random = projection_weights(self.state.to(field.dtype))
        self._products.zero_()
        self._graphs: Sequence[Linearization] | None = None

    def load(
        self, checkpoint: Checkpoint, tape: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place, with the graphs at its stages. Not collective."""
        super().load(checkpoint, tape, evidence)
        self._graphs = tape

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        super().end()
        self._graphs = None

    def step(
        self,
        step: Step,
        ledger: Ledger,
        outputs: Iterable[tuple[Sequence[float], torch.Tensor]] = (),
    ) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Parameters
        ----------
        step : Step
            The step.
        ledger : Ledger
            Counts it.
        outputs : iterable of (weights, cotangent)
            Further outputs ``u + h sum_i weights_i k_i`` inside the step, with the derivative of
            the loss with respect to each, shape ``(size,)``.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        h, field, dtype = step.length, self.field, self.field.dtype
        if h != self._length:
            self._length, self._scaled = h, (self._weights * h).split(self._counts)
        outputs, needed, stages = tuple(outputs), self._needed, len(self._nodes)
        if outputs:
            needed = frozenset(range(len(self.checkpoint)))
        expected, random = self.evidence, self._random
        self._rows[0].copy_(self.state)
        for row, weights in enumerate(self._scaled):
            i = stages - 1 - row
            if i not in needed:
                continue
            w = torch.mv(self._columns[row], weights)
            for inside, cotangent in outputs:
                w.add_(cotangent, alpha=h * inside[i])
            if self._graphs is None:
                c = self._nodes[i]
                s = step.end if c == 1.0 else step.start + c * h
                graph = self.linearize(s, self.checkpoint[i], step)
                value = graph.flat_value()
                if i < len(expected) and float(torch.dot(random, value)) != expected[i]:
                    self.verify(value, i, s, step)
            else:
                graph = self._graphs[i]
                graph.adopt(field)
            with self._vjp_event:
                products = graph.vjp(w if dtype is REAL else w.to(dtype))
            if self.wants_parameters:
                accumulate(self._gradients, products.parameters, 1.0)
            self._rows[row + 1].copy_(products.state)
            del graph, products  # before the next graph is built, so that memory is reused
        self.state = torch.mv(self._columns[-1], self._ones)
        for _, cotangent in outputs:
            self.state.add_(cotangent)
        if outputs:
            self._products.zero_()
        ledger.steps += 1


class SymplecticAdjoint(TorchAdjointStepper):
    """Adjoint of a symplectic step: its half-updates backwards.

    The adjoint of ``p += h d f(x)`` at x = (q, p) is ``lambda += h d f_x^T lambda_p``, and the same
    for q; for a separable field only the other part of lambda changes.
    """

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        split = self.settings.split
        parts = (slice(None, split), slice(split, None))
        stages = list(zip(self.settings.method.half_updates, self.checkpoint, strict=True))
        for index, (update, stage) in reversed(list(enumerate(stages))):
            part = parts[update.part]
            w = torch.zeros_like(self.state)
            w[part] = step.length * update.weight * self.state[part]
            s = step.at(update.offset)
            point = self.linearize(s, stage, step)
            self.verify(point.flat_value(), index, s, step)
            self.state = self.state + self.pull_back(point.vjp, w)
        ledger.steps += 1

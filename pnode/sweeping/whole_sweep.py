"""A sweep that machine code takes, from the first step to the last."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.nonfinite import check_parameters, check_state
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.tangents import Moving
from pnode.base.vectors import REAL, is_finite
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.stepping import Step
from pnode.sweeping.dense import DenseOutput
from pnode.sweeping.dense_adjoint import DenseAdjoint
from pnode.sweeping.driven_outputs import DrivenOutputs
from pnode.sweeping.engine import Engine
from pnode.sweeping.event_locator import EventLocator
from pnode.sweeping.monitor import backward_bar, onlookers
from pnode.sweeping.partial_steps import PartialSteps
from pnode.sweeping.recording import Noted
from pnode.sweeping.run import Requests, Run, Sweep

__all__ = ["WholeSweep"]


class WholeSweep(Sweep):
    """A sweep of machine code, from the first step to the last.

    Parameters
    ----------
    compiled : CompiledSweep
        Has been taken.
    engine : Engine
        Lends what takes partial steps.
    """

    at_hand = True

    def __init__(self, compiled: CompiledSweep, engine: Engine) -> None:
        self._engine = engine
        self._compiled = compiled
        self._nodes: list[int] = []  # of outputs, -1 where they are interpolated, and events
        self._events: list[int] = []  # of these alone

    def forward(
        self, run: Run, field: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
    ) -> torch.Tensor | None:
        """Take all steps, and return the outputs, and states at events behind them.

        None if a step failed for good: the error is to be had from taking them one by one.
        """
        shown, locator = self._compiled.shown, None
        self._progress = requests.progress
        if shown is not None:
            if requests.events is not None:
                locator = EventLocator(
                    requests.events, run.problem, requests.event_tol, shown, shown.lend, field,
                    requests.sides,
                )  # fmt: skip
            others = onlookers(requests, run.problem)
            if locator is not None:
                shown.observers.append(locator)
                if not others:  # who see each step, and may change what events depend on
                    shown.sieve = locator.sieve(self._engine.event_programs)
            shown.observers += others
        try:
            outputs = self._compiled.forward(run.stats)
        finally:
            if shown is not None:
                shown.observers, shown.sieve = [], None
        if outputs is None:
            return None
        self._nodes = [*self._compiled.recorded()[1]] if shown is not None else []
        if requests.dense:
            ended = locator is not None and locator.last is not None
            if self._compiled.inside is not None:
                self._note_outputs(run, ended)
            else:
                outputs = self._interpolated_outputs(run, field, y0, outputs, keep, ended)
        if locator is None:
            return outputs
        run.sides = locator.sides
        if not locator.roots:
            return outputs
        run.roots, run.last = locator.roots, locator.last
        times = (*run.problem.times[: len(outputs)], *(root.time for root in run.roots))
        run.problem = replace(run.problem, times=times)
        self._events = [root.node for root in run.roots]
        self._nodes += self._events
        return torch.cat([outputs, torch.stack([root.state for root in run.roots]).to(outputs)])

    def let_checkpoints_go(self) -> None:
        """Free the checkpoints; see :class:`Sweep`."""
        self._compiled.let_checkpoints_go()

    @property
    def interpolated(self) -> Set[int]:
        """Indices of the outputs that are interpolated."""
        return frozenset() if self.dense is None else self.dense.interpolated

    def _note_outputs(self, run: Run, ended: bool) -> None:
        """Note where the outputs are that the sweep itself has interpolated."""
        compiled, steps, ends = self._compiled, self._compiled.recorded()[0], self._compiled.ends()
        inside, weights = compiled.inside, compiled.kernel.interpolation
        assert inside is not None and weights is not None
        end = ends[-1].clone() if steps else torch.zeros(compiled.kernel.size, dtype=REAL)
        self.dense = DrivenOutputs(inside, weights, steps, end, run.problem.direction)
        self.noted_steps = noted = Noted()
        for step in steps:
            noted.steps.append(step)
        noted.sums.extend(ends.sum(1).tolist())
        noted.outputs = [0] if ended else [0, len(steps)]
        self._nodes = [0, *self.dense.nodes, *noted.outputs[1:]]

    def _interpolated_outputs(
        self, run: Run, field: VectorField, y0: torch.Tensor, outputs: torch.Tensor, keep: bool,
        ended: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Return all outputs, from those that steps have hit; see :class:`DenseOutput`.

        ``ended``: at an event, before the last one.
        """
        rows, nodes = [outputs[0]], [0]

        def emit(state: torch.Tensor, after: int | None) -> None:
            rows.append(state.to(outputs.dtype))
            nodes.append(-1 if after is None else after)

        start, noted = y0.detach().to(REAL, copy=True), Noted()
        steps, ends = self._compiled.recorded()[0], self._compiled.ends()
        with ExitStack() as leases:
            partial = PartialSteps.of(
                self._engine, run.settings, field, y0, leases, compiled=self._compiled.parts
            )
            self.dense = dense = DenseOutput(
                run.problem.times, run.settings.method, start, field, emit, keep, partial
            )  # fmt: skip
            for step, state in zip(steps, ends, strict=True):
                dense.take(step, state)
                noted.take(step, state)
            dense.end()
        noted.outputs = [0] if ended else [0, len(steps)]
        self.noted_steps = noted
        if not ended:
            rows, nodes = [*rows, outputs[-1]], [*nodes, len(steps)]
        self._nodes = nodes
        return torch.stack(rows)

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and how many come before each output."""
        steps, outputs = self._compiled.recorded()
        return steps, (*outputs, *self._events)

    def noted(self, output: int) -> Sequence[float]:
        """Return nothing: the graph that is differentiated is the one that was evaluated."""
        return ()

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint; see :class:`Sweep`. Collective."""
        ranks, parameters = run.problem.ranks, run.problem.parameters
        if self.dense is not None or self._events:
            return self._from_nodes(run, y0, cotangents, wants_times)
        if not ranks.parallel:
            return self._reverse(run, cotangents)
        with ranks.together(agree=False):
            if self._compiled.kernel.collective:  # all begin, or none
                ranks.attempt(run.refuse_written)
                if not ranks.least(self._compiled.whole):  # perhaps on one rank alone
                    ranks.attempt(self._compiled.repeat, run.stats.backward)
                    ranks.least(0)
            found = ranks.attempt(self._checked_reverse, run, cotangents)
        unknown = [None] * len(parameters)  # of a rank that has failed, which this tells
        summed = ranks.sum_gradients(unknown if found is None else found.parameters, parameters)
        return CostGradients(found.state, summed, found.initial)

    def _reverse(
        self, run: Run, cotangents: torch.Tensor, nodes: Sequence[int] | None = None
    ) -> CostGradients:  # fmt: skip
        compiled, problem = self._compiled, run.problem
        with backward_bar(run.stats.steps, self._progress) as compiled.told:
            found = CostGradients(*compiled.reverse(cotangents, run.stats.backward, nodes))
        if is_finite(cotangents):
            first = Step(0, problem.times[0], 0.0, problem.times[0])
            where = self._engine.method.name, problem.direction, first
            check_state(found.initial, *where)
            check_parameters(found.parameters, *where)
        return found

    def _from_nodes(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Do as :meth:`_reverse`, with the cotangents of the states that outputs are made of."""
        rows: dict[int, torch.Tensor] = {}
        inside: DrivenOutputs | DenseAdjoint | None = None
        if isinstance(self.dense, DrivenOutputs):
            inside = self.dense
            inside.pull_back(run.field(run.stats.backward), cotangents, wants_times, rows)
        elif self.dense is not None:
            inside = self._through_interpolants(run, y0, cotangents, wants_times, rows)
        for node, row in zip(self._nodes[1:], cotangents[1:].to(REAL), strict=True):
            if node >= 0:
                rows[node] = rows[node] + row if node in rows else row
        first = rows.pop(0, torch.zeros(self._compiled.kernel.size, dtype=REAL))
        places = sorted(rows)
        given = torch.stack([torch.zeros_like(first), *(rows[node] for node in places)])
        total = self._reverse(run, given, [0, *places])
        initial = total.initial + first
        times: dict[int, float] = {}
        if inside is not None:
            accumulate(total.parameters, tuple(inside.parameters))
            times = inside.times
        return CostGradients(initial + cotangents[0], total.parameters, initial, times)

    def _through_interpolants(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool,
        rows: dict[int, torch.Tensor],
    ) -> DenseAdjoint:  # fmt: skip
        """Add the cotangents of the states that interpolated outputs are made of to ``rows``."""
        assert self.dense is not None
        engine, ledger = self._engine, run.stats.backward
        steps, field = self._compiled.recorded()[0], run.field(ledger)
        with ExitStack() as leases, torch.enable_grad():

            def lease() -> AdjointStepper:
                lent = engine.adjoint(run.settings, bool(field.parameters))
                adjoint = leases.enter_context(lent)
                adjoint.begin(field)
                return adjoint

            partial = PartialSteps.of(
                engine, run.settings, run.field(ledger), y0, leases, lease, self._compiled.parts
            )
            inside = DenseAdjoint(self.dense, steps, field, cotangents, wants_times, partial)
            for node in range(len(steps), -1, -1):
                found = inside.at(node, _no_checkpoint, _no_graphs)
                if found is not None:
                    rows[node] = found
            if partial is not None:
                of_parts = partial.parameter_gradients(len(field.parameters))
                accumulate(inside.parameters, tuple(of_parts))
        return inside

    def _checked_reverse(self, run: Run, cotangents: torch.Tensor) -> CostGradients:
        """Do as alone, with the check of :func:`backward`, whose failure all ranks are to know."""
        run.refuse_written()
        return self._reverse(run, cotangents)

    def tangents(self, run: Run, start: torch.Tensor, moving: Moving) -> torch.Tensor | None:
        """Take the steps' tangents; see :meth:`CompiledSweep.tangents`. None with events."""
        if self._events:
            return None
        return self._compiled.tangents(start, moving, run.stats.tangents)


def _no_checkpoint(step: int) -> Any:
    raise AssertionError("interpolants of states alone want no stages")


def _no_graphs(step: int) -> None:
    return None

"""The sweep of independent samples, as those of one state: with passes, or in machine code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.nonfinite import check_parameters, check_state
from pnode.adjoint.sample_adjoint import sample_adjoint
from pnode.base.errors import BackwardError
from pnode.base.evidence import Reads, project
from pnode.base.ledger import Ledger, Stats
from pnode.base.options import log_stage
from pnode.base.surroundings import Surroundings
from pnode.base.vectors import REAL, is_finite
from pnode.field.held import now
from pnode.field.vectorfield import record_all
from pnode.problems import tolerances
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.row_driver import Rows, RowSweep
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import create
from pnode.solvers.sample_record import Passes, taken_again
from pnode.solvers.sample_steps import SampleSweep
from pnode.solvers.stepping import Step
from pnode.sweeping import row_compilation
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Requests, Run, Sweep
from pnode.sweeping.sameness import refuse_another_end

__all__ = ["PassSweep", "Samples", "forward"]


@dataclass(frozen=True, eq=False)
class Samples:
    """What a solve of independent samples is besides its problem.

    Attributes
    ----------
    clock : Tensor
        Times that steps hit, shape ``(T, B)``, double precision.
    rtol, atol : float or EntrywiseTolerance
        Of all rows.
    declared : tuple of Tensor
        What f has besides what the call brings along.
    """

    clock: torch.Tensor
    rtol: tolerances.Resolved
    atol: tolerances.Resolved
    declared: tuple[torch.Tensor, ...] = ()


def forward(
    engine: Engine, problem: InitialValueProblem, y0: torch.Tensor, keep: bool, requests: Requests
) -> tuple[torch.Tensor, Run]:
    """Integrate; see :func:`pnode.sweeping.sweeps.forward`. Not collective.

    With ``requests.steps`` the states are those at the ends of all steps, in double precision.
    """
    samples, recorded = requests.samples, requests.recorded
    assert samples is not None
    stats, layout = Stats(), problem.layout
    rows = samples.clock.shape[1]
    flat = y0.detach().to(REAL).reshape(rows, -1)
    settings = IntegratorSettings(engine.method, flat.shape[1], layout.dtype)
    run, field = Run(problem, stats, settings), RowsField(problem, stats)
    if keep:
        record_all(field)
        run.surroundings = Surroundings((problem.function, problem.explicit), layout.device)
    sweep = PassSweep(samples, requests.steps)
    if recorded is not None:
        run.surroundings = recorded.surroundings
        found = sweep.take_again(engine, field, flat, recorded.steps, keep)
    else:
        found = sweep.take(engine, run, field, flat, keep, requests)
    run.sweep, run.used = sweep, field.used
    if recorded is not None and recorded.tangents is not None:
        states, *_ = recorded.tangents.pair.parts(found.reshape(len(found), -1))
        refuse_another_end(recorded.tangents.run, states[-1])
    if not requests.steps:
        found = found.to(layout.dtype)
    return found.reshape(len(found), -1).contiguous(), run


class PassSweep(Sweep):
    """Steps of independent samples that were taken.

    Attributes
    ----------
    samples : Samples
        What was solved.
    every : bool
        Whether the ends of all steps are outputs.
    ends : Tensor
        Where these are, shape ``(K + 1, B)``, NaN behind the last of a row.
    """

    interpolated: frozenset[int] = frozenset()

    def __init__(self, samples: Samples, every: bool) -> None:
        self.samples, self.every = samples, every
        self.ends = samples.clock[:1]
        self._passes: Passes | None = None
        self._compiled: RowSweep | None = None
        self._skip = False

    def take(
        self, engine: Engine, run: Run, field: RowsField, flat: torch.Tensor, keep: bool,
        requests: Requests,
    ) -> torch.Tensor:  # fmt: skip
        """Take the steps from states ``(B, n)``; return ``(T, B, n)``, double precision."""
        samples, skip = self.samples, requests.independent == "nan"
        self._skip = skip
        own = Rows(flat, samples.clock, samples.rtol, samples.atol, skip)
        compiled = row_compilation.begin(engine, samples.declared, field, own, requests, keep)
        if compiled is not None:
            found = compiled.forward(run.stats)
            if found is not None:
                self._compiled = compiled
                if keep:
                    run.reads, run.end = Reads(compiled.captured), project(found[-1].reshape(-1))
                return found
            row_compilation.explain_no_room(engine, field.problem, flat, keep)
        method = self._methods(engine, field, run.stats, keep)
        device, seen = flat.device, engine.samples_seen
        rtol, atol = (_by_rows(one, len(flat), device) for one in (samples.rtol, samples.atol))
        layout = field.problem.layout
        sweep = SampleSweep(
            engine.method, method, engine.control, field, samples.clock, field.problem.resolution,
            rtol, atol, self._passes, skip, run.stats, self.every, seen.get(layout, 0),
        )  # fmt: skip
        with log_stage("pnode forward"):
            found = sweep.run(flat.clone())
        seen[layout] = seen.get(layout, 0) + 1
        self.ends = sweep.ends.clone()
        return found

    def take_again(
        self, engine: Engine, field: RowsField, flat: torch.Tensor, steps: Sequence[Any], keep: bool
    ) -> torch.Tensor:
        """Take steps that were taken, of a state and its tangents."""
        method = self._methods(engine, field, field.ledger, keep)
        outputs = flat.new_full((len(self.samples.clock), *flat.shape), math.nan)
        outputs[0] = flat
        with log_stage("pnode forward"):
            taken_again(steps, method, field, flat.clone(), outputs, self._passes)
        return outputs

    def _methods(self, engine: Engine, field: RowsField, ledger: Ledger, keep: bool) -> Any:
        method = create(engine.method, engine.control.step_size is None, field.dtype)
        if keep:
            kept = engine.checkpointing
            limit, whole = kept.bytes or math.inf, kept.store != "solutions"
            self._passes = Passes(method, limit, whole, ledger)
        return method

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the passes, to be taken again with tangents.

        Raises
        ------
        BackwardError
            Where that cannot be.
        """
        if self.every:
            raise BackwardError(
                "second derivatives and tangents of samples='independent' between the ends of "
                "steps (dense=True, at='steps') are not supported: ask for output times without"
            )
        steps: Sequence[Any] = self._passes.passes if self._passes is not None else ()
        if self._compiled is not None:
            steps = self._compiled.passes()
        return steps, ()

    def noted(self, output: int) -> Sequence[float]:
        """Return nothing: passes compare by themselves."""
        return ()

    def field(self, run: Run, ledger: Ledger) -> RowsField:
        """Return the field for another sweep, without checks of what it uses."""
        own = run.problem
        made = RowsField(
            own.but(
                function=now(own.function), explicit=now(own.explicit), check_undeclared=False
            ), ledger,
        )  # fmt: skip
        made.trust(list(run.used))
        record_all(made)
        return made

    def rates(self, run: Run) -> Any:
        """Return what evaluates f at times ``(B,)`` and states ``(B, n)``."""
        if self._compiled is not None:
            return self._compiled.rates
        return self.field(run, run.stats.backward).total_rate

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint of each row's steps. Not collective.

        A failure is remembered by the ranks; the sums of gradients, which follow, tell of it.
        """
        found = run.problem.ranks.attempt(self._reverse, run, cotangents)
        if found is None:
            zero = torch.zeros_like(cotangents[0])
            found = CostGradients(zero, [None] * len(run.problem.parameters), zero)
        result: CostGradients = found
        return result

    def _reverse(self, run: Run, cotangents: torch.Tensor) -> CostGradients:
        own, rows = run.stats.backward, self.samples.clock.shape[1]
        seeds = cotangents.to(REAL).reshape(len(cotangents), rows, -1)
        if self._compiled is not None:
            initial, found = self._compiled.reverse(seeds, own)
        else:
            assert self._passes is not None
            with log_stage("pnode adjoint"):
                initial, found = sample_adjoint(self.field(run, own), self._passes, seeds, own)
        if is_finite(seeds):
            first = float(self.samples.clock[0, 0])
            where = run.settings.method.name, run.problem.direction, Step(0, first, 0.0, first)
            if not self._skip:  # else a row may be NaN, and the others are what they are
                check_state(initial, *where, rows)
            check_parameters(found, *where)
        flow, whole = (one.reshape(-1) for one in (initial, initial + seeds[0]))
        return CostGradients(whole, found, flow)


def _by_rows(
    tolerance: tolerances.Resolved, rows: int, device: torch.device
) -> float | torch.Tensor:
    value = tolerances.values(tolerance, device)
    return value if isinstance(value, float) else value.view(rows, -1)

"""Forward and backward sweeps; no autograd graph here.

A sweep takes an integrator from the engine's pool and gives it back, so solves may nest, and
several forwards may be alive at once: what belongs to one forward lives in its :class:`Run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.tangent_stepper import Moving
from pnode.base.evidence import Reads
from pnode.base.ledger import Stats
from pnode.base.notices import LOG
from pnode.base.surroundings import Surroundings
from pnode.errors import ConfigurationError, FieldChanged, NonlinearSolveFailed
from pnode.field.vectorfield import note_kept, record_all, vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.account import calls
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.fields import compiled_field
from pnode.solvers.compiled.integrator import Start
from pnode.solvers.stepping import Step
from pnode.sweeping import row_sweep
from pnode.sweeping.compilation import begin
from pnode.sweeping.engine import Engine
from pnode.sweeping.hints import hint
from pnode.sweeping.output_times import refuse_cuts
from pnode.sweeping.run import Requests, Run, Sweep
from pnode.sweeping.stepped_sweep import SteppedSweep

__all__ = ["WholeSweep", "backward", "compiled_tangents", "forward"]


def forward(
    engine: Engine,
    problem: InitialValueProblem,
    y0: torch.Tensor,
    keep: bool,
    requests: Requests,
) -> tuple[torch.Tensor, Run]:
    """Integrate. Collective.

    Parameters
    ----------
    engine, problem : Engine, InitialValueProblem
        Method, settings and integrators; what to solve.
    y0 : Tensor
        Flat initial state.
    keep, requests : bool, Requests
        Whether a backward sweep may follow; monitor, dense output, event.

    Returns
    -------
    ys : Tensor
        Shape ``(T, size)``, y0's dtype; fewer rows after an event, whose state is the last.
    run : Run
        For the backward sweep.
    """
    if requests.samples is not None:
        return row_sweep.forward(engine, problem, y0, keep, requests)
    recorded, stats = requests.recorded, Stats()
    if recorded is None:
        engine.look_at_structure(problem, y0, stats)
    settings = engine.settings(problem) if recorded is None else recorded.settings
    run = Run(problem, stats, settings)
    if recorded is not None:
        if recorded.tangents is not None:
            refuse_cuts(recorded.tangents.run)
        run.surroundings = recorded.surroundings
    elif keep or requests.steps:
        run.surroundings = Surroundings(
            (problem.function, problem.explicit), problem.compute or problem.layout.device
        )
    try:
        with problem.ranks.together():
            outputs = _forward(engine, run, y0, keep, requests)
    except (ConfigurationError, NonlinearSolveFailed):
        if recorded is None and engine.forget_structure(settings):
            return forward(engine, problem, y0, keep, requests)
        raise
    if recorded is None:
        engine.note_products(settings, problem.layout, stats)
        hint(engine, run)
    run.ys = outputs.detach() if keep else None
    note_kept(run.stats.ram_bytes + run.stats.tape_bytes)
    run.count(run.stats)
    LOG.debug(
        "%s: forward sweep of %d steps (%d rejected), %d evaluations, %d bytes of checkpoints",
        engine.method.name, stats.steps, stats.rejected, stats.rhs, stats.ram_bytes,
    )  # fmt: skip
    return outputs, run


def _forward(
    engine: Engine, run: Run, y0: torch.Tensor, keep: bool, requests: Requests
) -> torch.Tensor:
    problem = run.problem
    field = vector_field(problem, run.stats)
    if keep:
        record_all(field)
    start: Start | None = None
    found = begin(engine, run, field, y0, keep, requests)
    if found is not None:
        if keep:
            run.reads = Reads(found.captured)
        if found.sweep is not None:
            outputs = found.sweep.forward(run.stats)
            if outputs is not None:
                if found.start is not None:
                    engine.solver_options(run.settings).warn_unused()
                run.sweep, run.used = WholeSweep(found.sweep), field.used
                return outputs
            problem.ranks.least(0)  # which tells of an interrupt
        start, run.codes = found.start, found.codes
        if problem.ranks.parallel and not run.codes:
            start = run.reads = None
        if start is not None:
            run.settings = replace(run.settings, graphs=start.graphs)
        if run.codes:
            used, field = field.used, compiled_field(problem, run.stats, run.codes)
            field.used[:] = used
            if keep:
                record_all(field)
    sweep = SteppedSweep(engine)
    outputs = sweep.forward(run, field, y0, keep, requests, start)
    run.sweep = sweep
    return outputs


def refuse_written(reads: Reads, surroundings: Surroundings, method: str) -> None:
    """Raise :class:`FieldChanged` if what machine code reads was written into. Not collective."""
    changed = reads.changed()
    if changed is not None:
        raise FieldChanged(
            f"a tensor of shape {tuple(changed.shape)} that the vector field uses was written "
            f"into after the forward sweep{surroundings.differences()}: take the gradient "
            "before it changes, or let the solve use a copy",
            method=method,
        )


def backward(
    engine: Engine,
    run: Run,
    y0: torch.Tensor,
    cotangents: torch.Tensor,
    wants_times: bool = True,
) -> CostGradients:
    """Take the discrete adjoint of a forward sweep. Collective.

    Parameters
    ----------
    engine : Engine
        Of the forward sweep.
    run : Run
        The forward sweep.
    y0 : Tensor
        Its initial state, flat, to repeat it from when its checkpoints are gone.
    cotangents : Tensor
        Derivatives of the loss with respect to the outputs, shape ``(T, size)``.
    wants_times : bool
        Whether the derivatives with respect to interpolated outputs' times are wanted.
    """
    with run.lock:
        return _backward(engine, run, y0, cotangents, wants_times)


def _backward(
    engine: Engine, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
) -> CostGradients:
    assert run.surroundings is not None
    if run.reads is not None and not run.problem.ranks.parallel:
        refuse_written(run.reads, run.surroundings, engine.method.name)
    assert run.sweep is not None
    ledger = run.stats.backward
    before, steps, repeated = calls(ledger), ledger.steps, ledger.recomputed
    with run.surroundings.restored():
        found = run.sweep.reverse(run, y0, cotangents, wants_times)
    run.count(ledger, before)
    LOG.debug(
        "%s: backward sweep of %d steps (%d repeated)",
        engine.method.name, ledger.steps - steps, ledger.recomputed - repeated,
    )  # fmt: skip
    return found


def compiled_tangents(
    engine: Engine, run: Run, start: torch.Tensor, moving: Moving
) -> torch.Tensor | None:
    """Return the tangents of a sweep of machine code's outputs, or None if that has none.

    See :meth:`CompiledSweep.tangents`. Not collective.
    """
    if not isinstance(run.sweep, WholeSweep) or run.problem.ranks.parallel:
        return None
    assert run.surroundings is not None and run.reads is not None
    refuse_written(run.reads, run.surroundings, engine.method.name)
    return run.sweep.tangents(run, start, moving)


class WholeSweep(Sweep):
    """A sweep of machine code, from the first step to the last.

    Parameters
    ----------
    compiled : CompiledSweep
        Has been taken.
    """

    interpolated: frozenset[int] = frozenset()

    def __init__(self, compiled: CompiledSweep) -> None:
        self._compiled = compiled

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and how many come before each output."""
        return self._compiled.recorded()

    def noted(self, output: int) -> Sequence[float]:
        """Return nothing: the graph that is differentiated is the one that was evaluated."""
        return ()

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint; see :class:`Sweep`. Collective."""
        ranks, parameters = run.problem.ranks, run.problem.parameters
        if not ranks.parallel:
            return self._reverse(run, cotangents)
        with ranks.together(agree=False):
            found = ranks.attempt(self._checked_reverse, run, cotangents)
        unknown = [None] * len(parameters)  # of a rank that has failed, which this tells
        summed = ranks.sum_gradients(unknown if found is None else found.parameters, parameters)
        return CostGradients(found.state, summed, found.initial)

    def _reverse(self, run: Run, cotangents: torch.Tensor) -> CostGradients:
        return CostGradients(*self._compiled.reverse(cotangents, run.stats.backward))

    def _checked_reverse(self, run: Run, cotangents: torch.Tensor) -> CostGradients:
        """Do as alone, with the check of :func:`backward`, whose failure all ranks are to know."""
        assert run.reads is not None and run.surroundings is not None
        refuse_written(run.reads, run.surroundings, run.settings.method.name)
        return self._reverse(run, cotangents)

    def tangents(self, run: Run, start: torch.Tensor, moving: Moving) -> torch.Tensor | None:
        """Take the steps' tangents; see :meth:`CompiledSweep.tangents`."""
        return self._compiled.tangents(start, moving, run.stats.tangents)

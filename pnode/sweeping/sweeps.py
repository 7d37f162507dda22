"""Forward and backward sweeps; no autograd graph here.

A sweep takes an integrator from the engine's pool and gives it back, so solves may nest, and
several forwards may be alive at once: what belongs to one forward lives in its :class:`Run`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pnode.adjoint.gradients import CostGradients
from pnode.adjoint.tangent_stepper import Moving
from pnode.base.errors import ConfigurationError, NonlinearSolveFailed
from pnode.base.evidence import Reads
from pnode.base.ledger import new_stats
from pnode.base.notices import LOG
from pnode.base.surroundings import Surroundings
from pnode.field.vectorfield import note_kept, record_all, vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.account import calls
from pnode.solvers.compiled.backend import Trace
from pnode.solvers.compiled.fields import compiled_field
from pnode.solvers.compiled.integrator import Start
from pnode.sweeping import row_sweep
from pnode.sweeping.compilation import begin
from pnode.sweeping.culprits import naming
from pnode.sweeping.engine import Engine
from pnode.sweeping.hints import hint
from pnode.sweeping.integral_sweep import IntegralSweep, solves_alone
from pnode.sweeping.output_times import refuse_cuts
from pnode.sweeping.run import Requests, Run
from pnode.sweeping.stepped_sweep import SteppedSweep
from pnode.sweeping.whole_sweep import WholeSweep

__all__ = ["backward", "compiled_tangents", "forward"]


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
    recorded, stats = requests.recorded, new_stats()
    if recorded is None:
        engine.look_at_structure(problem, y0, stats)
    settings = engine.settings(problem) if recorded is None else recorded.settings
    run, known = Run(problem, stats, settings), engine.compiler.known(problem)
    if recorded is not None:
        if recorded.tangents is not None:
            refuse_cuts(recorded.tangents.run)
        run.surroundings = recorded.surroundings
    elif keep or requests.steps:
        device = problem.compute or problem.layout.device
        if known is not None:
            run.standing = known.standing(problem.function, device)
            run.surroundings = run.standing.surroundings()
        else:
            run.surroundings = Surroundings((problem.function, problem.explicit), device)
    try:
        with problem.ranks.together():
            outputs = _forward(engine, run, y0, keep, requests, known)
    except (ConfigurationError, NonlinearSolveFailed):
        if recorded is None and engine.forget_structure(settings):
            return forward(engine, problem, y0, keep, requests)
        raise
    if recorded is None:
        engine.note_products(settings, problem.layout, stats)
        hint(engine, run)
    assert run.sweep is not None
    run.ys = outputs.detach() if keep and run.sweep.at_hand else None
    note_kept(run.stats.ram_bytes + run.stats.tape_bytes)
    run.count(run.stats)
    LOG.debug(
        "%s: forward sweep of %d steps (%d rejected), %d evaluations, %d bytes of checkpoints",
        engine.method.name, stats.steps, stats.rejected, stats.rhs, stats.ram_bytes,
    )  # fmt: skip
    return outputs, run


def _forward(
    engine: Engine, run: Run, y0: torch.Tensor, keep: bool, requests: Requests,
    known: Trace | None = None,
) -> torch.Tensor:  # fmt: skip
    problem = run.problem
    field = vector_field(problem, run.stats)
    field.known = known
    if keep:
        record_all(field)
    start: Start | None = None
    found = begin(engine, run, field, y0, keep, requests)
    if found is not None:
        if keep:
            run.reads, run.graphs = Reads(found.captured), found.graphs
        if found.sweep is not None:
            sweep = WholeSweep(found.sweep, engine)
            whole = sweep.forward(run, field, y0, keep, requests)
            if whole is not None:
                if found.start is not None or found.sweep.inside is not None:
                    engine.solver_options(run.settings).warn_unused()
                run.sweep, run.used = sweep, field.used
                found.note()
                return whole
            problem.ranks.least(0)  # which tells of an interrupt
            LOG.info(
                "%s: a compiled sweep gave up, since %s; the steps are taken one by one",
                engine.method.name, found.sweep.end,
            )  # fmt: skip
            if found.sweep.shown is not None:
                requests = replace(requests, shown=found.sweep.shown.number)
        start, run.codes = found.start, found.codes
        if problem.ranks.parallel and not run.codes:
            start, run.reads, run.graphs = None, None, ()
        if start is not None:
            run.settings = replace(run.settings, graphs=start.graphs)
        if run.codes:
            used, field = field.used, compiled_field(problem, run.stats, run.codes)
            field.used[:] = used
            if keep:
                record_all(field)
    if start is None and not run.codes and solves_alone(engine, run, requests):
        alone = IntegralSweep(engine)
        outputs = alone.forward(run, y0, keep, requests)
        run.sweep = alone
        return outputs
    stepped = SteppedSweep(engine)
    with naming(field, y0):
        outputs = stepped.forward(run, field, y0, keep, requests, start)
    run.sweep = stepped
    if found is not None and found.sweep is not None:
        found.note(found.sweep.end)
    return outputs


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
    if not run.problem.ranks.parallel:  # else all ranks are to know of it
        run.refuse_written()
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
    run.refuse_written()
    return run.sweep.tangents(run, start, moving)

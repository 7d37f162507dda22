"""What of a solve is compiled, and the sweeps that are compiled as a whole.

See docs/compile.md: steps of explicit methods, taken by a driver or from Python; whole sweeps of
implicit methods; and for everything else the vector field alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pnode.adjoint.compiled import CompiledAdjoint
from pnode.adjoint.gradients import CostGradients
from pnode.checkpointing import Checkpointing
from pnode.engine import Engine
from pnode.evidence import Reads
from pnode.options import log_stage
from pnode.run import Requests, Run
from pnode.solvers.compiled import CompiledIntegrator, Start, Tape
from pnode.solvers.compiled_fields import compiled_field
from pnode.solvers.explicit_driver import DrivenSweep, driver_of
from pnode.solvers.step_control import automatic_step, fixed_grid
from pnode.vectorfield import VectorField
from pnode.vectors import REAL

__all__ = ["Begun", "begin", "reverse"]


@dataclass(frozen=True)
class Begun:
    """How far a compiled solve has come.

    Attributes
    ----------
    field : VectorField
        With which to go on.
    outputs : Tensor or None
        The outputs, shape ``(T, size)``, if the whole sweep is done.
    start : Start or None
        The compiled steps, to be taken one by one.
    """

    field: VectorField
    outputs: torch.Tensor | None = None
    start: Start | None = None


def begin(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
) -> Begun:
    """Compile what can be compiled of a solve, and take the sweep if all of it can."""
    begun = _begin(engine, run, field_, y0, keep, requests)
    if keep:
        run.reads = Reads(_reads(run, begun))
    return begun


def _reads(run: Run, begun: Begun) -> Iterator[torch.Tensor]:
    """Yield what the compiled graphs of a solve read."""
    if run.sweep is not None:
        yield from run.sweep.captured
    if run.driven is not None:
        yield from run.driven.driver.graphs.field_graph.captured
    if run.settings.graphs is not None:
        yield from run.settings.graphs.field_graph.captured
    for code in run.codes:
        yield from code.traced.captured


def _begin(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
) -> Begun:
    problem = run.problem
    if len(problem.times) < 2 or problem.ranks.parallel or engine.exchange is not None:
        return Begun(field_)
    if not (run.settings.place.on_host and problem.compute is None):
        engine.compiled_fields.warn("y0 is on a device, for which nothing is compiled yet")
        return Begun(field_)
    if engine.method.implicit:
        outputs = _implicit_sweep(engine, run, field_, y0, keep, requests)
        # After a failure without the compiler, for the error.
        done = outputs is not None or engine.implicit_sweeps.begun
        return Begun(field_ if done else _compiled_field(engine, run, field_, y0, keep), outputs)
    start = _compiled_steps(engine, run, field_, y0, keep, requests)
    if start is None:
        return Begun(_compiled_field(engine, run, field_, y0, keep))
    plain = _is_plain(engine, run, requests, keep)
    outputs = _drive(engine, run, field_, y0, keep, start) if plain else None
    if outputs is not None:
        return Begun(field_, outputs)
    run.settings = replace(run.settings, graphs=start.graphs)
    if plain and engine.control.step_size is not None:
        return Begun(field_, _sweep(engine, run, field_, y0, keep, start))
    return Begun(field_, start=start)


def reverse(engine: Engine, run: Run, y0: torch.Tensor, cotangents: torch.Tensor) -> CostGradients:
    """Take the adjoint of a sweep that was compiled as a whole; see ``sweeps.backward``."""
    if run.sweep is not None:
        return _reverse_implicit(run, cotangents)
    if run.driven is not None:
        return _reverse_driven(run, run.driven, cotangents)
    return _reverse_sweep(engine, run, y0, cotangents)


def _is_plain(engine: Engine, run: Run, requests: Requests, keep: bool) -> bool:
    """Whether a sweep of compiled steps has nothing to do between them but to go on."""
    control, chosen = engine.control, engine.checkpointing
    if requests.dense or requests.event_fn is not None:
        return False
    if keep and (chosen.bytes is not None or chosen.disk is not None):
        return False
    if keep and (chosen.store == "solutions" or chosen.resume or chosen.reproducible):
        return False
    options = engine.solver_options(run.settings).values
    if requests.monitor is not None or any(name.startswith("ts_monitor") for name in options):
        return False
    limit = control.max_steps
    grid = fixed_grid(run.problem.times, control, run.problem.resolution)
    return limit is None or grid is None or grid.total <= limit


def _drive(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, start: Start
) -> torch.Tensor | None:
    """Take all compiled steps at once, if that is possible and they succeed."""
    problem, control, settings = run.problem, engine.control, run.settings
    graphs, options = start.graphs, engine.solver_options(settings)

    def longest() -> float:
        with engine.integrator(replace(settings, graphs=graphs), field_, y0) as integrator:
            assert isinstance(integrator, CompiledIntegrator)
            return integrator.longest

    driver = driver_of(graphs, start.tolerances, keep, engine.method.order, longest)
    if driver is None:
        return None
    log_stage("pnode forward").push()
    try:
        first = control.first_step or 0.0
        if settings.adaptive and not first:
            (begin, end), order = problem.times[:2], engine.method.order
            first = automatic_step(
                field_, y0.detach(), settings, order, begin, end, control, start.value
            )
        state = y0.detach().to(REAL, copy=True)
        given = (state, start.slope, start.saved)
        sweep = driver.sweep(problem, control, first, given)
        outputs = sweep.forward(start.inputs)
    finally:
        log_stage("pnode forward").pop()
    options.warn_unused()
    if outputs is None:
        return None
    run.stats.steps, run.stats.rejected = sweep.steps, sweep.rejected
    run.stats.rhs += (sweep.steps + sweep.rejected) * graphs.evaluations
    run.used = field_.used
    if keep:
        run.driven = sweep
        run.stats.ram_bytes = max(run.stats.ram_bytes, sweep.bytes)
    return outputs


def _sweep(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, start: Start | None
) -> torch.Tensor:
    """Take fixed compiled steps to the last output."""
    problem, layout = run.problem, run.problem.layout
    grid = fixed_grid(problem.times, engine.control, problem.resolution)
    assert grid is not None
    ys = torch.empty((len(problem.times), layout.size), dtype=layout.dtype)
    tape = Tape() if keep else None
    with engine.integrator(run.settings, field_, y0) as integrator:
        assert isinstance(integrator, CompiledIntegrator)
        if start is not None:
            integrator.know_slope(start)
        steps = integrator.sweep(grid, ys, tape)
        integrator.options.warn_unused()
    if tape is not None:
        run.tape = tape
        run.stats.ram_bytes = max(run.stats.ram_bytes, tape.bytes)
    if start is not None:
        run.stats.steps += steps
        run.used = field_.used
    else:
        run.stats.backward.recomputed += steps
    return ys


def _implicit_sweep(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
) -> torch.Tensor | None:
    """Take all steps of an implicit method at once, if that is possible and they succeed."""
    chosen, unusual = engine.checkpointing, None
    if requests.dense or requests.event_fn is not None or requests.monitor is not None:
        unusual = "dense=True, events and monitors look at single steps of implicit methods"
    elif keep and chosen != Checkpointing():
        unusual = "of implicit methods all steps are kept: drop checkpointing"
    options = engine.solver_options(run.settings)
    control, problem = engine.control, run.problem
    sweep = engine.implicit_sweeps.begin(field_, y0, run.settings, options, control, unusual)
    if sweep is None:
        return None
    grid = fixed_grid(problem.times, control, problem.resolution)
    counts = None if grid is None else grid.counts
    outputs = sweep.forward(problem.times, counts, y0, keep, run.stats)
    if outputs is not None:
        run.sweep, run.used = sweep, field_.used
    return outputs


def _reverse_implicit(run: Run, cotangents: torch.Tensor) -> CostGradients:
    """Take the adjoint of :func:`_implicit_sweep`; see :func:`reverse`."""
    assert run.sweep is not None
    nonzero = cotangents.ne(0).any(dim=1).tolist()
    number = len(run.problem.parameters)
    initial, parameters = run.sweep.reverse(cotangents, nonzero, number, run.stats.backward)
    return CostGradients(initial + cotangents[0], parameters, initial)


def _reverse_driven(run: Run, sweep: DrivenSweep, cotangents: torch.Tensor) -> CostGradients:
    """Take the adjoint of :func:`_drive`; see :func:`reverse`."""
    ledger, nonzero = run.stats.backward, cotangents.ne(0).any(dim=1).tolist()
    log_stage("pnode adjoint").push()
    try:
        if not sweep.whole:  # freed by a backward sweep before
            sweep.repeat()
            ledger.recomputed += sweep.steps
            ledger.rhs += sweep.steps * sweep.driver.graphs.evaluations
        initial, sums = sweep.reverse(cotangents, nonzero, ledger)
    finally:
        log_stage("pnode adjoint").pop()
    parameters: list[torch.Tensor | None] = [None] * len(run.problem.parameters)
    if sums:
        for index, gradient in sweep.driver.graphs.gradients(sums):
            parameters[index] = gradient
    return CostGradients(initial + cotangents[0], parameters, initial)


def _reverse_sweep(
    engine: Engine, run: Run, y0: torch.Tensor, cotangents: torch.Tensor
) -> CostGradients:
    """Take the adjoint of :func:`_sweep`; see :func:`reverse`."""
    ledger = run.stats.backward
    field_ = run.field(ledger)
    assert run.tape is not None
    if len(run.tape.steps) < run.tape.outputs[-1]:  # freed by a backward sweep before
        _sweep(engine, run, field_, y0, True, None)
    nonzero = cotangents.ne(0).any(dim=1).tolist()
    with engine.adjoint(run.settings, bool(field_.parameters)) as adjoint:
        assert isinstance(adjoint, CompiledAdjoint)
        adjoint.begin(field_)
        adjoint.reverse(run.tape, cotangents, nonzero, ledger)
        initial = adjoint.state_gradient()
        if nonzero[0]:
            adjoint.add(cotangents[0])
        parameters = adjoint.parameter_gradients(len(field_.parameters))
        return CostGradients(adjoint.state_gradient(), parameters, initial)


def _compiled_steps(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
) -> Start | None:
    """Choose compiled steps for a run, if there are any."""
    chosen = engine.checkpointing
    free = chosen.bytes is None and chosen.disk is None and chosen.store in ("auto", "tape")
    return engine.explicit_steps.start(
        field_, y0, run.settings, engine.solver_options(run.settings),
        tape=keep and free and not requests.dense,
    )  # fmt: skip


def _compiled_field(
    engine: Engine, run: Run, field_: VectorField, y0: torch.Tensor, keep: bool
) -> VectorField:
    """Return the field with compiled evaluations and products, if that is possible."""
    if not engine.method.implicit and engine.explicit_steps.field_fails:
        engine.compiled_fields.warn(engine.explicit_steps.reason)
        return field_
    why = (engine.implicit_sweeps if engine.method.implicit else engine.explicit_steps).reason
    run.codes = engine.compiled_fields.begin(field_, y0, run.settings, keep, why)
    if not run.codes:
        return field_
    compiled = compiled_field(run.problem, run.stats, run.codes)
    compiled.used[:] = field_.used
    return compiled

"""Independent samples: every row of y0 is a problem of its own, with its own steps and times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from threading import RLock
from typing import Any

import torch

from pnode.adjoint.sample_adjoint import sample_adjoint
from pnode.base.evidence import Reads
from pnode.base.ledger import Stats
from pnode.base.options import OWN_PREFIX, SolverOptions
from pnode.base.ranks import ALONE
from pnode.base.surroundings import Surroundings
from pnode.base.transforms import (
    differentiable,
    is_legacy_batch,
    outside_inference,
    refuse_moving,
    refuse_transforms,
)
from pnode.base.vectors import REAL
from pnode.derivatives.batches import as_parameter
from pnode.errors import BackwardError, CheckpointError, ConfigurationError
from pnode.field.vectorfield import record_all
from pnode.field.watching import watched
from pnode.problems import arguments, tolerances
from pnode.problems.calls import Call
from pnode.problems.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.problems.user_state import RowParts
from pnode.solutions.solution import Solution
from pnode.solvers.compiled.backend import Wanted
from pnode.solvers.compiled.row_driver import Rows
from pnode.solvers.compiled.row_sweeps import compiled_rows
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import create
from pnode.solvers.sample_record import Passes
from pnode.solvers.sample_steps import SampleSweep
from pnode.sweeping.sweeps import refuse_written

__all__ = ["solve"]


def solve(solver: Any, y0: Any, t: Any, args: Any) -> Solution:
    """Solve each row of y0 by itself; see :meth:`Solver.forward`. Not collective.

    Raises
    ------
    ConfigurationError
        For unusable arguments, and for what independent samples do not go with.
    SolveError
        Naming the row that failed.
    """
    engine = solver._engine
    _refuse_unsupported(solver)
    call = Call.of(y0, args, ALONE, None, None, engine.jacobian_options)
    declared = collect_parameters(solver._functions, (*(solver._params or ()), *call.tensors))
    named = [("y0", y0), ("t", t), *(("a parameter", one) for one in declared)]
    refuse_transforms(named[:2], declared)
    refuse_moving(named, "and samples='independent' has derivatives in reverse mode alone")
    inside = call.state(y0)
    whole = StateLayout.of(inside, call.pairs)  # looks at each tensor
    call = call.by_rows(inside)
    y0 = call.state(y0)
    layout = StateLayout.of(y0, call.pairs)
    if y0.device.type != "cpu" and solver._device_state == "host":
        raise ConfigurationError(
            "device_state='host' with samples='independent' is not supported: drop it"
        )
    times, resolution = _times(t, len(y0))
    differentiate = torch.is_grad_enabled()
    wanted = tuple(one for one in declared if differentiate and one.requires_grad)
    problem = InitialValueProblem(
        call.function(watched(solver.rhs, declared)), layout, (0.0, 1.0), 1.0, wanted,
        tuple(one for one in declared if not one.requires_grad), differentiate,
        resolution=resolution,
    )  # fmt: skip
    stats = Stats()
    arguments.refuse_inference(declared, engine.method)
    with outside_inference(differentiate):
        y0, times = (x.clone() if x.is_inference() else x for x in (y0, times))
        ys = _SolveFunction.apply(
            solver, problem, solver._requests, stats, _tolerance(engine.control, whole, call), y0,
            times, *wanted,
        )  # fmt: skip
    return Solution(times, call.restored(ys), stats)


def _refuse_unsupported(solver: Any) -> None:
    engine = solver._engine
    if engine.comm.size > 1:
        raise ConfigurationError(
            f"comm has {engine.comm.size} ranks: with samples='independent' samples share nothing; "
            "give each rank a solver of its own without comm="
        )
    if engine.setup is not None:
        raise ConfigurationError(
            "petsc_setup= with samples='independent' has no effect, its steps are not PETSc's: "
            "drop it"
        )
    if engine.petsc_options:
        raise ConfigurationError(
            f"petsc_options={engine.petsc_options!r} with samples='independent' has no effect, its "
            "steps are not PETSc's: drop it"
        )
    if tolerances.is_partial(engine.control.atol):
        raise ConfigurationError(
            "atol has infinite entries, which samples='independent' does not support: give finite "
            "ones"
        )


def _tolerance(
    control: Any, layout: StateLayout, call: Call
) -> tuple[tolerances.Resolved, tolerances.Resolved]:
    """Return rtol and atol of the entries inside, for those of the tensors that make up y0."""
    found = tolerances.resolve(control.rtol, control.atol, layout)
    if not layout.is_tuple:
        return found
    assert isinstance(call.structure, RowParts)
    join = replace(call.structure, inner=None).lower

    def joined(one: tolerances.Resolved) -> tolerances.Resolved:
        if isinstance(one, float):
            return one
        return tolerances.EntrywiseTolerance.of(join(layout.unflatten(one.tensor())).reshape(-1))

    return joined(found[0]), joined(found[1])


def _times(t: Any, rows: int) -> tuple[torch.Tensor, float]:
    """Return output times, shape ``(T, B)``, and the relative spacing of their numbers."""
    if not isinstance(t, torch.Tensor):
        try:
            t = torch.as_tensor(t, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            t = as_times(t)
    if t.dim() not in (1, 2) or (t.dim() == 2 and len(t) != rows):
        raise ConfigurationError(
            f"t has shape {tuple(t.shape)}: with samples='independent' give output times of shape "
            f"(T,), or (B, T) = ({rows}, T) for times of each row's own"
        )
    as_times(t.reshape(-1))
    resolution = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
    times = t.t() if t.dim() == 2 else t[:, None].expand(-1, rows)
    ahead = times.detach().to(REAL).diff(dim=0)
    wrong = (ahead.sign() != ahead[:1].sign()) | (ahead.abs() < 1e-200) | ~ahead.isfinite()
    if bool(wrong.any()):
        index, row = wrong.nonzero()[0].tolist()
        raise ConfigurationError(
            f"t[{index + 1}] = {float(times[index + 1, row])!r} follows t[{index}] = "
            f"{float(times[index, row])!r} in row {row}: output times must strictly increase or "
            "strictly decrease"
        )
    return times, resolution


class _SolveFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, times, *parameters) -> ys."""

    @staticmethod
    def forward(
        ctx: Any, solver: Any, problem: InitialValueProblem, requests: Any, stats: Stats,
        tolerance: tuple[tolerances.Resolved, tolerances.Resolved], y0: torch.Tensor,
        times: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Solve."""
        engine = solver._engine
        control, method, layout = engine.control, engine.method, problem.layout
        keep = problem.check_undeclared and any(ctx.needs_input_grad)
        field = RowsField(problem, stats)
        if keep:
            record_all(field)
            ctx.surroundings = Surroundings([problem.function], layout.device)
        flat = y0.detach().to(REAL).reshape(len(y0), -1)
        clock, skip = times.detach().to(layout.device, REAL), requests.independent == "nan"
        ctx.method, ctx.passes, ctx.compiled, read = method.name, None, None, ()
        if engine.compile is True:
            rows, wanted = Rows(flat, clock, *tolerance, skip), _wanted(engine, problem, flat, keep)
            own = collect_parameters(solver._functions, solver._params)
            ctx.compiled = compiled_rows(engine.row_compiler, field, rows, wanted, own)
        found = None
        if ctx.compiled is not None:
            found, read = ctx.compiled.forward(stats), ctx.compiled.captured
            ctx.reads = Reads(read) if keep else None
        if found is None:
            if ctx.compiled is not None:
                _explain_no_room(engine, wanted)
                ctx.compiled, read = None, ()
            rows_method = create(method, control.step_size is None, layout.dtype)
            if keep:
                own = engine.checkpointing
                limit, whole = own.bytes or math.inf, own.store != "solutions"
                ctx.passes = Passes(rows_method, limit, whole, stats)
            found = SampleSweep(
                method, rows_method, control, field, clock, problem.resolution,
                _by_rows(tolerance[0], flat), _by_rows(tolerance[1], flat), ctx.passes, skip, stats,
            ).run(flat.clone())  # fmt: skip
        ys = found.to(layout.dtype).reshape(len(times), *y0.shape)
        ctx.problem, ctx.used, ctx.stats, ctx.lock = problem, field.used, stats, RLock()
        ctx.save_for_backward(y0, times, ys, *parameters, *problem.frozen, *read)
        return ys

    @staticmethod
    def backward(ctx: Any, cotangents: torch.Tensor) -> Any:
        """Take the discrete adjoint of each row's steps."""
        if is_legacy_batch(cotangents):
            raise BackwardError(
                "a batch of cotangents (vectorize=True, is_grads_batched) cannot pass through a "
                "solve with samples='independent': take a loop"
            )
        if differentiable():
            raise BackwardError(
                "second derivatives of a solve with samples='independent' are not supported: take "
                "samples='joint' for them"
            )
        _, times, ys, *_ = ctx.saved_tensors
        with ctx.lock:  # sweeps of several threads would share cotangents
            return _backward(ctx, times, ys, cotangents)


def _backward(ctx: Any, times: torch.Tensor, ys: torch.Tensor, cotangents: torch.Tensor) -> Any:
    own = ctx.stats.backward
    field = RowsField(ctx.problem, own)
    field.trust(list(ctx.used))
    record_all(field)
    number, rows = times.shape
    seeds = cotangents.to(REAL).reshape(number, rows, -1)
    if ctx.compiled is not None:
        refuse_written(ctx.reads, ctx.surroundings, ctx.method)
    with ctx.surroundings.restored():
        if ctx.compiled is not None:
            initial, found = ctx.compiled.reverse(seeds, own)
        else:
            initial, found = sample_adjoint(field, ctx.passes, seeds, own)
        by_times = None
        if ctx.needs_input_grad[6]:
            rate = field.rate if ctx.compiled is None else ctx.compiled.rates
            by_times = _by_times(rate, times, ys.reshape(number, rows, -1), seeds, initial)
    gradients = [
        as_parameter(one, parameter, used)
        for one, parameter, used in zip(found, field.parameters, field.used, strict=True)
    ]
    state = (initial + seeds[0]).view(ys.shape[1:]).to(ys.dtype)
    return None, None, None, None, None, state, by_times, *gradients


def _explain_no_room(engine: Any, wanted: Wanted) -> None:
    """Warn, once, that the steps are taken once more, within a limit of memory.

    Raises
    ------
    CheckpointError
        If there are no other steps.
    """
    method, limit = engine.method, engine.checkpointing.bytes
    text = f"the limit of {limit} bytes does not hold the steps of all samples"
    if wanted.needed:
        raise CheckpointError(
            f"checkpointing=: {text}, and method={method.name!r} with samples='independent' "
            "repeats none: raise memory, or solve fewer samples at once"
        )
    engine.row_compiler.explain(wanted, [f"checkpointing=: {text}, and machine code repeats none"])


@cache
def _options(settings: IntegratorSettings) -> SolverOptions:
    """Return pnode's own options: nobody else's reach steps that are not PETSc's."""
    defaults = default_options(
        settings.method, settings.adaptive, settings.jacobian, settings.dtype, False,
        settings.controller,
    )  # fmt: skip
    return SolverOptions(OWN_PREFIX, None, defaults)


def _wanted(engine: Any, problem: InitialValueProblem, flat: torch.Tensor, keep: bool) -> Wanted:
    """Return the solve of one row, for the compiler."""
    control, method = engine.control, engine.method
    settings = IntegratorSettings(
        method, flat.shape[1], problem.layout.dtype, adaptive=control.step_size is None,
        max_step=control.max_step, controller=control.controller,
    )  # fmt: skip
    needed = f"method={method.name!r} with samples='independent' is machine code alone, and f"
    return Wanted(
        settings, _options(replace(settings, size=1, max_step=math.inf)), control,
        engine.checkpointing, keep, False, False, engine.integrator,
        needed=needed if method.multistep or method.coupled else "",
    )  # fmt: skip


def _by_rows(tolerance: tolerances.Resolved, flat: torch.Tensor) -> float | torch.Tensor:
    value = tolerances.values(tolerance, flat.device)
    return value if isinstance(value, float) else value.view_as(flat)


def _by_times(
    rate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], times: torch.Tensor,
    ys: torch.Tensor, seeds: torch.Tensor, initial: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return derivatives by the output times, shape ``(T, B)``: along the exact flow."""
    terms = []
    for index, (when, y) in enumerate(zip(times, ys, strict=True)):
        reached = ~y.isnan().any(dim=1, keepdim=True)
        state = torch.where(reached, y, ys[0])
        slope = rate(when.to(y.device, REAL), state.to(REAL))
        seed = -initial if index == 0 else seeds[index]
        terms.append(torch.where(reached, seed * slope, 0.0).sum(dim=1))
    return torch.stack(terms).to(times)

"""Independent samples: every row of y0 is a problem of its own, with its own steps and times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any, TypeAlias

import torch

from pnode.adjoint.sample_adjoint import sample_adjoint
from pnode.base.evidence import Reads
from pnode.base.ledger import Stats
from pnode.base.options import log_stage
from pnode.base.rank_sums import of_all_ranks
from pnode.base.ranks import Ranks
from pnode.base.surroundings import Surroundings
from pnode.base.transforms import (
    outside_inference,
    refuse_moving,
    refuse_transforms,
)
from pnode.base.vectors import REAL
from pnode.derivatives.batches import as_parameter
from pnode.derivatives.row_slopes import refuse_further
from pnode.errors import ConfigurationError
from pnode.field.vectorfield import record_all
from pnode.field.watching import watched
from pnode.problems import arguments, tolerances
from pnode.problems.calls import Call
from pnode.problems.compared import agreed
from pnode.problems.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.problems.user_state import RowParts
from pnode.sample_path import SamplePath
from pnode.solutions.solution import Solution
from pnode.solvers.compiled.row_driver import Rows
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import create
from pnode.solvers.sample_record import Passes
from pnode.solvers.sample_steps import SampleSweep
from pnode.sweeping import row_compilation
from pnode.sweeping.integrals import with_row_integrals
from pnode.sweeping.run import Requests
from pnode.sweeping.whole_sweep import refuse_written

__all__ = ["solve"]

#: rtol and atol of the entries inside.
_Tolerance: TypeAlias = tuple[tolerances.Resolved, tolerances.Resolved]


def solve(solver: Any, y0: Any, t: Any, args: Any, at: str) -> Solution:
    """Solve each row of y0 by itself; see :meth:`Solver.forward`. Collective.

    Raises
    ------
    ConfigurationError
        For unusable arguments, and for what independent samples do not go with.
    SolveError
        Naming the row that failed, and its rank.
    """
    _refuse_unsupported(solver)
    engine, differentiate = solver._engine, torch.is_grad_enabled()
    ranks, stats = Ranks(engine.comm), Stats()
    prepared = ranks.attempt(_prepare, solver, y0, t, args, ranks, differentiate)
    if ranks.parallel:
        prepared = agreed(ranks, solver._shared, prepared, differentiate)
    problem, y0, times, call, costs, tolerance = prepared
    requests, restored = solver._requests, partial(_restored, problem, call, costs)
    if requests.dense or at == "steps":
        requests = replace(requests, steps=True)
    with outside_inference(differentiate), ranks.together():
        solved = ranks.attempt(
            _solve, solver, problem, requests, stats, tolerance, y0, times, restored, at
        )
    ts, ys, path = solved
    states, integrals = restored(ys)
    return Solution(ts, states, stats, costs=integrals, path=path if requests.dense else None)


def _solve(
    solver: Any, problem: InitialValueProblem, requests: Requests, stats: Stats,
    tolerance: _Tolerance, y0: torch.Tensor, times: torch.Tensor,
    restored: Callable[[torch.Tensor], tuple[Any, Any]], at: str,
) -> tuple[torch.Tensor, torch.Tensor, SamplePath | None]:  # fmt: skip
    """Return output times, states inside, and what may be asked for more. Not collective."""
    y0, times = (x.clone() if x.is_inference() else x for x in (y0, times))
    own, common = ((y0,), (times,)) if problem.times else ((y0, times), ())
    y0, times, *parameters = of_all_ranks(problem.ranks, own, (*common, *problem.parameters))
    times = times.expand(-1, len(y0))
    hit = times[[0, -1]] if requests.dense and len(times) > 1 else times
    ys, ends = _SolveFunction.apply(
        solver, problem, requests, stats, tolerance, y0, hit, *parameters
    )
    if not requests.steps:
        return times, ys, None
    shape = problem.layout.shapes[0]
    path = SamplePath(
        problem, solver._engine.method, stats, times, ends, ys, y0, parameters,
        lambda y: restored(y.reshape(*y.shape[:-2], *shape))[0],
    )  # fmt: skip
    if requests.dense:
        path.keep()
    ts, found = path.at_steps() if at == "steps" else (times, path.outputs())
    return ts, found.to(problem.layout.dtype).reshape(len(found), *shape), path


def _restored(
    problem: InitialValueProblem, call: Call, costs: torch.Size | None, ys: torch.Tensor
) -> tuple[Any, torch.Tensor | None]:
    """Return the user's states and integrals of states inside, shaped ``(..., *layout)``."""
    if costs is None:
        return call.restored(ys), None
    assert problem.base is not None
    parts = ys.split((ys.shape[-1] - costs.numel(), costs.numel()), dim=-1)
    states, integrals = (
        part.reshape(*ys.shape[:-1], *one)
        for part, one in zip(parts, (problem.base.layout.shapes[0][1:], costs), strict=True)
    )
    return call.restored(states), integrals


def _prepare(
    solver: Any, y0: Any, t: Any, args: Any, ranks: Ranks, differentiate: bool
) -> tuple[InitialValueProblem, torch.Tensor, torch.Tensor, Call, torch.Size | None, _Tolerance]:
    """Return the problem, where it starts, and what else is to be known of it. Not collective.

    The times, shape ``(T, B)`` or ``(T, 1)``, the call, the shape of a row's integrals, rtol and
    atol.
    """
    engine = solver._engine
    call = Call.of(y0, args, ranks, None, None, engine.jacobian_options)
    declared = collect_parameters(solver._functions, (*(solver._params or ()), *call.tensors))
    named = [("y0", y0), ("t", t), *(("a parameter", one) for one in declared)]
    refuse_transforms(named[:2], declared)
    refuse_moving(named, "and samples='independent' has derivatives in reverse mode alone")
    inside = call.state(y0)
    whole = StateLayout.of(inside, call.pairs)  # looks at each tensor
    call = call.by_rows(inside)
    y0 = call.state(y0)
    layout = StateLayout.of(y0, call.pairs)
    tolerance = _tolerance(engine.control, whole, call)
    if y0.device.type != "cpu" and solver._device_state == "host":
        raise ConfigurationError(
            "device_state='host' with samples='independent' is not supported: drop it"
        )
    times, resolution, alike = _times(t, len(y0))
    problem = InitialValueProblem(
        call.function(watched(solver._functions[0], declared)), layout, alike, 1.0,
        tuple(one for one in declared if differentiate and one.requires_grad),
        tuple(one for one in declared if not one.requires_grad), differentiate,
        explicit=call.function(watched(solver.explicit, declared)), form=solver._form,
        ranks=ranks, resolution=resolution,
    )  # fmt: skip
    arguments.refuse_inference(declared, engine.method)
    if solver.cost is None:
        return problem, y0, times, call, None, tolerance
    cost, first = call.observer(watched(solver.cost, declared)), times[0].expand(len(y0))
    problem, y0, shape = with_row_integrals(problem, cost, y0, first)
    return problem, y0, times, call, shape, tolerance


def _refuse_unsupported(solver: Any) -> None:
    engine = solver._engine
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


def _tolerance(control: Any, layout: StateLayout, call: Call) -> _Tolerance:
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


def _times(t: Any, rows: int) -> tuple[torch.Tensor, float, tuple[float, ...]]:
    """Return output times, shape ``(T, B)`` or ``(T, 1)``, and what is to be known of them.

    The relative spacing of their numbers; those that all rows share, none where each has its own.
    """
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
    times = t.t() if t.dim() == 2 else t[:, None]
    ahead = times.detach().to(REAL).diff(dim=0)
    wrong = (ahead.sign() != ahead[:1].sign()) | (ahead.abs() < 1e-200) | ~ahead.isfinite()
    if bool(wrong.any()):
        index, row = wrong.nonzero()[0].tolist()
        raise ConfigurationError(
            f"t[{index + 1}] = {float(times[index + 1, row])!r} follows t[{index}] = "
            f"{float(times[index, row])!r} in row {row}: output times must strictly increase or "
            "strictly decrease"
        )
    return times, resolution, tuple(times[:, 0].tolist()) if t.dim() == 1 else ()


class _SolveFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, times, *parameters) -> ys.

    If the steps are wanted: the states at the ends of all, shape ``(K + 1, B, n)``, double
    precision, and these, ``(K + 1, B)``; derivatives by times are those by the first then.
    """

    @staticmethod
    def forward(
        ctx: Any, solver: Any, problem: InitialValueProblem, requests: Any, stats: Stats,
        tolerance: _Tolerance, y0: torch.Tensor, times: torch.Tensor, *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Solve."""
        engine = solver._engine
        control, method, layout = engine.control, engine.method, problem.layout
        keep = problem.check_undeclared and any(ctx.needs_input_grad)
        field = RowsField(problem, stats)
        if keep:
            record_all(field)
            functions = [problem.function, problem.explicit]
            ctx.surroundings = Surroundings(functions, layout.device)
        flat = y0.detach().to(REAL).reshape(len(y0), -1)
        clock, skip = times.detach().to(layout.device, REAL), requests.independent == "nan"
        ctx.method, ctx.passes, read = method.name, None, ()
        ctx.compiled = row_compilation.begin(
            solver, field, Rows(flat, clock, *tolerance, skip), requests, keep
        )
        found = None
        if ctx.compiled is not None:
            found, read = ctx.compiled.forward(stats), ctx.compiled.captured
            if found is None:
                row_compilation.explain_no_room(engine, problem, flat, keep)
                ctx.compiled, read = None, ()
            ctx.reads = Reads(read) if keep else None
        if found is None:
            rows_method = create(method, control.step_size is None, layout.dtype)
            if keep:
                kept = engine.checkpointing
                limit, whole = kept.bytes or math.inf, kept.store != "solutions"
                ctx.passes = Passes(rows_method, limit, whole, stats)
            rtol, atol = (_by_rows(one, len(flat), layout.device) for one in tolerance)
            sweep = SampleSweep(
                method, rows_method, control, field, clock, problem.resolution,
                rtol, atol, ctx.passes, skip,
                stats, requests.steps,
            )  # fmt: skip
            with log_stage("pnode forward"):
                found = sweep.run(flat.clone())
        if requests.steps:
            ys, ends = found, sweep.ends.clone()
            ctx.mark_non_differentiable(ends)
        else:
            ys, ends = found.to(layout.dtype).reshape(len(times), *y0.shape), None
        ctx.problem, ctx.used, ctx.stats, ctx.steps = problem, field.used, stats, requests.steps
        ctx.lock = RLock()  # sweeps of several threads would share cotangents
        ctx.save_for_backward(y0, times, ys, *parameters, *problem.frozen, *read)
        return ys, ends

    @staticmethod
    def backward(ctx: Any, cotangents: torch.Tensor, _: Any) -> Any:
        """Take the discrete adjoint of each row's steps."""
        refuse_further(cotangents)
        with ctx.lock:
            found = ctx.problem.ranks.attempt(_reverse, ctx, cotangents)
        if found is None:  # the sums over the ranks, which follow, tell all of it
            found = [None] * (len(ctx.needs_input_grad) - 5)
        return None, None, None, None, None, *found


def _reverse(ctx: Any, cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients by y0, the times and the parameters."""
    y0, times, ys, *_ = ctx.saved_tensors
    own = ctx.stats.backward
    field = RowsField(ctx.problem, own)
    field.trust(list(ctx.used))
    record_all(field)
    number, rows = len(ys), len(y0)
    seeds = cotangents.to(REAL).reshape(number, rows, -1)
    if ctx.compiled is not None:
        refuse_written(ctx.reads, ctx.surroundings, ctx.method)
    with ctx.surroundings.restored():
        if ctx.compiled is not None:
            initial, found = ctx.compiled.reverse(seeds, own)
        else:
            with log_stage("pnode adjoint"):
                initial, found = sample_adjoint(field, ctx.passes, seeds, own)
        by_times = None
        if ctx.needs_input_grad[6]:
            rate = field.total_rate if ctx.compiled is None else ctx.compiled.rates
            used = 1 if ctx.steps else number
            values = ys[:used].reshape(used, rows, -1)
            by_times = torch.zeros_like(times)
            through = initial + seeds[0] if ctx.steps else initial
            by_times[:used] = _by_times(rate, times[:used], values, seeds, through)
    gradients = [
        as_parameter(one, parameter, used)
        for one, parameter, used in zip(found, field.parameters, field.used, strict=True)
    ]
    state = (initial + seeds[0]).view(y0.shape).to(y0.dtype)
    return state, by_times, *gradients


def _by_rows(
    tolerance: tolerances.Resolved, rows: int, device: torch.device
) -> float | torch.Tensor:
    value = tolerances.values(tolerance, device)
    return value if isinstance(value, float) else value.view(rows, -1)


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

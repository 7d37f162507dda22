"""Independent samples: every row of y0 is a problem of its own, with its own steps and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from pnode.base.ledger import Stats
from pnode.base.rank_sums import of_all_ranks
from pnode.base.ranks import Ranks
from pnode.base.real_times import real_times
from pnode.base.transforms import (
    moves,
    outside_inference,
    plain,
    refuse_moving,
    refuse_transforms,
)
from pnode.base.vectors import REAL
from pnode.derivatives.autograd import solve as node
from pnode.errors import ConfigurationError
from pnode.field.watching import watched
from pnode.problems import arguments, tolerances
from pnode.problems.calls import Call
from pnode.problems.compared import agreed
from pnode.problems.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.problems.user_state import RowParts
from pnode.sample_path import SamplePath
from pnode.solutions.solution import Solution
from pnode.sweeping.engine import Engine
from pnode.sweeping.integrals import with_row_integrals
from pnode.sweeping.row_sweep import PassSweep, Samples
from pnode.sweeping.run import Requests

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
    ranks = Ranks(engine.comm)
    prepared = ranks.attempt(_prepare, solver, y0, t, args, ranks, differentiate)
    if ranks.parallel:
        prepared = agreed(ranks, solver._shared, prepared, differentiate)
    problem, y0, times, shared, call, costs, tolerance = prepared
    requests, restored = solver._requests, partial(_restored, problem, call, costs)
    if requests.dense or at == "steps":
        requests = replace(requests, steps=True)
    with outside_inference(differentiate), ranks.together():
        solved = ranks.attempt(
            _solve, solver, problem, requests, tolerance, y0, times, shared, restored, at
        )
    ts, ys, path, stats = solved
    states, integrals = restored(ys)
    return Solution(ts, states, stats, costs=integrals, path=path if requests.dense else None)


def _solve(
    solver: Any, problem: InitialValueProblem, requests: Requests, tolerance: _Tolerance,
    y0: torch.Tensor, times: torch.Tensor, shared: bool,
    restored: Callable[[torch.Tensor], tuple[Any, Any]], at: str,
) -> tuple[torch.Tensor, torch.Tensor, SamplePath | None, Stats]:  # fmt: skip
    """Return output times, states inside, and what may be asked for more. Not collective."""
    y0, times = (x.clone() if x.is_inference() else x for x in (y0, times))
    own, common = ((y0,), (times,)) if shared else ((y0, times), ())
    y0, times, *parameters = of_all_ranks(problem.ranks, own, (*common, *problem.parameters))
    times = times.expand(-1, len(y0))
    hit = times[[0, -1]] if requests.dense and len(times) > 1 else times
    layout = problem.layout
    clock = plain(hit).to(layout.device, REAL)
    declared = collect_parameters(solver._functions, solver._params)
    requests = replace(requests, samples=Samples(clock, *tolerance, tuple(declared)))
    problem = problem.but(times=tuple(clock[:, 0].tolist()))
    moving = [one for one in (y0, hit, *parameters) if moves(one)]
    trainable = any(problem.check_undeclared or not one.requires_grad for one in moving)
    ys, run = node(solver._engine, problem, requests, y0.reshape(-1), hit, trainable, parameters)
    if not requests.steps:
        return times, ys.reshape(len(times), *layout.shapes[0]), None, run.stats
    assert isinstance(run.sweep, PassSweep)
    ys, ends = ys.reshape(len(ys), len(y0), -1), run.sweep.ends
    shape = problem.layout.shapes[0]
    again = partial(_one_step, solver._engine, problem, requests, parameters, run.stats)
    path = SamplePath(
        problem, solver._engine.method, run.stats, times, ends, ys, y0, parameters, again,
        lambda y: restored(y.reshape(*y.shape[:-2], *shape))[0], solver._requests.independent,
    )  # fmt: skip
    if requests.dense:
        path.keep()
    ts, found = path.at_steps() if at == "steps" else (times, path.outputs())
    return ts, found.to(problem.layout.dtype).reshape(len(found), *shape), path, run.stats


def _one_step(
    engine: Engine, problem: InitialValueProblem, requests: Requests,
    parameters: Sequence[torch.Tensor], stats: Stats, times: torch.Tensor, states: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return what one step of each row leads to, from states ``(B, n)``, for times ``(2, B)``."""
    requests = replace(requests, samples=replace(requests.samples, clock=times), steps=False)
    control = replace(engine.control, step_size=math.inf, grid=None)
    alone = replace(engine, control=control, compile=False)
    problem = problem.but(times=tuple(times[:, 0].tolist()))
    moving = any(moves(one) for one in (states, *parameters))
    ys, run = node(alone, problem, requests, states.reshape(-1), times, moving, parameters)
    stats.rhs += run.stats.rhs
    run.stats.backward = stats.backward
    return ys[-1].reshape(states.shape).to(REAL)


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
) -> tuple[
    InitialValueProblem, torch.Tensor, torch.Tensor, bool, Call, torch.Size | None, _Tolerance
]:  # fmt: skip
    """Return the problem, where it starts, and what else is to be known of it. Not collective.

    The times, shape ``(T, B)`` or ``(T, 1)``, whether rows share them, the call, the shape of
    a row's integrals, rtol and atol.
    """
    engine = solver._engine
    call = Call.of(y0, args, ranks, None, None, engine.jacobian_options)
    declared = collect_parameters(solver._functions, (*(solver._params or ()), *call.tensors))
    named = [("y0", y0), ("t", t), *(("a parameter", one) for one in declared)]
    refuse_transforms(named[:2], declared)
    if ranks.parallel:
        refuse_moving(named, "and samples='independent' on several ranks has reverse mode alone")
    if solver._requests.dense:
        refuse_moving(named, "and samples='independent' with dense=True has reverse mode alone")
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
    times, resolution, shared = _times(t, len(y0))
    alike = tuple(plain(times)[:, 0].tolist()) if shared else ()
    problem = InitialValueProblem(
        call.function(watched(solver._functions[0], declared)), layout, alike, 1.0,
        tuple(one for one in declared if moves(one) and (differentiate or not one.requires_grad)),
        tuple(one for one in declared if not moves(one)), differentiate,
        explicit=call.function(watched(solver.explicit, declared)), form=solver._form,
        ranks=ranks, resolution=resolution,
    )  # fmt: skip
    arguments.refuse_inference(declared, engine.method)
    if solver.cost is None:
        return problem, y0, times, shared, call, None, tolerance
    cost, first = call.observer(watched(solver.cost, declared)), times[0].expand(len(y0))
    problem, y0, shape = with_row_integrals(problem, cost, y0, first)
    return problem, y0, times, shared, call, shape, tolerance


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


def _times(t: Any, rows: int) -> tuple[torch.Tensor, float, bool]:
    """Return output times, shape ``(T, B)`` or ``(T, 1)``, and what is to be known of them.

    The relative spacing of their numbers; whether all rows share them.
    """
    t = real_times("t", t, "give output times of shape (T,) or (B, T)")
    if t.dim() not in (1, 2) or (t.dim() == 2 and len(t) != rows):
        raise ConfigurationError(
            f"t has shape {tuple(t.shape)}: with samples='independent' give output times of shape "
            f"(T,), or (B, T) = ({rows}, T) for times of each row's own"
        )
    as_times(t.reshape(-1))
    resolution = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
    times = t.t() if t.dim() == 2 else t[:, None]
    ahead = plain(times).to(REAL).diff(dim=0)
    wrong = (ahead.sign() != ahead[:1].sign()) | (ahead.abs() < 1e-200) | ~ahead.isfinite()
    if bool(wrong.any()):
        index, row = wrong.nonzero()[0].tolist()
        raise ConfigurationError(
            f"t[{index + 1}] = {float(times[index + 1, row])!r} follows t[{index}] = "
            f"{float(times[index, row])!r} in row {row}: output times must strictly increase or "
            "strictly decrease"
        )
    return times, resolution, t.dim() == 1

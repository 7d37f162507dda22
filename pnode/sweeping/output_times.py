"""Derivatives of a solve with respect to its output times."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from pnode.base.errors import BackwardError
from pnode.base.ledger import Ledger, Stats
from pnode.base.transforms import moves, no_tangents, transforms_active
from pnode.base.vectors import REAL
from pnode.field.held import now
from pnode.field.rates import Rates, as_function
from pnode.field.rebinding import bound
from pnode.field.time_terms import TermsOfRanks
from pnode.field.vectorfield import vector_field
from pnode.layout.ghost_cells import ghosted
from pnode.problems.mass import Solve
from pnode.problems.problem import InitialValueProblem
from pnode.problems.transfers import remote
from pnode.sweeping.row_sweep import PassSweep
from pnode.sweeping.run import Run
from pnode.sweeping.sameness import refuse_another, refuse_another_slope

__all__ = [
    "flow_slope",
    "moved_by_times",
    "refuse_cuts",
    "slope_at",
    "start_moved_by_time",
    "time_gradient",
]


def time_gradient(
    run: Run,
    y0: torch.Tensor,
    ys: torch.Tensor,
    cotangents: torch.Tensor,
    initial: torch.Tensor,
    found: dict[int, float],
    t: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    again: bool,
) -> torch.Tensor:
    """Derivatives with respect to the output times: along the exact flow, dy/dt = f.

    Those of interpolated outputs are in ``found`` already, and the times of events, which come
    last among the problem's, are constants here. ``again`` tells whether derivatives of it follow.
    """
    if isinstance(run.sweep, PassSweep):
        return _row_time_gradient(run, run.sweep, y0, ys, cotangents, initial, t, parameters, again)
    problem, direction = run.problem, run.problem.direction
    interpolated: Set[int] = frozenset() if run.sweep is None else run.sweep.interpolated
    if again and interpolated:
        _refuse_interpolated_times()
    field = run.field(run.stats.backward)
    rates = Rates(field)
    ours = TermsOfRanks(problem, t, parameters) if again else None
    terms: list[torch.Tensor] = [initial.new_zeros((), dtype=torch.float64)] * len(t)
    for index, value in found.items():
        terms[index] = terms[index] + direction * value
    given = problem.times[: len(problem.times) - len(run.roots)]
    assert run.surroundings is not None
    with problem.ranks.together(), run.surroundings.restored():
        if run.graphs and not run.codes:
            refuse_another(run, y0)
        for index, s in enumerate(given):
            if index in interpolated:
                continue
            cotangent = -initial if index == 0 else cotangents[index]
            if ours is not None:
                y = y0 if index == 0 else ys[index]
                slope = slope_at(ours, index, y)
            elif problem.ranks.parallel or bool(cotangent.ne(0).any()):
                slope = rates.value(s, ys[index].detach())
                refuse_another_slope(run, field, index, slope.to(field.dtype))
            else:
                continue
            terms[index] = direction * torch.dot(cotangent.double(), slope.double())
    rows = torch.stack(terms)
    return (problem.ranks.sum(rows) if ours is None else ours.total(rows)).to(t)


def _row_time_gradient(
    run: Run, sweep: PassSweep, y0: torch.Tensor, ys: torch.Tensor, cotangents: torch.Tensor,
    initial: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor], again: bool,
) -> torch.Tensor:  # fmt: skip
    """Do as :func:`time_gradient` of times ``(T, B)`` of independent samples.

    Where the ends of all steps are outputs, by the first time alone.
    """
    rows = t.shape[1]
    assert run.surroundings is not None

    def terms() -> torch.Tensor:
        rate = None if again else sweep.rates(run)
        problem = bound(run.problem, parameters, leaves=False) if again else run.problem
        found = [torch.zeros_like(t[0], dtype=torch.float64)] * len(t)
        for index in range(1 if sweep.every else len(t)):
            y, reached = _reached(ys[index] if index else y0, ys[0], rows)
            seed = cotangents[index] if index else -initial
            seed = seed - cotangents[0] if sweep.every else seed
            if rate is None:
                slope = flow_slope(
                    problem, _of_rows(problem, t[index]), y.reshape(-1), vanishing=False
                )
            else:
                slope = rate(t[index].detach().to(y.device, REAL), y.detach().to(REAL))
            # No factor is NaN, which its product with zero would be in derivatives.
            seed = torch.where(reached, seed.double().view(rows, -1), 0.0)
            product = seed * slope.double().view(rows, -1)
            found[index] = product.sum(dim=1).to(t.device)
        return torch.stack(found).to(t)

    with run.surroundings.restored():
        known = run.problem.ranks.attempt(terms)
    return torch.zeros_like(t) if known is None else known


def _reached(y: torch.Tensor, start: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states of rows, where those have failed that at the start, and which have not."""
    y = y.view(rows, -1)
    reached = ~y.isnan().any(dim=1, keepdim=True)
    return torch.where(reached, y, start.view(rows, -1)), reached


def _of_rows(problem: InitialValueProblem, t: torch.Tensor) -> torch.Tensor:
    """Return a time for each row as f gets it; differentiable."""
    layout = problem.layout
    shape = layout.shapes[0]
    return t.to(layout.device, layout.dtype).view(-1, *[1] * (len(shape) - 1 - any(layout.pairs)))


def _refuse_interpolated_times() -> None:
    """Refuse what would need derivatives of an interpolant by time, and theirs."""
    raise BackwardError(
        "second derivatives and tangents with respect to times of outputs that are interpolated "
        "(break times too) are not supported: detach t and breakpoints, or solve with dense=False"
    )


def refuse_cuts(run: Run) -> None:
    """Refuse what would need derivatives of steps that events have cut in two."""
    if len(run.roots) > (run.last is not None):
        raise BackwardError(
            "second derivatives and tangents of a solve with events that do not end it, or with "
            "several at its end, are not supported: solve without event_fn for them"
        )


def slope_at(terms: TermsOfRanks, index: int, y: torch.Tensor) -> torch.Tensor:
    """Return dy/ds at an output, flat, as a differentiable function of everything."""
    problem, layout = terms.problem, terms.problem.layout
    time = terms.t[index].to(layout.device, layout.dtype)
    if time.dim():
        time = _of_rows(problem, time)
    return problem.direction * flow_slope(problem, time, y, vanishing=False)


def flow_slope(
    problem: InitialValueProblem, t: torch.Tensor, y: torch.Tensor, vanishing: bool = True
) -> torch.Tensor:
    """Return dy/dt at a time and a state, flat, as a differentiable function of everything.

    Where there may be algebraic equations it is a number, whose derivatives are refused; with
    ``vanishing`` in the second derivatives of its product with zero.
    """
    if problem.may_constrain:
        return _known_slope(problem, t, y, vanishing)
    layout = problem.layout
    parts = [now(part) for part in (problem.function, problem.explicit) if part is not None]
    parts = [part.apart() if hasattr(part, "apart") else part for part in parts]
    parts = [remote(part, problem.compute, Stats(), strict=False) for part in parts]
    t, cells = problem.seen(t), problem.exchange
    state = layout.unflatten(y.clone()) if cells is None else ghosted(cells, y)
    values = [layout.flatten(part(t, state)) for part in parts]
    slope = sum(values[1:], start=values[0])
    return slope if problem.mass is None else Solve.apply(slope, problem.mass, False)


def _known_slope(
    problem: InitialValueProblem, t: torch.Tensor, y: torch.Tensor, vanishing: bool
) -> torch.Tensor:
    if transforms_active():
        raise BackwardError(
            "derivatives through the time of an event or an output in transforms of torch.func are "
            "not supported for residual= and a singular mass=: take autograd's"
        )
    moving = [one for one in (t, y, *problem.parameters) if moves(one)]
    fixed = problem.but(
        function=now(problem.function), explicit=now(problem.explicit), check_undeclared=False
    )
    with no_tangents():
        s = problem.direction * float(t.detach())
        rate = Rates(vector_field(fixed, Ledger())).value(s, y.detach())
    return as_function((problem.direction * rate).to(y), moving, vanishing)


def start_moved_by_time(
    run: Run, t: torch.Tensor, along_t: torch.Tensor, y0: torch.Tensor, tangent: torch.Tensor,
    parameters: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return a tangent of the initial state with that of its time: the flow begins later."""
    assert run.sweep is not None
    if run.sweep.interpolated:
        _refuse_interpolated_times()
    terms = TermsOfRanks(run.problem, t, parameters)
    along = run.problem.direction * along_t[0].to(y0)
    return tangent - terms.known(_times(along, slope_at(terms, 0, y0)))


def moved_by_times(
    run: Run, t: torch.Tensor, along_t: torch.Tensor, ys: torch.Tensor,
    tangents: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return tangents of the outputs with those of their times.

    The first one's is in the flow; events, which come last, are at times of their own.
    """
    moved, terms = list(tangents), TermsOfRanks(run.problem, t, parameters)
    along = run.problem.direction * along_t.to(ys)
    for i in range(1, len(run.problem.times) - len(run.roots)):
        y = _reached(ys[i], ys[0], len(t[i]))[0].reshape(-1) if t[i].dim() else ys[i]
        moved[i] = moved[i] + terms.known(_times(along[i], slope_at(terms, i, y)))
    return torch.stack(moved)


def _times(number: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return a slope times a number, or of each row times its own."""
    if not number.dim():
        return number * slope
    return (number[:, None] * slope.view(len(number), -1)).reshape(-1)

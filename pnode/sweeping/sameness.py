"""Whether f still is that of the forward sweep, where nothing else would tell.

Machine code does not look at f again, and a tape does not either: an f that has changed shows in
what Python evaluates besides, slopes at outputs and second derivatives, and would be mixed with the
one from before.
"""

from __future__ import annotations

import torch

from pnode.base.errors import FieldChanged
from pnode.base.evidence import LET_NOTHING_CHANGE, differs
from pnode.base.ledger import Ledger
from pnode.field.held import now
from pnode.field.rates import Rates
from pnode.field.stacked import stacked
from pnode.field.vectorfield import VectorField, vector_field
from pnode.solvers.compiled.compiler import bare
from pnode.solvers.compiled.evaluations import is_recorded, local
from pnode.sweeping.run import Run, with_functions

__all__ = ["refuse_another", "refuse_another_end", "refuse_another_slope"]

# What round-off and Newton's tolerance may become within a solve.
_SLACK = 1e-4


def refuse_another(run: Run, y0: torch.Tensor) -> None:
    """Refuse an f that is not the one of the forward sweep. Collective.

    Parameters
    ----------
    run : Run
        The forward sweep.
    y0 : Tensor
        Its initial state, flat.

    Raises
    ------
    FieldChanged
        If it is another one.
    """
    if run.graphs:
        run.problem.ranks.attempt(_compare, run, y0.detach())
    elif _noted(run, 0) is not None:
        field = run.field(Ledger())
        slope = Rates(field).value(run.problem.times[0], y0.detach())
        refuse_another_slope(run, field, 0, slope.to(field.dtype))


def _compare(run: Run, y0: torch.Tensor) -> None:
    """Compare f and its product near y0 with those of the graphs that were compiled."""
    problem = with_functions(run.problem, now).but(check_undeclared=False)
    with torch.enable_grad():
        field, seen = local(vector_field(problem, Ledger()), y0)
        for graph, part in zip(run.graphs, (field, field.explicit), strict=False):
            assert part is not None
            one, point = stacked(part, seen)
            if not is_recorded(graph, bare(one), point):
                assert run.surroundings is not None
                raise FieldChanged(
                    f"{part.who} is not the one that was compiled for the forward sweep"
                    f"{run.surroundings.differences()}. {LET_NOTHING_CHANGE}",
                    time=problem.direction * problem.times[0], method=run.settings.method.name,
                )  # fmt: skip


def refuse_another_slope(run: Run, field: VectorField, index: int, slope: torch.Tensor) -> None:
    """Compare f at an output with the first stage of the step that begins there, if one does."""
    noted = _noted(run, index)
    by = 0.0 if noted is None else differs(slope, noted)
    if by:
        run.problem.ranks.refuse(field.changed(run.problem.times[index], by))


def _noted(run: Run, index: int) -> float | None:
    """Return what tells f at an output, None if no explicit step begins there."""
    scheme = run.settings.method.scheme
    if run.sweep is None or scheme is None or not scheme.explicit:
        return None
    noted = run.sweep.noted(index)
    return noted[0] if noted else None


def refuse_another_end(run: Run, state: torch.Tensor) -> None:
    """Compare the last states of steps that were taken again with those of the steps themselves."""
    if run.end is None:
        return
    state = state.detach().reshape(-1)
    by = differs(state, run.end, _SLACK * float(torch.linalg.vector_norm(state)))
    if by:
        raise run.field(Ledger()).changed(run.problem.times[-1], by, "where its solution ends")

"""Steps whose error test looks at tangents of the state, too.

A step that is fine for the state may be too long for its derivatives: at rest a state has no error
at all. CVODES and IDAS let sensitivities take part in the error test (full error control). Here the
steps are chosen by a solve of the state with some tangents, of which nothing but the steps is kept;
the solve itself takes these steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger
from pnode.base.surroundings import Surroundings
from pnode.derivatives.tangents import pair_problem, pair_settings
from pnode.field.vectorfield import vector_field
from pnode.layout.pair_layout import PairLayout
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.stepping import forward_sweep
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.recording import Noted
from pnode.sweeping.run import Recorded, Requests, Run

__all__ = ["forward"]


def forward(
    engine: Engine,
    problem: InitialValueProblem,
    y0: torch.Tensor,
    keep: bool,
    requests: Requests,
) -> tuple[torch.Tensor, Run]:
    """Integrate, with steps that tangents have a say in if they are to. Collective.

    Arguments and results are those of :func:`pnode.sweeping.sweeps.forward`.

    Raises
    ------
    ConfigurationError
        If the tangents have other shapes than y0.
    """
    if requests.sensitivity_control is None or requests.recorded is not None:
        return sweeps.forward(engine, problem, y0, keep, requests)
    ledger = Ledger()
    recorded = _chosen(engine, problem, y0, requests, ledger)
    requests = replace(requests, recorded=recorded)
    ys, run = sweeps.forward(engine, problem, y0, keep, requests)
    run.stats.tangents.add(ledger)
    return ys, run


def _chosen(
    engine: Engine,
    problem: InitialValueProblem,
    y0: torch.Tensor,
    requests: Requests,
    ledger: Ledger,
) -> Recorded:
    """Return the steps that suit the state and its tangents. Collective."""
    own = replace(problem if problem.base is None else problem.base, check_undeclared=False)
    settings = engine.settings(own)
    surroundings = Surroundings(
        (problem.function, problem.explicit), problem.compute or problem.layout.device
    )
    with problem.ranks.together():
        tangents = problem.ranks.attempt(_tangents, own, requests.sensitivity_control)
    pair = PairLayout(own.layout.size, len(tangents), split=settings.split)
    options = {}
    if engine.method.implicit:
        options = engine.solver_options(settings, adjoint=True).values
    both = pair_problem(own, pair, [[None] * len(own.parameters)] * len(tangents))
    wide = replace(pair_settings(settings, pair, options), adaptive=True)
    x0 = pair.join([y0.detach()[: own.layout.size], *tangents])
    field, steps = vector_field(both, ledger), Noted()
    times = (own.times[0], *own.times[1:][-1:]) if requests.dense else own.times
    with torch.no_grad(), problem.ranks.together(), engine.integrator(wide, field, x0) as taker:
        forward_sweep(taker, field, times, engine.control, ledger, [steps])
        ledger.newton, ledger.krylov = taker.iterations()
    adaptive = engine.method.solves_to_tolerance
    taken = replace(engine.settings(problem), adaptive=adaptive, graphs=None)
    return Recorded(steps.steps, tuple(steps.outputs), taken, surroundings)


def _tangents(problem: InitialValueProblem, wanted: str | torch.Tensor) -> torch.Tensor:
    """Return the tangents of the initial state, shape ``(m, size)``."""
    layout, ranks = problem.layout, problem.ranks
    if isinstance(wanted, str):  # "random"
        generator = torch.Generator("cpu").manual_seed(20261129 + ranks.comm.rank)
        row = torch.randn(layout.size, generator=generator, dtype=torch.float64, device="cpu")
        return (row / ranks.norm(row))[None].to(layout.device, layout.dtype)
    shapes = [torch.Size([layout.size]), *(() if layout.is_tuple else layout.shapes)]
    if wanted.shape[1:] not in shapes:
        raise ConfigurationError(
            f"sensitivity_control has shape {tuple(wanted.shape)}: give tangents of y0 as rows, "
            + " or ".join(f"(m, {', '.join(map(str, shape))})" for shape in dict.fromkeys(shapes))
        )
    return wanted.detach().reshape(len(wanted), -1).to(layout.device, layout.dtype)

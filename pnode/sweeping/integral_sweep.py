"""A sweep of a state alone, with the integrals that it drives from the stages of its steps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np
import torch

from pnode.adjoint.gradients import CostGradients
from pnode.base.ledger import Ledger
from pnode.base.transforms import in_forward_mode
from pnode.field.held import now
from pnode.field.vectorfield import record_all, vector_field
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.stepping import Step
from pnode.sweeping.engine import Engine
from pnode.sweeping.integrals import Integrand
from pnode.sweeping.quadrature import CostField, DrivenCotangents, Quadrature
from pnode.sweeping.run import Requests, Run, Sweep
from pnode.sweeping.stepped_sweep import SteppedSweep

__all__ = ["IntegralSweep", "solves_alone"]


def solves_alone(engine: Engine, run: Run, requests: Requests) -> bool:
    """Whether a state with integrals may be solved without these, step by step.

    Not where someone looks at both while it is solved, nor where they are recorded steps.
    """
    problem, method, chosen = run.problem, engine.method, engine.checkpointing
    driver = problem.function if problem.explicit is None else problem.explicit
    if type(driver) is not Integrand or type(problem.function) is not Integrand:
        return False
    if in_forward_mode():  # tangents go over the stages of both
        return False
    looks = (requests.events, requests.monitor, requests.callbacks, requests.recorded)
    elsewhere = problem.compute is not None or not run.settings.place.on_host
    part = requests.steps_before is not None and chosen != Checkpointing()
    return (
        method.implicit and not (method.linearly_implicit or method.coupled or part or elsewhere)
        and not (problem.form == "residual" or problem.ranks.parallel)
        and not (requests.dense or requests.steps or chosen.resume is not None)
        and all(one is None for one in looks)
    )  # fmt: skip


class IntegralSweep(Sweep):
    """A sweep of a state, and its integrals.

    To whoever wants more than its outputs and their gradient it is steps, which are taken again
    with the integrals in the state, as those of a compiled sweep are.

    Parameters
    ----------
    engine : Engine
        Lends integrators and adjoints.
    """

    interpolated: Set[int] = frozenset()

    def __init__(self, engine: Engine) -> None:
        self._engine, self._own = engine, SteppedSweep(engine)

    def forward(
        self, run: Run, y0: torch.Tensor, keep: bool, requests: Requests
    ) -> torch.Tensor:  # fmt: skip
        """Integrate, and return states and integrals at the outputs, side by side."""
        own = _alone(run.problem)
        self._run = Run(own, run.stats, self._engine.settings(own))
        field, cost = vector_field(own, run.stats), _cost_field(run.problem)
        if keep:
            record_all(field)
            record_all(cost)
        size = own.layout.size
        quadrature = Quadrature(cost, self._engine.method, y0[size:], keep)
        self._own.quadrature = quadrature
        self._run.surroundings = run.surroundings
        ys = self._own.forward(self._run, field, y0[:size], keep, requests)
        run.used = [a or b for a, b in zip(field.used, cost.used, strict=True)]
        self._own.quadrature, self._noted = None, quadrature.noted
        self._run.problem = own.but(function=None, explicit=None)  # the node has them, held
        costs = torch.from_numpy(np.stack(quadrature.outputs))
        return torch.cat([ys, costs.to(ys)], 1)

    def takes_batches(self, run: Run) -> bool:
        """Whether :meth:`reverse` takes several cotangents at once; see :class:`Sweep`."""
        return self._own.takes_batches(self._run)

    def recorded(self) -> tuple[Sequence[Step], tuple[int, ...]]:
        """Return the steps, and how many come before each output."""
        return self._own.recorded()

    def noted(self, output: int) -> Sequence[float]:
        """Return nothing: what was noted is of the state alone."""
        return ()

    def reverse(
        self, run: Run, y0: torch.Tensor, cotangents: torch.Tensor, wants_times: bool
    ) -> CostGradients:
        """Take the discrete adjoint; see :class:`Sweep`."""
        own = _alone(run.problem)
        size, trajectory = own.layout.size, self._own.trajectory
        assert trajectory is not None
        cost = _cost_field(run.problem)
        record_all(cost)
        cost.trust(run.used)
        if run.surroundings is not None:
            cost.suspects = run.surroundings.differences
        of_costs = cotangents[..., size:]
        driven = DrivenCotangents(
            self._noted, cost, self._engine.method, of_costs, trajectory.outputs
        )
        self._own.driven = driven
        try:
            found = self._own.reverse(
                replace(self._run, problem=own), y0[:size], cotangents[..., :size],
                wants_times,
            )  # fmt: skip
        finally:
            self._own.driven = None
        first, later = of_costs[0].to(found.state), of_costs[1:].sum(0).to(found.state)
        return CostGradients(
            torch.cat([found.state, first + later], -1), found.parameters,
            torch.cat([found.initial, later], -1), found.times,
        )  # fmt: skip


def _alone(problem: InitialValueProblem) -> InitialValueProblem:
    """Return the problem of the state without its integrals."""
    base = problem.base
    assert base is not None
    function, explicit = (now(one) for one in (problem.function, problem.explicit))
    return problem.but(
        function=function.function, explicit=None if explicit is None else explicit.function,
        layout=base.layout, largest=base.largest, mass=base.mass, base=None, integrals=0,
    )  # fmt: skip


def _cost_field(problem: InitialValueProblem) -> CostField:
    driver = now(problem.function if problem.explicit is None else problem.explicit)
    assert problem.base is not None
    own = problem.but(
        function=driver.cost,
        explicit=None,
        mass=None,
        layout=problem.base.layout,
        base=None,
        integrals=0,
    )
    return CostField(own, Ledger(), driver.shape)

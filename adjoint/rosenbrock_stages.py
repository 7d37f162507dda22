"""Products and solves for the tangents of Rosenbrock steps, one by one or all known before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.adjoint.ahead import Ahead, curvatures_ahead, derivatives_ahead, pays
from pnode.adjoint.rosenbrock import RosenbrockAdjoint
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.stepping import Step

__all__ = ["KnownStages", "RecordedStages"]


class RecordedStages:
    """Of one step, with the graphs at its stages; see :class:`RosenbrockAdjoint` for the notation.

    Parameters
    ----------
    adjoint : RosenbrockAdjoint
        Has the step's checkpoint.
    step : Step
        The step.
    tangents : Tensor
        du, shape ``(m, size)``.
    moving : sequence of (int, Tensor)
        Tangents of the parameters.
    ledger : Ledger
        Counts.

    Attributes
    ----------
    changes : Tensor
        The e_i, shape ``(stages, m, size)``.
    """

    def __init__(
        self, adjoint: RosenbrockAdjoint, step: Step, tangents: torch.Tensor,
        moving: Sequence[tuple[int, torch.Tensor]], ledger: Ledger,
    ) -> None:  # fmt: skip
        self._adjoint, self._step, self._moving, self._ledger = adjoint, step, moving, ledger
        self._stages, self._base = adjoint.stages(step, ledger)
        along = tangents.to(self._base.dtype), moving
        self.changes = torch.cat([
            self._base.second_along(*along, v, time).to(REAL)
            for _, v, time in adjoint.through_jacobian(self._stages, step)
        ])  # fmt: skip

    def along(self, i: int, states: torch.Tensor) -> torch.Tensor:
        """Return g_u(Z_i) dZ + g_p(Z_i) v."""
        return self._stages[i].graph.along(states.to(self._base.dtype), self._moving).to(REAL)

    def through(self, states: torch.Tensor) -> torch.Tensor:
        """Return J dv."""
        return self._base.along(states.to(self._base.dtype), ()).to(REAL)

    def solve(self, i: int, right: torch.Tensor) -> torch.Tensor:
        """Return M_i^-1 right. Collective."""
        self._adjoint.use_matrix(i, self._step)
        return self._adjoint.solve(right, self._step, self._ledger, transposed=False)


class KnownStages:
    """Of all steps of a sweep, from a few evaluations of f mapped over them.

    A step is chosen by :meth:`of`.
    """

    def __init__(
        self, base: Ahead, others: Ahead, second: tuple[torch.Tensor, torch.Tensor | None],
        factors: dict[float, tuple[torch.Tensor, torch.Tensor]], diagonal: Sequence[float],
    ) -> None:  # fmt: skip
        self._base, self._others, self._second = base, others, second
        self._factors, self._diagonal = factors, diagonal
        self._step = 0

    @classmethod
    def create(
        cls, adjoint: RosenbrockAdjoint,
        steps: Sequence[tuple[Step, Checkpoint, Sequence[float]]], number: int,
        moving: Sequence[tuple[int, torch.Tensor]], ledger: Ledger,
    ) -> KnownStages | None:  # fmt: skip
        """Return those of steps for so many tangents; None where single steps are the way."""
        scheme, field = adjoint.scheme, adjoint.field
        if field.mass is not None or not pays(field, len(steps) * len(scheme.c), number):
            return None
        starts = [step.start for step, _, _ in steps]
        states = [checkpoint.stages[0] for _, checkpoint, _ in steps]
        base = derivatives_ahead(field, starts, states, moving, ledger)
        if base is None:
            return None
        times, inner, products = [], [], []
        slopes = torch.zeros(len(scheme.c), len(steps), dtype=field.dtype)
        for k, (step, checkpoint, evidence) in enumerate(steps):
            adjoint.load(checkpoint, None, evidence)
            stages, _ = adjoint.stages(step, ledger)
            times += [step.at(c) for c in scheme.c[1:]]
            inner += [stage.Z for stage in stages[1:]]
            products.append(torch.stack([stage.v for stage in stages]))
            if scheme.needs_slope_of(None):
                slopes[:, k] = torch.tensor(scheme.gamma, dtype=REAL) * step.length
        v = torch.stack(products, 1).to(field.dtype)
        second = curvatures_ahead(field, starts, states, v, slopes.to(v.device), moving, ledger)
        others = derivatives_ahead(field, times, inner, moving, ledger)
        if second is None or others is None:
            return None
        factors, lengths = {}, torch.tensor([step.length for step, _, _ in steps], dtype=REAL)
        for gamma in set(scheme.gamma_diagonal) - {0.0}:
            found = base.factors(1.0 / (lengths * gamma))
            if found is None:
                return None  # single steps will tell where
            factors[gamma] = found
        ledger.factorizations += len(factors) * len(steps)
        return cls(base, others, second, factors, scheme.gamma_diagonal)

    def of(self, step: int, tangents: torch.Tensor) -> KnownStages:
        """Stand at a step with tangents du, shape ``(m, size)``."""
        by_state, along = self._second
        self._step, self.changes = step, tangents @ by_state[step]
        if along is not None:
            self.changes = self.changes + along[step]
        return self

    def along(self, i: int, states: torch.Tensor) -> torch.Tensor:
        """Return g_u(Z_i) dZ + g_p(Z_i) v."""
        if not i:
            return self._base.product(self._step, states)
        return self._others.product(self._step * (len(self._diagonal) - 1) + i - 1, states)

    def through(self, states: torch.Tensor) -> torch.Tensor:
        """Return J dv."""
        return states @ self._base.jacobians[self._step]

    def solve(self, i: int, right: torch.Tensor) -> torch.Tensor:
        """Return M_i^-1 right."""
        lu, pivots = self._factors[self._diagonal[i]]
        found: torch.Tensor = torch.linalg.lu_solve(lu[self._step], pivots[self._step], right.mT)
        return found.mT

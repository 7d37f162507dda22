"""What tangents of steps share, and those of methods that solve systems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch

from pnode.adjoint.implicit import ImplicitAdjointStepper
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.one_pass import jacobian_along
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.stepping import Step

__all__ = ["ImplicitTangents", "Known", "Moving", "TangentStepper", "plus"]

#: For each parameter that moves its index and its tangents, shape ``(m, *parameter)``.
Moving: TypeAlias = Sequence[tuple[int, torch.Tensor]]
#: Steps with their checkpoints, and what was noted of f there.
Known: TypeAlias = Sequence[tuple[Step, Checkpoint, Sequence[float]]]


class TangentStepper(ABC):
    """Takes tangents of the state forwards, step by step.

    Parameters
    ----------
    adjoint : AdjointStepper
        Of the same method, has begun; each step's checkpoint is to be loaded into it.
    start : Tensor
        Tangents of the initial state, shape ``(m, size)``.
    moving : sequence
        Those of the parameters.

    Attributes
    ----------
    tangents : Tensor
        Of the state after the steps so far, shape ``(m, size)``, PETSc's precision.
    """

    def __init__(self, start: torch.Tensor, moving: Moving) -> None:
        self.tangents = start.to(REAL)
        self._moving = moving

    @abstractmethod
    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step, whose checkpoint has been loaded. Collective.

        Raises
        ------
        LinearSolveFailed
            If a linear solve did not converge.
        BaseException
            Whatever the vector field raised.
        """

    def look_ahead(self, steps: Known, ledger: Ledger) -> None:
        """Take what does not need tangents for all steps at once, where that pays."""
        return

    def _along(self, graph: Linearization, states: torch.Tensor | None) -> torch.Tensor:
        """Return g_y Z_k + g_p v_k, without the Z_k if there are none."""
        given = None if states is None else states.to(graph.dtype)
        return graph.along(given, self._moving).to(REAL)


class ImplicitTangents(TangentStepper):
    """What those of methods that solve systems share."""

    def __init__(
        self, adjoint: ImplicitAdjointStepper, start: torch.Tensor, moving: Moving
    ) -> None:
        super().__init__(start, moving)
        self._adjoint = adjoint
        self._mass = adjoint.field.mass
        settings = adjoint.settings
        #: Whether each matrix is made of all products with unit vectors.
        self._assembles = (
            settings.jacobian == "dense" and settings.jacobian_options.reuse != "constant"
            and settings.comm.size == 1 and settings.form != "residual"
        )  # fmt: skip

    def _solve(
        self, s: float, u: torch.Tensor, shift: float, driven: torch.Tensor, step: Step,
        ledger: Ledger,
    ) -> torch.Tensor:  # fmt: skip
        """Return the solutions of (shift M - g_u) x_k = M driven_k + g_p v_k at (s, u)."""
        adjoint, along = self._adjoint, None
        if self._moving and self._assembles:
            along = jacobian_along(adjoint.graph_at(s, u), self._moving)
        adjoint.set_matrix(s, u, shift, step)
        right = driven
        if self._mass is not None:
            right = self._mass.apply(driven)
        if along is not None:
            right = right + along.to(REAL)
        elif self._moving:
            right = right + self._along(adjoint.graph_at(s, u), None)
        return adjoint.solve(right, step, ledger, transposed=False)


def plus(total: torch.Tensor, terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """Return a tensor and a sum of others, each with its factor."""
    for factor, term in terms:
        if factor:
            total = torch.add(total, term, alpha=factor)
    return total

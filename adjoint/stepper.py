"""What every discrete adjoint offers, and the parts that those written in torch share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode.base import vectors
from pnode.base.errors import SolveError
from pnode.base.evidence import differs
from pnode.base.ledger import Ledger
from pnode.base.options import log_event, log_stage
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization, Products
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step

__all__ = ["NOTHING", "AdjointStepper", "StageCotangents", "TorchAdjointStepper"]

#: What Newton's method leaves may be so many times what it seemed.
_GROWTH = 64.0


@dataclass(frozen=True, eq=False)
class StageCotangents:
    """Derivatives of the loss with respect to stages of one step, besides those through its end.

    Attributes
    ----------
    states, slopes : sequence of (Tensor or None)
        With respect to each Y_i and K_i, shape ``(size,)``, PETSc's precision, None being zero;
        empty if all of them are.
    look : callable or None
        Called with the index and the value of each K_i of an explicit method, from the last to the
        first, which is then evaluated again even if its graph was kept.
    """

    states: Sequence[torch.Tensor | None] = ()
    slopes: Sequence[torch.Tensor | None] = ()
    look: Callable[[int, torch.Tensor], None] | None = None

    def of(self, stages: int) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Return both as new lists of one entry per stage."""
        nothing = [None] * stages
        return list(self.states or nothing), list(self.slopes or nothing)


NOTHING = StageCotangents()


class AdjointStepper(ABC):
    """Takes cost gradients backwards, step by step; reused from sweep to sweep.

    The cost gradients are ``lambda``, the derivative of the loss with respect to the state, and
    ``mu``, with respect to the parameters.

    Parameters
    ----------
    settings : IntegratorSettings
        Those of the forward integrator.
    parameters : bool
        Whether gradients with respect to parameters are wanted.

    Attributes
    ----------
    checkpoint : Checkpoint
        That of the step to come, once it is loaded.
    """

    def __init__(self, settings: IntegratorSettings, parameters: bool) -> None:
        self.settings = settings
        self.checkpoint = Checkpoint(())
        self.wants_parameters = parameters
        self._direction = 1.0

    @abstractmethod
    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients; of k losses if ``batch = (k,)``. Collective."""

    @abstractmethod
    def end(self) -> None:
        """End a sweep: let go of the user's objects."""

    @abstractmethod
    def load(
        self, checkpoint: Checkpoint, graphs: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place. Not collective.

        Parameters
        ----------
        checkpoint : Checkpoint
            The checkpoint.
        graphs : sequence of Linearization, optional
            Graphs at its stages.
        evidence : sequence of float
            What the forward sweep noted of f in this step; see ``TimeIntegrator.evidence``.
        """

    def placeholder(self, step: Step, state: torch.Tensor) -> Checkpoint:
        """Return what stands for a step's checkpoint that cannot be had, in a sweep that is lost.

        Parameters
        ----------
        step : Step
            The step.
        state : Tensor
            Any state, flat, PETSc's precision.
        """
        return Checkpoint(tuple(state.clone() for _ in range(self.settings.method.stage_units)))

    @abstractmethod
    def add(self, cotangent: torch.Tensor) -> None:
        """Add the derivative of the loss with respect to the state at this time."""

    @abstractmethod
    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Raises
        ------
        LinearSolveFailed
            If a transposed solve did not converge.
        BaseException
            Whatever the vector field raised.
        """

    @abstractmethod
    def state_gradient(self) -> torch.Tensor:
        """Return lambda, flat, in PETSc's precision, as a new tensor."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether this rank's part of lambda is finite. Not collective."""

    @abstractmethod
    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return mu: one tensor per parameter, None for those that the field never used."""

    @abstractmethod
    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""

    def _where(self, step: Step) -> dict[str, Any]:
        return {
            "time": self._direction * step.start,
            "step": step.index,
            "method": self.settings.method.name,
        }


class TorchAdjointStepper(AdjointStepper):
    """Cost gradients kept as tensors.

    Subclasses implement :meth:`step` with ``self.state`` (lambda, PETSc's precision),
    ``self.checkpoint`` and ``self.field``, and pass products with the parameter Jacobian to
    :meth:`accumulate`.
    """

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        log_stage("pnode adjoint").push()
        self.field = field
        self._direction = field.problem.direction
        place = self.settings.place
        self.state = torch.zeros((*batch, self.settings.size), dtype=REAL, device=place.device)
        self.checkpoint = Checkpoint(())
        self.evidence: Sequence[float] = ()
        self._compared = self._apart = 0
        self._gradients: list[torch.Tensor | None] = [None] * len(field.parameters)

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        del self.field
        self.checkpoint, self.evidence, self._gradients = Checkpoint(()), (), []
        log_stage("pnode adjoint").pop()

    def load(
        self, checkpoint: Checkpoint, graphs: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place. Not collective."""
        self.checkpoint, self.evidence = checkpoint, evidence

    def verify(
        self, value: torch.Tensor, index: int, s: float, step: Step, what: str = "its value",
        slack: float = 0.0,
    ) -> None:  # fmt: skip
        """Compare a value with what the forward sweep noted, if it did.

        ``slack`` is about what Newton's method has left. In stiff problems its last update, with an
        old Jacobian, now and then makes a residual larger, which the slack does not know of; an f
        that has changed is apart in more than a few values, or by much more.

        Raises
        ------
        FieldChanged
            If they differ.
        """
        if index < len(self.evidence):
            by = differs(value, self.evidence[index], slack)
            self._compared += 1
            if by and slack and not differs(value, self.evidence[index], _GROWTH * slack):
                self._apart += 1
                by = by if self._apart > 2 + self._compared // 20 else 0.0
            if by:
                error = self.field.changed(s, by, what).located(**self._where(step))
                self.field.problem.ranks.refuse(error)

    def add(self, cotangent: torch.Tensor) -> None:
        """Add the derivative of the loss with respect to the state at this time."""
        self.state = self.state + cotangent

    def state_gradient(self) -> torch.Tensor:
        """Return lambda, flat, in PETSc's precision, as a new tensor."""
        return self.state.clone()

    def is_finite(self) -> bool:
        """Whether this rank's part of lambda is finite. Not collective."""
        return vectors.is_finite(self.state)

    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return mu: one tensor per parameter, None for those that the field never used."""
        return list(self._gradients) if self.wants_parameters else [None] * count

    def destroy(self) -> None:
        """Nothing of PETSc's to free."""

    def linearize(
        self, s: float, u: torch.Tensor, step: Step, differentiate_time: bool = False
    ) -> Linearization:
        """Evaluate the field at (s, u), a tensor that nothing writes into, with its graph."""
        try:
            with log_event("pnode rhs"):
                return self.field.linearize(
                    s, u.to(self.field.dtype), differentiate_time=differentiate_time
                )
        except SolveError as error:
            raise error.located(**self._where(step)) from error.__cause__

    def pull_back(
        self, product: Callable[..., Products], *cotangents: torch.Tensor
    ) -> torch.Tensor:
        """Call ``product``, such as a linearization's ``vjp``, add its second part to mu.

        Returns
        -------
        Tensor
            Its first part, the one for the state, PETSc's precision.
        """
        with log_event("pnode vjp"):
            products = product(*(tensor.to(self.field.dtype) for tensor in cotangents))
        self.accumulate(products.parameters)
        return products.state.to(REAL)

    def accumulate(self, terms: tuple[torch.Tensor | None, ...]) -> None:
        """Add one product per parameter (any precision) to mu."""
        if self.wants_parameters:
            accumulate(self._gradients, terms)

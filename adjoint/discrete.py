"""The discrete adjoint: PETSc's TSAdjoint, driven step by step from restored checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode import vectors
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.trajectory import Checkpoint
from pnode.errors import BackwardError, LinearSolveFailed
from pnode.evidence import notes
from pnode.options import PETSc, SolverOptions, log_stage
from pnode.solution import Ledger
from pnode.solvers.bridge import Bridge, ParameterJacobianShell, ParameterSums, shell_matrix
from pnode.solvers.integrator import (
    SINGULAR,
    IntegratorSettings,
    adjoint_vectors,
    build_ts,
    raise_stored,
    reason_name,
)
from pnode.solvers.petsc_c import total_krylov_iterations
from pnode.solvers.stepping import Step
from pnode.vectorfield import VectorField

__all__ = ["DiscreteAdjoint"]


class DiscreteAdjoint(AdjointStepper):
    """A TS that steps backwards, with its cost gradients; reused from sweep to sweep.

    Parameters
    ----------
    settings : IntegratorSettings
        Those of the forward integrator.
    options : SolverOptions
        PETSc options.
    parameters : bool
        Whether gradients with respect to parameters are wanted.

    Notes
    -----
    ``lambda`` is the derivative of the loss with respect to the state, ``mu`` with respect to the
    parameters. mu is replicated, so products with the transposed parameter Jacobian need no
    communication.
    """

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, parameters: bool
    ) -> None:
        super().__init__(settings, parameters)
        self._options = options
        implicit = settings.method.implicit
        points = {"imex": 4}.get(settings.form, 2) if implicit else 1
        self.bridge = Bridge(points=points)
        self.ts = build_ts(settings, options, self.bridge, adjoint=True)
        comm = settings.comm
        self.cost_gradient = vectors.create(comm, settings.size, settings.place)
        self._parameters: ParameterSums | None = None
        if parameters:
            self._parameters = ParameterSums(vectors.create(comm, 1))
            if implicit:
                self.ts.setIJacobianP(
                    self.bridge.implicit_parameter_jacobian, self._parameter_shell(-1.0)
                )
            if not implicit or settings.form == "imex":
                self.ts.setRHSJacobianP(
                    self.bridge.explicit_parameter_jacobian, self._parameter_shell(1.0)
                )
        self.ts.setCostGradients(
            self.cost_gradient, None if self._parameters is None else self._parameters.weight
        )
        # TSAdjointSetUp wants a trajectory object to look at; nothing uses it afterwards.
        self.ts.setSaveTrajectory()
        self.ts.adjointSetUp()
        self.ts.removeTrajectory()
        self._vectors = adjoint_vectors(self.ts, settings.method)
        self._ksp = self.ts.getSNES().getKSP() if implicit else None
        self._iterations = 0
        self._evidence: Sequence[float] = ()

    def _parameter_shell(self, factor: float) -> Any:
        assert self._parameters is not None
        context = ParameterJacobianShell(self.bridge, factor, self._parameters)
        settings = self.settings
        return shell_matrix(context, settings.size, 1, settings.comm, settings.place)

    def begin(self, field: VectorField) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        log_stage("pnode adjoint").push()
        self._options.begin_sweep(self)
        self.bridge.attach(field)
        self._direction = field.problem.direction
        self.cost_gradient.set(0.0)
        if self._parameters is not None:
            self._parameters.begin(len(field.parameters))
        if self._ksp is not None:
            self._iterations = total_krylov_iterations(self._ksp)

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self._options.end_sweep(self)
        self.bridge.detach()
        log_stage("pnode adjoint").pop()

    def load(
        self, checkpoint: Checkpoint, tape: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place. Not collective."""
        self._evidence = evidence
        for vector, tensor in zip(self._vectors, checkpoint, strict=True):
            vectors.copy_in(vector, tensor)

    def state_gradient(self) -> torch.Tensor:
        """Return lambda, flat, in PETSc's precision, as a new tensor."""
        return vectors.copy_out(self.cost_gradient)

    def is_finite(self) -> bool:
        """Whether this rank's part of lambda is finite. Not collective."""
        return vectors.is_finite(vectors.view(self.cost_gradient))

    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        """Return mu: one tensor per parameter, None for those that the field never used."""
        return [None] * count if self._parameters is None else self._parameters.finish()

    def add(self, cotangent: torch.Tensor) -> None:
        """Add the derivative of the loss with respect to the state at this time."""
        values = vectors.copy_out(self.cost_gradient)
        vectors.copy_in(self.cost_gradient, values.add_(cotangent))

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Raises
        ------
        LinearSolveFailed
            If a transposed solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        ts = self.ts
        if self.settings.method.implicit:
            self.bridge.expected = expected = notes(self._evidence)
            self.bridge.begin_stages((step.start, step.end, *(note.s for note in expected)))
        ts.setTime(step.end)
        ts.setTimeStep(-step.length)
        ts.setStepNumber(step.index + 1)
        failure: PETSc.Error | None = None
        try:
            ts.adjointStep()
        except PETSc.Error as error:
            failure = error
        raise_stored(self.bridge, failure, self._where(step))
        if failure is not None:
            kind = LinearSolveFailed if failure.ierr == SINGULAR else BackwardError
            raise kind(
                "a transposed solve of the adjoint failed"
                if kind is LinearSolveFailed
                else "PETSc could not take the adjoint of this step",
                reason=str(failure).replace("\n", " "), **self._where(step),
            ) from failure  # fmt: skip
        ledger.steps += 1
        if self._ksp is not None:
            total = total_krylov_iterations(self._ksp)
            ledger.krylov += total - self._iterations
            self._iterations = total
            if ts.getConvergedReason() < 0:
                reason = self._ksp.getConvergedReason()
                raise LinearSolveFailed(
                    "a transposed solve of the adjoint failed: use jacobian='dense', or give "
                    "linear_solver a preconditioner or more iterations",
                    reason=reason_name(PETSc.KSP.ConvergedReason, reason),
                    **self._where(step),
                )

    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""
        self.ts.destroy()

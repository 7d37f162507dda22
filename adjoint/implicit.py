"""What discrete adjoints of methods that solve systems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from pnode.adjoint.guesses import ExactSolves, checked_solution
from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.base import vectors
from pnode.base.ledger import Ledger
from pnode.base.options import PETSc, SolverOptions, log_event
from pnode.field.linearization import Linearization, Products
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.linear.block import BlockMatrix
from pnode.solvers.linear.direct import DirectSolves
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import linear_error, raise_stored
from pnode.solvers.petsc.library import total_krylov_iterations
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.petsc.ts import build_ts
from pnode.solvers.stepping import Step

__all__ = ["ImplicitAdjointStepper"]


def _columns(rows: torch.Tensor) -> Any:
    """Return rows as the columns of PETSc's matrix, which shares their memory."""
    columns = rows.numpy().T
    return PETSc.Mat().createDense(columns.shape, array=columns, comm=PETSc.COMM_SELF)


def _failure(solve: Callable[..., None], *arguments: Any) -> PETSc.Error | None:
    """Call PETSc, and return its error."""
    try:
        solve(*arguments)
    except PETSc.Error as error:
        return error
    return None


class ImplicitAdjointStepper(TorchAdjointStepper):
    """For adjoints written in torch of methods that solve systems with ``F_u + shift F_u_dot``.

    F(s, u, u_dot) is ``M u_dot - g(s, u)``, or the user's residual. The linear systems are
    PETSc's, set up as the forward ones are (Jacobian type, KSP and PC options).
    """

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, parameters: bool
    ) -> None:
        super().__init__(settings, parameters)
        self._options = options
        self.bridge = Bridge(points=2)
        self.ts = build_ts(settings, options, self.bridge)
        self._ksp = self.ts.getSNES().getKSP()
        self._matrices = self.ts.getIJacobian()[:2]
        self._b, self._x = (
            vectors.create(settings.comm, settings.size, settings.place) for _ in range(2)
        )
        self._direct, self._iterations = DirectSolves(), 0
        self._known: tuple[torch.Tensor, torch.Tensor, Products] | None = None

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field, batch)
        self._options.begin_sweep(self)
        self.bridge.attach(field)
        self._iterations = total_krylov_iterations(self._ksp)

    def load(
        self, checkpoint: Checkpoint, graphs: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place. Not collective."""
        super().load(checkpoint, graphs, evidence)
        if self.field.exchange is not None:
            # Which tensors steps share depends on where a rank keeps them, and whether it has
            # failed; to exchange ghost cells is for all or none.
            self.bridge.forget_tensors()

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self._options.end_sweep(self)
        self.bridge.detach()
        self._known = None
        super().end()

    def products(
        self,
        s: float,
        u: torch.Tensor,
        w: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        part: VectorField | None = None,
    ) -> Products:
        """Return the VJPs of g = -F at (s, u, u_dot); see ``Linearization.vjp``.

        Called at the point of the last :meth:`solve_transposed`, it shares that graph. ``part`` is
        the explicit part of a split field, for products with that.
        """
        known, self._known = self._known, None
        if part is None and known is not None and known[0] is w and known[1] is u:
            return known[2]
        with log_event("pnode vjp"):
            return self.graph_at(s, u, u_dot, part).vjp(w.to(self.field.dtype))

    def value(self, s: float, u: torch.Tensor, u_dot: torch.Tensor | None = None) -> torch.Tensor:
        """Return g = -F at (s, u, u_dot), from the graph that :meth:`products` uses."""
        return self.graph_at(s, u, u_dot).flat_value()

    def graph_at(
        self,
        s: float,
        u: torch.Tensor,
        u_dot: torch.Tensor | None = None,
        part: VectorField | None = None,
    ) -> Linearization:
        """Return g with its graph at (s, u, u_dot), that of a recent point where it is the same."""
        return self.bridge.linearize(self.bridge.point_at(s, u, u_dot, part))

    def solve_transposed(
        self,
        s: float,
        u: torch.Tensor,
        shift: float,
        b: torch.Tensor,
        step: Step,
        ledger: Ledger,
        u_dot: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Solve ``(F_u + shift F_u_dot)^T x = b`` at (s, u, u_dot). Collective.

        Parameters
        ----------
        s, u, u_dot : float, Tensor, Tensor or None
            Where; u_dot matters to residuals alone.
        shift : float
            Positive.
        b : Tensor
            Right-hand side.
        step : Step
            For error messages.
        ledger : Ledger
            Counts Krylov iterations.

        Returns
        -------
        Tensor
            x, PETSc's precision.

        Raises
        ------
        LinearSolveFailed
            If the Krylov method did not converge, or the matrix is singular.
        """
        x, products = checked_solution(self, s, u, shift, b, step, ledger, u_dot)
        self._known = None if products is None else (x, u, products)
        return x

    @cached_property
    def exact_solves(self) -> ExactSolves:
        """Solves where the matrix misses entries."""
        return ExactSolves(self.ts, self.bridge, self.settings)

    @cached_property
    def solves_rows(self) -> bool:
        """Whether PETSc solves with factors for several right-hand sides at once.

        Only tangents ask: cotangents in a batch are those of single sweeps to the last bit.
        """
        matrix, pc = self._matrices[1], self._ksp.getPC().getType()
        alone = self.settings.place.on_host and self.settings.comm.size == 1
        if not alone or self._ksp.getType() != "preonly":
            return False
        if matrix.getType() == "python":
            return pc == "python" and isinstance(matrix.getPythonContext(), BlockMatrix)
        return pc == "lu" and matrix.getType() == "seqdense"

    def set_matrix(
        self, s: float, u: torch.Tensor, shift: float, step: Step,
        u_dot: torch.Tensor | None = None, exactly: bool = True,
    ) -> None:  # fmt: skip
        """Take ``F_u + shift F_u_dot`` at (s, u, u_dot) as the matrix of :meth:`solve`.

        Without ``exactly`` it may be that of a Jacobian that seems to be constant.
        """
        jacobian, point = self.bridge.jacobian, self.bridge.point_at(s, u, u_dot)
        assert jacobian is not None
        failure: PETSc.Error | None = None
        try:
            jacobian.compute_at(self.bridge, point, shift, self._matrices, exactly)
            self._ksp.setOperators(*self._matrices)
        except PETSc.Error as error:
            failure = error
        self._check(failure, step)

    def solve(
        self, b: torch.Tensor, step: Step, ledger: Ledger, transposed: bool = True
    ) -> torch.Tensor:
        """Solve with the matrix, or its transpose, as :meth:`solve_transposed` does. Collective.

        Several solves, and those of the rows of a batch, share the factors or the preconditioner.
        """
        kind = "transposed" if transposed else "linear"
        if b.dim() > 1 and not transposed and self.solves_rows:
            b = b.detach().contiguous()
            found = torch.empty_like(b)
            failure = _failure(self._ksp.matSolve, _columns(b), _columns(found))
            self._check(failure, step, kind)
            ledger.krylov += len(b)
            return found
        if b.dim() > 1:
            return torch.stack([self.solve(row, step, ledger, transposed) for row in b])
        vectors.copy_in(self._b, b)
        solve = self._ksp.solveTranspose if transposed else self._ksp.solve
        self._check(_failure(solve, self._b, self._x), step, kind)
        ranks = self.bridge.ranks
        if not self._direct.mend(self._ksp, self._b, self._x, transposed, ranks):
            raise linear_error(self._ksp, "zero pivot in LU factorization", self._where(step), kind)
        total = total_krylov_iterations(self._ksp)
        ledger.krylov += total - self._iterations
        self._iterations = total
        return vectors.copy_out(self._x)

    def _check(self, failure: PETSc.Error | None, step: Step, kind: str = "transposed") -> None:
        where = self._where(step)
        raise_stored(self.bridge, failure, where)
        if failure is not None or self._ksp.getConvergedReason() < 0:
            raise linear_error(self._ksp, failure, where, kind) from failure

    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""
        if "exact_solves" in vars(self):
            self.exact_solves.destroy()
        self.ts.destroy()

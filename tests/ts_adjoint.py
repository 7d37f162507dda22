"""PETSc's own discrete adjoint (TSAdjoint), one step at a time: an oracle for pnode's.

For explicit Runge-Kutta, theta, DIRK and IMEX methods, on one process.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import torch

from pnode.adjoint.stepper import AdjointStepper
from pnode.base import vectors
from pnode.base.options import PETSc
from pnode.field.products import accumulate
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.linear.linearizer import Point
from pnode.solvers.linear.shells import JacobianShell, shell_matrix
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.failures import raise_stored
from pnode.solvers.petsc.library import stage_vectors
from pnode.solvers.petsc.ts import build_ts


class OracleBridge(Bridge):
    """Callbacks of which two after one another, for state and parameters, share a product."""

    def attach(self, field: Any) -> None:
        super().attach(field)
        self.last: Any = None

    def vjp(self, point: Any, w: Any) -> Any:
        key = (id(point), w.handle, w.stateGet())
        if self.last is None or self.last[0] != key:
            self.last = (key, super().vjp(point, w), point)
        return self.last[1]


class OracleShell(JacobianShell):
    """A shell that PETSc's adjoints may duplicate and add up with."""

    def duplicate(self, mat: Any, copy: Any) -> Any:
        """Return what TSDIRK duplicates the Jacobian for: that of the explicit part it has not."""
        (rows, _), (columns, _) = mat.getSizes()
        return shell_matrix(Zero(), rows, columns, mat.getComm())

    def multTransposeAdd(self, mat: Any, x: Any, v: Any, y: Any) -> None:
        """y = v + A^T x."""
        added = v.copy()
        self.multTranspose(mat, x, y)
        y.axpy(1.0, added)


class Zero:
    """A zero matrix."""

    def zeroEntries(self, mat: Any) -> None:
        """Nothing to do."""

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = 0."""
        y.set(0.0)

    def multTransposeAdd(self, mat: Any, x: Any, v: Any, y: Any) -> None:
        """y = v."""
        if v.handle != y.handle:
            v.copy(y)


class ParameterShell:
    """The matrix ``factor dg/dp`` at a point, with one column.

    PETSc adds up ``mu += weight * (dg/dp)^T x`` with a weight that only it knows. The product here
    says 1, so that mu then holds the weight; the gradients stay in torch.
    """

    def __init__(self, oracle: TSAdjoint, factor: float) -> None:
        self.oracle, self.factor = oracle, factor
        self.point: Point | None = None

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """Take the product and ask for its weight."""
        self.oracle.collect()
        product = self.oracle.bridge.vjp(self.point, x)
        if product is not None:
            self.oracle.waiting = (product.parameters, self.factor)
        y.set(1.0)


class TSAdjoint(AdjointStepper):
    """A TS that steps backwards, as :class:`pnode.adjoint.stepper.AdjointStepper`."""

    def __init__(self, settings: Any, options: Any, parameters: bool) -> None:
        super().__init__(settings, parameters)
        self.options = options = copy(options)
        options.setup = lambda ts: None  # so that each stage has a vector of its own
        method, comm, size = settings.method, settings.comm, settings.size
        self.bridge = OracleBridge(points=4)
        # TSAdjoint wants the Jacobian at each stage.
        exact = replace(settings.jacobian_options, reuse="iteration")
        own = settings = replace(settings, jacobian_options=exact)
        if method.implicit and settings.jacobian != "matrix-free":
            # Products with the Jacobian come from VJPs; the matrix serves the transposed solves.
            given = replace(settings.jacobian_options, preconditioner=settings.jacobian)
            own = replace(settings, jacobian="matrix-free", jacobian_options=given)
        self.ts = build_ts(own, options, self.bridge, shell=OracleShell)
        self.explicit = OracleShell(self.bridge)
        if not method.implicit or settings.form == "imex":
            shell = shell_matrix(self.explicit, size, size, comm)
            self.ts.setRHSJacobian(self._rhs_jacobian, shell, shell)
        self.lam, self.weight = vectors.create(comm, size), vectors.create(comm, 1)
        if parameters and method.implicit:
            matrix = shell_matrix(ParameterShell(self, -1.0), size, 1, comm)
            self.ts.setIJacobianP(self._implicit_parameters, matrix)
        if parameters and (not method.implicit or settings.form == "imex"):
            matrix = shell_matrix(ParameterShell(self, 1.0), size, 1, comm)
            self.ts.setRHSJacobianP(self._rhs_parameters, matrix)
        self.ts.setCostGradients(self.lam, self.weight if parameters else None)
        self.ts.setSaveTrajectory()  # TSAdjointSetUp wants a trajectory object to look at
        self.ts.adjointSetUp()
        self.ts.removeTrajectory()
        stages = stage_vectors(self.ts)
        self.midpoint = method.ts_type == "theta"
        if self.midpoint:  # PETSc recovers the start from stage and end
            stages.append(self.ts.getSolution())
        self.vectors = stages[:-1] if method.fsal else stages
        self.waiting: Any = None

    def _rhs_jacobian(self, ts: Any, s: float, u: Any, a: Any, p: Any) -> None:
        part = self.field.explicit or self.field
        point = self.bridge.point_at(self.bridge.stage_time(s), vectors.copy_out(u), part=part)
        self.explicit.move_to(point, 0.0, 1.0)

    def _rhs_parameters(self, ts: Any, s: float, u: Any, a: Any) -> None:
        a.getPythonContext().point = self.explicit.point

    def _implicit_parameters(
        self, ts: Any, s: float, u: Any, u_dot: Any, shift: float, a: Any
    ) -> None:
        a.getPythonContext().point = self.bridge.point(self.bridge.stage_time(s), u, u_dot)

    def begin(self, field: Any, batch: tuple[int, ...] = ()) -> None:
        assert not batch, "TSAdjoint takes one cotangent"
        self.options.begin_sweep(self)
        self.bridge.attach(field)
        self.field = field
        self.lam.set(0.0)
        self.weight.set(0.0)
        self.gradients: list[torch.Tensor | None] = [None] * len(field.parameters)
        self.waiting = None

    def end(self) -> None:
        self.options.end_sweep(self)
        self.bridge.detach()
        del self.field

    def load(self, checkpoint: Checkpoint, graphs: Any = None, evidence: Any = ()) -> None:
        self.checkpoint = checkpoint

    def add(self, cotangent: torch.Tensor) -> None:
        vectors.copy_in(self.lam, vectors.copy_out(self.lam) + cotangent)

    def step(self, step: Any, ledger: Any) -> None:
        ts, states = self.ts, self.checkpoint.stages
        nodes = self.settings.method.scheme.nodes
        self.bridge.begin_stages((step.start, step.end, *map(step.at, nodes)))
        if self.midpoint:
            slope = self.field.rhs(step.at(0.5), states[0].clone())
            ledger.rhs -= 1  # not TSAdjoint's
            states = (*states, states[0] + 0.5 * step.length * slope)
        for vector, tensor in zip(self.vectors, states, strict=True):
            vectors.copy_in(vector, tensor)
        ts.setTime(step.end)
        ts.setTimeStep(-step.length)
        ts.setStepNumber(step.index + 1)
        failure = None
        try:
            ts.adjointStep()
        except PETSc.Error as error:
            failure = error
        raise_stored(self.bridge, failure, self._where(step))
        if failure is not None:
            raise failure
        ledger.steps += 1

    def collect(self) -> None:
        """Add the last product with the weight that PETSc has given it since."""
        if self.waiting is not None:
            terms, factor = self.waiting
            weight = factor * float(self.weight.array_r[0])
            accumulate(self.gradients, [None if one is None else one * weight for one in terms])
            self.weight.set(0.0)
            self.waiting = None

    def state_gradient(self) -> torch.Tensor:
        return vectors.copy_out(self.lam)

    def is_finite(self) -> bool:
        return vectors.is_finite(self.state_gradient())

    def parameter_gradients(self, count: int) -> list[torch.Tensor | None]:
        self.collect()
        return list(self.gradients) if self.wants_parameters else [None] * count

    def destroy(self) -> None:
        self.ts.destroy()

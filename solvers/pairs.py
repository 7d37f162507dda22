"""Linear systems of a state and its tangents, solved with the factors of the state's own.

The matrix of the pair (see :mod:`pnode.derivatives.tangents`) is block lower triangular::

    | A           |         A = shift dF/du_dot - dg/du  of the state,
    | C_1  A      |         C_k = the derivative of the k-th tangent's equation by the state:
    | ...     A   |         a product with the pair's own graph

so that a solve with it is one solve with A for the state and each tangent, whatever A is: dense,
sparse, blocks, or products alone with a preconditioner. Integrals
(:mod:`pnode.sweeping.integrals`) have the matrix ``shift`` instead of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnode.base.devices import HOST, Place
from pnode.base.options import PETSc
from pnode.base.vectors import REAL, copy_in, copy_out, create, view
from pnode.field.linearization import Linearization
from pnode.field.pair_parts import PartLinearization, integrands_by_state
from pnode.field.vectorfield import vector_field
from pnode.layout.pair_layout import PairLayout
from pnode.solvers.linear.assembly import Assembly
from pnode.solvers.linear.block import block_lu
from pnode.solvers.linear.direct import DirectSolves
from pnode.solvers.linear.given_solves import GivenSolve
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.shells import JacobianShell, shell_matrix

__all__ = [
    "LINEAR", "PAIR_SOLVE", "PairAssembly", "PairConvergence", "PairMatrix", "PairOptions",
    "PairSolve", "create_matrices",
]  # fmt: skip

PAIR_SOLVE = f"{__name__}.PairSolve"
_PREFIX = "pnode_tangent_solve_"
# PETSc's divergence tolerance of residuals (SNESSetDivergenceTolerance).
_DIVERGED = 1e4
#: What of PETSc's options belongs to linear systems.
LINEAR = ("ksp_", "pc_", "sub_", "mat_")


@dataclass(frozen=True)
class PairOptions:
    """How the state's own systems are solved.

    Attributes
    ----------
    layout : PairLayout
        How the state and its tangents make one state.
    jacobian : str
        Of the state: see ``IntegratorSettings``.
    options : JacobianOptions
        Of the state.
    linear_solver : tuple
        PETSc's options, names and values.
    """

    layout: PairLayout
    jacobian: str
    options: Any
    linear_solver: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, layout: PairLayout, own: Any, options: dict[str, Any]) -> PairOptions:
        """Return those of a state with settings ``own``, and PETSc's options of its systems."""
        linear = sorted((k, v) for k, v in options.items() if k.startswith(LINEAR))
        return cls(layout, own.jacobian, own.jacobian_options, tuple(linear))


def create_matrices(
    assembly: Assembly | None,
    shell: JacobianShell | None,
    size: int,
    comm: Any,
    place: Place = HOST,
) -> tuple[Any, Any]:
    """Return the operator, ``shell`` if any, and the matrix to precondition with. Collective."""
    matrix = None if assembly is None else assembly.create(size, comm)
    operator = matrix if shell is None else shell_matrix(shell, size, size, comm, place)
    return operator, operator if matrix is None else matrix


class PairMatrix:
    """Python context of a pair's matrix.

    Parameters
    ----------
    layout : PairLayout
        Of the pair.
    ksp : PETSc.KSP
        Solves with A.
    own : Linearizer
        Where products with A leave their exceptions.
    vectors : sequence of PETSc.Vec
        Two, for these systems.
    """

    def __init__(
        self, layout: PairLayout, ksp: Any, own: Linearizer, vectors: Sequence[Any]
    ) -> None:
        self.layout = layout
        self.ksp = ksp
        self._own = own
        self._b, self._x = vectors
        self._shift, self._factor = 0.0, 1.0
        self._direct, self._converged, self._judge = block_lu(ksp), True, DirectSolves()
        self.forget()

    @property
    def bridge(self) -> Linearizer:
        """Of the solve under way."""
        assert self._bridge is not None
        return self._bridge

    @property
    def step(self) -> float:
        """What the integrals have on the diagonal."""
        return self._shift * self._factor

    def forget(self) -> None:
        """Let go of the user's objects."""
        self._bridge: Linearizer | None = None
        self._linearization: Linearization | None = None
        self._driven: torch.Tensor | None = None  # derivatives of few integrands by the state

    def move_to(
        self, bridge: Linearizer, linearization: Linearization, driven: torch.Tensor | None,
        shift: float,
    ) -> None:  # fmt: skip
        """Stand at a point, with derivatives of few integrands; exceptions go to ``bridge``."""
        self._bridge, self._linearization = bridge, linearization
        self._shift, self._factor = shift, 1.0
        self._driven = driven

    def stand_at(self, shift: float) -> None:
        """Stand at another shift, which A was brought to."""
        self._shift, self._factor = shift, 1.0
        self.ksp.setOperators(*self.ksp.getOperators())

    def scale(self, mat: Any, factor: float) -> None:
        """A = factor A."""
        self._factor *= factor

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        self._guarded("jvp", self._product, x, y)

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        self._guarded("vjp", self._transposed, x, y)

    def solved(self, x: Any, y: Any, transposed: bool) -> bool:
        """y = A^-1 x, or A^-T x; False if a solve failed."""
        self._converged = True
        event = "vjp" if transposed else "jvp"
        self._guarded(event, lambda b: self.solve(b, transposed), x, y)
        return self._converged

    def _guarded(self, event: str, function: Any, x: Any, y: Any) -> None:
        """y = function(x), or x once something has failed: filler until the step is over."""
        found = None
        if self._bridge is not None:
            found = self._bridge.guarded(event, function, copy_out(x))
        copy_in(y, view(x) if found is None else found)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        point = self._linearization
        assert point is not None
        return self._factor * point.jvp(x.to(point.dtype), -1.0, self._shift).to(REAL)

    def _transposed(self, x: torch.Tensor) -> torch.Tensor:
        point = self._linearization
        assert point is not None
        found = point.vjp(x.to(point.dtype))
        rate = x if found.rate is None else found.rate.to(REAL)
        return self._factor * (self._shift * rate - found.state.to(REAL))

    def solve(self, b: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return the solution of a system with the matrix, or its transpose."""
        first, *others = self.layout.parts(b)
        integral, step = self.layout.integral(b), self.step
        if self._driven is not None and not transposed:
            state = self._solve(first, False)
            moved = torch.mv(self._driven, state)
            return torch.cat([state, integral.add(moved, alpha=self._factor).div_(step)])
        zero = torch.zeros_like(first)
        if not transposed:
            state = self._solve(first, False)
            nothing = torch.zeros_like(integral)
            product = self._product(self.layout.join([state, *(zero for _ in others), nothing]))
            pairs = zip(others, self.layout.parts(product)[1:], strict=True)
            found = [self._solve(right - part, False) for right, part in pairs]
            integral = (integral - self.layout.integral(product)) / step
            return self.layout.join([state, *found, integral])
        found = [self._solve(right, True) for right in others]
        integral = integral / step
        if self._driven is not None:
            right = first + self._factor * (integral @ self._driven)
            return self.layout.join([self._solve(right, True), integral])
        moved = self._transposed(self.layout.join([zero, *found, integral]))
        first = first - self.layout.parts(moved)[0]
        return self.layout.join([self._solve(first, True), *found, integral])

    def _solve(self, right: torch.Tensor, transposed: bool) -> torch.Tensor:
        found = None
        if self._direct is not None:
            self.ksp.setUp()
            found = self._direct.solve(right, transposed)
        if found is None:
            copy_in(self._b, right)
            (self.ksp.solveTranspose if transposed else self.ksp.solve)(self._b, self._x)
            error = self._own.take_exception()
            if error is not None:
                raise error
            good = self._judge.mend(self.ksp, self._b, self._x, transposed, self._own.ranks)
            self._converged = self._converged and good and self.ksp.getConvergedReason() >= 0
            found = copy_out(self._x)
        return found if self._factor == 1.0 else found / self._factor


class PairSolve:
    """Python context of a preconditioner: solves with a :class:`PairMatrix`."""

    def setUp(self, pc: Any) -> None:
        """Take over the matrix."""
        self._matrix: PairMatrix = pc.getOperators()[1].getPythonContext()

    def apply(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-1 x."""
        self._apply(pc, x, y, False)

    def applyTranspose(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-T x."""
        self._apply(pc, x, y, True)

    def _apply(self, pc: Any, x: Any, y: Any, transposed: bool) -> None:
        solved = self._matrix.solved(x, y, transposed)
        reasons = PETSc.PC.FailedReason
        pc.setFailedReason(reasons.NOERROR if solved else reasons.SUBPC_ERROR)


class PairConvergence:
    """When Newton's method has converged: by the state, and by each tangent, but no integral.

    PETSc's test (SNESConvergedDefault) of each part by itself, since they have scales of their own.

    Parameters
    ----------
    layout : PairLayout
        The parts.
    """

    def __init__(self, layout: PairLayout) -> None:
        self._layout = layout
        self._first: list[float] = []

    def __call__(self, snes: Any, iteration: int, norms: Any) -> Any:
        """Return PETSc's reason, or None to go on."""
        reasons = PETSc.SNES.ConvergedReason
        if not norms[2] < 1e300:
            return reasons.DIVERGED_FUNCTION_NANORINF
        rtol, atol, stol, _ = snes.getTolerances()
        residuals = self.norms(snes, snes.getFunction()[0])
        if not iteration:
            self._first = residuals
            # Integrals of a state at rest have changed all the same.
            return reasons.CONVERGED_FNORM_ABS if norms[2] <= atol else None
        limits = [max(atol, rtol * first) for first in self._first]
        small = [residual <= limit for residual, limit in zip(residuals, limits, strict=True)]
        if not all(small):
            sizes = self.norms(snes, snes.getSolution())
            updates = self.norms(snes, snes.getSolutionUpdate())
            small = [
                known or update < stol * size
                for known, update, size in zip(small, updates, sizes, strict=True)
            ]
        if all(small):
            self._correct(snes)
            return reasons.CONVERGED_SNORM_RELATIVE
        diverged = sum(residuals) > _DIVERGED * sum(self._first)
        return reasons.DIVERGED_DTOL if diverged else None

    def _correct(self, snes: Any) -> None:
        """Let the integrals be those of the state as it is now: their equations are linear."""
        if self._layout.integrals:
            matrix = snes.getJacobian()[1].getPythonContext()
            solution, residual = snes.getSolution(), snes.getFunction()[0]
            u = self._layout.corrected(view(solution), view(residual), matrix.step)
            copy_in(solution, u)
            bridge = matrix.bridge
            if bridge.noted is not None and not bridge.field.has_rhs:  # F has another value there
                snes.computeFunction(solution, residual)
            else:
                bridge.note_again(u)

    def norms(self, owner: Any, vector: Any) -> list[float]:
        """Return the norm of each part, over all ranks. Collective."""
        found = [float(torch.linalg.vector_norm(part)) for part in self._layout.parts(view(vector))]
        if owner.comm.size > 1:
            found = np.sqrt(owner.comm.tompi4py().allreduce(np.square(found))).tolist()
        return found


class PairAssembly(Assembly):
    """The state's matrix, and the graph of the pair.

    Parameters
    ----------
    options : PairOptions
        How to solve.
    own : Assembly or None
        Of the state's matrix; None for products alone.
    place : Place
        Where the state lives.
    """

    def __init__(self, options: PairOptions, own: Assembly | None, place: Place = HOST) -> None:
        super().__init__(place)
        self._options = options
        self._own = own
        self._bridge = Linearizer(points=1)
        self._shell = JacobianShell(self._bridge) if options.jacobian == "matrix-free" else None
        self._context: Any = None
        self._attached: Any = None

    def create(self, size: int, comm: Any) -> Any:
        """Return a python matrix."""
        layout, place = self._options.layout, self._place
        matrices = create_matrices(self._own, self._shell, layout.size, comm, place)
        self._matrices = matrices
        ksp = PETSc.KSP().create(comm)
        ksp.setOptionsPrefix(_PREFIX)
        ksp.setOperators(*matrices)
        options = PETSc.Options(_PREFIX)
        for name, value in self._options.linear_solver:
            options[name] = value
        ksp.setFromOptions()
        for name, _ in self._options.linear_solver:
            del options[name]
        given = self._options.options.preconditioner
        if isinstance(given, GivenSolve):
            given.install(ksp, layout.size, dict(self._options.linear_solver).get("pc_type"))
        vectors = [create(comm, layout.size, place) for _ in range(2)]
        self._context = PairMatrix(layout, ksp, self._bridge, vectors)
        return shell_matrix(self._context, size, size, comm, place)

    def residual_norm(self, snes: Any) -> float:
        """Return the norm of the state's own part of the residual. Collective."""
        return PairConvergence(self._options.layout).norms(snes, snes.getFunction()[0])[0]

    def forget(self) -> None:
        """Let go of the user's objects."""
        self._bridge.detach()
        self._attached = None
        if self._context is not None:
            self._context.forget()

    def evaluate(self, bridge: Linearizer, point: Point, check: bool) -> Any:
        """Return the graph at a point, and what the state's own assembly evaluates there."""
        pair = bridge.linearize(point)
        if self._attached is not bridge.field:
            self._attached = bridge.field
            base = bridge.field.problem.base
            assert base is not None
            self._bridge.attach(vector_field(base, bridge.field.ledger))
        parts = self._options.layout.parts
        u_dot = None if point.u_dot is None else parts(point.u_dot)[0].clone()
        own = self._bridge.point_at(point.s, parts(point.u)[0].clone(), u_dot)
        if own.linearization is None:
            shared = self._bridge.field.shared
            own.linearization = PartLinearization.of(pair, self._options.layout, shared)
        values = None if self._own is None else self._own.evaluate(self._bridge, own, check)
        driven = integrands_by_state(pair, self._options.layout, own.linearization)
        return bridge, pair, driven, own, values

    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Put what was evaluated into the matrices."""
        operator, preconditioner = self._matrices
        found = None
        if values is not None:  # of a field that has not failed
            bridge, pair, driven, own, found = values
            if self._shell is not None:
                self._shell.move_to(own, shift, -1.0)
                operator.assemble()
            matrix.getPythonContext().move_to(bridge, pair, driven, shift)
        if self._own is not None:
            self._own.form(preconditioner, found, shift)
        self._context.ksp.setOperators(*self._matrices)
        matrix.assemble()
        matrix.stateIncrease()

"""What a TS is set up with: its settings, and the PETSc options that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pnode.base.devices import HOST, Place
from pnode.base.options import PETSc
from pnode.problems.step_controllers import DEADBEAT, PID, Norm, controller_options
from pnode.problems.tolerances import Resolved
from pnode.solvers.linear.block import BLOCK_LU
from pnode.solvers.linear.given_solves import GivenSolve
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.pairs import PAIR_SOLVE

__all__ = ["DENSE_LIMIT", "IntegratorSettings", "default_options", "without_structure"]

# Above this size "auto" stops assembling Jacobians: n batched backward passes and an n^3 / 3
# factorization then cost more than a few tens of Krylov iterations.
DENSE_LIMIT = 256


@dataclass(frozen=True)
class IntegratorSettings:
    """Everything that a TS depends on, besides the options.

    Attributes
    ----------
    method : Method
        Row of the table.
    size : int
        Local number of entries of the state.
    dtype : torch.dtype
        Precision of the vector field, which limits what Newton's method can reach.
    adaptive : bool
        Whether PETSc's step-size controller is on.
    rtol, atol : float or EntrywiseTolerance
        Tolerances of the controller.
    max_step : float
        Largest step.
    jacobian : {"matrix-free", "dense", "block", "sparse"}
        How an implicit method gets its Jacobian.
    jacobian_options : JacobianOptions
        How it is preconditioned and reused.
    form : {"rhs", "imex", "mass", "imex_mass", "residual"}
        Form of the problem.
    controller : str or PID
        Who chooses the steps; see :mod:`pnode.controllers`.
    norm : str or callable
        Of their errors.
    split : int
        Entries of the positions, the first part of the state of a symplectic method.
    integrals : int
        Entries at the end of the state that nothing depends on, and Newton's method ignores.
    distribution : int
        Fingerprint of the sizes on all ranks.
    graphs : object or None
        Compiled steps, see :mod:`pnode.solvers.compiled`.
    place : Place
        Where the state lives.
    watched : bool
        Whether PETSc's monitors look at the steps.
    comm : object
        Communicator.
    """

    method: Method
    size: int
    dtype: torch.dtype
    adaptive: bool = False
    rtol: Resolved = 1e-6
    atol: Resolved = 1e-8
    max_step: float = math.inf
    jacobian: str = "dense"
    jacobian_options: JacobianOptions = field(default_factory=JacobianOptions)
    form: str = "rhs"
    controller: str | PID = "basic"
    norm: Norm = "rms"
    split: int = 0
    integrals: int = 0
    distribution: int = 0
    graphs: Any = None
    place: Place = HOST
    watched: bool = True
    comm: Any = field(default_factory=lambda: PETSc.COMM_SELF, compare=False)

    @property
    def parallel(self) -> bool:
        """Whether several ranks share the state."""
        return bool(self.comm.size > 1)

    @property
    def rule(self) -> PID:
        """How pnode itself chooses adaptive steps."""
        return self.controller if isinstance(self.controller, PID) else DEADBEAT

    @property
    def judged(self) -> bool:
        """Whether it is pnode that accepts adaptive steps of PETSc's and chooses the next."""
        return self.adaptive and (isinstance(self.controller, PID) or callable(self.norm))


def without_structure(settings: IntegratorSettings) -> IntegratorSettings:
    """Return settings that do not rest on a structure of the Jacobian that was only found."""
    more = settings.jacobian_options
    if not more.found:
        return settings
    more = replace(more, found=False, pattern=None, samples=1)
    return replace(settings, jacobian="matrix-free", jacobian_options=more)


def default_options(
    method: Method,
    adaptive: bool,
    jacobian: str,
    dtype: torch.dtype,
    adjoint: bool = False,
    controller: str | PID = "basic",
    more: JacobianOptions | None = None,
    ranks: int = 1,
    norm: Norm = "rms",
) -> dict[str, Any]:
    """PETSc options that pnode sets unless the user does.

    Newton's tolerances: convergence is quadratic, so the step test ``snes_stol`` leaves an error
    of its square, or what the precision of f leaves; the residual test serves Krylov methods, and
    linear equations, whose first iteration leaves round-off (see ``TimeIntegrator``). A transposed
    solve has no outer iteration to correct it, so its Krylov tolerance is the accuracy of the
    gradient. Nor has a Rosenbrock stage one.

    Among several ranks a sparse matrix is factored by the part of each: exactly, if the ranks'
    parts do not know of one another; a preconditioner for GMRES if they share ghost cells.

    Newton's steps are taken in full: PETSc's backtracking judges a step by the norm of the stiff
    residual, and can cut good steps to a tenth for tens of iterations. It is the second attempt
    where full steps fail (see ``TimeIntegrator.attempt``).
    """
    options = controller_options(controller, norm) if adaptive else controller_options("none")
    if not method.implicit:
        return options
    double = dtype is torch.float64
    more = more or JacobianOptions()
    constant = more.reuse == "constant"
    linear = method.linearly_implicit or constant
    # With an old Jacobian a step test leaves a tenth of the step, not its square.
    old = (more.reuse in ("auto", "step", "solve") and jacobian != "matrix-free") or method.coupled
    if not linear:
        if double:
            rtol, stol = 1e-13 if old else 1e-11, 1e-12 if old else 1e-10
        else:
            rtol, stol = 1e-7 if old else 1e-6, 1e-6 if old else 1e-5
        if not (method.solves_to_tolerance and adaptive):  # see ModifiedNewton
            options |= {"snes_rtol": rtol, "snes_stol": stol}
    if not method.linearly_implicit:
        options["snes_linesearch_type"] = "basic"
    if constant:
        options["snes_type"] = "ksponly"
    iterative = jacobian == "matrix-free" or more.exchange is not None
    if not iterative:
        options["ksp_type"] = "preonly"
    else:
        tight, loose = (1e-12, 1e-5) if double else (1e-6, 1e-3)
        if method.multistep and adaptive:
            loose = 1e-3  # the rate that Newton observes includes it
        options |= {
            "ksp_type": "fgmres" if isinstance(more.preconditioner, GivenSolve) else "gmres",
            "ksp_gmres_restart": 100,
            "ksp_rtol": tight if adjoint or linear else loose,
        }
    assembled = more.assembled(jacobian)
    options["pc_type"] = {None: "none", "block": "python", "pair": "python"}.get(assembled, "lu")
    if assembled == "sparse" and (ranks > 1 or more.exchange is not None):
        options["pc_type"] = "bjacobi"
        options["sub_pc_type"] = "lu" if more.exchange is None else "ilu"
    if assembled == "block":
        options["pc_python_type"] = BLOCK_LU
    if assembled == "pair":
        options["pc_python_type"] = PAIR_SOLVE
    return options

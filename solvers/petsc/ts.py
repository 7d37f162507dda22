"""Makes a TS for one method, size and kind of Jacobian, and refuses options that undo them."""

from __future__ import annotations

from typing import Any

from pnode.base import vectors
from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc, SolverOptions
from pnode.solvers.linear.direct import judge
from pnode.solvers.linear.given_solves import GivenSolve
from pnode.solvers.linear.jacobians import Jacobian, create_assembly
from pnode.solvers.linear.shells import JacobianShell
from pnode.solvers.methods import Method
from pnode.solvers.pairs import PairConvergence, create_matrices
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.library import (
    register,
    set_subtype,
    share_stage_vector,
    ssp_stages,
    subtype,
)
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.petsc.tolerances import tolerance
from pnode.solvers.petsc.user_setup import call_user

__all__ = ["build_ts"]

# TSStep wants a final time; ours is kept by the driver.
_FOREVER = 1e300
_FACTORIZATIONS = ("lu", "ilu", "cholesky", "icc")


def build_ts(
    settings: IntegratorSettings,
    options: SolverOptions,
    bridge: Bridge,
    shell: type[JacobianShell] = JacobianShell,
    forward: bool = False,
) -> Any:
    """Create and configure a TS. Collective on ``settings.comm``.

    Parameters
    ----------
    settings : IntegratorSettings
        What to build.
    options : SolverOptions
        Options it reads.
    bridge : Bridge
        Its callbacks.
    shell : type
        Of products with the Jacobian, without a matrix.
    forward : bool
        Whether it steps; else its KSP solves for an adjoint.
    """
    method, size, comm, place = settings.method, settings.size, settings.comm, settings.place
    if method.own is not None and not method.coupled:
        register(method.subtype, method.order, method.own)
    ts = PETSc.TS().create(comm=comm)
    ts.setType(method.ts_type)
    if method.multistep or method.coupled:  # a carrier of callbacks: pnode takes the steps
        ts.setPythonContext(object())
    if method.ts_type == "rk":
        ts.setRKType(method.subtype)
    elif method.ts_type == "dirk":
        ts.setDIRKType(method.subtype)
    elif method.ts_type == "arkimex":
        ts.setARKIMEXType(method.subtype)
    elif method.subtype:
        set_subtype(ts, method.ts_type, method.subtype, method.stages)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    kinds, stated = PETSc.TS.EquationType, settings.form in ("mass", "residual")
    ts.setEquationType(kinds.IMPLICIT if stated else kinds.ODE_EXPLICIT)
    work = vectors.create(comm, size, place)
    if method.implicit:
        ts.setIFunction(bridge.implicit_function, work)
        _set_jacobian(ts, settings, bridge, shell)
    if not method.implicit or settings.form.startswith("imex"):
        bridge.set_rhs_function(ts, work)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.setMaxTime(_FOREVER)
    ts.setTolerances(
        rtol=tolerance(settings, settings.rtol), atol=tolerance(settings, settings.atol)
    )
    ts.setSolution(vectors.create(comm, size, place))
    ts.setTimeStep(1.0)
    options.apply(ts)
    if method.implicit:
        _refuse_other_preconditioner(settings, options)
        if not method.coupled:
            _prepare_linear_solver(ts, settings, options)
    if settings.jacobian_options.pair is None:
        call_user(ts, method, options)
    _refuse_other_type(ts, method)
    # One ts.step() is one attempt: the length of every accepted step is then known exactly.
    ts.setMaxStepRejections(0)
    ts.setMaxSNESFailures(1)
    ts.setErrorIfStepFails(False)
    if settings.adaptive:
        # The smallest step is ours to enforce: PETSc accepts bad steps at its own minimum.
        ts.setStepLimits(1e-290, min(settings.max_step, ts.getStepLimits()[1]))
    ts.removeTrajectory()
    options.set_up(ts)
    if forward and method.implicit and ts.getSNES().getType() == "ksponly":
        judge(ts, bridge)
    if method.ts_type == "rk" and options.setup is None:  # whose callbacks may look at all
        share_stage_vector(ts)
    return ts


def _set_jacobian(
    ts: Any, settings: IntegratorSettings, bridge: Bridge, shell: type[JacobianShell]
) -> None:
    """Give an implicit TS its matrices, and the bridge what fills them."""
    method, more, place = settings.method, settings.jacobian_options, settings.place
    assembly = create_assembly(settings.jacobian, more, place)
    matrix_free, reuse = settings.jacobian == "matrix-free", more.reuse
    if (method.multistep or method.linearly_implicit) and reuse != "constant":
        reuse = "iteration"  # when to evaluate is part of these methods
    bridge.jacobian = Jacobian(assembly, reuse, matrix_free, more.found)
    bridge.jacobian.straying.watched = bridge.jacobian.reused and not settings.adaptive
    context = shell(bridge) if matrix_free else None
    matrices = create_matrices(assembly, context, settings.size, settings.comm, place)
    ts.setIJacobian(bridge.implicit_jacobian, *matrices)
    if more.pair is not None:
        ts.getSNES().setConvergenceTest(PairConvergence(more.pair.layout))


def _prepare_linear_solver(ts: Any, settings: IntegratorSettings, options: SolverOptions) -> None:
    """Let the KSP read its options, which SNES would do at its first solve, and add what none has.

    Of a DM it is the preconditioner's to use, for multigrid: the matrices are pnode's.
    """
    ksp, more = ts.getSNES().getKSP(), settings.jacobian_options
    with options.inserted():
        ksp.setFromOptions()
    if isinstance(more.preconditioner, GivenSolve) and more.pair is None:
        more.preconditioner.install(ksp, settings.size, options.values.get("pc_type"))
    dm = getattr(more.exchange, "dm", None)
    if dm is not None and more.pair is None:
        ksp.setDM(dm)
        kinds = getattr(PETSc.KSP, "DMActive", None)  # of a new PETSc
        ksp.setDMActive(*(() if kinds is None else (kinds.ALL,)), False)


def _refuse_other_type(ts: Any, method: Method) -> None:
    """Refuse options that change the method behind the table's back."""
    if ts.getType() != method.ts_type:
        raise ConfigurationError(
            f"the option ts_type={ts.getType()!r} contradicts method={method.name!r}: choose the "
            "method with method="
        )
    if not method.subtype:
        return
    subtypes = {"rk": ts.getRKType, "dirk": ts.getDIRKType, "arkimex": ts.getARKIMEXType}
    get = subtypes.get(method.ts_type, lambda: subtype(ts, method.ts_type))
    if get() != method.subtype:
        raise ConfigurationError(
            f"the option ts_{method.ts_type}_type={get()!r} contradicts "
            f"method={method.name!r}: choose the method with method="
        )
    if method.ts_type == "ssp" and ssp_stages(ts) != method.stages:
        raise ConfigurationError(
            f"the option ts_ssp_num_stages={ssp_stages(ts)} contradicts method={method.name!r}, "
            f"which has {method.stages} stages: choose the method with method="
        )


def _refuse_other_preconditioner(settings: IntegratorSettings, options: SolverOptions) -> None:
    """Refuse preconditioners that the matrix at hand does not offer."""
    chosen = options.values.get("pc_type")
    assembled = settings.jacobian_options.assembled(settings.jacobian)
    if chosen in _FACTORIZATIONS and assembled is None:
        raise ConfigurationError(
            f"pc_type={chosen!r} (linear_solver='lu'?) needs a matrix to factor, and "
            "jacobian='matrix-free' has none: use jacobian='dense' or 'sparse', or give a "
            "preconditioner"
        )
    package = options.values.get("pc_factor_mat_solver_type")
    if chosen in _FACTORIZATIONS and assembled == "sparse" and settings.parallel and not package:
        raise ConfigurationError(
            f"pc_type={chosen!r} (linear_solver='lu'?) factors the matrix of one process, and this "
            f"one lies on {settings.comm.size}: drop it (each rank then factors its own part), or "
            "name a parallel package that your PETSc has, "
            "petsc_options={'pc_factor_mat_solver_type': 'mumps'}"
        )
    if assembled == "block" and chosen not in ("python", "none"):
        raise ConfigurationError(
            f"pc_type={chosen!r} needs a matrix of PETSc's, and the blocks of independent samples "
            "come with their own LU: drop pc_type, or use jacobian='sparse'"
        )

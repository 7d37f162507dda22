"""One PETSc TS, set up for one method and one state size, driven step by step."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from pnode import vectors
from pnode.controllers import controller_options
from pnode.devices import HOST, Place
from pnode.errors import (
    ConfigurationError,
    LinearSolveFailed,
    NonFiniteDerivative,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
)
from pnode.evidence import project
from pnode.linearization import Linearization
from pnode.options import PETSc, SolverOptions, failure_reason, log_stage
from pnode.ranks import ALONE, CURABLE
from pnode.solvers.linear.block import BLOCK_LU
from pnode.solvers.linear.jacobians import Jacobian, JacobianOptions, create_assembly
from pnode.solvers.linear.shells import JacobianShell
from pnode.solvers.methods import Method
from pnode.solvers.pairs import PAIR_SOLVE, PairConvergence, create_matrices
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.library import (
    before_each_stage,
    register,
    set_subtype,
    ssp_stages,
    stage_vectors,
    subtype,
)
from pnode.tolerances import Resolved
from pnode.vectorfield import VectorField

__all__ = [
    "SINGULAR",
    "IntegratorSettings",
    "StepOutcome",
    "TimeIntegrator",
    "build_ts",
    "default_options",
]

# Above this size "auto" stops assembling Jacobians: n batched backward passes and an n^3 / 3
# factorization then cost more than a few tens of Krylov iterations.
DENSE_LIMIT = 256
_FLOATING_POINT = 72  # PETSC_ERR_FP
#: PETSC_ERR_MAT_LU_ZRPVT: LAPACK found a dense matrix singular; sparse ones fail the solve.
SINGULAR = 71
# TSStep wants a final time; ours is kept by the driver.
_FOREVER = 1e300
_FACTORIZATIONS = ("lu", "ilu", "cholesky", "icc")


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
    form : {"rhs", "imex", "mass", "residual"}
        Form of the problem.
    controller : str
        Who chooses the steps; see :mod:`pnode.controllers`.
    split : int
        Entries of the positions, the first part of the state of a symplectic method.
    distribution : int
        Fingerprint of the sizes on all ranks.
    graphs : object or None
        Compiled steps, see :mod:`pnode.solvers.compiled`.
    place : Place
        Where the state lives.
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
    controller: str = "basic"
    split: int = 0
    distribution: int = 0
    graphs: Any = None
    place: Place = HOST
    comm: Any = field(default_factory=lambda: PETSc.COMM_SELF, compare=False)

    @property
    def parallel(self) -> bool:
        """Whether several ranks share the state."""
        return bool(self.comm.size > 1)


def default_options(
    method: Method,
    adaptive: bool,
    jacobian: str,
    dtype: torch.dtype,
    adjoint: bool = False,
    controller: str = "basic",
    more: JacobianOptions | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """PETSc options that pnode sets unless the user does.

    Newton's tolerances: convergence is quadratic, so the step test ``snes_stol`` leaves an error
    of its square, or what the precision of f leaves; the residual test serves Krylov methods,
    where convergence is linear. A transposed solve has no outer iteration to correct it, so its
    Krylov tolerance is the accuracy of the gradient. Nor has a Rosenbrock stage one.

    Among several ranks a sparse matrix is factored by the part of each: exactly, if the ranks'
    parts do not know of one another; a preconditioner for GMRES if they share ghost cells.

    Newton's steps are taken in full: PETSc's backtracking judges a step by the norm of the stiff
    residual, and can cut good steps to a tenth for tens of iterations. It is the second attempt
    where full steps fail (see :meth:`TimeIntegrator.attempt`).
    """
    options = controller_options(controller if adaptive else "none")
    if not method.implicit:
        return options
    double = dtype is torch.float64
    more = more or JacobianOptions()
    constant = more.reuse == "constant"
    linear = method.ts_type == "rosw" or constant
    # With an old Jacobian a step test leaves a tenth of the step, not its square.
    old = more.reuse in ("step", "solve") and jacobian != "matrix-free"
    if not linear:
        if method.ts_type == "python" and adaptive:
            pass  # see ModifiedNewton
        elif double:
            options |= {"snes_rtol": 1e-13 if old else 1e-11, "snes_stol": 1e-12 if old else 1e-10}
        else:
            options |= {"snes_rtol": 1e-7 if old else 1e-6, "snes_stol": 1e-6 if old else 1e-5}
    if method.ts_type != "rosw":
        options["snes_linesearch_type"] = "basic"
    if constant:
        options["snes_type"] = "ksponly"
    iterative = jacobian == "matrix-free" or more.exchange is not None
    if not iterative:
        options["ksp_type"] = "preonly"
    else:
        tight, loose = (1e-12, 1e-5) if double else (1e-6, 1e-3)
        if method.ts_type == "python" and adaptive:
            loose = 1e-3  # the rate that Newton observes includes it
        options |= {
            "ksp_type": "gmres",
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


def build_ts(
    settings: IntegratorSettings,
    options: SolverOptions,
    bridge: Bridge,
    shell: type[JacobianShell] = JacobianShell,
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
    """
    method, size, comm = settings.method, settings.size, settings.comm
    place = settings.place
    if method.own is not None:
        register(method.subtype, method.order, method.own)
    ts = PETSc.TS().create(comm=comm)
    ts.setType(method.ts_type)
    if method.ts_type == "python":  # a carrier of callbacks: pnode takes the steps
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
    kinds = PETSc.TS.EquationType
    ts.setEquationType(kinds.ODE_EXPLICIT if settings.form in ("rhs", "imex") else kinds.IMPLICIT)
    work = vectors.create(comm, size, place)
    if method.implicit:
        ts.setIFunction(bridge.implicit_function, work)
        assembly = create_assembly(settings.jacobian, settings.jacobian_options, place)
        matrix_free = settings.jacobian == "matrix-free"
        reuse = settings.jacobian_options.reuse
        if method.ts_type in ("python", "rosw") and reuse != "constant":
            reuse = "iteration"  # when to evaluate is part of these methods
        bridge.jacobian = Jacobian(assembly, reuse, matrix_free)
        context = shell(bridge) if matrix_free else None
        matrices = create_matrices(assembly, context, size, comm, place)
        ts.setIJacobian(bridge.implicit_jacobian, *matrices)
        pair = settings.jacobian_options.pair
        if pair is not None:
            ts.getSNES().setConvergenceTest(PairConvergence(pair.layout))
    if not method.implicit or settings.form == "imex":
        bridge.set_rhs_function(ts, work.duplicate())
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.setMaxTime(_FOREVER)
    ts.setTolerances(
        rtol=_tolerance(settings, settings.rtol), atol=_tolerance(settings, settings.atol)
    )
    ts.setSolution(vectors.create(comm, size, place))
    ts.setTimeStep(1.0)
    options.apply(ts)
    _refuse_other_type(ts, method)
    if method.implicit:
        _refuse_other_preconditioner(settings, options)
    # One ts.step() is one attempt: the length of every accepted step is then known exactly.
    ts.setMaxStepRejections(0)
    ts.setMaxSNESFailures(1)
    ts.setErrorIfStepFails(False)
    if settings.adaptive:
        # The smallest step is ours to enforce: PETSc accepts bad steps at its own minimum.
        ts.setStepLimits(1e-290, min(settings.max_step, ts.getStepLimits()[1]))
    ts.removeTrajectory()
    options.set_up(ts)
    return ts


def _tolerance(settings: IntegratorSettings, tolerance: Resolved) -> Any:
    """Return a tolerance as PETSc takes it: a number or a vector.

    A vector on several ranks, so that one of them can reject a step: see :meth:`_reject`.
    """
    if isinstance(tolerance, float) and not (settings.parallel and settings.adaptive):
        return tolerance
    vector = vectors.create(settings.comm, settings.size, settings.place)
    _fill_tolerance(vector, tolerance)
    return vector


def _fill_tolerance(vector: Any, tolerance: Resolved) -> None:
    values = tolerance if isinstance(tolerance, float) else tolerance.tensor()
    values = torch.as_tensor(values, dtype=vectors.REAL, device=HOST.device)
    vectors.copy_in(vector, values.expand(vector.local_size))


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


@dataclass
class StepOutcome:
    """What one attempt came to.

    Attributes
    ----------
    accepted : bool
        Whether the solution has moved.
    next_step : float
        Step size that the controller proposes.
    error : SolveError or None
        Why not, unless only the error estimate was too large.
    order : int
        What :class:`Step` records of it.
    """

    accepted: bool
    next_step: float
    error: SolveError | None = None
    order: int = 0


class TimeIntegrator:
    """A forward TS, reused from sweep to sweep.

    Parameters
    ----------
    settings : IntegratorSettings
        Method, size and tolerances.
    options : SolverOptions
        PETSc options.

    Attributes
    ----------
    proposes_absolute : bool
        Whether proposed steps do not depend on the length of the last one.
    first_order : int
        Order of the first step.
    """

    proposes_absolute = False

    def __init__(self, settings: IntegratorSettings, options: SolverOptions) -> None:
        self.first_order = settings.method.order
        self.settings = settings
        self.options = options
        method = settings.method
        self.bridge = self._create_bridge()
        self.ts = build_ts(settings, options, self.bridge)
        self.solution = self.ts.getSolution()
        own = method.implicit and method.keeps_stages
        self._kept = stage_vectors(self.ts) if own else []
        self._start = self.solution.duplicate() if settings.adaptive else None
        self._rolled_back = False
        self._starts = method.ts_type == "dirk"
        self._stage_callback = (
            before_each_stage(self.ts, self.bridge.stage_begins)
            if method.ts_type in ("dirk", "arkimex")
            else None
        )
        if self._starts:
            # PETSc solves for DIRK's initial slope from whatever slope it had last.
            self.ts.getSNES().setInitialGuess(self._guess_slope)
        self._backtracks = (
            method.implicit
            and not settings.adaptive
            and options.values.get("snes_linesearch_type") == "basic"
            and "snes_linesearch_type" not in options.given
            and options.values.get("snes_type", "newtonls") == "newtonls"
        )
        #: Where stages are between the ends of a step, in units of its length.
        scheme = method.scheme
        nodes = () if scheme is None or method.ts_type == "rosw" else scheme.nodes
        self._inner = tuple(c for c in nodes if c not in (0.0, 1.0))
        self._iterations = (0, 0)
        self._direction = 1.0
        self._rejecting = False
        self.ranks = ALONE
        if settings.parallel and settings.adaptive:
            self.bridge.reject = weakref.WeakMethod(self._reject)

    def _create_bridge(self) -> Bridge:
        method = self.settings.method
        return Bridge(
            keep=0 if method.implicit else method.stages,
            check=self.settings.adaptive,
        )

    def begin(self, field: VectorField, u: torch.Tensor, s: float, step_index: int = 0) -> None:
        """Begin a sweep, or go on, from state ``u`` at time ``s``. Collective."""
        log_stage("pnode forward").push()
        self.options.begin_sweep(self)
        self.bridge.attach(field)
        self.ranks = field.problem.ranks
        self._direction = field.problem.direction
        vectors.copy_in(self.solution, u)
        self.ts.setTime(s)
        self.ts.setStepNumber(step_index)
        self.ts.restartStep()
        self._rolled_back = False
        self._iterations = (self.ts.getSNESIterations(), self.ts.getKSPIterations())

    @property
    def history(self) -> Any:
        """What the next step needs: the solution (see :meth:`restore`)."""
        return (vectors.copy_out(self.solution),)

    def restore(self, history: Any) -> None:
        """Go on from a history, which an integrator of the same method had. Collective."""
        vectors.copy_in(self.solution, history[0])
        self.ts.restartStep()
        self._rolled_back = False

    def restart_step(self) -> None:
        """Let the next step start afresh, without what the last one has left."""
        self.ts.restartStep()

    def interpolate(self, s: float) -> torch.Tensor:
        """Return the state at a time in the last step by PETSc's interpolant. Collective."""
        result = self.solution.duplicate()
        self.ts.interpolate(min(s, self.ts.getTime()), result)
        return vectors.copy_out(result)

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self.options.end_sweep(self)
        self.bridge.detach()
        log_stage("pnode forward").pop()

    def _guess_slope(self, snes: Any, guess: Any) -> None:
        """Begin the solve for the initial slope from zero: the same bits whatever came before."""
        if self.bridge.start_time is not None:
            guess.set(0.0)

    def iterations(self) -> tuple[int, int]:
        """Newton and Krylov iterations since :meth:`begin`."""
        newton, krylov = self._iterations
        return self.ts.getSNESIterations() - newton, self.ts.getKSPIterations() - krylov

    def attempt(
        self, s: float, step: float, index: int, order: int = 0, end: float | None = None
    ) -> StepOutcome:
        """Try one step from ``s`` of length ``step``. Collective.

        ``order`` is that of the :class:`Step` to be repeated, if any; one-step methods have none.
        ``end`` is where the step ends, if that is not ``s + step`` rounded.

        Returns
        -------
        StepOutcome
            A rejected attempt leaves the solution as it was (adaptive settings only).

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        ts, bridge = self.ts, self.bridge
        ts.setTime(s)
        ts.setTimeStep(step)
        end = s + step if end is None else end
        bridge.begin_stages((s, *(s + c * step for c in self._inner), end))
        if bridge.noted:  # the last stage may be this step's first
            bridge.noted = [note for note in bridge.noted if note.s == s]
        if self._start is not None:
            self.solution.copy(self._start)
        where: dict[str, Any] = {
            "time": self._direction * s, "step": index, "method": self.settings.method.name,
        }  # fmt: skip
        self.ranks.where = where
        if bridge.jacobian is not None:
            bridge.jacobian.begin_step()
        self._step(where)
        error = self._failure(where)
        if self.ranks.parallel and (error is not None or ts.getConvergedReason() < 0):
            error = self._settle(error)
        if error is not None and bridge.jacobian is not None:
            bridge.jacobian.renew()
            if self._start is None and bridge.jacobian.reused and ts.getConvergedReason() < 0:
                error = self._try_newton(s, step, where)
        if self._backtracks and isinstance(error, NonlinearSolveFailed):
            error = self._try_backtracking(s, step, where)
            if self.ranks.parallel and error is not None:
                error = self._settle(error)
        if error is None and ts.getConvergedReason() >= 0:
            self._rolled_back = False
            if self._rejecting:
                self.ranks.fail(SolveError("a step that failed on one rank was accepted", **where))
            return StepOutcome(True, ts.getTimeStep())
        proposed = ts.getTimeStep()
        bridge.nonfinite_time = None
        if self._start is not None:
            # Tell PETSc that its last stage and its history are not to be carried on; it allows
            # that once until a step succeeds.
            if ts.getConvergedReason() >= 0 or not self._rolled_back:
                ts.rollBack()
                self._rolled_back = True
            ts.setStepNumber(index)
            self._start.copy(self.solution)
        return StepOutcome(False, proposed, error)

    def _reject(self) -> None:
        """Make the error estimate of this step too large, by tiny tolerances on this rank.

        The norm that PETSc reduces then rejects the step on all ranks. Not collective.
        """
        if not self._rejecting:
            self._rejecting = True
            for vector, value in zip(self._tolerance_vectors(), (0.0, 1e-100), strict=True):
                _fill_tolerance(vector, value)

    def _tolerance_vectors(self) -> tuple[Any, Any]:
        rtol, atol = self.ts.getTolerances()
        return rtol, atol

    def _settle(self, error: SolveError | None) -> SolveError | None:
        """Agree on why a step failed: all ranks know that it did. Collective.

        Returns
        -------
        SolveError or None
            What a smaller step may cure; None for a step that was only too long.

        Raises
        ------
        PnodeError
            For anything else that failed on one of the ranks.
        """
        if self._rejecting:
            self._rejecting = False
            tolerances = (self.settings.rtol, self.settings.atol)
            for vector, value in zip(self._tolerance_vectors(), tolerances, strict=True):
                _fill_tolerance(vector, value)
        if self.bridge.nonfinite_time is not None:
            self.ranks.fail(self._nonfinite(self.bridge.nonfinite_time))
            self.bridge.nonfinite_time = None
        found = self.ranks.settle(error)
        if found is None or isinstance(found, CURABLE):
            return found
        raise found from found.__cause__

    def _nonfinite(self, at: float | None) -> NonFiniteVectorField:
        found = infinite_derivative(self.bridge, self.ranks.where)
        if found is not None:
            return found
        text = "the vector field returned NaN or infinity" + (
            f" at t = {self._direction * at!r}" if at is not None else ""
        )
        text = f"{text}: check it there, or take smaller steps"
        return NonFiniteVectorField(text, **self.ranks.where)

    def _try_newton(self, s: float, step: float, where: dict[str, Any]) -> SolveError | None:
        """Repeat a failed step with a new Jacobian at each iterate."""
        jacobian = self.bridge.jacobian
        assert jacobian is not None
        jacobian.always = True
        try:
            self.ts.setTime(s)
            self.ts.setTimeStep(step)
            self._step(where)
            return self._failure(where)
        finally:
            jacobian.always = False

    def _try_backtracking(self, s: float, step: float, where: dict[str, Any]) -> SolveError | None:
        """Repeat a failed step with damped Newton steps: a fixed step cannot be made smaller."""
        line_search = self.ts.getSNES().getLineSearch()
        line_search.setType("bt")
        try:
            self.ts.setTime(s)
            self.ts.setTimeStep(step)
            self._step(where)
            return self._failure(where)
        finally:
            line_search.setType("basic")

    def _step(self, where: dict[str, Any]) -> None:
        if self._starts:
            self.bridge.start_time = self.ts.getTime()
        failure: PETSc.Error | None = None
        try:
            self.ts.step()
        except PETSc.Error as error:
            failure = error
        raise_stored(self.bridge, failure, where)
        if failure is not None and failure.ierr == SINGULAR:
            raise LinearSolveFailed(
                "the matrix of a linear solve is singular: take another step size, or choose "
                "another linear_solver",
                reason="zero pivot in LU factorization", **where,
            ) from failure  # fmt: skip
        if failure is not None:
            overflow, at = "", self.bridge.first_nonfinite()
            if failure.ierr == _FLOATING_POINT and at is not None and not self.ranks.parallel:
                raise self._nonfinite(at) from failure
            if failure.ierr == _FLOATING_POINT:
                overflow = (
                    "; an error norm overflows when rtol * |y| + atol is zero or tiny for an entry "
                    "of y, or the Jacobian is not finite"
                )
            raise SolveError(
                f"PETSc could not take this step{overflow}", reason=failure_reason(failure), **where
            ) from failure

    def _failure(self, where: dict[str, Any]) -> SolveError | None:
        """Look for the failures that PETSc reports and for those that it passes over."""
        method = self.settings.method
        if method.implicit and self.ts.getConvergedReason() < 0:
            snes = self.ts.getSNES()
            reason = snes.getConvergedReason()
            if reason < 0:
                return newton_error(snes, where, self.bridge)
        at = self.bridge.first_nonfinite()
        if not self.ranks.parallel:
            finite = math.isfinite(self.solution.norm())
            return self._nonfinite(at) if at is not None or not finite else None
        # What only this rank knows must not change what it does next.
        if not self.settings.adaptive:
            if at is not None or not vectors.is_moderate(vectors.view(self.solution)):
                self.ranks.fail(self._nonfinite(at))
            self.bridge.nonfinite_time = None
        return None

    def checkpoint(self, previous: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...]:
        """Return what the adjoint of the last step needs, as tensors. Not collective.

        Explicit Runge-Kutta: the stages at which f was evaluated, those very tensors, without the
        last where it is the next step's first. Endpoint theta methods: the states at both ends,
        the first of which is the second of ``previous``, the checkpoint of the step before, if
        there is one. Midpoint form: the stage. DIRK and IMEX: the stages, of which the first and
        last are the states at both ends for some.
        """
        method = self.settings.method
        if not method.implicit:
            stages = tuple(self.bridge.evaluated)
            return stages[:-1] if method.fsal else stages
        start, *rest = self._kept
        if previous is not None and method.shares_ends:
            first = previous[-1]
        else:
            first = vectors.copy_out(start)
        return (first, *(vectors.copy_out(vector) for vector in rest))

    def evidence(self) -> tuple[float, ...]:
        """Return what a backward sweep can tell f by, of the last step. Not collective.

        After :meth:`note_values`. Explicit methods: the projections of the values at the stages of
        :meth:`checkpoint`. Rosenbrock methods, which have no stages there: that of the step's end.
        Others: part, time, and the projections of state and value, at each stage.
        """
        method, bridge = self.settings.method, self.bridge
        if method.ts_type == "rosw":
            return (project(vectors.view(self.solution)),)
        if not method.implicit:
            found = tuple(bridge.projections or ())
            whole = len(found) == bridge.evaluated.maxlen
            return (found[:-1] if method.fsal else found) if whole else ()
        return tuple(number for note in bridge.noted or () for number in note)

    def note_values(self) -> None:
        """From now on note what :meth:`evidence` needs."""
        kind = self.options.values.get("snes_type", "newtonls")
        self.bridge.note_values(ends_evaluated=kind == "newtonls")

    def monitor(self, number: int, s: float) -> None:
        """Let PETSc's monitors look at the solution after ``number`` steps. Collective.

        Raises
        ------
        SolveError
            If one of them fails, as where it cannot write.
        """
        try:
            self.ts.monitor(number, s, self.solution)
        except PETSc.Error as failure:
            error = SolveError(
                "a monitor of PETSc's failed: check the options that ask for it",
                reason=failure_reason(failure), time=self._direction * s,
                step=max(number - 1, 0), method=self.settings.method.name,
            )  # fmt: skip
            error.__cause__ = failure
            if not self.ranks.parallel:
                raise error from failure
            self.ranks.fail(error)  # only the rank that writes may know

    def make_graphs(self, wanted: bool) -> None:
        """Say whether f is evaluated with its graph from now on, for :meth:`kept_graphs`."""
        if wanted and self.bridge.graphs is None:
            self.bridge.keep_graphs()
        elif not wanted:
            self.bridge.graphs = None

    def kept_graphs(self) -> tuple[tuple[Linearization, ...], int] | None:
        """Return the graphs at the stages of :meth:`checkpoint`, and the bytes they keep.

        None if they were not made at all of them.
        """
        kept = list(self.bridge.graphs or ())
        if len(kept) < self.settings.method.stages:
            return None
        if self.settings.method.fsal:
            kept = kept[:-1]
        return tuple(kept), len(kept) * self.bridge.graph_bytes

    def destroy(self) -> None:
        """Free the PETSc objects. Collective."""
        self.ts.destroy()


def raise_stored(bridge: Bridge, failure: Any, where: dict[str, Any]) -> None:
    """Raise what the user's code raised during a PETSc call, if anything.

    Parameters
    ----------
    bridge : Bridge
        Keeps exceptions of the callbacks.
    failure : PETSc.Error or None
        What the call itself raised; its cause may be an exception from outside the callbacks'
        guarded part, such as a KeyboardInterrupt.
    where : dict
        Time, step and method, for pnode's own errors.
    """
    exception = bridge.take_exception() or (failure.__cause__ if failure is not None else None)
    if isinstance(exception, SolveError):
        exception = exception.located(**where)
    try:
        if exception is not None:
            raise exception from exception.__cause__
    finally:
        del exception, failure  # the traceback refers to this frame: break the cycle


def infinite_derivative(bridge: Bridge, where: dict[str, Any]) -> NonFiniteDerivative | None:
    """Return the error for a Jacobian that is not finite at the last point, if it is that."""
    s = None if bridge.ranks.parallel else bridge.infinite_derivative()
    if s is None:
        return None
    return NonFiniteDerivative(
        "a derivative of the vector field with respect to y is NaN or infinite at "
        f"t = {bridge.field.problem.direction * s!r}, where its value is finite: keep the state "
        "away from there, or write the field so that its derivative exists (sqrt and norm at "
        "zero: add a small constant inside)",
        **where,
    )


def newton_error(snes: Any, where: dict[str, Any], bridge: Bridge) -> SolveError:
    """Turn SNES's reason into an error that says what to do."""
    reason = snes.getConvergedReason()
    name = reason_name(PETSc.SNES.ConvergedReason, reason)
    if "NANORINF" in name or "FNORM_NAN" in name or "DOMAIN" in name:
        found = infinite_derivative(bridge, where)
        if found is not None:
            return found
        return NonFiniteVectorField(
            "the vector field returned NaN or infinity in a nonlinear solve: check it near this "
            "state, or take smaller steps",
            reason=name, **where,
        )  # fmt: skip
    if reason == PETSc.SNES.ConvergedReason.DIVERGED_LINEAR_SOLVE:
        ksp_reason = snes.getKSP().getConvergedReason()
        ksp_name = reason_name(PETSc.KSP.ConvergedReason, ksp_reason)
        return LinearSolveFailed(
            "a linear solve of Newton's method failed: take smaller steps, use jacobian='dense', "
            "or choose another linear_solver",
            reason=ksp_name, **where,
        )  # fmt: skip
    return NonlinearSolveFailed(
        f"Newton's method failed after {snes.getIterationNumber()} iterations with a residual of "
        f"{snes.getFunctionNorm():.2e}: take smaller steps, or allow more iterations with "
        "petsc_options={'snes_max_it': ...}",
        reason=name, **where,
    )  # fmt: skip


def reason_name(enumeration: Any, reason: int) -> str:
    """Return PETSc's name of a convergence reason, such as ``DIVERGED_MAX_IT``."""
    for name, value in vars(enumeration).items():
        if isinstance(value, int) and value == reason and not name.startswith("_"):
            return name
    return str(reason)

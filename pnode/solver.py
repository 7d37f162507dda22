"""``Solver``: the public Module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from pnode import arguments, tolerances
from pnode.autograd import SolveFunction
from pnode.configuration import COMPARED, Given, as_checkpointing
from pnode.consistency import check_consistency, consistent_state
from pnode.controllers import check_controller
from pnode.devices import ordered, place_of
from pnode.engine import Engine, Requests, Run
from pnode.errors import ConfigurationError
from pnode.events import check_rate, end_at_event
from pnode.mass import MassMatrix
from pnode.monitor import at_home, progress_bar
from pnode.options import check_petsc_options, next_prefix
from pnode.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.ranks import ALONE, Ranks
from pnode.solution import Solution, Stats
from pnode.solvers.jacobian_options import jacobian_options
from pnode.solvers.methods import check_form, find_method
from pnode.solvers.stepping import StepControl, check_steps
from pnode.transfers import carry_once, on_host, remote
from pnode.transforms import outside_compiler, refuse_transforms, watched

__all__ = ["Solver"]

_DEVICE_STATES = ("device", "host")
_JACOBIANS = ("auto", "matrix-free", "dense", "block", "sparse")


class Solver(torch.nn.Module):
    """A reusable solver with exact discrete gradients.

    It solves one of y' = f(t, y) (``rhs``), y' = f_I(t, y) + f_E(t, y) (``implicit`` and
    ``explicit``), M y' = f(t, y) (``rhs`` and ``mass``), and F(t, y, y') = 0 (``residual``).

    Parameters
    ----------
    rhs : callable, optional
        ``f(t, y)``: t is a 0-dim tensor of y's dtype and device, y has the shape of y0; returns
        dy/dt (with ``mass``: M dy/dt) in that shape, dtype and device. A Module's parameters get
        gradients.
    implicit, explicit : callable, optional
        Two such functions, whose sum is y': the first is treated implicitly, the second
        explicitly, by a method of kind "imex". They may share parameters.
    mass : Tensor or tuple of Tensor, optional
        The constant matrix M: its diagonal (one entry per entry of the state), or a dense or
        sparse ``(size, size)`` matrix for the flattened state. A singular M makes a
        differential-algebraic equation, of index 1 if it is to be solved as it stands.
    residual : callable, optional
        ``F(t, y, yp)``, yp being y' in y's shape; returns a tensor of that shape.
    consistent_start : bool
        For ``mass`` and ``residual``: whether to solve the algebraic equations for the algebraic
        unknowns of y0 first (differentiably), instead of refusing a y0 that violates them.
    params : iterable of Tensor, optional
        Further tensors that f uses and that gradients are wanted for; non-leaf tensors too.
    method : str
        A name or alias from :func:`pnode.methods`.
    step_size : float, optional
        Fixed steps: each output interval (with ``dense``, the whole of them) is cut into equal
        steps of at most this length. None chooses steps from ``rtol`` and ``atol``, for methods
        with an error estimate.
    first_step : float, optional
        First adaptive step; chosen automatically if None. Implicit methods have no error estimate
        of their first step, so theirs is never longer than the automatic one.
    min_step, max_step : float, optional
        Limits of adaptive steps.
    rtol, atol : float, Tensor or tuple
        Relative and absolute tolerance of the local error of adaptive steps: numbers, or tensors
        that broadcast to y0, or tuples of such for a tuple state. The error of entry i is measured
        in units of ``atol_i + rtol_i |y_i|``, and a step is accepted if its root mean square is at
        most 1.
    controller : str
        Who chooses adaptive steps, one of PETSc's: "basic" (deadbeat, from the last error alone) or
        a digital filter over the last errors and step sizes, whose steps vary more smoothly: "pi"
        (PI42), "pid" (H312PID), or another name from :data:`pnode.controllers.FILTERS`.
    max_steps : int, optional
        Largest number of accepted steps of one solve.
    jacobian : {"auto", "dense", "block", "sparse", "matrix-free"}
        For implicit methods: assembled from n products and factored (LU); for y0 of shape (B, ...)
        whose rows f treats independently, B blocks from n / B products; sparse, from one product
        per color of the pattern; or products only (GMRES). "auto" is dense up to 256 state
        entries and matrix-free beyond. See docs/jacobians.md.
    linear_solver : str or mapping, optional
        A PETSc KSP type (``"gmres"``, ``"bcgs"``...), ``"lu"`` for a direct solve, or a mapping
        of PETSc's ksp and pc options.
    jacobian_pattern : Tensor, array or sparse matrix of SciPy, optional
        Shape ``(size, size)`` for the flattened state: where the Jacobian may be non-zero, for
        "sparse". Detected from Jacobians at three states if None, which can miss entries that
        vanish there; the first assembly of each sweep is compared with a product.
    jacobian_reuse : {"iteration", "step", "solve", "constant"}
        Evaluate the Jacobian at each Newton iterate; once a step, or once a solve, and wherever
        an iteration leaves more than a tenth of the residual; or once, for an implicit part that
        is linear with constant coefficients. A matrix-free operator is always exact ("constant"
        apart): its preconditioner is what is reused. The adjoint evaluates it at every converged
        stage, "constant" apart.
    preconditioner : {"dense", "block", "sparse"}, Tensor, sparse matrix or callable, optional
        For "matrix-free": the Jacobian assembled in one of these ways, or a matrix that
        approximates df/dy, dense or sparse, shape ``(size, size)`` for the flattened state; or a
        callable ``(t, y)`` that returns one. pnode forms ``shift M - df/dy`` and factors it.
    petsc_options : mapping, optional
        PETSc options of this solver alone, without prefix: ``{"snes_rtol": 1e-12}``. Options
        ``-pnode_...`` (all solvers) and ``-pnode_<number>_...`` (one) on the command line win.
    monitor : callable, optional
        ``monitor(step, t, y)``, called after every accepted step with a detached copy of y; after
        the last step of a solve that an event ends, with the event's time and state.
    progress : bool
        Show a progress bar over time.
    dense : bool
        Steps pass over the output times, whose states are interpolated; only the last time is hit.
        The interpolant is the method's own where it has one of degree 4 or more (dopri5), and the
        cubic Hermite polynomial otherwise, whose error is of order h^4. Not for ``mass`` and
        ``residual``, which do not tell y'.
    event_fn : callable, optional
        ``event_fn(t, y)`` returns a real tensor of one or several numbers. The solve ends where the
        first of them changes sign (for what is found within a step see docs/output.md). A Module's
        or a closure's parameters get gradients; with ``mass`` and ``residual`` there are none
        through the event, nor where event_fn jumps.
    event_tol : float
        Tolerance of the root, relative to the length of the step it lies in.
    checkpointing : Checkpointing, int or str, optional
        A limit for the memory of checkpoints, :class:`pnode.Checkpointing` or its ``memory``
        alone: ``"256MiB"``. Steps are repeated in the backward sweep where it is too little for
        all of them. Without a limit all stages are kept.
    comm : mpi4py.MPI.Intracomm, optional
        Ranks that share one state, each with its part of it in y0 (samples of a batch, or the cells
        of a layout): all take the same steps, by one error norm, and the gradients of the
        parameters, which every rank has, are summed up over the ranks. None: this process alone.
    layout : Grid or GhostLayout, optional
        Of a state whose ranks look at each other's cells, from :mod:`pnode.parallel`: the vector
        field then gets y with ghost cells and returns dy/dt without. It brings its communicator.
    device_state : {"device", "host"}
        Where the state of a y0 on a GPU lives: there too, in PETSc's device vectors, which a PETSc
        built for the GPU has; or on the host, with copies to and from f at each evaluation, which
        the ledger counts (``stats.copies``, ``stats.copied_bytes``). See docs/gpu.md.
    compile : bool
        For explicit Runge-Kutta methods: compile whole steps and their adjoints, by torch's
        inductor and a C++ compiler; for one-step implicit methods and small problems: whole
        sweeps; otherwise f and its derivatives. See docs/compile.md. f is traced once per shape and
        dtype and the result kept on disk. Where that is impossible, one warning says why, and the
        solve goes on without.

    Raises
    ------
    ConfigurationError
        For an unusable argument.

    Notes
    -----
    Creating a solver is not collective; calling it, and ``backward``, are, on ``comm``. Arguments
    that differ between the ranks, and failures on one of them, are errors on all: see docs/mpi.md.

    The gradient is that of the numbers the solve returned: the discrete adjoint of the accepted
    steps (Zhang, Constantinescu & Smith, "PETSc TSAdjoint", SIAM J. Sci. Comput. 44, 2022). The
    accepted step sizes are constants in it.

    Examples
    --------
    >>> solver = Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    >>> solution = solver(torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0]))
    >>> round(solution.ys[-1].item(), 5)
    0.36788
    """

    def __init__(
        self,
        rhs: Callable[..., Any] | None = None,
        *,
        implicit: Callable[..., Any] | None = None,
        explicit: Callable[..., Any] | None = None,
        mass: Any = None,
        residual: Callable[..., Any] | None = None,
        consistent_start: bool = False,
        params: Iterable[torch.Tensor] | None = None,
        method: str = "dopri5",
        step_size: float | None = None,
        first_step: float | None = None,
        min_step: float | None = None,
        max_step: float | None = None,
        rtol: tolerances.Tolerance = 1e-6,
        atol: tolerances.Tolerance = 1e-8,
        controller: str = "basic",
        max_steps: int | None = None,
        jacobian: str = "auto",
        linear_solver: str | Mapping[str, Any] | None = None,
        jacobian_pattern: Any = None,
        jacobian_reuse: str = "iteration",
        preconditioner: Any = None,
        checkpointing: Any = None,
        comm: Any = None,
        layout: Any = None,
        petsc_options: Mapping[str, Any] | None = None,
        device_state: str = "device",
        compile: bool = False,
        dense: bool = False,
        event_fn: Callable[..., Any] | None = None,
        event_tol: float = 1e-12,
        monitor: Callable[[int, float, Any], None] | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        flags = {
            "compile": compile, "consistent_start": consistent_start, "dense": dense,
            "progress": progress,
        }  # fmt: skip
        for name, value in flags.items():
            arguments.flag(name, value)
        self._device_state = arguments.choice("device_state", device_state, _DEVICE_STATES)
        form = arguments.problem_form(rhs, implicit, explicit, mass, residual)
        if monitor is not None and not callable(monitor):
            raise ConfigurationError(f"monitor is {monitor!r}: give a callable (step, t, y)")
        if event_fn is not None and not callable(event_fn):
            raise ConfigurationError(f"event_fn is {event_fn!r}: give a callable (t, y)")
        if dense and form in ("mass", "residual"):
            raise ConfigurationError(
                f"dense=True interpolates with y', which {form}= does not tell: let steps hit the "
                "output times (dense=False)"
            )
        chosen = find_method(method)
        check_form(form, chosen)
        if step_size is None and not chosen.adaptive:
            raise ConfigurationError(
                f"method={chosen.name!r} has no error estimate and step_size is None: give "
                "step_size=h, or take an adaptive method such as 'dopri5' or 'es325'"
            )
        arguments.choice("jacobian", jacobian, _JACOBIANS)
        control = StepControl(
            step_size=arguments.positive("step_size", step_size),
            first_step=arguments.positive("first_step", first_step),
            min_step=arguments.positive("min_step", min_step) or 0.0,
            max_step=arguments.positive("max_step", max_step) or math.inf,
            max_steps=arguments.count("max_steps", max_steps),
            rtol=tolerances.check("rtol", rtol),
            atol=tolerances.check("atol", atol),
            controller=check_controller(
                controller, step_size, chosen.name if chosen.ts_type == "python" else None
            ),
        )
        if isinstance(control.rtol, float) and isinstance(control.atol, float):
            tolerances.refuse_zeros(control.rtol, control.atol)
        if control.min_step > control.max_step:
            raise ConfigurationError(
                f"min_step={min_step!r} exceeds max_step={max_step!r}: swap or drop one"
            )
        self.rhs, self.residual = rhs, residual
        self.implicit, self.explicit = implicit, explicit
        self.mass = mass
        self._form = form
        self._consistent_start = consistent_start
        self._params = arguments.parameters(params)
        limits = as_checkpointing(checkpointing)
        chosen_comm, exchange = arguments.communicator(comm, layout, form, limits.resume, event_fn)
        if consistent_start and exchange is not None:
            raise ConfigurationError(
                "consistent_start=True is not supported with layout=: give a consistent y0"
            )
        self._progress = progress and chosen_comm.rank == 0
        if compile and (chosen_comm.size > 1 or exchange is not None):
            warnings.warn(
                "compile=True is not for states that several ranks share: solving without",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        self.event_fn = event_fn
        self._requests = Requests(monitor, dense, None, arguments.finite("event_tol", event_tol))
        if not 0.0 < self._requests.event_tol < 1.0:
            raise ConfigurationError(f"event_tol={event_tol!r}: give a number between 0 and 1")
        collect_parameters(self._functions, self._params)
        # Last: arguments that are refused use up no number.
        self._engine = Engine(
            chosen, control, jacobian,
            arguments.linear_solver_options(linear_solver, jacobian)
            | check_petsc_options(petsc_options),
            jacobian_options(
                chosen, form, jacobian, jacobian_pattern, preconditioner, jacobian_reuse
            ),
            limits, chosen_comm, exchange, self._new_prefix(), compile=compile,
        )  # fmt: skip

    @property
    def _functions(self) -> tuple[Any, ...]:
        """The user's functions: the implicit part first, then the explicit one."""
        chosen = (self.rhs, self.residual, self.implicit, self.explicit)
        return tuple(function for function in chosen if function is not None)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._engine.method.name

    @staticmethod
    def _new_prefix() -> str:
        return next_prefix()

    @property
    def options_prefix(self) -> str:
        """Prefix of this solver's PETSc options; solvers are numbered as they are created."""
        return self._engine.prefix

    def extra_repr(self) -> str:
        """Method, steps and Jacobian, for printing the module.

        ``colors`` is the number of products that a sparse Jacobian costs.
        """
        control = self._engine.control
        steps = (
            f"rtol={tolerances.describe(control.rtol)}, atol={tolerances.describe(control.atol)}"
            if control.step_size is None
            else f"step_size={control.step_size}"
        )
        jacobian = f", jacobian={self._engine.jacobian!r}" if self._engine.method.implicit else ""
        colors = f", colors={self._engine.color_count}" if self._engine.color_count else ""
        return f"method={self.method!r}, {steps}{jacobian}{colors}"

    @outside_compiler
    def forward(self, y0: Any, t: Any) -> Solution:
        """Integrate from ``t[0]`` and return the states at the times ``t``. Collective.

        Parameters
        ----------
        y0 : Tensor or tuple of Tensor
            State at ``t[0]``; any shape, float64 or float32.
        t : Tensor
            Output times, shape ``(T,)``, strictly increasing or strictly decreasing. Each is hit
            exactly by a step, unless ``dense`` is set. With ``event_fn`` the last one may be
            infinite: the solve then runs until the event (or ``max_steps``).

        Returns
        -------
        Solution
            ``ys`` has shape ``(T, *y0.shape)`` and y0's dtype and is differentiable with respect
            to y0, the parameters and t (for a time t_i: the cotangent of y_i times f(t_i, y_i),
            the derivative of the exact flow, or of the interpolant at interpolated times; for t_0:
            minus lambda_0 times f(t_0, y_0)). After an event, ``reason`` is "event" and the last
            entries of ``ts`` and ``ys`` are its time and state.

        Raises
        ------
        ConfigurationError
            For unusable arguments, for a trainable tensor that f uses and nobody declared, and
            inside of transforms of torch's that would not get through: see docs/derivatives.md.
        SolveError
            For a failing solve; see :mod:`pnode.errors`. What f raises comes through as it is.
        """
        ranks = Ranks(self._engine.comm)
        differentiate = torch.is_grad_enabled()
        prepared = ranks.attempt(self._prepare, y0, t, ranks, differentiate)
        facts, size = None, 0
        if prepared is not None:
            problem, flat, times, start = prepared
            size = problem.layout.size
            given = Given(
                self._engine, problem, flat, times, self._requests.dense, differentiate
            )  # fmt: skip
            facts = {name: of(given) for name, of in COMPARED.items()} if ranks.parallel else {}
        largest, distribution = ranks.compare(tuple(COMPARED), facts, size)
        problem = replace(problem, largest=largest, distribution=distribution)
        return self._solve(problem, flat, times, start, differentiate)

    def _solve(
        self,
        problem: InitialValueProblem,
        flat: torch.Tensor,
        times: torch.Tensor,
        start: Stats,
        differentiate: bool,
    ) -> Solution:
        """Solve what has been prepared, and make up the result. Collective."""
        trainable = differentiate and any(
            tensor.requires_grad for tensor in (flat, times, *problem.parameters)
        )
        if trainable and self.event_fn is not None:
            check_rate(self._form)
        compute = problem.compute
        event_fn = watched(self.event_fn)
        if event_fn is not None:
            event_fn = remote(event_fn, compute, start, strict=False)
        wanted = replace(
            self._requests,
            monitor=at_home(self._requests.monitor, compute, start), event_fn=event_fn,
        )  # fmt: skip
        with progress_bar(problem, wanted, self._progress) as requests:
            ys, run = self._integrate(problem, flat, times, requests, trainable)
        reason, event_time, layout = "t_end", None, problem.layout
        whole = trainable and run.event is None and not layout.is_tuple  # see SolveFunction.forward
        if run.event is not None:
            assert event_fn is not None
            times, ys = end_at_event(
                event_fn, run.problem, run.event, times, ys, self.method, run.stats
            )
            reason, event_time = "event", times[-1]
        if compute is not None:
            ys = carry_once(ys, compute, start)
            start.backward = run.stats.backward
        run.stats.add(start)
        states = ys if whole else layout.unflatten(ys)
        return Solution(times, states, run.stats, reason, event_time)

    def _integrate(
        self,
        problem: InitialValueProblem,
        flat: torch.Tensor,
        times: torch.Tensor,
        requests: Requests,
        trainable: bool,
    ) -> tuple[torch.Tensor, Run]:
        """Run the forward sweep, as a node of the graph if its result is to be differentiated."""
        if trainable:
            holder: list[Run] = []
            ys = SolveFunction.apply(
                self._engine, problem, requests, holder, flat, times, *problem.parameters
            )
            return ys, holder.pop()
        own = ordered(place_of(problem.layout.device))
        with torch.inference_mode(False), torch.no_grad(), own as leave:
            ys, run = self._engine.forward(
                problem, flat.detach().clone(), keep=False, requests=requests
            )
            leave(ys)
        return ys, run

    def _prepare(
        self, y0: Any, t: Any, ranks: Ranks, differentiate: bool
    ) -> tuple[InitialValueProblem, torch.Tensor, torch.Tensor, Stats]:
        """Validate what a solve is given. Not collective.

        Returns
        -------
        problem, flat, times, ledger
            The problem, the flat initial state, the output times, and the evaluations so far.
        """
        declared = collect_parameters(self._functions, self._params)
        refuse_transforms([("y0", y0), ("t", t), ("mass", self.mass)], declared)
        times = as_times(t, endless=self.event_fn is not None)
        start = Stats()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiate):
            y0, compute = on_host(y0, self._device_state, start)
        if self._engine.method.implicit and any(tensor.is_inference() for tensor in declared):
            raise ConfigurationError(
                f"a parameter was made in torch.inference_mode, and method={self.method!r} needs "
                "derivatives of the vector field: make the module outside of it"
            )
        if differentiate and times.requires_grad and self._form in ("mass", "residual"):
            raise ConfigurationError(
                f"t requires grad, and y' is not at hand for a problem given as {self._form}=: "
                "pass t.detach()"
            )
        # Of tensors made in inference mode there are no derivatives, nor transposes if sparse.
        with torch.inference_mode(False), torch.set_grad_enabled(differentiate):
            problem = InitialValueProblem.create(
                watched(self._functions[0]), y0, times, declared if differentiate else (),
                check_undeclared=differentiate, form=self._form, explicit=watched(self.explicit),
                mass=None if self.mass is None else MassMatrix(self.mass, StateLayout.of(y0)),
                ranks=ranks, exchange=self._engine.exchange, compute=compute,
            )  # fmt: skip
            if self.event_fn is None:  # which may end it at any time
                hit = (problem.times[0], problem.times[-1])
                chosen = hit if self._requests.dense else problem.times
                check_steps(problem, chosen, self._engine.control, self.method)
            flat = problem.layout.flatten(y0)
            # With ghost cells f is collective, and what belongs together is not one rank's to see.
            if self._form in ("mass", "residual") and self._engine.exchange is None:
                own = replace(problem, ranks=ALONE)
                if self._consistent_start:
                    flat = consistent_state(own, flat, start)
                else:
                    check_consistency(own, flat.detach(), start)
        return problem, flat, times, start

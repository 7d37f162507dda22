"""``Solver`` and ``odeint``: the public entry points, and the one autograd function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from pnode import arguments, sweeps, tolerances
from pnode.adjoint.gradients import CostGradients
from pnode.checkpointing import Checkpointing, parse_bytes
from pnode.consistency import check_consistency, consistent_state
from pnode.controllers import check_controller
from pnode.devices import HOST, ordered, place_of
from pnode.engine import Engine
from pnode.errors import BackwardError, ConfigurationError
from pnode.events import check_rate, end_at_event
from pnode.evidence import differs
from pnode.mass import MassMatrix
from pnode.options import ODEINT_PREFIX, check_petsc_options, next_prefix
from pnode.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.ranks import ALONE, Ranks
from pnode.run import Requests, Run
from pnode.solution import Solution, Stats
from pnode.solvers.jacobian_options import jacobian_options
from pnode.solvers.methods import check_form, find_method
from pnode.solvers.step_control import StepControl, check_steps
from pnode.transfers import carry_once, on_host, remote
from pnode.transforms import outside_compiler, refuse_batched, refuse_transforms, watched
from pnode.vectorfield import VectorField

__all__ = ["Solver", "odeint", "odeint_adjoint", "odeint_event"]

_DEVICE_STATES = ("device", "host")
_JACOBIANS = ("auto", "matrix-free", "dense", "block", "sparse")
# What has to be the same on all ranks of a solve; see Solver._facts.
_COMPARED = (
    "method", "t", "the dtype of y0", "step_size", "rtol, atol", "the step control",
    "the problem's form", "layout", "jacobian", "petsc_options", "checkpointing",
    "whether gradients are wanted (torch.no_grad)", "the number of parameters",
    "the shapes of the parameters", "dense", "requires_grad of y0, t or the parameters",
)  # fmt: skip


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
        limits = _checkpointing(checkpointing)
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
        engine = self._engine
        ranks = Ranks(engine.comm)
        differentiate = torch.is_grad_enabled()
        prepared = ranks.attempt(self._prepare, y0, t, ranks, differentiate)
        facts, size = None, 0
        if prepared is not None:
            problem, flat, times, start = prepared
            facts, size = self._facts(problem, differentiate, flat, times), problem.layout.size
        largest, distribution = ranks.compare(_COMPARED, facts, size)
        problem = replace(problem, largest=largest, distribution=distribution)
        inputs = (flat, times, *problem.parameters)
        trainable = differentiate and any(tensor.requires_grad for tensor in inputs)
        if trainable and self.event_fn is not None:
            check_rate(self._form)
        compute = problem.compute
        event_fn = watched(self.event_fn)
        if event_fn is not None:
            event_fn = remote(event_fn, compute, start, strict=False)
        wanted = replace(
            self._requests,
            monitor=_at_home(self._requests.monitor, compute, start), event_fn=event_fn,
        )  # fmt: skip
        with _progress_bar(problem, wanted, self._progress) as requests:
            if trainable:
                holder: list[Run] = []
                ys = _Solve.apply(engine, problem, requests, holder, *inputs)
                run = holder.pop()
            else:
                own = ordered(place_of(problem.layout.device))
                with torch.inference_mode(False), torch.no_grad(), own as leave:
                    ys, run = sweeps.forward(
                        engine, problem, flat.detach().clone(), keep=False, requests=requests
                    )
                    leave(ys)
        reason, event_time, layout = "t_end", None, problem.layout
        whole = trainable and run.event is None and not layout.is_tuple  # see _Solve.forward
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

    def _facts(
        self, problem: InitialValueProblem, differentiate: bool, flat: torch.Tensor, times: Any
    ) -> dict[str, Any]:
        """Return what has to be the same on all ranks."""
        if not problem.ranks.parallel:
            return {}
        engine, control = self._engine, self._engine.control
        tolerances_ = tuple(
            value if isinstance(value, float) else "entrywise"
            for value in (control.rtol, control.atol)
        )
        limits = engine.checkpointing
        return {
            "method": engine.method.name,
            "t": tuple(problem.direction * time for time in problem.times),
            "the dtype of y0": str(problem.layout.dtype),
            "step_size": control.step_size,
            "rtol, atol": tolerances_,
            "the step control": (
                control.first_step, control.min_step, control.max_step, control.max_steps,
                control.controller,
            ),
            "the problem's form": self._form,
            "layout": None if engine.exchange is None else type(engine.exchange).__name__,
            "jacobian": (
                engine.jacobian, engine.jacobian_options.reuse,
                type(engine.jacobian_options.preconditioner).__name__,
            ),
            "petsc_options": sorted(engine.petsc_options.items()),
            "checkpointing": (
                limits.memory, limits.device_memory, limits.disk is None, limits.store,
                limits.reproducible,
            ),
            "the number of parameters": len(problem.parameters),
            "the shapes of the parameters": [tuple(p.shape) for p in problem.parameters],
            "dense": self._requests.dense,
            "whether gradients are wanted (torch.no_grad)": differentiate,
            "requires_grad of y0, t or the parameters": (
                flat.requires_grad, times.requires_grad,
            ) if differentiate else (),
        }  # fmt: skip


def _at_home(monitor: Any, compute: torch.device | None, stats: Stats) -> Any:
    """Return the monitor as it is called with a state on the host."""
    if monitor is None or compute is None:
        return monitor
    return lambda step, t, y: monitor(step, t, carry_once(y, compute, stats))


def _checkpointing(chosen: Any) -> Checkpointing:
    if isinstance(chosen, Checkpointing):
        return chosen
    if chosen is None:
        return Checkpointing()
    return Checkpointing(memory=parse_bytes("checkpointing", chosen))


class _Solve(torch.autograd.Function):
    """The solve as one node of the graph: (y0, t, *parameters) -> ys."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        problem: InitialValueProblem,
        requests: Requests,
        holder: list[Run],
        y0: torch.Tensor,
        t: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        with ordered(place_of(problem.layout.device)) as leave:
            ys, run = sweeps.forward(engine, problem, y0, keep=True, requests=requests)
            leave(ys)
        layout = problem.layout
        if run.event is None and not layout.is_tuple:
            # The result has to be the one that users keep: whoever keeps it and is what f belongs
            # to makes a cycle, which Python sees through as long as no view comes in between. Nor
            # may it be a view itself, into which users could not write.
            shape = layout.unflatten(ys).shape
            whole: Any = ys.new_empty(0)
            if type(ys) is torch.Tensor:
                ys = whole.set_(ys.untyped_storage(), ys.storage_offset(), shape)
            else:  # a subclass, which may keep its numbers elsewhere
                ys = ys.new_empty(shape).copy_(ys.view(shape))
        ctx.engine, ctx.run = engine, run
        # Saved for torch's check that nobody has modified them since, besides their values.
        ctx.save_for_backward(y0, t, ys, *parameters, *problem.frozen)
        holder.append(run)
        return ys

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        (cotangents,) = outputs
        refuse_batched(cotangents)
        y0, t, ys, *_ = ctx.saved_tensors
        engine, run = ctx.engine, ctx.run
        cotangents, ys = cotangents.reshape(len(ys), -1), ys.reshape(len(ys), -1)
        with torch.no_grad(), ordered(place_of(run.problem.layout.device)) as leave:
            found = sweeps.backward(engine, run, y0, cotangents.detach(), ctx.needs_input_grad[5])
            leave(found.state, *found.parameters)
            time = None
            if ctx.needs_input_grad[5]:
                ranks, surroundings = run.problem.ranks, run.surroundings
                assert surroundings is not None
                with ranks.together(), surroundings.restored():
                    time = _time_gradient(run, ys, cotangents, found, len(t))
                time = ranks.sum(time).to(t)
        gradients = [
            found.state.to(y0.dtype) if ctx.needs_input_grad[4] else None,
            time,
            *(
                _as_parameter(gradient, parameter, used)
                for gradient, parameter, used in zip(
                    found.parameters, run.problem.parameters, run.used, strict=True
                )
            ),
        ]
        if torch.is_grad_enabled():
            anchors = [cotangents, y0, t, *run.problem.parameters]
            gradients = [
                None if gradient is None else _FirstOrderOnly.apply(gradient, *anchors)
                for gradient in gradients
            ]
        return (None, None, None, None, *gradients)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that ties a gradient to what it depends on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *anchors: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        raise BackwardError(
            "second derivatives through a solve are not supported: use create_graph=True only "
            "where the graph does not contain the solve's gradient, or differentiate that "
            "gradient by finite differences"
        )


def _as_parameter(
    gradient: torch.Tensor | None, parameter: torch.Tensor, used: bool
) -> torch.Tensor | None:
    """Gradient in the parameter's dtype: zeros if it is used in vain, None if not at all."""
    if gradient is None:
        return torch.zeros_like(parameter) if used else None
    return gradient.to(parameter)


def _time_gradient(
    run: Run,
    ys: torch.Tensor,
    cotangents: torch.Tensor,
    found: CostGradients,
    number: int,
) -> torch.Tensor:
    """Derivatives with respect to the output times: along the exact flow, dy/dt = f.

    Those of interpolated outputs are in ``found`` already, and the time of an event, which ends
    the problem's times, is a constant here.
    """
    field = run.field(run.stats.backward)
    direction = run.problem.direction
    gradient = torch.zeros(number, dtype=torch.float64, device=HOST.device)
    interpolated = () if run.stepped is None else run.stepped.interpolated
    for index in interpolated:
        gradient[index] = direction * found.times[index]
    given = run.problem.times[: -1 if run.event is not None else None]
    for index, s in enumerate(given):
        if index in interpolated:
            continue
        cotangent = -found.initial if index == 0 else cotangents[index]
        if run.problem.ranks.parallel or bool(cotangent.ne(0).any()):
            slope = field.slope(s, ys[index].detach().clone())
            _verify_slope(run, field, index, slope)
            gradient[index] = direction * torch.dot(cotangent.double(), slope.double())
    return gradient


def _verify_slope(run: Run, field: VectorField, index: int, slope: torch.Tensor) -> None:
    """Compare f at an output with the first stage of the step that begins there, if one does."""
    scheme = run.settings.method.scheme
    if run.stepped is not None and scheme is not None and scheme.explicit:
        noted = run.stepped.noted(index)
        by = differs(slope, noted[0]) if noted else 0.0
        if by:
            run.problem.ranks.refuse(field.changed(run.problem.times[index], by))


@contextmanager
def _progress_bar(
    problem: InitialValueProblem, requests: Requests, wanted: bool
) -> Iterator[Requests]:
    """Let the monitor move a progress bar over time before it calls the user's, if wanted."""
    if not wanted:
        yield requests
        return
    start, end = problem.times[0], problem.times[-1]

    def monitor(step: int, t: float, y: Any) -> None:
        fraction = (problem.direction * t - start) / (end - start)
        bar.set_postfix_str(f"t = {t:.4g}, step {step}", refresh=False)
        bar.update(fraction - bar.n)
        if requests.monitor is not None:
            requests.monitor(step, t, y)

    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]") as bar:
        yield replace(requests, monitor=monitor)


_TORCHDIFFEQ_OPTIONS = {
    "step_size": "step_size",
    "first_step": "first_step",
    "min_step": "min_step",
    "max_step": "max_step",
    "max_num_steps": "max_steps",
}


class _OneCall(Solver):
    """The solver of one call of :func:`odeint`.

    PETSc keeps half a kilobyte for every prefix it has ever seen: calls share one, and use up none
    of the numbers.
    """

    @staticmethod
    def _new_prefix() -> str:
        return ODEINT_PREFIX


@outside_compiler
def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    *,
    rtol: tolerances.Tolerance = 1e-7,
    atol: tolerances.Tolerance = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    params: Iterable[torch.Tensor] | None = None,
    **solver_keywords: Any,
) -> Any:
    """Solve y' = func(t, y), y(t[0]) = y0: the call of ``torchdiffeq.odeint``.

    Parameters
    ----------
    func : callable
        ``func(t, y)``, as for :class:`Solver`.
    y0 : Tensor or tuple of Tensor
        Initial state.
    t : Tensor
        Output times, shape ``(T,)``, strictly monotone.
    rtol, atol : float, Tensor or tuple of Tensor
        Tolerances of adaptive steps.
    method : str, optional
        Name or alias of a method; "dopri5" by default. Methods without error estimate take one
        step per output interval unless a ``step_size`` is given, as in torchdiffeq; with
        ``dense=True`` or without end they need it.
    options : mapping, optional
        torchdiffeq's: ``step_size``, ``first_step``, ``min_step``, ``max_step``,
        ``max_num_steps``.
    params : iterable of Tensor, optional
        Trainable tensors that func uses without being a Module that owns them.
    **solver_keywords
        Any other keyword of :class:`Solver`.

    Returns
    -------
    Tensor or tuple of Tensor
        Shape ``(T, *y0.shape)``. With ``event_fn``, a pair: the event's time and this, as in
        torchdiffeq; the solve ends at ``t[-1]`` at the latest, and the time is then None.

    Raises
    ------
    ConfigurationError, SolveError
        As :class:`Solver`.

    Notes
    -----
    Collective on the solver's communicator. A new solver is set up on each call; keep a
    :class:`Solver` in a training loop. Its PETSc options have the prefix ``pnode_odeint_``.

    The default tolerances are torchdiffeq's. They are tight for methods of order one and two,
    which then take thousands of steps, and beyond what a float32 field resolves.
    """
    refuse_transforms([("y0", y0), ("t", t)])
    keywords: dict[str, Any] = dict(solver_keywords)
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(
            f"options={options!r} is not a mapping: give a dictionary such as {{'step_size': 0.1}}"
        )
    for name, value in (options or {}).items():
        if name not in _TORCHDIFFEQ_OPTIONS:
            choices = ", ".join(map(repr, _TORCHDIFFEQ_OPTIONS))
            raise ConfigurationError(
                f"options[{name!r}]={value!r} is not supported: choose from {choices}, or set a "
                "PETSc option with petsc_options={...}"
            )
        if keywords.get(_TORCHDIFFEQ_OPTIONS[name]) is not None:
            raise ConfigurationError(
                f"options[{name!r}] and {_TORCHDIFFEQ_OPTIONS[name]}= are both given: drop one"
            )
        keywords[_TORCHDIFFEQ_OPTIONS[name]] = value
    chosen = find_method("dopri5" if method is None else method)
    event_fn = keywords.get("event_fn")
    times = as_times(t, endless=event_fn is not None)
    if not chosen.adaptive and keywords.get("step_size") is None:
        # One step per interval: a step size that no interval exceeds.
        exact = times.detach().to(torch.float64)
        span = float((exact.max() - exact.min()).item()) or 1.0
        if math.isfinite(span) and not keywords.get("dense"):
            keywords["step_size"] = span
    solver = _OneCall(func, rtol=rtol, atol=atol, method=chosen.name, params=params, **keywords)
    solution = solver(y0, times)
    return solution.ys if event_fn is None else (solution.event_time, solution.ys)


def odeint_adjoint(func: Callable[..., Any], y0: Any, t: Any, **keywords: Any) -> Any:
    """Solve as :func:`odeint` does, and accept torchdiffeq's ``adjoint_*`` keywords too.

    ``adjoint_params`` is ``params``. The other ``adjoint_*`` keywords are accepted with one
    warning: the discrete adjoint has no tolerances, method or options of its own.
    """
    ignored = sorted(name for name in keywords if name.startswith("adjoint_"))
    params = keywords.pop("adjoint_params", None)
    for name in ignored:
        keywords.pop(name, None)
    ignored = [name for name in ignored if name != "adjoint_params"]
    if params is not None:
        if keywords.get("params") is not None:
            raise ConfigurationError("params= and adjoint_params= are both given: drop one")
        keywords["params"] = params
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} ignored: the discrete adjoint is exact for the forward solve "
            "and has no settings of its own",
            stacklevel=2,
        )
    return odeint(func, y0, t, **keywords)


@outside_compiler
def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    """Solve y' = func(t, y) from t0 until an event: the call of ``torchdiffeq.odeint_event``.

    Parameters
    ----------
    func : callable
        ``func(t, y)``, as for :class:`Solver`.
    y0 : Tensor or tuple of Tensor
        State at t0.
    t0 : Tensor or float
        Initial time, a single number.
    event_fn : callable
        ``event_fn(t, y)``, as for :class:`Solver`.
    reverse_time : bool
        Whether to look for an event before t0.
    odeint_interface : callable
        :func:`odeint` or :func:`odeint_adjoint`.
    **keywords
        Those of :func:`odeint`. There is no end but the event: give ``max_steps`` where it may not
        come.

    Returns
    -------
    event_time : Tensor
        0-dim, differentiable.
    solution : Tensor or tuple of Tensor
        Shape ``(2, *y0.shape)``: y0 and the state at the event.

    Raises
    ------
    ConfigurationError, SolveError
        As :class:`Solver`.

    Notes
    -----
    Collective on the solver's communicator.
    """
    arguments.flag("reverse_time", reverse_time)
    refuse_transforms([("y0", y0), ("t0", t0)])
    start = as_times(t0.reshape(-1) if isinstance(t0, torch.Tensor) else [t0])
    if len(start) != 1:
        raise ConfigurationError(f"t0 has {len(start)} entries: give a single time")
    if not start.is_floating_point():
        start = start.to(torch.float64)
    times = torch.cat([start, start.new_full((1,), -math.inf if reverse_time else math.inf)])
    event_time, solution = odeint_interface(func, y0, times, event_fn=event_fn, **keywords)
    return event_time, solution

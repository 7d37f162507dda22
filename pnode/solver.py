"""``Solver``: the public Module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import torch
from mpi4py import MPI

from pnode import samples
from pnode.assignment import Configured
from pnode.base.ledger import Stats, new_stats
from pnode.base.options import PETSc, check_petsc_options, next_prefix
from pnode.base.ranks import Ranks
from pnode.base.transforms import moves, outside_inference, refuse_transforms
from pnode.breakpoints import check_breaks, with_breaks
from pnode.configuration import (
    DeviceState,
    LinearAlgebra,
    MethodName,
    Output,
    PlainOptions,
    Steps,
    Tensors,
    Times,
    as_checkpointing,
    take_groups,
)
from pnode.derivatives.linearized import linearized
from pnode.events.events import adapted
from pnode.field.watching import watched
from pnode.layout.layouts import Layout
from pnode.layout.petsc_vectors import as_state
from pnode.parts import consistent, solve
from pnode.path import At, check_at
from pnode.problems import arguments
from pnode.problems.calls import Call
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.compared import agreed, shared
from pnode.problems.mass import MassMatrix
from pnode.problems.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.problems.repeated import facts_of
from pnode.problems.transfers import on_host
from pnode.requests import requested
from pnode.results import result
from pnode.solutions.solution import Solution
from pnode.solvers.methods import check_form, check_mass, find_method
from pnode.solvers.step_control import check_steps
from pnode.sweeping.engine import Engine
from pnode.sweeping.error_norms import controlled
from pnode.sweeping.event_functions import Events
from pnode.sweeping.integrals import check_cost, of_state, with_integral
from pnode.sweeping.monitor import at_home, progress_bar

__all__ = ["Solver"]


class Solver(Configured):
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
        explicitly, by a method of kind "imex". They may share parameters. With ``mass``: M y'.
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
    steps : Steps, Tensor or sequence of float, optional
        How steps are chosen, see :class:`pnode.Steps`, or the times between them: ``grid`` there.
    linear_algebra : LinearAlgebra, optional
        For implicit methods: Jacobians and how systems with them are solved; see
        :class:`pnode.LinearAlgebra`.
    petsc_options : mapping, optional
        PETSc options of this solver alone, without prefix: ``{"snes_rtol": 1e-12}``. Options
        ``-pnode_...`` (all solvers) and ``-pnode_<number>_...`` (one) on the command line win.
    petsc_setup : callable, optional
        ``petsc_setup(ts)``, called with each TS that has read its options: see docs/petsc.md.
    cost : callable, optional
        ``r(t, y)``, a tensor of any fixed shape: ``solution.costs`` is its integral from ``t[0]``
        to each output time, with gradients like the state's. It changes neither steps nor states.
        Parameters of a Module get gradients.
    checkpointing : Checkpointing, int or str, optional
        A limit for the memory of checkpoints, :class:`pnode.Checkpointing` or its ``memory``
        alone: ``"256MiB"``. Steps are repeated in the backward sweep where it is too little for
        all of them. Without a limit all stages are kept.
    comm : mpi4py.MPI.Intracomm, optional
        Ranks that share one state, each with its part of it in y0 (samples of a batch, or the cells
        of a layout): all take the same steps, by one error norm, and the gradients of the
        parameters, which every rank has, are summed up over the ranks. None: this process alone.
    layout : Grid, GhostLayout or PETSc DM, optional
        Of a state whose ranks look at each other's cells, from :mod:`pnode.parallel`: the vector
        field then gets y with ghost cells and returns dy/dt without. It brings its communicator.
    device_state : {"device", "host"}
        Where the state of a y0 on a GPU lives: there too, in PETSc's device vectors, which a PETSc
        built for the GPU has; or on the host, with copies to and from f at each evaluation, which
        the ledger counts (``stats.copies``, ``stats.copied_bytes``). See docs/gpu.md.
    compile : bool or "auto"
        Machine code of whole sweeps, of steps, or of f and its derivatives; see docs/compile.md.
        True: at once, or one warning says why not. "auto": once the solves of this solver have
        taken about as long as compiling does, by counts of evaluations; ``print(solver)`` tells.
        False: never.
    gradient : {"discrete", "continuous"}
        "discrete": exact, of the numbers that the solve returned. "continuous": the state and its
        adjoint are integrated backwards in time, with the same method and steps, and nothing is
        kept (Chen et al. 2018): inexact, of the exact flow up to the tolerance, for comparisons,
        of y' = f(t, y) alone. See docs/derivatives.md.
    output : Output, optional
        Outputs between steps, the event that ends a solve, monitor and progress bar; see
        :class:`pnode.Output`.
    **plain
        The options of ``steps``, ``linear_algebra`` and ``output`` by themselves: ``step_size``,
        ``first_step``, ``min_step``, ``max_step``, ``rtol``, ``atol``, ``controller``,
        ``max_steps``, ``sensitivity_control``, ``samples``, ``on_failure``, ``norm``, ``grid``;
        ``jacobian``, ``linear_solver``, ``jacobian_pattern``, ``jacobian_reuse``,
        ``preconditioner``; ``dense``, ``event_fn``, ``event_tol``, ``monitor``, ``progress``.

    Raises
    ------
    ConfigurationError
        For an unusable argument, and for an option given by itself and in its group.

    Notes
    -----
    Calling a solver, and ``backward``, are collective on ``comm``; creating one is not, but with a
    DM. What differs between the ranks, or fails on one, is an error on all: see docs/mpi.md.

    The gradient is the discrete adjoint of the accepted steps, whose sizes are constants in it
    (Zhang, Constantinescu & Smith, "PETSc TSAdjoint", SIAM J. Sci. Comput. 44, 2022).

    Examples
    --------
    >>> solver = Solver(lambda t, y: -y, method="rk4", step_size=0.1)
    >>> solution = solver(torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0]))
    >>> round(solution.ys[-1].item(), 5)
    0.36788
    >>> accurate = Steps(rtol=1e-10, atol=1e-12, max_steps=10_000)
    >>> stiff = LinearAlgebra(jacobian="block", jacobian_reuse="step")
    >>> Solver(lambda t, y: -y, method="es325", steps=accurate, linear_algebra=stiff)
    Solver(method='es325', rtol=1e-10, atol=1e-12, jacobian='block')
    """

    def __init__(
        self,
        rhs: Callable[..., Any] | None = None,
        *,
        implicit: Callable[..., Any] | None = None,
        explicit: Callable[..., Any] | None = None,
        mass: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        residual: Callable[..., Any] | None = None,
        consistent_start: bool = False,
        params: Iterable[torch.Tensor] | None = None,
        cost: Callable[..., Any] | None = None,
        method: MethodName | str = "dopri5",
        steps: Steps | Times | None = None,
        linear_algebra: LinearAlgebra | None = None,
        petsc_options: Mapping[str, Any] | None = None,
        petsc_setup: Callable[[Any], Any] | None = None,
        checkpointing: Checkpointing | int | str | None = None,
        comm: MPI.Intracomm | None = None,
        layout: Layout | PETSc.DM | None = None,
        device_state: DeviceState = "device",
        compile: bool | Literal["auto"] = "auto",
        gradient: Literal["discrete", "continuous"] = "discrete",
        output: Output | None = None,
        **plain: Unpack[PlainOptions],
    ) -> None:
        super().__init__()
        known = Solver.__init__.__annotations__
        steps, linear_algebra, output = take_groups(steps, linear_algebra, output, plain, known)
        self._consistent_start = arguments.flag("consistent_start", consistent_start)
        self._device_state = arguments.choice("device_state", device_state, get_args(DeviceState))
        form = arguments.problem_form(rhs, implicit, explicit, mass, residual)
        check_form(form, chosen := find_method(method))
        self.rhs, self.residual, self.implicit, self.explicit = rhs, residual, implicit, explicit
        self.mass, self.event_fn = mass, output.event_fn
        self._form, self._requests = form, requested(
            gradient, form, chosen, steps, linear_algebra, output, checkpointing, cost, layout,
            compile)  # fmt: skip
        self._params, limits = arguments.parameters(params), as_checkpointing(checkpointing)
        comm, exchange = arguments.communicator(comm, layout, form, limits.resume, self.event_fn)
        self.cost = check_cost(cost)
        collect_parameters(self._functions, self._params)
        self._progress = output.progress and comm.rank == 0
        alone = arguments.alone(comm, exchange, consistent_start)
        setup = arguments.setup(petsc_setup, chosen, compile)
        options = linear_algebra.petsc_options() | check_petsc_options(petsc_options)
        # Last: arguments that are refused use up no number.
        self._engine = Engine(
            chosen, steps.control(chosen), linear_algebra.jacobian, options,
            linear_algebra.options(chosen, form), limits, comm, exchange, self._new_prefix(),
            compile=arguments.compilation(compile), setup=setup,
        )  # fmt: skip
        #: What all ranks must have been given.
        self._shared = {} if alone else {
            "method": chosen.own or chosen.name, "the problem's form": form, "gradient": gradient,
            "layout": type(exchange).__name__, "device_state": device_state, "compile": compile,
            "consistent_start": consistent_start, "petsc_setup": petsc_setup is not None,
            "petsc_options": sorted(options.items()), **shared(steps, linear_algebra, output),
            "checkpointing": vars(limits) | {"disk": limits.disk is None, "resume": None},
        }  # fmt: skip

    if TYPE_CHECKING:  # of a Module, calls are Any

        def __call__(
            self, y0: Tensors, t: Times, args: Any = None, breakpoints: Any = None, at: At = "times"
        ) -> Solution[Tensors]:
            """Integrate: :meth:`forward`, and the Module's hooks."""
            raise NotImplementedError

    @property
    def _functions(self) -> list[Any]:
        """The user's functions: the implicit part first, then the explicit one."""
        chosen = (self.rhs, self.residual, self.implicit, self.explicit, self.cost)
        return [function for function in chosen if function is not None]

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
        """Method, steps, Jacobian (``colors``: products of a sparse one), and what is compiled."""
        return self._engine.describe()

    @linearized
    def forward(
        self, y0: Any, t: Any, args: Any = None, breakpoints: Any = None, at: At = "times"
    ) -> Solution:
        """Integrate from ``t[0]`` and return the states at the times ``t``. Collective.

        Parameters
        ----------
        y0 : Tensor, or tuple, dict, NamedTuple... of Tensor, or PETSc Vec
            State at ``t[0]``; any shape, real or complex, 64 or 32 bits. f gets and returns the
            same structure, and ``ys`` has it; a list counts as a tuple, a Vec as its local tensor.
        t : Tensor
            Output times, shape ``(T,)``, strictly increasing or strictly decreasing. Each is hit
            exactly by a step, unless ``dense`` is set. With ``event_fn`` the last one may be
            infinite: the solve then runs until the event (or ``max_steps``). Independent samples
            may have their own, shape ``(B, T)``: see ``pnode.Steps``.
        args : object, optional
            Tensors and numbers of this call, in tuples, lists, dicts or NamedTuples. All functions
            of the problem, ``cost`` and ``event_fn`` too, get it last: ``f(t, y, args)``; the
            tensors get gradients.
        breakpoints : Tensor, sequence of float, control (or several), or callable, optional
            Times within ``t`` at which f jumps or has a kink, in order: a step ends at each, which
            sees f before it, and the next begins afresh, with f after it. A tensor that requires
            grad gets the derivative, lambda times the jump of f. :mod:`pnode.controls` brings its
            own; a callable is given ``t[0]`` and ``t[-1]``. See docs/problems.md.
        at : {"times", "steps"}
            "steps": ``ts`` (float64) and ``ys`` are those of the ends of all steps, from ``t[0]``
            on. The steps are taken twice, but for independent samples.

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
        check_at(at, self._engine, self._requests)
        if self._requests.independent is not None:
            check_breaks(self._engine, self._requests, breakpoints)
            return samples.solve(self, y0, t, args, at)
        ranks = Ranks(self._engine.comm)
        differentiate = torch.is_grad_enabled()
        prepared = ranks.attempt(self._prepare, y0, t, args, breakpoints, ranks, differentiate)
        if ranks.parallel:
            prepared = agreed(ranks, self._shared, prepared, differentiate)
        return self._solve(differentiate, at, *prepared)

    def _solve(
        self,
        differentiate: bool,
        at: str,
        problem: InitialValueProblem,
        flat: torch.Tensor,
        times: torch.Tensor,
        start: Stats,
        call: Call,
    ) -> Solution:
        """Solve what has been prepared, and make up the result. Collective."""
        cuts = () if problem.breaks is None else (problem.breaks.times,)
        trainable = any(
            differentiate if one.requires_grad else moves(one)
            for one in (*problem.parameters, flat, times, *cuts)
        )
        compute = problem.compute
        events, differentiable = adapted(self.event_fn, problem, compute, start, call.observer)
        wanted = self._requests
        given = wanted.monitor, wanted.callbacks
        if events is not None or any(one is not None for one in given):
            own = [at_home(of_state(problem, call.monitor(one)), compute, start) for one in given]
            wanted = replace(wanted, monitor=own[0], callbacks=own[1], events=events)
        if wanted.dense or at == "steps":
            wanted = replace(wanted, steps=True, plain=at == "steps")
        with progress_bar(problem, wanted, self._progress) as requests:
            solved = solve(
                self._engine, problem, requests, flat, times, trainable, differentiable,
                self._consistent_start,
            )  # fmt: skip
        return result(
            self._engine, problem, wanted, solved, flat, start, call, events, trainable, at
        )

    def _prepare(
        self, y0: Any, t: Any, args: Any, breakpoints: Any, ranks: Ranks, differentiate: bool
    ) -> tuple[InitialValueProblem, torch.Tensor, torch.Tensor, Stats, Call]:
        """Validate what a solve is given. Not collective.

        Returns
        -------
        problem, flat, times, ledger, call
            The problem, the flat initial state, the output times, the evaluations so far, and what
            the user's functions get.
        """
        engine, functions, facts = self._engine, self._functions, None
        alone = len(functions) == 1 and self.mass is None and self.event_fn is None
        if alone and args is None and breakpoints is None:
            declared = collect_parameters(functions, self._params)
            facts = facts_of(y0, t, declared)
            known = engine.repeated.again(facts, functions[0], y0, declared, ranks)
            if known is not None:
                return known, known.layout.flatten(y0), t, new_stats(), Call()
        y0 = as_state(y0, engine.comm, engine.exchange)
        call = Call.of(y0, args, ranks, self.mass, engine.exchange, engine.jacobian_options)
        declared = collect_parameters(functions, (*(self._params or ()), *call.tensors))
        refuse_transforms([("y0", y0), ("t", t), ("breakpoints", breakpoints)], declared)
        times = as_times(t, endless=Events.may_end(self.event_fn))
        start = new_stats()
        with outside_inference(differentiate):
            y0, compute = on_host(call.state(y0), self._device_state, start)
        arguments.refuse_inference(declared, self._engine.method)
        wanted = [
            one for one in declared if differentiate or (not one.requires_grad and moves(one))
        ]
        with outside_inference(differentiate):
            mass = None if self.mass is None else MassMatrix(self.mass, StateLayout.of(y0))
            check_mass(mass, engine.method)
            problem = InitialValueProblem.create(
                call.function(watched(functions[0], declared)), y0, times, wanted,
                check_undeclared=differentiate, form=self._form,
                explicit=call.function(watched(self.explicit, declared)), pairs=call.pairs,
                mass=mass,
                ranks=ranks, exchange=engine.exchange, compute=compute,
            )  # fmt: skip
            if self.event_fn is None:  # which may end it at any time
                hit = (problem.times[0], problem.times[-1])
                chosen = hit if self._requests.dense else problem.times
                check_steps(problem, chosen, self._engine.control, self.method)
            flat = problem.layout.flatten(y0)
            check_breaks(self._engine, self._requests, breakpoints)
            problem = with_breaks(problem, breakpoints, times)
            problem = controlled(problem, engine.control, self._requests.dense, call)
            flat = consistent(problem, flat, self._consistent_start, start, times[0])
            if self.cost is not None:
                cost = call.observer(watched(self.cost, declared))
                problem, flat = with_integral(problem, cost, flat, engine.method)
        engine.repeated.keep(facts, problem)
        return problem, flat, times, start, call

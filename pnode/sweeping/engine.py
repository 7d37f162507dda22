"""Settings of a solver, and the pooled integrators and adjoints that sweeps are lent."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from mpi4py import MPI

from pnode.adjoint.create import create_adjoint
from pnode.adjoint.stepper import AdjointStepper
from pnode.base.communicators import clean_up
from pnode.base.devices import HOST, place_of
from pnode.base.errors import ConfigurationError
from pnode.base.options import SolverOptions, next_prefix
from pnode.field.field_checks import undisturbed
from pnode.field.vectorfield import VectorField, vector_field
from pnode.layout.layouts import Layout
from pnode.problems import tolerances
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.problems.repeated import Repeated
from pnode.solvers.compiled import new_compiler, new_row_compiler
from pnode.solvers.compiled.account import Account
from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.compiled.event_programs import EventPrograms
from pnode.solvers.create import create_integrator
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.linear.sparse import SparsityPattern
from pnode.solvers.linear.structure import find_structure, seems_constant
from pnode.solvers.methods import Method
from pnode.solvers.pairs import LINEAR
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.settings import DENSE_LIMIT, IntegratorSettings, default_options
from pnode.solvers.petsc.symplectic import split_size
from pnode.solvers.step_control import StepControl
from pnode.sweeping.integrals import integral_settings

__all__ = ["Engine"]

# Idle integrators kept per solver; a solver called with ever new sizes must not hoard them.
_IDLE_LIMIT = 4
# Entries of a state whose sparse matrix "auto" factors: fill-in grows faster than the state.
_LARGEST_SPARSE = 1 << 15
# Entries of samples that "auto" looks for at once: their blocks cost next to nothing.
_SHORT_SAMPLE = 16
# Products a linear system, beyond which "auto" looks for structure: a sparse Jacobian and its
# factors cost some twenty (a reaction with diffusion on a grid of 32 x 32).
_MANY_PRODUCTS = 20


class _Pool:
    """Idle PETSc-owning objects by key."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, Any]] = []

    def put(self, key: Hashable, item: Any) -> None:
        """Keep an idle object."""
        self._idle.append((key, item))
        if len(self._idle) > _IDLE_LIMIT:
            self._idle.pop(0)[1].destroy()

    def take(self, key: Hashable) -> Any:
        for index, (known, item) in enumerate(self._idle):
            if known == key:
                del self._idle[index]
                return item
        return None

    def close(self) -> None:
        """Destroy all idle objects."""
        while self._idle:
            self._idle.pop()[1].destroy()


class _Lease:
    """Lends an object of a pool for one sweep: an idle one of a key, or a new one.

    After a failed sweep it is destroyed: PETSc may have left it half way.
    """

    def __init__(
        self, pool: _Pool, key: Hashable, create: Callable[[], Any],
        begin: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        self._pool, self._key, self._create, self._begin = pool, key, create, begin

    def __enter__(self) -> Any:
        self._item = self._pool.take(self._key) or self._create()
        if self._begin is not None:
            try:
                self._begin(self._item)
            except BaseException:
                self.__exit__(BaseException)
                raise
        return self._item

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._item.end()
        if kind is None:
            self._pool.put(self._key, self._item)
        else:
            self._item.destroy()


@dataclass(frozen=True, eq=False)
class Engine:
    """Method, tolerances and options of a solver, and its pool of PETSc objects.

    Attributes
    ----------
    method : Method
        Row of the table.
    control : StepControl
        How steps are chosen.
    jacobian : {"auto", "matrix-free", "dense", "block", "sparse"}
        How implicit methods get Jacobians.
    jacobian_options : JacobianOptions
        How these are preconditioned and reused.
    petsc_options : dict
        The user's options.
    checkpointing : Checkpointing
        What checkpoints may take.
    comm : mpi4py.MPI.Intracomm
        Ranks that share the state.
    exchange : Layout or None
        Of a state with ghost cells.
    prefix : str
        Options prefix of all its PETSc objects.
    compile : bool or "auto"
        Whether solves are compiled where that is possible; "auto": once that pays.
    setup : callable or None
        The user's ``petsc_setup``.
    compiler : Compiler
        Compiles, and keeps what it has made.
    row_compiler : Compiler
        The same for rows of independent samples.
    account : Account
        What solves have cost without, and what became of them.
    repeated : Repeated
        The last problem.
    """

    method: Method
    control: StepControl
    jacobian: str
    petsc_options: dict[str, Any]
    jacobian_options: JacobianOptions = field(default_factory=JacobianOptions)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    comm: Any = field(default_factory=lambda: MPI.COMM_SELF)
    exchange: Layout | None = None
    prefix: str = field(default_factory=next_prefix)
    compile: bool | Literal["auto"] = False
    setup: Callable[[Any], Any] | None = None
    _pool: _Pool = field(default_factory=_Pool, init=False)
    compiler: Compiler = field(default_factory=new_compiler, init=False)
    row_compiler: Compiler = field(default_factory=new_row_compiler, init=False)
    event_programs: EventPrograms = field(default_factory=EventPrograms, init=False)
    account: Account = field(default_factory=Account, init=False)
    repeated: Repeated = field(default_factory=Repeated, init=False)
    _known_settings: dict[Hashable, IntegratorSettings] = field(default_factory=dict, init=False)
    _options: dict[Hashable, SolverOptions] = field(default_factory=dict, init=False)
    _patterns: dict[Hashable, SparsityPattern] = field(default_factory=dict, init=False)
    #: What "auto" has found for large states: "block", a pattern, or None.
    _structures: dict[StateLayout, Any] = field(default_factory=dict, init=False)
    #: Of independent samples: how many solves have looked at the rows for coupling.
    samples_seen: dict[StateLayout, int] = field(default_factory=dict, init=False)
    #: Shapes whose structure is to be looked for, and those for which that was done.
    _hard: set[StateLayout] = field(default_factory=set, init=False)
    _tried: set[StateLayout] = field(default_factory=set, init=False)
    #: Which hints have been given.
    hints: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Destroy the pooled PETSc objects with the engine, not whenever they are collected."""
        weakref.finalize(self, self._pool.close)

    def __reduce__(self) -> Any:
        """Copies and pickles take the configuration along, not the PETSc objects.

        They are solvers of their own, numbered where and when they come to be.
        """
        return _another, (
            self.method, self.control, self.jacobian, self.petsc_options, self.jacobian_options,
            self.checkpointing, self.comm, self.exchange, self.compile, self.setup,
        )  # fmt: skip

    def __deepcopy__(self, memo: Any) -> Engine:
        """Copies share the communicator and the layout, which belong to the process."""
        make, (*settings, comm, exchange, compiled, setup) = self.__reduce__()
        return make(*deepcopy(settings, memo), comm, exchange, compiled, deepcopy(setup, memo))

    @property
    def color_count(self) -> int:
        """Products per sparse Jacobian, 0 as long as there is none."""
        given = [self.jacobian_options.pattern] if self.jacobian_options.pattern else []
        found = [one for one in self._structures.values() if isinstance(one, SparsityPattern)]
        patterns = [*given, *self._patterns.values(), *found]
        return max((pattern.color_count for pattern in patterns), default=0)

    def describe(self) -> str:
        """Return method, steps, Jacobian, and what is compiled or hinders it."""
        control = self.control
        steps = (
            f"rtol={tolerances.describe(control.rtol)}, atol={tolerances.describe(control.atol)}"
            if control.step_size is None
            else f"step_size={control.step_size}"
            if control.grid is None
            else f"steps=<{len(control.grid)} times>"
        )
        jacobian = f", jacobian={self.jacobian!r}" if self.method.implicit else ""
        colors = f", colors={self.color_count}" if self.color_count else ""
        first = f"method={self.method.name!r}, {steps}{jacobian}{colors}"
        return ", ".join(filter(None, [first, self.account.describe()]))

    def adjoint(
        self, settings: IntegratorSettings, parameters: bool
    ) -> AbstractContextManager[AdjointStepper]:
        """Lend an adjoint."""

        def create() -> AdjointStepper:
            clean_up(self.comm)
            options = self.solver_options(settings, adjoint=True)
            return create_adjoint(settings, options, parameters)

        return _Lease(self._pool, ("adjoint", settings, parameters), create)

    def integrator(
        self, settings: IntegratorSettings, field_: VectorField, y0: torch.Tensor
    ) -> AbstractContextManager[TimeIntegrator]:
        """Lease a forward integrator that stands at the initial state."""

        def create() -> TimeIntegrator:
            clean_up(self.comm)  # all ranks create together
            return create_integrator(settings, self.solver_options(settings))

        def begin(integrator: TimeIntegrator) -> None:
            integrator.begin(field_, y0.detach(), field_.problem.times[0])

        return _Lease(self._pool, ("forward", settings), create, begin)

    def look_at_structure(
        self, problem: InitialValueProblem, y0: torch.Tensor, ledger: Any
    ) -> None:
        """Find the structure of a large Jacobian for "auto", if that may pay.

        Short samples are looked for at the first solve of a shape, everything else once the
        systems of a solve have taken many products, or at once for an IMEX method whose implicit
        part seems to be linear: its matrix is factored once. Not where a method rests on exact
        Jacobians, nor where someone has chosen how to solve.
        """
        method, more, layout = self.method, self.jacobian_options, problem.layout
        known = layout in self._structures
        if (known and layout not in self._hard) or not method.implicit or self.jacobian != "auto":
            return
        if (
            problem.largest <= DENSE_LIMIT or problem.ranks.parallel or problem.base is not None
            or method.linearly_implicit
            or problem.form == "residual" or self.exchange is not None
            or more.preconditioner is not None or more.pattern is not None
            or layout.device != HOST.device
            or any(name.startswith(LINEAR) for name in self._chosen_options())
        ):  # fmt: skip
            return
        part = vector_field(replace(problem, check_undeclared=False), ledger)
        linearize = partial(part.linearize, problem.times[0])
        try:
            with undisturbed(part.function, layout.device):
                hard = layout in self._hard or (
                    problem.explicit is not None and seems_constant(y0.detach(), linearize)
                )
                found = find_structure(
                    layout, y0.detach(), linearize,
                    DENSE_LIMIT if hard else _SHORT_SAMPLE, _LARGEST_SPARSE if hard else 0,
                )  # fmt: skip
        except Exception:  # whatever f raises near y0
            found = None
        self._structures[layout] = found
        self._hard.discard(layout)

    def note_products(self, settings: IntegratorSettings, layout: StateLayout, ledger: Any) -> None:
        """Note that the systems of a solve have taken many products, if they have."""
        alone = settings.jacobian == "matrix-free" and self._structures.get(layout, 0) is None
        if alone and layout not in self._tried and ledger.krylov > _MANY_PRODUCTS * ledger.newton:
            self._hard.add(layout)
            self._tried.add(layout)

    def _chosen_options(self) -> Iterable[str]:
        """Return the names of the PETSc options that someone has set, by whatever way."""
        return SolverOptions(self.prefix, self.petsc_options, {}, False).values

    def forget_structure(self, settings: IntegratorSettings) -> bool:
        """Take products alone from now on, if these settings rest on a structure found."""
        if not settings.jacobian_options.found:
            return False
        for key, found in self._structures.items():
            if key.size == settings.size and found is not None:
                self._structures[key] = None
        return True

    def settings(self, problem: InitialValueProblem) -> IntegratorSettings:
        """Return the settings of an integrator of a problem."""
        key = (
            problem.layout, problem.form, problem.largest, problem.distribution, problem.watched,
        )  # fmt: skip
        known = self._known_settings.get(key)
        return self._new_settings(problem, key) if known is None else known

    def _new_settings(self, problem: InitialValueProblem, key: Hashable) -> IntegratorSettings:
        if problem.integrals:
            assert problem.base is not None
            own = self.settings(problem.base)
            options = self.solver_options(own, adjoint=True).values if own.method.implicit else {}
            return integral_settings(own, problem, options)
        layout, jacobian = problem.layout, self.jacobian
        more = replace(self.jacobian_options, by_rank=problem.ranks.parallel)
        if more.reuse == "auto" and self.checkpointing.resume is not None:
            more = replace(more, reuse="step")  # another process has no guess to go on with
        if jacobian == "auto":
            small = problem.largest <= DENSE_LIMIT and self.exchange is None
            found = self._structures.get(layout)
            if found is not None:
                jacobian = found if isinstance(found, str) else "sparse"
                pattern = found if isinstance(found, SparsityPattern) else None
                more = replace(more, found=True, pattern=pattern)
            else:
                jacobian = "dense" if small else "matrix-free"
        if problem.ranks.parallel and tolerances.is_partial(self.control.atol):
            raise ConfigurationError(
                "atol has infinite entries, and the ranks that share the state would count them "
                "differently: give finite ones, or integrate what is driven with cost="
            )
        mean = self.control.norm == "rms"
        rtol, atol = tolerances.resolve(self.control.rtol, self.control.atol, layout, mean)
        settings = IntegratorSettings(
            self.method, layout.size, layout.dtype,
            adaptive=self.control.step_size is None,
            rtol=rtol, atol=atol, max_step=self.control.max_step,
            jacobian=jacobian, controller=self.control.controller, form=problem.form,
            norm=self.control.norm,
            split=split_size(self.method, layout),
            jacobian_options=more.for_layout(jacobian, layout, self._patterns, self.exchange),
            distribution=problem.distribution, watched=problem.watched, comm=self.comm,
        )  # fmt: skip
        # The option vec_type chooses between PETSc's types on a device.
        vec_type = self.solver_options(settings).take("vec_type")
        settings = replace(settings, place=place_of(layout.device, vec_type))
        # What is detected during a solve, and the values of tensors, may be others next time.
        if jacobian == "dense" and isinstance(rtol, float) and isinstance(atol, float):
            self._known_settings[key] = settings
        return settings

    def solver_options(self, settings: IntegratorSettings, adjoint: bool = False) -> SolverOptions:
        """Return the PETSc options of an integrator or an adjoint."""
        key = (settings.adaptive, settings.jacobian, settings.dtype, adjoint, settings.watched)
        if key not in self._options:
            defaults = default_options(
                settings.method, settings.adaptive, settings.jacobian, settings.dtype, adjoint,
                settings.controller, settings.jacobian_options, settings.comm.size, settings.norm,
            )  # fmt: skip
            # Adaptive solvers repeat steps, and look for events, on an integrator without control.
            own = settings.adaptive == (self.control.step_size is None)
            forward = own and settings.watched and not adjoint
            given, prefix = self.petsc_options, self.prefix
            if settings.jacobian == "pair":  # whose systems are solved with the state's own
                given = {k: v for k, v in given.items() if not k.startswith(LINEAR)}
                prefix += "tangent_"
            self._options[key] = SolverOptions(prefix, given, defaults, forward, self.setup)
        return self._options[key]


def _another(*settings: Any) -> Engine:
    """Return an engine of the same settings, with the next number."""
    *others, compiled, setup = settings
    make: Any = Engine
    return make(*others, next_prefix(), compiled, setup)

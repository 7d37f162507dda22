"""What a solver is given: its options in groups, and what has to be the same on all ranks."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, TypeVar, get_args

import numpy as np
import torch

from pnode.errors import ConfigurationError
from pnode.problems import arguments, tolerances
from pnode.problems.checkpointing import Checkpointing, parse_bytes
from pnode.problems.step_controllers import PID, Norm, check_controller, check_norm
from pnode.solvers.linear.jacobian_options import jacobian_options
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.methods import Method
from pnode.solvers.step_control import StepControl, as_grid
from pnode.sweeping.event_functions import Event, Events
from pnode.sweeping.run import Requests

__all__ = [
    "DeviceState", "EventFunctions", "LinearAlgebra", "MethodName", "Monitor", "Output",
    "PlainOptions", "Steps", "Tensors", "Times", "as_checkpointing", "take_group", "take_groups",
]  # fmt: skip

#: The methods by name; each has aliases too, which are accepted as well.
MethodName = Literal[
    "euler", "heun2", "midpoint", "fehlberg2", "rk3", "heun3", "bosh3", "rk4", "fehlberg5",
    "dopri5", "tsit5", "bosh5", "verner6", "verner7", "verner8", "dopri8", "ssprk22", "ssprk52",
    "ssprk43", "ssprk93", "ssprk104", "symplectic_euler", "velocity_verlet", "ruth3", "forest_ruth",
    "beuler", "cn", "implicit_midpoint", "rosw_theta1", "rosw_theta2", "ros2m", "ros2p", "ra3pw",
    "ra34pw2", "r34prw", "r3prl2", "rodas3", "sandu3", "assp3p3s1c", "lassp3p4s2c", "llssp3p4s2c",
    "rosw_ark3", "rodaspr", "rodaspr2", "grk4t", "shamp4", "veldd4", "ros4l", "es122", "sdirk2",
    "trbdf2", "esdirk3", "es325", "dirk657a", "esdirk6", "dirk658a", "sdirk6", "dirk7510sal",
    "esdirk7", "dirk759a", "sdirk7", "dirk8614a", "dirk8616sal", "esdirk8", "imexbe", "imexa2",
    "imexl2", "ars122", "ark2c", "ark2d", "ark2e", "imexssp2", "ark3", "ars443", "bpr3", "ark4",
    "ark5", "radau3", "radau5", "gauss4", "gauss6", "bdf1", "bdf2", "bdf3", "bdf4", "bdf5", "bdf6",
    "bdf",
]  # fmt: skip
JacobianKind = Literal["auto", "matrix-free", "dense", "block", "sparse"]
Reuse = Literal["auto", "iteration", "step", "solve", "constant"]
DeviceState = Literal["device", "host"]
Monitor = Callable[[int, float, Any], None]
EventFunctions = Callable[..., Any] | Event | Sequence[Callable[..., Any] | Event]
#: A state, and the states of a solution.
Tensors = TypeVar("Tensors", torch.Tensor, tuple[torch.Tensor, ...])
#: Output times.
Times = torch.Tensor | Sequence[float]

_Group = TypeVar("_Group", "Steps", "LinearAlgebra", "Output")


# What ``steps=`` may be instead of a group: ``Steps.grid``.
_GRIDS = (torch.Tensor, np.ndarray, list, tuple, range)

# What ranks compare of an option, if not the value itself: beside each field that has this.
_OWN = {"told_by": lambda value: None}
_NUMBER = {"told_by": lambda value: value if isinstance(value, float) else "entrywise"}
_WORD = {"told_by": lambda value: value if isinstance(value, str) else value is not None}


@dataclass(frozen=True, eq=False)
class Steps:
    """How steps are chosen.

    Parameters
    ----------
    step_size : float, optional
        Fixed steps: each output interval (with ``dense``, the whole of them) is cut into equal
        steps of at most this length. None chooses steps from ``rtol`` and ``atol``, for methods
        with an error estimate.
    first_step : float, optional
        First adaptive step; chosen automatically if None. Implicit methods have no error estimate
        of their first step, so theirs is never longer than the automatic one.
    min_step, max_step : float, optional
        Limits of adaptive steps; like ``first_step`` not for fixed ones.
    rtol, atol : float, Tensor or tuple
        Relative and absolute tolerance of the local error of adaptive steps: numbers, or tensors
        that broadcast to y0, or tuples of such for a tuple state. The error of entry i is measured
        in units of ``atol_i + rtol_i |y_i|``, and a step is accepted if its root mean square is at
        most 1.
    controller : str or PID
        Who chooses adaptive steps, one of PETSc's: "basic" (deadbeat, from the last error alone) or
        a digital filter over the last errors and step sizes, whose steps vary more smoothly: "pi"
        (PI42), "pid" (H312PID), or another name from :data:`pnode.controllers.FILTERS`; or a
        :class:`pnode.PID` with coefficients of your own. Not for BDF.
    max_steps : int, optional
        Largest number of accepted steps of one solve.
    sensitivity_control : "random" or Tensor, optional
        Tangents of y0 that take part in the error test, like so many more entries of the state: a
        tensor with them as rows, shape ``(m, *y0.shape)``, or "random" for one unit vector, the
        same in each solve. The derivatives of the solution by y0 then are as accurate as the
        tolerances say, also where the state itself has no error; see docs/trust.md. Each solve
        takes its steps twice, the first time with the tangents. Not with ``event_fn``, ``layout``,
        ``resume`` or ``gradient="continuous"``; not compiled.
    samples : {"joint", "independent"}
        "joint": y0 is one state, with one error norm and one step for all of it. "independent":
        each row of y0, of shape ``(B, ...)``, is a problem of its own: with its own steps, output
        times and failures, in machine code if ``compile=True``. See docs/problems.md.
    on_failure : {"raise", "nan"}
        Of independent samples: whether a row that fails ends the solve with an error that names
        it, or has NaN at its outputs from there on.
    norm : {"rms", "max"} or callable
        Norm of the errors of adaptive steps in units of their tolerances, which is to be at most 1:
        the root mean square, the largest one, or a function of yours. That gets them in y0's
        structure, shape and dtype, without gradients, and returns one number; not with several
        ranks, ``layout``, ``sensitivity_control`` or ``gradient="continuous"``.
    grid : Tensor or sequence of float, optional
        Prescribed steps, by any method: the times from which and to which they go, from ``t[0]`` to
        ``t[-1]``, in order. All other outputs are on the grid, too, or ``dense`` interpolates them.
        ``Solver(steps=grid)`` is short for it. Its times are constants.

    Raises
    ------
    ConfigurationError
        For an unusable value.
    """

    step_size: float | None = None
    first_step: float | None = None
    min_step: float | None = None
    max_step: float | None = None
    rtol: tolerances.Tolerance = field(default=1e-6, metadata=_NUMBER)
    atol: tolerances.Tolerance = field(default=1e-8, metadata=_NUMBER)
    controller: str | PID = "basic"
    max_steps: int | None = None
    sensitivity_control: Literal["random"] | torch.Tensor | None = field(
        default=None, metadata=_WORD
    )
    samples: Literal["joint", "independent"] = "joint"
    on_failure: Literal["raise", "nan"] = "raise"
    norm: Norm = field(default="rms", metadata=_WORD)
    grid: Any = None

    def __post_init__(self) -> None:
        """Check the values."""
        arguments.choice("samples", self.samples, ("joint", "independent"))
        arguments.choice("on_failure", self.on_failure, ("raise", "nan"))
        object.__setattr__(self, "grid", as_grid(self.grid))
        if self.grid is not None and self.step_size is not None:
            raise ConfigurationError(
                f"steps= is a grid, and step_size={self.step_size!r} is given: drop one"
            )
        for name in ("step_size", "first_step", "min_step", "max_step"):
            object.__setattr__(self, name, arguments.positive(name, getattr(self, name)))
            if self._fixed is not None and name != "step_size" and getattr(self, name) is not None:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is given, and steps are fixed (step_size or a "
                    "grid): drop it, or take adaptive steps"
                )
        for name in ("rtol", "atol"):
            object.__setattr__(self, name, tolerances.check(name, getattr(self, name)))
        object.__setattr__(self, "max_steps", arguments.count("max_steps", self.max_steps))
        arguments.check_sensitivity_control(self.sensitivity_control, self._fixed)
        check_controller(self.controller, self._fixed, norm=check_norm(self.norm, self._fixed))
        if isinstance(self.rtol, float) and isinstance(self.atol, float):
            tolerances.refuse_zeros(self.rtol, self.atol)
        if self.min_step and self.max_step and self.min_step > self.max_step:
            raise ConfigurationError(
                f"min_step={self.min_step!r} exceeds max_step={self.max_step!r}: swap or drop one"
            )

    @property
    def _fixed(self) -> float | None:
        """The longest fixed step; None for adaptive ones."""
        if self.grid is None:
            return self.step_size
        return max(abs(after - before) for before, after in itertools.pairwise(self.grid))

    def control(self, method: Method) -> StepControl:
        """Return what the driver of a method's steps wants to know."""
        if self._fixed is None and not method.adaptive:
            raise ConfigurationError(
                f"method={method.name!r} has no error estimate and step_size is None: give "
                "step_size=h or steps=grid, or take an adaptive method such as 'dopri5' or 'es325'"
            )
        pid = isinstance(self.controller, PID) and method.coupled
        own = method.name if method.solves_to_tolerance and not pid else None
        return StepControl(
            self._fixed, self.first_step, self.min_step or 0.0, self.max_step or math.inf,
            self.max_steps, self.rtol, self.atol,
            check_controller(self.controller, self._fixed, own, self.norm), 0, self.grid,
            self.norm,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearAlgebra:
    """Jacobians of implicit methods, and how systems with them are solved; docs/jacobians.md.

    Parameters
    ----------
    jacobian : {"auto", "dense", "block", "sparse", "matrix-free"}
        Assembled from n products and factored (LU); for y0 of shape (B, ...) whose rows f treats
        independently, B blocks from n / B products; sparse, from one product per color of the
        pattern; or products only (GMRES). "auto" is dense up to 256 state entries; beyond, block or
        sparse where that pays and the structure is found, and matrix-free otherwise.
    linear_solver : str or mapping, optional
        A PETSc KSP type (``"gmres"``, ``"bcgs"``...), ``"lu"`` for a direct solve, or a mapping
        of PETSc's ksp and pc options.
    jacobian_pattern : Tensor, array or sparse matrix of SciPy, optional
        Shape ``(size, size)`` for the flattened state: where the Jacobian may be non-zero, for
        "sparse". Detected from Jacobians at three states if None, which can miss entries that
        vanish there; each assembly is compared with a product, and misses none.
    jacobian_reuse : {"auto", "iteration", "step", "solve", "constant"}
        Evaluate the Jacobian at each Newton iterate; once a step, or once a solve, and wherever
        an iteration leaves more than a tenth of the residual; or once, for an implicit part that
        is linear with constant coefficients. "auto" is "step", until the Jacobian was the same
        bit for bit at three points, and from then on once, as long as Newton's method agrees. A
        matrix-free operator is always exact ("constant" apart): its preconditioner is what is
        reused. The adjoint evaluates it at every converged stage, unless it is constant.
    preconditioner : {"dense", "block", "sparse"}, Tensor, sparse matrix or callable, optional
        For "matrix-free": the Jacobian assembled in one of these ways, or a matrix that
        approximates df/dy, dense or sparse, shape ``(size, size)`` for the flattened state; or a
        callable ``(t, y)`` that returns one. pnode forms ``shift M - df/dy`` and factors it.

    Raises
    ------
    ConfigurationError
        For an unusable value; what does not go with the method or the form of a problem is refused
        by :class:`pnode.Solver`.
    """

    jacobian: JacobianKind = "auto"
    linear_solver: str | Mapping[str, Any] | None = None
    jacobian_pattern: Any = field(default=None, metadata=_WORD)
    jacobian_reuse: Reuse = "auto"
    preconditioner: Any = field(default=None, metadata=_WORD)

    def __post_init__(self) -> None:
        """Check the values."""
        arguments.choice("jacobian", self.jacobian, get_args(JacobianKind))
        arguments.choice("jacobian_reuse", self.jacobian_reuse, get_args(Reuse))
        self.petsc_options()

    def petsc_options(self) -> dict[str, Any]:
        """Return what PETSc is told of the linear solver."""
        return arguments.linear_solver_options(self.linear_solver, self.jacobian)

    def options(self, method: Method, form: str) -> JacobianOptions:
        """Return how Jacobians are preconditioned and reused."""
        return jacobian_options(
            method, form, self.jacobian, self.jacobian_pattern, self.preconditioner,
            self.jacobian_reuse,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Output:
    """Outputs between steps, the event that ends a solve, and who looks on; docs/output.md.

    Parameters
    ----------
    dense : bool
        Steps pass over the output times, whose states are interpolated; only the last time is hit.
        The interpolant is the method's own where it has one of degree 4 or more (dopri5, tsit5),
        and a polynomial through states and slopes otherwise, of most implicit methods through
        states alone: see docs/output.md. The solution can then be called. With ``mass`` and
        ``residual`` y' is solved for where slopes are taken: see docs/problems.md.
    event_fn : callable, Event or list of these, optional
        ``event_fn(t, y)`` returns a real tensor of one or several numbers. The solve ends where the
        first of them changes sign (for what is found within a step see docs/output.md), or goes on
        from there: see :class:`pnode.Event`. A Module's or a closure's parameters get gradients;
        there are none where event_fn jumps.
    event_tol : float
        Tolerance of the root, relative to the length of the step it lies in.
    monitor : callable, optional
        ``monitor(step, t, y)``, called after every accepted step with a detached copy of y; after
        the last step of a solve that an event ends, with the event's time and state.
    progress : bool
        Show progress bars, on rank 0: over time, with what is compiled meanwhile, and over the
        steps of backward sweeps.

    Raises
    ------
    ConfigurationError
        For an unusable value.
    """

    dense: bool = False
    event_fn: EventFunctions | None = field(default=None, metadata=_WORD)
    event_tol: float = 1e-12
    monitor: Monitor | None = field(default=None, metadata=_OWN)
    progress: bool = field(default=False, metadata=_OWN)

    def __post_init__(self) -> None:
        """Check the values."""
        arguments.flag("dense", self.dense)
        arguments.flag("progress", self.progress)
        if self.monitor is not None and not callable(self.monitor):
            raise ConfigurationError(f"monitor is {self.monitor!r}: give a callable (step, t, y)")
        if self.event_fn is not None:
            Events.of(self.event_fn)
        given = self.event_tol
        object.__setattr__(self, "event_tol", arguments.finite("event_tol", given))
        if not 0.0 < self.event_tol < 1.0:
            raise ConfigurationError(f"event_tol={given!r}: give a number between 0 and 1")

    def requests(self) -> Requests:
        """Return what a sweep is to do besides integrating; the event is the solver's to add."""
        return Requests(self.monitor, self.dense, None, self.event_tol)


class PlainOptions(TypedDict, total=False):
    """The options of the groups as keywords by themselves."""

    step_size: float | None
    first_step: float | None
    min_step: float | None
    max_step: float | None
    rtol: tolerances.Tolerance
    atol: tolerances.Tolerance
    controller: str | PID
    max_steps: int | None
    sensitivity_control: Literal["random"] | torch.Tensor | None
    samples: Literal["joint", "independent"]
    on_failure: Literal["raise", "nan"]
    norm: Norm
    grid: Any
    jacobian: JacobianKind
    linear_solver: str | Mapping[str, Any] | None
    jacobian_pattern: Any
    jacobian_reuse: Reuse
    preconditioner: Any
    dense: bool
    event_fn: EventFunctions | None
    event_tol: float
    monitor: Monitor | None
    progress: bool


def take_group(
    kind: type[_Group], name: str, chosen: _Group | None, plain: dict[str, Any]
) -> _Group:
    """Return a group of options, given as such or by plain keywords, which are used up.

    Raises
    ------
    ConfigurationError
        If both are given, or the group is something else.
    """
    own = {each.name: plain.pop(each.name) for each in fields(kind) if each.name in plain}
    if kind is Steps and "grid" not in own and isinstance(chosen, _GRIDS):
        own["grid"], chosen = chosen, None
    if chosen is None:
        return kind(**own)
    if not isinstance(chosen, kind):
        raise ConfigurationError(
            f"{name}={chosen!r} is a {type(chosen).__name__}: give a pnode.{kind.__name__}(...)"
            + (", or the times that steps go to, or step_size=h" if kind is Steps else "")
        )
    for key, value in own.items():
        raise ConfigurationError(
            f"{key}={value!r} and {name}={chosen!r} are both given: write "
            f"{name}=pnode.{kind.__name__}({key}=..., ...), or drop one"
        )
    return chosen


def take_groups(
    steps: Any, linear_algebra: LinearAlgebra | None, output: Output | None,
    plain: Mapping[str, Any], known: Mapping[str, Any],
) -> tuple[Steps, LinearAlgebra, Output]:  # fmt: skip
    """Return all groups; refuse plain keywords that none has, and name the nearest of ``known``."""
    others = {**plain}
    groups = (
        take_group(Steps, "steps", steps, others),
        take_group(LinearAlgebra, "linear_algebra", linear_algebra, others),
        take_group(Output, "output", output, others),
    )
    _refuse_unknown(others, known)
    return groups


def _refuse_unknown(plain: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse keywords that no group has, as Python does, and name the nearest of ``known``."""
    for name in plain:
        near = difflib.get_close_matches(name, [*known, *PlainOptions.__annotations__], 1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"Solver() got an unexpected keyword argument {name!r}{hint}")


def as_checkpointing(chosen: Any) -> Checkpointing:
    """Return ``checkpointing=`` as an object."""
    if isinstance(chosen, Checkpointing):
        return chosen
    if chosen is None:
        return Checkpointing()
    return Checkpointing(memory=parse_bytes("checkpointing", chosen))

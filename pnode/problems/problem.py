"""The initial value problem: state layout, output times and trainable tensors, validated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.ranks import ALONE, Ranks
from pnode.base.real_times import real_times
from pnode.base.surroundings import parameters_of, tell_left_behind
from pnode.base.transforms import moves, plain
from pnode.base.vectors import is_finite
from pnode.layout.layouts import Layout
from pnode.problems.windows import Window

__all__ = ["InitialValueProblem", "StateLayout", "collect_parameters"]

_REAL_DTYPES = (torch.float64, torch.float32)
_DOUBLE = torch.finfo(torch.float64).eps
# Output times that are remembered.
_FEW = 64
# Methods divide by the length of a step, and by that of the first one, which is much shorter.
_SHORTEST = 1e-200


@dataclass(frozen=True)
class StateLayout:
    """How the user's state maps to one flat vector.

    Attributes
    ----------
    shapes : tuple of torch.Size
        One shape per tensor of the state.
    is_tuple : bool
        Whether the user passes a tuple.
    dtype : torch.dtype
        Precision in which the vector field is called.
    device : torch.device
        Where the state lives, and the vector field is called (see ``compute`` of
        :class:`InitialValueProblem`).
    pairs : tuple of bool
        Of a state with complex tensors: which tensors are pairs (Re z, Im z) of such.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    dtype: torch.dtype
    device: torch.device
    pairs: tuple[bool, ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shapes, self.is_tuple, self.pairs))  # the same in every process

    @classmethod
    def of(cls, y0: Any, pairs: tuple[bool, ...] = ()) -> StateLayout:
        """Validate ``y0`` and return its layout.

        Raises
        ------
        ConfigurationError
            If y0 is not a real float tensor or a non-empty tuple of such, all alike, or if it is
            empty or not finite.
        """
        is_tuple = isinstance(y0, (tuple, list))
        parts = tuple(y0) if is_tuple else (y0,)
        if not parts:
            raise ConfigurationError("y0 is an empty tuple: give at least one tensor")
        for index, part in enumerate(parts):
            name = f"y0[{index}]" if is_tuple else "y0"
            if not isinstance(part, torch.Tensor):
                raise ConfigurationError(
                    f"{name} is a {type(part).__name__}: give a torch tensor, for example "
                    "torch.tensor([1.0, 0.0])"
                )
            if part.dtype not in _REAL_DTYPES:
                raise ConfigurationError(
                    f"{name} has dtype {part.dtype}: use torch.float64 or torch.float32 "
                    "(complex128 or complex64 for complex states)"
                )
            if part.layout is not torch.strided or part.device.type == "meta":
                raise ConfigurationError(
                    f"{name} has layout {part.layout} on {part.device}: give a dense tensor with "
                    "values, for example y0.to_dense()"
                )
            if (part.dtype, part.device) != (parts[0].dtype, parts[0].device):
                raise ConfigurationError(
                    f"{name} has dtype {part.dtype} on {part.device}, but y0[0] has "
                    f"{parts[0].dtype} on {parts[0].device}: all parts of a state must agree"
                )
            if not is_finite(plain(part)):
                raise ConfigurationError(
                    f"{name} contains NaN or infinity: start from finite values"
                )
        layout = _layout(
            tuple([part.shape for part in parts]), is_tuple, parts[0].dtype, parts[0].device,
            pairs if any(pairs) else (),
        )  # fmt: skip
        if layout.size == 0:
            raise ConfigurationError("y0 has no entries: give a state with at least one number")
        return layout

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Number of entries of the whole state."""
        return sum(self.sizes)

    def flatten(self, y0: Any) -> torch.Tensor:
        """Turn a state into one flat tensor; differentiable."""
        if not self.is_tuple:
            flat: torch.Tensor = y0 if y0.dim() == 1 else y0.reshape(-1)
            return flat
        return torch.cat([part.reshape(-1) for part in y0])

    def unflatten(self, flat: torch.Tensor) -> Any:
        """Turn ``(..., size)`` into the user's tensor or tuple with the same leading shape."""
        lead = flat.shape[:-1]
        if not self.is_tuple:
            return flat.reshape(lead + self.shapes[0])
        parts, offset = [], 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            # Not split(): its outputs must not be written into, and f may try.
            parts.append(flat.narrow(-1, offset, size).reshape(lead + shape))
            offset += size
        return tuple(parts)

    def whole(self, ys: torch.Tensor) -> torch.Tensor:
        """Return states, shape ``(T, size)``, as a node of a graph may return them.

        Whoever keeps a result and is what f belongs to makes a cycle, which Python sees through as
        long as no view comes in between. Nor may it be a view itself, into which users could not
        write. So it is not one, and has the user's shape, unless that is a tuple.
        """
        if self.is_tuple:
            return ys
        shape = ys.shape[:1] + self.shapes[0]
        whole: Any = ys.new_empty(0)
        if type(ys) is torch.Tensor:
            result: torch.Tensor = whole.set_(ys.untyped_storage(), ys.storage_offset(), shape)
            return result
        return ys.new_empty(shape).copy_(ys.view(shape))  # its numbers may be kept elsewhere


@lru_cache(maxsize=64)
def _layout(*facts: Any) -> StateLayout:
    """Return the layout of these facts: the same one each time, which is found by what it is."""
    return StateLayout(*facts)


def _direction(times: tuple[float, ...]) -> float:
    """Return the direction of output times: 1.0, or -1.0 if they decrease.

    Raises
    ------
    ConfigurationError
        If they are not monotone, or steps between them cannot be computed with.
    """
    direction = -1.0 if len(times) > 1 and times[1] < times[0] else 1.0
    for index, (before, after) in enumerate(itertools.pairwise(times)):
        length = direction * (after - before)
        if not length > 0.0:
            raise ConfigurationError(
                f"t[{index + 1}] = {after!r} follows t[{index}] = {before!r}: output times must "
                "strictly increase or strictly decrease"
            )
        if length < _SHORTEST or (math.isinf(length) and math.isfinite(after)):
            raise ConfigurationError(
                f"t[{index + 1}] - t[{index}] is {direction * length:.2e}, beyond what steps "
                "can be computed with: take another unit of time"
            )
    return direction


_known_direction = lru_cache(maxsize=64)(_direction)


@dataclass(frozen=True)
class InitialValueProblem:
    """An initial value problem, wanted at the output times.

    y' = f(t, y); y' = implicit(t, y) + explicit(t, y); M y' = f(t, y); or F(t, y, y') = 0.

    Time is reflected (s = -t) when the output times decrease, so that integrators only ever see
    increasing times.

    Attributes
    ----------
    function : callable
        ``f(t, y)``, the implicit part, or the residual ``F(t, y, y')``, as the user wrote it.
    layout : StateLayout
        Shape, dtype and device of the state.
    times : tuple of float
        Output times in the integrator's (increasing) time.
    direction : float
        1.0, or -1.0 for reflected time.
    parameters : tuple of Tensor
        Trainable tensors that gradients are wanted for.
    frozen : tuple of Tensor
        Declared tensors that do not require grad; they must not change before a backward sweep.
    check_undeclared : bool
        Whether to look for trainable tensors that f uses and nobody declared.
    explicit : callable or None
        The explicit part of a split right-hand side.
    mass : object or None
        The mass matrix, with ``apply``, ``apply_transpose`` and ``dense``.
    form : {"rhs", "imex", "mass", "imex_mass", "residual"}
        Which of them it is.
    ranks : Ranks
        The processes that share the state.
    exchange : Layout or None
        Of a state with ghost cells, which f gets.
    largest : int
        Entries of the state on the rank that has most.
    distribution : int
        Fingerprint of the number of entries on all ranks.
    compute : torch.device or None
        Where f computes, if the state is kept elsewhere: see :mod:`pnode.problems.transfers`.
    resolution : float
        Relative spacing of the numbers that the output times were given in.
    base : InitialValueProblem or None
        Of a state and what it drives, tangents or integrals: that of the state.
    integrals : int
        Entries of integrals, the last part of the state.
    flow : MomentumFlow or None
        Of integrals beside a symplectic method.
    breaks : Breaks or None
        Where f is not smooth in t: see :mod:`pnode.breakpoints`.
    window : Window or None
        Of a part between two breaks: the times just inside of these, at which f is evaluated.
    norm : callable or None
        Norm of a flat error in units of the tolerances; None: the root mean square.
    owned : torch.Size or None
        Shape of what f returns, where that is the state without its ghost cells.
    watched : bool
        Whether PETSc's monitors look at its steps: not at those of the continuous adjoint.
    """

    function: Callable[..., Any]
    layout: StateLayout
    times: tuple[float, ...]
    direction: float
    parameters: tuple[torch.Tensor, ...] = ()
    frozen: tuple[torch.Tensor, ...] = ()
    check_undeclared: bool = False
    explicit: Callable[..., Any] | None = None
    mass: Any = None
    form: str = "rhs"
    ranks: Ranks = ALONE
    exchange: Layout | None = None
    largest: int = 0
    distribution: int = 0
    compute: torch.device | None = None
    resolution: float = _DOUBLE
    base: InitialValueProblem | None = None
    integrals: int = 0
    flow: Any = None
    breaks: Any = None
    window: Window | None = None
    norm: Callable[[torch.Tensor], float] | None = None
    owned: torch.Size | None = None
    watched: bool = True

    @property
    def measure(self) -> Callable[[torch.Tensor], float]:
        """The norm of errors that steps are chosen by. Collective."""
        return self.ranks.rms if self.norm is None else self.norm

    @property
    def distributed(self) -> bool:
        """Whether ranks share the state, or it has ghost cells."""
        return self.ranks.parallel or self.exchange is not None

    @property
    def gives_rate(self) -> bool:
        """Whether f, or both parts of it, is y' itself."""
        return self.form in ("rhs", "imex")

    @property
    def may_constrain(self) -> bool:
        """Whether there may be algebraic equations: a residual, or a singular mass matrix."""
        return self.form == "residual" or (self.mass is not None and self.mass.singular)

    def but(self, **changes: Any) -> InitialValueProblem:
        """Return the problem with other attributes, as ``dataclasses.replace`` in more time."""
        result = object.__new__(type(self))
        vars(result).update(vars(self), **changes)
        return result

    @classmethod
    def create(
        cls,
        function: Callable[..., Any],
        y0: Any,
        t: torch.Tensor,
        parameters: Sequence[torch.Tensor] = (),
        check_undeclared: bool = False,
        **form: Any,
    ) -> InitialValueProblem:
        """Validate the arguments and build the problem."""
        layout = StateLayout.of(y0, form.pop("pairs", ()))
        exchange = form.get("exchange")
        if exchange is not None and (layout.is_tuple or layout.shapes[0] != exchange.shape):
            given = "a tuple" if layout.is_tuple else f"shape {tuple(layout.shapes[0])}"
            raise ConfigurationError(
                f"y0 has {given}, and this rank's part of layout={exchange!r} has shape "
                f"{exchange.shape}: give the owned part alone, such as layout.part(y0)"
            )
        form.setdefault("largest", layout.size)
        times = tuple(plain(t).to(torch.float64).tolist())
        direction = (_known_direction if len(times) <= _FEW else _direction)(times)
        times = tuple([direction * time for time in times])
        if t.is_floating_point():
            form["resolution"] = torch.finfo(t.dtype).eps
        return cls(
            function,
            layout,
            times,
            direction,
            tuple(tensor for tensor in parameters if moves(tensor)),
            tuple(tensor for tensor in parameters if not moves(tensor)),
            check_undeclared,
            **form,
        )

    def seen(self, t: torch.Tensor) -> torch.Tensor:
        """Return a time of the user's, 0-dim, as f gets it: within the window; differentiable."""
        if self.window is None:
            return t
        value = t.detach()
        return t + (value.clamp(*self.window.ends.tolist()) - value)


def as_times(t: Any, endless: bool = False) -> torch.Tensor:
    """Validate output times and return them as a 1-D float tensor (the same one if it is one).

    Parameters
    ----------
    t : Tensor or sequence of float
        Output times.
    endless : bool
        Whether the last one may be infinite.
    """
    t = real_times("t", t, "give a 1-D tensor of output times")
    if t.dim() != 1 or t.numel() == 0:
        rows = " (with samples='independent' each row may have its own)" if t.dim() == 2 else ""
        raise ConfigurationError(
            f"t has shape {tuple(t.shape)}: give a 1-D tensor of at least one output time{rows}"
        )
    times = plain(t)
    if endless and len(t) > 1 and bool(torch.isinf(times[-1])):
        times = times[:-1]
    few = len(times) <= _FEW
    if not (all(map(math.isfinite, times.tolist())) if few else is_finite(times)):
        raise ConfigurationError(
            "t contains NaN or infinity: give finite output times (with event_fn, the last one may "
            "be infinite)"
        )
    return t


def collect_parameters(
    functions: Iterable[Any], params: Iterable[torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    """Tensors of Modules together with those passed as ``params=``, each once, frozen ones too."""
    candidates: list[Any] = []
    for function in functions:
        if isinstance(function, torch.nn.Module):
            own = parameters_of(function)
            if any(type(one) is torch.Tensor for one in own):
                tell_left_behind(function)
            candidates.extend(own)
    if params is not None:
        candidates.extend(params)
    chosen: dict[int, torch.Tensor] = {}
    for index, tensor in enumerate(candidates):
        if not isinstance(tensor, torch.Tensor):
            raise ConfigurationError(
                f"params contains a {type(tensor).__name__} (entry {index}): give tensors, for "
                "example list(module.parameters())"
            )
        chosen.setdefault(id(tensor), tensor)
    return tuple(chosen.values())

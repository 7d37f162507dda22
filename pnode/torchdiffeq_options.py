"""The options of torchdiffeq, in terms of a solver's keywords."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pnode.base.real_times import real_times
from pnode.base.transforms import moves, plain
from pnode.controllers import PID
from pnode.errors import ConfigurationError

__all__ = ["callbacks", "translated"]

# Those that say the same by another name, and those that say when a step is to end.
_SAME = {
    "step_size": "step_size",
    "first_step": "first_step",
    "min_step": "min_step",
    "max_step": "max_step",
    "max_num_steps": "max_steps",
    "norm": "norm",
}
_ADAPTIVE = ("first_step", "min_step", "max_step", "norm")
_BREAKS = ("jump_t", "step_t", "grid_points")
# No limit, as None is here.
_NONE = {"min_step": 0.0, "max_step": math.inf}
# Those of its controller, which is a PID of the last error alone.
_FACTORS = {"safety": "safety", "ifactor": "factormax", "dfactor": "factormin"}
_INSTEAD = {
    "eps": "f is seen from both sides of jump_t without: drop it",
    "max_iters": "give petsc_options={'snes_max_it': 10}, with an implicit method",
    "max_order": "take method='bdf4', say, instead of 'bdf'",
    "solver": "take method='bdf', 'radau5' or 'dopri8' instead of SciPy's",
}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def translated(
    options: Any, keywords: dict[str, Any], func: Callable[..., Any], y0: Any, t: torch.Tensor,
    adaptive: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the keywords of a solver, ``breakpoints`` and ``dense`` among them.

    Parameters
    ----------
    options : mapping or None
        torchdiffeq's.
    keywords : dict
        Given by themselves.
    func, y0, t : callable, Tensor, Tensor
        As given, for ``grid_constructor``; t is validated.
    adaptive : bool
        Whether the method has an error estimate.

    Raises
    ------
    ConfigurationError
        For an option that is unknown, has no meaning here, or is given twice.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(
            f"options={options!r} is not a mapping: give a dictionary such as {{'step_size': 0.1}}"
        )
    found: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    breaks: list[torch.Tensor] = []
    # Whether f is seen from both sides where it may jump: then nothing changes by perturb.
    aware = any((options or {}).get(name) is not None for name in (*_BREAKS, "grid_constructor"))
    aware = aware or keywords.get("breakpoints") is not None
    for name, value in (options or {}).items():
        own = _SAME.get(name)
        if own is not None:
            if name in _ADAPTIVE and not adaptive:  # fixed steps have none there either
                continue
            if value is not None and not _equals(value, _NONE.get(name)):
                found[own] = value
        elif name in _FACTORS:
            if value is not None:
                factors[_FACTORS[name]] = value
        elif name in _BREAKS:
            if value is not None:
                breaks.append(_times(name, value))
        elif name == "grid_constructor":
            if value is not None:
                breaks.append(_grid(value, func, y0, t, adaptive, options or {}))
                found["step_size"] = float((breaks[-1][-1] - breaks[-1][0]).abs()) or 1.0
        elif not _has_no_effect(name, value, aware):
            if name != "interp" or value != "cubic":
                _refuse(name, value)
            found["dense"] = True
        if own is not None and keywords.get(own) is not None:
            raise ConfigurationError(f"options[{name!r}] and {own}= are both given: drop one")
    if factors:
        if keywords.get("controller") is not None:
            raise ConfigurationError(
                "options safety, ifactor or dfactor and controller= are both given: drop one"
            )
        found["controller"] = PID(**factors)
    if found.get("dense") and not {**keywords, **found}.get("step_size"):
        del found["dense"]  # steps go from output to output anyway
    if breaks:
        if keywords.get("breakpoints") is not None:
            raise ConfigurationError(
                "options of times where steps end (jump_t, step_t...) and breakpoints= are both "
                "given: drop one"
            )
        found["breakpoints"] = _merged(breaks, plain(t))
    return {**keywords, **found}


def callbacks(func: Any) -> Callable[[Any, float, Any], None] | None:
    """Return what calls the callbacks of torchdiffeq's that a func has; None if it has none.

    Raises
    ------
    ConfigurationError
        For callbacks of the adjoint, whose steps are those of the forward solve.
    """
    for name in (f"{name}_adjoint" for name in _CALLBACKS):
        if callable(getattr(func, name, None)):
            raise ConfigurationError(
                f"func has {name}, which pnode does not call: the discrete adjoint goes back over "
                "the steps of the forward solve, which callback_accept_step tells; leave the "
                "attribute away"
            )
    own = {name: getattr(func, name, None) for name in _CALLBACKS}
    found: dict[str, Any] = {name: one for name, one in own.items() if callable(one)}
    if not found:
        return None

    def tell(key: tuple[str, float], t: float, y: Any) -> None:
        name, length = key
        if name in found:
            time, dt = (torch.tensor(x, dtype=torch.float64) for x in (t, length))
            found[name](time, y, dt)

    return tell


def _equals(value: Any, other: float | None) -> bool:
    return other is not None and isinstance(value, (int, float)) and value == other


def _has_no_effect(name: str, value: Any, aware: bool) -> bool:
    """Whether an option says what is the case anyway."""
    return (
        value is None
        or (name == "perturb" and (value is False or (value is True and aware)))
        or (name == "dtype" and value is torch.float64)
    )


def _refuse(name: str, value: Any) -> None:
    """Refuse an option, and say how its purpose is served here."""
    instead = {
        "perturb": "give jump_t, or breakpoints=: f is seen from both sides there, and only there",
        "interp": "steps hit all output times; 'cubic', or dense=True, interpolates them",
        "dtype": "times are float64 inside, and t is as exact as y0's dtype in f: drop it",
        **_INSTEAD,
    }
    if name in instead:
        raise ConfigurationError(f"options[{name!r}]={value!r} is not supported: {instead[name]}")
    choices = ", ".join(map(repr, (*_SAME, *_FACTORS, *_BREAKS, "grid_constructor", "interp")))
    raise ConfigurationError(
        f"options[{name!r}]={value!r} is not supported: choose from {choices}, or set a PETSc "
        "option with petsc_options={...}"
    )


def _times(name: str, value: Any) -> torch.Tensor:
    """Return times in any order as float64."""
    times = real_times(f"options[{name!r}]", value, "give a 1-D tensor of times")
    if times.dim() != 1 or bool(plain(times).isnan().any()):
        raise ConfigurationError(f"options[{name!r}]={value!r}: give a 1-D tensor of times")
    return times.to(torch.float64)


def _grid(
    constructor: Any, func: Any, y0: Any, t: torch.Tensor, adaptive: bool,
    options: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Return the grid that a fixed-step method is to step along."""
    name = "grid_constructor"
    if not callable(constructor):
        raise ConfigurationError(
            f"options[{name!r}]={constructor!r}: give a callable (func, y0, t)"
        )
    if options.get("step_size") is not None:
        raise ConfigurationError(f"options['step_size'] and options[{name!r}] are given: drop one")
    if adaptive:
        raise ConfigurationError(
            f"options[{name!r}] is given, and the method has adaptive steps: give jump_t for times "
            "at which one must end, or take a method such as 'rk4'"
        )
    grid = _times(name, constructor(func, y0, t))
    ends, wanted = plain(grid)[[0, -1]].tolist(), plain(t)[[0, -1]].tolist()
    if ends != wanted:
        raise ConfigurationError(
            f"options[{name!r}] returned times from {ends[0]!r} to {ends[1]!r}, and t is from "
            f"{wanted[0]!r} to {wanted[1]!r}: begin and end the grid there"
        )
    return grid


def _merged(breaks: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """Return all times strictly within the solve, each once, in order."""
    times = torch.cat([one.cpu() for one in breaks])
    low, high = sorted((float(t[0]), float(t[-1])))
    numbers = plain(times)
    order = numbers.argsort()
    chosen: list[int] = []
    for index in order.tolist():
        s = float(numbers[index])
        again = bool(chosen) and s == float(numbers[chosen[-1]])
        if again and moves(times):
            raise ConfigurationError(
                f"the time {s!r} is given twice among the options' times, which require grad: give "
                "it once"
            )
        if low < s < high and not again:
            chosen.append(index)
    return times[chosen]

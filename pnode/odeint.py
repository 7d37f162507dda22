"""``odeint`` and its relatives: the calls of torchdiffeq, each on a solver of its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch

from pnode.base.options import ODEINT_PREFIX
from pnode.base.transforms import outside_compiler, plain, refuse_transforms
from pnode.configuration import (
    EventFunctions,
    MethodName,
    Output,
    Steps,
    Tensors,
    Times,
    take_group,
)
from pnode.errors import ConfigurationError
from pnode.problems import arguments, tolerances
from pnode.problems.problem import as_times
from pnode.solver import Solver
from pnode.solvers.methods import find_method
from pnode.sweeping.event_functions import Events
from pnode.torchdiffeq_options import callbacks, translated

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

# Of a solve that nothing but an event ends.
_ENDLESS_STEPS = 100_000


class _OneCall(Solver):
    """The solver of one call of :func:`odeint`.

    PETSc keeps half a kilobyte for every prefix it has ever seen: calls share one, and use up none
    of the numbers.
    """

    @staticmethod
    def _new_prefix() -> str:
        return ODEINT_PREFIX

    def tell(self, callbacks: Callable[[Any, float, Any], None]) -> None:
        """Call torchdiffeq's callbacks."""
        requests = self._requests
        for name, given in (
            ("samples='independent'", requests.independent is not None),
            ("sensitivity_control=", requests.sensitivity_control is not None),
        ):
            if given:
                raise ConfigurationError(
                    f"func has callbacks for single steps, which {name} does not go with: drop "
                    "one of them"
                )
        self._requests = replace(requests, callbacks=callbacks)


@overload
def odeint(
    func: Callable[..., Any],
    y0: Tensors,
    t: Times,
    *,
    rtol: tolerances.Tolerance = ...,
    atol: tolerances.Tolerance = ...,
    method: MethodName | str | None = ...,
    options: Mapping[str, Any] | None = ...,
    params: Iterable[torch.Tensor] | None = ...,
    args: Any = ...,
    event_fn: None = ...,
    **solver_keywords: Any,
) -> Tensors: ...


@overload
def odeint(
    func: Callable[..., Any],
    y0: Tensors,
    t: Times,
    *,
    rtol: tolerances.Tolerance = ...,
    atol: tolerances.Tolerance = ...,
    method: MethodName | str | None = ...,
    options: Mapping[str, Any] | None = ...,
    params: Iterable[torch.Tensor] | None = ...,
    args: Any = ...,
    event_fn: EventFunctions,
    **solver_keywords: Any,
) -> tuple[torch.Tensor | None, Tensors]: ...


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
    args: Any = None,
    **solver_keywords: Any,
) -> Any:
    """Solve y' = func(t, y), y(t[0]) = y0: the call of ``torchdiffeq.odeint``.

    Parameters
    ----------
    func : callable
        ``func(t, y)``, as for :class:`Solver`.
    y0 : Tensor, or tuple, dict, NamedTuple... of Tensor
        Initial state.
    t : Tensor
        Output times, shape ``(T,)``, strictly monotone. With ``event_fn`` and two times the second
        only tells the direction: the solve goes on until the event.
    rtol, atol : float, Tensor or tuple of Tensor
        Tolerances of adaptive steps.
    method : str, optional
        Name or alias of a method; "dopri5" by default. Methods without error estimate take one
        step per output interval unless a ``step_size`` is given, as in torchdiffeq; with
        ``dense=True`` or without end they need it.
    options : mapping, optional
        torchdiffeq's: ``step_size``, ``first_step``, ``min_step``, ``max_step``, ``max_num_steps``,
        ``jump_t``, ``step_t``, ``grid_constructor``, ``interp``, ``norm``, ``safety``, ``ifactor``,
        ``dfactor``; see docs/migrating.md. Callbacks of func are called.
    params : iterable of Tensor, optional
        Trainable tensors that func uses without being a Module that owns them.
    args : object, optional
        What func gets as its third argument, ``func(t, y, args)``; see :meth:`Solver.forward`.
    **solver_keywords
        Any other keyword of :class:`Solver` (``steps`` if it is a grid), and ``breakpoints`` of its
        calls.

    Returns
    -------
    Tensor or tuple of Tensor
        Shape ``(T, *y0.shape)``. With ``event_fn``, a pair: the event's time and this, as in
        torchdiffeq. With more than two times, a prescribed grid, or events that do not end the
        solve, it ends at ``t[-1]`` at the latest, and the time is then None.

    Raises
    ------
    ConfigurationError, SolveError
        As :class:`Solver`. :class:`StepLimitReached` where no event has come after ``max_steps``
        steps: 100,000 in a solve without another end, if none are given.

    Notes
    -----
    Collective on the solver's communicator. A new solver is set up on each call; keep a
    :class:`Solver` in a training loop. Its PETSc options have the prefix ``pnode_odeint_``.

    The default tolerances are torchdiffeq's. They are tight for methods of order one and two,
    which then take thousands of steps, and beyond what a float32 field resolves.
    """
    refuse_transforms([("y0", y0), ("t", t)])
    keywords: dict[str, Any] = dict(solver_keywords)
    if isinstance(keywords.get("steps"), Steps):
        raise ConfigurationError(
            f"steps={keywords['steps']!r} is given to odeint, which has tolerances of its own: "
            "give rtol=, atol= and step_size= (or a grid of times as steps=), or use "
            "pnode.Solver(..., steps=...)"
        )
    if keywords.get("steps") is not None:
        keywords["grid"] = keywords.pop("steps")
    output = take_group(Output, "output", keywords.pop("output", None), keywords)
    chosen = find_method("dopri5" if method is None else method)
    times = as_times(t, endless=Events.may_end(output.event_fn))
    told, given = callbacks(func), plain(times).tolist()
    gridded = keywords.get("grid") is not None
    named = isinstance(options, Mapping) and options.get("grid_constructor") is not None
    if len(given) == 2 and not (gridded or named) and Events.may_end(output.event_fn):
        times = _until_event(times[:1], given[1] < given[0])
    keywords = translated(options, keywords, func, y0, times, chosen.adaptive)
    breakpoints = keywords.pop("breakpoints", None)
    if keywords.pop("dense", False):
        output = replace(output, dense=True)
    if not chosen.adaptive and keywords.get("step_size") is None and not gridded:
        # One step per interval: a step size that no interval exceeds.
        span = max(given) - min(given) or 1.0
        if math.isfinite(span) and not output.dense:
            keywords["step_size"] = span
    if math.isinf(plain(times)[-1]) and keywords.get("max_steps") is None:
        keywords["max_steps"] = _ENDLESS_STEPS
    solver = _OneCall(
        func, rtol=rtol, atol=atol, method=chosen.name, params=params, output=output, **keywords
    )
    if told is not None:
        solver.tell(told)
    solution = solver(y0, times, args, breakpoints)
    return solution.ys if output.event_fn is None else (solution.event_time, solution.ys)


def odeint_adjoint(func: Callable[..., Any], y0: Any, t: Any, **keywords: Any) -> Any:
    """Solve as :func:`odeint` does, and accept torchdiffeq's ``adjoint_*`` keywords too.

    ``adjoint_params`` is ``params``. The other ``adjoint_*`` keywords are accepted with one
    warning: the discrete adjoint has no tolerances, method or options of its own, and that of
    ``gradient="continuous"``, torchdiffeq's way, takes those of the forward solve.
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
        why = "the discrete adjoint is exact for the forward solve and has no settings of its own"
        if keywords.get("gradient") == "continuous":
            why = "the continuous adjoint takes the settings of the forward solve"
        warnings.warn(f"{', '.join(ignored)} ignored: {why}", stacklevel=2)
    return odeint(func, y0, t, **keywords)


@outside_compiler
def odeint_event(
    func: Callable[..., Any],
    y0: Tensors,
    t0: torch.Tensor | float,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **keywords: Any,
) -> tuple[torch.Tensor, Tensors]:
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
        Those of :func:`odeint`. There is no end but the event, and ``max_steps``: 100,000 if none
        are given.

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
    times = _until_event(start, reverse_time)
    event_time, solution = odeint_interface(func, y0, times, event_fn=event_fn, **keywords)
    return event_time, solution


def _until_event(start: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Return the times of a solve from ``start``, shape ``(1,)``, that has no end of its own."""
    start = start if start.is_floating_point() else start.to(torch.float64)
    return torch.cat([start, start.new_full((1,), -math.inf if backwards else math.inf)])

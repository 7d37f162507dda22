"""Break points: times at which f jumps or has a kink in t, where a method may not step across.

A solve is taken in parts from one to the next (:mod:`pnode.parts`). f is never evaluated at a break
itself: the part before gets a time a few spacings earlier, the part after one as much later, so
that each sees the limit from its own side, whichever way f is written. States and step lengths
do not know of that.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode.base.real_times import real_times
from pnode.base.transforms import depends, moves, plain
from pnode.base.vectors import is_finite
from pnode.controls import Control
from pnode.errors import ConfigurationError
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.methods import Method
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Requests

__all__ = ["Breaks", "check_breaks", "with_breaks"]

# How far from a break f is evaluated, in spacings of its times there: what f makes of a time may be
# off by one or two, as t / period is.
_SPACINGS = 4.0
# Shortest part, in these distances.
_SHORTEST = 16.0
_OUTSIDE = 1e-12


@dataclass(frozen=True, eq=False)
class Breaks:
    """Where a solve is cut.

    Attributes
    ----------
    times : Tensor
        Break times between its ends, shape ``(N,)``, float64, in the order of the solve.
    margins : tuple of float
        For each time and both ends, those first and last: how far from it f is evaluated; infinite
        at an end where there is no break.
    reach : tuple of float
        For each time and both ends: output times that near are at it.
    """

    times: torch.Tensor
    margins: tuple[float, ...]
    reach: tuple[float, ...]

    @property
    def told(self) -> tuple[Any, ...]:
        """What ranks compare of it."""
        return (
            plain(self.times).tolist(),
            moves(self.times),
            [math.isinf(m) for m in self.margins],
        )


def check_breaks(engine: Engine, requests: Requests, given: Any) -> None:
    """Refuse a solver that cannot have break points, if any are given.

    Raises
    ------
    ConfigurationError
        If the method evaluates f outside of its steps, or for what does not go with parts.
    """
    if given is None:
        return
    method, resume = engine.method, engine.checkpointing.resume
    for text, refused in (
        ("samples='independent': solve the rows from break to break", requests.independent),
        ("gradient='continuous': take gradient='discrete'", requests.continuous),
        (f"resume={resume!r}: solve from break to break", resume),
        (
            "sensitivity_control=: drop it, or solve from break to break",
            requests.sensitivity_control is not None,
        ),
    ):
        if refused:
            raise ConfigurationError(f"breakpoints= does not go with {text}")
    nodes = () if method.scheme is None else method.scheme.nodes
    nodes = (*nodes, *(update.offset for update in method.half_updates or ()))
    outside = [c for c in nodes if not -_OUTSIDE <= c <= 1.0 + _OUTSIDE]
    if outside:
        raise ConfigurationError(
            f"breakpoints= with method={method.name!r}, which evaluates f at t + {outside[0]:.3g} "
            f"h, beyond its step and so beyond a break: take {_instead(method)}"
        )


def _instead(method: Method) -> str:
    if method.half_updates:
        return "'velocity_verlet' or 'dopri5'"
    return "'rodaspr' or 'ros2p'" if method.linearly_implicit else "'es325' or 'esdirk8'"


def with_breaks(problem: InitialValueProblem, given: Any, t: torch.Tensor) -> InitialValueProblem:
    """Return a problem with break points; the same one if there are none.

    Parameters
    ----------
    problem : InitialValueProblem
        Of the whole solve.
    given : Tensor, sequence of float, Control, sequence of Control, or callable
        As the user gave them.
    t : Tensor
        The output times.

    Raises
    ------
    ConfigurationError
        For what are no times between the first and the last output, in order, or times that the
        numbers do not tell apart.
    """
    start, end = problem.direction * problem.times[0], problem.direction * problem.times[-1]
    found = _tensor(given, start, end)
    if found is None or not len(found):
        return problem
    numbers = plain(found)
    if not is_finite(numbers):
        raise ConfigurationError("breakpoints contains NaN or infinity: give finite times")
    ahead = numbers.diff()
    if not (bool((ahead > 0.0).all()) or bool((ahead < 0.0).all())):
        raise ConfigurationError(
            f"breakpoints={_short(numbers)}: give times that strictly increase, or decrease"
        )
    if len(found) > 1 and (float(ahead[0]) > 0.0) != (problem.direction > 0.0):
        found, numbers = found.flip(0), numbers.flip(0)
    moving = depends(found)
    if moving and (torch.is_grad_enabled() or not found.requires_grad) and problem.may_constrain:
        given = "residual=" if problem.form == "residual" else "a singular mass="
        raise ConfigurationError(
            "breakpoints requires grad, and algebraic unknowns jump at a break in ways that have "
            f"no derivative by its time for {given}: pass breakpoints.detach()"
        )
    return _placed(problem, (found if moving else numbers).to(t.device), numbers.tolist(), moving)


def _placed(
    problem: InitialValueProblem, found: torch.Tensor, times: list[float], moving: bool
) -> InitialValueProblem:
    """Tell breaks at the ends from those between them."""
    d, eps = problem.direction, torch.finfo(problem.layout.dtype).eps
    first, last = problem.times[0], problem.times[-1]
    own = [d * time for time in times]

    def reach(s: float) -> float:
        return max(_SPACINGS * eps, problem.resolution) * abs(s)

    for s in own:
        if not first - reach(s) <= s <= last + reach(s):
            raise ConfigurationError(
                f"breakpoints has {d * s!r}, and the solve is from t = {d * first!r} to "
                f"{d * last!r}: leave times outside of that away"
            )
    begins = abs(own[0] - first) <= reach(first)
    alone = (begins and len(own) == 1) or math.isinf(last)
    ends = not alone and abs(own[-1] - last) <= reach(last)
    if moving and (begins or ends):
        raise ConfigurationError(
            f"breakpoints requires grad and has {d * own[0 if begins else -1]!r}, an end of the "
            "solve, which moves the result in one direction only: leave it away, or detach it"
        )
    inner = own[begins : len(own) - ends]
    marks = [first, *inner, last]
    lengths = [math.inf, *(b - a for a, b in itertools.pairwise(marks)), math.inf]
    scales = [min(before, after) for before, after in itertools.pairwise(lengths)]
    margins = [
        _SPACINGS * eps * max(abs(s), scale if math.isfinite(scale) else 1.0)
        for s, scale in zip(marks, scales, strict=True)
    ]
    for (a, b), (near, far) in zip(
        itertools.pairwise(marks), itertools.pairwise(margins), strict=True
    ):
        if inner and b - a < _SHORTEST * max(near, far) < math.inf:
            raise ConfigurationError(
                f"breakpoints leave a part of length {b - a:.2e} at t = {d * a!r}, and times of "
                f"{problem.layout.dtype} are {eps * abs(a):.1e} apart there: merge the breaks, "
                "measure t from nearby, or give y0 in float64"
            )
    margins[0] = margins[0] if begins else math.inf
    margins[-1] = margins[-1] if ends else math.inf
    if len(problem.times) == 1:  # all of which are at the start
        return problem
    breaks = Breaks(found[begins : len(own) - ends], tuple(margins), tuple(map(reach, marks)))
    return replace(problem, breaks=breaks)


def _tensor(given: Any, start: float, end: float) -> torch.Tensor | None:
    """Return what was given as float64 times, not looked at any further."""
    if given is None:
        return None
    several = isinstance(given, (list, tuple))
    controls = [given] if isinstance(given, Control) else list(given) if several else []
    if controls and all(isinstance(one, Control) for one in controls):
        # f is smooth in them, or keeps values in between: nothing moves with the breaks themselves.
        knots = torch.cat([plain(one.breakpoints.detach()).cpu() for one in controls]).unique()
        low, high = min(start, end), max(start, end)
        return knots[(knots >= low) & (knots <= high)]
    if callable(given):
        given = given(start, end)
    times = real_times(
        "breakpoints", given,
        "give times, as a sequence of numbers or a 1-D tensor, or a control of pnode.controls",
    )  # fmt: skip
    if times.dim() != 1:
        raise ConfigurationError(
            f"breakpoints has shape {tuple(times.shape)}: give a 1-D tensor of times"
        )
    return times.to(torch.float64)


def _short(numbers: torch.Tensor) -> str:
    text = repr(numbers.tolist())
    return text if len(text) <= 100 else f"{text[:97]}..."

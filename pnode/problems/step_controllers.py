"""Controllers of adaptive steps: PETSc's by name, with PETSc's options for them, and PID.

What users meet of them is in :mod:`pnode.controllers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pnode.base.errors import ConfigurationError
from pnode.problems import arguments

__all__ = [
    "DEADBEAT", "FILTERS", "PID", "ErrorMemory", "Norm", "check_controller", "check_norm",
    "controller_options",
]  # fmt: skip

#: What the user may give as an error norm.
Norm = str | Callable[[Any], Any]

#: Of PETSc's "dsp" controller.
FILTERS = (
    "PI30", "PI42", "PI33", "PI34", "PC11", "PC47", "PC36", "H0211", "H211b", "H211PI",
    "H0312", "H312b", "H312PID", "H0321", "H321",
)  # fmt: skip
_ALIASES = {"dsp": "PI42", "pi": "PI42", "pid": "H312PID"}
_NAMES = {name.lower(): name for name in FILTERS} | _ALIASES
_REFUSED = {
    "none": "adaptive steps need a controller: give step_size=h for fixed steps",
    "glee": "it needs a method that estimates the global error, and pnode has none of TSGLEE",
    "cfl": "it needs a CFL number from the discretisation, which a vector field does not tell: "
    "give step_size= or max_step=",
    "history": "it repeats recorded steps: give step_size= for steps known beforehand",
}


@dataclass(frozen=True)
class PID:
    """A PID controller of adaptive steps.

    With e_n the error of step n in units of the tolerances and k the order of the error estimate's
    local error, the next step is ``safety * e_n^(-b1/k) * e_{n-1}^(-b2/k) * e_{n-2}^(-b3/k)`` times
    as long, b1 = pcoeff + icoeff + dcoeff, b2 = -(pcoeff + 2 dcoeff), b3 = dcoeff: the conventions
    of diffrax's ``PIDController``, after Söderlind, "Digital Filters in Adaptive Time-Stepping",
    ACM Trans. Math. Softw. 29 (2003), whose (kI, kP, kD) these are. A step is accepted if e_n is at
    most 1; the next one is then not shorter, and after a rejection it is at most ``safety`` times
    as long. Rejected steps are not remembered.

    Parameters
    ----------
    pcoeff, icoeff, dcoeff : float
        Coefficients of the proportional, integral and derivative part. (0, 1, 0) looks at the last
        error alone; (0.4, 0.3, 0) varies its steps more smoothly.
    factormin, factormax : float
        By what a step is shortened or lengthened at most; ``0 < factormin <= safety``, and
        ``factormax >= 1``.
    safety : float
        Between 0 and 1.

    Raises
    ------
    ConfigurationError
        For an unusable value.
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    factormin: float = 0.2
    factormax: float = 10.0
    safety: float = 0.9

    def __post_init__(self) -> None:
        """Check the values."""
        for each in fields(self):
            value = getattr(self, each.name)
            object.__setattr__(self, each.name, arguments.finite(each.name, value))
        if not 0.0 < self.safety < 1.0:
            raise ConfigurationError(f"safety={self.safety!r}: give a number between 0 and 1")
        if not 0.0 < self.factormin <= self.safety:
            raise ConfigurationError(
                f"factormin={self.factormin!r}: give a positive number that is at most "
                f"safety={self.safety!r}"
            )
        if self.factormax < 1.0:
            raise ConfigurationError(f"factormax={self.factormax!r}: give a number of at least 1")
        if self.pcoeff + self.icoeff + self.dcoeff <= 0.0:
            raise ConfigurationError(
                f"pcoeff={self.pcoeff!r}, icoeff={self.icoeff!r} and dcoeff={self.dcoeff!r} do not "
                "sum up to a positive number: larger errors would make longer steps"
            )

    @property
    def exponents(self) -> tuple[float, float, float]:
        """b1, b2 and b3."""
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        return p + i + d, -(p + 2.0 * d), d

    def limits(self, accepted: bool) -> tuple[float, float]:
        """Return the least and the largest factor after a step."""
        return (1.0, self.factormax) if accepted else (self.factormin, self.safety)


PID.__module__ = "pnode.controllers"  # where users find it


class _Deadbeat(PID):
    """PETSc's TSADAPTBASIC, whose limits are the same after any step."""

    def limits(self, accepted: bool) -> tuple[float, float]:
        """Return the least and the largest factor after a step."""
        return self.factormin, self.factormax


#: With TSADAPTBASIC's defaults (TSAdaptSetSafety, TSAdaptSetClip).
DEADBEAT: PID = _Deadbeat(factormin=0.1)


class ErrorMemory:
    """Proposes steps by a :class:`PID` from this error and those before.

    Parameters
    ----------
    rule : PID
        The controller.
    order : int
        Of the local error of the estimate: k.
    """

    def __init__(self, rule: PID, order: int) -> None:
        self._rule, self._order = rule, order
        self.restart()

    def restart(self) -> None:
        """Know of no step before."""
        self._before = (1.0, 1.0)

    def propose(self, step: float, error: float, accepted: bool) -> float:
        """Return the next step's length after one with this error."""
        low, high = self._rule.limits(accepted)
        factor = self._rule.safety
        for one, exponent in zip((error, *self._before), self._rule.exponents, strict=True):
            if exponent:
                factor *= one ** (-exponent / self._order) if one > 0.0 else math.inf
        if accepted:
            # What is no error at all says nothing of the steps to come.
            self._before = (error if error > 0.0 else 1.0, self._before[0])
        return step * min(max(factor, low), high)


def check_norm(norm: Any, step_size: float | None) -> Norm:
    """Return an error norm: "rms", "max" or a callable.

    Raises
    ------
    ConfigurationError
        If it is something else, or steps are fixed and another norm than "rms" was asked for.
    """
    if not callable(norm) and not (isinstance(norm, str) and norm in ("rms", "max")):
        raise ConfigurationError(
            f"norm={norm!r}: give 'rms', 'max', or a callable of the error in units of "
            "atol + rtol |y|"
        )
    if norm != "rms" and step_size is not None:
        raise ConfigurationError(
            f"norm={norm!r} is given, and steps are fixed (step_size or a grid), whose errors "
            "nobody measures: drop it"
        )
    chosen: Norm = norm
    return chosen


def check_controller(
    name: Any, step_size: float | None, own: str | None = None, norm: Norm = "rms"
) -> str | PID:
    """Return "basic", the name of a filter, a PID, or "none" for fixed steps.

    Parameters
    ----------
    name : str or PID
        As the user gave it.
    step_size : float or None
        For fixed steps.
    own : str or None
        Name of a method that chooses its steps and orders itself.
    norm : str or callable
        From :func:`check_norm`.

    Raises
    ------
    ConfigurationError
        If there is no such controller, or steps are fixed and a controller was asked for.
    """
    key = name.lower() if isinstance(name, str) else name if isinstance(name, PID) else None
    if step_size is not None and (key in ("basic", "none")):
        return "none"
    if key == "basic" or isinstance(key, PID) or key in _NAMES:
        if step_size is not None:
            raise ConfigurationError(
                f"controller={name!r} is given, and fixed steps (step_size or a grid) have no "
                "controller: drop one"
            )
        if own is not None and key != "basic":
            raise ConfigurationError(
                f"controller={name!r} has no effect on method={own!r}, which chooses its steps and "
                "orders itself: drop it"
            )
        if isinstance(key, PID) or key == "basic":
            return key
        if callable(norm):
            raise ConfigurationError(
                f"controller={name!r} is PETSc's, which does not know norm={norm!r}: take "
                "controller=pnode.PID(...), or norm='max'"
            )
        return _NAMES[key]
    if key in _REFUSED:
        raise ConfigurationError(f"controller={name!r} is not for this solve: {_REFUSED[key]}")
    choices = ", ".join(map(repr, ("basic", *_ALIASES, *FILTERS)))
    raise ConfigurationError(
        f"controller={name!r} is unknown: choose one of {choices}, or give a pnode.PID(...)"
    )


def controller_options(controller: str | PID, norm: Norm = "rms") -> dict[str, Any]:
    """Return PETSc's options for a controller and a norm that have been checked.

    PETSc has no controller where pnode judges the steps.
    """
    if callable(norm) or isinstance(controller, PID):
        return {"ts_adapt_type": "none"}
    options = {"ts_adapt_type": controller}
    if controller not in ("basic", "none"):
        options = {"ts_adapt_type": "dsp", "ts_adapt_dsp_filter": controller}
    return options | ({"ts_adapt_wnormtype": "infinity"} if norm == "max" else {})

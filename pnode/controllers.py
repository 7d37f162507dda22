"""Controllers of adaptive steps by name, and PETSc's options for them."""

from __future__ import annotations

from typing import Any

from pnode.errors import ConfigurationError

__all__ = ["FILTERS", "check_controller", "controller_options"]

#: Digital filters that PETSc's "dsp" controller knows by name (Söderlind, "Digital Filters in
#: Adaptive Time-Stepping", ACM Trans. Math. Softw. 29, 2003; Söderlind & Wang, J. Comput. Appl.
#: Math. 185, 2006).
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


def check_controller(name: Any, step_size: float | None, own: str | None = None) -> str:
    """Return "basic", the name of a filter, or "none" for fixed steps.

    Parameters
    ----------
    name : str
        As the user gave it.
    step_size : float or None
        For fixed steps.
    own : str or None
        Name of a method that chooses its steps itself.

    Raises
    ------
    ConfigurationError
        If there is no such controller, or steps are fixed and a controller was asked for.
    """
    key = name.lower() if isinstance(name, str) else None
    if step_size is not None and (key in ("basic", "none")):
        return "none"
    if key == "basic" or key in _NAMES:
        if step_size is not None:
            raise ConfigurationError(
                f"controller={name!r} and step_size={step_size!r} are both given: fixed steps have "
                "no controller, drop one"
            )
        if own is not None and key != "basic":
            raise ConfigurationError(
                f"controller={name!r} has no effect on method={own!r}, which chooses its steps and "
                "orders itself: drop it"
            )
        return "basic" if key == "basic" else _NAMES[key]
    if key in _REFUSED:
        raise ConfigurationError(f"controller={name!r} is not for this solve: {_REFUSED[key]}")
    choices = ", ".join(map(repr, ("basic", *_ALIASES, *FILTERS)))
    raise ConfigurationError(f"controller={name!r} is unknown: choose one of {choices}")


def controller_options(controller: str) -> dict[str, Any]:
    """Return PETSc's options for a controller from :func:`check_controller`."""
    if controller in ("basic", "none"):
        return {"ts_adapt_type": controller}
    return {"ts_adapt_type": "dsp", "ts_adapt_dsp_filter": controller}

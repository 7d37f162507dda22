"""Controllers of adaptive steps: PETSc's by name, and PID."""

import warnings
from typing import Any

from pnode.problems import step_controllers
from pnode.problems.step_controllers import PID

__all__ = ["FILTERS", "PID", "Norm"]

#: What ``norm=`` may be: "rms", "max", or a callable of the error in units of the tolerances.
Norm = step_controllers.Norm

#: Digital filters that PETSc's "dsp" controller knows by name (Söderlind, "Digital Filters in
#: Adaptive Time-Stepping", ACM Trans. Math. Softw. 29, 2003; Söderlind & Wang, J. Comput. Appl.
#: Math. 185, 2006).
FILTERS = step_controllers.FILTERS

_FORMER = {"DEADBEAT", "ErrorMemory", "check_controller", "check_norm", "controller_options"}


def __getattr__(name: str) -> Any:
    """Return what 0.2 had here although nobody but pnode needs it."""
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"pnode.controllers.{name} is pnode's own and will go: give Solver a controller= and a "
        "norm=, or a PID of your own",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(step_controllers, name)

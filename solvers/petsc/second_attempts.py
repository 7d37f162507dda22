"""How a step that has failed is tried once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pnode.base.errors import SolveError
from pnode.base.options import SolverOptions
from pnode.solvers.linear.jacobians import Jacobian
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["backtracks", "with_backtracking", "with_new_jacobians"]

Repeat = Callable[[], SolveError | None]


def with_new_jacobians(
    snes: Any, jacobian: Jacobian, options: SolverOptions, repeat: Repeat
) -> SolveError | None:
    """Repeat a step with a new Jacobian at each iterate. Collective.

    Convergence is quadratic then, and a step test need not be as strict.
    """
    _, _, stol, _ = snes.getTolerances()
    jacobian.always = True
    if "snes_stol" not in options.given:
        snes.setTolerances(stol=100.0 * stol)
    try:
        return repeat()
    finally:
        jacobian.always = False
        snes.setTolerances(stol=stol)


def backtracks(settings: IntegratorSettings, options: SolverOptions) -> bool:
    """Return whether steps that fail are tried again :func:`with_backtracking`."""
    return (
        settings.method.implicit
        and not settings.adaptive
        and options.values.get("snes_linesearch_type") == "basic"
        and "snes_linesearch_type" not in options.given
        and options.values.get("snes_type", "newtonls") == "newtonls"
    )


def with_backtracking(snes: Any, jacobian: Jacobian | None, repeat: Repeat) -> SolveError | None:
    """Repeat a step with damped Newton steps: a fixed step cannot be made smaller. Collective.

    Full steps may have left the Jacobian of a point far off.
    """
    if jacobian is not None:
        jacobian.renew()
    line_search = snes.getLineSearch()
    line_search.setType("bt")
    try:
        return repeat()
    finally:
        line_search.setType("basic")

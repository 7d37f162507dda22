"""What the user does to a TS before its first solve, and what they must leave."""

from __future__ import annotations

import re
from typing import Any

from pnode.base.communicators import as_communicator
from pnode.base.errors import ConfigurationError
from pnode.base.options import SolverOptions
from pnode.base.ranks import Ranks
from pnode.solvers.methods import Method

__all__ = ["call_user"]

_CALLBACK = re.compile("function|jacobian")


def call_user(ts: Any, method: Method, options: SolverOptions) -> None:
    """Call ``petsc_setup`` with a TS that has read its options. Collective.

    Raises
    ------
    ConfigurationError
        If something has changed that the driver of the steps or the adjoint rests on.
    BaseException
        What it raises; among several ranks as :class:`pnode.RankError` on the others.
    """
    if options.setup is None:
        return
    before = _state(ts, method)
    group = Ranks(as_communicator(ts.getComm()))
    with group.together():
        group.attempt(options.setup, ts)
        group.attempt(_refuse_changes, before, _state(ts, method))
    if not options.forward:
        ts.monitorCancel()


def _state(ts: Any, method: Method) -> dict[str, tuple[Any, str]]:
    """Return what must stay, by name, and what to do instead of changing it."""
    drives, field = "pnode drives the steps: use step_size=, max_steps= and t", "give it as rhs="
    found = {
        "the solution vector": (ts.getSolution(), "give y0"),
        "callbacks": (
            {name: value for name, value in ts.getDict().items() if _CALLBACK.search(name)},
            "give functions to Solver, and use jacobian= and preconditioner=",
        ),
        "the problem type": (ts.getProblemType(), field),
        "the equation type": (ts.getEquationType(), field),
        "the options prefix": (ts.getOptionsPrefix(), "options are found by it"),
        "the tolerances": (ts.getTolerances(), "use rtol= and atol="),
        "the times": ((ts.getTime(), ts.getTimeStep(), ts.getMaxTime()), drives),
    }
    if method.implicit:
        found["matrices"] = (ts.getIJacobian()[:2], "use jacobian= and preconditioner=")
    if method.multistep:
        snes = ts.getSNES()
        own = "this method has a Newton iteration of its own: use petsc_options="
        found["SNES"] = ((snes.getType(), snes.getTolerances()), own)
    return found


def _refuse_changes(before: dict[str, tuple[Any, str]], after: dict[str, tuple[Any, str]]) -> None:
    for name, (value, remedy) in before.items():
        if after[name][0] != value:
            raise ConfigurationError(
                f"petsc_setup= has changed {name} of the TS, which pnode relies on: {remedy}"
            )

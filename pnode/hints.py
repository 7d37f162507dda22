"""What a solve's counts say of the choices it was made with, once per solver, to the log."""

from __future__ import annotations

from pnode.engine import Engine
from pnode.notices import LOG
from pnode.run import Run

__all__ = ["hint"]

# Fewer steps tell nothing, and cost nothing.
_FEW = 100
# Where stability limits the steps, the controller's steps grow until one is rejected, again and
# again; where accuracy does, it rejects a few of a hundred.
_STIFF = 0.15
# A preconditioned system takes a dozen.
_MANY_KRYLOV = 40


def hint(engine: Engine, run: Run) -> None:
    """Log what another choice would mend, if the counts of a forward sweep say so. Not collective.

    At level WARNING, each hint once per solver, on the first rank.
    """
    stats, method, given = run.stats, engine.method, engine.hints
    if stats.steps + stats.rejected < _FEW or engine.comm.rank:
        return
    name, tried = method.name, stats.steps + stats.rejected
    often = f"{name}: {stats.rejected} of {tried} steps were rejected"
    if not method.implicit and stats.rejected > _STIFF * stats.steps and "stiff" not in given:
        given.add("stiff")
        LOG.warning(
            "%s, as where stability limits the steps of an explicit method: if the problem is "
            "stiff take an implicit one, method='es325', 'rodaspr' or 'bdf'; if f jumps in t give "
            "breakpoints=", often,
        )  # fmt: skip
    elif method.implicit and stats.rejected > 0.5 * stats.steps and "rejected" not in given:
        given.add("rejected")
        LOG.warning(
            "%s: give breakpoints= where f jumps in t, look for kinks of f in y, or take a "
            "smoother controller, controller=pnode.PID(0.4, 0.3)", often,
        )  # fmt: skip
    if stats.krylov > _MANY_KRYLOV * max(stats.newton, 1) and "krylov" not in given:
        given.add("krylov")
        LOG.warning(
            "%s: %d Krylov iterations in %d linear systems: give preconditioner=, or another "
            "jacobian= ('dense', 'block', 'sparse'), see docs/jacobians.md",
            name, stats.krylov, stats.newton,
        )  # fmt: skip

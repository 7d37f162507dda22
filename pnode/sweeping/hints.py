"""What a solve's counts say of the choices it was made with, once per solver, to the log."""

from __future__ import annotations

from pnode.base.notices import LOG
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Run

__all__ = ["hint"]

# Fewer steps tell nothing, and cost nothing.
_FEW = 100
# What smooth solutions rarely take of an explicit method: stability may limit the steps, which
# counts do not tell (it rejects one to five of a hundred, as accuracy does), but a second solve.
_MANY = 2000
# A preconditioned system takes a dozen.
_MANY_KRYLOV = 40


def hint(engine: Engine, run: Run) -> None:
    """Log what another choice may mend, if the counts of a forward sweep say so. Not collective.

    At level WARNING, each hint once per solver, on the first rank.
    """
    stats, method = run.stats, engine.method
    if stats.steps + stats.rejected < _FEW or engine.comm.rank:
        return
    name, adaptive = method.name, run.settings.adaptive
    if adaptive and stats.rejected > 0.5 * stats.steps:
        _tell(
            engine, "rejected", f"{name}: {stats.rejected} of {stats.steps + stats.rejected} steps "
            "were rejected: give breakpoints= where f jumps in t, look for kinks of f in y, or "
            "take a smoother controller, controller=pnode.PID(0.4, 0.3)"
        )  # fmt: skip
    if adaptive and not method.implicit and stats.steps > _MANY:
        _tell(
            engine, "stiff", f"{name}: {stats.steps} steps. If ten times the rtol and atol take "
            "about as many, the problem is stiff and stability limits them: take an implicit "
            "method, 'es325', 'rodaspr' or 'bdf'. If not, a higher order takes fewer"
        )  # fmt: skip
    if stats.krylov > _MANY_KRYLOV * max(stats.newton, 1):
        _tell(
            engine, "krylov", f"{name}: {stats.krylov} Krylov iterations in {stats.newton} linear "
            "systems: give preconditioner=, or another jacobian= ('dense', 'block', 'sparse'), see "
            "docs/jacobians.md"
        )  # fmt: skip


def _tell(engine: Engine, kind: str, text: str) -> None:
    if kind not in engine.hints:
        engine.hints.add(kind)
        LOG.warning("%s", text)

"""When Newton's iteration for a stage needs no more evaluation of f."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base import vectors
from pnode.base.options import SolverOptions
from pnode.base.ranks import Ranks
from pnode.problems import tolerances
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["Contraction", "may_be_left"]


def may_be_left(settings: IntegratorSettings, options: SolverOptions) -> float:
    """Return what may be left of a stage, relative to its norm; 0 where only residuals tell.

    That is where someone has chosen how SNES iterates or what it goes by, or has a hand in it,
    where equations are linear, of theta methods, which solve F = b, and beside tangents, whose
    part of a system is solved after the state's.
    """
    method, given, values = settings.method, options.given, options.values
    full = values.get("snes_linesearch_type") == "basic"
    newton = full and values.get("snes_type", "newtonls") == "newtonls"
    chosen = any(name in given for name in ("snes_type", "snes_rtol", "snes_atol"))
    chosen = chosen or options.setup is not None
    stages = method.ts_type in ("dirk", "arkimex")
    if not (newton and stages) or chosen or settings.jacobian_options.pair is not None:
        return 0.0
    if "snes_stol" in given:
        return float(values["snes_stol"])
    return 1e-14 if settings.dtype is torch.float64 else 1e-6


class Contraction:
    """Watches the iterates of a solve, and says when the last update has left next to nothing.

    From two updates the rate of convergence is known, and with it what is left after the second:
    RADAU5 and CVODE stop by that too. SNES would evaluate F once more to look at the residual. What
    is left is to be small beside the stage, so that gradients are those of the equations solved,
    and beside the tolerances of adaptive steps, so that it does not look like an error.

    Parameters
    ----------
    settings : IntegratorSettings
        Tolerances, and whether steps are adaptive.
    left : float
        What may be left, relative to the norm of the stage.
    """

    # A rate that two updates tell is no better than this one.
    LEAST_RATE = 1e-3
    # What may be left in units of the tolerances, and of round-off there.
    PART, ROUND_OFF = 1e-5, 4.0 * float(torch.finfo(torch.float64).eps)

    def __init__(self, settings: IntegratorSettings, left: float) -> None:
        self._left, self._adaptive = left, settings.adaptive
        self._rtol, self._atol = (
            tolerances.values(value, settings.place.device)
            for value in (settings.rtol, settings.atol)
        )
        self._scale: torch.Tensor | None = None
        self._noise = 0.0
        self.rest()

    def stand(self, u: torch.Tensor, ranks: Ranks) -> None:
        """Begin a step at ``u``. Collective."""
        if self._adaptive:
            self._scale = self._atol + self._rtol * u.abs()
            self._noise = self.ROUND_OFF * ranks.rms(u / self._scale)

    def begin(self) -> None:
        """Begin a solve."""
        self.rest()
        self._solving = True

    def rest(self) -> None:
        """Say that F is evaluated for other things from now on."""
        self._before: torch.Tensor | None = None
        self._step, self._solving = 0.0, False

    def ends(self, u: Any, ranks: Ranks) -> bool:
        """Whether the update that has led to this iterate is the last one. Collective."""
        if not self._solving:
            return False
        before, self._before = self._before, vectors.copy_out(u)
        if before is None:
            return False
        update = self._before - before
        last, self._step = self._step, ranks.norm(update)
        if not last:
            return False
        rate = max(self._step / last, self.LEAST_RATE)
        if not rate < 1.0:
            return False
        left = rate / (1.0 - rate)
        if not left * self._step <= self._left * ranks.norm(self._before):
            return False
        if self._scale is None:
            return True
        return left * ranks.rms(update / self._scale) <= max(self.PART, self._noise)

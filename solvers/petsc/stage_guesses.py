"""What SNES begins the solves of a step with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pnode.base.options import SolverOptions
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.library import before_each_stage
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["StageGuesses"]


class StageGuesses:
    """First guesses for one TS: slopes at the start of a step, and stages from those before.

    A guess knows of its own step alone, so a repeated one has the same bits.

    Parameters
    ----------
    ts : TS
        Set up.
    settings : IntegratorSettings
        Method and form.
    options : SolverOptions
        PETSc options; its own extrapolation is left alone.
    bridge : Bridge
        Guesses slopes, and is told of stages.
    stages : sequence of Vec
        Those of the TS, none where they are not known.

    Attributes
    ----------
    stage : int
        The stage under way; to be set to -1 before a step.
    wanted : bool
        Whether stages are guessed; else they begin where the stage before has ended.
    """

    def __init__(
        self, ts: Any, settings: IntegratorSettings, options: SolverOptions, bridge: Bridge,
        stages: Sequence[Any],
    ) -> None:  # fmt: skip
        method = settings.method
        self._bridge, self.stage = bridge, -1
        self._states = [ts.getSolution(), *stages]
        self._rows: tuple[tuple[float, ...], ...] = ()
        # What several ranks would have to agree on is whether f has a value there.
        own = "ts_arkimex_initial_guess_extrapolate" not in options.given
        by_stages = method.ts_type in ("dirk", "arkimex")
        own = own and settings.adaptive  # a large step may have other solutions nearby
        if by_stages and len(stages) == method.stages and own and not settings.parallel:
            assert method.scheme is not None
            self._rows = method.scheme.stage_guesses
        self._slopes = method.carries_slope or settings.form == "imex_mass"
        self.wanted = any(self._rows)
        if self._slopes or self.wanted:
            # PETSc solves for DIRK's initial slope from whatever slope it had last.
            ts.getSNES().setInitialGuess(self._fill)
        self._callback = before_each_stage(ts, self._next) if by_stages else None

    def without(self, repeat: Callable[[], Any]) -> Any:
        """Repeat a step whose stages are not guessed."""
        wanted, self.wanted = self.wanted, False
        try:
            return repeat()
        finally:
            self.wanted = wanted

    def _next(self) -> None:
        self.stage += 1
        self._bridge.forgiving = False
        self._bridge.stage_begins()

    def _fill(self, snes: Any, guess: Any) -> None:
        """Fill in the guess of the solve that begins: of a slope, which PETSc takes for a stage."""
        if self._slopes:
            self._bridge.guess_slope(self._states[0], guess)
        jacobian = self._bridge.jacobian
        # One iteration solves linear equations, from wherever f has a value already.
        linear = jacobian is not None and (jacobian.constant or jacobian.guessing)
        if self._bridge.start_time is None and self.wanted and self.stage >= 0 and not linear:
            row = self._rows[self.stage]
            used = [(w, state) for w, state in zip(row, self._states, strict=False) if w]
            if used:
                self._bridge.forgiving = True
                guess.set(0.0)
                guess.maxpy(*zip(*used, strict=True))

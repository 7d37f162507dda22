"""Explicit Runge-Kutta steps of independent samples: each row with its own time and length.

A pass tries one step of each row that is not at its end. Rows that do not step stay where they
are. What chooses the steps of a row is what would choose them if it were solved alone: the
controller of ``stepping.py`` with PETSc's TSADAPTBASIC, and the clock of ``clock.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pnode.errors import (
    NonFiniteVectorField,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.evidence import project
from pnode.solution import Ledger
from pnode.solvers.clock import FixedGrid
from pnode.solvers.methods import Method
from pnode.solvers.scheme import Scheme
from pnode.solvers.step_control import StepControl
from pnode.vectors import REAL

__all__ = ["Pass", "SampleSweep", "live_scheme"]

# TSADAPTBASIC's defaults (TSAdaptSetSafety, TSAdaptSetClip), and stepping.py's after a failure.
_SAFETY, _CLIP, _FAILURE_FACTOR = 0.9, (0.1, 10.0), 0.25
_LONGEST = 1e20

#: f at times of shape ``(B,)`` and states of shape ``(B, n)``, in double precision.
Rate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def live_scheme(method: Method, adaptive: bool) -> Scheme:
    """Return the coefficients of a method, for fixed steps without idle stages."""
    scheme = method.scheme
    assert scheme is not None
    return scheme if adaptive else scheme.without_idle_stages(scheme.fsal)


@dataclass(frozen=True, eq=False)
class Pass:
    """What the adjoint of a pass needs.

    Attributes
    ----------
    start, length : Tensor
        Shape ``(B,)``, the user's time; the length is 0 for rows that did not step.
    stages : sequence of Tensor
        Shape ``(B, n)`` each, f's precision; those of rows that did not step are their state.
    reached : Tensor
        Shape ``(B,)``, the index of the output time at which the step ends, -1 for none.
    noted : float
        Projection of the value of f at the first stage.
    """

    start: torch.Tensor
    length: torch.Tensor
    stages: Sequence[torch.Tensor]
    reached: torch.Tensor
    noted: float


@dataclass
class SampleSweep:
    """The forward sweep of all rows.

    Attributes
    ----------
    method : Method
        An explicit one of the Runge-Kutta family.
    control : StepControl
        How steps are chosen.
    rate : callable
        The vector field.
    times : Tensor
        Output times, shape ``(T, B)``, double precision, each column strictly monotone.
    resolution : float
        Relative spacing of the numbers that they were given in.
    rtol, atol : float or Tensor
        Of adaptive steps; tensors have shape ``(B, n)``.
    dtype : torch.dtype
        Precision of f.
    keep : bool
        Whether :attr:`passes` are recorded.
    skip_failed : bool
        Whether a row that fails becomes NaN from there on, instead of ending the solve.
    """

    method: Method
    control: StepControl
    rate: Rate
    times: torch.Tensor
    resolution: float
    rtol: float | torch.Tensor
    atol: float | torch.Tensor
    dtype: torch.dtype
    keep: bool
    skip_failed: bool
    ledger: Ledger
    passes: list[Pass] = field(default_factory=list)

    def run(self, u: torch.Tensor) -> torch.Tensor:
        """Integrate from states ``(B, n)``, double precision; return ``(T, B, n)``."""
        self._begin(u)
        attempt = self._adapt if self.control.step_size is None else self._fixed
        while bool(self.active.any()):
            attempt()
        return self.outputs

    # ------------------------------------------------------------------------------- state

    def _begin(self, u: torch.Tensor) -> None:
        number, rows = self.times.shape
        self.u, self.number = u, number
        self.scheme = live_scheme(self.method, self.control.step_size is None)
        ends = self.times[-1] >= self.times[0]
        self.direction = torch.where(ends, 1.0, -1.0).to(REAL)
        self.clock = self.times * self.direction  # of rows, which all run forwards
        self.s = self.clock[0].clone()
        self.target = u.new_ones(rows, dtype=torch.long)
        self.outputs = u.new_full((number, *u.shape), math.nan)
        self.outputs[0] = u
        self.active = torch.full((rows,), number > 1, device=u.device)
        self.taken = u.new_zeros(rows, dtype=torch.long)
        self.slope: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self.natural: torch.Tensor | None = None
        self.nonfinite = torch.zeros_like(self.active)
        self.grid: tuple[torch.Tensor, ...] | None = None

    def _user_time(self) -> torch.Tensor:
        return self.direction * self.s

    # -------------------------------------------------------------------------- fixed steps

    def _fixed(self) -> None:
        if self.grid is None:
            self.grid = self._plan()
        index = self.taken.clamp(max=len(self.grid[0]) - 1)[None]
        h, end, mark = (part.gather(0, index)[0] for part in self.grid)
        self._limit()
        h = torch.where(self.active, h, 0.0)
        stages, state, _ = self._step(h, self.active)
        good = self._finite(state) & ~self.nonfinite
        failed = self.active & ~good
        self._advance(self.active & good, h, end, mark, stages, state)
        if bool(failed.any()):
            self._fail(failed, NonFiniteVectorField, "the vector field returned NaN or infinity")

    def _plan(self) -> tuple[torch.Tensor, ...]:
        """Return length, end and output reached of each step, shape ``(steps, B)``."""
        columns: list[list[tuple[float, float, int]]] = []
        assert self.control.step_size is not None
        for times in self.clock.t().tolist():
            grid = FixedGrid(tuple(times), self.control.step_size, self.resolution)
            if grid.unresolved is not None:
                at = len(columns)
                raise StepSizeUnderflow(
                    f"row {at}: step_size={self.control.step_size!r}, and float64 does not tell "
                    "such times apart there: take larger steps, or measure t from nearby",
                    time=self.direction[at].item() * times[grid.unresolved], step=0,
                    method=self.method.name,
                )  # fmt: skip
            column: list[tuple[float, float, int]] = []
            for interval in range(len(times) - 1):
                steps = [(h, after, -1) for _, h, after in grid.steps(interval)]
                steps[-1] = (*steps[-1][:2], interval + 1)
                column += steps
            columns.append(column)
        padded = list(itertools.zip_longest(*columns, fillvalue=(0.0, 0.0, -1)))
        whole = torch.tensor(padded, dtype=REAL, device=self.u.device)
        return whole[..., 0], whole[..., 1], whole[..., 2].long()

    # ------------------------------------------------------------------------ adaptive steps

    def _adapt(self) -> None:
        control, s = self.control, self.s
        end = self.clock.gather(0, self.target.clamp(max=self.number - 1)[None])[0]
        left = end - s
        if self.natural is None:
            self.natural = self._first_step(end)
        self._limit()
        size = s.abs()
        spacing = torch.nextafter(size, torch.full_like(size, math.inf)) - size
        least = torch.maximum(4.0 * spacing, 1e-30 * left)
        natural = torch.maximum(self.natural, least).clamp(min=control.min_step)
        natural = natural.clamp(max=control.max_step)
        short = self.active & (natural < torch.minimum(least, left))
        if bool(short.any()):
            self._fail(short, StepSizeUnderflow, f"max_step={control.max_step!r} is too short")
        wanted = torch.where(natural > left / 2.0, left / 2.0, natural)
        wanted = torch.where(natural >= left * (1.0 - 1e-10), left, wanted)
        after = s + wanted
        after = torch.where(after - s > wanted, torch.nextafter(after, s), after)
        after = torch.where(wanted == left, end, after)
        length = torch.where(self.active, after - s, 0.0)
        stages, state, error = self._step(length, self.active)
        failed = ~self._finite(state) | self.nonfinite | ~error.isfinite()
        factor = (_SAFETY * error.pow(-1.0 / self.method.order)).clamp(*_CLIP)
        proposed = (length * factor).clamp(max=min(control.max_step, _LONGEST))
        accepted = self.active & ~failed & (error <= 1.0)
        rejected = self.active & ~accepted
        shortened = (wanted < natural) & (proposed >= length)
        onward = torch.where(shortened, torch.maximum(proposed, natural), proposed)
        useful = ~failed & (proposed > 0.0) & (proposed < length)
        back = torch.where(useful, proposed, _FAILURE_FACTOR * length)
        self.natural = torch.where(accepted, onward, torch.where(rejected, back, self.natural))
        mark = torch.where(wanted == left, self.target, -1)
        self._advance(accepted, length, after, mark, stages, state)
        self.ledger.rejected += int(rejected.sum())
        self._check_minimum(rejected & (wanted <= least.clamp(min=control.min_step)))

    def _check_minimum(self, stuck: torch.Tensor) -> None:
        if bool((own := stuck & self.nonfinite).any()):
            self._fail(own, NonFiniteVectorField, "the vector field returned NaN or infinity")
        if bool((own := stuck & self.active).any()):
            self._fail(
                own, StepSizeUnderflow,
                "the smallest step failed: lower min_step, loosen rtol and atol, or look for a "
                "singularity of the vector field",
            )  # fmt: skip

    def _first_step(self, end: torch.Tensor) -> torch.Tensor:
        """Choose the first step of each row; see ``automatic_step`` of step_control.py."""
        control, y0, s = self.control, self.u, self.s
        if control.first_step is not None:
            return torch.full_like(s, control.first_step)
        f0 = self.slope = self.rate(self._user_time(), y0)
        scale = self.atol + self.rtol * y0.abs()
        d0, d1 = _rms(y0 / scale), _rms(f0 / scale)
        moves = (d0 >= 1e-5) & (d1 >= 1e-5) & d1.isfinite()
        guess = torch.where(moves, 0.01 * d0 / d1, 1e-6)
        guess = torch.minimum(guess, end - s)
        h = self.direction * guess
        moved = self.rate(self.direction * (s + guess), y0 + h[:, None] * f0)
        d2 = _rms((moved - f0) / scale) / guess
        steepest = torch.maximum(d1, d2)
        better = (0.01 / steepest).pow(1.0 / (self.method.order + 1))
        better = torch.where(steepest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), better)
        chosen = torch.minimum(100.0 * guess, better).clamp(max=control.max_step)
        return torch.where(steepest.isfinite(), chosen, guess)

    # ------------------------------------------------------------------------------ one pass

    def _step(
        self, length: torch.Tensor, moving: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return the stages, the states after a step, and its error norms."""
        scheme, u, t = self.scheme, self.u, self._user_time()
        h = (self.direction * length)[:, None]
        if self.slope is None:
            self.slope = self.rate(t, u)
        self.nonfinite = moving & ~self._finite(self.slope)
        stages, slopes = [u.to(self.dtype)], [self.slope]
        for i in range(1, scheme.stages):
            Y = _moved(u, h, scheme.A[i], slopes)
            stages.append(Y.to(self.dtype, copy=True))
            slopes.append(self.rate(t + scheme.c[i] * h[:, 0], Y))
            self.nonfinite |= moving & ~self._finite(slopes[-1])
        state = _moved(u, h, scheme.b, slopes)
        self._last = slopes[-1] if scheme.fsal else None
        error = torch.zeros_like(length)
        if self.control.step_size is None:
            assert scheme.b_embedded is not None
            other = _moved(u, h, scheme.b_embedded, slopes)
            scale = self.atol + self.rtol * torch.maximum(state.abs(), other.abs())
            error = _rms((other - state) / scale)
        return stages, state, error

    def _advance(
        self, accepted: torch.Tensor, length: torch.Tensor, end: torch.Tensor,
        mark: torch.Tensor, stages: list[torch.Tensor], state: torch.Tensor,
    ) -> None:  # fmt: skip
        """Let the accepted rows be at the ends of their steps."""
        if not bool(accepted.any()):
            return
        own, mark = accepted[:, None], torch.where(accepted, mark, -1)
        assert self.slope is not None
        if self.keep:
            start, h = self._user_time(), torch.where(accepted, self.direction * length, 0.0)
            kept = tuple(torch.where(own, stage, stages[0]) for stage in stages)
            self.passes.append(Pass(start, h, kept, mark, project(self.slope.reshape(-1))))
        self.u = torch.where(own, state, self.u)
        self.slope = None if self._last is None else torch.where(own, self._last, self.slope)
        self.s = torch.where(accepted, end, self.s)
        self.taken += accepted
        self.ledger.steps += int(accepted.sum())
        rows = mark.ge(0).nonzero()[:, 0]
        self.outputs[mark[rows], rows] = self.u[rows]
        self.target[rows] += 1
        self.active &= self.target < self.number

    def _limit(self) -> None:
        most = self.control.max_steps
        if most is not None and bool((over := self.active & (self.taken >= most)).any()):
            self._fail(over, StepLimitReached, f"max_steps={most} steps did not reach its last "
                       "output time: raise max_steps, or loosen the tolerances")  # fmt: skip

    def _fail(self, failed: torch.Tensor, kind: type[SolveError], why: str) -> None:
        """Give rows up, or raise the error of the first of them."""
        row = int(failed.nonzero()[0])
        if not self.skip_failed:
            where: dict[str, Any] = {
                "time": float(self._user_time()[row]), "step": int(self.taken[row]),
            }  # fmt: skip
            raise kind(f"row {row} of y0: {why}", method=self.method.name, **where)
        self.active &= ~failed

    @staticmethod
    def _finite(values: torch.Tensor) -> torch.Tensor:
        return values.isfinite().all(dim=1)


def _moved(
    u: torch.Tensor, h: torch.Tensor, row: Sequence[float], slopes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return u + h sum_j row_j K_j; exactly u where h is 0, whatever the slopes."""
    total = torch.zeros_like(u)
    for weight, slope in zip(row, slopes, strict=False):
        if weight:
            total = total + weight * slope
    return torch.where(h == 0.0, u, u + h * total)


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(dim=1).sqrt()

"""Steps of independent samples: each row with its own time and length.

A pass tries one step of each row that is not at its end. Rows that do not step stay where they
are; once fewer than half do step, the others are left out, if f takes that. What chooses the steps
of a row is what would choose them if it were solved alone: the controller of ``stepping.py`` with
PETSc's TSADAPTBASIC, and the clock of ``clock.py``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from pnode.base.errors import (
    LinearSolveFailed,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.base.evidence import project
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.problems.tolerances import error_norm, in_units
from pnode.solvers.methods import Method
from pnode.solvers.sample_failures import WHY, row_grids
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import Attempt, RowMethod
from pnode.solvers.sample_record import Pass, Passes
from pnode.solvers.step_control import StepControl

__all__ = ["SampleSweep"]

# TSADAPTBASIC's defaults (TSAdaptSetSafety, TSAdaptSetClip), and stepping.py's after a failure.
_SAFETY, _CLIP, _FAILURE_FACTOR = 0.9, (0.1, 10.0), 0.25
_LONGEST = 1e20

# Fewer rows are not worth the look at whether f takes part of them.
_FEWEST_ROWS = 8


@dataclass
class SampleSweep:
    """The forward sweep of all rows.

    Attributes
    ----------
    method : Method
        A row of the table.
    rows_method : RowMethod
        Its steps.
    control : StepControl
        How steps are chosen.
    field : RowsField
        The vector field.
    times : Tensor
        Output times, shape ``(T, B)``, double precision, each column strictly monotone.
    resolution : float
        Relative spacing of the numbers that they were given in.
    rtol, atol : float or Tensor
        Of adaptive steps; tensors have shape ``(B, n)``.
    passes : Passes or None
        Where steps are recorded.
    skip_failed : bool
        Whether a row that fails becomes NaN from there on, instead of ending the solve.
    every : bool
        Whether the ends of all steps are outputs, instead of the output times.
    solves : int
        How many such solves there were: see :meth:`RowsField.refuse_coupled`.
    ends : Tensor
        After :meth:`run`, where these are: shape ``(K + 1, B)``, NaN behind the last of a row.
    """

    method: Method
    rows_method: RowMethod
    control: StepControl
    field: RowsField
    times: torch.Tensor
    resolution: float
    rtol: float | torch.Tensor
    atol: float | torch.Tensor
    passes: Passes | None
    skip_failed: bool
    ledger: Ledger
    every: bool = False
    solves: int = 0

    def run(self, u: torch.Tensor) -> torch.Tensor:
        """Integrate from states ``(B, n)``, double precision; return ``(T, B, n)``.

        ``(K + 1, B, n)`` of the ends of all steps.
        """
        self._begin(u)
        attempt = self._adapt if self.control.step_size is None else self._fixed
        while live := int(self.active.sum()):
            if self._gathers and 2 * live < len(self.active) >= _FEWEST_ROWS:
                self._gather()
            attempt()
        return self.outputs if not self.every else self.outputs[: len(self.ends)]

    # ------------------------------------------------------------------------------- state

    def _begin(self, u: torch.Tensor) -> None:
        number, rows = self.times.shape
        self.u, self.number = u, number
        ends = self.times[-1] >= self.times[0]
        self.direction = torch.where(ends, 1.0, -1.0).to(REAL)
        self.clock = self.times * self.direction  # of rows, which all run forwards
        self.s = self.clock[0].clone()
        self.target = u.new_ones(rows, dtype=torch.long)
        self.outputs = u.new_full((number, *u.shape), math.nan)
        self.outputs[0] = u
        self.ends = self.times[:1]
        self.active = torch.full((rows,), number > 1, device=u.device)
        self.taken = u.new_zeros(rows, dtype=torch.long)
        self.slope: torch.Tensor | None = None
        if number > 1 and rows > 1:
            self._look_at_rows(u)
        self.rows: torch.Tensor | None = None
        self._gathers = True
        self.natural: torch.Tensor | None = None
        # Where the step before began, and its length, 0 of none; for methods that extrapolate.
        self.before: torch.Tensor | None = None
        self.before_length: torch.Tensor | None = None
        if self.control.step_size is None and self.method.extrapolates:
            self.before, self.before_length = u, torch.zeros_like(self.s)
        self.grid: tuple[torch.Tensor, ...] | None = None

    def _look_at_rows(self, u: torch.Tensor) -> None:
        """See to it that no part of f couples rows; its value is the first step's first slope."""
        for part in (self.field, self.field.explicit):
            if part is not None:
                value = part.rate(self.times[0], u)
                self.slope = value if part is self.field else self.slope
                part.refuse_coupled(self.times[0], u, value, self.solves)

    def _gather(self) -> None:
        """Leave out the rows that do not step any more, unless f wants all of them."""
        keep, t = self.active.nonzero()[:, 0], self._user_time()
        whole = self.field.glance(t, self.u)[keep]
        try:
            part = self.field.of_rows(len(keep))
            alike = _alike(part.glance(t[keep], self.u[keep]), whole, part.dtype)
        except Exception:  # it has something of its own for each row
            alike = False
        self._gathers = alike
        if not alike:
            return
        self.field, self.rows = part, keep if self.rows is None else self.rows[keep]
        for name in (
            "u", "s", "direction", "target", "active", "taken", "slope", "natural", "before",
            "before_length",
        ):  # fmt: skip
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[keep])
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            setattr(self, name, value[keep] if isinstance(value, torch.Tensor) else value)
        self.clock = self.clock[:, keep]
        if self.grid is not None:
            self.grid = tuple(column[:, keep] for column in self.grid)

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
        found, _ = self._step(h)
        good = found.state.isfinite().all(dim=1) & ~found.nonfinite & ~found.failed
        failed = self.active & ~good
        self._advance(self.active & good, h, end, mark, found)
        if bool((own := failed & ~found.failed).any()):
            self._fail(own, NonFiniteVectorField)
        if bool((own := failed & found.failed).any()):
            linear = self.method.linearly_implicit
            self._fail(own, LinearSolveFailed if linear else NonlinearSolveFailed)

    def _plan(self) -> tuple[torch.Tensor, ...]:
        """Return length, end and output reached of each step, shape ``(steps, B)``."""
        columns: list[list[tuple[float, float, int]]] = []
        assert self.control.step_size is not None
        for grid in row_grids(
            self.clock.t(), self.direction, self.control.step_size, self.resolution,
            self.method.name,
        ):  # fmt: skip
            column: list[tuple[float, float, int]] = []
            for interval in range(self.number - 1):
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
        found, error = self._step(length)
        failed = ~found.state.isfinite().all(dim=1) | found.nonfinite | found.failed
        failed |= ~error.isfinite()
        order = 2 if self.method.extrapolates else self.method.order
        factor = (_SAFETY * error.pow(-1.0 / order)).clamp(*_CLIP)
        if self.before_length is not None:  # a first step is accepted unseen, and the next as long
            factor = torch.where(self.before_length == 0.0, 1.0, factor)
        proposed = (length * factor).clamp(max=min(control.max_step, _LONGEST))
        accepted = self.active & ~failed & (error <= 1.0)
        rejected = self.active & ~accepted
        shortened = (wanted < natural) & (proposed >= length)
        onward = torch.where(shortened, torch.maximum(proposed, natural), proposed)
        useful = ~failed & (proposed > 0.0) & (proposed < length)
        back = torch.where(useful, proposed, _FAILURE_FACTOR * length)
        self.natural = torch.where(accepted, onward, torch.where(rejected, back, self.natural))
        mark = torch.where(wanted == left, self.target, -1)
        self._advance(accepted, length, after, mark, found)
        self.ledger.rejected += int(rejected.sum())
        stuck = rejected & (wanted <= least.clamp(min=control.min_step))
        if bool((own := stuck & found.nonfinite).any()):
            self._fail(own, NonFiniteVectorField)
        if bool((own := stuck & self.active).any()):
            self._fail(own, StepSizeUnderflow)

    def _first_step(self, end: torch.Tensor) -> torch.Tensor:
        """Choose the first step of each row; see ``automatic_step`` of step_control.py."""
        control, y0, s = self.control, self.u, self.s
        given = control.first_step
        if given is not None and not self.method.implicit:
            return torch.full_like(s, given)
        if self.slope is None:
            self.slope = self.field.rate(self._user_time(), y0)
        f0, explicit = self.slope, self.field.explicit
        if explicit is not None:
            f0 = f0 + explicit.rate(self._user_time(), y0)
        own = slice(self.field.width)
        scale = self.atol + self.rtol * y0[:, own].abs()
        d0, d1 = (_rms(in_units(v[:, own], scale)) for v in (y0, f0))
        moves = (d0 >= 1e-5) & (d1 >= 1e-5) & d1.isfinite()
        guess = torch.where(moves, 0.01 * d0 / d1, 1e-6)
        guess = torch.minimum(guess, end - s)
        h = self.direction * guess
        moved = self.field.total_rate(self.direction * (s + guess), y0 + h[:, None] * f0)
        d2 = _rms(in_units((moved - f0)[:, own], scale)) / guess
        steepest = torch.maximum(d1, d2)
        better = (0.01 / steepest).pow(1.0 / (self.method.order + 1))
        better = torch.where(steepest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), better)
        chosen = torch.minimum(100.0 * guess, better).clamp(max=control.max_step)
        chosen = torch.where(steepest.isfinite(), chosen, guess)
        return chosen if given is None else chosen.clamp(max=given)  # see _Sweep of stepping.py

    # ------------------------------------------------------------------------------ one pass

    def _step(self, length: torch.Tensor) -> tuple[Attempt, torch.Tensor]:
        """Try steps of the rows that are active; return them, and their error norms."""
        found = self.rows_method.attempt(
            self.field, self._user_time(), self.u, self.direction * length, self.slope
        )
        self.slope = found.first
        reached = found.other
        if self.before is not None and self.before_length is not None:
            known = (self.before_length != 0.0) & (length != 0.0)
            a = torch.where(known, 1.0 + self.before_length / length, 2.0)[:, None]
            change = -found.state / a + self.u / (a - 1.0) - self.before / (a * (a - 1.0))
            reached = found.state + torch.where(known[:, None], change, 0.0)
        if reached is None:
            return found, torch.zeros_like(length)
        state, other = (y[:, : self.field.width] for y in (found.state, reached))
        scale = self.atol + self.rtol * torch.maximum(state.abs(), other.abs())
        return found, error_norm(other - state, scale)

    def _advance(
        self, accepted: torch.Tensor, length: torch.Tensor, end: torch.Tensor,
        mark: torch.Tensor, found: Attempt,
    ) -> None:  # fmt: skip
        """Let the accepted rows be at the ends of their steps."""
        if not bool(accepted.any()):
            return
        own, mark = accepted[:, None], torch.where(accepted, mark, -1)
        reached = torch.where(accepted, self.taken + 1, -1) if self.every else mark
        if self.passes is not None:
            h = torch.where(accepted, self.direction * length, 0.0)
            note = project(torch.where(own, found.value, 0.0).reshape(-1))
            kept = tuple(
                self.u if stage is self.u else torch.where(own, stage, self.u.to(stage.dtype))
                for stage in found.kept
            )
            self.passes.add(Pass(self._user_time(), h, reached, note, self.rows, kept, self.u))
        if self.before is not None and self.before_length is not None:
            self.before = torch.where(own, self.u, self.before)
            self.before_length = torch.where(accepted, length, self.before_length)
        self.u = torch.where(own, found.state, self.u)
        if found.last is None:
            self.slope = None
        else:
            assert self.slope is not None
            self.slope = torch.where(own, found.last, self.slope)
        self.s = torch.where(accepted, end, self.s)
        self.taken += accepted
        self.ledger.steps += int(accepted.sum())
        rows = reached.ge(0).nonzero()[:, 0]
        at = reached[rows], rows if self.rows is None else self.rows[rows]
        if self.every and int(reached.max()) == len(self.ends):
            self._grow()
        if self.every:
            self.ends[at] = self._user_time()[rows]
        self.outputs[at] = self.u[rows]
        self.target += mark.ge(0)
        self.active &= self.target < self.number

    def _grow(self) -> None:
        """Make room for one step more of some row."""
        self.ends = torch.cat([self.ends, torch.full_like(self.ends[:1], math.nan)])
        if len(self.ends) > len(self.outputs):
            self.outputs = torch.cat([self.outputs, torch.full_like(self.outputs, math.nan)])

    def _limit(self) -> None:
        most = self.control.max_steps
        if most is not None and bool((over := self.active & (self.taken >= most)).any()):
            self._fail(over, StepLimitReached)

    def _fail(self, failed: torch.Tensor, kind: type[SolveError], why: str = "") -> None:
        """Give rows up, or raise the error of the first of them."""
        row = int(failed.nonzero()[0])
        if not self.skip_failed:
            where: dict[str, Any] = {
                "time": float(self._user_time()[row]), "step": int(self.taken[row]),
            }  # fmt: skip
            named = row if self.rows is None else int(self.rows[row])
            why = why or WHY[kind].format(most=self.control.max_steps, who=self.field.who)
            raise kind(f"row {named} of y0: {why}", method=self.method.name, **where)
        self.active &= ~failed


def _alike(part: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values are the same but for round-off."""
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    return torch.allclose(part, whole, rtol=tolerance, atol=0.0, equal_nan=True)


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(dim=1).sqrt()

"""What a sweep of independent samples keeps of its steps, within a limit of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from pnode.base.errors import CheckpointError, NonFiniteDerivative
from pnode.base.evidence import differs, project
from pnode.base.ledger import Ledger
from pnode.base.vectors import is_finite
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import RowMethod

__all__ = ["Pass", "Passes", "taken_again"]


@dataclass(eq=False)
class Pass:
    """A step of some of the rows.

    Attributes
    ----------
    start, length : Tensor
        Shape ``(k,)``, the user's time; the length is 0 for rows that did not step.
    reached : Tensor
        Shape ``(k,)``, the index of the output time at which the step ends, -1 for none.
    noted : float or None
        Projection of the value of f at the first stage, where rows stepped; None if not known.
    rows : Tensor or None
        Which ones of y0 they are, None for all.
    kept : tuple of Tensor or None
        What the adjoint needs, shape ``(k, n)`` each, rows that did not step being at their state.
    state : Tensor or None
        The states at the start, shape ``(k, n)``, double precision, to repeat the steps from.
    """

    start: torch.Tensor
    length: torch.Tensor
    reached: torch.Tensor
    noted: float | None
    rows: torch.Tensor | None
    kept: tuple[torch.Tensor, ...] | None
    state: torch.Tensor | None

    @property
    def kept_bytes(self) -> int:
        """What the adjoint needs, besides the state."""
        return sum(one.nbytes for one in self.kept or () if one is not self.state)


@dataclass(eq=False)
class Passes:
    """The passes of a sweep.

    With a limit the states at their starts are kept beside the stages, until both take too much:
    then the states alone, and in the end those of every second pass, of every fourth... Steps in
    between are repeated. What that takes is counted before, so that neither sweep exceeds the
    limit.

    Attributes
    ----------
    method : RowMethod
        Repeats steps.
    limit : float
        Bytes of states and stages; infinite for none.
    whole : bool
        Whether stages are kept.
    ledger : Ledger
        Notes the peak.
    """

    method: RowMethod
    limit: float
    whole: bool
    ledger: Ledger
    passes: list[Pass] = field(default_factory=list)
    _stride: int = 1
    _bytes: int = 0
    _stages: int = 0
    _states: int = 0

    def __len__(self) -> int:
        return len(self.passes)

    def add(self, one: Pass) -> None:
        """Keep a pass, which comes with all that there is to keep.

        Raises
        ------
        CheckpointError
            If the limit is too small however many steps are repeated.
        """
        index = len(self.passes)
        assert one.state is not None
        self._stages = max(self._stages, one.kept_bytes)
        self._states = max(self._states, one.state.nbytes)
        if not self.whole:
            one.kept = None
        elif math.isinf(self.limit):
            one.state = None
        if index % self._stride:
            one.state = None
        self.passes.append(one)
        self._bytes += self._size(one)
        while self._bytes + self._reserve() > self.limit:
            self._thin()
        self.ledger.ram_bytes = max(self.ledger.ram_bytes, self._bytes)

    @staticmethod
    def _size(one: Pass) -> int:
        return one.kept_bytes + (0 if one.state is None else one.state.nbytes)

    def _reserve(self) -> int:
        """Return what a backward sweep holds besides: repeated states, and the stages of one."""
        if self.whole:
            return 0
        return self._stages + (min(self._stride, len(self.passes)) - 1) * self._states

    def _thin(self) -> None:
        """Keep less."""
        if self.whole:
            self.whole = False
            for one in self.passes:
                one.kept = None
        elif self._stride >= len(self.passes):
            raise CheckpointError(
                f"checkpointing=: the limit of {int(self.limit)} bytes does not hold what the "
                f"first {len(self.passes)} steps of the samples need, with states of "
                f"{self._states} bytes and stages of {self._stages}, however many are repeated: "
                "raise memory, or solve fewer samples at once"
            )
        else:
            self._stride *= 2
            for index, one in enumerate(self.passes):
                if index % self._stride:
                    one.state = None
        self._bytes = sum(map(self._size, self.passes))

    def backwards(
        self, whole: RowsField, ledger: Ledger
    ) -> Iterator[tuple[Pass, RowsField, tuple[torch.Tensor, ...]]]:
        """Yield each pass from the last to the first, with f on its rows and what was kept of it.

        ``ledger`` counts the steps that are repeated.
        """
        end = len(self.passes)
        while end:
            begin = end - 1
            while self.passes[begin].kept is None and self.passes[begin].state is None:
                begin -= 1
            states = self._repeated(begin, end, whole, ledger)
            for index in reversed(range(begin, end)):
                one = self.passes[index]
                part = self._field(one, whole)
                kept = one.kept
                if kept is None and self.method.keeps_states:
                    kept = (states.pop(),)
                elif kept is None:
                    state = states.pop()
                    again = self.method.attempt(part, one.start, state, one.length)
                    ledger.recomputed += int(one.length.ne(0.0).sum())
                    kept = again.kept
                yield one, part, kept
            end = begin

    def _repeated(
        self, begin: int, end: int, whole: RowsField, ledger: Ledger
    ) -> list[torch.Tensor]:
        """Return the states at the starts of some passes, of which the first is kept."""
        one = self.passes[begin]
        if one.kept is not None:
            return []
        assert one.state is not None
        states = [one.state]
        everything = one.state.new_zeros(whole.problem.layout.shapes[0][0], one.state.shape[1])
        for index in range(begin, end - 1):
            one, after = self.passes[index], self.passes[index + 1]
            again = self.method.attempt(self._field(one, whole), one.start, states[-1], one.length)
            ledger.recomputed += int(one.length.ne(0.0).sum())
            if one.rows is after.rows:
                states.append(again.state)
                continue
            everything[slice(None) if one.rows is None else one.rows] = again.state
            states.append(everything[after.rows])
        held = sum(state.nbytes for state in states[1:])
        ledger.ram_bytes = max(ledger.ram_bytes, self._bytes + held + self._stages)
        return states

    @staticmethod
    def _field(one: Pass, whole: RowsField) -> RowsField:
        return whole if one.rows is None else whole.of_rows(len(one.rows))


def taken_again(
    steps: Sequence[Pass], method: RowMethod, whole: RowsField, state: torch.Tensor,
    outputs: torch.Tensor, passes: Passes | None,
) -> None:  # fmt: skip
    """Take the steps of passes once more, of states with their tangents.

    Parameters
    ----------
    steps : sequence of Pass
        Those of the states alone.
    method, whole, state : RowMethod, RowsField, Tensor
        How, of which f, and from where, shape ``(B, n)``.
    outputs : Tensor
        Where the states at output times are put, ``(T, B, n)``.
    passes : Passes or None
        Where the steps are recorded.

    Raises
    ------
    FieldChanged
        If f is not that of the steps any more.
    NonFiniteDerivative
        If it is, and a tangent is not finite.
    """
    for one in steps:
        rows = slice(None) if one.rows is None else one.rows
        part, own = Passes._field(one, whole), state[rows]
        found = method.attempt(part, one.start, own, one.length)
        moving = one.length.ne(0.0)[:, None]
        value = torch.where(moving, found.value, 0.0)
        by = 0.0 if one.noted is None else differs(value[:, : part.own].reshape(-1), one.noted)
        if by:
            raise whole.changed(float(one.start[0]), by)
        bad = moving[:, 0] & (found.nonfinite | found.failed)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            states = value[first, : part.own], found.state[first, : part.own]
            at, row = float(one.start[first]), first if one.rows is None else int(one.rows[first])
            if all(map(is_finite, states)):
                raise NonFiniteDerivative(
                    f"a tangent of row {row} of y0 is NaN or infinite: a derivative of the vector "
                    "field is not finite here; keep the state away from there, or write the field "
                    "so that its derivative exists",
                    time=at,
                )
            raise whole.changed(at, math.inf)
        if passes is not None:
            kept = tuple(
                own if stage is own else torch.where(moving, stage, own.to(stage.dtype))
                for stage in found.kept
            )
            passes.add(replace(one, noted=project(value.reshape(-1)), kept=kept, state=own))
        after = torch.where(moving, found.state, own)
        state = after if one.rows is None else state.index_copy(0, one.rows, after)
        whole.ledger.steps += int(moving.sum())
        marks = one.reached.ge(0).nonzero()[:, 0]
        outputs[one.reached[marks], marks if one.rows is None else one.rows[marks]] = after[marks]

"""The sweep of all rows of independent samples: a loop over solves of one program."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from pnode.base.errors import (
    BackwardError,
    LinearSolveFailed,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.base.ledger import Ledger
from pnode.base.options import log_stage
from pnode.base.transforms import outside
from pnode.base.vectors import REAL
from pnode.problems.problem import InitialValueProblem
from pnode.problems.tolerances import Resolved
from pnode.solvers.compiled import driver
from pnode.solvers.compiled.backend import Wanted
from pnode.solvers.compiled.implicit_settings import prepared
from pnode.solvers.compiled.row_programs import RowProgram
from pnode.solvers.sample_failures import WHY, row_grids
from pnode.solvers.sample_record import Pass

__all__ = ["RowSweep", "Rows"]

# The rows of a group add to one sum of gradients; so many groups there are at most.
_MOST_GROUPS = 64
# Status in kernel.h.
_PAUSED, _NO_ROOM = 1, 9
_ERRORS: dict[int, type[SolveError]] = {
    2: NonFiniteVectorField, 3: NonlinearSolveFailed, 4: LinearSolveFailed, 5: StepLimitReached,
    6: StepSizeUnderflow, 8: NonFiniteVectorField,
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What the rows of a solve are.

    Attributes
    ----------
    y0 : Tensor
        Shape ``(B, n)``, double precision.
    times : Tensor
        Output times, shape ``(T, B)``, double precision.
    rtol, atol : float or EntrywiseTolerance
        Of one row, or of all.
    skip_failed : bool
        Whether a row that fails becomes NaN from there on.
    """

    y0: torch.Tensor
    times: torch.Tensor
    rtol: Resolved
    atol: Resolved
    skip_failed: bool

    @property
    def directions(self) -> torch.Tensor:
        """Where the times of each row go, shape ``(B,)``."""
        return torch.where(self.times[-1] >= self.times[0], 1.0, -1.0).to(REAL)


class RowSweep:
    """The forward sweep of all rows in machine code, with its checkpoints.

    Parameters
    ----------
    program : RowProgram
        f on one row.
    rows : Rows
        Where they begin.
    problem : InitialValueProblem
        That of all rows.
    wanted : Wanted
        Of one row.
    captured : tuple of Tensor
        What the code was made to read.
    actual : dict of Tensor
        What it reads instead of some of that, by its identity.
    """

    def __init__(
        self, program: RowProgram, rows: Rows, problem: InitialValueProblem, wanted: Wanted,
        captured: tuple[torch.Tensor, ...], actual: dict[int, torch.Tensor],
    ) -> None:  # fmt: skip
        self.program, self._wanted, self._rows, self._actual = program, wanted, rows, actual
        self.captured = tuple(actual.get(id(x), x) for x in captured)
        self._library = driver.library()
        control, method, directions = wanted.control, wanted.settings.method, rows.directions
        self._parameters = len(problem.parameters)
        number, count = rows.times.shape
        clock = (rows.times * directions).t().contiguous()
        counts = torch.zeros(count, number, dtype=torch.int64)
        if control.step_size is not None and number > 1:
            grids = row_grids(clock, directions, control.step_size, problem.resolution, method.name)
            counts[:, :-1] = torch.tensor([grid.counts for grid in grids])
        settings, apart = self._settings()
        state = rows.y0.contiguous()
        kernels = (ctypes.c_void_p * count)()
        program.library.pnode_row_steps(
            ctypes.byref(settings), driver.at(state), ctypes.c_int64(count),
            ctypes.c_int64(apart), kernels,
        )  # fmt: skip
        limit = wanted.checkpointing.bytes
        chosen = driver.new_control(
            wanted.settings, control, wanted.keep, 1.0, control.first_step or 0.0
        )
        self._handle = self._library.pnode_rows(
            kernels, ctypes.byref(chosen), *map(driver.at, (directions, clock, counts)), count,
            number, (ctypes.c_int64 * len(program.apart))(*program.apart), len(program.apart),
            -1 if limit is None or not wanted.keep else limit,
        )  # fmt: skip
        if not self._handle:
            raise MemoryError("there is no memory for a compiled sweep")
        weakref.finalize(self, self._library.pnode_free_rows, self._handle).atexit = False

    def _settings(self) -> tuple[Any, int]:
        """Return the settings in C, and how far apart the tolerances of rows are."""
        made, n = prepared(self.program, self._wanted), self.program.size
        tables = [self._rows.rtol, self._rows.atol]
        if all(isinstance(one, float) for one in tables):
            return made, 0
        shape = self._rows.y0.shape
        values = (one if isinstance(one, float) else one.tensor().view(shape) for one in tables)
        self._tolerances = [torch.as_tensor(x, dtype=REAL).expand(shape).clone() for x in values]
        own = type(made).from_buffer_copy(made)
        own.rtol, own.atol = (x.data_ptr() for x in self._tolerances)
        return own, n

    def forward(self, ledger: Ledger) -> torch.Tensor | None:
        """Take all steps; return the states, shape ``(T, B, n)``, double precision.

        None where checkpoints would take more than they may.

        Raises
        ------
        SolveError
            Naming the row that failed, unless failures are skipped.
        """
        number, count = self._rows.times.shape
        outputs = torch.full((count, number, self.program.size), torch.nan, dtype=REAL)
        statuses = self._paused()
        read = [*self.program.inputs(self._actual), outputs]  # the last one is not for here
        with log_stage("pnode forward"):
            # In between, Python notices interrupts.
            while bool(statuses.eq(_PAUSED).any() & statuses.ne(_NO_ROOM).all()):
                self._library.pnode_rows_forward(
                    self._handle, driver.pointers(read), outputs.data_ptr(),
                    torch.get_num_threads(), driver.PATIENCE, statuses.data_ptr(),
                )  # fmt: skip
        if bool(statuses.eq(_NO_ROOM).any()):
            return None
        failed = statuses.ne(0).nonzero()[:, 0].tolist()
        for row in failed:
            status = int(statuses[row])
            if status not in _ERRORS:
                raise MemoryError(f"row {row} of y0: there is no memory for a compiled sweep")
            if not self._rows.skip_failed:
                raise self._error(row, _ERRORS[status])
        self._count(ledger, False)
        return outputs.transpose(0, 1)

    def _error(self, row: int, kind: type[SolveError]) -> SolveError:
        handle, time = self._library.pnode_row(self._handle, row), float(self._rows.times[0, row])
        taken = self._library.pnode_recorded(handle, None, None, None)
        if taken:
            steps, orders = (ctypes.c_double * (2 * taken))(), (ctypes.c_int64 * taken)()
            marks = (ctypes.c_int64 * len(self._rows.times))()
            self._library.pnode_recorded(handle, steps, orders, marks)
            time = steps[2 * taken - 2] + steps[2 * taken - 1]
        why = WHY[kind].format(most=self._wanted.control.max_steps, who="the vector field")
        method = self._wanted.settings.method.name
        return kind(f"row {row} of y0: {why}", time=time, step=taken, method=method)

    def reverse(
        self, cotangents: torch.Tensor, ledger: Ledger
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Take the adjoints of all steps.

        Parameters
        ----------
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, B, n)``.
        ledger : Ledger
            Counts.

        Returns
        -------
        initial : Tensor
            The derivative with respect to y0 that comes through the flow, shape ``(B, n)``.
        parameters : list of Tensor or None
            One per parameter, the sums over the rows: the same bits on any number of threads.
        """
        seeds = cotangents.transpose(0, 1).contiguous()
        count, entries = len(seeds), self.program.entries
        group = -(-count // _MOST_GROUPS)
        sums = torch.zeros(-(-count // group), entries, dtype=REAL)
        states, statuses = torch.empty(count, self.program.size, dtype=REAL), self._paused()
        own = self.program.row_sums()
        read = [*self.program.inputs(self._actual), own]
        self._library.pnode_rows_restart(self._handle)
        with log_stage("pnode adjoint"):
            while bool(statuses.eq(_PAUSED).any()) and bool(statuses.le(_PAUSED).all()):
                self._library.pnode_rows_reverse(
                    self._handle, driver.pointers(read), sums.data_ptr(), entries, group,
                    seeds.data_ptr(), states.data_ptr(),
                    torch.get_num_threads(), driver.PATIENCE, statuses.data_ptr(),
                )  # fmt: skip
        if bool(statuses.gt(_PAUSED).any()):
            row = int(statuses.gt(_PAUSED).nonzero()[0])
            raise LinearSolveFailed(
                f"row {row} of y0: a transposed solve of the adjoint failed",
                reason="zero pivot in LU factorization",
            )
        self._count(ledger, True)
        parameters: list[torch.Tensor | None] = [None] * self._parameters
        for index, gradient in self.program.gradients([sums.sum(dim=0), own]):
            parameters[index] = gradient
        return states, parameters

    @outside()
    def passes(self) -> list[Pass]:
        """Return the steps, one of each row at a time, to be taken again outside of machine code.

        Raises
        ------
        BackwardError
            Of methods that have no other steps.
        """
        method, (number, count) = self._wanted.settings.method, self._rows.times.shape
        if method.multistep or method.coupled:
            raise BackwardError(
                f"second derivatives and tangents of method={method.name!r} with "
                "samples='independent' are not supported: take samples='joint', or a method such "
                "as 'rodaspr' or 'es325'"
            )
        columns, reached = [], []
        for row in range(count):
            handle = self._library.pnode_row(self._handle, row)
            taken = self._library.pnode_recorded(handle, None, None, None)
            steps, marks = torch.zeros(taken, 2, dtype=REAL), (ctypes.c_int64 * number)()
            orders = (ctypes.c_int64 * taken)()
            own = ctypes.cast(steps.data_ptr(), ctypes.POINTER(ctypes.c_double))
            self._library.pnode_recorded(handle, own, orders, marks)
            ends = torch.full((taken,), -1)
            for output, before in enumerate(marks):
                if before:
                    ends[before - 1] = output
            columns.append(steps)
            reached.append(ends)
        steps = torch.nn.utils.rnn.pad_sequence(columns)
        ends = torch.nn.utils.rnn.pad_sequence(reached, padding_value=-1)
        return [
            Pass(one[:, 0].contiguous(), one[:, 1].contiguous(), marks, None, None, None, None)
            for one, marks in zip(steps, ends, strict=True)
        ]

    def rates(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return f of all rows at times ``(B,)`` and states ``(B, n)``."""
        zero = torch.zeros_like(y)
        return self.program.row_products(t, y, zero, actual=self._actual)[0]

    def _paused(self) -> torch.Tensor:
        return torch.full((self._rows.times.shape[1],), _PAUSED, dtype=torch.int64)

    def _count(self, ledger: Ledger, backward: bool) -> None:
        counts = driver.Counts()
        self._library.pnode_rows_counts(self._handle, backward, ctypes.byref(counts))
        driver.add_counts(counts, ledger)

"""Whole sweeps of independent samples: a program of scalars for one row, and a loop over rows."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode.base.ledger import Ledger
from pnode.base.options import log_stage
from pnode.base.vectors import REAL
from pnode.errors import (
    ConfigurationError,
    LinearSolveFailed,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.field.vectorfield import VectorField, record_all
from pnode.problems.calls import UserFunction
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem
from pnode.problems.tolerances import EntrywiseTolerance, Resolved
from pnode.solvers.compiled import driver
from pnode.solvers.compiled.backend import Checked, Compilation, Wanted
from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.compiled.implicit_settings import prepared
from pnode.solvers.compiled.implicit_sweeps import ImplicitSweeps
from pnode.solvers.compiled.row_programs import RowProgram
from pnode.solvers.compiled.trace import FieldGraph, Untraceable
from pnode.solvers.sample_failures import WHY, row_grids
from pnode.solvers.sample_field import RowsField

__all__ = ["RowSweeps", "Rows", "compiled_rows"]

# The rows of a group add to one sum of gradients; so many groups there are at most.
_MOST_GROUPS = 64
# Fields whose program changes more often than this are not compiled any more.
_MOST_PROGRAMS = 8
_MOST_STAND_INS = 64
# Status in kernel.h.
_PAUSED, _NO_ROOM = 1, 9
_ERRORS: dict[int, type[SolveError]] = {
    2: NonFiniteVectorField, 3: NonlinearSolveFailed, 4: LinearSolveFailed, 5: StepLimitReached,
    6: StepSizeUnderflow, 8: NonFiniteVectorField,
}  # fmt: skip


@dataclass(frozen=True)
class _AllRows:
    """f on all rows, at a time and the differences of a clock."""

    function: Callable[..., Any]
    clock: torch.Tensor
    times_of: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(self.times_of(t + self.clock), y)


class RowSweeps(ImplicitSweeps):
    """Programs of one row, of explicit methods too."""

    implicit = None
    kinds = ("implicit", "explicit")
    graphs = False

    def __init__(self) -> None:
        self._texts: set[int] = set()
        #: For each number of rows, what is added to t for the times of rows.
        self.clocks: dict[int, torch.Tensor] = {}
        self._stand_ins: dict[Any, torch.Tensor] = {}

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        limits = wanted.checkpointing
        if limits == Checkpointing(memory=limits.memory, reproducible=limits.reproducible):
            wanted = replace(wanted, checkpointing=Checkpointing())  # forward() keeps to it
        text = super().refuses(wanted)
        return text and text.replace("implicit methods", "independent samples")

    def stand_ins(self, tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return tensors with the values of those of a call, the same ones in each call.

        Traces of f with them serve all calls.
        """
        made = {}
        for place, tensor in tensors.items():
            if tensor.dtype is not REAL or tensor.device.type != "cpu":
                continue
            key = place, tensor.shape, tensor.requires_grad
            own = self._stand_ins.get(key)
            if own is None:
                own = torch.empty(tensor.shape, dtype=REAL, requires_grad=tensor.requires_grad)
                while len(self._stand_ins) >= _MOST_STAND_INS:
                    del self._stand_ins[next(iter(self._stand_ins))]
                self._stand_ins[key] = own
            own.detach().copy_(tensor.detach())
            made[place] = own
        return made

    def _program(self, graph: FieldGraph, part: VectorField, steps: str) -> RowProgram:
        function = part.problem.function
        assert isinstance(function, _AllRows)
        made = RowProgram(graph, part.problem.parameters, steps, function.clock)
        self._texts.add(made.fingerprint)
        if len(self._texts) > _MOST_PROGRAMS:
            raise Untraceable(
                f"the vector field was compiled {_MOST_PROGRAMS} times and is different again: let "
                "numbers that change be tensors, such as buffers"
            )
        return made

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the program."""
        program: RowProgram = checked[0].code
        return Compilation(codes=(program,), captured=tuple(program.captured))


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


def compiled_rows(
    compiler: Compiler, field: RowsField, rows: Rows, wanted: Wanted,
    declared: Sequence[torch.Tensor] = (),
) -> RowSweep | None:  # fmt: skip
    """Return the sweep of all rows, or None, after one warning, if it is not compiled.

    ``declared``: tensors that f has besides what the call brings along.

    Raises
    ------
    ConfigurationError
        If it is not, and ``wanted`` says that there is no other way.
    """
    problem, n = field.problem, rows.y0.shape[1]
    if problem.layout.device.type != "cpu":
        compiler.explain(wanted, ["y0 is on a device, for which nothing is compiled yet"])
        return None
    first = tuple(_of_row(one, n) for one in (rows.rtol, rows.atol))
    wanted = replace(wanted, settings=replace(wanted.settings, rtol=first[0], atol=first[1]))
    (backend,) = compiler.backends
    assert isinstance(backend, RowSweeps)
    direction, times = float(rows.directions[0]), rows.times
    clock = backend.clocks.setdefault(len(rows.y0), torch.zeros_like(times[0]))
    clock.copy_(times[0] - times[0, 0])
    one = problem.but(
        function=_AllRows(problem.function, clock, field.times_of),
        times=tuple((direction * times[:, 0]).tolist()), direction=direction,
    )  # fmt: skip
    y0 = rows.y0.reshape(-1).to(problem.layout.dtype)
    stand_in, actual = _of_all_calls(one, declared, backend)
    try:
        part, found = _begun(compiler, stand_in, field, y0, wanted)
    except ConfigurationError:
        if not actual:
            raise
        actual = {}  # f has got them in another way, too
        part, found = _begun(compiler, one, field, y0, wanted)
    if not found.codes:
        return None
    field.trust(list(part.used))
    return RowSweep(found.codes[0], rows, problem, wanted, found.captured, actual)


def _begun(
    compiler: Compiler, problem: InitialValueProblem, field: RowsField, y0: torch.Tensor,
    wanted: Wanted,
) -> tuple[VectorField, Compilation]:  # fmt: skip
    part = VectorField(problem, Ledger())
    if field.recording:
        record_all(part)
    return part, compiler.begin(part, y0, wanted)


def _of_all_calls(
    problem: InitialValueProblem, declared: Sequence[torch.Tensor], backend: RowSweeps
) -> tuple[InitialValueProblem, dict[int, torch.Tensor]]:
    """Return the problem with stand-ins for what a call brings along, and what they stand for."""
    rows = problem.function
    if not isinstance(rows.function, UserFunction):
        return problem, {}
    known = set(map(id, declared))
    own = {k: x for k, x in rows.function.tensors.items() if id(x) not in known}
    if not own or len(set(map(id, own.values()))) < len(own):
        return problem, {}
    made = backend.stand_ins(own)
    other = {id(own[place]): tensor for place, tensor in made.items()}
    function = replace(rows, function=rows.function.with_tensors(made))
    parameters, frozen = (
        tuple(other.get(id(x), x) for x in tensors)
        for tensors in (problem.parameters, problem.frozen)
    )
    actual = {id(tensor): own[place] for place, tensor in made.items()}
    return problem.but(function=function, parameters=parameters, frozen=frozen), actual


def _of_row(tolerance: Resolved, n: int) -> Resolved:
    if isinstance(tolerance, float):
        return tolerance
    # Where some are zero, let the first row's be: that is looked at.
    table = tolerance.tensor().view(-1, n)
    return EntrywiseTolerance.of(table.amin(dim=0))


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
        why = WHY[kind].format(most=self._wanted.control.max_steps)
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

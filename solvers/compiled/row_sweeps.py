"""Which sweeps of independent samples are machine code: the programs of one row, and of what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger
from pnode.base.ranks import ALONE
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField, record_all
from pnode.problems.calls import UserFunction
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.problem import InitialValueProblem
from pnode.problems.tolerances import EntrywiseTolerance, Resolved
from pnode.solvers.compiled.backend import Checked, Compilation, Wanted
from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.compiled.implicit_sweeps import ImplicitSweeps
from pnode.solvers.compiled.row_driver import Rows, RowSweep
from pnode.solvers.compiled.row_programs import RowProgram
from pnode.solvers.compiled.trace import FieldGraph, Untraceable
from pnode.solvers.sample_field import RowsField

__all__ = ["RowSweeps", "compiled_rows"]

# Fields whose program changes more often than this are not compiled any more.
_MOST_PROGRAMS = 8
_MOST_STAND_INS = 64


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
    free = None
    kinds = ("implicit", "explicit")
    graphs = False

    def __init__(self) -> None:
        self._texts: set[int] = set()
        #: For each number of rows, what is added to t for the times of rows.
        self.clocks: dict[int, torch.Tensor] = {}
        self._stand_ins: dict[Any, torch.Tensor] = {}

    def _keeps(self, chosen: Checkpointing) -> bool:
        return chosen == Checkpointing(memory=chosen.memory, reproducible=chosen.reproducible)

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
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
        times=tuple((direction * times[:, 0]).tolist()), direction=direction, ranks=ALONE,
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
    assert isinstance(rows, _AllRows)
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

"""Functions whose zeros are events, as machine code that the driver calls.

Their values choose the steps that are shown; whether there is an event, and where, the functions
themselves tell. See ``suspects.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from pnode.base.transforms import in_forward_mode, transforms_active
from pnode.base.vectors import REAL
from pnode.solvers.compiled.decomposition import decomposed
from pnode.solvers.compiled.driver_library import at
from pnode.solvers.compiled.evaluations import agree
from pnode.solvers.compiled.following import Followed
from pnode.solvers.compiled.guards import Guard
from pnode.solvers.compiled.inductor import compile_source
from pnode.solvers.compiled.numbers_read import Numbers
from pnode.solvers.compiled.operations import Operations
from pnode.solvers.compiled.programs import PRELUDE
from pnode.solvers.compiled.records import pointers
from pnode.solvers.compiled.scalars import Scalars
from pnode.solvers.compiled.trace import Untraceable, compose, lifted

__all__ = ["EventProgram", "EventPrograms"]

# No contraction, and no vectors of another processor: as near to torch's numbers as can be had.
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
# Larger programs take longer to compile than they save.
_MOST_OPERATIONS = 2000
# Functions that are other ones more often than this stay in Python.
_MOST_PROGRAMS = 8


class EventProgram:
    """Machine code of a function of time and state.

    Parameters
    ----------
    function : callable
        ``function(t, y)`` of a 0-dim and a flat tensor gives a flat one.
    time, state : Tensor
        Examples.

    Raises
    ------
    Untraceable
        With the reason.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], time: torch.Tensor, state: torch.Tensor
    ) -> None:
        examples = torch.zeros_like(time), torch.zeros_like(state)
        graph = compose(lambda t, y: [function(t, y)], examples)
        graph, self._captured = lifted(graph)
        self._numbers = Numbers(self._captured)
        self._shapes = [(x.shape, x.dtype) for x in self._captured]
        scalars = Scalars()
        scalars.drops = False
        given = [
            scalars.input(f"c[{i}]", x.shape) if x.dtype in (REAL, torch.bool) else x.clone()
            for i, x in enumerate(self._captured)
        ]
        (found,) = Operations(scalars).evaluate(
            decomposed(graph, (*examples, *self._captured)), scalars.variable("t"),
            scalars.input("y", state.shape), *given,
        )  # fmt: skip
        code = scalars.code([(f"g[{k}] =", n) for k, n in enumerate(found.flat())])
        if code.count("\n") > _MOST_OPERATIONS:
            raise Untraceable(f"it takes more than {_MOST_OPERATIONS} scalar operations")
        #: How many numbers it returns.
        self.entries = found.ids.numel()
        head = "void pnode_events(const double* const* c, double t, const double* y, double* g)"
        text = f'{PRELUDE}extern "C" {head} {{\n{code}\n}}\n'
        self._library = compile_source(text, _FLAGS, "events-")
        #: The code, to be called from C++.
        self.function: Any = self._library.pnode_events
        self.function.restype = None

    def inputs(self) -> list[torch.Tensor]:
        """Return what it reads, as it is now."""
        return Numbers.present(self._captured)

    def fits(self) -> bool:
        """Whether what it reads is of the kind that it was."""
        shapes = [(x.shape, x.dtype) for x in self._captured]
        return shapes == self._shapes and not self._numbers.are_out_of_date()

    def at(self, time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the function's value."""
        found, read, y = torch.empty(self.entries, dtype=REAL), self.inputs(), state.contiguous()
        self.function(pointers(read), ctypes.c_double(time.item()), at(y), at(found))
        return found


class EventPrograms:
    """The machine code of the functions of one solver, as they were in its last solve."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Guard, EventProgram]] = {}
        self._left = _MOST_PROGRAMS

    def find(
        self, key: Any, function: Callable[..., torch.Tensor], facts: Callable[[], Any],
        time: torch.Tensor, state: torch.Tensor,
    ) -> EventProgram | None:  # fmt: skip
        """Return the code of a function, if that gives what the function does; None without it.

        Parameters
        ----------
        key : hashable
            Tells layouts of states apart.
        function : callable
            See :class:`EventProgram`.
        facts : callable
            Returns what an evaluation must not change.
        time, state : Tensor
            Where a solve begins.
        """
        if transforms_active() or in_forward_mode():
            return None
        try:
            with torch.no_grad():
                return self._holding(key, function, time, state) or (
                    self._traced(key, function, facts, time, state) if self._left else None
                )
        except Exception:  # of the function itself the sweep will tell
            self._left = 0
            return None

    def _holding(
        self, key: Any, function: Any, time: torch.Tensor, state: torch.Tensor
    ) -> EventProgram | None:
        """Return what there is, if the function is what it was."""
        if key not in self._known:
            return None
        guard, program = self._known[key]
        seen = Followed(function, guard.known, guard.mode)
        value = seen(time.clone(), state.clone())
        if guard.holds(seen) and program.fits() and agree(program.at(time, state), value):
            return program
        del self._known[key]
        return None

    def _traced(
        self, key: Any, function: Any, facts: Callable[[], Any], time: torch.Tensor,
        state: torch.Tensor,
    ) -> EventProgram | None:  # fmt: skip
        self._left -= 1
        before, guard, seen = facts(), Guard(), Followed(function, {})
        first = seen(time.clone(), state.clone())
        guard.learn(seen)
        program = EventProgram(function, time, state)
        noise = torch.randn(len(state), generator=torch.Generator().manual_seed(1), dtype=REAL)
        near = state + 1e-2 * noise * (1.0 + state.abs())
        again = Followed(function, guard.known)
        expected, found = again(time.clone(), near.clone()), program.at(time, near)
        same = torch.allclose(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
        # What counts its calls, say, is to be called as often as ever.
        if not (same and guard.holds(again) and facts() == before):
            self._left = 0
            return None
        self._known[key] = guard, program
        return program if agree(program.at(time, state), first) else None

"""Whole sweeps of compiled steps by one call each, forwards and backwards.

``sweeps.cpp`` takes the steps, chooses adaptive ones, writes the outputs and goes back; what one
step is, a kernel knows (``kernel.h``), of which a :class:`Kernel` is the Python side. The driver is
compiled when it is first needed, and kept on disk.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from pnode.base.communicators import Reduction
from pnode.base.ledger import Ledger
from pnode.base.options import log_stage
from pnode.base.vectors import REAL
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.budgets import Budget
from pnode.solvers.compiled.driver_library import at, library, source
from pnode.solvers.compiled.interpolants import InsideSteps
from pnode.solvers.compiled.kernel import Kernel
from pnode.solvers.compiled.partial_steps import CompiledParts
from pnode.solvers.compiled.records import (
    ENDS,
    Counts,
    add_counts,
    failure,
    new_control,
    numbers,
    pointers,
)  # fmt: skip
from pnode.solvers.compiled.shown_steps import GivenUp, ShownSteps
from pnode.solvers.multistep import TakenOrder
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.step_control import StepControl
from pnode.solvers.stepping import Step

__all__ = [
    "PATIENCE", "CompiledSweep", "Counts", "add_counts", "at", "library", "new_control",
    "pointers", "source",
]  # fmt: skip

#: How long a call may keep Python from noticing an interrupt, in seconds.
PATIENCE = 0.1
_EVER = 1e6
_DONE, _PAUSED, _WAITING, _SHOWN = 0, 1, 10, 11  # Status in kernel.h


class CompiledSweep:
    """A forward sweep in machine code, with its checkpoints.

    Parameters
    ----------
    kernel : Kernel
        What its steps are.
    handle : int
        A kernel of ``kernel.h``, which stands at the initial state; it is taken over.
    alive : object
        What that reads as long as it lives.
    problem : InitialValueProblem
        Whose output times.
    settings : IntegratorSettings
        The method, and whether steps are adaptive.
    control : StepControl
        How steps are chosen.
    keep : bool
        Whether it is to take adjoints too.
    first_step : float
        The first adaptive step; 0 where the kernel chooses it.
    budget : Budget
        What its checkpoints may take.
    dense : bool
        Whether steps pass over the output times but the last: what is returned of outputs are those
        at the first and the last, and :meth:`ends` has the rest, unless the kernel interpolates.
    """

    _handle: Any = None
    status = _PAUSED  # of a forward sweep
    _waiting: Iterator[array[int]]  # orders to come
    _ordered = 0  # lists of them that have been given
    _reason = ""  # why it gave up, where that does not tell it
    shown: ShownSteps | None = None  # if someone looks at the steps
    parts: CompiledParts | None = None  # of its steps, for outputs inside of them
    inside: InsideSteps | None = None  # of these, where it takes them itself
    _stats: Ledger  # of the forward sweep
    told: Callable[[int], None] | None = None  # how many are left to a backward sweep

    def __init__(
        self, kernel: Kernel, handle: int, alive: Any, problem: InitialValueProblem,
        settings: IntegratorSettings, control: StepControl, keep: bool, first_step: float,
        budget: Budget = Budget(), dense: bool = False,  # noqa: B008
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self._alive = alive
        self._library = library()
        times = problem.times[:: len(problem.times) - 1] if dense else problem.times
        course = kernel.course(
            settings, control,
            (times, problem.resolution, keep, problem.direction, first_step, budget.fresh),
        )  # fmt: skip
        number = self._rows = len(times)
        self._handle = self._library.pnode_sweep(handle, *course.given, number)
        if not self._handle:
            raise MemoryError("there is no memory for a compiled sweep")
        if course.points:
            points = numbers(course.points)
            self._library.pnode_prescribe(self._handle, points, len(course.points))
        if dense:
            self._library.pnode_keep_ends(self._handle)
        if dense and kernel.interpolation is not None:
            self.inside = InsideSteps(
                self._library, self._handle, kernel.interpolation, problem.times, kernel.size, keep
            )
            self._rows = len(problem.times)
        self._orders = budget.orders
        self._order(partial(iter, ()))
        if budget.orders is not None:
            self._library.pnode_schedule(self._handle, None, 0)
        elif budget.limit is not None:
            self._library.pnode_limit(self._handle, budget.limit)
        self._ranks = problem.ranks
        if problem.ranks.parallel:
            reduction = Reduction(problem.ranks.comm)
            self._library.pnode_share(self._handle, ctypes.byref(reduction))
        self._outputs, self._direction, self._end = number, problem.direction, times[-1]
        self._parameters = len(problem.parameters)
        self._method = settings.method
        self._judged = settings.adaptive and (settings.method.multistep or settings.method.coupled)

    def __del__(self) -> None:
        """Free the checkpoints, but not when Python ends."""
        if self._handle and not sys.is_finalizing():
            self._library.pnode_free_sweep(self._handle)

    def watch(self, shown: ShownSteps, trial: int | None, alive: Any = None) -> None:
        """Show the steps; ``trial``: a kernel for parts of them, which is taken over."""
        self.shown, self._alive = shown, (self._alive, alive)
        self._library.pnode_watch(self._handle, trial)

    def forward(self, ledger: Ledger) -> torch.Tensor | None:
        """Take all steps. Collective: if one rank fails all do.

        Returns states at the output times that were reached, shape ``(T, size)``, the user's
        precision; None if a step failed for good: the error is to be had from taking them one by
        one. ``ledger`` counts what a successful sweep did.
        """
        with log_stage("pnode forward"):
            self._stats = ledger
            outputs, counts = self._empty(), Counts()
            done = self._ranks.attempt(self._take_steps, outputs, counts)
            if done is None:  # interrupted, and the others are to hear of it
                done = self._library.pnode_leave(self._handle) == _DONE
        if not done:
            return None
        add_counts(counts, ledger)
        if self.shown is not None and self.shown.stopped is not None:
            self._end = self.shown.stopped
            self._outputs = rows = len(self.recorded()[1])
            if self.inside is not None:
                rows += len(self.inside.places()[0])
            outputs = outputs[:rows].clone()
        return outputs

    @property
    def end(self) -> str:
        """How a forward sweep that gave up has ended, in words."""
        return self._reason or ENDS.get(self.status, "a step failed")

    def _empty(self) -> torch.Tensor:
        return torch.empty((self._rows, self.kernel.size), dtype=self.kernel.dtype)

    def _take_steps(self, outputs: torch.Tensor, counts: Any) -> bool:
        inputs = self.kernel.inputs()
        read = pointers(inputs)
        if self.shown is not None:
            self.shown.lent(self._library, self._handle, inputs)
        if self._orders is not None:
            self._order(self._orders.forward)
        self.status = _PAUSED

        def take(seconds: float) -> Any:
            given = self._handle, read, outputs.data_ptr(), seconds
            return self._library.pnode_forward(*given, ctypes.byref(counts))

        try:
            while self._goes_on(self.status):  # in between, Python notices interrupts
                self.status = take(PATIENCE)
            if self.shown is not None and self.status == _DONE:
                steps = self._library.pnode_recorded(self._handle, None, None, None)
                self.shown.check_end(self._end, steps, outputs[-1])
        except GivenUp as error:
            self._reason = str(error)
            return False
        except BaseException:
            self._go_on_failed(take)
            raise
        return bool(self.status == _DONE)

    def _go_on_failed(self, take: Callable[[float], Any]) -> None:
        """Let those who wait for this rank's cells come to their end, which is one of all."""
        if self.kernel.collective:
            self._library.pnode_fail(self._handle)
            # Perhaps it was in making orders that it was interrupted.
            self._waiting = islice(self._begin_orders(), self._ordered, None)
            while self._goes_on(take(_EVER)):
                pass

    def _order(self, begin: Callable[[], Iterator[array[int]]]) -> None:
        """Let orders come from the beginning."""
        self._begin_orders, self._waiting, self._ordered = begin, begin(), 0

    def _goes_on(self, status: int) -> bool:
        """Whether a sweep goes on, with more orders if it waits for these."""
        if status == _WAITING:
            more = next(self._waiting)
            self._ordered += 1
            address = more.buffer_info()[0]
            return self._library.pnode_schedule(self._handle, address, len(more) // 2) == _DONE
        if status == _SHOWN:
            assert self.shown is not None
            self.shown.show()
            return True
        return status == _PAUSED

    def ends(self) -> torch.Tensor:
        """Return the states at the ends of all steps, once, shape ``(N, size)``."""
        number = self._library.pnode_recorded(self._handle, None, None, None)
        states = torch.empty((number, self.kernel.size), dtype=REAL)
        self._library.pnode_ends(self._handle, at(states))
        return states

    def reverse(
        self, cotangents: torch.Tensor, ledger: Ledger, nodes: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
        """Take the adjoints of all steps.

        Parameters
        ----------
        cotangents : Tensor
            Derivatives of the loss with respect to the outputs, shape ``(T, size)``.
        ledger : Ledger
            Counts.
        nodes : sequence of int, optional
            How many steps come before each of them, ascending from 0, where they are of other
            states than the outputs.

        Returns
        -------
        state : Tensor
            The derivative with respect to y0, shape ``(size,)``.
        parameters : list of Tensor or None
            One per parameter, None for those that the field never used.
        initial : Tensor
            ``state`` without the first output's cotangent.

        Raises :class:`LinearSolveFailed` if a matrix is singular.
        """
        with log_stage("pnode adjoint"):
            self.complete(ledger)
            if nodes is not None:
                places = array("q", nodes)
                self._library.pnode_nodes(self._handle, *places.buffer_info())
            initial, sums, counts = self._take_adjoints(cotangents.to(REAL).contiguous())
        self._stats.ram_bytes = max(self._stats.ram_bytes, counts.bytes)
        counts.bytes = 0
        add_counts(counts, ledger)
        parameters: list[torch.Tensor | None] = [None] * self._parameters
        if counts.steps:  # else lambda vanished throughout
            for index, gradient in self.kernel.gradients(sums):
                parameters[index] = gradient
        return initial + cotangents[0], parameters, initial

    def tangents(
        self, start: torch.Tensor, moving: Sequence[tuple[int, torch.Tensor]], ledger: Ledger
    ) -> torch.Tensor | None:
        """Take tangents over all steps.

        Parameters
        ----------
        start : Tensor
            Tangents of the initial state, shape ``(m, size)``.
        moving : sequence of (int, Tensor)
            Those of parameters: which one, and its tangents, shape ``(m, *parameter)``.
        ledger : Ledger
            Counts.

        Returns
        -------
        Tensor or None
            Of the outputs, shape ``(T, m, size)``, the user's precision; None if there is no code
            for them.

        Raises :class:`LinearSolveFailed` if a matrix is singular.
        """
        kernel = self.kernel
        steps = self._library.pnode_recorded(self._handle, None, None, None)
        if not kernel.takes_tangents(len(start), bool(moving), steps):
            return None
        start = start.detach().to(REAL).contiguous()
        along = kernel.directions(moving) if moving else None
        outputs = torch.empty((self._outputs, *start.shape), dtype=REAL)
        counts, inputs = Counts(), kernel.inputs()
        read, status, first = pointers(inputs), _PAUSED, at(start)
        if self._orders is None:  # else the steps are taken once more beside their tangents
            self.complete(ledger)
        while status == _PAUSED:
            status = self._library.pnode_tangents(
                self._handle, read, len(start), first, None if along is None else at(along),
                at(outputs), PATIENCE, ctypes.byref(counts),
            )  # fmt: skip
            first = None
        if status != _DONE:
            raise failure("tangent", status)
        counts.bytes = 0
        add_counts(counts, ledger)
        return outputs.to(kernel.dtype)

    @property
    def whole(self) -> bool:
        """Whether all checkpoints are there."""
        return bool(self._library.pnode_whole(self._handle))

    def complete(self, ledger: Ledger) -> None:
        """Repeat the steps if a backward sweep has freed their checkpoints."""
        if not self.whole:
            self.repeat(ledger)

    def let_checkpoints_go(self) -> None:
        """Free them: a backward sweep repeats the steps first."""
        self._library.pnode_repeat(self._handle)

    def repeat(self, ledger: Ledger) -> None:
        """Take the steps once more, for their checkpoints."""
        self.let_checkpoints_go()
        counts = Counts()
        if not self._take_steps(self._empty(), counts):
            raise RuntimeError("compiled steps that succeeded once failed when repeated")
        ledger.recomputed += counts.steps
        ledger.rhs += counts.rhs

    def recorded(self) -> tuple[list[Step], tuple[int, ...]]:
        """Return the steps that were taken, and how many come before each output."""
        number = self._library.pnode_recorded(self._handle, None, None, None)
        steps, outputs = (ctypes.c_double * (2 * number))(), (ctypes.c_int64 * self._outputs)()
        orders: Any = (ctypes.c_int64 * number)()
        outputs[:] = [-1] * self._outputs  # of those that were not reached
        self._library.pnode_recorded(self._handle, steps, orders, outputs)
        starts = [self._direction * start for start in steps[::2]]
        lengths = [self._direction * length for length in steps[1::2]]
        ends = [*starts[1:], self._end]
        if self._judged:  # they were accepted, and whoever repeats them has no say in it
            orders = [
                TakenOrder.of(order or self._method.order, h, ())
                for order, h in zip(orders, lengths, strict=True)
            ]
        found = zip(range(number), starts, lengths, ends, orders, strict=True)
        return [Step(*one) for one in found], tuple(at for at in outputs if at >= 0)

    def _take_adjoints(
        self, cotangents: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
        counts, inputs, sums = Counts(), self.kernel.inputs(), self.kernel.sums()
        state, places = torch.empty(self.kernel.size, dtype=REAL), pointers(sums)
        arguments = self._handle, pointers(inputs), places, cotangents.data_ptr()
        self._library.pnode_restart(self._handle)
        if self._orders is not None:
            steps = self._library.pnode_recorded(self._handle, None, None, None)
            self._order(partial(self._orders.reverse, steps))
        status, reverse = _PAUSED, partial(self._library.pnode_reverse, *arguments)
        try:
            while self._goes_on(status):
                status = reverse(PATIENCE)
                if self.told is not None:
                    self.told(self._library.pnode_left(self._handle))
        except BaseException:
            self._go_on_failed(reverse)
            raise
        if status == _DONE:
            finish = self._library.pnode_finish
            status = finish(self._handle, state.data_ptr(), places, ctypes.byref(counts))
        if status != _DONE:
            raise failure("adjoint", status)
        return state, sums, counts

"""The stages of a solve with their adjoints, one by one: see :meth:`pnode.Solution.stages`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pnode.base.devices import ordered, place_of
from pnode.base.errors import BackwardError, ConfigurationError, FieldChanged
from pnode.base.transforms import in_forward_mode, is_wrapped, moves, transforms_active
from pnode.field.held import now
from pnode.problems.calls import Call
from pnode.problems.problem import InitialValueProblem
from pnode.solutions.solution import Stage
from pnode.solvers.methods import Method
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.integrals import parted
from pnode.sweeping.run import Recorded, Requests, Run

__all__ = ["StageSweep", "refuse_written", "uncompiled", "written"]


def _nothing() -> None:
    return None


class StageSweep:
    """Takes backward sweeps of a solve that tell of its stages.

    Parameters
    ----------
    engine : Engine
        What solved.
    run : Run
        The solve.
    y0 : Tensor
        Its initial state, flat.
    call : Call
        How the user's state maps to it.
    """

    def __init__(self, engine: Engine, run: Run, y0: torch.Tensor, call: Call) -> None:
        self._engine, self._run, self._y0, self._call = engine, run, y0, call
        self._versions = written(run.problem, y0)

    @classmethod
    def of(cls, engine: Engine, run: Run, y0: torch.Tensor, call: Call) -> StageSweep | None:
        """Return that of a differentiated solve, None of one in a transform of torch's."""
        transformed = (transforms_active() or in_forward_mode()) and any(
            is_wrapped(one) or (not one.requires_grad and moves(one))
            for one in (y0, *run.problem.parameters)
        )
        return None if transformed else cls(engine, run, y0, call)

    def solved(self) -> tuple[Engine, Run, torch.Tensor]:
        """Return what solved, the solve, and its flat initial state."""
        return self._engine, self._run, self._y0

    def __reduce__(self) -> Any:
        """Copies and pickles of a solution have numbers alone."""
        return _nothing, ()

    def refuse_written(self, remedy: str) -> None:
        """Refuse a sweep after y0 or a parameter was written into; see :func:`refuse_written`."""
        refuse_written(self._run, self._y0, self._versions, self._engine.method, remedy)

    def take(self, cotangents: Any, callback: Callable[[Stage], Any]) -> None:
        """Take a sweep: see :meth:`pnode.Solution.stages`. Collective."""
        run = self._run
        self._refuse_unsupported()
        ranks, recording = run.problem.ranks, torch.is_grad_enabled()
        with ranks.together():
            seeds = ranks.attempt(self._seeds, cotangents, callback)
        assert run.surroundings is not None
        with torch.no_grad(), ordered(place_of(run.problem.layout.device)):
            whole = not isinstance(run.sweep, sweeps.SteppedSweep)
            if whole or run.codes or run.settings.graphs is not None:
                again = uncompiled(self._engine, run, self._y0)
                taken = replace(again.stats, recomputed=again.stats.steps, steps=0)
                run.stats.backward.add(taken)
                again.stats.backward = run.stats.backward
                run = again
            own = run.problem
            bare = replace(own, parameters=(), frozen=(*own.frozen, *own.parameters))

            def look(s: float, Y: torch.Tensor, w: torch.Tensor, weight: float, part: str) -> None:
                stage = _stage(own, s, Y, w, weight, part, self._call)
                with torch.set_grad_enabled(recording):
                    ranks.attempt(callback, stage)

            sweeps.backward(self._engine, replace(run, problem=bare, look=look), self._y0, seeds,
                            wants_times=False)  # fmt: skip

    def _refuse_unsupported(self) -> None:
        """Refuse what has no such stages, which is the same on all ranks."""
        run, method = self._run, self._engine.method
        problem, sweep = run.problem, run.sweep
        assert sweep is not None
        dense = sweep.dense is not None
        reasons = {
            f"method={method.name!r}, whose steps use derivatives of the Jacobian: take a DIRK "
            "method such as 'es325'": method.linearly_implicit,
            "residual=, which has no slope f(t, y): give rhs= and mass=": problem.form
            == "residual",
            "an event, whose time depends on the state: solve up to that time without event_fn": (
                bool(run.roots)
            ),
            "dense=True: let steps hit the output times (dense=False)": dense,
            "breakpoints=: solve from break to break": problem.breaks is not None,
            "layout=: take comm= and states without ghost cells": problem.exchange is not None,
            "device_state='host' of a state on a device: take device_state='device'":
                problem.compute is not None,
        }  # fmt: skip
        for what in (what for what, given in reasons.items() if given):
            raise BackwardError(f"stages() is not for {what}", method=method.name)

    def _seeds(self, cotangents: Any, callback: Any) -> torch.Tensor:
        """Return the cotangents as ``(T, size)``, after all checks that are one rank's own."""
        if not callable(callback):
            raise ConfigurationError(f"callback={callback!r}: give a callable of a pnode.Stage")
        self.refuse_written("call stages() before that")
        if self._call.structure is not None:
            cotangents = self._call.structure.lower_like(
                cotangents, ConfigurationError, "cotangents"
            )
        problem = self._run.problem
        own = problem if problem.base is None else problem.base
        layout, number = own.layout, len(problem.times)
        parts = tuple(cotangents) if isinstance(cotangents, (tuple, list)) else (cotangents,)
        expected = [torch.Size((number, *shape)) for shape in layout.shapes]
        if (
            isinstance(cotangents, (tuple, list)) != layout.is_tuple
            or [getattr(part, "shape", None) for part in parts] != expected
        ):
            shapes = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                      for part in parts]  # fmt: skip
            raise ConfigurationError(
                f"cotangents have shapes {shapes}, and ys {[tuple(one) for one in expected]}: give "
                f"{'a tuple of tensors' if layout.is_tuple else 'a tensor'} like ys"
            )
        flat = [part.detach().reshape(number, -1).to(layout.device, layout.dtype) for part in parts]
        if problem.integrals:
            flat.append(flat[0].new_zeros(number, problem.integrals))
        return torch.cat(flat, 1)


def written(problem: InitialValueProblem, y0: torch.Tensor) -> list[int]:
    """Return how often what a solve depends on was written into."""
    tensors = (y0, *problem.parameters, *problem.frozen)
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def refuse_written(
    run: Run, y0: torch.Tensor, versions: Sequence[int], method: Method, remedy: str
) -> None:
    """Refuse to go on after what a solve depends on was written into.

    Raises
    ------
    FieldChanged
        Naming what was written into, and the remedy.
    """
    if written(run.problem, y0) != versions:
        assert run.surroundings is not None
        raise FieldChanged(
            f"y0 or a parameter was written into after the solve{run.surroundings.differences()}: "
            f"{remedy}",
            method=method.name,
        )


def uncompiled(engine: Engine, run: Run, y0: torch.Tensor) -> Run:
    """Take the steps of a compiled solve again, one by one. Not on several ranks.

    Parameters
    ----------
    engine, run : Engine, Run
        What solved, and the solve.
    y0 : Tensor
        Its initial state, flat.
    """
    sweep, own = run.sweep, run.problem
    assert sweep is not None and run.surroundings is not None
    steps, outputs = sweep.recorded()
    if isinstance(sweep, sweeps.SteppedSweep) and sweep.trajectory is not None:
        sweep.trajectory.clear()  # the limits of memory are for one sweep's checkpoints
        sweep.trajectory.ready = False
    adaptive = run.settings.adaptive and engine.method.solves_to_tolerance
    settings = replace(run.settings, graphs=None, adaptive=adaptive)
    problem = replace(
        own, function=now(own.function), explicit=now(own.explicit), check_undeclared=False
    )
    recorded = Recorded(steps, outputs, settings, run.surroundings)
    with run.surroundings.restored():
        _, again = sweeps.forward(
            engine, problem, y0, True, Requests(recorded=recorded, plain=True)
        )
    again.let_go()
    return again


def _stage(
    problem: InitialValueProblem, s: float, Y: torch.Tensor, w: torch.Tensor, weight: float,
    part: str, call: Call,
) -> Stage:  # fmt: skip
    """Return a stage in the user's time, shapes and precision."""
    layout, direction = problem.layout, problem.direction
    state, adjoint = (
        call.restored(parted(problem, layout.unflatten(one))[0])
        for one in (
            Y.detach().to(layout.dtype, copy=True),
            (direction * w.detach()).to(layout.dtype),
        )
    )
    return Stage(direction * s, state, adjoint, direction * weight, part)

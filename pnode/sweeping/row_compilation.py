"""What of independent samples is compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from pnode.base.errors import CheckpointError
from pnode.base.options import OWN_PREFIX, SolverOptions
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.backend import Wanted
from pnode.solvers.compiled.row_driver import Rows, RowSweep
from pnode.solvers.compiled.row_sweeps import compiled_rows
from pnode.solvers.petsc.settings import IntegratorSettings, default_options
from pnode.solvers.sample_field import RowsField
from pnode.sweeping.run import Requests

__all__ = ["begin", "explain_no_room"]


def begin(
    engine: Any,
    declared: Sequence[torch.Tensor],
    field: RowsField,
    rows: Rows,
    requests: Requests,
    keep: bool,
) -> RowSweep | None:
    """Return the compiled solve, or None, after one warning if ``compile=True`` was given.

    Parameters
    ----------
    engine : Engine
        Has the compiler of independent samples.
    declared : sequence of Tensor
        What f has besides what the call brings along.
    field : RowsField
        The vector field.
    rows : Rows
        What is solved.
    requests : Requests
        What else the sweep is to do.
    keep : bool
        Whether a backward sweep may follow.

    Raises
    ------
    ConfigurationError
        If nothing is, and the method has no other steps.
    """
    problem = field.problem
    if engine.compile is not True:
        return None
    wanted = _wanted(engine, problem, rows.y0, keep)
    given = {
        "cost=": problem.integrals, "dense=True or at='steps'": requests.steps,
        "a split right-hand side": problem.explicit is not None,
    }  # fmt: skip
    reasons = [f"{name} of independent samples is given" for name, on in given.items() if on]
    if reasons:
        engine.row_compiler.explain(wanted, reasons)
        return None
    return compiled_rows(engine.row_compiler, field, rows, wanted, declared)


def explain_no_room(
    engine: Any, problem: InitialValueProblem, flat: torch.Tensor, keep: bool
) -> None:
    """Warn, once, that the steps are taken once more, within a limit of memory.

    Raises
    ------
    CheckpointError
        If there are no other steps.
    """
    wanted = _wanted(engine, problem, flat, keep)
    method, limit = engine.method, engine.checkpointing.bytes
    text = f"the limit of {limit} bytes does not hold the steps of all samples"
    if wanted.needed:
        raise CheckpointError(
            f"checkpointing=: {text}, and method={method.name!r} with samples='independent' "
            "repeats none: raise memory, or solve fewer samples at once"
        )
    engine.row_compiler.explain(wanted, [f"checkpointing=: {text}, and machine code repeats none"])


@cache
def _options(settings: IntegratorSettings) -> SolverOptions:
    """Return pnode's own options: nobody else's reach steps that are not PETSc's."""
    defaults = default_options(
        settings.method, settings.adaptive, settings.jacobian, settings.dtype, False,
        settings.controller,
    )  # fmt: skip
    return SolverOptions(OWN_PREFIX, None, defaults)


def _wanted(engine: Any, problem: InitialValueProblem, flat: torch.Tensor, keep: bool) -> Wanted:
    """Return the solve of one row, for the compiler."""
    control, method = engine.control, engine.method
    settings = IntegratorSettings(
        method, flat.shape[1], problem.layout.dtype, adaptive=control.step_size is None,
        max_step=control.max_step, controller=control.controller,
    )  # fmt: skip
    needed = f"method={method.name!r} with samples='independent' is machine code alone, and f"
    return Wanted(
        settings, _options(replace(settings, size=1, max_step=math.inf)), control,
        engine.checkpointing, keep, False, (), engine.integrator,
        needed=needed if method.multistep or method.coupled else "",
    )  # fmt: skip

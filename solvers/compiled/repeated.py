"""Code that a solve takes as the one before did, where f is known to be what it was."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.backend import Backend, Checked, Compilation, Trace, Wanted

__all__ = ["again", "begun", "keep", "key_of"]


def key_of(problem: InitialValueProblem, number: int) -> Any:
    """Return what the trace of a part of a problem goes by."""
    return problem.layout, number, problem.window is None, tuple(map(id, problem.parameters))


def begun(
    backend: Backend, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor,
    wanted: Wanted, reasons: Sequence[str], earlier: Sequence[str] = (),
) -> Compilation:  # fmt: skip
    """Begin a solve with code of a backend; with the reasons why there is not more."""
    made = backend.begin(checked, field_, y0, wanted)
    made.reasons = tuple(dict.fromkeys((*earlier, *made.reasons, *reasons)))
    made.graphs = tuple(one.code.traced for one in checked)
    return made


def keep(
    trace: Trace | None, wanted: Wanted, backend: Backend, checked: Sequence[Checked],
    reasons: tuple[str, ...],
) -> None:  # fmt: skip
    """Keep what was chosen for a solve, if that depends on nothing but what is asked for and f.

    A sparse Jacobian's pattern may come to have more entries.
    """
    settings = wanted.settings
    dense = settings.jacobian == "dense" or not settings.method.implicit
    if trace is not None and len(checked) == 1 and dense:
        trace.chosen[wanted] = backend, Checked(checked[0].code), reasons


def again(
    field_: VectorField, y0: torch.Tensor, wanted: Wanted, refused: Collection[Backend]
) -> Compilation | None:
    """Begin a solve of a field whose trace is known with what was chosen; None if it was not.

    Parameters
    ----------
    field_, y0, wanted : VectorField, Tensor, Wanted
        As for :meth:`Compiler.begin`.
    refused : collection of Backend
        Those that have been found to make nothing of f.
    """
    trace: Trace | None = field_.known
    found = None if trace is None else trace.chosen.get(wanted)
    if trace is None or found is None or not trace.graph.fits():
        return None
    backend, checked, reasons = found
    used = trace.uses()
    if backend in refused or (used is None and field_.problem.check_undeclared):
        return None
    field_.trust(used or [False] * len(field_.parameters))
    made = begun(backend, [checked], field_, y0, wanted, reasons)
    return made if made.what else None

"""What the driver of compiled sweeps shares with C++: how steps are chosen, and what was done."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from pnode.base.errors import ConfigurationError, LinearSolveFailed
from pnode.base.ledger import Ledger
from pnode.solvers.clock import PrescribedGrid
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.step_control import StepControl, fixed_grid

__all__ = [
    "ENDS", "Counts", "Course", "add_counts", "failure", "integers", "new_control", "new_course",
    "numbers", "pointers",
]  # fmt: skip

# PETSc's largest step (TSAdaptSetStepLimits).
_LONGEST = 1e20
#: How a sweep gives up, by Status in kernel.h.
ENDS = {
    2: "values are not finite", 3: "Newton's method does not converge", 4: "a matrix is singular",
    5: "max_steps is reached", 6: "steps become too small", 8: "values are not finite",
    9: "there is no room for more checkpoints",
}  # fmt: skip
_UNSOLVED, _SINGULAR, _MISSING = 3, 4, 100  # Status in kernel.h


def _structure(integers: str, numbers: str = "") -> type[ctypes.Structure]:
    fields: list[Any] = [(name, ctypes.c_int64) for name in integers.split()]
    fields += [(name, ctypes.c_double) for name in numbers.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


Counts: Any = _structure(
    "steps rejected recomputed rhs vjp jvp jacobians factorizations newton krylov bytes"
)
*_ADDED, _ = (name for name, _ in Counts._fields_)  # the last one is a peak
_READ = struct.Struct(f"={len(Counts._fields_)}q").unpack
_Control: Any = _structure(
    "keep fresh adaptive max_steps",
    "direction order first_step min_step max_step longest safety least_rejected least "
    "largest_rejected largest now before first",
)


@lru_cache(maxsize=64)
def numbers(values: tuple[float, ...]) -> Any:
    """Return an array in C."""
    return (ctypes.c_double * len(values))(*values)


@lru_cache(maxsize=64)
def integers(values: tuple[int, ...], length: int) -> Any:
    """Return an array in C of a length, with zeros behind the values."""
    return (ctypes.c_int64 * length)(*values)


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """Return an array of the tensors' addresses."""
    return _addresses(len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@cache
def _addresses(number: int) -> Any:
    """Return the type of an array of addresses, which ctypes would make anew for each."""
    return ctypes.c_void_p * number


def new_control(
    settings: IntegratorSettings, control: StepControl, keep: bool, direction: float,
    first_step: float, fresh: bool = False,
) -> Any:  # fmt: skip
    """Return how steps are chosen, in C; ``fresh``: each begins without what the last has left."""
    rule = settings.rule
    limits = zip(rule.limits(False), rule.limits(True), strict=True)
    return _Control(
        keep, fresh, settings.adaptive, -1 if control.max_steps is None else control.max_steps,
        direction, settings.method.order, first_step, control.min_step,
        control.max_step, min(control.max_step, _LONGEST),
        rule.safety, *itertools.chain(*limits), *rule.exponents,
    )  # fmt: skip


class Course(NamedTuple):
    """How a sweep is to go: to the driver, and the ends of prescribed steps, if they are."""

    given: tuple[Any, ...]
    points: tuple[float, ...]


def new_course(
    settings: IntegratorSettings, control: StepControl, times: tuple[float, ...],
    resolution: float, *more: Any,
) -> Course:  # fmt: skip
    """Return how steps are chosen between output times; ``more``: see :func:`new_control`."""
    grid = fixed_grid(times, control, resolution)
    counts = integers(() if grid is None else grid.counts, len(times))
    points = grid.along() if isinstance(grid, PrescribedGrid) else ()
    chosen = new_control(settings, control, *more)
    return Course((ctypes.byref(chosen), numbers(times), counts), points)


def add_counts(counts: Any, ledger: Ledger) -> None:
    """Add what was done to a ledger."""
    *more, size = _READ(counts)
    own = vars(ledger)
    for name, number in zip(_ADDED, more, strict=True):
        own[name] += number
    if size > ledger.ram_bytes:
        ledger.ram_bytes = size


def failure(what: str, status: int) -> Exception:
    """Return the error of an adjoint or a tangent that ended with a status of ``kernel.h``."""
    if status in (_SINGULAR, _UNSOLVED):
        reason = "zero pivot" if status == _SINGULAR else "bad pivots, and no refinement helped"
        text = f"a solve of the {what} failed: use jacobian='dense', or compile=False"
        return LinearSolveFailed(text, reason=reason)
    if status == _MISSING:
        return ConfigurationError(
            f"the {what} met entries of a Jacobian that its sparsity pattern, or its blocks of "
            "independent samples, do not have: give every entry that can be non-zero in "
            "jacobian_pattern=, or use jacobian='matrix-free' or compile=False"
        )
    return RuntimeError(f"the compiled {what} of a step failed: is there enough memory?")

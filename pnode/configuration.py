"""What a solver is given: checks, and what has to be the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pnode.checkpointing import Checkpointing, parse_bytes
from pnode.engine import Engine
from pnode.problem import InitialValueProblem

__all__ = ["COMPARED", "Given", "as_checkpointing"]


def as_checkpointing(chosen: Any) -> Checkpointing:
    """Return ``checkpointing=`` as an object."""
    if isinstance(chosen, Checkpointing):
        return chosen
    if chosen is None:
        return Checkpointing()
    return Checkpointing(memory=parse_bytes("checkpointing", chosen))


@dataclass(frozen=True)
class Given:
    """What one rank gives to a solve.

    Attributes
    ----------
    engine : Engine
        The solver's.
    problem : InitialValueProblem
        What is to be solved.
    flat, times : Tensor
        Initial state and output times.
    dense : bool
        Whether outputs are interpolated.
    differentiate : bool
        Whether gradients are wanted.
    """

    engine: Engine
    problem: InitialValueProblem
    flat: torch.Tensor
    times: torch.Tensor
    dense: bool
    differentiate: bool


def _tolerances(given: Given) -> tuple[Any, ...]:
    control = given.engine.control
    return tuple(
        value if isinstance(value, float) else "entrywise" for value in (control.rtol, control.atol)
    )


def _step_control(given: Given) -> tuple[Any, ...]:
    control = given.engine.control
    return (
        control.first_step, control.min_step, control.max_step, control.max_steps,
        control.controller,
    )  # fmt: skip


def _jacobian(given: Given) -> tuple[Any, ...]:
    options = given.engine.jacobian_options
    return given.engine.jacobian, options.reuse, type(options.preconditioner).__name__


def _checkpointing(given: Given) -> tuple[Any, ...]:
    limits = given.engine.checkpointing
    return (
        limits.memory, limits.device_memory, limits.disk is None, limits.store, limits.reproducible
    )  # fmt: skip


def _requires_grad(given: Given) -> tuple[bool, ...]:
    return tuple(each.requires_grad and given.differentiate for each in (given.flat, given.times))


#: What has to be the same on all ranks of a solve, and how it is told.
COMPARED: dict[str, Callable[[Given], Any]] = {
    "method": lambda given: given.engine.method.name,
    "t": lambda given: tuple(given.problem.direction * time for time in given.problem.times),
    "the dtype of y0": lambda given: str(given.problem.layout.dtype),
    "step_size": lambda given: given.engine.control.step_size,
    "rtol, atol": _tolerances,
    "the step control": _step_control,
    "the problem's form": lambda given: given.problem.form,
    "layout": lambda given: type(given.engine.exchange).__name__,
    "jacobian": _jacobian,
    "petsc_options": lambda given: sorted(given.engine.petsc_options.items()),
    "checkpointing": _checkpointing,
    "whether gradients are wanted (torch.no_grad)": lambda given: given.differentiate,
    "the number of parameters": lambda given: len(given.problem.parameters),
    "the shapes of the parameters": lambda given: [
        tuple(p.shape) for p in given.problem.parameters
    ],
    "dense": lambda given: given.dense,
    "requires_grad of y0, t or the parameters": _requires_grad,
}

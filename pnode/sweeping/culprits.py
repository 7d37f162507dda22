"""Which of f and the integrand of ``cost`` was not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pnode.base.errors import NonFiniteDerivative, NonFiniteVectorField
from pnode.base.vectors import is_finite
from pnode.field.vectorfield import VectorField

__all__ = ["naming"]


@contextmanager
def naming(field: VectorField, y0: torch.Tensor) -> Iterator[None]:
    """Let an error of the first step say which of f and ``cost`` is not finite at the start."""
    try:
        yield
    except NonFiniteVectorField as error:
        problem, part = field.problem, field.explicit or field
        known = not error.step and not problem.ranks.parallel and part.has_rhs
        if not problem.integrals or isinstance(error, NonFiniteDerivative) or not known:
            raise
        value = part.rhs(problem.times[0], y0.to(part.dtype, copy=True))
        who = None if is_finite(value[: -problem.integrals]) else "the vector field"
        if who is None and not is_finite(value):
            who = "cost"
        if who is None:
            raise
        message = error.message.replace(part.who, who)
        raise NonFiniteVectorField(
            message, time=error.time, step=error.step, method=error.method, reason=error.reason
        ) from error

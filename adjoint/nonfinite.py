"""Why a gradient is not finite although every value of the vector field was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pnode.base.errors import NonFiniteDerivative
from pnode.base.vectors import is_finite
from pnode.field.vectorfield import VectorField
from pnode.solvers.stepping import Step

__all__ = ["check_parameters", "check_state", "check_tangents", "refuse_state"]

_REMEDY = (
    "keep the state away from there, or write the field so that its derivative exists "
    "(sqrt, norm and fractional powers at zero: add a small constant inside, or use torch.where on "
    "the argument)"
)


def refuse_state(
    field: VectorField, step: Step, states: Iterable[torch.Tensor], where: dict[str, Any]
) -> None:
    """Say which derivative made lambda infinite or NaN in a step.

    Parameters
    ----------
    field : VectorField
        The field.
    step : Step
        The step.
    states : iterable of Tensor
        The states of its checkpoint.
    where : dict
        Time, step and method.

    Raises
    ------
    NonFiniteDerivative
        Always.
    """
    found = ""
    if field.has_rhs and field.exchange is None:
        size = field.problem.layout.size
        for state in states:
            if state.numel() == size:
                found = found or _infinite_entry(field, step.start, state)
    raise NonFiniteDerivative(
        "the adjoint of this step is NaN or infinite: a derivative of the vector field with "
        f"respect to y is not finite{found}, or the product with it overflows; {_REMEDY}",
        **where,
    )


def _infinite_entry(field: VectorField, s: float, state: torch.Tensor) -> str:
    graph = field.linearize(s, state.to(field.dtype, copy=True).reshape(-1))
    product = graph.vjp(torch.ones_like(graph.flat_value())).state
    bad = (~torch.isfinite(product)).nonzero().flatten().tolist()
    if not bad:
        return ""
    value = float(state.reshape(-1)[bad[0]])
    return f" (its column for entry {bad[0]} of the state, where y = {value:.6g})"


def check_state(
    gradient: torch.Tensor, method: str, direction: float, step: Step, rows: int | None = None
) -> None:
    """Refuse a gradient of y0, of so many independent samples if any, where no step is known.

    Raises
    ------
    NonFiniteDerivative
        If it is not finite.
    """
    if is_finite(gradient):
        return
    entry, whose = _first_entry(gradient), ""
    if rows is not None:
        row, entry = divmod(entry, gradient.numel() // rows)
        whose = f" of row {row}"
    raise NonFiniteDerivative(
        f"the gradient of y0 is NaN or infinite at entry {entry}{whose}: a derivative of the "
        "vector field with respect to y is not finite somewhere between here and the end, or the "
        f"products with it overflow; {_REMEDY}",
        time=direction * step.start, step=step.index, method=method,
    )  # fmt: skip


def check_parameters(
    gradients: Sequence[torch.Tensor | None], method: str, direction: float, step: Step
) -> None:
    """Refuse gradients of parameters that are not finite where lambda was.

    Raises
    ------
    NonFiniteDerivative
        If there is one.
    """
    for index, gradient in enumerate(gradients):
        if gradient is not None and not is_finite(gradient):
            entry = _first_entry(gradient)
            raise NonFiniteDerivative(
                f"the gradient of parameter {index} (shape {tuple(gradient.shape)}) is NaN or "
                f"infinite at entry {entry}: the derivative of the vector field with respect to "
                f"it is not finite somewhere between here and the end; {_REMEDY}",
                time=direction * step.start, step=step.index, method=method,
            )  # fmt: skip


def check_tangents(
    state: torch.Tensor, tangents: Sequence[torch.Tensor], given: Sequence[torch.Tensor],
    times: Sequence[float], method: str,
) -> None:  # fmt: skip
    """Refuse tangents of outputs that are not finite where these and what is given are.

    Parameters
    ----------
    state, tangents : Tensor, sequence of Tensor
        Of the outputs, shape ``(T, size)``, or more dimensions of a batch of them.
    given : sequence of Tensor
        Tangents of what the solve was given.
    times : sequence of float
        Of the outputs.
    method : str
        The method's name.

    Raises
    ------
    NonFiniteDerivative
        If there is one.
    """
    if all(map(is_finite, tangents)) or not all(map(is_finite, (state, *given))):
        return
    where: dict[str, Any] = {"method": method}
    entry = ""
    bad = next(one for one in tangents if not is_finite(one))
    if bad.dim() == 2:
        output, number = (~torch.isfinite(bad)).nonzero()[0].tolist()
        where["time"], entry = times[output], f" at entry {number} of the state"
    raise NonFiniteDerivative(
        f"a tangent of the solve is NaN or infinite{entry}: a derivative of the vector field is "
        f"not finite somewhere before; {_REMEDY}",
        **where,
    )


def _first_entry(gradient: torch.Tensor) -> int:
    return int((~torch.isfinite(gradient.reshape(-1))).nonzero()[0])

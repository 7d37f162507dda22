"""Discrete adjoint of the explicit steps of independent samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.evidence import differs
from pnode.products import accumulate
from pnode.solution import Ledger
from pnode.solvers.sample_steps import Pass
from pnode.solvers.scheme import Scheme
from pnode.vectors import REAL

__all__ = ["sample_adjoint"]


def sample_adjoint(
    scheme: Scheme,
    field: Any,
    passes: Sequence[Pass],
    cotangents: torch.Tensor,
    ledger: Ledger,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Take the adjoint of each pass, as ``ExplicitAdjoint`` does with a length for each row.

    Parameters
    ----------
    scheme : Scheme
        The method.
    field : VectorField
        f on all rows.
    passes : sequence of Pass
        What the forward sweep recorded.
    cotangents : Tensor
        Derivatives of the loss with respect to the outputs, shape ``(T, B, n)``.
    ledger : Ledger
        Counts.

    Returns
    -------
    initial : Tensor
        The derivative with respect to y0 that comes through the flow, shape ``(B, n)``.
    parameters : list of Tensor or None
        One per parameter.

    Raises
    ------
    FieldChanged
        If f is not that of the forward sweep any more.
    """
    state = torch.zeros_like(cotangents[0], dtype=REAL)
    gradients: list[torch.Tensor | None] = [None] * len(field.parameters)
    live = sorted(scheme.live_stages(), reverse=True)
    for one in reversed(passes):
        rows = one.reached.ge(0).nonzero()[:, 0]
        state[rows] += cotangents[one.reached[rows], rows].to(REAL)
        h = one.length[:, None]
        found: dict[int, torch.Tensor] = {}
        for i in live:
            w = scheme.b[i] * state
            for j, product in found.items():
                w = w + scheme.A[j][i] * product
            w = torch.where(h == 0.0, 0.0, h * w)
            s = one.start + scheme.c[i] * one.length
            graph = field.linearize(s, one.stages[i].reshape(-1).clone())
            if i == 0:
                by = differs(graph.flat_value().to(REAL), one.noted)
                if by:
                    raise field.changed(float(one.start[0]), by)
            products = graph.vjp(w.reshape(-1).to(field.dtype))
            accumulate(gradients, products.parameters)
            found[i] = products.state.to(REAL).view_as(state)
        state = state + sum(found.values())
        ledger.steps += int(one.length.ne(0).sum())
    return state, gradients

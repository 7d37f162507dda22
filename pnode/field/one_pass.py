"""The whole Jacobian of a small state and the derivatives by few parameters, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.field.linearization import Linearization
from pnode.field.products import batched

__all__ = ["jacobian_along"]

# Entries of dg/dp up to which it costs less than its products with tangents.
_FEW = 1 << 12


def jacobian_along(
    graph: Linearization, parameters: Sequence[tuple[int, torch.Tensor]]
) -> torch.Tensor | None:
    """Return dg/dp v_k, shape ``(m, size)``, from the products that dg/du is made of and keeps.

    None where that is not to be had, or many parameters make it slower.

    Parameters
    ----------
    graph : Linearization
        At one point, not of a residual.
    parameters : sequence of (int, Tensor)
        For each parameter that moves its index and its tangents, shape ``(m, *parameter)``.
    """
    if type(graph) is not Linearization or not graph._recorded or graph._jacobians is not None:
        return None
    inputs = [graph._shared.parameters[index] for index, _ in parameters]
    value, size = graph._value, graph._value.numel()
    entries = size * sum(one.numel() for one in inputs)
    if entries > _FEW or any(map(torch.is_complex, inputs)):
        return None
    unit = torch.eye(size, dtype=value.dtype, device=value.device)
    with graph._shared.hooks_away():
        found = batched((graph._end,), (*graph._leaves, *inputs), (unit.view(size, *value.shape),))
    if found is None or found[0] is None:
        return None
    number = len(parameters[0][1])
    graph._shared.ledger.jacobians += 1
    graph._shared.ledger.jvp += number
    graph._jacobians = (found[0].reshape(size, size),)
    along = unit.new_zeros(size, number)
    for rows, (_, v) in zip(found[1:], parameters, strict=True):
        if rows is not None:
            along = along.addmm(rows.reshape(size, -1), v.reshape(number, -1).mT)
    return along.mT if graph._sign > 0 else -along.mT

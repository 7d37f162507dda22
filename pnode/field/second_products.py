"""Derivatives of products with a Jacobian, for methods that have the Jacobian in their steps.

The products are taken as w^T J, and multiplied with v afterwards: torch's derivatives of J v, made
by differentiating w^T J by w, are wrong for some operations (layer_norm, batch_norm), while those
by what a product is linear in are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.field.products import along_rows, gradients, pull_back_rows, refuse_single

__all__ = ["derivatives_along", "vjps_of_products"]


def vjps_of_products(
    value: torch.Tensor, leaves: Sequence[torch.Tensor], directions: Sequence[torch.Tensor],
    inputs: tuple[torch.Tensor, ...], cotangents: torch.Tensor,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Return the derivatives of sum_i w_i^T J v_i by inputs, for k sets of w, in rows.

    Parameters
    ----------
    value : Tensor
        With its graph.
    leaves, directions : sequence of Tensor
        What J is by, and the v_i along these, shapes ``(n, *leaf)``.
    inputs : tuple of Tensor
        What is differentiated by.
    cotangents : Tensor
        The w_i, shape ``(k, n, *value)``.
    """
    nothing: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
    found = []
    for rows in cotangents:
        ends, along = _products(value, leaves, directions, rows)
        found.append(gradients(ends, inputs, along) if ends else nothing)
    columns = zip(*found, strict=True)
    return [
        None if parts[0] is None else torch.stack([one for one in parts if one is not None])
        for parts in columns
    ]


def derivatives_along(
    value: torch.Tensor, leaves: Sequence[torch.Tensor], directions: Sequence[torch.Tensor],
    inputs: tuple[torch.Tensor, ...], tangents: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return the derivatives of the J v_i along m tangents of inputs, ``(m, n, *value)``.

    Parameters
    ----------
    value, leaves, directions, inputs
        As of :func:`vjps_of_products`.
    tangents : sequence of Tensor
        For each input, shape ``(m, *input)``.
    """
    number = len(tangents[0])
    seeds = value.new_ones(len(directions[0]), *value.shape).requires_grad_()
    ends, along = _products(value, leaves, directions, seeds)
    slopes = gradients(ends, inputs, along, True) if ends else ()
    chosen = [
        (end, rows.reshape(number, *end.shape))
        for end, rows in zip(slopes, tangents, strict=False)
        if end is not None and end.requires_grad
    ]
    found = None
    if chosen:
        found = along_rows(tuple(end for end, _ in chosen), [rows for _, rows in chosen], seeds)
    return seeds.new_zeros(number, *seeds.shape) if found is None else found


def _products(
    value: torch.Tensor, leaves: Sequence[torch.Tensor], directions: Sequence[torch.Tensor],
    cotangents: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Return w_i^T J with graphs, and what they are to be multiplied with."""
    if not value.requires_grad:
        return [], []
    refuse_single(value, leaves)
    with torch.enable_grad():
        rows = pull_back_rows(value, tuple(leaves), cotangents, record=True)
    known = [
        (row, along)
        for row, along in zip(rows, directions, strict=True)
        if row is not None and row.requires_grad
    ]
    return [row for row, _ in known], [along for _, along in known]

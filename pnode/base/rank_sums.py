"""Sums over ranks as nodes of torch's graphs, which can be differentiated any number of times.

A tensor is either each rank's own, or *replicated*: the same on all ranks, and so is its cotangent.
From own ones to a replicated one goes the sum, whose transpose copies; from a replicated one to own
ones goes a copy, whose transpose is the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI

from pnode.base.errors import BackwardError
from pnode.base.ranks import Ranks
from pnode.base.reals import as_reals, count_reals, from_reals
from pnode.base.transforms import differentiable

__all__ = ["Replicate", "Total", "of_all_ranks", "replicated"]


def _total_of_numbers(comm: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks, integers to the last digit. Collective."""
    exact = not (value.is_floating_point() or value.is_complex())
    flat = as_reals(value.detach()).to("cpu", torch.int64 if exact else torch.float64)
    flat = flat.contiguous().clone()
    comm.Allreduce(MPI.IN_PLACE, flat.numpy(), MPI.SUM)
    return flat.view(value.shape).to(value) if exact else from_reals(flat, value).to(value)


class Total(torch.autograd.Function):
    """The sums over the ranks of (comm, *values), replicated, by one reduction."""

    @staticmethod
    def forward(comm: Any, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Add up. Collective."""
        if not all(value.is_floating_point() or value.is_complex() for value in values):
            return tuple(_total_of_numbers(comm, value) for value in values)
        flat = torch.cat([as_reals(value.detach()).to("cpu", torch.float64) for value in values])
        comm.Allreduce(MPI.IN_PLACE, flat.numpy(), MPI.SUM)
        parts = flat.split([count_reals(value) for value in values])
        return tuple(
            from_reals(part, value).to(value) for part, value in zip(parts, values, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the communicator."""
        ctx.comm = inputs[0]

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Copy; its own derivative is collective."""
        return None, *Replicate.apply(ctx.comm, *outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor, ...]:
        """Add up tangents. Collective."""
        totals: tuple[torch.Tensor, ...] = Total.apply(ctx.comm, *tangents[1:])
        return totals

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Add up batches."""
        return Total.apply(*inputs), in_dims[1:]


class Replicate(torch.autograd.Function):
    """Replicated tensors (comm, *tensors), for use in terms of each rank's own."""

    @staticmethod
    def forward(comm: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copy."""
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the communicator."""
        ctx.comm = inputs[0]

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Add up; what a rank does not use counts as zero. Collective."""
        return None, *Total.apply(ctx.comm, *outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor, ...]:
        """Copy."""
        return tuple(one.clone() for one in tangents[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Copy."""
        return Replicate.apply(*inputs), in_dims[1:]


def replicated(comm: Any, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return replicated tensors for use in terms of each rank's own; see :class:`Replicate`."""
    if comm.size == 1 or not tensors:
        return tuple(tensors)
    found: tuple[torch.Tensor, ...] = Replicate.apply(comm, *tensors)
    return found


def of_all_ranks(
    ranks: Ranks, own: Sequence[torch.Tensor], common: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return tensors for a solve of each rank's own: those of the rank, and replicated ones.

    Gradients of ``common`` become sums over the ranks, by one reduction, which comes after all else
    of a backward sweep and tells whether a rank has failed. Not collective; its backward is.
    """
    if not ranks.parallel:
        return *own, *common
    found: tuple[torch.Tensor, ...] = _OfAllRanks.apply(ranks, len(own), *own, *common)
    return found


class _OfAllRanks(torch.autograd.Function):
    """Copies of (ranks, own, *tensors), the first ``own`` of which no other rank has."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, own: int, *tensors: torch.Tensor) -> Any:
        """Pass everything on."""
        ctx.ranks, ctx.own = ranks, own
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[own:])
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """Add up what all have. Collective.

        Raises
        ------
        BackwardError
            If derivatives of the sums are wanted.
        """
        if differentiable():
            raise BackwardError(
                "second derivatives of a solve with samples='independent' on several ranks are not "
                "supported: take them in one process"
            )
        like, own = ctx.saved_tensors, cotangents[: ctx.own]
        sums = ctx.ranks.sum_gradients(cotangents[ctx.own :], like)
        return (
            None,
            None,
            *own,
            *(
                None if total is None else total.to(one)
                for total, one in zip(sums, like, strict=True)
            ),
        )

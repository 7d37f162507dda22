"""Several processes: layouts of distributed states, and sums that autograd knows of.

Three ways to use an ``mpirun``, which go together with one another:

* each rank solves for its own batch (``comm=None``), and :func:`sum_gradients` adds up the
  gradients of the parameters after ``backward``;
* the ranks share one batch (``comm=MPI.COMM_WORLD``): one sequence of steps;
* the ranks share one grid (``layout=Grid(...)``, or a DM of PETSc's).

In the last two the gradients of the parameters are the same on all ranks after ``backward``, for a
loss that is the same on all of them: :func:`total` makes one of the ranks' own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode.base.communicators import as_communicator
from pnode.base.rank_sums import Replicate, Total
from pnode.base.reals import as_reals, count_reals, from_reals
from pnode.errors import ConfigurationError
from pnode.layout.dm_layouts import DMLayout
from pnode.layout.ghost_layouts import GhostLayout
from pnode.layout.grids import Grid

__all__ = [
    "DMLayout",
    "GhostLayout",
    "Grid",
    "broadcast_parameters",
    "init_process_group",
    "mean",
    "replicate",
    "sum_gradients",
    "total",
]


def total(value: torch.Tensor, comm: Any) -> torch.Tensor:
    """Return the sum over the ranks, the same on all of them. Differentiable.

    Parameters
    ----------
    value : Tensor
        This rank's term, any shape, the same on all ranks; float64 or float32, on the CPU.
    comm : mpi4py.MPI.Intracomm
        The ranks.

    Returns
    -------
    Tensor
        The sum. ``backward`` of what is made of it, called on all ranks, gives each rank the
        derivative with respect to its term. That of the sum is passed on as it is: it is the same
        on all ranks.

    Notes
    -----
    Collective on ``comm``; its backward is not, but derivatives of that are.

    Examples
    --------
    >>> total(torch.tensor(2.0), MPI.COMM_SELF)
    tensor(2.)
    """
    result: torch.Tensor = Total.apply(as_communicator(comm), value)[0]
    return result


def mean(values: torch.Tensor, comm: Any) -> torch.Tensor:
    """Return the mean over the entries of all ranks, 0-dim, the same on all. Differentiable.

    Parameters
    ----------
    values : Tensor
        This rank's entries, any shape, as many as it has; float64 or float32, on the CPU.
    comm : mpi4py.MPI.Intracomm
        The ranks.

    Notes
    -----
    Collective on ``comm``, as :func:`total`, which it is made of.

    Examples
    --------
    >>> mean(torch.tensor([1.0, 2.0]), MPI.COMM_SELF)
    tensor(1.5000)
    """
    return total(values.sum(), comm) / as_communicator(comm).allreduce(values.numel())


def replicate(tensor: torch.Tensor, comm: Any) -> torch.Tensor:
    """Return a tensor that all ranks have alike, for use in terms of each rank's own.

    The transpose of :func:`total`: its value is the tensor, its gradient the sum over the ranks.
    The parameters of a solve with ``comm=`` or ``layout=`` need it not, they are summed up by the
    solve; other uses of them in a rank's own part of the loss do.

    Parameters
    ----------
    tensor : Tensor
        The same on all ranks.
    comm : mpi4py.MPI.Intracomm
        The ranks.

    Notes
    -----
    Not collective; its backward is collective on ``comm``.
    """
    result: torch.Tensor = Replicate.apply(as_communicator(comm), tensor)[0]
    return result


def _tensors(parameters: Any) -> list[torch.Tensor]:
    if isinstance(parameters, torch.nn.Module):
        return list(parameters.parameters())
    if isinstance(parameters, torch.Tensor):
        raise ConfigurationError("parameters is one tensor: give a Module or a list of tensors")
    return list(parameters)


def sum_gradients(
    parameters: torch.nn.Module | Iterable[torch.Tensor], comm: Any, *, average: bool = False
) -> None:
    """Add up the ``.grad`` of parameters over the ranks, by one reduction.

    Parameters
    ----------
    parameters : Module or iterable of Tensor
        The same parameters on all ranks, in the same order; on the CPU.
    comm : mpi4py.MPI.Intracomm
        The ranks.
    average : bool
        Whether to divide the sums by the number of ranks.

    Raises
    ------
    ConfigurationError
        If the parameters differ in number or size between the ranks; on all of them.

    Notes
    -----
    Collective on ``comm``. To be called once after ``backward``. A gradient that is None on some
    ranks counts as zero; one that is None on all of them stays None. Sums are taken in the widest
    dtype of the parameters.

    There is nothing to overlap the reduction with: a solve's parameter gradients are complete only
    when its whole backward sweep is.
    """
    comm = as_communicator(comm)
    tensors = _tensors(parameters)
    _same_sizes(tensors, comm)
    if not tensors:
        return
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    sizes = [count_reals(tensor) for tensor in tensors]
    flat = torch.zeros(
        len(tensors) + sum(sizes),
        dtype=torch.float64 if wide else torch.float32,
        device="cpu",
    )
    parts = flat[len(tensors) :].split(sizes)
    for index, (tensor, part) in enumerate(zip(tensors, parts, strict=True)):
        if tensor.grad is not None:
            flat[index] = 1.0
            part.copy_(as_reals(tensor.grad))
    comm.Allreduce(MPI.IN_PLACE, flat.numpy(), MPI.SUM)
    for tensor, part, count in zip(tensors, parts, flat[: len(tensors)].tolist(), strict=True):
        if not count:
            continue
        summed = part / comm.size if average else part
        if tensor.grad is None:
            tensor.grad = torch.empty_like(tensor)
        tensor.grad.copy_(from_reals(summed, tensor))


def broadcast_parameters(
    parameters: torch.nn.Module | Iterable[torch.Tensor], comm: Any, root: int = 0
) -> None:
    """Overwrite parameters by those of one rank, so that all begin alike.

    Parameters
    ----------
    parameters : Module or iterable of Tensor
        As in :func:`sum_gradients`; a Module's buffers go along.
    comm : mpi4py.MPI.Intracomm
        The ranks.
    root : int
        Whose values are taken.

    Raises
    ------
    ConfigurationError
        If the parameters differ in number or size between the ranks; on all of them.

    Notes
    -----
    Collective on ``comm``.
    """
    comm = as_communicator(comm)
    tensors = _tensors(parameters)
    if isinstance(parameters, torch.nn.Module):
        tensors += list(parameters.buffers())
    _same_sizes(tensors, comm)
    for tensor in tensors:
        values = tensor.detach().to("cpu", copy=True).contiguous()
        comm.Bcast(values.numpy(), root)
        with torch.no_grad():
            tensor.copy_(values)


def _same_sizes(tensors: list[torch.Tensor], comm: Any) -> None:
    own = np.array([len(tensors), sum(map(count_reals, tensors))], np.int64)
    both = np.concatenate([own, -own])
    comm.Allreduce(MPI.IN_PLACE, both, MPI.MIN)
    if (both[:2] != -both[2:]).any():
        raise ConfigurationError(
            f"the parameters differ between the ranks: {own[0]} tensors with {own[1]} entries on "
            f"rank {comm.rank}, between {both[0]} and {-both[2]} tensors with {both[1]} to "
            f"{-both[3]} entries on all: build the same module on every rank"
        )


def init_process_group(comm: Any = None, backend: str = "gloo") -> None:
    """Start ``torch.distributed`` on the ranks of an MPI job.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    backend : str
        torch's backend.

    Raises
    ------
    ConfigurationError
        If torch was built without it, or has been started already.

    Notes
    -----
    Collective on ``comm``. Rank 0 chooses a free port and tells the others over MPI, so that no
    environment variable is needed: ``mpirun -n 4 python train.py`` is the whole launch. End with
    ``torch.distributed.destroy_process_group()``.
    """
    from torch import distributed

    comm = as_communicator(MPI.COMM_WORLD if comm is None else comm)
    if not distributed.is_available():
        raise ConfigurationError("this torch was built without torch.distributed: use another one")
    if distributed.is_initialized():
        raise ConfigurationError(
            "torch.distributed has been started already: call init_process_group once, before "
            "anything else starts it"
        )
    store = None
    host = "localhost" if comm.Split_type(MPI.COMM_TYPE_SHARED).size == comm.size else None
    if comm.rank == 0:
        host = host or socket.gethostname()
        store = distributed.TCPStore(host, 0, comm.size, True, wait_for_workers=False)
    host, port = comm.bcast((host, store.port) if store is not None else None)
    if store is None:
        store = distributed.TCPStore(host, port, comm.size, False)
    if backend == "gloo" and host == "localhost":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size)

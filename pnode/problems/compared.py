"""What the ranks that share a state must have been given alike, and how they tell it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mpi4py import MPI

from pnode.base.errors import ConfigurationError
from pnode.base.ranks import Ranks
from pnode.base.reals import as_reals
from pnode.base.transforms import is_wrapped, outside
from pnode.problems.problem import InitialValueProblem

__all__ = ["COMPARED", "Given", "agreed", "shared"]

_ITSELF = {"told_by": lambda value: value}


# --------------------------------------------------------------- what ranks are to be given alike


def shared(*groups: Any) -> dict[str, Any]:
    """Return what all ranks must have chosen alike, by the names of the options.

    Each option of each group, or what it says beside itself.
    """
    return {
        each.name: {**_ITSELF, **each.metadata}["told_by"](getattr(group, each.name))
        for group in groups
        for each in fields(group)
    }


def agreed(ranks: Ranks, alike: Mapping[str, Any], prepared: Any, differentiate: bool) -> Any:
    """See to it that all ranks have prepared the same solve. Collective.

    Parameters
    ----------
    ranks : Ranks
        All of them.
    alike : mapping
        What the solver was given, see :func:`shared`.
    prepared : tuple or None
        The problem, the flat initial state, the output times, and more; None if this rank has
        failed.
    differentiate : bool
        Whether gradients are wanted.

    Returns
    -------
    tuple
        The same, with what the problem knows of the other ranks.
    """
    facts, size = None, 0
    if prepared is not None:
        problem, flat, times, *more = prepared
        size, given = problem.layout.size, Given(problem, flat, times, differentiate)
        facts = {**alike, **{name: of(given) for name, of in COMPARED.items()}}
    largest, distribution = ranks.compare((*alike, *COMPARED), facts, size)
    if ranks.parallel and differentiate and problem.parameters:
        with outside(), torch.no_grad():
            _see_to_replicas(ranks, problem.parameters)
    return problem.but(largest=largest, distribution=distribution), flat, times, *more


@dataclass(frozen=True)
class Given:
    """What one rank gives to a solve.

    Attributes
    ----------
    problem : InitialValueProblem
        What is to be solved.
    flat, times : Tensor
        Initial state and output times.
    differentiate : bool
        Whether gradients are wanted.
    """

    problem: InitialValueProblem
    flat: torch.Tensor
    times: torch.Tensor
    differentiate: bool


#: What else has to be the same on all ranks in one solve, and how it is told.
COMPARED: dict[str, Callable[[Given], Any]] = {
    "t": lambda given: tuple(given.problem.direction * time for time in given.problem.times),
    "breakpoints": lambda given: given.problem.breaks and given.problem.breaks.told,
    "the dtype of y0": lambda given: str(given.problem.layout.dtype),
    "whether gradients are wanted (torch.no_grad)": lambda given: given.differentiate,
    "the number of parameters": lambda given: len(given.problem.parameters),
    "the shapes of the parameters": lambda given: [
        tuple(tensor.shape) for tensor in given.problem.parameters
    ],
    "the number of cost integrals": lambda given: given.problem.integrals,
    "requires_grad of y0, t or the parameters": lambda given: [
        each.requires_grad and given.differentiate for each in (given.flat, given.times)
    ],
}


# ------------------------------------------------------------------------ values of parameters


def _see_to_replicas(ranks: Ranks, parameters: Sequence[torch.Tensor]) -> None:
    """Refuse parameters, whose gradients will be summed, with other values on other ranks.

    Those that drift apart by round-off, on processors of different kinds, pass. Collective.
    """
    own = torch.stack([_sums(tensor) for tensor in parameters])
    both = torch.cat([own, -own[:, :2]], dim=1).nan_to_num(nan=0.0)  # NaN is f's to tell
    ranks.comm.Allreduce(MPI.IN_PLACE, both.numpy(), MPI.MAX)
    if bool((both[:, :2] + both[:, 3:] <= both[:, 2:3]).all()):
        return
    tables = ranks.comm.allgather(own)
    spread = torch.stack([(table - tables[0])[:, :2].abs().amax(1) for table in tables]).amax(0)
    number = int((spread / tables[0][:, 2]).argmax())
    sums = ", ".join(f"{table[number, 1]:.6g} on rank {i}" for i, table in enumerate(tables[:4]))
    raise ConfigurationError(
        f"parameter {number}, of shape {tuple(parameters[number].shape)}, has other values on "
        f"other ranks of comm= (its entries add up to {sums}), but gradients are summed over "
        "replicas: begin alike with pnode.parallel.broadcast_parameters(parameters, comm); what "
        "is a rank's own must not require grad (for a solve of each rank's own, leave comm= out; "
        "of a field on a layout='s cells, let each rank have the whole, and f take its part)"
    )


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Return two sums over a parameter, one with weights, and what is round-off in them.

    The weights are those of rows and columns, so that entries may not change places. Of a
    transform's tensor, whose numbers are not to be had, nothing.
    """
    if is_wrapped(tensor):
        return torch.tensor([0.0, 0.0, math.inf], dtype=torch.float64, device="cpu")
    flat = as_reals(tensor.detach())
    dtype = torch.promote_types(flat.dtype, torch.float32)
    size = torch.linalg.vector_norm(flat, dtype=dtype).to(torch.float64)
    width = math.isqrt(len(flat) - 1) + 1 if len(flat) else 1
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)
    sums = [rows.sum(k, dtype=dtype).to(torch.float64) for k in (0, 1)]
    weighted = [x @ torch.arange(len(x), dtype=x.dtype, device=x.device).cos() for x in sums]
    whole, slack = sums[0].sum(), 1e-6 * math.sqrt(len(flat)) * size + 1e-300
    return torch.stack([weighted[0] + 2.0 * weighted[1], whole, slack]).cpu()

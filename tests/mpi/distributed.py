"""Problems over ranks for the tests, and the same written for one process without layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import pnode
from pnode.parallel import GhostLayout, Grid, total

D = torch.float64


@dataclass
class Case:
    """One problem on one communicator.

    Attributes
    ----------
    y0 : tuple of Tensor
        This rank's initial state.
    arguments : dict
        What Solver gets: the functions, params, comm or layout.
    gather : callable
        From this rank's part of one tensor of the state to the whole, flat, in the order of one
        process.
    split : tuple of callable
        Two parts of f.
    tuple_state : bool
        Whether the state is one.
    own : callable
        From what f gets to the rank's own part, of "ring" and "batch".
    """

    y0: tuple[torch.Tensor, ...]
    arguments: dict[str, Any]
    parameters: tuple[torch.Tensor, ...]
    gather: Callable[[torch.Tensor], torch.Tensor]
    split: tuple[Any, Any] = field(default=(None, None))
    tuple_state: bool = False
    own: Callable[[torch.Tensor], torch.Tensor] = lambda u: u


def joined(comm: Any, values: torch.Tensor) -> torch.Tensor:
    """The ranks' tensors after one another, flat."""
    parts = comm.allgather(values.detach().contiguous().numpy().reshape(-1))
    return torch.from_numpy(np.concatenate(parts))


def _weights(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=D)


def _ring_terms(w: torch.Tensor, nu: torch.Tensor, left: Any, own: Any, right: Any, t: Any) -> Any:
    """Diffusion; advection and a closure."""
    diffusion = 30.0 * nu * (right - 2.0 * own + left) * (1.0 + 0.1 * torch.cos(t))
    closure = 0.1 * torch.tanh(torch.stack([left, own, right], -1) @ w).sum(-1)
    return diffusion, closure - 2.0 * own * (right - left)


def ring(comm: Any, dtype: torch.dtype = D, cells: int = 13) -> Case:
    """Advection, diffusion and a closure on a ring; ``comm`` None: by torch.roll, no layout."""
    w = (0.5 * _weights(3, 3)).to(dtype).requires_grad_()
    nu = torch.tensor(0.05, dtype=dtype, requires_grad=True)
    x = torch.arange(cells, dtype=D) / cells
    whole = (torch.sin(2 * math.pi * x) + 0.3).to(dtype)

    if comm is None:

        def terms(t: Any, u: Any) -> Any:
            return _ring_terms(w, nu, torch.roll(u, 1), u, torch.roll(u, -1), t)

        arguments: dict[str, Any] = {}
        y0, gather = whole.clone(), lambda part: part.detach().reshape(-1)
    else:
        grid = Grid((cells,), comm=comm)

        def terms(t: Any, u: Any) -> Any:
            return _ring_terms(w, nu, u[:-2], u[1:-1], u[2:], t)

        arguments = {"layout": grid}
        y0 = grid.part(whole)

        def gather(part: torch.Tensor) -> torch.Tensor:
            return grid.whole(part.detach()).reshape(-1)

    arguments |= {"rhs": lambda t, u: sum(terms(t, u)), "params": [w, nu]}
    split = (lambda t, u: terms(t, u)[0], lambda t, u: terms(t, u)[1])
    width = int(comm is not None)
    return Case(
        (y0.requires_grad_(),), arguments, (w, nu), gather, split,
        own=lambda u: u[width : len(u) - width],
    )  # fmt: skip


class Plane(torch.nn.Module):
    """Two fields in the plane: diffusion and a convolution, on ghosted fields or padded ones."""

    def __init__(self, padded: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.closure = torch.nn.Conv2d(2, 2, 3).to(dtype)
        self.nu = torch.nn.Parameter(torch.tensor([1.0, 0.6], dtype=dtype))
        self.padded = padded

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """dy/dt of the owned cells."""
        if self.padded:  # rows are periodic, columns end with a copy of the last one
            u = torch.nn.functional.pad(u[None], (0, 0, 1, 1), mode="circular")
            u = torch.nn.functional.pad(u, (1, 1, 0, 0), mode="replicate")[0]
        own = u[:, 1:-1, 1:-1]
        around = u[:, :-2, 1:-1] + u[:, 2:, 1:-1] + u[:, 1:-1, :-2] + u[:, 1:-1, 2:]
        return self.nu[:, None, None] * (around - 4.0 * own) + torch.tanh(self.closure(u[None]))[0]


def plane(comm: Any, dtype: torch.dtype = D) -> Case:
    """A network on a two-dimensional grid with two fields."""
    shape = (6, 5)
    module = Plane(comm is None, dtype)
    whole = _weights(2, *shape, seed=3).to(dtype)
    arguments: dict[str, Any] = {"rhs": module}
    if comm is None:
        y0, gather = whole.clone(), lambda part: part.detach().reshape(-1)
    else:
        grid = Grid(shape, fields=2, boundary=("periodic", "replicate"), comm=comm)
        arguments["layout"] = grid
        y0 = grid.part(whole)

        def gather(part: torch.Tensor) -> torch.Tensor:
            return grid.whole(part.detach()).reshape(-1)

    return Case((y0.requires_grad_(),), arguments, tuple(module.parameters()), gather)


def graph(comm: Any, dtype: torch.dtype = D) -> Case:
    """Items that are pulled towards others, chosen at random."""
    number, degree = 9, 2
    w = torch.tensor([0.7, 0.3], dtype=dtype, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    others = torch.randint(0, number, (number, degree), generator=generator)
    whole = _weights(number, 2, seed=4).to(dtype)
    size, rank = (1, 0) if comm is None else (comm.size, comm.rank)
    first, last = rank * number // size, (rank + 1) * number // size
    mine = others[first:last]
    arguments: dict[str, Any] = {}
    if comm is not None:
        arguments["layout"] = GhostLayout(last - first, mine.reshape(-1), fields=2, comm=comm)

    def rhs(t: Any, u: Any) -> Any:
        own = u[: last - first]
        seen = u[others] if comm is None else u[last - first :].view(-1, degree, 2)
        return torch.sin((seen - own[:, None]) * w).sum(1) - 0.5 * own**3

    arguments |= {"rhs": rhs, "params": [w]}
    gather = (lambda part: part.detach().reshape(-1)) if comm is None else (
        lambda part: joined(comm, part)
    )  # fmt: skip
    return Case((whole[first:last].clone().requires_grad_(),), arguments, (w,), gather)


def batch(comm: Any, dtype: torch.dtype = D, samples: int = 7) -> Case:
    """Seven samples of three numbers in uneven shards."""
    w = (0.5 * _weights(3, 3)).to(dtype).requires_grad_()
    rate = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    whole = _weights(samples, 3, seed=2).to(dtype)
    size, rank = (1, 0) if comm is None else (comm.size, comm.rank)
    first, last = rank * samples // size, (rank + 1) * samples // size
    split = (
        lambda t, u: -rate * u**3,
        lambda t, u: torch.tanh(u @ w) * (1.0 + 0.1 * torch.cos(t)),
    )
    arguments: dict[str, Any] = {
        "rhs": lambda t, u: split[0](t, u) + split[1](t, u), "params": [w, rate],
    }  # fmt: skip
    if comm is not None:
        arguments["comm"] = comm
    gather = (lambda part: part.detach().reshape(-1)) if comm is None else (
        lambda part: joined(comm, part)
    )  # fmt: skip
    y0 = whole[first:last].clone().requires_grad_()
    return Case((y0,), arguments, (w, rate), gather, split)


def pair(comm: Any, dtype: torch.dtype = D, samples: int = 5) -> Case:
    """Positions and momenta of oscillators, a separable field of a tuple."""
    w = (0.5 * _weights(2, 2)).to(dtype).requires_grad_()
    mass = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    size, rank = (1, 0) if comm is None else (comm.size, comm.rank)
    first, last = rank * samples // size, (rank + 1) * samples // size
    y0 = tuple(
        _weights(samples, 2, seed=seed).to(dtype)[first:last].clone().requires_grad_()
        for seed in (5, 6)
    )

    def rhs(t: Any, y: Any) -> Any:
        q, p = y
        return p / mass, -torch.sin(q @ w) * (1.0 + t)

    arguments: dict[str, Any] = {"rhs": rhs, "params": [w, mass]}
    if comm is not None:
        arguments["comm"] = comm
    gather = (lambda part: part.detach().reshape(-1)) if comm is None else (
        lambda part: joined(comm, part)
    )  # fmt: skip
    return Case(y0, arguments, (w, mass), gather, tuple_state=True)


CASES = {"ring": ring, "plane": plane, "graph": graph, "batch": batch, "pair": pair}


def results(
    name: str, comm: Any, dtype: torch.dtype = D, form: str = "rhs", **options: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Solve a case and differentiate; numbers of the whole problem, the same on every rank.

    Parameters
    ----------
    name : str
        Which.
    comm : mpi4py.MPI.Intracomm or None
        The ranks; None: one process, without layout and communicator.
    dtype : torch.dtype
        Of the problem.
    form : {"rhs", "imex", "mass", "cost"}
        How the problem is given; "mass" with the same diagonal matrix on both sides; "cost" with
        a cost integral.
    **options
        For the solver.

    Returns
    -------
    numbers : dict of Tensor
        Outputs, the loss, and the gradients.
    stats : Stats
        The ledger.
    """
    case = CASES[name](comm, dtype)
    arguments = dict(case.arguments)
    if form == "imex":
        del arguments["rhs"]
        arguments["implicit"], arguments["explicit"] = case.split
    elif form == "mass":
        (y0,) = case.y0
        start = 0 if comm is None else (comm.exscan(y0.numel()) or 0)
        diagonal = 1.5 + 0.3 * torch.cos(start + torch.arange(y0.numel(), dtype=D))
        arguments["mass"] = diagonal.to(dtype).reshape(y0.shape)
    elif form == "cost":
        scale = case.parameters[0]
        arguments["cost"] = lambda t, u: t * (scale.sum() * case.own(u) ** 2).sum()
    t = torch.tensor([0.0, 0.1, 0.3], dtype=D, requires_grad=True)
    solver = pnode.Solver(**arguments, **options)
    solution = solver(case.y0 if case.tuple_state else case.y0[0], t)
    outputs = solution.ys if case.tuple_state else (solution.ys,)
    term = sum((y[-1] ** 2).sum() + (y[1] ** 4).sum() for y in outputs)
    if form == "cost":
        term = term + solution.costs[1:].sum()
    loss = term if comm is None else total(term, comm)
    loss.backward()
    numbers = {"loss": loss.detach().reshape(1)}
    if t.requires_grad:
        numbers["t"] = t.grad
    for index, (y, start) in enumerate(zip(outputs, case.y0, strict=True)):
        numbers[f"y{index}"] = torch.cat([case.gather(row) for row in y])
        numbers[f"y0{index}"] = case.gather(start.grad)
    for index, parameter in enumerate(case.parameters):
        numbers[f"p{index}"] = parameter.grad.reshape(-1)
    return numbers, solution.stats


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference, and of what."""
    assert a.keys() == b.keys()
    each = {
        key: float((a[key].double() - b[key].double()).norm() / b[key].double().norm()) for key in a
    }
    worst = max(each, key=lambda key: math.inf if math.isnan(each[key]) else each[key])
    return each[worst], worst


WORLD, SELF = MPI.COMM_WORLD, MPI.COMM_SELF

"""Batches of tangents and cotangents, of torch.func.vmap: taken one by one, or in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from pnode.base.devices import ordered, place_of
from pnode.base.errors import BackwardError
from pnode.base.transforms import batch_level, no_tangents, outside, stacked, unbatched
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.run import Run

__all__ = [
    "AdjointsFunction",
    "Runs",
    "Times",
    "as_parameter",
    "each_run",
    "one_by_one",
    "takes_batches",
]


class Times(dict[int, float]):
    """Derivatives by the times of interpolated outputs; torch.func would copy a plain dict."""


class Runs:
    """The sweeps behind one node: one, or one for each entry of a batch of tangents.

    Attributes
    ----------
    waiting : list of SecondSweep
        Sweeps that its backward pass is to take.
    """

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        self._runs = list(runs)
        self.waiting: list[Any] = []

    def append(self, run: Run) -> None:
        """Add one."""
        self._runs.append(run)

    def all(self) -> list[Run]:
        """Return all of them."""
        return self._runs

    def __getitem__(self, index: int) -> Run:
        return self._runs[index if len(self._runs) > 1 else 0]

    def only(self) -> Run:
        """Return the one, to be differentiated once more.

        Raises
        ------
        BackwardError
            If there are several.
        """
        if len(self._runs) != 1:
            raise BackwardError(
                "batches of tangents (torch.func.vmap) inside of what is differentiated once more "
                "cannot pass through a solve: take one vmap outermost, or a loop"
            )
        return self._runs[0]


def one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Apply a function to one entry of a batch after the other.

    A solve among its inputs is that of the entry, and is added to what there is if it is new.
    """
    results = []
    place = next(i for i, value in enumerate(inputs) if isinstance(value, Runs))
    runs = inputs[place]
    is_new = not runs.all()
    for index in range(info.batch_size):
        one = [
            value if dim is None else value.select(dim, index)
            for value, dim in zip(inputs, in_dims, strict=True)
        ]
        one[place] = own = Runs() if is_new else Runs([runs[index]])
        results.append(function.apply(*one))
        if is_new:
            runs.append(own[0])
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    columns = [stacked(column) for column in zip(*results, strict=True)]
    return tuple(columns), tuple(None if column is None else 0 for column in columns)


def each_run(rule: Any, ctx: Any, tangents: tuple[Any, ...]) -> Any:
    """Apply the rule of forward mode of a node to each solve behind it, and return a batch.

    They are those of a batch of torch.func, which is just outside of that forward mode.

    Raises
    ------
    BackwardError
        If they are not.
    """
    level = batch_level()
    runs = ctx.runs.all()
    if level is None:
        ctx.runs.only()
    assert level is not None
    with no_tangents():
        given = (*ctx.saved_tensors, *tangents[4:])
        rows = [unbatched(one, level, len(runs)) for one in given]
    found = []
    with outside(level):
        for k, run in enumerate(runs):
            own = [one if one is None else one[k] for one in rows]
            number = len(ctx.saved_tensors)
            context = SimpleNamespace(
                engine=ctx.engine, requests=ctx.requests, runs=Runs([run]), shape=ctx.shape,
                saved_tensors=own[:number],
            )  # fmt: skip
            found.append(rule(context, *tangents[:4], *own[number:]))
        stack = torch.stack(found)
    return torch._C._functorch._add_batch_dim(stack, 0, level)


def takes_batches(runs: Runs) -> bool:
    """Whether there is one solve, which takes backward sweeps with several cotangents."""
    if len(runs.all()) != 1:
        return False
    run = runs[0]
    return run.sweep is not None and not run.roots and run.sweep.takes_batches(run)


class AdjointsFunction(torch.autograd.Function):
    """Backward sweeps with k cotangents in one: (y0, t, cotangents, *parameters) -> (lambda, mu).

    ``one`` is the node of a single sweep, whose derivatives are those of each.
    """

    @staticmethod
    def forward(
        one: Any,
        engine: Engine,
        runs: Runs,
        y0: torch.Tensor,
        t: torch.Tensor,
        cotangents: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """Take the discrete adjoint with cotangents ``(k, T, size)``; results are ``(k, ...)``."""
        run = replace(runs[0], codes=())
        with torch.no_grad(), ordered(place_of(run.problem.layout.device)) as leave:
            rows = cotangents.detach().movedim(0, 1).contiguous()
            found = sweeps.backward(engine, run, y0, rows, wants_times=False)
            leave(found.state, *found.parameters)
        gradients = [
            as_parameter(gradient, parameter.expand(len(cotangents), *parameter.shape), used)
            for gradient, parameter, used in zip(
                found.parameters, parameters, run.used, strict=True
            )
        ]
        return found.state.to(y0.dtype), found.initial.to(y0.dtype), *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what derivatives need."""
        ctx.one, ctx.engine, ctx.runs, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Take one after the other."""
        return one_by_one(AdjointsFunction, info, in_dims, inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Add up the derivatives of each."""
        pull_back = ctx.one.backward
        found = [
            pull_back(each, *(None if out is None else out[k] for out in outputs))[4:]
            for k, each in enumerate(_each(ctx))
        ]
        y0, t, cotangents, *parameters = zip(*found, strict=True)
        sums = [_sum(column) for column in (y0, t, *parameters)]
        return None, None, None, sums[0], sums[1], stacked(cotangents), *sums[2:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the tangents of each."""
        along_y0, along_t, along, *directions = tangents[3:]
        found = [
            ctx.one.jvp(
                each, None, None, None, None, along_y0, along_t,
                None if along is None else along[k], *directions,
            )
            for k, each in enumerate(_each(ctx))
        ]  # fmt: skip
        return tuple(map(stacked, zip(*found, strict=True)))


def _each(ctx: Any) -> list[Any]:
    """Return the contexts of single sweeps."""
    y0, t, cotangents, *parameters = ctx.saved_tensors
    return [
        SimpleNamespace(
            engine=ctx.engine, runs=ctx.runs, saved_tensors=(y0, t, row, *parameters),
            needs_input_grad=(False,) * 4 + tuple(ctx.needs_input_grad[3:]),
        )
        for row in cotangents
    ]  # fmt: skip


def _sum(column: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    known = [one for one in column if one is not None]
    return torch.stack(known).sum(0) if known else None


def as_parameter(
    gradient: torch.Tensor | None, parameter: torch.Tensor, used: bool
) -> torch.Tensor | None:
    """Gradient in the parameter's dtype: zeros if it is used in vain, None if not at all."""
    if gradient is None:
        return torch.zeros_like(parameter) if used else None
    same = gradient.dtype is parameter.dtype and gradient.device == parameter.device
    return gradient if same else gradient.to(parameter)

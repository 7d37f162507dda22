"""The continuous adjoint: the state and its adjoint, integrated backwards in time.

Between two outputs, from the later one to the earlier one,

    y' = f(t, y, p),    lambda' = -f_y^T lambda,    mu' = -f_p^T lambda,

and at an output lambda jumps by the cotangent of that output (R. T. Q. Chen, Y. Rubanova,
J. Bettencourt & D. Duvenaud, Neural Ordinary Differential Equations, NeurIPS 2018, algorithm 1).
Nothing is kept of the forward sweep but its outputs, from which y starts again, as in torchdiffeq.
What comes out is the gradient of the exact flow up to the tolerance, not that of the numbers which
the forward sweep returned: a baseline, to compare the discrete adjoint with.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pnode.base.devices import ordered, place_of
from pnode.base.errors import BackwardError, FieldChanged
from pnode.base.hooks import hooks_of
from pnode.base.ledger import Ledger
from pnode.base.reals import as_reals, count_reals, from_reals
from pnode.base.surroundings import Surroundings
from pnode.base.transforms import (
    is_legacy_batch,
    legacy_batch,
    outside_compiler,
    refuse_moving,
    refuse_traced,
)
from pnode.field.held import now
from pnode.field.products import gradients
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.output_times import time_gradient
from pnode.sweeping.run import Requests, Run

if TYPE_CHECKING:
    pass

__all__ = ["AdjointField", "ContinuousFunction", "solve"]


def solve(
    engine: Engine,
    problem: InitialValueProblem,
    requests: Requests,
    y0: torch.Tensor,
    t: torch.Tensor,
) -> tuple[torch.Tensor, Run]:
    """Run a forward sweep whose gradient is that of the continuous adjoint. Collective.

    Parameters
    ----------
    engine, problem, requests, y0, t
        As for :func:`pnode.derivatives.autograd.solve`.

    Raises
    ------
    ConfigurationError
        In forward mode and in transforms of torch.func.
    """
    moving = [("y0", y0), ("t", t), *(("a parameter", tensor) for tensor in problem.parameters)]
    refuse_moving(moving, "and gradient='continuous' is for backward() alone")
    runs: list[Run] = []
    ys = ContinuousFunction.apply(engine, problem, requests, runs, y0, t, *problem.parameters)
    return ys, runs[0]


class AdjointField:
    """(f, -f_y^T lambda, -f_p^T lambda) at (y, lambda, mu): a function of one flat tensor.

    Parameters
    ----------
    problem : InitialValueProblem
        Of y.
    ledger : Ledger
        Counts the products; evaluations are the integrator's to count.

    Attributes
    ----------
    size : int
        Of (y, lambda, mu).
    used : list of bool
        Whether f has used each parameter.
    """

    def __init__(self, problem: InitialValueProblem, ledger: Ledger) -> None:
        self._function = problem.function
        self._layout = problem.layout
        self._ledger = ledger
        self._parameters = problem.parameters
        self._hooks = hooks_of(problem.parameters)
        self._sizes = [count_reals(tensor) for tensor in problem.parameters]
        self.size = 2 * problem.layout.size + sum(self._sizes)
        self.used = [False] * len(self._parameters)

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the three, with their graph if there is to be one."""
        record = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
        n = self._layout.size
        self._ledger.vjp += 1
        with torch.enable_grad():
            y, adjoint = x[:n], x[n : 2 * n]
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            value = self._layout.flatten(self._function(t, self._layout.unflatten(y)))
            if self._hooks is None:
                found = self._products(value, y, adjoint, record)
            else:
                with self._hooks.away():
                    found = self._products(value, y, adjoint, record)
        parts = [value, *(-part for part in found)]
        return torch.cat(parts if record else [part.detach() for part in parts])

    def _products(
        self, value: torch.Tensor, y: torch.Tensor, adjoint: torch.Tensor, record: bool
    ) -> list[torch.Tensor]:
        """Return f_y^T lambda and f_p^T lambda, each flat, in the state's dtype."""
        inputs = (y, *self._parameters)
        products: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        if value.requires_grad:
            # Part of the graph may be the user's, of parameters that are made of others.
            products = gradients(value, inputs, adjoint, record)
        self.used = [
            known or product is not None
            for known, product in zip(self.used, products[1:], strict=True)
        ]
        sizes = (self._layout.size, *self._sizes)
        return [
            adjoint.new_zeros(size) if product is None else as_reals(product).to(adjoint)
            for product, size in zip(products, sizes, strict=True)
        ]

    def gradients(self, mu: torch.Tensor) -> list[torch.Tensor | None]:
        """Return mu as one tensor per parameter, None for those that f has not used."""
        return [
            from_reals(part, parameter) if used else None
            for part, parameter, used in zip(
                mu.split(self._sizes) if self._sizes else (), self._parameters, self.used,
                strict=True,
            )
        ]  # fmt: skip


def _backwards(
    engine: Engine, run: Run, ys: torch.Tensor, cotangents: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Integrate from the last output to the first. Collective.

    Returns
    -------
    initial : Tensor
        lambda at the first output, without the cotangent of that.
    parameters : list of (Tensor or None)
        mu, over all ranks; None for parameters that none has used.
    """
    own, ledger = run.problem, run.stats.backward
    problem = replace(own, function=now(own.function), check_undeclared=False)
    layout, ranks, n = own.layout, own.ranks, own.layout.size
    field = AdjointField(problem, ledger)
    size = field.size
    augmented = replace(
        problem, function=field, direction=-own.direction, parameters=(), frozen=(), watched=False,
        layout=StateLayout((torch.Size((size,)),), False, layout.dtype, layout.device),
        largest=2 * own.largest + size - 2 * n,
    )  # fmt: skip
    adjoint, mu = ys.new_zeros(n), ys.new_zeros(size - 2 * n)
    for i in reversed(range(1, len(ys))):
        adjoint = adjoint + cotangents[i]
        if not ranks.parallel and not adjoint.any():
            continue  # nothing depends on the outputs from here on
        interval = replace(augmented, times=(-own.times[i], -own.times[i - 1]))
        start = torch.cat([ys[i], adjoint, mu])
        xs, back = sweeps.forward(engine, interval, start, False, Requests(plain=True))
        ledger.add(back.stats)
        _, adjoint, mu = xs[-1].split((n, n, size - 2 * n))
    return adjoint.clone(), ranks.sum_gradients(field.gradients(mu), own.parameters)


class ContinuousFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, t, *parameters) -> ys."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        problem: InitialValueProblem,
        requests: Requests,
        runs: list[Run],
        y0: torch.Tensor,
        t: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Solve, and keep nothing but the outputs."""
        surroundings = Surroundings((problem.function,), problem.compute or problem.layout.device)
        with ordered(place_of(problem.layout.device)) as leave:
            ys, run = sweeps.forward(engine, problem, y0, keep=False, requests=requests)
            leave(ys)
        ys = problem.layout.whole(ys)
        run.surroundings = surroundings
        run.let_go()
        runs.append(run)
        ctx.engine, ctx.run = engine, run
        ctx.save_for_backward(t, y0, ys, *parameters, *problem.frozen)
        return ys

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        """Integrate backwards."""
        (cotangents,) = outputs
        refuse_traced(cotangents)
        if is_legacy_batch(cotangents):
            return legacy_batch(partial(ContinuousFunction.backward, ctx), cotangents)
        t, y0, ys, *others = ctx.saved_tensors
        parameters = others[: len(ctx.run.problem.parameters)]
        state, time, *by_parameters = _Adjoint.apply(
            ctx.engine, ctx.run, ctx.needs_input_grad[5], t, y0, ys, cotangents, *parameters
        )
        state = state if ctx.needs_input_grad[4] else None
        return None, None, None, None, state, time, *by_parameters


class _Adjoint(torch.autograd.Function):
    """The backward pass as a node that cannot be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        run: Run,
        wants_times: bool,
        t: torch.Tensor,
        y0: torch.Tensor,
        ys: torch.Tensor,
        cotangents: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the derivatives with respect to y0, t (None if not wanted) and the parameters."""
        assert run.surroundings is not None
        changed = run.surroundings.differences()
        if "parameter " in changed:
            raise FieldChanged(
                f"the vector field is not that of the forward solve any more{changed}: take the "
                "gradient before it changes",
                method=engine.method.name,
            )
        size = run.problem.layout.size
        ys, cotangents = ys.detach().reshape(-1, size), cotangents.detach().reshape(-1, size)
        with ordered(place_of(run.problem.layout.device)) as leave:
            with run.surroundings.restored():
                initial, found = _backwards(engine, run, ys, cotangents)
            time = None
            if wants_times:
                time = time_gradient(
                    run, y0.detach(), ys, cotangents, initial, {}, t, parameters, again=False
                )
            by_parameters = [
                (torch.zeros_like(parameter) if used else None) if one is None
                else one.to(parameter)
                for one, parameter, used in zip(found, parameters, run.used, strict=True)
            ]  # fmt: skip
            state = initial + cotangents[0]
            leave(state, *by_parameters)
        return state, time, *by_parameters

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        """Refuse."""
        raise BackwardError(
            "second derivatives with gradient='continuous' are not supported: take "
            "gradient='discrete'"
        )

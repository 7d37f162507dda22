"""f at many states of each row of independent samples, as one node of torch's graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.errors import BackwardError
from pnode.base.evidence import differs, project
from pnode.base.ledger import Stats
from pnode.base.surroundings import Surroundings
from pnode.base.transforms import differentiable, is_legacy_batch
from pnode.base.vectors import REAL
from pnode.derivatives.batches import as_parameter
from pnode.field.products import accumulate
from pnode.field.vectorfield import record_all
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.sample_field import RowsField

__all__ = ["RowSlopes", "refuse_further"]


def refuse_further(cotangents: torch.Tensor) -> None:
    """Refuse batches of cotangents, and derivatives of the backward sweep of samples."""
    if is_legacy_batch(cotangents):
        raise BackwardError(
            "a batch of cotangents (vectorize=True, is_grads_batched) cannot pass through a "
            "solve with samples='independent': take a loop"
        )
    if differentiable():
        raise BackwardError(
            "second derivatives of a solve with samples='independent' are not supported: take "
            "samples='joint' for them"
        )


class RowSlopes:
    """f as a solve has seen it.

    Parameters
    ----------
    problem : InitialValueProblem
        Of all rows.
    stats : Stats
        Counts.
    parameters : sequence of Tensor
        Those of the problem, in the graph.
    """

    def __init__(
        self, problem: InitialValueProblem, stats: Stats, parameters: Sequence[torch.Tensor]
    ) -> None:
        self.problem, self.stats, self.parameters = problem, stats, parameters
        self.surroundings = Surroundings(
            [problem.function, problem.explicit], problem.layout.device
        )
        self.field = RowsField(problem, stats)
        if torch.is_grad_enabled():
            record_all(self.field)

    def __call__(self, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return f at times ``(J, B)``, constants, and states ``(J, B, n)``; differentiable."""
        with self.surroundings.restored():
            found: torch.Tensor = _Slopes.apply(self, t, states, *self.parameters)
        return found


class _Slopes(torch.autograd.Function):
    """(slopes, t, states, *parameters) -> f; backwards its graphs are made one by one."""

    @staticmethod
    def forward(
        ctx: Any, own: RowSlopes, t: torch.Tensor, states: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate."""
        found = [own.field.total_rate(*one) for one in zip(t, states, strict=True)]
        ctx.own, ctx.t = own, t
        ctx.noted = [project(one.reshape(-1)) for one in found]
        ctx.save_for_backward(states, *parameters, *own.problem.frozen)
        return torch.stack(found) if found else torch.zeros_like(states)

    @staticmethod
    def backward(ctx: Any, cotangents: torch.Tensor) -> Any:
        """Take the products, from the last to the first."""
        refuse_further(cotangents)
        found = ctx.own.problem.ranks.attempt(_pulled_back, ctx, cotangents)
        if found is None:  # the sums over the ranks, which follow, tell all of it
            found = [None] * (len(ctx.needs_input_grad) - 2)
        return None, None, *found


def _pulled_back(ctx: Any, cotangents: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the derivatives by the states and the parameters."""
    own, (states, *_) = ctx.own, ctx.saved_tensors
    field = RowsField(own.problem, own.stats.backward)
    field.trust(list(own.field.used))
    record_all(field)
    gradients: list[torch.Tensor | None] = [None] * len(field.parameters)
    result = torch.zeros_like(states)
    with own.surroundings.restored():
        for index in reversed(range(len(states))):
            w = cotangents[index]
            if not bool(w.ne(0.0).any()):
                continue
            parts = [one for one in (field, field.explicit) if one is not None]
            graphs = [one.graph(ctx.t[index], states[index]) for one in parts]
            value = torch.stack([one.flat_value().to(REAL) for one in graphs]).sum(dim=0)
            by = differs(value, ctx.noted[index])
            if by:
                raise field.changed(float(ctx.t[index, 0]), by)
            for one in graphs:
                products = one.vjp(w.reshape(-1).to(one.dtype))
                accumulate(gradients, products.parameters)
                result[index] += products.state.to(REAL).view_as(w)
    return [
        result,
        *(
            as_parameter(one, parameter, used)
            for one, parameter, used in zip(gradients, field.parameters, field.used, strict=True)
        ),
    ]

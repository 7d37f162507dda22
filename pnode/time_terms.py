"""Terms of derivatives by output times, where several ranks have one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.errors import BackwardError, ConfigurationError
from pnode.problem import InitialValueProblem
from pnode.rank_sums import Total, replicated
from pnode.ranks import Ranks
from pnode.rebinding import bound
from pnode.transforms import differentiable, moves

__all__ = ["TermsOfRanks"]


class TermsOfRanks:
    """What each rank's term is a function of, if derivatives of it follow.

    t and the parameters are the same on all ranks, and derivatives of the terms by them are added
    up. So f has to be given its parameters, which only a Module can be.

    Parameters
    ----------
    problem : InitialValueProblem
        Whose f is in the terms.
    t : Tensor
        Output times.
    parameters : sequence of Tensor
        Of f.

    Attributes
    ----------
    problem : InitialValueProblem
        To evaluate f of.
    t : Tensor
        To take the times from.
    exact : bool
        Whether derivatives of the terms are right.
    """

    def __init__(
        self, problem: InitialValueProblem, t: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> None:
        ranks = problem.ranks
        self.problem, self.t, self.exact = problem, t, True
        if ranks.parallel and differentiable() and any(map(moves, (t, *parameters))):
            t, *parameters = replicated(ranks.comm, (t, *parameters))
        try:
            self.problem = bound(problem, parameters, leaves=False)
            self.t = t
        except ConfigurationError:
            if not ranks.parallel:
                raise
            self.exact = False

    def known(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's own terms, which refuse derivatives that would be wrong."""
        if self.exact:
            return value
        result: torch.Tensor = _Constant.apply(value)
        return result

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, which can be differentiated. Collective."""
        ranks: Ranks = self.problem.ranks
        if not ranks.parallel:
            return value
        result: torch.Tensor = Total.apply(ranks.comm, self.known(value))[0]
        return result


class _Constant(torch.autograd.Function):
    """The same value, whose derivatives are refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor) -> torch.Tensor:
        """Copy."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Refuse."""
        raise _refusal()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        """Refuse."""
        raise _refusal()


def _refusal() -> BackwardError:
    return BackwardError(
        "second derivatives with respect to output times on several ranks need a vector field that "
        "is a torch.nn.Module and has its parameters there: write it as one, or pass t.detach()"
    )

"""Terms of derivatives by output times, where several ranks have one each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.base.errors import ConfigurationError
from pnode.base.rank_sums import Total, replicated
from pnode.base.ranks import Ranks
from pnode.base.transforms import differentiable, moves
from pnode.field.products import refused
from pnode.field.rebinding import bound
from pnode.problems.problem import InitialValueProblem

__all__ = ["TermsOfRanks"]

_REFUSAL = (
    "second derivatives with respect to output times on several ranks need a vector field that "
    "is a torch.nn.Module and has its parameters there: write it as one, or pass t.detach()"
)


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
        return value.detach() + refused(value, value, _REFUSAL)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, which can be differentiated. Collective."""
        ranks: Ranks = self.problem.ranks
        if not ranks.parallel:
            return value
        result: torch.Tensor = Total.apply(ranks.comm, self.known(value))[0]
        return result

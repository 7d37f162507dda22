"""The problem of a solve that differs from an earlier one in numbers alone.

What was validated depends on shapes, dtypes, output times and settings; a training loop comes with
the same ones in every solve.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from pnode.base.evidence import numbers_of
from pnode.base.ranks import ALONE, Ranks
from pnode.base.transforms import in_forward_mode, is_wrapped, transforms_active
from pnode.base.vectors import is_finite
from pnode.problems.problem import InitialValueProblem

__all__ = ["Repeated", "facts_of"]

_KINDS = (torch.Tensor, torch.nn.Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def facts_of(y0: Any, t: Any, declared: Sequence[torch.Tensor]) -> Hashable | None:
    """Return what tells solves from each other, but the numbers in y0; None where more may.

    Parameters
    ----------
    y0, t : object
        As the user gave them.
    declared : sequence of Tensor
        What else is to be differentiated by.
    """
    if (
        type(y0) not in _KINDS or type(t) not in _KINDS or transforms_active()
        or in_forward_mode() or torch.is_inference_mode_enabled() or torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or not (y0.is_cpu and t.is_cpu) or t.is_neg()
        or y0.layout is not torch.strided or t.layout is not torch.strided
        or is_wrapped(y0) or is_wrapped(t)
    ):  # fmt: skip
        return None
    for tensor in declared:
        if is_wrapped(tensor) or tensor.is_inference():
            return None
    return y0.shape, y0.dtype, t.dtype, t.shape, numbers_of(t), torch.is_grad_enabled()


class Repeated:
    """The last problem with gradients and that without, without what belongs to the user."""

    def __init__(self) -> None:
        # One after the other, for solves in several threads.
        self._known: dict[bool, tuple[Hashable, InitialValueProblem]] = {}

    def keep(self, facts: Hashable | None, problem: InitialValueProblem) -> None:
        """Keep a problem that has passed all checks, if it is y' = f(t, y) alone."""
        self._known.pop(torch.is_grad_enabled(), None)
        if facts is not None and (
            problem.form == "rhs" and not problem.layout.pairs and problem.norm is None
            and not problem.ranks.parallel and problem.exchange is None
        ):  # fmt: skip
            bare = problem.but(function=None, parameters=(), frozen=(), ranks=ALONE)
            self._known[torch.is_grad_enabled()] = facts, bare

    def again(
        self, facts: Hashable | None, function: Any, y0: torch.Tensor,
        declared: Sequence[torch.Tensor], ranks: Ranks,
    ) -> InitialValueProblem | None:  # fmt: skip
        """Return the problem for a new state and new tensors; None if it is to be looked at."""
        known = self._known.get(torch.is_grad_enabled())
        if known is None or facts is None or facts != known[0] or not is_finite(y0.detach()):
            return None
        wanted = declared if torch.is_grad_enabled() else ()
        return known[1].but(
            function=function, ranks=ranks,
            parameters=tuple([tensor for tensor in wanted if tensor.requires_grad]),
            frozen=tuple([tensor for tensor in wanted if not tensor.requires_grad]),
        )  # fmt: skip

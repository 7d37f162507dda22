"""Functions as graphs of the few operations that others are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pnode.solvers.compiled.trace import Untraceable

__all__ = ["INTEGERS", "decomposed"]


def _integer_power(base: complex, exponent: torch.Tensor) -> Any:
    """Return the power as one of two tensors: inductor would call it with the base as a double.

    Its result is then of floating point, and would be read as integers.
    """
    dtype = torch.result_type(exponent, base)
    if dtype.is_floating_point or dtype.is_complex:
        return NotImplemented
    return torch.pow(torch.full_like(exponent, base, dtype=dtype), exponent.to(dtype))


#: What inductor's own code for integers gets wrong, for ``make_fx``.
INTEGERS = {torch.ops.aten.pow.Scalar: _integer_power}


def _log_sigmoid_forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log sigmoid(x) and exp(-|x|), each in a form whose slope at 0 is that of one side.

    Torch's own has |x| itself, whose slope there, 0, is not that of either.
    """
    below = x < 0.0
    z = torch.exp(torch.where(below, x, -x))
    return torch.where(below, x, 0.0) - torch.log1p(z), z


_OWN = {torch.ops.aten.log_sigmoid_forward.default: _log_sigmoid_forward}


def decomposed(
    function: Callable[..., Any], examples: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return a function's graph in the operations that torch's inductor gets to see."""
    from torch._inductor.decomposition import select_decomp_table  # takes a second

    try:
        with torch.no_grad():
            graph = make_fx(
                function, decomposition_table={**select_decomp_table(), **_OWN},
                tracing_mode="fake", _allow_non_fake_inputs=True,
            )(*examples)  # fmt: skip
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Untraceable(f"torch cannot decompose it ({type(error).__name__}: {text})") from error
    graph.graph.eliminate_dead_code()
    return graph

"""Functions as graphs of the few operations that others are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pnode.solvers.compiled.trace import Untraceable

__all__ = ["decomposed"]


def decomposed(
    function: Callable[..., Any], examples: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return a function's graph in the operations that torch's inductor gets to see."""
    from torch._inductor.decomposition import select_decomp_table  # takes a second

    try:
        with torch.no_grad():
            graph = make_fx(
                function, decomposition_table=select_decomp_table(), tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*examples)  # fmt: skip
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Untraceable(f"torch cannot decompose it ({type(error).__name__}: {text})") from error
    graph.graph.eliminate_dead_code()
    return graph

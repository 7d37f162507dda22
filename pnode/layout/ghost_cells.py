"""Ghost cells in torch's graphs, and those of a state together with what it drives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pnode.layout.layouts import Layout
from pnode.layout.pair_layout import PairLayout

__all__ = ["DrivenCells", "ghosted"]


def ghosted(layout: Layout, owned: torch.Tensor) -> torch.Tensor:
    """Return the ghosted part of a state as a function of it, shape ``ghosted_shape``. Collective.

    So are its derivatives, whichever there are.
    """
    return _Exchange.apply(layout, False, owned.reshape(-1)).view(layout.ghosted_shape)


class _Exchange(torch.autograd.Function):
    """``gather`` of (layout, transposed, state), flat, or its transpose, ``scatter``."""

    @staticmethod
    def forward(layout: Layout, transposed: bool, value: torch.Tensor) -> torch.Tensor:
        """Exchange. Collective."""
        if transposed:
            return layout.scatter(value.contiguous())
        return layout.gather(value.contiguous()).reshape(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep what derivatives need."""
        ctx.layout, ctx.transposed, _ = inputs

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        """Exchange the other way. Collective."""
        return None, None, _Exchange.apply(ctx.layout, not ctx.transposed, outputs[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        """Exchange tangents. Collective."""
        result: torch.Tensor = _Exchange.apply(ctx.layout, ctx.transposed, tangents[2])
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        """Exchange one state after the other."""
        layout, transposed, values = inputs
        rows = [_Exchange.apply(layout, transposed, row) for row in values.unbind(in_dims[2])]
        return torch.stack(rows), 0


class DrivenCells(Layout):
    """Ghost cells of a state with its tangents and integrals, in one flat tensor.

    Tangents have ghost cells as the state has, integrals have none.

    Parameters
    ----------
    base : Layout
        Of the state.
    tangents : int
        How many tangents there are.
    integral : tuple of int or None
        Shape of the integrals; None for none.
    """

    def __init__(
        self, base: Layout, tangents: int = 0, integral: Sequence[int] | None = None
    ) -> None:
        self.base, self.comm, self.integral = base, base.comm, integral
        integrals = 0 if integral is None else math.prod(integral)
        self.owned = PairLayout(base.size, tangents, integrals=integrals)
        self.seen = PairLayout(math.prod(base.ghosted_shape), tangents, integrals=integrals)
        self.shape, self.ghosted_shape = (self.owned.total,), (self.seen.total,)

    def forest(self) -> Any:
        """Return that of the state, but beside tangents None: nothing looks at integrals."""
        return None if self.owned.tangents else self.base.forest()

    def pattern(self) -> None:
        """Return that it is not known where derivatives may be non-zero."""
        return

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        flat = owned.reshape(-1)
        parts = [self.base.gather(part).reshape(-1) for part in self.owned.parts(flat)]
        return self.seen.join([*parts, self.owned.integral(flat)])

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        parts = [self.base.scatter(part) for part in self.seen.parts(ghosted)]
        return self.owned.join([*parts, self.seen.integral(ghosted)])

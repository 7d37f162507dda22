"""Parts of the graph of a state and what it drives, each of which is a graph by itself."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization, Shared
from pnode.field.products import edges_work, joined_edges
from pnode.layout.pair_layout import PairLayout

__all__ = ["PartLinearization", "integrands_by_state"]

# Integrals whose integrands' derivatives are kept, instead of products with the pair's graph.
_FEW = 16
_ONE = torch.Size()


class PartLinearization(Linearization):
    """One of the parts that a pair's value was joined of, by the state that comes first in it.

    Parameters
    ----------
    whole : Linearization
        Of the pair.
    shared : Shared
        What it has in common with others of its field.
    edge : GradientEdge
        Where the part's graph ends.
    value : Tensor
        A flat tensor of the part's shape and dtype, its value if that is to be asked for.
    size : int
        Entries of the state.
    """

    def __init__(
        self, whole: Linearization, shared: Shared, edge: Any, value: torch.Tensor, size: int
    ) -> None:
        super().__init__(shared, whole._leaves, value, whole._sign, whole._time)
        self._end, self._recorded = edge, True
        self._size = size

    @classmethod
    def of(
        cls, whole: Linearization, layout: PairLayout, shared: Shared | None = None
    ) -> PartLinearization | None:
        """Return a part of a pair's graph; None where it cannot be told from the others.

        Parameters
        ----------
        whole : Linearization
            Of the pair.
        layout : PairLayout
            Of the pair.
        shared : Shared or None
            Of the state's own field, for the state's part; None for that of the integrals.
        """
        if type(whole) not in (Linearization, cls) or len(whole._leaves) > 1 or not edges_work:
            return None  # cells of others, or a rate, are what it depends on
        value, edges = whole._value.detach(), joined_edges(whole._end)
        if not edges:
            return None
        if shared is None:
            shared, edge, value = whole._shared, edges[-1], layout.integral(value)
        elif len(edges) == 1 + layout.tangents + bool(layout.integrals):
            edge, value = edges[0], value[: layout.size]
        else:
            return None  # a state of several parts
        return None if edge is None else cls(whole, shared, edge, value, layout.size)

    def _flat(self, product: torch.Tensor | None, batch: torch.Size = _ONE) -> torch.Tensor:
        return super()._flat(product, batch)[..., : self._size]

    def _record_vjp(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        cotangent, (product,) = super()._record_vjp()
        with torch.enable_grad():
            return cotangent, (product[: self._size],)

    def _rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        return [found[..., : self._size] for found in super()._rows(cotangents)]


def integrands_by_state(whole: Linearization, layout: PairLayout) -> torch.Tensor | None:
    """Return the derivatives of a pair's integrands by the state, ``(integrals, size)``, if few."""
    if layout.tangents or not 0 < layout.integrals <= _FEW:
        return None
    part = PartLinearization.of(whole, layout)
    if part is None:
        return None
    like = part.flat_value()
    return part.vjps(torch.eye(len(like), dtype=like.dtype, device=like.device)).to(REAL)
